"""What a run's training costs beside seconds and joules: a warm start, samples by stage, memory of training alone."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain, islice, repeat
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from locallearn.algorithms.base import Algorithm
from locallearn.batch import Batch
from locallearn.cost import UpdateCost, cache_bytes, measure_update, optimizer_bytes, to_device, undisturbed
from locallearn.nets.execution import Execution
from locallearn.strategies.local import LocalStrategy, LocalTask
from locallearn.strategies.making import Closure, make_optimizers
from locallearn.study.plan import Interrupted, Plan

_SIZES = 4  # of batches beside the usual one, whose operations are counted each by itself


@dataclass
class _Seen:
    """What has passed through one stage.

    Attributes:
        steps: batches.
        rows: of all of them.
        samples: of these, the ones that carry targets: what a unit of this stage has seen, where a batch is for all.
        batches: how many there were by the number of such samples in them.
        distinct: rows of the stage's first epoch: those of the training set.
        epoch: which epoch that was.
        cache_bytes: most that the rule kept from one step to the next.
    """

    steps: int = 0
    rows: int = 0
    samples: int = 0
    distinct: int = 0
    epoch: int = 0
    cache_bytes: int = 0
    batches: dict[int, int] = field(default_factory=dict)

    def by_unit(self, algorithm: Algorithm, units: list[str]) -> dict[str, int]:
        """Samples that each unit has learned from."""
        sizes = self.batches.items()
        return {unit: sum(count * algorithm.learned_from(unit, size) for size, count in sizes) for unit in units}

    def per_unit(self, algorithm: Algorithm, units: list[str]) -> float:
        """The same in the mean over units; of a closed form, which has none, all samples."""
        learned = self.by_unit(algorithm, units)
        return sum(learned.values()) / len(learned) if learned else self.samples


class _Costs(pl.Callback):
    """Warms up before the meters open their window, and counts. Comes before the meters and the schedule."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.notes: list[str] = []
        self.memory = _Allocated(torch.device("cpu"))
        self._stages: dict[int, _Seen] = {}
        self._graph: Batch | None = None
        self._fresh: Algorithm | None = None
        self._rows: Tensor | None = None
        self._labelled = 0

    # -- training -----------------------------------------------------------------------------------------------------
    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        try:  # measured after training, but of a rule that has not kept anything yet
            self._fresh = copy.deepcopy(self.plan.algorithm)
        except Exception as error:  # a rule that cannot be copied can be trained
            self.notes.append(f"the cost of an update is unknown: the rule cannot be copied ({_said(error)})")

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        task = cast(LocalTask, pl_module)
        device = trainer.strategy.root_device
        if self.plan.warmup_steps > 0:
            try:
                steps = int(min(self.plan.warmup_steps, trainer.num_training_batches))
                with trainer.precision_plugin.train_step_context():
                    execution = cast(LocalStrategy, trainer.strategy).execution
                    _warm_up(self.plan, _batches(self.plan, trainer, task, steps), execution)
            except Interrupted:
                raise
            except Exception as error:
                self.notes.append(f"no warm-up: {_said(error)}")
        self.memory = _Allocated(device, self.memory.peak)
        self.memory.resume()

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.memory.resume()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.memory.resume()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = cast(LocalStrategy, trainer.strategy)
        given, strategy.batch = strategy.batch, None
        if given is None:
            return
        if given.context:
            self._graph = given
        stage = self.plan.schedule.stage
        seen = self._stages.setdefault(stage, _Seen(epoch=trainer.current_epoch))
        seen.steps += 1
        seen.rows += len(given.inputs)
        if given.rows is None or given.rows is not self._rows:
            self._rows, self._labelled = given.rows, _labelled(given)  # of a mask, which a device must be waited for
        seen.samples += self._labelled
        seen.batches[self._labelled] = seen.batches.get(self._labelled, 0) + 1
        if trainer.current_epoch == seen.epoch:
            seen.distinct += len(given.inputs)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.memory.pause()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        seen = self._stages.get(self.plan.schedule.stage)
        if trainer.state.fn == "fit" and seen is not None:
            seen.cache_bytes = max(seen.cache_bytes, self._kept(cast(LocalTask, pl_module)))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.memory.pause()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"stages": {str(k): asdict(seen) for k, seen in self._stages.items()}, "allocated": self.memory.peak}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stages = {int(k): _Seen(**seen) for k, seen in state_dict["stages"].items()}
        self.memory.peak = state_dict["allocated"]

    def _kept(self, task: LocalTask) -> int:
        return cache_bytes(self.plan.algorithm, without=[self._graph, task.info().example])

    # -- figures ------------------------------------------------------------------------------------------------------
    @property
    def samples(self) -> int:
        """Samples through training so far, of all stages together."""
        return sum(seen.samples for seen in self._stages.values())

    @property
    def samples_per_unit(self) -> float:
        """Samples that a unit has learned from, in the mean over units and stages; :meth:`figures` has those of each."""
        stages, algorithm = self.plan.schedule.stages(self.plan.algorithm), self.plan.algorithm
        return sum(seen.per_unit(algorithm, stages[number]) for number, seen in self._stages.items()) / len(stages)

    def figures(self, trainer: pl.Trainer, task: LocalTask) -> dict[str, Any]:
        """Entries of the record's ``cost`` that this callback knows. Call it after training."""
        update = self._measured(trainer, task)
        if update is not None and self.plan.compile is not None:
            self.notes.append("operations and bytes of an update are those of the same blocks uncompiled")
        stages = []
        for number, units in enumerate(self.plan.schedule.stages(self.plan.algorithm)):
            seen = self._stages.get(number, _Seen())
            stage: dict[str, Any] = {"units": units, **{k: getattr(seen, k) for k in ("steps", "rows", "samples")}}
            learned = seen.by_unit(self.plan.algorithm, units)
            if set(learned.values()) - {seen.samples}:
                stage["samples_by_unit"] = learned
            if update is not None:
                cost = update.stages[number]
                stage |= {
                    "update_flops": cost.update_flops,
                    "once_flops": cost.once(seen.distinct) if seen.steps else 0.0,
                    "train_flops": cost.training(seen.steps, seen.rows, seen.distinct, seen.batches),
                    "steady": cost.steady,
                    "activation_peak_bytes": cost.activation_peak_bytes,
                    "gradient_bytes": cost.gradient_bytes,
                }
            # Seen after every validation; where there was none, what the measured batches left.
            measured = 0 if update is None else update.stages[number].cache_bytes
            stage["cache_bytes"] = seen.cache_bytes or measured
            stages.append(stage)
        known = update is not None
        return {
            "update_flops": update.flops if update else None,
            "once_flops": sum(stage["once_flops"] for stage in stages) if known else None,
            "train_flops": sum(stage["train_flops"] for stage in stages) if known else None,
            "inference_flops": self._inference(update, task),
            "activation_peak_bytes": update.activation_peak_bytes if update else None,
            "allocated_peak_bytes": self.memory.peak,
            "cache_bytes": max(stage["cache_bytes"] for stage in stages),
            "state_bytes": update.state_bytes if update else None,
            "gradient_bytes": update.gradient_bytes if update else None,
            "optimizer_bytes": optimizer_bytes(trainer.strategy.optimizers),
            "samples": self.samples_per_unit,
            "stages": stages,
            "uncounted": list(update.uncounted) if update else [],
        }

    @staticmethod
    def _inference(update: UpdateCost | None, task: LocalTask) -> float | None:
        """Of a prediction, which may be the mean of several inferences."""
        if update is None or update.inference_flops is None:
            return None
        return update.inference_flops * int(getattr(task, "views", 1))

    def _measured(self, trainer: pl.Trainer, task: LocalTask) -> UpdateCost | None:
        """Cost of an update of the rule as it was before training; ``None`` with a note where it cannot be had."""
        if self._fresh is None:
            return None
        device = trainer.strategy.root_device
        try:
            fresh = cast(Algorithm, trainer.precision_plugin.convert_module(self._fresh)).to(device)
            cast(LocalStrategy, trainer.strategy).execution.lay_out(fresh)
            batch, *others = _batches(self.plan, trainer, task, 2)
            recurs = _batches(self.plan, trainer, task, 1)[0].inputs is batch.inputs
            predicted = to_device(task.info().example, device) if batch.context else None
            with _untouched(self.plan.algorithm), trainer.precision_plugin.train_step_context():
                return measure_update(
                    fresh,
                    batch,
                    self.plan.schedule.sequential,
                    other=others[0] if others else None,
                    recurs=recurs,
                    predicted=predicted,
                    sizes=self._smaller(len(batch.inputs)),
                )
        except Exception as error:  # a meter may cost its own figure only
            self.notes.append(f"the cost of an update is unknown: {_said(error)}")
            return None

    def _smaller(self, rows: int) -> list[int]:
        """Sizes of batches beside the usual one; of many the most frequent, and the others are taken to lie between."""
        counts = Counter[int]()
        for seen in self._stages.values():
            counts.update({size: count for size, count in seen.batches.items() if 0 < size < rows})
        return [size for size, _ in counts.most_common(_SIZES)]


