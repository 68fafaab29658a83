"""Layers of random features, y = Ψ φ(x) + b: the maps inside φ are drawn once and never trained, Ψ is solved or trained.

Sources: SNNK, Sehanobish et al., ICLR 2024, arXiv 2310.13225; EUGen, Kim et al., NeurIPS 2025, arXiv 2410.09771 (no official
code of it is known, so its layers follow the description). Arc-cosine kernel: Cho and Saul, NeurIPS 2009. Orthogonal draws:
Yu et al., NeurIPS 2016.

Symbols: d inputs, l outputs, m features (directions), G ``(m, d)`` with isotropic rows, k degree.

Deviations from the authors' code for SNNK: the ½ in front of ‖x‖² is kept for inputs of any number of dimensions, and maps are
Gaussian where its adapter draws them uniformly from [0, 1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import pi, prod, sqrt
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

Kind = Literal["relu", "cos", "exp"]
KINDS = ("relu", "cos", "exp")


# -- maps and features -----------------------------------------------------------------------------------------------------
def directions(rows: int, columns: int, *, seed: int, orthogonal: bool = False) -> Tensor:
    """G, drawn on the CPU in float64, so that every dtype and device has the same maps up to rounding.

    Args:
        rows: m.
        columns: d.
        seed: of a generator of its own.
        orthogonal: make the rows orthogonal in blocks of d, each of the length of an independent Gaussian vector. Every row
            is still N(0, I), so estimates stay unbiased; they vary less.

    Returns:
        Shape ``(rows, columns)``, float64.

    Raises:
        ValueError: no row or column.
    """
    if rows < 1 or columns < 1:
        raise ValueError(f"there are {rows} directions in {columns} dimensions, expected at least one of each")
    return _drawn(rows, columns, orthogonal, torch.Generator().manual_seed(seed))


def _drawn(rows: int, columns: int, orthogonal: bool, generator: torch.Generator) -> Tensor:
    plain = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    if not orthogonal:
        return plain
    blocks = []
    for start in range(0, rows, columns):
        square = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(square)
        blocks.append((q * r.diagonal().sign()).T[: rows - start])  # the signs make it uniform over rotations
    lengths: Tensor = plain.norm(dim=1, keepdim=True)
    return torch.cat(blocks) * lengths


def arc_cosine_features(x: Tensor, maps: Tensor, threshold: float = 0.0) -> Tensor:
    """φ(x) = m^{-½} max(Gx, c), of ReLU-SNNK. With c = 0, φ(x)ᵀφ(w) estimates the arc-cosine kernel, not ReLU(wᵀx).

    Args:
        x: ``(..., d)``.
        maps: G, ``(m, d)``.
        threshold: c.

    Returns:
        ``(..., m)``.
    """
    return F.linear(x, maps).clamp_min(threshold) / sqrt(len(maps))


def arc_cosine_kernel(x: Tensor, w: Tensor) -> Tensor:
    """E max(gᵀx, 0) max(gᵀw, 0) = ‖x‖‖w‖ (sin θ + (π − θ) cos θ) / 2π, θ the angle between both.

    Args:
        x: ``(N, d)``.
        w: ``(l, d)``.

    Returns:
        ``(N, l)``.
    """
    lengths: Tensor = x.norm(dim=-1)[:, None] * w.norm(dim=-1)
    cosine = (x @ w.T / lengths.clamp_min(torch.finfo(x.dtype).tiny)).clamp(-1, 1)
    angle = cosine.arccos()
    return lengths * (angle.sin() + (pi - angle) * cosine) / (2 * pi)


def exponential_features(
    x: Tensor, maps: Tensor, rate: Tensor | complex = 1.0, amplitude: Tensor | complex = 1.0
) -> Tensor:
    """φ(x)_i = m^{-½} A_i exp(a_i g_iᵀx − a_i² ‖x‖² / 2), the universal random features of SNNK.

    Σ_i φ(x)_i φ'(w)_i estimates the mean over i of A_i A'_i exp(a_i a'_i xᵀw): with a = a' = 1 it is exp(xᵀw); with a_i = ±j on
    one side and 1 on the other it is cos(xᵀw), whose real part is to be taken of the finished sum. No side is conjugated.

    Args:
        x: ``(..., d)``, real.
        maps: G, ``(m, d)``, real.
        rate: a, a number or ``(m,)``, real or complex.
        amplitude: A, the same.

    Returns:
        ``(..., m)``, complex where a or A is.
    """
    a, scale = (torch.as_tensor(value, device=x.device) for value in (rate, amplitude))
    if a.is_complex() or scale.is_complex():
        a, scale = a.to(x.dtype.to_complex()), scale.to(x.dtype.to_complex())
    else:
        a, scale = a.to(x.dtype), scale.to(x.dtype)
    half_square = x.square().sum(-1, keepdim=True) / 2
    return scale * (a * F.linear(x, maps) - a.square() * half_square).exp() / sqrt(len(maps))


def polynomial_features(x: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """φ(x) = ⊙_j (G_j x): one block of EUGen, of the degree that the number of maps is.

    (1/m) φ(x)ᵀφ(w) has the mean (xᵀw)^i for i independent isotropic maps, and a variance that falls as 1/m.

    Args:
        x: ``(..., d)``.
        maps: G_1 … G_i, each ``(m, d)``, at least one.

    Returns:
        ``(..., m)``.
    """
    result = F.linear(x, maps[0])
    for other in maps[1:]:
        result = result * F.linear(x, other)
    return result


# -- layers ----------------------------------------------------------------------------------------------------------------
class Window(NamedTuple):
    """What a convolution sees of its input at a time, as ``nn.Conv2d`` has it; padding is with zeros."""

    channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (0, 0)
    dilation: tuple[int, int] = (1, 1)


class RandomFeatureLayer(nn.Module, ABC):
    """y = Ψ φ(x) + b in place of a linear layer or, window by window, of a convolution; with or without the activation behind.

    Inputs are ``(..., d)``, any number of dimensions in front; with a ``window`` they are maps ``(N, C, H, W)``, and φ sees the
    patch under every position of the kernel as a vector of d = C · height · width entries in the order of ``nn.Unfold``. What
    the maps are multiplied with is one convolution, so that no patch is ever copied out.

    φ sees x̂ = (x − shift) / scale; :meth:`standardise` sets both from data. A patch is shifted before it is padded.

    Maps, offsets and the scaling are buffers: they move and are saved with the module. Beside them the state holds the seed and
    the distribution, so that :meth:`redrawn` can tell whether the maps could be drawn again here; nothing is redrawn unasked,
    for another version of PyTorch may draw other numbers.

    Args:
        in_features: d.
        out_features: l.
        features: m.
        maps: matrices ``(m, d)`` that φ multiplies with.
        width: entries of φ(x).
        norm: whether maps also read ‖x̂‖.
        orthogonal: see :func:`directions`.
        seed: of the maps.
        window: of a convolution.
        device: of the weights; ``meta`` draws nothing.
        dtype: of weights and maps.

    Attributes:
        weight: Ψ ``(l, width)``, zeros to begin with, a parameter.
        bias: b ``(l,)``, a parameter.

    Raises:
        ValueError: a number below 1.
    """

    maps: Tensor
    offsets: Tensor
    slopes: Tensor | None
    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        features: int,
        *,
        maps: int,
        width: int,
        norm: bool,
        orthogonal: bool,
        seed: int,
        window: Window | None,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "out_features": out_features, "features": features}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}, expected at least 1")
        if window is not None and in_features != window.channels * prod(window.kernel_size):
            raise ValueError(
                f"in_features is {in_features}, and a window of {window.channels} channels and {window.kernel_size} has "
                f"{window.channels * prod(window.kernel_size)} entries"
            )
        self.in_features, self.out_features, self.features = in_features, out_features, features
        self.orthogonal, self.seed, self.window = orthogonal, seed, window
        self.isotropic = True
        self._count, self._norm, self._drawn_by = maps, norm, str(torch.__version__)
        own = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.zeros(out_features, width, **own))
        self.bias = nn.Parameter(torch.zeros(out_features, **own))
        self.register_buffer("maps", torch.empty(maps * features, in_features, **own))
        self.register_buffer("offsets", torch.empty(maps * features, **own))
        self.register_buffer("slopes", torch.empty(maps * features, **own) if norm else None)
        self.register_buffer("shift", torch.zeros(in_features if window is None else window.channels, **own))
        self.register_buffer("scale", torch.ones((), **own))
        if not self.maps.is_meta:
            with torch.no_grad():
                for mine, drawn in zip(self._of_maps(), self.redrawn(), strict=True):
                    mine.copy_(drawn)

    @abstractmethod
    def expand(self, products: Tensor, square: Tensor | None) -> Tensor:
        """φ from ``products`` of x̂⁺ with all maps ``(..., maps · m)`` and, where it is asked for, ‖x̂⁺‖² ``(..., 1)``."""

    @property
    def needs_square(self) -> bool:
        """Whether φ asks for ‖x̂⁺‖²."""
        return False

    def _of_maps(self) -> list[Tensor]:
        return [self.maps, self.offsets, *([] if self.slopes is None else [self.slopes])]

    def redrawn(self, rows: Tensor | None = None) -> list[Tensor]:
        """Maps, offsets and, where the norm is read, slopes as the seed gives them here, in this layer's dtype and device.

        Args:
            rows: what :meth:`draw_from` was given, if it was called.
        """
        generator = torch.Generator().manual_seed(self.seed)
        columns = self.in_features + 1 + self._norm
        drawn = torch.cat([_drawn(self.features, columns, self.orthogonal, generator) for _ in range(self._count)])
        parts = [drawn[:, : self.in_features], *drawn[:, self.in_features :].T]
        if rows is not None:
            known = rows.detach().flatten(1).to("cpu", torch.float64)
            mixed = [_drawn(self.features, len(known), self.orthogonal, generator) for _ in range(self._count)]
            parts[0] = torch.cat(mixed) @ known * sqrt(self.in_features) / known.norm().clamp_min(1e-300)
        return [part.to(self.maps.device, self.maps.dtype).contiguous() for part in parts]

    @torch.no_grad()
    def draw_from(self, rows: Tensor) -> None:
        """Draw the maps anew as random combinations of given directions, of the same mean length: g ~ N(0, RᵀR · d / ‖R‖²).

        Of a layer's weights these are where it looks. Estimates that ask for isotropic maps are none any more, and
        the seed alone cannot give the maps again: R is needed, too.

        Args:
            rows: R, ``(n, d)`` or a convolution's weights.
        """
        self.maps.copy_(self.redrawn(rows)[0])
        self.isotropic = False

    def regenerable(self, rows: Tensor | None = None) -> bool:
        """Whether this machine and version draw these very maps from the seed, with the ``rows`` that they were drawn from."""
        return all(map(torch.equal, self._of_maps(), self.redrawn(rows)))

    @override
    def get_extra_state(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "distribution": "orthogonal" if self.orthogonal else "gaussian",
            "isotropic": self.isotropic,
            "torch": self._drawn_by,
        }

    @override
    def set_extra_state(self, state: Any) -> None:
        self.seed, self.orthogonal = int(state["seed"]), state["distribution"] == "orthogonal"
        self.isotropic = bool(state["isotropic"])
        self._drawn_by = str(state["torch"])

    @property
    def numbers(self) -> int:
        """Everything that inference multiplies with or adds: maps, scaling, Ψ and b."""
        return sum(t.numel() for t in [*self._of_maps(), self.shift, self.scale]) + self.learned

    @property
    def learned(self) -> int:
        """Entries of Ψ and b."""
        return self.weight.numel() + self.bias.numel()

    @torch.no_grad()
    def standardise(self, mean: Tensor, variance: Tensor) -> None:
        """Set shift and scale from what the inputs are like, so that x̂ has mean 0 and length 1 on average.

        Args:
            mean: of every input, of a map of every channel, ``(d,)`` or ``(C,)``.
            variance: the same.
        """
        area = 1 if self.window is None else prod(self.window.kernel_size)
        length = (variance.sum() * area).sqrt()
        self.shift.copy_(mean)
        self.scale.copy_(length if length > 0 else torch.ones_like(length))

    def phi(self, x: Tensor) -> Tensor:
        """φ(x): ``(..., d)`` to ``(..., width)``, a map ``(N, C, H, W)`` to ``(N, H', W', width)``.

        Raises:
            ValueError: the input does not fit.
        """
        window = self.window
        if (x.ndim != 4 or x.shape[1] != window.channels) if window else x.shape[-1:] != (self.in_features,):
            wanted = f"(N, {window.channels}, H, W)" if window else f"(..., {self.in_features})"
            raise ValueError(f"the input has shape {tuple(x.shape)}, expected {wanted}")
        square = None
        wanted_square = self.needs_square or self._norm
        if window is None:
            x = (x - self.shift) / self.scale
            products = F.linear(x, self.maps, self.offsets)
            if wanted_square:
                square = x.square().sum(-1, keepdim=True)
        else:
            x = (x - self.shift[:, None, None]) / self.scale
            kernels = self.maps.view(len(self.maps), window.channels, *window.kernel_size)
            where: dict[str, Any] = {"stride": window.stride, "padding": window.padding, "dilation": window.dilation}
            products = F.conv2d(x, kernels, self.offsets, **where).movedim(1, -1)
            if wanted_square:
                every = x.new_ones(1, 1, *window.kernel_size)
                square = F.conv2d(x.square().sum(1, keepdim=True), every, **where).movedim(1, -1)
        if self.slopes is not None and square is not None:
            products = products + square.clamp_min(0).sqrt() * self.slopes
        return self.expand(products, None if square is None or not self.needs_square else square + 1)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """``(..., d)`` to ``(..., l)``; a map ``(N, C, H, W)`` to ``(N, l, H', W')``."""
        y = F.linear(self.phi(x), self.weight, self.bias)
        return y if self.window is None else y.movedim(-1, 1)

    @override
    def extra_repr(self) -> str:
        window = "" if self.window is None else f", window={tuple(self.window)}"
        return f"{self.in_features}, {self.out_features}, features={self.features}, seed={self.seed}{window}"


class SNNK(RandomFeatureLayer):
    """A scalable neural network kernel: φ of x⁺ = [x; 1], a kernel of input and weights instead of σ(wᵀx + b).

    ``relu``: φ = m^{-½} max(Gx⁺, 0), for the arc-cosine kernel. ``exp``: φ = m^{-½} exp(Gx⁺ − ‖x⁺‖²/2), for exp(xᵀw). ``cos``,
    for cos(xᵀw): the real and the imaginary part of m^{-½} exp(j Gx⁺ + ‖x⁺‖²/2), the latter with its sign turned, so that
    Ψ = [Re Ψ_c, Im Ψ_c] gives the real part of the whole complex product.

    Args:
        in_features: d.
        out_features: l.
        features: m.
        kind: ``relu``, ``cos`` or ``exp``.
        orthogonal: see :func:`directions`.
        seed: of the maps.
        window: of a convolution.
        device: of the weights.
        dtype: of weights and maps.

    Raises:
        ValueError: an unknown kind, a number below 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        features: int,
        *,
        kind: Kind = "relu",
        orthogonal: bool = False,
        seed: int = 0,
        window: Window | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
        super().__init__(
            in_features,
            out_features,
            features,
            maps=1,
            width=features * (1 + (kind == "cos")),
            norm=False,
            orthogonal=orthogonal,
            seed=seed,
            window=window,
            device=device,
            dtype=dtype,
        )
        self.kind = kind

    @property
    @override
    def needs_square(self) -> bool:
        return self.kind != "relu"

    @override
    def expand(self, products: Tensor, square: Tensor | None) -> Tensor:
        root = sqrt(self.features)
        if square is None:
            return products.relu() / root
        if self.kind == "exp":
            return (products - square / 2).exp() / root
        return torch.cat((products.cos(), -products.sin()), -1) * (square / 2).exp() / root

    @torch.no_grad()
    def start_from(self, layer: nn.Linear | nn.Conv2d) -> SNNK:
        """Set Ψ to the features of the layer's own weights, so that every output estimates the kernel of x⁺ and w⁺ = [w; b].

        Shift and scale are set back: the kernel is that of the inputs as they are.

        Returns:
            Itself.
        """
        self.shift.zero_()
        self.scale.fill_(1)
        weight, bias = _weights_of(layer)
        augmented = torch.cat((weight, bias[:, None]), 1).to(self.maps.dtype)
        maps = torch.cat((self.maps, self.offsets[:, None]), 1)
        features = arc_cosine_features if self.kind == "relu" else exponential_features
        psi = features(augmented, maps)
        self.weight.zero_()
        self.weight[:, : self.features] = psi  # of cos the weights' features are real: the imaginary half stays 0
        self.bias.zero_()
        return self


class EUGen(RandomFeatureLayer):
    """A polynomial of degree k in random directions of x⁺ = [x; 1; ‖x‖].

    The block of degree i is ⊙_{j≤i} (G_j^i x⁺) ∈ R^m, with i maps of its own; φ is blocks 1 … k one after another, and the
    block of degree 0, which is constant, is the bias.

    Args:
        in_features: d.
        out_features: l.
        features: m, of every block.
        degree: k.
        orthogonal: see :func:`directions`.
        seed: of the maps.
        window: of a convolution.
        device: of the weights.
        dtype: of weights and maps.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        features: int,
        *,
        degree: int = 2,
        orthogonal: bool = False,
        seed: int = 0,
        window: Window | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if degree < 1:
            raise ValueError(f"degree is {degree}, expected at least 1")
        super().__init__(
            in_features,
            out_features,
            features,
            maps=degree * (degree + 1) // 2,
            width=degree * features,
            norm=True,
            orthogonal=orthogonal,
            seed=seed,
            window=window,
            device=device,
            dtype=dtype,
        )
        self.degree = degree

    @override
    def expand(self, products: Tensor, square: Tensor | None) -> Tensor:
        return self._blocks(products)

    def _blocks(self, products: Tensor) -> Tensor:
        factors = list(torch.split(products, self.features, -1))
        blocks = []
        for degree in range(1, self.degree + 1):
            block = factors.pop(0)
            for _ in range(degree - 1):
                block = block * factors.pop(0)
            blocks.append(block)
        return torch.cat(blocks, -1) if len(blocks) > 1 else blocks[0]

    @torch.no_grad()
    def start_from(self, layer: nn.Linear | nn.Conv2d, coefficients: Sequence[float]) -> EUGen:
        """Set Ψ and b so that the output's mean over draws is Σ_i a_i (wᵀx + b)^i: an unbiased estimate, its variance ∝ 1/m.

        Of an activation these are the coefficients of a polynomial fit, whose error stays.

        Args:
            layer: with the weights w and b.
            coefficients: a_0 … a_k.

        Returns:
            Itself.

        Raises:
            ValueError: another number of coefficients than k + 1.
        """
        if len(coefficients) != self.degree + 1:
            raise ValueError(
                f"there are {len(coefficients)} coefficients, expected {self.degree + 1}: a_0 to a_{self.degree}"
            )
        self.shift.zero_()
        self.scale.fill_(1)
        weight, bias = _weights_of(layer)
        products = F.linear(weight.to(self.maps.dtype), self.maps) + bias[:, None].to(self.maps.dtype) * self.offsets
        sizes = products.new_tensor(coefficients[1:]).repeat_interleave(self.features) / self.features
        self.weight.copy_(self._blocks(products) * sizes)
        self.bias.fill_(coefficients[0])
        return self


def _weights_of(layer: nn.Linear | nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weights ``(l, d)`` and biases ``(l,)``, which are zeros where there are none."""
    weight = layer.weight.flatten(1)
    return weight, weight.new_zeros(len(weight)) if layer.bias is None else layer.bias


def geometry(layer: nn.Linear | nn.Conv2d) -> dict[str, Any]:
    """What a random-feature layer in place of ``layer`` must be made with: sizes, window, device and dtype.

    Raises:
        ValueError: a convolution in groups, or one that pads with something else than zeros.
    """
    weight = layer.weight
    made = {
        "in_features": weight[0].numel(),
        "out_features": len(weight),
        "device": weight.device,
        "dtype": weight.dtype,
    }
    if isinstance(layer, nn.Linear):
        return made
    reason = unfit(layer)
    if reason is not None:
        raise ValueError(f"{layer} cannot be replaced: {reason}")
    where = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return {**made, "window": Window(layer.in_channels, *where)}  # type: ignore[arg-type]


def unfit(layer: nn.Conv2d) -> str | None:
    """Why a convolution cannot be replaced; ``None``: it can."""
    if layer.groups != 1:
        return f"it works in {layer.groups} groups"
    if layer.padding_mode != "zeros":
        return f"it pads with {layer.padding_mode!r} instead of zeros"
    return None


def features_within(make: Callable[..., RandomFeatureLayer], budget: int, *, learned: bool = False) -> int:
    """The most features m with which a layer stays within so many numbers; 0 where one is too many.

    Args:
        make: makes the layer, ``make(features=m, device="meta")``.
        budget: of :attr:`~RandomFeatureLayer.numbers`, or of :attr:`~RandomFeatureLayer.learned`.
        learned: count Ψ and b alone, as the papers do.
    """
    one, two = (make(features=m, device="meta") for m in (1, 2))
    first, second = (layer.learned if learned else layer.numbers for layer in (one, two))
    return max(0, 1 + (budget - first) // (second - first))
