"""The frame of rules whose layers are solved for: passes over the data gather sums, and the end of a pass solves them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Container, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from locallearn.algorithms._grown import Grown
from locallearn.algorithms._linear_layers import LinearLayer, find_layers, read
from locallearn.algorithms.base import Locality, ParamGroup, TaskInfo, Update, output_layer, refuse_dense
from locallearn.algorithms.layer_local import LayerLocal
from locallearn.batch import Batch
from locallearn.functional import ridge
from locallearn.functional.cafo import check_targets
from locallearn.functional.ridge import Fit, Intercept, Moments, Singular
from locallearn.nets.border import main

GIB = 2**30
Form = Literal["sums", "rows"]


class Sums(Grown):
    """What rows leave behind until they are solved for: sums of products in float64, or the rows themselves.

    The state dicts of two that have gathered parts of the data can be merged: :meth:`merge`.

    Args:
        form: ``sums``: XᵀX and XᵀY, whatever the number of rows; ``rows``: rows and targets as they came, for the dual form
            where there are fewer rows than features.
    """

    def __init__(self, form: Form = "sums") -> None:
        super().__init__()
        self.form = form
        for name in (*Moments._fields, "kept", "wanted"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.float64))

    @property
    def moments(self) -> Moments:
        """The sums, which are the buffers themselves."""
        return Moments(*(self.get_buffer(name) for name in Moments._fields))

    @property
    def gathering(self) -> bool:
        """Whether anything has come since the last :meth:`forget`."""
        return self.get_buffer("gram" if self.form == "sums" else "kept").numel() > 0

    @property
    def bytes(self) -> int:
        """Of all that is held."""
        return sum(b.numel() * b.itemsize for b in self.buffers())

    def gather(self, rows: Tensor, targets: Tensor) -> None:
        """Add rows ``(N, D)`` with targets ``(N, C)``."""
        if self.form == "sums":
            if not self.gathering:
                for name, value in Moments.zeros(rows.shape[1], targets.shape[1], rows.device)._asdict().items():
                    setattr(self, name, value)
            self.moments.gather(rows, targets)
            return
        kept, wanted = self.get_buffer("kept"), self.get_buffer("wanted")
        if self.gathering:
            rows, targets = torch.cat((kept, rows.to(kept))), torch.cat((wanted, targets.to(wanted)))
        # float64, so that nobody rounds them who moves the network to another dtype
        self.kept, self.wanted = rows.double(), targets.double()

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add what another one has gathered, on another rank, say: its ``state_dict()``."""
        if state["kept"].numel():
            self.gather(state["kept"], state["wanted"])
        elif state["gram"].numel():
            other = Moments(*(state[name] for name in Moments._fields))
            if self.gathering:
                self.moments.add(other)
            else:
                for name, value in other._asdict().items():
                    setattr(self, name, value.clone())

    def fit(self, penalty: float, intercept: Intercept) -> Fit:
        """W and b.

        Raises:
            Singular: the equations have no single solution.
        """
        if self.form == "sums":
            return ridge.solve(self.moments, penalty, intercept)
        return ridge.solve_rows(self.get_buffer("kept"), self.get_buffer("wanted"), penalty, intercept)

    def path(self, intercept: Intercept) -> ridge.Path:
        """W and b for every penalty."""
        if self.form == "sums":
            return ridge.path(self.moments, intercept)
        return ridge.path_of_rows(self.get_buffer("kept"), self.get_buffer("wanted"), intercept)

    def forget(self) -> None:
        """Let everything go."""
        for name, held in list(self.named_buffers()):
            setattr(self, name, held.new_zeros(0))


class _Told(Grown):
    """What is to be told of every layer, in float64; below 0 what is not known."""

    names = ("lambda", "residual", "samples", "sums_mib", "loo_error")
    found: Tensor

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.register_buffer("found", torch.full((layers, len(self.names)), -1.0, dtype=torch.float64))


