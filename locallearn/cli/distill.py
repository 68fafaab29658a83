"""``locallearn distill``: a finished run's layers replaced by smaller ones in closed form, to every depth, as one table."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from locallearn.cli.saved import Saved, asked_of, load
from locallearn.cli.settings import UsageError
from locallearn.cli.terminal import printing

FOLDER = "distilled"
"""Beside the runs' folders, with a folder per run in it."""


def distill(words: list[str]) -> int:
    """Replace a finished run's layers by random features or fewer directions, and say what is lost and gained."""
    runs, cfg, given = asked_of("distill", words)
    if len(runs) != 1:
        raise UsageError(
            f"distill takes one run, and got {len(runs)}: locallearn distill RUN [distill.sizes=[0.25,0.5]]"
        )
    asked = cfg.distill
    recipes = _check(asked)
    saved = load(runs[0], **given)
    if saved.task.info().example.context:
        raise UsageError(
            f"{saved.record.path} was trained on a graph, whose rows depend on each other: distill takes runs on samples that "
            "go through the network alone"
        )
    folder = _place(asked.out, saved.record.path)
    students, found = _distilled(saved, asked, recipes)
    _print(saved, asked, students, found)
    for path in _write(folder, saved, asked, students, found):
        print(path)
    return 0


def _check(asked: Any) -> list[Any]:
    """Everything that can be known before the run is loaded; the recipes."""
    from locallearn.distillation import METHODS, Recipe, check_distillation
    from locallearn.nets.random_features import KINDS

    for key, choices in (
        ("count", ("all", "learned")),
        ("order", ("first", "last")),
        ("inputs", ("teacher", "student")),
        ("kind", KINDS),
        ("draws", ("isotropic", "teacher")),
        ("keep", (None, "best", "all")),
    ):
        if asked[key] not in choices:
            known = " or ".join("null" if choice is None else choice for choice in choices)
            raise UsageError(f"distill.{key} is {asked[key]}, expected {known}")
    for key in ("degree", "samples", "positions", "batch", "rounds", "steps"):
        least = 2 if key == "samples" else 1
        if type(asked[key]) is not int or asked[key] < least:
            raise UsageError(f"distill.{key} is {asked[key]}, expected a whole number of at least {least}")
    if type(asked.seed) is not int or asked.seed < 0:
        raise UsageError(f"distill.seed is {asked.seed}, expected a whole number of at least 0")
    if type(asked.orthogonal) is not bool:
        raise UsageError(f"distill.orthogonal is {asked.orthogonal}, expected true or false")
    lists: dict[str, list[Any]] = {}
    for key in ("methods", "sizes", "penalties", "depths", "layers"):
        value = asked[key]
        if value is None and key in ("depths", "layers"):
            continue
        if isinstance(value, str) or not isinstance(value, Sequence) or not value or len(set(value)) < len(value):
            raise UsageError(f"distill.{key} is {value}, expected a list of different entries")
        lists[key] = list(value)
    for key in ("sizes", "penalties"):
        if any(type(number) not in (int, float) for number in lists[key]):
            raise UsageError(f"distill.{key} is {lists[key]}, expected numbers")
    if any(type(depth) is not int or depth < 1 for depth in lists.get("depths", [])):
        raise UsageError(f"distill.depths is {lists['depths']}, expected whole numbers of at least 1")
    unknown = [name for name in lists["methods"] if name not in METHODS]
    if unknown:
        raise UsageError(f"distill.methods names {unknown[0]}, expected some of {', '.join(METHODS)}")
    wrong = [size for size in lists["sizes"] if not 0 < size < 1]
    if wrong:
        raise UsageError(
            f"distill.sizes has {wrong[0]}, expected shares of a layer's own numbers, above 0 and below 1: 0.25 for a quarter"
        )
    check_distillation(asked.inputs, lists["penalties"], asked.positions)
    own = {key: asked[key] for key in ("kind", "degree", "orthogonal", "draws", "seed")}
    learned = asked.count == "learned"
    return [Recipe(method, float(size), learned, **own) for size in lists["sizes"] for method in lists["methods"]]


