"""The commands: each composes its settings, hands plans to the library, and prints what came of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from locallearn.cli.analyze import analyze
from locallearn.cli.mistakes import explain
from locallearn.cli.plans import check_seed, command_line, folder_setting, make_plan
from locallearn.cli.saved import (
    evaluate,
    load,
    move,
    read_inputs,
    recovered,
    reindexed,
    run_folder,
    saved_settings,
    table,
)
from locallearn.cli.settings import GROUPS, Arm, UsageError, check_words, compose_settings
from locallearn.cli.spaces import quoted, read_space
from locallearn.cli.terminal import Progress, printing


def train(words: list[str]) -> int:
    """Train one algorithm once; with ``-m`` once per combination."""
    if "-m" in words or "--multirun" in words:
        return _sweep([word for word in words if word not in ("-m", "--multirun")])
    trust = "--trust" in words
    settings = [word for word in words if word != "--trust"]
    resumed = _resumed(settings, trust)
    if resumed is None and trust:
        raise UsageError("--trust is for the settings of a record, with resume=FOLDER: take it out")
    cfg, choices = resumed or compose_settings(settings)
    return _train_once(cfg, choices, words)


def _resumed(words: list[str], trust: bool) -> tuple[Any, dict[str, str]] | None:
    """Configuration of the run to go on with: its own, so that nothing has to be said twice."""
    from omegaconf import OmegaConf

    from locallearn.records import load_record

    named = [word.partition("=")[2] for word in words if word.startswith("resume=")]
    if not named or named[-1] in ("", "null"):
        return None
    folder = run_folder(named[-1])
    record = load_record(folder)
    if record.status not in ("interrupted", "failed"):
        raise UsageError(f"{folder} is {record.status}: only an interrupted or failed run can be resumed")
    cfg, choices = saved_settings(record, trust)
    allowed = (
        "resume=",
        "runs_dir=",
        "data_dir=",
        "trainer.max_epochs=",
        "trainer.accelerator=",
        "trainer.checkpoint_s=",
    )
    for word in words:
        if not word.startswith(allowed):
            raise UsageError(
                f"{word!r} cannot be changed on resume: the run goes on with its own settings; only "
                f"{', '.join(a.rstrip('=') for a in allowed)} can be given"
            )
        key = word.partition("=")[0]
        if key in ("data_dir", "runs_dir"):
            move(cfg, key, OmegaConf.from_dotlist([word])[key])
        else:
            cfg.merge_with_dotlist([word])
    cfg.resume = str(folder)  # a killed run has got another name
    return cfg, choices


def _train_once(cfg: Any, choices: dict[str, str], words: Sequence[str]) -> int:
    from rich.console import Console

    from locallearn.records import load_record
    from locallearn.study.train import run

    plan = make_plan(cfg, choices, command_line("train", words))
    with Progress() as show:
        plan.progress = partial(show, f"{choices['algorithm']} seed {cfg.seed}")
        folder = run(plan)
    record = load_record(folder)
    metric = record.data["metric"]["name"]
    Console(stderr=True).print(
        f"{choices['algorithm']} on {choices['dataset']}: test {metric} {record.data['test'][metric]:.4f}, "
        f"{record.data['cost']['train_s']:.1f} s of training"
    )
    print(folder)
    return 0


def _sweep(words: list[str]) -> int:
    """``train -m``: Hydra's own sweeper and launcher call one run per combination."""
    import tempfile

    import hydra
    from omegaconf import OmegaConf

    from locallearn.study.train import Interrupted

    check_words(words)
    codes: list[int] = []

    @hydra.main(config_path="pkg://locallearn.conf", config_name="config", version_base="1.3")
    def job(cfg: Any) -> None:
        from hydra.core.hydra_config import HydraConfig

        runtime = HydraConfig.get()
        choices = {group: str(name) for group, name in runtime.runtime.choices.items() if group in GROUPS}
        cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
        try:
            codes.append(_train_once(cfg, choices, list(runtime.overrides.task)))
        except Interrupted as error:
            raise KeyboardInterrupt from error  # anything less Hydra keeps to itself until the sweep is over
        except Exception as error:  # one bad combination must not end the sweep
            code, sentence = explain(error, runtime.overrides.task)
            print(f"locallearn: {sentence}", file=sys.stderr)
            codes.append(code)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them
    with tempfile.TemporaryDirectory() as aside:  # for a file that the sweeper leaves where it runs
        sys.argv = ["locallearn", "--multirun", f"hydra.sweep.dir={aside}", *words]
        try:
            job()
        except KeyboardInterrupt as stop:
            raise stop.__cause__ or stop from None
    return max(codes, default=0)


