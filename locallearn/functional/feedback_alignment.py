"""Equations of the feedback alignment family: the error goes back through other weights than those of the forward pass.

Sources: feedback alignment (FA): Lillicrap et al. 2016, arXiv 1411.0247; direct feedback alignment (DFA): Nøkland 2016,
arXiv 1609.01596; sign symmetry (uSF, brSF, frSF): Liao et al. 2016, arXiv 1510.05067; weight mirror and Kolen-Pollack:
Akrout et al. 2019, arXiv 1904.05391; product feedback alignment (PFA): Li and Benna 2024, arXiv 2405.20594. Where a
paper and its official code differ, the code is followed.

Symbols: a layer computes z = h Wᵀ + b, with W of shape (d_out, d_in); δ = ∂L/∂z, one row per sample (and position);
∇W = δᵀ h and ∇b = Σ δ are exact everywhere. Only the signal g that goes to the layer below is replaced. Feedback
weights B are kept in W's layout, so that backpropagation is B = W. Convolutions are written the same way: W of shape
(d_out, d_in / groups, height, width), and δ W stands for the convolution's input gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable

from locallearn.functional._angles import angle as angle
from locallearn.functional._widths import weight_count


class Geometry(NamedTuple):
    """How a 2-d convolution lies on its input; a linear layer has none.

    Attributes:
        stride: (vertical, horizontal).
        padding: zeros on either side, (vertical, horizontal).
        dilation: (vertical, horizontal).
        groups: number of groups of channels that do not see each other.
    """

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1


class OutputError:
    """Where the output layer leaves δ_L in its backward pass, and all other layers find it; a new one for every pass.

    Attributes:
        delta: δ_L with one row per sample, ``(N, K)``; ``None`` until the output layer's backward pass has run.
    """

    delta: Tensor | None = None


def forward(inputs: Tensor, weight: Tensor, bias: Tensor | None = None, geometry: Geometry | None = None) -> Tensor:
    """Return z = h Wᵀ + b, or the convolution that ``geometry`` describes."""
    return F.linear(inputs, weight, bias) if geometry is None else F.conv2d(inputs, weight, bias, *geometry)


def input_gradient(delta: Tensor, feedback: Tensor, inputs: Tensor, geometry: Geometry | None = None) -> Tensor:
    """Return g = δ B, the signal for the layer below.

    Args:
        delta: δ, shape of the layer's output.
        feedback: B, shape of W.
        inputs: h, read for its shape and its memory format only.
        geometry: of a convolution; ``None``: a linear layer.
    """
    return delta @ feedback if geometry is None else _convolution(delta, inputs, feedback, geometry, 0)[0]


def parameter_gradients(
    delta: Tensor, inputs: Tensor, shape: Sequence[int], geometry: Geometry | None = None, bias: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return the exact ∇W = δᵀ h, and ∇b = Σ δ where there is a bias.

    Args:
        delta: δ, shape of the layer's output.
        inputs: h.
        shape: of W, whose values are not needed.
        geometry: of a convolution; ``None``: a linear layer.
        bias: whether the layer has a bias.
    """
    if geometry is None:
        rows = delta.reshape(-1, delta.shape[-1])
        return rows.T @ inputs.reshape(-1, inputs.shape[-1]), rows.sum(0) if bias else None
    stand_in = delta.new_empty(1).expand(*shape)
    _, weight, of_bias = _convolution(delta, inputs, stand_in, geometry, 1, bias)
    return weight, of_bias if bias else None


def carry(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, feedback: Tensor | None, geometry: Geometry | None = None
) -> Tensor:
    """Run a layer whose backward pass sends δ B down instead of δ W.

    FA with a random B, sign symmetry with `sign_symmetric` or `sign_magnitude`, the weight mirror with a B that follows
    W. If ``feedback`` requires a gradient, it gets ∇W: the rule of Kolen and Pollack.

    Args:
        inputs: h, shape ``(..., d_in)`` or ``(N, channels, height, width)``.
        weight: W. It is read in the forward pass only.
        bias: b, shape ``(d_out,)``.
        feedback: B, shape of W; ``None``: nothing below the layer learns.
        geometry: of a convolution; ``None``: a linear layer.
    """
    return cast(Tensor, _Carried.apply(inputs, weight, bias, feedback, geometry))