def _place(out: Any, run: Path) -> Path:
    """The folder that is written to, which may be there already."""
    folder = run.parent / FOLDER / run.name if out is None else Path(str(out)).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"distill.out is {folder}, which is no folder: name one, it need not be there yet")
    if (folder / "record.json").exists():
        raise UsageError(f"distill.out is {folder}, the folder of a run, which is never changed: name another one")
    kept = sorted(path.name for path in folder.glob("student-*.pt"))
    if kept:
        raise UsageError(
            f"{folder} holds {kept[0]}, which was kept with another table, whose rows it is named by: name a new folder with "
            "distill.out=FOLDER, or move it away"
        )
    return folder


def _distilled(saved: Saved, asked: Any, recipes: Sequence[Any]) -> tuple[list[Any], Any]:
    import torch

    from locallearn.cli.predict import evaluate
    from locallearn.precision import multiplying
    from locallearn.study._callbacks import _first
    from locallearn.study.distill import choose_sites, judge, make_students, measure

    plugin, task, net = saved.trainer.precision_plugin, saved.task, saved.net
    saved.data.prepare_data()
    saved.data.setup("fit")

    def inputs(loader: Any, count: int) -> Any:
        batch = _first(map(task.to_batch, loader), count)
        return plugin.convert_input(batch.inputs[:count].to(task.device))

    with torch.random.fork_rng(devices=[]):
        samples = inputs(saved.data.train_dataloader(), asked.samples)
    # even parts of at most 250, and at least five: every fifth judges the penalties
    batches = samples.tensor_split(min(len(samples), max(5, math.ceil(len(samples) / 250))))
    timed = inputs(saved.data.val_dataloader(), asked.batch)

    def predict(x: Any) -> Any:
        with torch.no_grad(), plugin.val_step_context():
            return task.infer(x)

    with multiplying(saved.plan.matmul_precision):
        try:
            sites, left = choose_sites(net, predict, samples[:2], recipes, asked.layers)
        except ValueError as error:
            raise ValueError(f"{saved.record.path}: {error}") from error
        deepest = max(asked.depths or [1])
        if deepest > len(sites):
            raise UsageError(f"distill.depths has {deepest}, and {len(sites)} layers can be replaced")
        students = make_students(
            net,
            predict,
            batches,
            sites,
            recipes,
            order=asked.order,
            depths=asked.depths,
            inputs=asked.inputs,
            penalties=asked.penalties,
            positions=asked.positions,
        )
        measure(net, predict, students, timed, asked.rounds, asked.steps)
    judge(net, students, lambda part: evaluate(saved, part)[0])
    return students, {"sites": sites, "left": left, "samples": len(samples), "batch": len(timed)}


def _lost(saved: Saved, students: Sequence[Any], student: Any, part: str = "test") -> float:
    """By how much the metric is worse than the teacher's."""
    metric = saved.record.metric
    difference = float(students[0].figures[part][metric.name] - student.figures[part][metric.name])
    return difference if metric.maximise else -difference