def compare(words: list[str]) -> int:
    """Train several algorithms with several seeds, print a table, write a report."""
    from omegaconf import OmegaConf

    from locallearn.records import load_record
    from locallearn.report import check_place, terminal_table, write_report
    from locallearn.study.compare import compare as run_all
    from locallearn.study.train import Interrupted, check

    for word in words:
        if word.startswith("seed="):
            raise UsageError(f"compare runs the seeds of compare.seeds, so {word} has no place here: take it out")
    base, _, arms, shared = arms_of("compare", words)
    seeds, overrides = base.compare.seeds, base.compare.overrides or {}
    _check_compare(arms, seeds, overrides, base.compare.resume)
    if base.resume is not None:
        raise UsageError(
            "resume goes with train: locallearn train resume=FOLDER; to go on with a comparison: compare.resume=true"
        )
    runs_dir = folder_setting(base, "runs_dir")
    report = Path(str(base.compare.report or runs_dir / "report.html")).expanduser()
    recovered(runs_dir)
    earlier = _earlier(runs_dir) if base.compare.resume else {}
    plans, done = [], []
    first: dict[str, Any] = {}
    for seed in seeds:  # A B A B: heat and neighbours weigh on all algorithms alike
        for arm in arms:
            own = list(overrides.get(arm.text, []))
            matched = ["schedule.patience=null"] if base.compare.mode == "matched" else []
            cfg, choices = compose_settings([*shared, *arm.overrides, f"seed={seed}", *matched, *own])
            if earlier:
                before = earlier.get(_signature(OmegaConf.to_container(cfg, resolve=True), choices["algorithm"]))
                if before is not None and before.status == "done":
                    done.append(before)
                    continue
                cfg.resume = None if before is None else str(before.path)
            make = partial(make_plan, cfg, choices, command_line("compare", words), arm)
            plans.append((f"{arm.text} seed {seed}", make))
            first.setdefault(arm.text, make)
    for make in first.values():
        check(make())  # a mistake in the settings is told before anything is trained
    check_place(report)  # and so is a place that cannot be written to; it makes the folder, so it comes last
    try:
        with Progress() as show:
            folders, problems = run_all(plans, show)
    except Interrupted:
        print("locallearn: interrupted; the same command with compare.resume=true goes on", file=sys.stderr)
        return 130
    records = [*done, *(load_record(folder) for folder in folders)]
    reindexed(runs_dir)
    write_report(records, report, title="locallearn compare")  # before anything is printed, which may fail
    console = printing()
    console.print(terminal_table(records, console.width))
    for problem in problems:
        print(f"locallearn: {problem}", file=sys.stderr)
    print(report)
    return 1 if problems else 0


def _earlier(runs_dir: Path) -> dict[str, Any]:
    """Runs to take over, by their signature: finished ones, else interrupted ones that can be gone on with.

    Made by the same code, for another one might give other figures: the same commit, or the same version where there is
    no checkout.
    """
    from locallearn.records import scan, source, versions
    from locallearn.study.train import CHECKPOINT

    found: dict[str, Any] = {}
    mine, others, dirty = (source()["commit"], versions()["locallearn"]), 0, 0
    for record in scan([runs_dir]).records if runs_dir.is_dir() else ():  # oldest first
        signature = _signature(record.part("config"), record.algorithm)
        known = found.get(signature)
        finished = record.status == "done" and record.part("test")  # a trial of a search has not seen the test set
        waits = record.status == "interrupted" and (record.path / CHECKPOINT).is_file()
        if finished or (waits and (known is None or known.status != "done")):
            if (record.part("source").get("commit"), record.part("versions").get("locallearn")) != mine:
                others += 1
                continue
            dirty += record.part("source").get("dirty") is True
            found[signature] = record
    if others:
        print(f"locallearn: {others} earlier runs were made by other code and are not taken over", file=sys.stderr)
    if dirty:
        print(
            f"locallearn: {dirty} earlier runs were made with uncommitted changes to locallearn, perhaps not the present ones",
            file=sys.stderr,
        )
    return found