def carry_product(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    fixed: Tensor,
    learned: Tensor,
    geometry: Geometry | None = None,
) -> Tensor:
    """Run a layer whose backward pass sends δ B R down, B fixed and R learned (PFA).

    As published: m = δ B, g = m R, ∇R = mᵀ h. Since ∇R = Bᵀ ∇W and g = δ (B R), the products may also be taken in the
    other order, whose cost does not grow with the number of rows of δ. Whichever of the two needs fewer operations is
    used; they differ by rounding only.

    Args:
        inputs: h, shape ``(..., d_in)`` or ``(N, channels, height, width)``.
        weight: W. It is read in the forward pass only.
        bias: b, shape ``(d_out,)``.
        fixed: B, shape ``(d_out, k d_out / groups)``, for a convolution with ``1, 1`` after it.
        learned: R, the shape of W with k d_out rows; a convolution's R has W's kernel, stride and padding.
        geometry: of a convolution; ``None``: a linear layer.
    """
    return cast(Tensor, _Product.apply(inputs, weight, bias, fixed, learned, geometry))


def carry_direct(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    feedback: Tensor,
    error: OutputError,
    last: bool,
    geometry: Geometry | None = None,
) -> Tensor:
    """Run a layer whose backward pass sends δ_L B down, δ_L the error of the output layer (DFA).

    Args:
        inputs: h, shape ``(N, ...)``.
        weight: W. It is read in the forward pass only.
        bias: b, shape ``(d_out,)``.
        feedback: B, shape ``(K, entries of h per sample)``.
        error: where δ_L is left and found; the same for all layers of one forward pass.
        last: this is the output layer, and leaves its δ as δ_L.
        geometry: of a convolution; ``None``: a linear layer.

    Raises:
        RuntimeError: in the backward pass, if the error comes to a layer before the output layer's has run.
    """
    return cast(
        Tensor,
        _Direct.apply(inputs, weight, bias, feedback, error, last, geometry),
    )


def product(fixed: Tensor, learned: Tensor, groups: int = 1) -> Tensor:
    """Return B R, the path that stands for W in PFA, in the layout of W; arguments as in `carry_product`."""
    blocks = fixed.reshape(groups, -1, fixed.shape[1])
    return torch.bmm(blocks, learned.reshape(groups, fixed.shape[1], -1)).reshape(len(fixed), *learned.shape[1:])


def product_gradient(fixed: Tensor, weight_gradient: Tensor, expanded: int, groups: int = 1) -> Tensor:
    """Return ∇R = Bᵀ ∇W, in the layout of R.

    Args:
        fixed: B as in `carry_product`.
        weight_gradient: ∇W.
        expanded: k d_out, the number of rows of R.
        groups: of the convolution.
    """
    blocks = fixed.reshape(groups, -1, fixed.shape[1]).mT
    rows = weight_gradient.reshape(groups, blocks.shape[2], -1)
    return torch.bmm(blocks, rows).reshape(expanded, *weight_gradient.shape[1:])


def fixed_product_weights(
    outputs: int, expansion: int, groups: int = 1, density: float = 1.0, orthogonal: bool = False
) -> Tensor:
    """Draw B of PFA from PyTorch's global generator, with E[B Bᵀ] = I.

    Entries are uniform with variance groups / (ρ k d_out), which is Xavier's with a gain of sqrt((1 + 1/k) / (2ρ)); a
    share 1 - ρ of them is zero. Orthogonal: every group's rows are orthonormal, so that B Bᵀ = I without the E.

    Args:
        outputs: d_out.
        expansion: k.
        groups: of the convolution.
        density: ρ.
        orthogonal: orthonormal rows instead of independent entries.

    Returns:
        Shape ``(d_out, k d_out / groups)``.
    """
    rows, columns = outputs // groups, expansion * outputs // groups
    if orthogonal:
        return torch.cat([nn.init.orthogonal_(torch.empty(rows, columns, dtype=torch.float64)) for _ in range(groups)])
    bound = math.sqrt(3 / (density * columns))
    drawn = torch.empty(outputs, columns).uniform_(-bound, bound)
    return drawn if density == 1 else drawn * (torch.rand_like(drawn) < density)


def sign_symmetric(weight: Tensor) -> Tensor:
    """Return uSF's B = s sign(W), s = sqrt(2 / (fan_in + fan_out)), the deviation of Xavier's weights."""
    return weight.sign().mul_(math.sqrt(2 / sum(_fans(weight))))


