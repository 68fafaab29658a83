"""Speed and memory, measured so that the figures can be trusted: alternated rounds, ratios, a record."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.table import Table
from torch.optim import Optimizer
from typing_extensions import override

from locallearn.algorithms.base import Algorithm
from locallearn.batch import Batch
from locallearn.cost import measure_update, to_device
from locallearn.precision import multiplying
from locallearn.records import RunFolder, hardware, versions
from locallearn.strategies.local import LocalStrategy, make_optimizers
from locallearn.study.train import Plan, attached_task, quiet

Make = Callable[..., Plan]
"""Makes a plan: ``make(contender, *settings)``; a contender is an algorithm, perhaps with settings of its own."""

KINDS = ("step", "strategy", "data", "memory")


@dataclass(frozen=True)
class Timing:
    """Rounds of one contender.

    Attributes:
        name: of the contender.
        baseline: of what it is compared with.
        seconds: per round.
        ratios: to the baseline's seconds of the same round.
    """

    name: str
    baseline: str
    seconds: list[float]
    ratios: list[float]

    def to_dict(self) -> dict[str, Any]:
        """For the record."""
        return {
            "name": self.name,
            "baseline": self.baseline,
            "seconds": self.seconds,
            "ratio": statistics.median(self.ratios),
            "ratio_min": min(self.ratios),
            "ratio_max": max(self.ratios),
        }


def bench(
    what: str, algorithms: Sequence[str], make: Make, rounds: int, steps: int, depths: Sequence[int]
) -> tuple[Table, Path]:
    """Measure, and leave a record.

    Args:
        what: ``step``: seconds of an update of every algorithm against backprop (under a sequential schedule those of
            one update per stage); ``strategy``: a Trainer with LocalStrategy against the plain loop over the same
            generator; ``data``: share of an epoch that passes outside the update; ``memory``: peak activation bytes by
            depth.
        algorithms: names that ``make`` knows.
        make: makes the plan of an algorithm, with further settings.
        rounds: counted rounds after one that warms up; in each round every contender runs once, in turn.
        steps: batches per round; for ``strategy`` at most those of an epoch.
        depths: numbers of equal blocks for ``memory``, the first one is the baseline.

    Returns:
        A table for the terminal, and the record's folder.

    Raises:
        ValueError: an unknown ``what``, no rounds, no steps, no depths, no backprop to compare steps with, or for
            ``memory`` a network that is not made of ``hidden`` widths.
    """
    if what not in KINDS:
        raise ValueError(f"bench.what is {what!r}, expected one of {', '.join(KINDS)}")
    if any(type(count) is not int or count < 1 for count in (rounds, steps)):
        raise ValueError(f"bench.rounds is {rounds} and bench.steps is {steps}, expected whole numbers of at least 1")
    plan = make(algorithms[0])
    with multiplying(plan.matmul_precision):
        if what == "memory":
            sheet, figures = _memory(algorithms, make, depths)
        elif what == "data":
            sheet, figures = _data(algorithms, make, rounds)
        else:
            if what == "strategy":
                steps = min(steps, len(_loader(plan)))
            contenders = _step(algorithms, make, steps) if what == "step" else _strategy(algorithms, make, steps)
            timings = _alternate(contenders, rounds)
            sheet = _timing_table(what, timings, steps)
            figures = {"steps": steps, "rounds": rounds, "contenders": [timing.to_dict() for timing in timings]}
    folder = RunFolder.create(
        plan.runs_dir,
        {
            **plan.names,
            "algorithm": "bench",
            "task": "bench",
            "seed": plan.seed,
            "config": plan.config,
            "command": plan.command,
            "versions": versions(),
            "hardware": {**hardware(_gpus()), "threads": torch.get_num_threads()},
            "bench": {"what": what, **figures, **asdict(sheet)},
        },
    )
    return _table(sheet), folder.finish("done")


@dataclass(frozen=True)
class _Sheet:
    """A table as it goes to the terminal and into the record."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def _table(sheet: _Sheet) -> Table:
    table = Table(title=sheet.title, title_justify="left")
    for number, column in enumerate(sheet.columns):
        table.add_column(column, justify="right" if number else "left")
    for row in sheet.rows:
        table.add_row(*row)
    return table