def _signature(config: Any, algorithm: str) -> str:
    """What has to be the same for a run to stand for another: all settings but places and those of the commands."""
    import json

    places = ("compare", "tune", "report", "predict", "analyze", "bench", "runs_dir", "resume", "keep_model")
    kept = {k: v for k, v in config.items() if k not in places}
    ends = [config.get("compare", {}).get(key) for key in ("mode", "target")]
    return json.dumps([algorithm, kept, ends], sort_keys=True, default=str)


def tune(words: list[str]) -> int:
    """Search settings on equal budgets, on validation data only."""
    from locallearn.study.space import corners
    from locallearn.study.train import Interrupted, check
    from locallearn.study.tune import study_name
    from locallearn.study.tune import tune as search

    base, chosen, several, shared = arms_of("tune", words)
    arms = {arm.text: arm for arm in several}
    if type(base.tune.trials) is not int or base.tune.trials < 1:
        raise UsageError(f"tune.trials is {base.tune.trials}, expected a whole number of at least 1")
    if base.resume is not None:
        raise UsageError("resume goes with train; an interrupted search goes on when tune is called again")
    runs_dir = folder_setting(base, "runs_dir")
    fixed = [
        word for word in shared if not word.startswith(("tune.trials=", "tune.algorithms=", "runs_dir=", "data_dir="))
    ]

    def compose(algorithm: str, settings: Sequence[str] = ()) -> Any:
        return compose_settings([*shared, *arms[algorithm].overrides, *settings])

    def make(algorithm: str, settings: Sequence[str]) -> Any:
        cfg, choices = compose(algorithm, settings)
        # Trials have a folder of their own: a report on runs_dir must not mix them with what they were searched for.
        cfg.runs_dir = str(runs_dir / "tune")
        return make_plan(cfg, choices, command_line("tune", words), arms[algorithm])

    space = read_space(base.tune.space, [compose(name)[0] for name in arms])
    for name in arms:  # a mistake in the settings, or in what may be drawn, is told before anything is trained
        for place, point in enumerate(corners(space)):
            try:
                check(make(name, point))
            except RuntimeError:  # too large for this machine, say: a trial of the search may fail
                if place == 0:
                    raise
    try:
        with Progress() as show:
            found = search(
                list(arms),
                make,
                space,
                base.tune.trials,
                runs_dir / "tune.sqlite",
                study_name(chosen["dataset"], chosen["net"], fixed),
                show=show,
                say=lambda sentence: print(f"locallearn: {sentence}", file=sys.stderr),
            )
    except Interrupted:
        print("locallearn: interrupted; the same command goes on where the search stopped", file=sys.stderr)
        return 130
    return _recommend(found, arms, shared)


def _recommend(found: Sequence[Any], arms: dict[str, Arm], shared: Sequence[str]) -> int:
    """Print the best settings of every algorithm, as commands that run them; 1 where one has none."""
    from rich.table import Table
    from rich.text import Text

    metric = next((best.metric for best in found if best.metric is not None), "metric")
    table = Table(title=f"best of {found[0].trials} trials each, by validation {metric}", title_justify="left")
    for heading in ("algorithm", "trials", f"validation {metric}", "settings"):
        table.add_column(heading, overflow="fold")
    good = [best for best in found if best.value is not None]
    for best in found:
        value = "none" if best.value is None else f"{best.value:.4f}"
        table.add_row(best.algorithm, str(best.trials), value, Text(" ".join(best.settings)))
    printing().print(table)
    for best in found:
        if best.failures:
            all_or_some = "all" if best.value is None else str(len(best.failures))
            advice = "; nothing can be recommended, search elsewhere" if best.value is None else ""
            print(
                f"locallearn: {all_or_some} of the {best.trials} trials of {best.algorithm} failed or diverged, "
                f"e.g. {best.failures[0]}{advice}",
                file=sys.stderr,
            )
    own = [word for word in shared if not word.startswith(("tune.", "compare.", "report.", "bench."))]
    for best in good:
        print(command_line("train", [*own, *arms[best.algorithm].overrides, *best.settings]))
    if good:
        print(f"to compare them: locallearn compare ...{_overrides(good)}")
    return 0 if len(good) == len(found) else 1


