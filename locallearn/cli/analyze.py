"""``locallearn analyze``: what finished runs represent, as a table and as files that the report shows."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from locallearn.cli.saved import asked_of, load
from locallearn.cli.settings import UsageError
from locallearn.cli.terminal import printing


def analyze(words: list[str]) -> int:
    """Say what finished runs represent: sparsity, ensembles, likeness of their layers."""
    runs, cfg, given = asked_of("analyze", words)
    if not runs:
        raise UsageError("analyze takes one run or several: locallearn analyze RUN... [analyze.part=validation]")
    asked = cfg.analyze
    _check(asked)
    saved = {}
    for run in runs:  # a mistake in any of them is told before anything is worked out
        one = load(run, **given)
        if one.record.id in saved:
            raise UsageError(f"{run} is named twice, or its record has the id of another one: {one.record.id}")
        _check_run(one)
        saved[one.record.id] = one
    samples = {name: _samples(one, asked.part) for name, one in saved.items()}
    written = []
    for name, one in saved.items():
        found = _analysed(one, samples[name], asked)
        _print(one.record, found, asked)
        written.append(_write(one.record.path, f"{one.record.path.name}.json", {"run": name, **found}))
    for group in _alike(samples):
        members = {name: saved[name] for name in group}
        found = _compared(members, samples, asked)
        _print_likeness(members, found)
        written.append(_write(saved[group[0]].record.path, f"similarity-{_digest(group)}.json", found))
    for path in dict.fromkeys(written):
        print(path)
    return 0


def _check(asked: Any) -> None:
    """Everything that can be known before a run is loaded."""
    if asked.part not in ("test", "validation"):
        raise UsageError(f"analyze.part is {asked.part}, expected test or validation")
    if type(asked.tau) not in (int, float) or not 0 <= asked.tau < float("inf"):
        raise UsageError(f"analyze.tau is {asked.tau}, expected a number of at least 0")
    if type(asked.only_right) is not bool:
        raise UsageError(f"analyze.only_right is {asked.only_right}, expected true or false")
    for key, least, most in (("per_class", 2, 500), ("units", 2, 2000)):
        if type(asked[key]) is not int or not least <= asked[key] <= most:
            raise UsageError(f"analyze.{key} is {asked[key]}, expected a whole number from {least} to {most}")


def _check_run(one: Any) -> None:
    """Refuse a run without samples that have classes."""
    info = one.task.info()
    if info.example.context:
        raise UsageError(
            f"{one.record.path} was trained on a graph, whose nodes' representations depend on each other: analyze takes runs "
            "on samples that go through the network alone"
        )
    if not info.classes:
        raise UsageError(
            f"{one.record.path} was trained for {one.record.text('task') or 'a task'}, which has no classes: analyze sorts "
            "representations by class"
        )


def _samples(one: Any, part: str) -> Any:
    """All samples of a part of the run's data, as one batch in the run's precision, on its device."""
    import torch

    from locallearn.batch import Batch

    one.data.prepare_data()
    one.data.setup("test" if part == "test" else "validate")
    loader = one.data.test_dataloader() if part == "test" else one.data.val_dataloader()
    batches = [one.task.to_batch(raw) for raw in loader]
    if getattr(one.data, "exclude", ()):
        batches += list(one.data.excluded_dataloader(part))
    if not batches:
        raise UsageError(f"{one.record.path}: its data have no {part} part")
    inputs, targets = (torch.cat(parts) for parts in zip(*[(b.inputs, b.targets) for b in batches], strict=True))
    plugin, device = one.trainer.precision_plugin, one.task.device
    inputs = plugin.convert_input(inputs.to(device))
    return Batch(inputs, targets.to(device))


def _analysed(one: Any, samples: Any, asked: Any) -> dict[str, Any]:
    from locallearn.analysis import analyse
    from locallearn.precision import multiplying

    with multiplying(one.plan.matmul_precision), one.trainer.precision_plugin.val_step_context():
        try:
            found = analyse(
                one.algorithm,
                [samples],
                one.task.info().outputs,
                tau=float(asked.tau),
                only_right=asked.only_right,
                unseen=getattr(one.data, "exclude", ()),
                per_class=asked.per_class,
                units=asked.units,
            )
        except ValueError as error:
            raise ValueError(f"{one.record.path}: {error}") from error
    return {"part": asked.part, **found}


def _alike(samples: dict[str, Any]) -> list[list[str]]:
    """Runs that were asked about the same samples, in groups; each of them is compared within itself, at least."""
    import torch

    groups: list[list[str]] = []
    for name, batch in samples.items():
        for group in groups:
            if torch.equal(samples[group[0]].targets.cpu(), batch.targets.cpu()):
                group.append(name)
                break
        else:
            groups.append([name])
    if len(groups) > 1:
        print(
            "locallearn: the runs have different data, or different parts of them: layers are compared among runs on the same "
            "samples only",
            file=sys.stderr,
        )
    return groups


def _compared(group: dict[str, Any], samples: dict[str, Any], asked: Any) -> dict[str, Any]:
    from locallearn.analysis import similarity
    from locallearn.precision import multiplying

    first = next(iter(group.values()))
    with multiplying(first.plan.matmul_precision), first.trainer.precision_plugin.val_step_context():
        found = similarity(
            {name: (one.algorithm, [samples[name]]) for name, one in group.items()},
            first.task.info().outputs,
            only_right=asked.only_right,
            per_class=asked.per_class,
        )
    return {"part": asked.part, **found}


def _write(run: Path, name: str, found: dict[str, Any]) -> Path:
    """Beside the run's folder, which stays as it is: an analysis can be made again."""
    from locallearn import __version__
    from locallearn.records import ANALYSIS, write_file

    folder = run.parent / ANALYSIS
    folder.mkdir(exist_ok=True)
    made = {"format": 1, "made": datetime.now(UTC).isoformat(timespec="seconds"), "version": __version__, **found}
    write_file(folder / name, json.dumps(made, allow_nan=False, separators=(",", ":")).encode())
    return folder / name