def _gpus() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _device(plan: Plan) -> torch.device:
    wants_gpu = plan.trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    return torch.device("cuda" if wants_gpu and torch.cuda.is_available() else "cpu")


@dataclass
class _Contender:
    name: str
    baseline: str
    round: Callable[[], float]


def _alternate(contenders: Sequence[_Contender], rounds: int) -> list[Timing]:
    """Seconds of every contender in every round, and ratios within the round, so that drift cancels."""
    seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    for number in range(rounds + 1):
        # The order turns with the rounds, so that nobody always runs after the same neighbour.
        turn = number % len(contenders)
        for contender in [*contenders[turn:], *contenders[:turn]]:
            taken = contender.round()
            if number > 0:
                seconds[contender.name].append(taken)
    return [
        Timing(
            c.name,
            c.baseline,
            seconds[c.name],
            [mine / base for mine, base in zip(seconds[c.name], seconds[c.baseline], strict=True)],
        )
        for c in contenders
    ]


def _prepare(plan: Plan) -> tuple[Any, Algorithm, dict[str, Optimizer], torch.device]:
    """Network, attached algorithm and optimizers on the device, as the plain loop wants them."""
    task = attached_task(plan)
    device = _device(plan)
    task.to(device).train()
    return task, plan.algorithm, make_optimizers(plan.algorithm, plan.optimizer), device


def _loader(plan: Plan) -> Any:
    """The training data's loader."""
    plan.data.prepare_data()
    plan.data.setup("fit")
    return plan.data.train_dataloader()


def _batches(plan: Plan, task: Any, device: torch.device, count: int) -> list[Batch]:
    """The first batches, each moved to the device once: what a graph's rule keeps is looked up by the very tensors."""
    moved: dict[int, Batch] = {}
    given = list(itertools.islice(_endless(_loader(plan)), count))
    return [moved.setdefault(id(raw), to_device(task.to_batch(raw), device)) for raw in given]


def _endless(loader: Any) -> Iterator[Batch]:
    while True:
        yield from loader


def _loop(algorithm: Algorithm, optimizers: dict[str, Optimizer], batch: Batch) -> None:
    for update in algorithm.updates(batch):
        update.backward()
        optimizers[update.unit].step()
        optimizers[update.unit].zero_grad()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _step(algorithms: Sequence[str], make: Make, steps: int) -> list[_Contender]:
    if "backprop" not in algorithms:
        raise ValueError(f"bench.algorithms is {list(algorithms)}: ratios are to backprop, so it must be among them")
    contenders = []
    for name in algorithms:
        plan = make(name)
        task, algorithm, optimizers, device = _prepare(plan)
        batches = _batches(plan, task, device, min(steps, 16))
        stages: list[frozenset[str] | None] = [None]
        if plan.schedule.sequential:
            stages = [frozenset(stage) for stage in plan.schedule.stages(algorithm)]

        def one_round(
            algorithm: Algorithm = algorithm,
            optimizers: dict[str, Optimizer] = optimizers,
            batches: list[Batch] = batches,
            device: torch.device = device,
            stages: list[frozenset[str] | None] = stages,
        ) -> float:
            start = _now(device)
            for stage in stages:  # of a sequential schedule so many steps each, what it keeps of frozen blocks included
                algorithm.train_only(stage)
                for number in range(steps):
                    _loop(algorithm, optimizers, batches[number % len(batches)])
            return _now(device) - start

        contenders.append(_Contender(name, "backprop", one_round))
    return contenders


class _EpochClock(pl.Callback):
    """Seconds from the first to the last batch of an epoch inside a Trainer."""

    seconds = 0.0

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = _now(trainer.strategy.root_device)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = _now(trainer.strategy.root_device) - self._start