def _overrides(good: Sequence[Any]) -> str:
    """What ``compare`` takes to run the best settings, ready for a shell."""
    import shlex

    named = [best for best in good if "(" not in best.algorithm]  # Hydra's dictionaries take plain words as keys
    kept = ",".join(f"{best.algorithm}:[{','.join(map(quoted, best.settings))}]" for best in named)
    own = [quoted(f"{best.algorithm[:-1]},{','.join(best.settings)})") for best in good if best not in named]
    return (f" {shlex.quote(f'compare.overrides={{{kept}}}')}" if named else "") + (
        f" and in compare.algorithms: {shlex.quote(','.join(own))}" if own else ""
    )


def arms_of(command: str, words: Sequence[str]) -> tuple[Any, dict[str, str], list[Arm], list[str]]:
    """The settings with the choices made in them, the algorithms to compare, and the words that hold for all of those.

    Where none are listed, they are backpropagation and the one that ``algorithm=`` or ``experiment=`` names; settings of
    ``algorithm`` are then that one's own.
    """
    listed = any(word.startswith(f"{command}.algorithms=") for word in words)
    named = [word for word in words if word.startswith("algorithm=")]
    own = [word for word in words if word.startswith("algorithm.")]
    if listed and named:
        raise UsageError(f"{command}.algorithms names the algorithms, so {named[0]} has no place here: take it out")
    base, choices = compose_settings([word for word in words if not (listed and word in own)])  # those are the arms'
    algorithms, shared = base[command].algorithms, list(words)
    if not listed and (named or any(word.startswith("experiment=") for word in words)):
        settings = ",".join(word.removeprefix("algorithm.") for word in own)
        text = f"{choices['algorithm']}({settings})" if own else choices["algorithm"]
        algorithms = list(dict.fromkeys(["backprop", text]))
        shared = [word for word in words if word not in named and word not in own]
    if not _distinct(algorithms, str):
        raise UsageError(
            f"the algorithms to compare are {algorithms}, expected a list with every one once: [backprop,...]"
        )
    return base, choices, [Arm(text) for text in algorithms], shared


def _check_compare(arms: Sequence[Arm], seeds: Any, overrides: Any, resume: Any) -> None:
    from collections.abc import Mapping

    if not _distinct(seeds, int):
        raise UsageError(f"compare.seeds is {seeds}, expected different whole numbers: a repeated seed is no spread")
    for seed in seeds:
        check_seed("compare.seeds", seed)
    if type(resume) is not bool:
        raise UsageError(f"compare.resume is {resume}, expected true or false; a folder to go on from is for train")
    if not isinstance(overrides, Mapping) or any(isinstance(own, str) for own in overrides.values()):
        raise UsageError(
            f'compare.overrides is {overrides}, expected lists by algorithm: {{backprop: ["optimizer.lr=1e-3"]}}'
        )
    for name in overrides:
        if name not in [arm.text for arm in arms]:
            raise UsageError(f"compare.overrides names {name!r}, which is not in compare.algorithms")


def _distinct(values: Any, kind: type) -> bool:
    if not isinstance(values, Sequence) or isinstance(values, str):
        return False
    return len(values) == len(set(values)) > 0 and all(type(value) is kind for value in values)


def report(words: list[str]) -> int:
    """Write one page from records."""
    from locallearn.records import scan
    from locallearn.report import write_report

    folders = [word for word in words if "=" not in word and not word.startswith("-")]
    cfg, _ = compose_settings([word for word in words if word not in folders])
    roots = [Path(str(f)).expanduser() for f in folders or cfg.report.records or [folder_setting(cfg, "runs_dir")]]
    for root in roots:
        if not root.is_dir():
            raise UsageError(f"there is no folder {root} to read records from")
        if os.access(root, os.W_OK):
            recovered(root)
    found = scan(roots)
    if not found.records:
        raise UsageError("; ".join([f"there are no records in {', '.join(map(str, roots))}", *found.problems[:1]]))
    if os.access(roots[0], os.W_OK) and not folders and not cfg.report.records:
        reindexed(roots[0])
    out = Path(str(cfg.report.out or roots[0] / "report.html")).expanduser()
    for count, what in (
        (found.left_out, "left out"),
        (len(found.problems) - found.left_out, "with values that cannot be used"),
    ):
        if count:
            records = "record" if count == 1 else "records"
            print(f"locallearn: {count} {records} {what}, the page says why", file=sys.stderr)
    print(write_report(found.records, out, title=cfg.report.title, problems=found.problems))
    return 0