def sign_magnitude(weight: Tensor, magnitude: Tensor) -> Tensor:
    """Return B = |U| ⊙ sign(W): brSF with a new U for every batch, frSF with the same one for all."""
    return weight.sign().mul_(magnitude.abs())


def xavier_uniform(weight: Tensor, generator: Generator | None = None) -> Tensor:
    """Draw a matrix like ``weight`` from U(-a, a), a = sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010)."""
    bound = math.sqrt(6 / sum(_fans(weight)))
    # Draws follow the memory: however the weight lies there, they are the same.
    return torch.empty_like(weight, memory_format=torch.contiguous_format).uniform_(-bound, bound, generator=generator)


def mirror(noise: Tensor, weight: Tensor, geometry: Geometry | None = None) -> Tensor:
    """Estimate W from noise in and noise out: mean(ζᵀ ξ), ζ = ξ Wᵀ, whose expectation is W.

    Args:
        noise: ξ, independent entries of mean 0 and variance 1, shape of the layer's input.
        weight: W.
        geometry: of a convolution. Its padding must be zero: where noise meets zeros instead of noise, the estimate
            would be too small.

    Returns:
        Shape of W. The mean is over samples and positions.
    """
    response = forward(noise, weight, None, geometry)
    estimate, _ = parameter_gradients(response, noise, weight.shape, geometry)
    return estimate * (weight.shape[0] / response.numel())


def norm_ratio(feedback: Tensor, weight: Tensor) -> float:
    """‖B‖ / ‖W‖; infinite where W is zero."""
    norm = float(weight.detach().double().norm())
    return float(feedback.detach().double().norm()) / norm if norm > 0 else math.inf