def _print(saved: Saved, asked: Any, students: Sequence[Any], found: Any) -> None:
    from rich.table import Table

    metric, teacher = saved.record.metric.name, students[0]
    table = Table(
        title=f"{saved.record.algorithm} on {saved.record.dataset}: {asked.order} layers replaced, solved from the "
        f"{asked.inputs}'s inputs; {found['samples']:,} calibration samples, inference of {found['batch']:,}",
        title_justify="left",
    )
    for number, heading in enumerate(
        (
            "#",
            "method",
            "size",
            "layers",
            "validation",
            "test",
            "lost",
            "params",
            "learned",
            "bytes",
            "FLOPs",
            "ms",
            "time",
        )
    ):
        table.add_column(heading, justify="left" if number == 1 else "right")
    for number, student in enumerate(students):
        costs, base = student.costs, teacher.costs
        flops = None if None in (costs["flops"], base["flops"]) else costs["flops"] / base["flops"]
        table.add_row(
            str(number),
            "teacher" if student.recipe is None else student.recipe.method,
            "" if student.recipe is None else f"{student.recipe.share:g}",
            str(student.depth),
            f"{student.figures['validation'][metric]:.4f}",
            f"{student.figures['test'][metric]:.4f}",
            f"{_lost(saved, students, student):.4f}",
            f"{costs['params']:,}",
            f"{costs['learned']:,}",
            f"{costs['bytes']:,}",
            "-" if flops is None else f"{flops:.3f}",
            f"{1000 * costs['latency_s']:.2f}",
            f"{costs['latency_ratio']:.3f}",
        )
    console = printing()
    console.print(table)
    order = ", ".join(
        f"{site.name}{f' with its {site.activation}' if site.activation else ''}" for site in found["sites"]
    )
    console.print(f"layers in the order of inference: {order}", highlight=False)
    for name, why in found["left"].items():
        console.print(f"not replaced: {name}: {why}", highlight=False)
    unsure = {name for student in students for name, fit in student.fits.items() if not fit.cholesky}
    if unsure:
        console.print(
            f"features that depend on each other linearly, solution of least norm: {', '.join(sorted(unsure))}",
            highlight=False,
        )


def _kept(saved: Saved, asked: Any, students: Sequence[Any]) -> list[int]:
    """Rows of the students that are written: all, or the best on validation among those with the most layers replaced."""
    if asked.keep is None:
        return []
    rows = range(1, len(students))
    if asked.keep == "all":
        return list(rows)
    deepest = max(student.depth for student in students)
    own = [row for row in rows if students[row].depth == deepest]
    return [min(own, key=lambda row: (_lost(saved, students, students[row], "validation"), row))]


def _write(folder: Path, saved: Saved, asked: Any, students: Sequence[Any], found: Any) -> list[Path]:
    """The table as JSON and CSV, and the students that are kept; a new one takes the place of an older one."""
    import torch
    from omegaconf import OmegaConf

    from locallearn import __version__
    from locallearn.distillation import packed
    from locallearn.records import hardware, write_file

    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"row": number, **student.to_dict(), "lost": _lost(saved, students, student)}
        for number, student in enumerate(students)
    ]
    made = {
        "format": 1,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "run": saved.record.id,
        "metric": saved.record.metric.name,
        "settings": OmegaConf.to_container(asked),
        "samples": found["samples"],
        "batch": found["batch"],
        "threads": torch.get_num_threads(),
        "hardware": hardware([torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]),
        "layers": [{"name": site.name, "behind": list(site.behind)} for site in found["sites"]],
        "left": found["left"],
        "students": rows,
    }
    content = {
        "table.json": json.dumps(_finite(made), indent=1, allow_nan=False).encode(),
        "table.csv": _csv(rows).encode(),
    }
    for row in _kept(saved, asked, students):
        student, file = students[row], io.BytesIO()
        torch.save(packed(student.recipe, student.layers, student.fits), file)
        content[f"student-{row}.pt"] = file.getvalue()
    for name, data in content.items():
        write_file(folder / name, data)
    return [folder / name for name in content]


def _finite(value: Any) -> Any:
    """``null`` in place of what is no number, as a student that diverges may give: JSON has no word for it."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    """One line per student, figures of a part as ``part_figure``."""
    flat = []
    for row in rows:
        recipe = row["recipe"] or {}
        line = {"row": row["row"], "method": recipe.get("method", "teacher"), "size": recipe.get("share", "")}
        line |= {"depth": row["depth"], "layers": " ".join(row["layers"])}
        for key, value in row.items():
            if key in ("validation", "test"):
                line |= {f"{key}_{name}": figure for name, figure in value.items()}
            elif key not in ("row", "recipe", "depth", "layers"):
                line[key] = "" if value is None else value
        flat.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()