def predict(words: list[str]) -> int:
    """Let a finished run predict again: the test set, or inputs of one's own."""
    trust = "--trust" in words
    runs = [word for word in words if ("=" not in word and not word.startswith("-")) or Path(word).is_dir()]
    settings = [word for word in words if word not in (*runs, "--trust")]
    if len(runs) != 1:
        raise UsageError(f"predict takes one run, and got {len(runs)}: locallearn predict RUN [predict.out=FILE]")
    own = [word for word in settings if word.startswith("predict.")]
    changes = [word for word in settings if word.startswith(("data_dir=", "trainer.accelerator="))]
    for word in settings:
        check_words([word])
        if word not in (*own, *changes):
            raise UsageError(
                f"{word!r} cannot be changed for predict: the run has its own settings; only predict.part, predict.inputs, "
                "predict.out, data_dir and trainer.accelerator can be given"
            )
    asked = compose_settings([*own, *changes])[0]
    part, source, out = asked.predict.part, asked.predict.inputs, asked.predict.out
    _check_predict(part, source, out, any(word.startswith("predict.part=") for word in own))
    accelerator = asked.trainer.accelerator if any(word.startswith("trainer.") for word in changes) else None
    saved = load(runs[0], trust=trust, data_dir=asked.data_dir, accelerator=accelerator)
    if source is None:
        found = evaluate(saved, part)
        _say(saved.record, part, found[0])
        batches = found[1]
    else:
        batches = [(None, saved.predict(read_inputs(Path(str(source)).expanduser())).cpu(), None)]
    if out is not None or source is not None:
        _write_predictions(batches, None if out is None else Path(str(out)).expanduser(), saved)
    return 0


def _check_predict(part: Any, source: Any, out: Any, chosen: bool) -> None:
    """Everything that can be known before the run is loaded."""
    if part not in ("test", "validation"):
        raise UsageError(f"predict.part is {part}, expected test or validation")
    if source is not None and chosen:
        raise UsageError("predict.part names data of the run, and predict.inputs other ones: give one of the two")
    if source is not None and not Path(str(source)).expanduser().is_file():
        raise UsageError(f"there is no file {source} to read inputs from")
    if out is not None:
        place = Path(str(out)).expanduser()
        if place.suffix not in (".csv", ".npy"):
            raise UsageError(f"predict.out is {out}, expected a name that ends in .csv or .npy")
        if place.is_dir() or not os.access(place.parent, os.W_OK):
            raise UsageError(f"{place} cannot be written: name a file in a folder that is there and can be written to")


def _say(record: Any, part: str, figures: dict[str, float]) -> None:
    metric = record.metric.name
    known = record.part(part).get(metric)
    beside = "" if known == figures[metric] else f" (the record says {known})"
    print(f"{record.algorithm} on {record.dataset}: {part} {metric} {figures[metric]:.4f}{beside}")


def _write_predictions(batches: Sequence[Any], out: Path | None, saved: Any) -> None:
    """As a file, or as a table on the terminal."""
    import io

    import numpy as np

    from locallearn.records import write_file

    if out is not None and out.suffix == ".npy":
        import torch

        content = io.BytesIO()
        np.save(content, torch.cat([outputs for _, outputs, _ in batches]).float().numpy(), allow_pickle=False)
        write_file(out, content.getvalue())
    else:
        text = table(batches, saved.task.info().classes)
        if out is None:
            print(text, end="")
        else:
            write_file(out, text.encode())
    if out is not None:
        print(out)


