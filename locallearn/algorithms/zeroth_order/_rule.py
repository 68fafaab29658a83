"""The rule: look at losses around the weights, make numbers of them, step along the directions by the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from locallearn.algorithms.base import (
    ByOptions,
    Locality,
    ParamGroup,
    TaskInfo,
    Update,
    choices,
    output_layer,
    selected,
)
from locallearn.algorithms.dry_run import dry_run
from locallearn.algorithms.forward_gradient._passes import Draws
from locallearn.algorithms.zeroth_order._coded import Coded, Codes
from locallearn.algorithms.zeroth_order._dense import Dense
from locallearn.algorithms.zeroth_order._low_rank import LowRank
from locallearn.algorithms.zeroth_order._settings import (
    BETA2,
    DEFAULTS,
    Decay,
    Losses,
    Normalise,
    Variant,
    check,
    check_together,
)
from locallearn.algorithms.zeroth_order._way import Setting, Way, streams
from locallearn.batch import Batch
from locallearn.functional.counter_noise import numbers, tags
from locallearn.functional.zeroth_order import (
    GRID,
    LIMIT,
    Noise,
    Shaping,
    curvature_weights,
    on_grid,
    scalars,
    second_moment,
)
from locallearn.nets.blocks import fitted
from locallearn.nets.trace import preserved

_FARTHEST = 0.45  # ε under exact: the largest normal number is 4.39, and 2 + 4.39 ε may not pass 4
_ROWS = 2**13  # of all directions that pass at once


class ZerothOrder(ByOptions):
    """Learn from losses at weights that were moved at random: no derivative of anything, one number per direction.

    Every batch has n directions z_i. The loss is looked at on both sides of the weights, θ ± ε z_i (or on one), one number c_i
    is made of what it says, and the gradient's estimate is mean_i c_i z_i. Directions are numbers looked up by (seed, step,
    direction, weight): they are never stored for longer than a step, and nothing but the c_i has to be known to make a step
    again (:mod:`locallearn.algorithms.zeroth_order.trajectory`).

    ``spsa`` (Spall 1992) keeps the directions of a step and a copy of the weights. ``mezo`` (Malladi et al. 2023) is the same
    step in the memory of inference: weights are moved in place and back, directions drawn again for every move, and gradients
    handed over group by group, none larger than the largest weight. ``fzoo`` (Dang et al. 2025) is ``mezo`` on one side, with
    signs as directions and numbers in units of the losses' spread. ``eggroll`` (Sarkar et al. 2025) has directions of low
    rank and passes many of them through the network at once. ``qes`` (2026) moves whole-number codes of quantised matrices
    and adds up what is smaller than a code.

    The step itself is the optimizer's, with its rate and its schedule; under ``mezo``, ``fzoo`` and ``qes`` it is asked once
    per group of weights, which any optimizer that treats weights one by one takes for one step. Clipping by norm, which
    would see a group instead of all, is refused there.

    In probes BatchNorm normalises by its running statistics, which are moved once per batch by a pass at θ; both sides of a
    direction and all directions see the same dropout masks. Losses are made in float32 at least.

    ``losses="local"`` makes an object of the subclass
    :class:`~locallearn.algorithms.zeroth_order._local.LocalZerothOrder`: every block has a loss and numbers of its own.

    Deviations: noise is from a table of 65 536 normal numbers. FZOO's ε in the denominator is part of the rate here. EGGROLL's
    √N is, too, and what is no matrix has plain noise. QES has a mean over directions instead of a sum, keeps the residual
    instead of rebuilding it from a window (which the authors' code does not rebuild exactly), and leaves vectors as they are.

    Args:
        seed: of all noise.
        variant: see above.
        n: directions per batch; 2n losses if antithetic. ``None``: 1, of fzoo 8.
        eps: ε, how far the weights are moved; of ``qes`` in codes. Left out: 1e-3, ``eggroll`` 1e-2, ``qes`` 0.5.
        antithetic: whether both sides are looked at. Left out: yes, ``fzoo`` no.
        shaping: ``none``, ``zscore`` or ``sign``, see :func:`locallearn.functional.zeroth_order.scalars`. Left out: ``none``,
            ``zscore`` of ``fzoo``, ``eggroll`` and ``qes``.
        noise: ``gaussian`` or ``rademacher`` (signs). Left out: ``gaussian``, ``fzoo`` ``rademacher``.
        rank: r of ``eggroll``.
        decay: what the optimizer's weight decay is for: ``matrices`` (weights of two dimensions or more) or ``all``.
        exact: weights lie on a grid of 2⁻²² within ±2, moves and steps are rounded to it (steps by chance), sums do not depend
            on their order: coming home, replaying and sharing directions out are bit-equal.
        bits: of a code of ``qes``, 2 to 8.
        residual_decay: share of what no code was moved by that ``qes`` keeps.
        chunk: directions that ``eggroll`` passes at once, both sides counted; ``null``: up to 8192 rows.
        normalise: ``scalar_ema``: numbers are divided by the root of a running mean of Σ c_i²/n², the mean square of an
            estimate's entries, corrected for its start as in Adam. Entries all have the same variance, so one float serves all
            weights, and the rate is about what a weight moves by, whatever the loss's scale. ``None``: not.
        beta2: share of that mean which is kept from step to step.
        curvature_exponent: p: the number of a direction is divided by max(1, h^p), h the size of the second difference
            (L⁺ − 2 L₀ + L⁻)/ε² along it (1.5-SPSA, 2026: p = 0.1). Costs the loss at θ, once per step. ``None``: not.
        losses: ``global``: the task's, of the whole network; ``local``: of every block's own.
        head_limit: under ``losses="local"`` the largest number of inputs of a block's linear head, maps and tokens are averaged
            down to it; ``None``: taken as they are.
        trajectory: where ``locallearn train`` writes the numbers of all steps: a file, or ``run`` for ``trajectory.bin`` in the
            run's folder; ``null``: nowhere. In a loop of one's own:
            :class:`~locallearn.algorithms.zeroth_order.trajectory.Writer`.

    Raises:
        ValueError: a setting that does not exist or does not go with the variant; when attached, a network without weights or
            with random layers under ``exact``, or weights or an ε that its grid does not hold.
    """

    def __init__(
        self,
        seed: int = 0,
        variant: Variant = "spsa",
        n: int | None = None,
        eps: float | None = None,
        antithetic: bool | None = None,
        shaping: Shaping | None = None,
        noise: Noise | None = None,
        rank: int = 1,
        decay: Decay = "matrices",
        exact: bool = False,
        bits: int = 4,
        residual_decay: float = 0.9,
        chunk: int | None = None,
        trajectory: str | None = None,
        normalise: Normalise | None = None,
        beta2: float = BETA2,
        curvature_exponent: float | None = None,
        losses: Losses = "global",
        head_limit: int | None = None,
    ) -> None:
        super().__init__(seed)
        given = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        check(given)
        default = DEFAULTS[variant]
        self.variant_name: Variant = variant
        self.n = default[4] if n is None else n
        self.eps = float(default[0] if eps is None else eps)
        self.antithetic = default[1] if antithetic is None else antithetic
        self.shaping: Shaping = default[2] if shaping is None else shaping
        self.noise: Noise = default[3] if noise is None else noise
        self.rank, self.decay, self.exact, self.bits = rank, decay, exact, bits
        self.residual_decay, self.chunk, self.trajectory = residual_decay, chunk, trajectory
        self.normalise, self.beta2, self.curvature_exponent = normalise, beta2, curvature_exponent
        self.losses_of: Losses = losses
        self.head_limit = head_limit
        check_together({**given, "n": self.n, "antithetic": self.antithetic, "shaping": self.shaping})
        self.scalars: Tensor | None = None
        self._coded_names: list[str] | None = None
        self._squares: list[float] = []  # running means, one for all weights that share their numbers

    @staticmethod
    def _kind(asked: Mapping[str, Any]) -> type[ZerothOrder]:
        """The class for these options."""
        if asked.get("losses") != "local":
            return ZerothOrder
        from locallearn.algorithms.zeroth_order._local import LocalZerothOrder  # which is a kind of this class

        return LocalZerothOrder

    @property
    def learns_in_half(self) -> bool:
        """Yes: losses are float32, and no gradient is ever made."""
        return True

    @property
    def locality(self) -> Locality:
        """Forward-only: no backward pass at all."""
        return Locality.FORWARD_ONLY

    @property
    def piecewise(self) -> bool:
        """In place and with codes: gradients as a whole would be a second copy of the weights."""
        return self.variant_name in ("mezo", "fzoo", "qes")

    @property
    def carries(self) -> bool:
        """Whatever crosses the borders: the network runs as a whole."""
        return True

    @property
    def broadcast(self) -> str:
        """One number per direction."""
        kind = {"none": "a real number", "zscore": "a real number", "sign": "a sign"}[self.shaping]
        return f"{kind} for each of {self.n} directions" if self.n > 1 else f"{kind} for the direction"

    @property
    def variant(self) -> str | None:
        """Which way, and what differs from its defaults."""
        told = choices(self, ZerothOrder.__init__, "rank", "exact", "normalise", "curvature_exponent")
        local = ["losses=local"] if self.losses_of == "local" else []
        several = [f"n={self.n}"] if self.n != DEFAULTS[self.variant_name][4] else []
        return ", ".join([f"variant={self.variant_name}", *local, *several, *([told] if told else [])])

    @property
    def numbers(self) -> int:
        """How many a step is made of: one per direction."""
        return self.n

    @property
    def estimates_along(self) -> str | None:
        """Setting ``n``."""
        return "n"

    def expected_error(self, size: int) -> float | None:
        """Of two-sided differences along directions of the weights' shape, for a small ε: (d ± 1)/n; of others ``None``."""
        if self.variant_name not in ("spsa", "mezo") or not self.antithetic or self.shaping != "none":
            return None
        if self.normalise is not None or self.curvature_exponent is not None:
            return None
        return second_moment(size, self.n, self.noise) - 1

    # -- building ------------------------------------------------------------------------------------------------------
    def build(self, task: TaskInfo) -> None:
        """Check what can be; exact weights go to their grid, quantised ones to their codes."""
        dry_run(self.blocks, task.example, task)  # refuses a network that cannot take the data
        output_layer(self.blocks, "ZerothOrder")
        self._loss = task.loss
        learned = self._learned()
        self._squares = [0.0]
        self._words = tags(streams(list(self._named())))
        self._random, self._moves_buffers = self._tried(task.example)
        if self.exact:
            self._check_exact()
        if self.variant_name == "qes" and not learned:
            raise ValueError(
                "variant=qes moves codes of matrices, and the network has none that learns: use variant=spsa"
            )
        with torch.no_grad():
            if self.exact and self.variant_name != "qes":
                for p in self._named().values():
                    p.copy_(on_grid(p.detach()))
            self.coded = nn.ModuleList()
            if self.variant_name == "qes":
                for name, p in learned.items():
                    word = self._words[f"{name}/residual"]
                    uniform = numbers(self.seed, 0, 0, word, 0, p.numel(), "uniform", p.device).view(p.shape)
                    held = Codes(p, self.bits, uniform)
                    self.coded.append(held)
                    p.copy_(held.weight())
                self._coded_names = list(learned)
        self._factored: bool | None = None
        self._factored_for: tuple[str, ...] = ()  # the weights that learned when it was found out

    def _named(self) -> dict[str, nn.Parameter]:
        """All weights that may learn, by the name of their noise."""
        return dict(self.blocks.named_parameters())

    def _learned(self) -> dict[str, nn.Parameter]:
        """Weights that learn, by name."""
        learned = {name: p for name, p in self.blocks.named_parameters() if p.requires_grad}
        if self.variant_name != "qes":
            return learned
        coded = self._coded_names  # what was frozen then has no codes
        return {name: p for name, p in learned.items() if p.ndim > 1 and (coded is None or name in coded)}

    def _tried(self, example: Batch) -> tuple[bool, bool]:
        """Whether a training pass draws at random, and whether it moves buffers; found out by one that leaves no trace."""
        inputs = fitted(self.blocks, example.inputs)
        context = torch.utils._pytree.tree_map_only(Tensor, lambda value: value.to(inputs.device), example.context)
        modes = [(part, part.training) for part in self.blocks.modules()]
        with preserved(self.blocks), torch.no_grad():
            before = {name: value.clone() for name, value in self.blocks.named_buffers()}
            states = _generator_states(inputs.device)
            try:
                if len(inputs) > 1:  # normalisation cannot train on a single sample
                    self.blocks.train()
                self.blocks(inputs, *context)
            finally:
                for part, mode in modes:
                    part.training = mode
            draws = any(not torch.equal(a, b) for a, b in zip(states, _generator_states(inputs.device), strict=True))
            moved = any(not torch.equal(before[name], value) for name, value in self.blocks.named_buffers())
        return draws, moved

    def _check_exact(self) -> None:
        if self.variant_name != "qes" and not 4 * GRID <= self.eps <= _FARTHEST:
            raise ValueError(
                f"eps is {self.eps:.3g}, and exact=true moves weights on a grid of 2^-22 that is exact up to 4: use an "
                f"eps from 1e-6 to {_FARTHEST}, or exact=false"
            )
        if self._random:
            dropouts = [
                n for n, m in self.blocks.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p
            ]
            named = f" ({dropouts[0]!r})" if dropouts else ""
            raise ValueError(
                f"exact=true gives the same weights wherever a direction is looked at, and this network draws at random in "
                f"its forward pass{named}: switch that off (dropout=0), or use exact=false"
            )
        for name, p in self._named().items():
            if p.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"exact=true lays weights on a grid of float32 numbers, and {name!r} is {p.dtype}: use precision 32-true"
                )
            if self.variant_name != "qes" and p.requires_grad and p.numel() and float(p.detach().abs().max()) > LIMIT:
                raise ValueError(
                    f"exact=true keeps weights between -2 and 2, and the largest of {name!r} is "
                    f"{float(p.detach().abs().max()):.3g}: begin with smaller ones, or use exact=false"
                )

    def units(self) -> dict[str, list[ParamGroup]]:
        """One unit, the network; what decays apart from what does not."""
        learned = {id(p) for p in self._learned().values()}
        # Frozen weights are in it, too: they may be thawed.
        kept = [p for p in self.blocks.parameters() if id(p) in learned or self.variant_name != "qes"]
        return {"network": self._groups(kept)}

    def _groups(self, kept: Sequence[nn.Parameter]) -> list[ParamGroup]:
        groups: list[ParamGroup] = [{"params": [p for p in kept if p.ndim > 1 or self.decay == "all"]}]
        groups.append({"params": [p for p in kept if p.ndim < 2 and self.decay != "all"], "weight_decay": 0.0})
        return [group for group in groups if group["params"]]

    # -- learning --------------------------------------------------------------------------------------------------------
    def updates(self, batch: Batch) -> Iterator[Update]:
        """Look at losses, then step; the loss that is reported is the mean of all that were seen."""
        way = self._way()
        with torch.no_grad():
            seen = self._seen(way, batch, range(self.n))
            c = self._numbers(seen)
        yield from self._whole(way, c, self._mean(seen))

    def losses(self, batch: Batch, directions: Sequence[int] | None = None) -> Tensor:
        """Losses at directions of this step, for whoever shares them out; the weights are home afterwards.

        Args:
            batch: the same for all.
            directions: of 0 … n−1; ``None``: all.

        Returns:
            float64 on the CPU, ``(len(directions), 2)``: L⁺, and L⁻ or, on one side, the loss at θ (NaN where none is used).
            With ``curvature_exponent`` ``(len(directions), 3)``: L⁺, L⁻ and the loss at θ.
        """
        way = self._way()
        with torch.no_grad():
            seen = self._seen(way, batch, range(self.n) if directions is None else directions)
            way.home()
        return seen

    def learn(self, losses: Tensor) -> Iterator[Update]:
        """The step that all losses of it lead to.

        Args:
            losses: of all directions in their order, as :meth:`losses` gives them.

        Raises:
            ValueError: of another shape.
        """
        if losses.shape != (self.n, self._columns):
            few = {2: "two", 3: "three"}[self._columns]
            raise ValueError(
                f"a step has {few} losses for each of {self.n} directions, ({self.n}, {self._columns}), and these have shape "
                f"{tuple(losses.shape)}"
            )
        yield from self.follow(self._numbers(losses), self._mean(losses))

    def follow(self, c: Tensor, loss: Tensor | None = None) -> Iterator[Update]:
        """The step that these numbers lead to; nothing else has to be known.

        Args:
            c: one number per direction, ``(n,)``, float32, as they are written down: before ``normalise``, which knows no more
                than they do.
            loss: to be reported.

        Raises:
            ValueError: there are more or fewer numbers than directions.
        """
        self._check_numbers(c)
        way = self._way()
        with torch.no_grad():
            way.begin(self.batches_seen)
        yield from self._whole(way, c, loss)

    def _check_numbers(self, c: Tensor) -> None:
        if c.shape != (self.numbers,):
            raise ValueError(
                f"a step has {self.numbers} numbers, one per direction, and these have shape {tuple(c.shape)}"
            )

    def _numbers(self, seen: Tensor) -> Tensor:
        """C from losses, one row per direction."""
        minus = seen[:, 1] if self.antithetic else None
        base = seen[0, -1] if self._has_base else None
        c = scalars(seen[:, 0], minus, base, self.eps, self.shaping)
        if self.curvature_exponent is None:
            return c
        return (c * curvature_weights(seen[:, 0], seen[:, 1], seen[:, -1], self.eps, self.curvature_exponent)).float()

    def _normalised(self, c: Tensor, part: int = 0) -> Tensor:
        """Numbers in units of their running size; a function of all numbers so far and of nothing else."""
        if self.normalise is None:
            return c
        square = math.fsum(value**2 for value in c.tolist()) / len(c) ** 2  # in any order the same
        self._squares[part] = self.beta2 * self._squares[part] + (1 - self.beta2) * square
        corrected = self._squares[part] / (1 - self.beta2 ** (self.batches_seen + 1))
        return c if corrected == 0 else c / corrected**0.5

    def get_extra_state(self) -> dict[str, Tensor]:
        """With the running means."""
        known = torch.tensor(self._squares, dtype=torch.float64)
        return {**super().get_extra_state(), **({"squares": known} if self.normalise is not None else {})}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """With the running means."""
        super().set_extra_state({key: value for key, value in state.items() if key != "squares"})
        if "squares" in state:
            self._squares = state["squares"].tolist()

    @property
    def _has_base(self) -> bool:
        """Whether the loss at θ is one of those that are looked at."""
        one_sided = not self.antithetic and (self.shaping == "none" or self.variant_name == "fzoo")
        return one_sided or self.curvature_exponent is not None

    @property
    def _columns(self) -> int:
        """Losses that are kept of a direction; the one at θ is the last."""
        return 2 if self.curvature_exponent is None else 3

    def _mean(self, seen: Tensor) -> Tensor:
        """Of the losses that were looked at; not finite where one of them is not, so that whoever trains is told."""
        return seen.mean() if self.antithetic or self._has_base else seen[:, 0].mean()

    def _whole(self, way: Way, c: Tensor, loss: Tensor | None) -> Iterator[Update]:
        """The step of all weights at once."""
        scaled = self._normalised(c)
        self._made(c)
        yield from self._steps("network", way, scaled, loss)

    def _made(self, c: Tensor) -> None:
        """Note what a step is made of."""
        self.scalars = c
        self.batches_seen += 1

    def _steps(self, unit: str, way: Way, c: Tensor, loss: Tensor | None) -> Iterator[Update]:
        if loss is not None:
            loss = loss.float().to(next(self.blocks.parameters()).device)
        if not way.weights:
            yield Update(unit, loss, {})
            return
        groups = way.estimates(c)
        while True:
            with torch.no_grad():
                group = next(groups, None)
            if group is None:
                return
            weights = list(group)
            yield Update(unit, loss, group)
            del group
            loss = None
            with torch.no_grad():
                way.settle(weights)

    def _way(self, learned: dict[str, nn.Parameter] | None = None) -> Way:
        learned = self._learned() if learned is None else learned
        for name, p in learned.items():
            if (self.exact or self.variant_name == "qes") and p.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"exact=true and variant=qes need weights of float32, and {name!r} is {p.dtype}: use precision 32-true"
                )
        setting = Setting(self.seed, self.n, self.eps, self.noise, self.exact, self._words)
        if self.variant_name == "qes":
            coded = dict(zip(self._coded_names or (), cast(Iterable[Codes], self.coded), strict=True))
            return Coded(learned, setting, coded, self.bits, self.residual_decay)
        if self.variant_name == "eggroll":
            return LowRank(learned, setting, self.rank)
        return Dense(learned, setting, stored=self.variant_name == "spsa")

    # -- looking ---------------------------------------------------------------------------------------------------------
    def _seen(self, way: Way, batch: Batch, directions: Sequence[int]) -> Tensor:
        """Losses, one row per direction; weights may be left at the last of them."""
        if self._moves_buffers and any(part.training for part in self.blocks.modules()):
            self.blocks(batch.inputs, *batch.context)  # statistics move once, at θ
        way.begin(self.batches_seen)
        with self._probing():
            if isinstance(way, LowRank) and self._passes_together(way, batch):
                return self._seen_together(way, batch, directions)
            return self._seen_each(way, lambda: self._lost(batch), batch.inputs.device, directions)

    def _seen_each(
        self, way: Way, lost: Callable[[], Tensor], device: torch.device, directions: Sequence[int]
    ) -> Tensor:
        """The same, one after another, of whatever has this loss."""
        draws = Draws(device)
        found = torch.full((len(directions), self._columns), math.nan, dtype=torch.float64)
        try:
            if self._has_base:
                draws.again()
                found[:, -1] = lost()
            for place, member in enumerate(directions):
                for side, sign in enumerate((1, -1) if self.antithetic else (1,)):
                    way.visit(member, sign)
                    draws.again()
                    found[place, side] = lost()
        except BaseException:
            way.home()
            raise
        way.leave()
        return found

    @contextmanager
    def _probing(self) -> Iterator[None]:
        """Statistics of normalisation and all other buffers rest."""
        norms = [m for m in self.blocks.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.training]
        norms = [m for m in norms if m.running_mean is not None]
        kept = [(b, b.clone()) for b in self.blocks.buffers()] if self._moves_buffers else []
        for norm in norms:
            norm.training = False
        try:
            yield
        finally:
            for norm in norms:
                norm.training = True
            for buffer, value in kept:
                buffer.copy_(value)

    def _lost(self, batch: Batch) -> Tensor:
        torch.clear_autocast_cache()  # else weights that were moved are not seen: their casts from before are
        return self._loss_of(*selected(batch, self.blocks(batch.inputs, *batch.context)))

    def _loss_of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(outputs.device.type, enabled=False):
            return self._loss(outputs.to(torch.promote_types(outputs.dtype, torch.float32)), targets)

    def _passes_together(self, way: LowRank, batch: Batch) -> bool:
        """Whether many directions can pass at once; tried on a few rows against the directions written out."""
        if self._random or batch.context or batch.rows is not None or not way.weights:
            return False
        learned = tuple(way.weights)
        if self._factored is None or learned != self._factored_for:  # weights may be frozen and thawed
            self._factored_for = learned
            self._factored = self._agree(way, batch)
        return self._factored

    def _agree(self, way: LowRank, batch: Batch) -> bool:
        """Whether both ways change the outputs alike, by steps as long as the weights: ε may be lost in rounding."""
        few = batch.inputs[torch.arange(3) % len(batch.inputs)]  # one row alone would go with any number of rows
        signs = torch.tensor([1, -1, 1])
        members = torch.tensor([0, 0, self.n - 1])
        weights = way.weights.values()
        size = (sum(float(p.double().square().sum()) for p in weights) / sum(p.numel() for p in weights)) ** 0.5
        usual, way.setting = way.setting, replace(way.setting, eps=max(self.eps, size))
        ones = []
        try:
            base = self.blocks(few)
            try:
                found = way.together(self.blocks, members, signs, lambda: self.blocks(few))
            except Exception:  # whatever a network says to more rows than it was given
                return False
            for member, sign in zip(members.tolist(), signs.tolist(), strict=True):
                way.visit(member, sign)
                torch.clear_autocast_cache()
                ones.append(self.blocks(few))
        finally:
            way.home()
            way.setting = usual
        dense = torch.stack(ones)
        if found.shape != dense.shape:
            return False
        moved, wanted = ((outputs - base).double().flatten(1) for outputs in (found, dense))
        rounding = torch.finfo(dense.dtype).eps
        allowed = max(1e-2, 16 * rounding) * wanted.norm(dim=1) + rounding * float(base.double().norm())
        return bool(((moved - wanted).norm(dim=1) <= allowed).all())

    def _seen_together(self, way: LowRank, batch: Batch, directions: Sequence[int]) -> Tensor:
        sides = (1, -1) if self.antithetic else (1,)
        asked = torch.tensor([(member, sign) for member in directions for sign in sides]).view(-1, 2)
        chunk = self.chunk or max(1, _ROWS // max(1, len(batch.inputs)))
        losses = []
        for part in torch.split(asked, chunk):
            outputs = way.together(self.blocks, part[:, 0], part[:, 1], lambda: self.blocks(batch.inputs))
            losses.append(self._each(outputs, batch.targets).double().cpu())
        found = torch.full((len(directions), self._columns), math.nan, dtype=torch.float64)
        found[:, : len(sides)] = torch.cat(losses).view(-1, len(sides)) if losses else found[:, : len(sides)]
        if self._has_base:
            found[:, -1] = self._lost(batch)
        return found

    def _each(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of every direction, ``(m,)``."""
        try:
            with torch.autocast(outputs.device.type, enabled=False):
                wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
                made: Tensor = torch.vmap(self._loss, in_dims=(0, None))(wide, targets)
                return made
        except (RuntimeError, ValueError):  # not every loss takes many at once
            return torch.stack([self._loss_of(output, targets) for output in outputs])


def _generator_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states