class _Allocated:
    """Peak bytes of a CUDA device's allocator while it is not paused: over training, without validation and probes.

    Args:
        device: any other device has no such figure.
        peak: of an earlier part of the run.
    """

    def __init__(self, device: torch.device, peak: int | None = None) -> None:
        self.peak = peak
        self._device = device
        self._running = False

    def resume(self) -> None:
        """Watch from now on; without effect while watching."""
        if self._device.type == "cuda" and not self._running:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._running = True

    def pause(self) -> None:
        """Note the peak, and watch no longer."""
        if self._running:
            self.peak = max(self.peak or 0, torch.cuda.max_memory_allocated(self._device))
            self._running = False


def _warm_up(plan: Plan, batches: list[Batch], execution: Execution) -> None:
    """Some steps of every stage on a copy, so that the first measured step finds allocators, kernels and plans ready."""
    with _untouched(plan.algorithm), undisturbed(batches[0].inputs.device), torch.enable_grad():
        twin = copy.deepcopy(plan.algorithm)
        twin.train()
        execution.prepare(twin, twin.blocks)
        optimizers = make_optimizers(twin, plan.optimizer)
        for stage in plan.schedule.stages(twin):
            twin.train_only(frozenset(stage) if plan.schedule.sequential else None)
            for batch in islice(chain.from_iterable(repeat(batches)), plan.warmup_steps):
                # The class's method: one that somebody has put on the rule itself would run that rule, not its copy.
                for update in type(twin).updates(twin, batch):
                    optimizer = optimizers[update.unit]
                    optimizer.step(cast(Any, Closure(update, optimizer)))  # some ask it several times
                    optimizer.zero_grad()


