"""``locallearn compare``: several algorithms with several seeds, and earlier runs that stand for some of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from locallearn.cli.arms import Arm, arms_of, controls_of, distinct, once, signature, what_runs
from locallearn.cli.mistakes import explain
from locallearn.cli.outputs import outputs_of
from locallearn.cli.plans import check_seed, command_line, folder_setting, make_plan, without_patience
from locallearn.cli.saved import recovered, reindexed
from locallearn.cli.settings import UsageError, compose_settings
from locallearn.cli.terminal import Progress


def compare(words: list[str]) -> int:
    """Train several algorithms with several seeds, print a table, write a report and tables."""
    from omegaconf import OmegaConf

    for word in words:
        if word.startswith("seed="):
            raise UsageError(f"compare runs the seeds of compare.seeds, so {word} has no place here: take it out")
    base, _, arms, shared = arms_of("compare", words)
    seeds, overrides = base.compare.seeds, base.compare.overrides or {}
    controls = controls_of(base.compare.controls, arms)
    every = [*arms, *controls.values()]
    _check_compare(every, seeds, overrides, base.compare.resume)

    def compose(arm: Arm, seed: int) -> tuple[Any, dict[str, str]]:
        own = overrides.get(arm.text if arm.text in overrides else arm.inherits or arm.text, [])
        cfg, choices = compose_settings([*shared, *arm.overrides, f"seed={seed}", *own])
        without_patience(cfg)  # what earlier runs are held against has to say so, too
        return cfg, choices

    composed = {arm.text: compose(arm, seeds[0]) for arm in every}
    every = once(every, composed, seeds)
    if base.resume is not None:
        raise UsageError(
            "resume goes with train: locallearn train resume=FOLDER; to go on with a comparison: compare.resume=true"
        )
    runs_dir = folder_setting(base, "runs_dir")
    outputs = outputs_of(base, runs_dir / "report.html")
    workers = _workers(base.compare)
    from locallearn.records import load_record, recover  # these take seconds, and a mistake is told before
    from locallearn.study.compare import compare as run_all
    from locallearn.study.train import Interrupted

    recovered(runs_dir)
    earlier = _earlier(runs_dir) if base.compare.resume else {}
    plans, done, waited, wanted = [], [], [], []
    first: dict[str, Any] = {}
    command = command_line("compare", words)
    for seed in seeds:  # A B A B: heat and neighbours weigh on all algorithms alike
        for arm in every:
            cfg, choices = composed[arm.text] if seed == seeds[0] else compose(arm, seed)
            if workers > 1 and cfg.meter.sources:
                raise UsageError(
                    f"compare.workers is {workers}, but {', '.join(cfg.meter.sources)} would count the joules of all runs that "
                    "go on at once for each of them: set meter=none, or compare.workers=1"
                )
            if earlier:
                config: Any = OmegaConf.to_container(cfg, resolve=True)
                wanted.append(what_runs(config, choices["algorithm"], _weights_of(cfg)))
                before = earlier.get(signature(*wanted[-1]))
                if before is not None and before.status == "done":
                    done.append(before)
                    continue
                if before is not None:
                    cfg.resume = str(before.path)
                    waited.append(arm)
            make = partial(make_plan, cfg, choices, command, arm)
            plans.append((arm, f"{arm.text} seed {seed}", make))
            first.setdefault(arm.text, make)
    for arm in arms:
        if arm.text in first:
            refused = _refusal(first[arm.text], words)  # a mistake in the settings is told before anything is trained
            if refused is not None:
                raise UsageError(refused if len(arms) == 1 else f"{arm.text}: {refused}")
    left_out = _impossible(controls, first, words, named=base.compare.controls is not True)
    outputs.check()  # so is a place that cannot be written to; it makes the folder, so it comes last
    todo = [(name, make) for arm, name, make in plans if arm not in left_out]
    if base.compare.resume:
        going_on = sum(arm not in left_out for arm in waited)
        changed = [] if done or going_on else _changed(list(earlier.values()), wanted)
        _tell(len(done), going_on, len(done) + len(todo), runs_dir, changed)
    try:
        with Progress() as show:
            folders, problems = run_all(todo, show, workers)
    except (Interrupted, KeyboardInterrupt):  # in a run or between two
        print("locallearn: interrupted; the same command with compare.resume=true goes on", file=sys.stderr)
        return 130
    records = [*done, *map(load_record, folders)]
    if problems and workers > 1:  # a killed process has left the folder of its run
        killed = map(load_record, recover(runs_dir))
        records += [record for record in killed if record.text("command") == command]
    reindexed(runs_dir)
    outputs.give(records, "locallearn compare", problems)
    return 1 if problems else 0


def _workers(settings: Any) -> int:
    """How many runs go on at once, found good."""
    workers = settings.workers
    if type(workers) is not int or workers < 1:
        raise UsageError(f"compare.workers is {workers}, expected a whole number of at least 1")
    if workers > 1 and settings.mode == "target":
        raise UsageError(
            f"compare.workers is {workers}, but in mode target seconds and joules until the target are the question, and "
            "runs that go on at once take them from each other: set compare.workers=1"
        )
    return workers


def _impossible(controls: Mapping[str, Arm], first: Mapping[str, Any], words: Sequence[str], named: bool) -> list[Arm]:
    """Controls that cannot be run on this network: said and left out, or refused where they were asked for by name."""
    found = []
    for name, arm in controls.items():
        if arm.text not in first:
            continue
        sentence = _refusal(first[arm.text], words)
        if sentence is None:
            continue
        if named:
            raise UsageError(f"the control {name} cannot be run here: {sentence}")
        print(f"locallearn: the control {name} is left out: {sentence}", file=sys.stderr)
        found.append(arm)
    return found


def _refusal(make: Callable[[], Any], words: Sequence[str]) -> str | None:
    """Why the run that is made here cannot be trained; ``None``: it can, as far as is known before."""
    from locallearn.study.train import check

    try:
        check(make())
    except Exception as error:
        code, sentence = explain(error, words)
        if code != 2:
            raise
        return sentence
    return None


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
        runs = signature(*what_runs(record.part("config"), record.algorithm, record.begins_with))
        known = found.get(runs)
        finished = record.status == "done" and record.part("test")  # a trial of a search has not seen the test set
        waits = record.status == "interrupted" and (record.path / CHECKPOINT).is_file()
        if finished or (waits and (known is None or known.status != "done")):
            if (record.part("source").get("commit"), record.part("versions").get("locallearn")) != mine:
                others += 1
                continue
            dirty += record.part("source").get("dirty") is True
            found[runs] = record
    for how_many, what in (
        (others, "by other code: not taken over"),
        (dirty, "with uncommitted changes to locallearn, perhaps not the present ones"),
    ):
        if how_many:
            runs = "run was" if how_many == 1 else "runs were"
            print(f"locallearn: {how_many} earlier {runs} made {what}", file=sys.stderr)
    return found


def _tell(done: int, going_on: int, runs: int, runs_dir: Path, changed: Sequence[str]) -> None:
    """Say how many runs earlier ones stand for: a setting that was changed trains all of them anew."""
    told = f"{done} of {runs} runs are taken over from {runs_dir}"
    told += f", {going_on} {'is' if going_on == 1 else 'are'} gone on with" if going_on else ""
    told += f": the newest there differs in {', '.join(changed)}" if changed else ""
    print(f"locallearn: {told}", file=sys.stderr)


def _changed(earlier: Sequence[Any], wanted: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Settings in which the newest finished run of a wanted algorithm and data set differs from the nearest wanted one."""
    from locallearn.statistics import age

    def subject(algorithm: str, settings: Mapping[str, Any]) -> tuple[Any, ...]:
        data = settings.get("dataset")
        return (algorithm, *((data.get("_target_"), data.get("name")) if isinstance(data, Mapping) else ()))

    known = {id(record): what_runs(record.part("config"), record.algorithm, record.begins_with) for record in earlier}
    subjects = [subject(*run) for run in wanted]
    alike = [record for record in earlier if record.status == "done" and subject(*known[id(record)]) in subjects]
    if not alike:
        return []
    algorithm, settings = known[id(max(alike, key=lambda record: age(record, alike)))]
    found = [_differing(settings, mine) for name, mine in wanted if name == algorithm]
    nearest = min(found, key=len)
    # The seed is in several settings.
    return [name for name in nearest if name == "seed" or "seed" not in nearest or not name.endswith(".seed")]


def _differing(one: Any, other: Any, name: str = "") -> list[str]:
    """Dotted names of settings that are not the same; where another class is made, what it is made for."""
    if signature("", {name: one}) == signature("", {name: other}):
        return []
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)) or one.get("_target_") != other.get("_target_"):
        return [name]
    pairs = [(f"{name}.{key}".lstrip("."), one.get(key), other.get(key)) for key in dict.fromkeys([*one, *other])]
    return [found for key, mine, yours in pairs for found in _differing(mine, yours, key)]


def _weights_of(config: Any) -> str | None:
    """Digest of the weights that a run would begin with, whatever they are called; ``None``: they are drawn."""
    from locallearn.study.train import weights_behind

    return None if config.init_from is None else weights_behind(folder_setting(config, "init_from"))


def _check_compare(arms: Sequence[Arm], seeds: Any, overrides: Any, resume: Any) -> None:
    if not distinct(seeds, int):
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
