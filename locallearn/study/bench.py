"""Speed and memory, measured so that the figures can be trusted: alternated rounds, ratios, a record."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from rich.table import Table
from torch.optim import Optimizer
from typing_extensions import override

from locallearn.algorithms.base import Algorithm, Update
from locallearn.batch import Batch
from locallearn.cost import UpdateCost, bytes_of, counting, measure_update, working_bytes
from locallearn.precision import multiplying
from locallearn.records import RunFolder, hardware, source, versions
from locallearn.strategies.local import Closure, LocalStrategy
from locallearn.strategies.making import make_optimizers
from locallearn.study._estimates import measure_estimates
from locallearn.study._rehearsal import make_trainer, precision_of, quiet
from locallearn.study._signals import stoppable
from locallearn.study.train import Plan, attached_task, check_last_batch

Make = Callable[..., Plan]
"""Makes a plan: ``make(contender, *settings)``; a contender is an algorithm, perhaps with settings of its own."""

KINDS = ("step", "strategy", "data", "memory", "estimates")


@dataclass(frozen=True)
class Timing:
    """Rounds of one contender.

    Attributes:
        name: of the contender.
        baseline: of what it is compared with.
        seconds: per round.
        ratios: to the baseline's seconds of the same round.
        flops: operations of a step over the baseline's; ``None`` where they were not counted.
    """

    name: str
    baseline: str
    seconds: list[float]
    ratios: list[float]
    flops: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For the record."""
        return {
            "name": self.name,
            "baseline": self.baseline,
            "seconds": self.seconds,
            "ratio": statistics.median(self.ratios),
            "ratio_min": min(self.ratios),
            "ratio_max": max(self.ratios),
            **({} if self.flops is None else {"flops_ratio": self.flops, "time_over_flops": self.quotient}),
        }

    @property
    def quotient(self) -> float | None:
        """Ratio of the times over that of the operations: 1 where all operations are done as fast as the baseline's."""
        return statistics.median(self.ratios) / self.flops if self.flops else None


