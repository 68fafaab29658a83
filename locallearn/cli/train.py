"""``locallearn train``: one algorithm once, an interrupted run gone on with, or a sweep."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from locallearn.cli.mistakes import explain
from locallearn.cli.outputs import Outputs, outputs_of
from locallearn.cli.plans import command_line, make_plan
from locallearn.cli.saved import PLACES, read_places, run_folder, saved_settings
from locallearn.cli.settings import GROUPS, UsageError, check_words, compose_settings, located, multirun
from locallearn.cli.terminal import Progress


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
    _train_once(cfg, choices, words)
    return 0


def _resumed(words: list[str], trust: bool) -> tuple[Any, dict[str, str]] | None:
    """Configuration of the run to go on with: its own, so that nothing has to be said twice."""
    from locallearn.records import load_record

    named = [word.partition("=")[2] for word in words if word.startswith("resume=")]
    if not named or named[-1] in ("", "null"):
        return None
    folder = run_folder(named[-1])
    record = load_record(folder)
    if record.status not in ("interrupted", "failed"):
        raise UsageError(f"{folder} is {record.status}: only an interrupted or failed run can be resumed")
    allowed = (
        "resume=",
        "runs_dir=",
        *PLACES,
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
    moved = [word for word in words if word.startswith(("runs_dir=", *PLACES))]
    cfg, choices = saved_settings(record, trust, read_places(moved))
    cfg.merge_with_dotlist([word for word in words if word not in moved])
    cfg.resume = str(folder)  # a killed run has got another name
    return cfg, choices


def _train_once(cfg: Any, choices: dict[str, str], words: Sequence[str]) -> Path:
    """Train one run; tell what it reached, and where it is."""
    from rich.console import Console

    from locallearn.records import load_record
    from locallearn.study.train import Interrupted, run

    plan = make_plan(cfg, choices, command_line("train", words))
    stopped: Interrupted | None = None
    with Progress() as show:
        plan.progress = partial(show, f"{choices['algorithm']} seed {cfg.seed}")
        try:
            folder = run(plan)
        except Interrupted as error:
            if error.ended is None:
                raise
            folder, stopped = error.ended, error
    record = load_record(folder)
    metric, seconds = record.data["metric"]["name"], record.data["cost"]["train_s"]
    took = plan.algorithm.untimed if seconds is None else f"{seconds:.1f} s of training"
    Console(stderr=True).print(
        f"{choices['algorithm']} on {plan.names['dataset']}: test {metric} {record.data['test'][metric]:.4f}, {took}"
    )
    if choices["algorithm"] == "physical_ff" and cfg.net.get("device") is not None:
        Console(stderr=True).print(
            "What the device adds is only told beside the same network without it: net.device=null (compare runs both)"
        )
    if stopped is not None:
        raise stopped
    print(folder)
    return folder


def _sweep(words: list[str]) -> int:
    """``train -m``: Hydra's own sweeper and launcher call one run per combination; then the table of all of them."""
    from omegaconf import OmegaConf

    from locallearn.records import load_record
    from locallearn.study.train import Interrupted

    check_words(words)
    words = located(words)
    codes: list[int] = []
    folders: list[Path] = []
    outputs: list[Outputs] = []

    def job(cfg: Any) -> None:
        from hydra.core.hydra_config import HydraConfig

        runtime = HydraConfig.get()
        choices = {group: str(name) for group, name in runtime.runtime.choices.items() if group in GROUPS}
        cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
        if not outputs:  # a place that cannot be written to is told before anything is trained
            outputs.append(outputs_of(cfg, None))
            outputs[0].check()
        try:
            folders.append(_train_once(cfg, choices, list(runtime.overrides.task)))
        except Interrupted as error:
            raise KeyboardInterrupt from error  # anything less Hydra keeps to itself until the sweep is over
        except Exception as error:  # one bad combination must not end the sweep
            code, sentence = explain(error, runtime.overrides.task)
            swept = " ".join(word for word in runtime.overrides.task if word not in words)
            print(f"locallearn: {f'{swept}: ' if swept else ''}{sentence}", file=sys.stderr)
            codes.append(code)
            folder = getattr(error, "run_folder", None)
            folders.extend([] if folder is None else [folder])

    try:
        multirun(words, job)
    except KeyboardInterrupt as stop:
        raise stop.__cause__ or stop from None
    if folders:
        outputs[0].give(list(map(load_record, folders)), "locallearn train -m")
        if outputs[0].report is None:
            print(f"locallearn: a page of all runs there: locallearn report {folders[0].parent}", file=sys.stderr)
    return max(codes, default=0)