def _strategy(algorithms: Sequence[str], make: Make, steps: int) -> list[_Contender]:
    contenders = []
    for name in algorithms:
        plan = make(name)
        task, algorithm, optimizers, device = _prepare(plan)
        loader = _loader(plan)

        def plain(
            task: Any = task,
            algorithm: Algorithm = algorithm,
            optimizers: dict[str, Optimizer] = optimizers,
            loader: Any = loader,
            device: torch.device = device,
        ) -> float:
            start = _now(device)
            for batch in itertools.islice(loader, steps):
                _loop(algorithm, optimizers, task.to_batch(batch))
            return _now(device) - start

        def trained(name: str = name, loader: Any = loader) -> float:
            plan = make(name)
            task = attached_task(plan)
            clock = _EpochClock()
            with quiet():
                trainer = pl.Trainer(
                    strategy=LocalStrategy(plan.algorithm, plan.optimizer),
                    max_epochs=1,
                    limit_train_batches=steps,
                    limit_val_batches=0,
                    callbacks=[clock],
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                    **plan.trainer,
                )
                trainer.fit(task, train_dataloaders=loader)
            return clock.seconds

        contenders += [
            _Contender(f"{name}, plain loop", f"{name}, plain loop", plain),
            _Contender(f"{name}, Trainer with LocalStrategy", f"{name}, plain loop", trained),
        ]
    return contenders


def _timing_table(what: str, timings: Sequence[Timing], steps: int) -> _Sheet:
    return _Sheet(
        f"bench {what}: {len(timings[0].seconds)} alternated rounds of {steps} batches",
        ["contender", "ms per batch (median)", "ratio (median)", "ratio (min to max)"],
        [
            [
                t.name,
                f"{1000 * statistics.median(t.seconds) / steps:.3f}",
                f"{statistics.median(t.ratios):.3f}",
                f"{min(t.ratios):.3f} to {max(t.ratios):.3f}",
            ]
            for t in timings
        ],
    )


def _data(algorithms: Sequence[str], make: Make, rounds: int) -> tuple[_Sheet, dict[str, Any]]:
    """Share of an epoch that passes while the loop waits for its next batch."""
    lines = []
    rows = []
    for name in algorithms:
        plan = make(name)
        task, algorithm, optimizers, device = _prepare(plan)
        loader = _loader(plan)
        epochs, shares = [], []
        for number in range(rounds + 1):
            waited, start = 0.0, _now(device)
            batches, before = iter(loader), start
            for batch in batches:
                waited += _now(device) - before
                _loop(algorithm, optimizers, task.to_batch(batch))
                before = _now(device)
            taken = _now(device) - start
            if number > 0:
                epochs.append(taken)
                shares.append(waited / taken)
        rows.append({"name": name, "epoch_s": epochs, "share": shares})
        lines.append(
            [
                name,
                f"{statistics.median(epochs):.2f}",
                f"{100 * statistics.median(shares):.2f}",
                f"{100 * max(shares):.2f}",
            ]
        )
    title = f"bench data: share of an epoch not spent in the update, {rounds} epochs"
    sheet = _Sheet(title, ["algorithm", "epoch s (median)", "data % (median)", "data % (max)"], lines)
    return sheet, {"rounds": rounds, "contenders": rows}


def _memory(algorithms: Sequence[str], make: Make, depths: Sequence[int]) -> tuple[_Sheet, dict[str, Any]]:
    """Peak activation bytes of one update for networks of equal blocks."""
    if not depths or any(type(depth) is not int or depth < 1 for depth in depths):
        raise ValueError(f"bench.depths is {list(depths)}, expected whole numbers of blocks of at least 1")
    hidden = make(algorithms[0]).config["net"].get("hidden")
    if not hidden:
        raise ValueError(
            "bench.what=memory builds networks of equal blocks from the last net.hidden: use net=mlp, or net=gcn for graphs"
        )
    width = list(hidden)[-1]
    lines = []
    rows = []
    for name in algorithms:
        peaks = []
        for depth in depths:
            plan = make(name, f"net.hidden={[width] * depth}")
            task, algorithm, _, device = _prepare(plan)
            [batch] = _batches(plan, task, device, 1)
            peaks.append(measure_update(algorithm, batch, plan.schedule.sequential).activation_peak_bytes)
        ratio = peaks[-1] / peaks[0]
        rows.append({"name": name, "activation_peak_bytes": peaks, "ratio": ratio})
        lines.append([name, *(f"{peak:,}" for peak in peaks), f"{ratio:.2f}"])
    columns = ["algorithm", *(f"{depth} blocks" for depth in depths), f"{depths[-1]} over {depths[0]}"]
    sheet = _Sheet("bench memory: peak bytes kept alive for gradients in one update", columns, lines)
    return sheet, {"depths": list(depths), "contenders": rows}
