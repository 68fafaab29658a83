"""``locallearn train``: one algorithm once, an interrupted run gone on with, or a sweep."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from locallearn.cli.launching import Outcome, Stopped, first_of, launch_folder, multirun
from locallearn.cli.mistakes import explain
from locallearn.cli.outputs import outputs_of
from locallearn.cli.plans import command_line, folder_setting, make_plan
from locallearn.cli.saved import PLACES, read_places, run_folder, saved_settings
from locallearn.cli.settings import GROUPS, UsageError, compose_settings, located
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
    from locallearn.records import load_record

    first, _ = compose_settings(first_of(words))
    outputs = outputs_of(first, None)
    outputs.check()  # a place that cannot be written to is told before anything is trained
    try:
        with launch_folder(folder_setting(first, "runs_dir")) as folder:
            outcomes = multirun(located(words, folder), _train_combination, folder)
    except Stopped as stop:
        if stop.outcome.folder is not None:
            print(stop.outcome.folder)
        return 130
    folders = [Path(outcome.folder) for outcome in outcomes if outcome.folder is not None]
    if folders:
        outputs.give(list(map(load_record, folders)), "locallearn train -m")
        if outputs.report is None:
            print(f"locallearn: a page of all runs there: locallearn report {folders[0].parent}", file=sys.stderr)
    return max((outcome.code for outcome in outcomes), default=0)


def _train_combination(cfg: Any, words: list[str]) -> Outcome:
    """One run of a sweep, in whatever process."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    choices = {group: str(name) for group, name in HydraConfig.get().runtime.choices.items() if group in GROUPS}
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
    try:
        return Outcome(folder=str(_train_once(cfg, choices, words)))
    except Exception as error:  # one bad combination must not end the sweep
        code, sentence = explain(error, words)
        folder = getattr(error, "run_folder", None)
        return Outcome(code, None if folder is None else str(folder), sentence)