def update_flops(widths: Sequence[int], direct: bool = False, mirror_every: int = 0) -> int:
    """Return the FLOPs of one update per sample of a fully connected network.

    With P = Σ d_{i-1} d_i: 2P forward, 2P for ∇W, and 2(P - d_0 d_1) for the error on its way down, which is what
    backpropagation needs. DFA sends it by 2K Σ_{i<L} d_i instead. A weight mirror adds 4(P - d_0 d_1) per mirror step.

    Args:
        widths: d_0 … d_L, the input width first, the number of outputs K last.
        direct: DFA.
        mirror_every: updates per mirror step; 0: no mirror.

    Raises:
        ValueError: ``widths`` names no layer.
    """
    weights = weight_count(widths)
    above = weights - widths[0] * widths[1]
    down = widths[-1] * sum(widths[1:-1]) if direct else above
    return 4 * weights + 2 * down + (4 * above // mirror_every if mirror_every else 0)


def product_update_flops(widths: Sequence[int], samples: int, expansion: int = 10) -> float:
    """Return the FLOPs of one update of PFA per sample of a fully connected network.

    As published, a layer with feedback costs 2k d_i² + 4k d_i d_{i-1} beside the 4 d_i d_{i-1} of its forward pass and
    ∇W; in the other order 2 d_i d_{i-1} per sample and 4k d_i² d_{i-1} per batch. The smaller one is taken, layer by layer.

    Args:
        widths: d_0 … d_L, the input width first, the number of outputs last.
        samples: size of the batch.
        expansion: k.

    Raises:
        ValueError: ``widths`` names no layer.
    """
    flops = 4 * samples * weight_count(widths)
    for before, after in pairwise(widths[1:]):
        flops += 2 * min(_product_macs(samples, after, expansion * after, expansion * after, before))
    return flops / samples


def _product_macs(rows: int, outputs: int, inner: int, expanded: int, fan: int) -> tuple[int, int]:
    """Multiply-accumulates of PFA's backward pass without ∇W: as published, and with B R and Bᵀ ∇W.

    ``inner`` and ``fan`` are the columns of B and of R (all entries of a kernel), ``expanded`` the rows of R.
    """
    published = rows * (outputs * inner + 2 * expanded * fan)
    reordered = 2 * outputs * inner * fan + rows * outputs * fan
    return published, reordered


class _Carried(torch.autograd.Function):
    """`carry`."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        feedback: Tensor | None,
        geometry: Geometry | None,
    ) -> Tensor:
        ctx.save_for_backward(inputs, None if feedback is None else feedback[None])
        return _start(ctx, inputs, weight, bias, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        inputs, feedback = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        down = None
        if wanted[0]:
            down = input_gradient(delta, _opened(ctx, feedback).to(delta.dtype), inputs, ctx.geometry)
        weight, bias = _finish(ctx, delta, inputs)
        return down, weight, bias, weight if wanted[3] else None, None


class _Product(torch.autograd.Function):
    """`carry_product`."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        fixed: Tensor,
        learned: Tensor,
        geometry: Geometry | None,
    ) -> Tensor:
        ctx.save_for_backward(inputs, fixed, learned)
        return _start(ctx, inputs, weight, bias, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        inputs, fixed, learned = ctx.saved_tensors
        wanted, geometry = ctx.needs_input_grad, ctx.geometry
        groups = 1 if geometry is None else geometry.groups
        weight, bias = _finish(ctx, delta, inputs)
        down = gradient = None
        rows = delta.numel() // len(fixed)
        published, reordered = _product_macs(rows, len(fixed), fixed.shape[1], len(learned), learned[0].numel())
        if reordered < published:
            if wanted[0]:
                down = input_gradient(delta, product(fixed, learned, groups).to(delta.dtype), inputs, geometry)
            if wanted[4] and weight is not None:
                gradient = product_gradient(fixed, weight.to(fixed.dtype), len(learned), groups)
        else:
            through = fixed.to(delta.dtype)
            inner = delta @ through if geometry is None else F.conv_transpose2d(delta, through, groups=groups)
            if wanted[0]:
                down = input_gradient(inner, learned.to(delta.dtype), inputs, geometry)
            if wanted[4] and weight is not None:
                gradient, _ = parameter_gradients(inner, inputs, learned.shape, geometry)
        return down, weight, bias, None, gradient, None


class _Direct(torch.autograd.Function):
    """`carry_direct`."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        feedback: Tensor,
        error: OutputError,
        last: bool,
        geometry: Geometry | None,
    ) -> Tensor:
        ctx.save_for_backward(inputs, feedback[None])
        ctx.error, ctx.last = error, last
        return _start(ctx, inputs, weight, bias, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        inputs, feedback = ctx.saved_tensors
        if ctx.last:
            ctx.error.delta = delta.flatten(1)
        error = ctx.error.delta
        if error is None:
            raise RuntimeError(
                "the error reached a hidden layer on a way that does not lead through the output layer, so direct feedback "
                "has nothing to send: use a network with one output layer, or another mode"
            )
        down = None
        if ctx.needs_input_grad[0]:
            down = (error @ _opened(ctx, feedback).to(error.dtype)).reshape(inputs.shape)
        return down, *_finish(ctx, delta, inputs), None, None, None, None


def _start(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry | None) -> Tensor:
    ctx.shape, ctx.geometry = weight.shape, geometry
    # Detached, because autocast of older PyTorch would keep a copy made here for later, where it would have no gradient.
    return forward(inputs, weight.detach(), None if bias is None else bias.detach(), geometry)


def _opened(ctx: Any, saved: Tensor | None) -> Tensor:
    """B, which is kept with a dimension of 1 in front.

    Where a forward pass is made again in the backward pass, the plain layer saves W in the very place where B was saved, and
    in its shape: nothing else would tell the two.
    """
    if saved is None or saved.ndim < 3 or len(saved) != 1:
        raise RuntimeError(
            f"a layer with a weight of shape {tuple(ctx.shape)} has lost its feedback weights on the way to the backward "
            "pass, because its forward pass was made again (activation checkpointing?): take that out"
        )
    return saved[0]


def _finish(ctx: Any, delta: Tensor, inputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """∇W and ∇b, where they are wanted."""
    _, of_weight, of_bias = ctx.needs_input_grad[:3]
    if of_weight:
        return parameter_gradients(delta, inputs, ctx.shape, ctx.geometry, of_bias)
    others = [i for i in range(delta.ndim) if i != (delta.ndim - 1 if ctx.geometry is None else 1)]
    return None, delta.sum(others) if of_bias else None


def _convolution(
    delta: Tensor, inputs: Tensor, weight: Tensor, geometry: Geometry, wanted: int, bias: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's own backward pass, for the input (``wanted=0``) or for weight and bias (``wanted=1``)."""
    result = torch.ops.aten.convolution_backward(
        delta,
        inputs,
        weight,
        [weight.shape[0]] if bias else None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        [0, 0],
        geometry.groups,
        [wanted == 0, wanted == 1, bias],
    )
    return cast(tuple[Tensor, Tensor, Tensor], result)


def _fans(weight: Tensor) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight."""
    area = weight[0, 0].numel()
    return weight.shape[1] * area, weight.shape[0] * area
