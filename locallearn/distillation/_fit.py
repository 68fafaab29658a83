"""Layer-wise distillation: every replaced layer is solved in closed form from what a teacher's layer takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.distillation._moments import Moments
from locallearn.distillation._sites import Predict, Site, replaced
from locallearn.nets.blocks import evaluating
from locallearn.nets.random_features import SNNK, EUGen, Kind, RandomFeatureLayer, features_within, geometry

Method = Literal["eugen", "snnk", "svd", "low_rank"]
METHODS = ("eugen", "snnk", "svd", "low_rank")
Inputs = Literal["teacher", "student"]
Draws = Literal["isotropic", "teacher"]
_SCALED = 1000  # samples that inputs are scaled by
PENALTIES = (1e-8, 1e-6, 1e-4, 1e-2)


@dataclass(frozen=True)
class Recipe:
    """What layers are replaced with.

    Attributes:
        method: ``eugen`` and ``snnk`` are layers of random features, for a layer and its activation together; ``svd``, the
            truncated singular value decomposition of the weights, and ``low_rank``, the reduced-rank regression of what the
            layer gives on what it takes, are two linear layers with the activation left behind them.
        share: how much of a layer's own numbers (weights and bias) its replacement may hold, above 0 and below 1.
        learned: hold Ψ and b alone against the share, not the maps, which a seed can give again.
        kind: of ``snnk``.
        degree: of ``eugen``.
        orthogonal: maps in orthogonal blocks.
        draws: ``isotropic`` maps, as the papers have them, or random combinations of the ``teacher``'s own rows: as many
            numbers, which look where the layer looks.
        seed: of the maps; every layer counts on from it by its place.

    Raises:
        ValueError: an unknown method, a share outside of its range.
    """

    method: Method
    share: float
    learned: bool = False
    kind: Kind = "relu"
    degree: int = 2
    orthogonal: bool = True
    draws: Draws = "isotropic"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"the method is {self.method!r}, expected one of {', '.join(METHODS)}")
        if self.draws not in ("isotropic", "teacher"):
            raise ValueError(f"draws is {self.draws!r}, expected isotropic or teacher")
        if not 0 < self.share < 1:
            raise ValueError(
                f"the share is {self.share}, expected a number above 0 and below 1, of a layer's own numbers"
            )

    @property
    def random(self) -> bool:
        """Whether layers are of random features."""
        return self.method in ("eugen", "snnk")

    def size(self, layer: nn.Linear | nn.Conv2d) -> int:
        """Features or rank of what replaces a layer; 0 where not even one fits into the share."""
        numbers = layer.weight.numel() + (0 if layer.bias is None else layer.bias.numel())
        budget = int(self.share * numbers)
        outputs, inputs = len(layer.weight), layer.weight[0].numel()
        if self.random:
            return features_within(partial(self._blank, layer, 0), budget, learned=self.learned)
        return max(0, min(inputs, outputs, (budget - outputs) // (inputs + outputs)))

    def blank(self, layer: nn.Linear | nn.Conv2d, place: int = 0, size: int | None = None) -> nn.Module:
        """What replaces a layer, not solved yet.

        Args:
            layer: of the teacher.
            place: what its seed counts on by.
            size: features or rank; ``None``: as many as fit.

        Raises:
            ValueError: nothing fits into the share.
        """
        size = self.size(layer) if size is None else size
        if size < 1:
            raise ValueError(f"{layer} has too few numbers for {self.method} within a share of {self.share:g}")
        return self._blank(layer, place, size) if self.random else _factors(layer, size)

    def _blank(self, layer: nn.Linear | nn.Conv2d, place: int, features: int, device: Any = None) -> RandomFeatureLayer:
        given = {**geometry(layer), "features": features, "orthogonal": self.orthogonal, "seed": self.seed + place}
        if device is not None:
            given["device"] = device
        if self.method == "snnk":
            return SNNK(kind=self.kind, **given)
        return EUGen(degree=self.degree, **given)


def _factors(layer: nn.Linear | nn.Conv2d, rank: int) -> nn.Sequential:
    """Two layers of rank r in place of one: the first as the layer sees its input, the second over what that gives."""
    outputs = len(layer.weight)
    own: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        return nn.Sequential(nn.Linear(layer.in_features, rank, bias=False, **own), nn.Linear(rank, outputs, **own))
    size, where = layer.kernel_size, (layer.stride, layer.padding, layer.dilation)
    return nn.Sequential(
        nn.Conv2d(layer.in_channels, rank, size, *where, bias=False, **own),  # type: ignore[arg-type]
        nn.Conv2d(rank, outputs, 1, **own),
    )


def _set_factors(factors: nn.Sequential, first: Tensor, second: Tensor, bias: Tensor) -> None:
    """``first`` (r, d), ``second`` (l, r) and ``bias`` (l,) as weights."""
    state = {"0.weight": first, "1.weight": second, "1.bias": bias}
    factors.load_state_dict({name: state[name].reshape(known.shape) for name, known in factors.state_dict().items()})


@dataclass
class Fit:
    """How a replaced layer was found.

    Attributes:
        size: features or rank.
        penalty: λ that was chosen; ``None`` where nothing was solved.
        error: mean squared error on calibration samples that the choice of λ was judged by, over the variance of what was
            fitted there: 0 is exact, 1 no better than a constant.
        cholesky: whether the solution was unique to working precision.
    """

    size: int
    penalty: float | None = None
    error: float | None = None
    cholesky: bool = True


class _EnoughSeen(Exception):
    """The forward pass has given what was asked for; the rest of it need not run."""


@dataclass
class Distiller:
    """Replaces layers of a teacher one after another, each solved in closed form from calibration samples.

    The teacher is run as it is, and put back as it was, weights and modules alike. Nothing is differentiated, and what is
    kept of the samples are sums, whose size does not grow with their number.

    Args:
        net: the teacher's network; its layers are swapped for the time of a pass.
        predict: runs it.
        batches: inputs to calibrate on, ``(N, ...)`` each; a fifth of them, at least one, is kept from the first solution and
            judges λ; with one batch its last fifth of rows does.
        recipe: what layers are replaced with.
        inputs: ``teacher``: every layer is solved from what the teacher's layer takes, on its own; ``student``: from what
            comes out of the layers replaced so far, so that each solution makes up for the errors before it. What is fitted is
            always what the teacher gives.
        penalties: λ to choose from, of mean squared errors of features with variance 1.
        positions: of a map or a sequence how many positions of every sample are taken at most, drawn anew for every batch.

    Raises:
        ValueError: no batch, no penalty or a negative one, an unknown choice of inputs.
    """

    net: nn.Module
    predict: Predict
    batches: Sequence[Tensor]
    recipe: Recipe
    inputs: Inputs = "student"
    penalties: Sequence[float] = PENALTIES
    positions: int = 64
    _made: dict[tuple[tuple[str, ...], str], tuple[nn.Module, Fit]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_distillation(self.inputs, self.penalties, self.positions)
        if not self.batches or sum(map(len, self.batches)) < 2:
            raise ValueError("there are fewer than two samples to calibrate on")
        if len(self.batches) == 1:
            (whole,) = self.batches
            cut = len(whole) - max(1, len(whole) // 5)
            self.batches = [whole[:cut], whole[cut:]]

    def students(self, chosen: Sequence[Site], places: Mapping[str, int] | None = None) -> dict[Site, nn.Module]:
        """Replacements of some layers, in the order in which inference calls them; those made before are used again.

        Args:
            chosen: layers to replace together.
            places: number of every layer by its path, that seeds are counted by; by default that in ``chosen``.

        Raises:
            ValueError: nothing fits into the share of a layer, or what it takes or gives is not finite.
        """
        made: dict[Site, nn.Module] = {}
        for number, site in enumerate(chosen):
            prefix = made if self.inputs == "student" and self.recipe.method != "svd" else {}
            key = (tuple(before.name for before in prefix), site.name)
            if key not in self._made:
                place = number if places is None else places[site.name]
                try:
                    self._made[key] = self._solved(site, dict(prefix), place)
                except ValueError as error:
                    raise ValueError(
                        f"layer {site.name!r} cannot be replaced by {self.recipe.method}: {error}"
                    ) from error
            made[site] = self._made[key][0]
        return made

    def fits(self, chosen: Sequence[Site]) -> dict[str, Fit]:
        """How those layers were found, by path."""
        sequential = self.inputs == "student" and self.recipe.method != "svd"
        names = [site.name for site in chosen]
        keys = [(tuple(names[:i]) if sequential else (), name) for i, name in enumerate(names)]
        return {name: self._made[key][1] for name, key in zip(names, keys, strict=True)}

    @torch.no_grad()
    def _solved(self, site: Site, prefix: Mapping[Site, nn.Module], place: int) -> tuple[nn.Module, Fit]:
        layer = self.net.get_submodule(site.name)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        student = self.recipe.blank(layer, place)
        fit = Fit(self.recipe.size(layer))
        if isinstance(student, RandomFeatureLayer):
            if self.recipe.draws == "teacher":
                student.draw_from(layer.weight)
            student.standardise(*self._inputs_of(site, prefix, student))
            weights, bias, _ = self._solution(site, prefix, student.phi, site.last, fit)
            student.weight.copy_(weights.T)
            student.bias.copy_(bias)
        elif self.recipe.method == "svd":
            u, s, v = torch.linalg.svd(layer.weight.flatten(1).double(), full_matrices=False)
            root = s[: fit.size].sqrt()
            bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
            assert isinstance(student, nn.Sequential)
            _set_factors(student, root[:, None] * v[: fit.size], u[:, : fit.size] * root, bias)
        else:
            self._reduced_rank(site, prefix, layer, student, fit)
        return student.requires_grad_(False).eval(), fit

    def _reduced_rank(
        self, site: Site, prefix: Mapping[Site, nn.Module], layer: nn.Linear | nn.Conv2d, student: nn.Module, fit: Fit
    ) -> None:
        """The linear map of rank r with the least squared error: the full one, onto the r main directions of what it gives."""
        weights, bias, main = self._solution(site, prefix, partial(_patches, layer), site.name, fit, fit.size)
        assert isinstance(student, nn.Sequential)
        _set_factors(student, (weights @ main).T, main, bias)

    def _inputs_of(
        self, site: Site, prefix: Mapping[Site, nn.Module], student: RandomFeatureLayer
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance of what the layer takes, of a map by channel; a thousand samples are exact enough."""
        rows, size = 0, len(student.shift)
        total, squares = (torch.zeros(size, dtype=torch.float64, device=student.shift.device) for _ in range(2))
        seen = 0
        for batch in self.batches:
            if seen >= _SCALED:
                break
            seen += len(batch)
            for x in self._seen(batch, site, prefix, site.name)[0]:
                entries = (x if student.window is None else x.movedim(1, -1)).flatten(0, -2).double()
                rows += len(entries)
                total += entries.sum(0)
                squares += entries.square().sum(0)
        mean = total / rows
        return mean, (squares / rows - mean.square()).clamp_min(0)

    def _solution(
        self,
        site: Site,
        prefix: Mapping[Site, nn.Module],
        features: Callable[[Tensor], Tensor],
        at: str,
        fit: Fit,
        rank: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """W and b of what the teacher gives ``at`` a module on features of what the layer takes, and main directions V of that.

        With a rank it is W V Vᵀ that is fitted, and b goes with it; without one V is the identity.
        """
        held = {number for number in range(len(self.batches)) if number % 5 == 4} or {len(self.batches) - 1}
        parts: list[Moments | None] = [None, None]
        for number, batch in enumerate(self.batches):
            generator = torch.Generator().manual_seed(self.recipe.seed + number)
            for x, y in zip(*self._seen(batch, site, prefix, at), strict=True):
                h, wanted = _rows(features(x), _last(y, self.net.get_submodule(site.name)), self.positions, generator)
                which = int(number in held)
                part = parts[which]
                if part is None:
                    part = parts[which] = Moments(h.shape[1], wanted.shape[1], h.device)
                part.add(h, wanted)
        solved, judge = parts
        assert solved is not None
        assert judge is not None
        found = []
        for penalty in self.penalties:
            weights, bias, _ = solved.solve(penalty)
            found.append((judge.error(weights, bias), penalty))
        fit.penalty = min(found)[1]
        weights, bias, main, _ = _solved_within(solved, fit.penalty, rank)
        fit.error = judge.relative_error(
            weights @ main @ main.T, bias
        )  # the judge's samples are not in the solution yet
        solved.join(judge)
        weights, bias, main, fit.cholesky = _solved_within(solved, fit.penalty, rank)
        return weights, bias, main

    def _seen(
        self, batch: Tensor, site: Site, prefix: Mapping[Site, nn.Module], at: str
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What the layer takes behind the replaced ones, and what the teacher gives ``at`` a module, call by call."""
        taken: list[Tensor] = []
        given: list[Tensor] = []

        def take(_: nn.Module, args: tuple[Any, ...]) -> None:
            taken.append(args[0].detach().clone())  # what comes later may work in place
            if prefix and len(taken) == site.calls:
                raise _EnoughSeen

        def give(_: nn.Module, args: tuple[Any, ...], made: Tensor) -> None:
            given.append(made.detach().clone())
            if len(given) == site.calls:
                raise _EnoughSeen

        with evaluating(self.net):
            if prefix:
                with replaced(self.net, prefix):
                    self._run(batch, [self.net.get_submodule(site.name).register_forward_pre_hook(take)])
            hooks = [self.net.get_submodule(at).register_forward_hook(give)]
            if not prefix:
                hooks.append(self.net.get_submodule(site.name).register_forward_pre_hook(take))
            self._run(batch, hooks)
        return taken, given

    def _run(self, batch: Tensor, hooks: Sequence[Any]) -> None:
        try:
            self.predict(batch)
        except _EnoughSeen:
            pass
        finally:
            for hook in hooks:
                hook.remove()


def _solved_within(moments: Moments, penalty: float, rank: int | None) -> tuple[Tensor, Tensor, Tensor, bool]:
    """W, the b of W V Vᵀ, V, and whether the solution is unique; V are the main directions of XW, or all of them."""
    weights, bias, unique = moments.solve(penalty)
    if rank is None:
        return weights, bias, torch.eye(len(bias), dtype=weights.dtype, device=weights.device), unique
    covariance, _ = moments.centred()
    main = torch.linalg.eigh(weights.T @ covariance @ weights)[1][:, -rank:]
    return weights, (moments.y - main @ (main.T @ (weights.T @ moments.h))) / moments.rows, main, unique


def check_distillation(inputs: str, penalties: Sequence[float], positions: int) -> None:
    """Refuse settings of a :class:`Distiller` that mean nothing.

    Raises:
        ValueError: says which.
    """
    if inputs not in ("teacher", "student"):
        raise ValueError(f"inputs is {inputs!r}, expected teacher or student")
    if not penalties or not all(0 <= penalty < float("inf") for penalty in penalties):
        raise ValueError(f"penalties is {list(penalties)}, expected numbers of at least 0, one or several")
    if positions < 1:
        raise ValueError(f"positions is {positions}, expected at least 1")


def _patches(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """What a layer multiplies its weights with, ``(..., d)``; of a convolution ``(N, H' W', d)``."""
    if isinstance(layer, nn.Linear):
        return x
    padding = layer._reversed_padding_repeated_twice  # left, right, top, bottom, whatever padding was given as
    return F.unfold(
        F.pad(x, padding),
        layer.kernel_size,
        dilation=layer.dilation,
        stride=layer.stride,
    ).transpose(1, 2)


def _last(y: Tensor, layer: nn.Module) -> Tensor:
    """Outputs with channels last."""
    return y.movedim(1, -1) if isinstance(layer, nn.Conv2d) else y


def _rows(h: Tensor, y: Tensor, positions: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Features and targets as rows, of every sample at most so many positions."""
    if h.ndim == 2:
        return h, y
    h, y = (part.reshape(len(part), -1, part.shape[-1]) for part in (h, y))
    if h.shape[1] > positions:
        chosen = torch.randperm(h.shape[1], generator=generator)[:positions].to(h.device)
        h, y = h[:, chosen], y[:, chosen]
    return h.flatten(0, 1), y.flatten(0, 1)