@contextmanager
def _untouched(algorithm: Algorithm) -> Iterator[None]:
    """Afterwards weights, buffers, counts and generators are those from before, even if a copy reaches back to its rule."""
    before = {name: t.detach().clone() for name, t in _state(algorithm)}
    counted, generators = algorithm.batches_seen, algorithm.get_extra_state()
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in _state(algorithm):
                if not torch.equal(tensor, before[name]):
                    tensor.copy_(before[name])
        algorithm.zero_grad(set_to_none=True)
        algorithm.set_extra_state({**generators, "batches_seen": torch.tensor(counted)})


def _state(algorithm: Algorithm) -> Iterator[tuple[str, Tensor]]:
    yield from chain(algorithm.named_parameters(), algorithm.named_buffers())


def _batches(plan: Plan, trainer: pl.Trainer, task: LocalTask, number: int) -> list[Batch]:
    """The first batches of an epoch, as training gets them, from a loader of their own."""
    strategy = cast(LocalStrategy, trainer.strategy)
    with undisturbed(strategy.root_device, plan.data):
        return [strategy.feed(task.to_batch(raw)) for raw in islice(plan.data.train_dataloader(), number)]


def _labelled(batch: Batch) -> int:
    """Samples of a batch that a unit learns from: those that carry targets, or pairs of nodes."""
    if batch.rows is None:
        return len(batch.inputs)
    if batch.rows.dtype == torch.bool:
        return int(batch.rows.sum())
    return batch.rows.shape[-1]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