def audit(words: list[str]) -> int:
    """Print what was seen of every unit, and whether the claim holds."""
    import torch
    from rich.table import Table

    from locallearn.audit import audit as audited
    from locallearn.batch import Batch
    from locallearn.precision import multiplying
    from locallearn.strategies.local import make_optimizers
    from locallearn.study.train import attached_task

    cfg, choices = compose_settings(words)
    plan = make_plan(cfg, choices, command_line("audit", words))
    task = attached_task(plan)
    batch = task.info().example
    if not batch.context:  # a graph is there as a whole; of anything else the shape is enough
        generator = torch.Generator().manual_seed(plan.seed)
        labels = torch.randint(plan.data.classes, (64,), generator=generator)
        batch = task.to_batch((torch.rand(64, *plan.data.shape, generator=generator), labels))
    plugin = _precision(str(plan.trainer.get("precision", "32-true")))
    plugin.convert_module(plan.algorithm)
    with multiplying(plan.matmul_precision):
        result = audited(
            plan.algorithm,
            Batch(*plugin.convert_input(tuple(batch))),
            optimizers=partial(make_optimizers, make=plan.optimizer),
            context=plugin.train_step_context,
        )
    title = f"{choices['algorithm']} on {choices['net']}, precision {plugin.precision}"
    table = Table(title=title, title_justify="left")
    for heading in ("unit", "weights", "gradient reaches", "changes with later", "backward calls"):
        table.add_column(heading, justify="right" if heading in ("weights", "backward calls") else "left")
    for unit in result.units:
        table.add_row(
            unit.unit,
            f"{unit.parameters:,}",
            ", ".join(unit.reaches) or "itself only",
            ", ".join(unit.depends_on_later) or "nothing",
            str(unit.backward_calls),
        )
    console = printing()
    console.print(table)
    console.print(f"broadcast to all blocks: {result.broadcast}", highlight=False)
    console.print("not seen: " + "; ".join(result.limits), highlight=False)
    word = "confirmed" if result.confirmed else "REFUTED"
    console.print(f"claim: {result.claim}: {word}; {result.reason}", highlight=False)
    return 0 if result.confirmed else 1


def _precision(name: str) -> Any:
    """Lightning's plugin of this precision on a CPU, where an audit runs."""
    from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision

    if name in ("64-true", "64"):
        return DoublePrecision()
    if name == "bf16-true":
        return HalfPrecision("bf16-true")
    return MixedPrecision("bf16-mixed", "cpu") if name in ("bf16-mixed", "bf16") else Precision()


def bench(words: list[str]) -> int:
    """Measure speed or memory, alternated."""
    from locallearn.study.bench import bench as measure

    cfg, _, several, shared = arms_of("bench", words)
    what, depths = str(cfg.bench.what), cfg.bench.depths
    arms = {arm.text: arm for arm in several}
    if isinstance(depths, str) or not isinstance(depths, Sequence):
        raise UsageError(f"bench.depths is {depths}, expected a list of numbers of blocks: [4,32]")

    def make(name: str, *more: str) -> Any:
        composed, choices = compose_settings([*shared, *arms[name].overrides, "meter=none", *more])
        return make_plan(composed, choices, command_line("bench", words), arms[name])

    for arm in several:  # a mistake in the settings is told before anything is measured
        compose_settings([*shared, *arm.overrides])
    table, folder = measure(what, list(arms), make, cfg.bench.rounds, cfg.bench.steps, list(depths))
    printing().print(table)
    print(folder)
    return 0


def data(words: list[str]) -> int:
    """List the data sets and where their files lie."""
    from rich.table import Table

    from locallearn.tasks.graphs import graph_status
    from locallearn.tasks.images import data_status, default_data_dir

    cfg, _ = compose_settings(words)
    folder = default_data_dir() if cfg.data_dir is None else folder_setting(cfg, "data_dir")
    table = Table(title=f"data sets in {folder}", title_justify="left")
    for heading in ("dataset", "here", "files", "in"):
        table.add_column(heading, overflow="fold")
    for row in (*data_status(folder), *graph_status(folder)):
        place = "" if row.path is None else str(row.path.relative_to(folder))
        table.add_row(row.name, "yes" if row.present else "no", ", ".join(row.files) or "come with a package", place)
    printing().print(table)
    return 0


COMMANDS = (train, predict, analyze, compare, tune, report, audit, bench, data)
"""What the command line knows, in the order of the help."""