def _digest(names: Sequence[str]) -> str:
    import hashlib

    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:10]


def _print(record: Any, found: dict[str, Any], asked: Any) -> None:
    from rich.table import Table

    which = "rightly classified samples" if found["only_right"] else "all samples"
    table = Table(
        title=f"{_name(record)}: {asked.part} accuracy {found['accuracy']:.4f}; {which}, tau {found['tau']:g}",
        title_justify="left",
    )
    first, *others = found["passes"]
    for heading in (
        "layer",
        "units",
        "sparsity",
        *(f"{label} label" for label in others),
        "silent",
        "never active",
        "ensembles",
    ):
        table.add_column(heading, justify="left" if heading == "layer" else "right", overflow="fold")
    for i, layer in enumerate(found["passes"][first]["layers"]):
        sizes = layer["sizes"]
        table.add_row(
            layer["name"],
            f"{layer['units']:,}",
            _said(layer["hoyer"]),
            *(_said(found["passes"][label]["layers"][i]["hoyer"]) for label in others),
            f"{layer['undefined']:,}",
            f"{100 * layer['never_active']:.1f} %",
            f"{min(sizes)}-{max(sizes)}",
        )
    console = printing()
    console.print(table)
    blind = found["passes"][others[-1] if others else first]["layers"]  # the class is not told
    if found["unseen"]:
        which = ", ".join(map(str, found["unseen"]))
        shares = ", ".join(f"{layer['name']} {_said(layer.get('probe_unseen'))}" for layer in blind)
        console.print(
            f"never trained: class {which}; share of its samples that a linear probe finds: {shares}", highlight=False
        )


def _print_likeness(group: dict[str, Any], found: dict[str, Any]) -> None:
    """Of every run with the first one, layer by layer; the whole matrix is for the report."""
    from rich.table import Table

    if len(group) < 2:
        return
    places: dict[str, list[int]] = {}
    for i, (run, _) in enumerate(found["rows"]):
        places.setdefault(run, []).append(i)
    first, *others = places.values()
    table = Table(
        title=f"CKA with the same layer of {_name(next(iter(group.values())).record)}, {found['samples']:,} samples",
        title_justify="left",
    )
    table.add_column("run", overflow="fold")
    for i in range(len(first)):
        table.add_column(str(i + 1), justify="right")
    for run, other in zip(list(places)[1:], others, strict=True):
        shared = [_said(found["cka"][a][b]) for a, b in zip(first, other, strict=False)]
        table.add_row(_name(group[run].record), *shared, *[""] * (len(first) - len(shared)))
    printing().print(table)


def _name(record: Any) -> str:
    variant = record.text("variant")
    return f"{record.algorithm}{f' ({variant})' if variant else ''} on {record.dataset}, seed {record.seed}"


def _said(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