class ClosedFormLayers(LayerLocal):
    """A rule without steps: every pass over the data gathers sums for one layer, and :meth:`end_epoch` solves for it.

    Units there are none, a sequential schedule has an empty stage for every pass; ``consecutive`` says so to schedules. The
    weights that are solved for are the network's own, frozen (``requires_grad=False``); of the others nothing moves, and
    everything rests in eval mode.

    Args:
        seed: of the rule's draws.
        form: see :class:`Sums`.
        positions: rows that are taken of one sample of a map or a sequence, at random; ``None``: all.
        rows: rows that are worked with at a time.
        memory_gib: most that XᵀX and XᵀY of one layer may take.

    Raises:
        ValueError: an unknown choice or a number out of range.
    """

    passed: Tensor
    seen: Tensor

    def __init__(
        self,
        seed: int,
        form: Form,
        positions: int | None,
        rows: int,
        memory_gib: float,
    ) -> None:
        super().__init__(seed)
        if form not in get_args(Form):
            raise ValueError(f"form is {form!r}, expected one of {', '.join(get_args(Form))}")
        for name, value in (("positions", positions), ("rows", rows)):
            if not (value is None and name == "positions") and (type(value) is not int or value < 1):
                raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1")
        if not memory_gib > 0:
            raise ValueError(f"memory_gib is {memory_gib}, expected more than 0")
        self.form: Form = form
        self.positions = positions
        self.rows = rows
        self.memory_gib = memory_gib

    # -- what a rule fills in -----------------------------------------------------------------------------------------
    @property
    @abstractmethod
    def passes(self) -> int:
        """Passes over the data until everything is solved."""

    @abstractmethod
    def _layer(self, number: int) -> LinearLayer:
        """The layer that pass ``number`` is for."""

    @abstractmethod
    def _take(self, number: int, rows: Tensor, targets: Tensor) -> None:
        """Gather these rows ``(R, D)`` in pass ``number``, with the targets of each of them ``(R, C)``."""

    @abstractmethod
    def _conclude(self, number: int) -> None:
        """Solve, when pass ``number`` has ended."""

    # -- what it is ---------------------------------------------------------------------------------------------------
    @property
    def last_alone(self) -> bool:
        """Whether nothing but the last layer is solved for."""
        return False

    @property
    def carries(self) -> bool:
        """Layers read what they are given, and what else blocks hand over is carried along."""
        return True

    @property
    def consecutive(self) -> bool:
        """One pass after the other."""
        return True

    @property
    def locality(self) -> Locality:
        """No backward pass, and none in a layer."""
        return Locality.FORWARD_ONLY

    def build(self, task: TaskInfo) -> None:
        """Find the layers."""
        owner = type(self).__name__
        output_layer(self.blocks, owner)
        refuse_dense(task, owner)
        if task.example.context or task.example.rows is not None:
            raise ValueError(
                f"{owner} takes every sample by itself, and these batches have a context (a graph's edges): use mono_forward "
                "or forward_gnn"
            )
        self.layers = find_layers(self.blocks, task.example, owner, last_alone=self.last_alone)
        self.classes = task.classes
        self.sums = Sums(self.form)
        self.register_buffer("passed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.told = _Told(len(self.layers))

    def _check_memory(self, layers: list[LinearLayer]) -> None:
        for layer in layers:
            bytes_ = 8 * (layer.features + 1) * (layer.features + layer.width)
            if self.form == "sums" and bytes_ > self.memory_gib * GIB:
                raise ValueError(
                    f"the closed form needs XᵀX of layer {layer.name!r}, which reads {layer.features} numbers: "
                    f"{bytes_ / GIB:.1f} GiB in float64, and algorithm.memory_gib is {self.memory_gib:g}: raise it, pool more, "
                    "or, for fewer rows than that, set algorithm.form=rows"
                )

    def units(self) -> dict[str, list[ParamGroup]]:
        """None."""
        return {}

    def block_groups(self, index: int) -> list[ParamGroup]:
        """None."""
        return []

    @property
    def stages(self) -> list[list[str]]:
        """One for every pass, without units."""
        return [[] for _ in range(self.passes)]

    @property
    def finished(self) -> bool:
        """Whether everything is solved; under a schedule of stages, whether this pass is."""
        return int(self.passed) >= self.passes or (self.active is not None and not int(self.seen))

    @property
    def judges(self) -> bool:
        """Not before the readout is solved."""
        return int(self.passed) >= self.passes

    def _asleep(self) -> Container[str]:
        return {f"blocks.members.{name}" for name in self.blocks.names}

    # -- learning -----------------------------------------------------------------------------------------------------
    def prepare(self, batch: Batch) -> Batch:
        """The batch as it is.

        Raises:
            ValueError: a part of a graph.
        """
        if batch.context or batch.rows is not None:
            raise ValueError(f"{type(self).__name__} takes batches of samples, and this one is part of a graph")
        return batch

    def local_loss(self, index: int, output: Tensor, batch: Batch) -> Tensor:
        """There is none."""
        raise NotImplementedError

    def updates(self, batch: Batch) -> Iterator[Update]:
        """Gather, and yield nothing."""
        number = int(self.passed)
        if number < self.passes:
            with torch.no_grad():
                self._gather(number, self.prepare(batch))
        yield from ()

    def _gather(self, number: int, batch: Batch) -> None:
        layer = self._layer(number)
        targets = self._wanted(batch)
        for inputs in self._inputs(layer, batch):
            with torch.autocast(inputs.device.type, enabled=False):
                step = max(1, self.rows // max(1, layer.positions))
                for start in range(0, len(inputs), step):
                    rows = layer.rows(inputs[start : start + step])
                    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
                    part = targets[start : start + step]
                    positions = len(rows) // len(part)
                    part = self._spread(part, positions)
                    if self.positions is not None and self.positions < positions:
                        chosen = self._some(len(rows) // positions, positions, rows.device)
                        rows, part = rows[chosen], part[chosen]
                    self._take(number, rows, part)
        self.seen += len(batch.inputs)

    def _spread(self, targets: Tensor, positions: int) -> Tensor:
        """Targets of samples ``(N, C)`` as those of their rows ``(N · positions, C)``: every row has its sample's."""
        return targets.repeat_interleave(positions, 0)

    def _some(self, samples: int, positions: int, device: torch.device) -> Tensor:
        """Places of so many rows of every sample, drawn without replacement."""
        draws = torch.rand(samples, positions, generator=self.rng(device), device=device)
        chosen = draws.topk(self.positions or positions, dim=1).indices
        return (chosen + positions * torch.arange(samples, device=device)[:, None]).flatten()

    def _wanted(self, batch: Batch) -> Tensor:
        """One row of targets per sample: one-hot labels, or the targets flattened."""
        targets = batch.targets
        if not self.classes:
            return targets.reshape(len(targets), -1)
        check_targets(targets, len(batch.inputs), self.outputs)
        return torch.nn.functional.one_hot(targets.long(), self.outputs)

    def _inputs(self, layer: LinearLayer, batch: Batch) -> list[Tensor]:
        """What the layer is given, call by call."""
        place, depth = layer.place, len(self.blocks)
        x: Any = self._frozen_prefix(min(place, depth - 1), batch, batch)
        if place < depth:
            return read(layer, lambda: self.run(place, x, batch))
        x = main(self.hand_over(depth - 1, self.run(depth - 1, x, batch)))
        readout = output_layer(self.blocks, type(self).__name__)
        return read(layer, lambda: readout(x))

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Solve what this pass was for; nothing happens where none of it has come."""
        number = int(self.passed)
        if number >= self.passes or not int(self.seen):
            return
        with torch.autocast(self.seen.device.type, enabled=False):
            self._conclude(number)
        self.passed += 1
        self.seen.zero_()

    def _solve(self, layer: LinearLayer, penalty: float, intercept: Intercept, name: str) -> None:
        """Solve the sums for a layer, keep what is to be told of it, and write its weights.

        Args:
            layer: to be written.
            penalty: λ.
            intercept: of a layer with a bias.
            name: of the setting that holds λ, for the message.

        Raises:
            Singular: names the layer, its rank and what helps.
        """
        try:
            fit = self.sums.fit(penalty, intercept if layer.module.bias is not None else "none")
        except Singular as error:
            raise Singular(f"layer {layer.name!r} cannot be solved for: {error} (algorithm.{name})") from error
        self._write(layer, fit, penalty, self.sums.bytes)

    def _write(self, layer: LinearLayer, fit: Fit, penalty: float, bytes_: int, left_out: float = -1.0) -> None:
        """Give a layer its weights, and keep what is to be told of them."""
        layer.write(fit.weights, fit.intercept)
        told = [penalty, fit.residual, float(self.seen), bytes_ / 2**20, left_out]
        self.told.found[self.layers.index(layer)] = self.told.found.new_tensor(told)

    def diagnostics(self) -> dict[str, dict[str, float]]:
        """Of every layer that is solved: λ, the residual of its equations, samples of its pass, and MiB that its sums took.

        Where λ was chosen, the mean squared error of a row left out, too.
        """
        rows = zip(self.layers, self.told.found.tolist(), strict=True)
        named = {layer.name: dict(zip(self.told.names, row, strict=True)) for layer, row in rows}
        known = {name: {key: value for key, value in told.items() if value >= 0} for name, told in named.items()}
        return {name: told for name, told in known.items() if told}