def bench(
    what: str,
    algorithms: Sequence[str],
    make: Make,
    rounds: int,
    steps: int,
    depths: Sequence[int],
    counts: Sequence[int] = (1,),
) -> tuple[Table, Path]:
    """Measure, and leave a record.

    Args:
        what: ``step``: seconds of an update of every algorithm against backprop (under a sequential schedule those of
            one update per stage), beside the ratio of their operations; ``strategy``: a Trainer with LocalStrategy against
            the plain loop over the same generator; ``data``: share of an epoch that passes outside the update; ``memory``:
            peak activation bytes, of an MLP or a graph network by depth, of any other network as it is; ``estimates``: how
            far a rule's estimate of a batch's gradient is from the true one, by the number of directions.
        algorithms: names that ``make`` knows.
        make: makes the plan of an algorithm, with further settings.
        rounds: counted rounds after one that warms up; in each round every contender runs once, in turn.
        steps: batches per round; for ``strategy`` at most those of an epoch, after a few that are not counted.
        depths: numbers of equal blocks for ``memory``, the first one is the baseline; networks that are not made of
            ``hidden`` widths do not look at it.
        counts: numbers of directions for ``estimates``, of which rounds x steps are drawn each.

    Returns:
        A table for the terminal, and the record's folder.

    Raises:
        ValueError: an unknown ``what``, no rounds, no steps, no depths, no backprop to compare steps with, a rule whose
            costs are not its own (it is simulated), or for ``strategy`` an epoch of too few batches.
    """
    if what not in KINDS:
        raise ValueError(f"bench.what is {what!r}, expected one of {', '.join(KINDS)}")
    if any(type(count) is not int or count < 1 for count in (rounds, steps)):
        raise ValueError(f"bench.rounds is {rounds} and bench.steps is {steps}, expected whole numbers of at least 1")
    plan = make(algorithms[0])
    for name in algorithms:
        why = (plan if name == algorithms[0] else make(name)).algorithm.untimed
        if why is not None:
            raise ValueError(f"{name} cannot be benched: {why}; take it out")
    with multiplying(plan.matmul_precision):
        if what == "memory":
            sheet, figures = _memory(algorithms, make, depths)
        elif what == "estimates":
            sheet, figures = _estimates(algorithms, make, counts, rounds * steps)
        elif what == "data":
            sheet, figures = _data(algorithms, make, rounds)
        else:
            if what == "strategy":
                steps = min(steps, len(_loader(plan)) - _WARM)
                if steps < 1:
                    raise ValueError(
                        f"an epoch has {steps + _WARM} batches, of which the first {_WARM} are not counted: use smaller batches"
                    )
            contenders = _step(algorithms, make, steps) if what == "step" else _strategy(algorithms, make, steps)
            timings = _alternate(contenders, rounds)
            sheet = _timing_table(what, timings, steps)
            figures = {"steps": steps, "rounds": rounds, "contenders": [timing.to_dict() for timing in timings]}
        precision = _precision(plan)
    sheet = replace(sheet, title=f"{sheet.title}; {precision['trainer']}, products in {precision['matmul_in_effect']}")
    folder = RunFolder.create(
        plan.runs_dir,
        {
            **plan.names,
            "precision": precision,
            "algorithm": "bench",
            "task": "bench",
            "seed": plan.seed,
            "config": plan.config,
            "command": plan.command,
            "versions": versions(),
            "source": source(),
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


def _precision(plan: Plan) -> dict[str, str]:
    """What the plan's Trainer computes with."""
    trainer = make_trainer(plan, plan.algorithm, [], logger=False)
    return precision_of(trainer, plan.matmul_precision)


def _gpus() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


@dataclass
class _Contender:
    name: str
    baseline: str
    round: Callable[[], float]
    flops: Callable[[], float | None] = lambda: None  # of a round, once there was one


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
    flops = {c.name: c.flops() for c in contenders}
    return [
        Timing(
            c.name,
            c.baseline,
            seconds[c.name],
            [mine / base for mine, base in zip(seconds[c.name], seconds[c.baseline], strict=True)],
            _over(flops[c.name], flops[c.baseline]),
        )
        for c in contenders
    ]


def _over(mine: float | None, base: float | None) -> float | None:
    return mine / base if mine and base else None


@dataclass
class _Loop:
    """What a plain loop over an algorithm's updates needs, on the device and in the precision of the plan's Trainer."""

    task: Any
    algorithm: Algorithm
    optimizers: dict[str, Optimizer]
    strategy: LocalStrategy

    @property
    def device(self) -> torch.device:
        return self.strategy.root_device

    def step(self, batch: Batch) -> None:
        """One batch, already fed."""
        updates = self.algorithm.updates(batch)
        while True:
            with self.strategy.precision_plugin.train_step_context():
                update = next(updates, None)
            if update is None:
                return
            self.optimizers[update.unit].step(self.closure(update))  # type: ignore[arg-type]
            self.optimizers[update.unit].zero_grad()

    def closure(self, update: Update) -> Closure:
        """Works out the gradients of an update for its optimizer."""
        return Closure(update, self.optimizers[update.unit], self.strategy.precision_plugin.train_step_context)


def _prepare(plan: Plan) -> _Loop:
    task = attached_task(plan)
    check_last_batch(plan, task)
    strategy = cast(LocalStrategy, make_trainer(plan, plan.algorithm, [], logger=False).strategy)
    strategy.precision_plugin.convert_module(task).to(strategy.root_device).train()
    strategy.execution.check(task.net, task.info().example.inputs)
    strategy.execution.prepare(plan.algorithm, task.net)
    return _Loop(task, plan.algorithm, make_optimizers(plan.algorithm, plan.optimizer), strategy)


def _loader(plan: Plan) -> Any:
    """The training data's loader."""
    plan.data.prepare_data()
    plan.data.setup("fit")
    return plan.data.train_dataloader()


def _batches(plan: Plan, loop: _Loop, count: int) -> list[Batch]:
    """The first batches, each fed once: what a graph's rule keeps is looked up by the very tensors."""
    fed: dict[int, Batch] = {}
    given = list(itertools.islice(_endless(_loader(plan)), count))
    return [fed.setdefault(id(raw), loop.strategy.feed(loop.task.to_batch(raw))) for raw in given]


def _endless(loader: Any) -> Iterator[Batch]:
    while True:
        yield from loader


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
        loop = _prepare(plan)
        batches = _batches(plan, loop, min(steps, 16))
        stages: list[frozenset[str] | None] = [None]
        if plan.schedule.sequential:
            stages = [frozenset(stage) for stage in plan.schedule.stages(plan.algorithm)]

        counted: list[float | None] = []

        def one_round(
            loop: _Loop = loop,
            batches: list[Batch] = batches,
            stages: list[frozenset[str] | None] = stages,
            counted: list[float | None] = counted,
        ) -> float:
            warming_up = not counted
            start = _now(loop.device)
            for stage in stages:  # of a sequential schedule so many steps each, what it keeps of frozen blocks included
                loop.algorithm.train_only(stage)
                for number in range(steps):
                    if warming_up and number == steps - 1:  # by then a rule has kept what it keeps
                        counted.append(_counted_step(loop, batches[number % len(batches)]))
                    else:
                        loop.step(batches[number % len(batches)])
            return _now(loop.device) - start

        def flops(counted: list[float | None] = counted) -> float | None:
            known = [count for count in counted if count is not None]
            return sum(known) if len(known) == len(counted) else None

        contenders.append(_Contender(name, "backprop", one_round, flops))
    return contenders


def _counted_step(loop: _Loop, batch: Batch) -> float | None:
    """Operations of one step, which is done; ``None`` where some of it cannot be counted."""
    with counting() as counter:
        loop.step(batch)
    return None if counter.uncounted else counter.total


# Batches of a new Trainer that are not counted: in the first an optimizer makes its state, and memory is touched that the
# plain loop, which is the same from round to round, has touched before.
_WARM = 3


class _EpochClock(pl.Callback):
    """Seconds of an epoch's batches inside a Trainer, less those of the first few."""

    seconds = 0.0

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == _WARM:
            self._start = _now(trainer.strategy.root_device)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = _now(trainer.strategy.root_device) - self._start


def _strategy(algorithms: Sequence[str], make: Make, steps: int) -> list[_Contender]:
    contenders = []
    for name in algorithms:
        plan = make(name)
        loop, loader = _prepare(plan), _loader(plan)

        def plain(loop: _Loop = loop, loader: Any = loader) -> float:
            start = _now(loop.device)
            for batch in itertools.islice(loader, steps):
                loop.step(loop.strategy.feed(loop.task.to_batch(batch)))
            return _now(loop.device) - start

        def trained(name: str = name, loader: Any = loader) -> float:
            plan = make(name)
            task = attached_task(plan)
            clock = _EpochClock()
            plan.scheduler = None  # the plain loop has none either
            once = {"max_epochs": 1, "limit_train_batches": _WARM + steps, "limit_val_batches": 0, "logger": False}
            trainer = make_trainer(plan, plan.algorithm, [clock], **once)
            with quiet(), stoppable():
                trainer.fit(task, train_dataloaders=loader)
            return clock.seconds

        contenders += [
            _Contender(f"{name}, plain loop", f"{name}, plain loop", plain),
            _Contender(f"{name}, Trainer with LocalStrategy", f"{name}, plain loop", trained),
        ]
    return contenders


def _timing_table(what: str, timings: Sequence[Timing], steps: int) -> _Sheet:
    columns = ["contender", "ms per batch (median)", "ratio (median)", "ratio (min to max)"]
    rows = [
        [
            t.name,
            f"{1000 * statistics.median(t.seconds) / steps:.3f}",
            f"{statistics.median(t.ratios):.3f}",
            f"{min(t.ratios):.3f} to {max(t.ratios):.3f}",
        ]
        for t in timings
    ]
    if what == "step":
        columns += ["ratio of FLOPs", "time over FLOPs"]
        for row, t in zip(rows, timings, strict=True):
            row += ["-" if value is None else f"{value:.3f}" for value in (t.flops, t.quotient)]
    return _Sheet(f"bench {what}: {len(timings[0].seconds)} alternated rounds of {steps} batches", columns, rows)


def _data(algorithms: Sequence[str], make: Make, rounds: int) -> tuple[_Sheet, dict[str, Any]]:
    """Share of an epoch that passes while the loop waits for its next batch."""
    lines = []
    rows = []
    for name in algorithms:
        plan = make(name)
        loop, loader = _prepare(plan), _loader(plan)
        epochs, shares = [], []
        for number in range(rounds + 1):
            waited, start = 0.0, _now(loop.device)
            batches, before = iter(loader), start
            for batch in batches:
                fed = loop.strategy.feed(loop.task.to_batch(batch))
                waited += _now(loop.device) - before
                loop.step(fed)
                before = _now(loop.device)
            taken = _now(loop.device) - start
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
    """Peak activation bytes of one update: of the network as it is, or of equal blocks by depth where it is made of such."""
    plan = make(algorithms[0])
    hidden = plan.config["net"].get("hidden")
    # a network with a hidden layer or two behind something else (VGG) is none of equal blocks
    if hidden and len(plan.make_net()) == len(hidden):
        return _memory_by_depth(algorithms, make, depths, list(hidden)[-1])
    return _memory_of_network(algorithms, make, plan.names["net"])


def _cost(plan: Plan) -> UpdateCost:
    """Of one update on the first batch."""
    loop = _prepare(plan)
    [batch] = _batches(plan, loop, 1)
    with loop.strategy.precision_plugin.train_step_context():
        return measure_update(plan.algorithm, batch, plan.schedule.sequential)


def _over_inference(plan: Plan) -> float:
    """Peak bytes of a training step over those of inference, weights and whatever the rule adds counted in both."""
    loop = _prepare(plan)
    [batch] = _batches(plan, loop, 1)
    rule = loop.algorithm
    state = [*rule.parameters(), *rule.buffers()]
    known = [*state, *(t for t in torch.utils._pytree.tree_leaves(tuple(batch)) if isinstance(t, torch.Tensor))]

    def infer() -> None:
        with torch.no_grad():
            rule.predict(batch.inputs, *batch.context)

    def step() -> None:
        for update in rule.updates(batch):
            update.backward()
            loop.optimizers[update.unit].step()
            loop.optimizers[update.unit].zero_grad()

    with loop.strategy.precision_plugin.train_step_context():
        trained = working_bytes(step, known)
        rule.eval()
        inferred = working_bytes(infer, known)
    held = bytes_of(state)
    return (held + trained) / (held + inferred)


def _memory_of_network(algorithms: Sequence[str], make: Make, net: str) -> tuple[_Sheet, dict[str, Any]]:
    base = "backprop" if "backprop" in algorithms else algorithms[0]
    costs = {name: _cost(make(name)) for name in [base, *(name for name in algorithms if name != base)]}
    lines = []
    rows = []
    for name in algorithms:
        cost = costs[name]
        bytes_ratio = cost.activation_peak_bytes / costs[base].activation_peak_bytes
        flops_ratio = _over(cost.flops, costs[base].flops)
        figures = {"activation_peak_bytes": [cost.activation_peak_bytes], "ratio": bytes_ratio, "flops": cost.flops}
        whole = _over_inference(make(name))
        rows.append({"name": name, **figures, "flops_ratio": flops_ratio, "over_inference": whole})
        lines.append(
            [
                name,
                f"{cost.activation_peak_bytes:,}",
                f"{bytes_ratio:.3f}",
                "-" if flops_ratio is None else f"{flops_ratio:.3f}",
                f"{whole:.3f}",
            ]
        )
    samples = costs[base].samples
    columns = ["algorithm", "peak bytes", f"over {base}", f"FLOPs over {base}", "all over inference"]
    title = f"bench memory: peak bytes kept alive for gradients in one update of {net} on {samples} samples"
    return _Sheet(title, columns, lines), {"net": net, "samples": samples, "baseline": base, "contenders": rows}


def _memory_by_depth(
    algorithms: Sequence[str], make: Make, depths: Sequence[int], width: int
) -> tuple[_Sheet, dict[str, Any]]:
    if not depths or any(type(depth) is not int or depth < 1 for depth in depths):
        raise ValueError(f"bench.depths is {list(depths)}, expected whole numbers of blocks of at least 1")
    lines = []
    rows = []
    for name in algorithms:
        peaks = [_cost(make(name, f"net.hidden={[width] * depth}")).activation_peak_bytes for depth in depths]
        ratio = peaks[-1] / peaks[0]
        rows.append({"name": name, "activation_peak_bytes": peaks, "ratio": ratio})
        lines.append([name, *(f"{peak:,}" for peak in peaks), f"{ratio:.2f}"])
    columns = ["algorithm", *(f"{depth} blocks" for depth in depths), f"{depths[-1]} over {depths[0]}"]
    sheet = _Sheet("bench memory: peak bytes kept alive for gradients in one update", columns, lines)
    return sheet, {"depths": list(depths), "contenders": rows}


def _estimates(
    algorithms: Sequence[str], make: Make, counts: Sequence[int], draws: int
) -> tuple[_Sheet, dict[str, Any]]:
    """Relative squared error of estimated gradients on the first batch, before anything is learned."""
    if not counts or any(type(count) is not int or count < 1 for count in counts):
        raise ValueError(f"bench.counts is {list(counts)}, expected whole numbers of directions of at least 1")
    found = []
    for name in algorithms:
        setting = make(name).algorithm.estimates_along
        if setting is None:
            raise ValueError(
                f"{name} does not estimate a gradient along random directions: bench.what=estimates takes forward_gradient and "
                "its kin in bench.algorithms"
            )
        for count in counts:
            loop = _prepare(plan := make(name, f"algorithm.{setting}={count}"))
            [batch] = _batches(plan, loop, 1)
            with loop.strategy.precision_plugin.train_step_context():
                found.append(measure_estimates(name, loop.algorithm, loop.task.info(), batch, count, draws))
    lines = [
        [
            *(one.name, str(one.count), f"{one.error:.4g}"),
            "-" if one.standard_error is None else f"{one.standard_error:.2g}",
            "-" if one.theory is None else f"{one.theory:.4g}",
            f"{statistics.fmean(one.cosines):.4f}",
        ]
        for one in found
    ]
    title = f"bench estimates: error of the estimated gradient, {found[0].size:,} entries, {draws} estimates each"
    columns = ["algorithm", "directions", "relative squared error", "standard error", "theory", "cosine"]
    return _Sheet(title, columns, lines), {"estimates": [one.to_dict() for one in found]}
