"""``locallearn tune``: a search, and the best settings as experiments and commands that run them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from locallearn.cli.arms import Arm, arms_of, once
from locallearn.cli.launching import Outcome, Stopped, first_of, launch_folder, multirun
from locallearn.cli.mistakes import explain
from locallearn.cli.plans import check_folder, command_line, folder_setting, make_plan
from locallearn.cli.searching import check_numbers, fixed_words, maker_of, objectives_of, seeds_of
from locallearn.cli.settings import UsageError, compose_settings, located, unstaged
from locallearn.cli.spaces import space_of
from locallearn.cli.terminal import Progress, printing
from locallearn.cli.tuned import write_experiments
from locallearn.records._settings import OF_MEASURING, OF_PLACES, OF_THE_MACHINE, group_of


def tune(words: list[str]) -> int:
    """Search settings on equal budgets, on validation data only; with ``-m`` one process per combination."""
    if "-m" in words or "--multirun" in words:
        return _launched([word for word in words if word not in ("-m", "--multirun")])
    found = _search(words)
    if found is None:
        print(f"locallearn: {_STOPPED}", file=sys.stderr)
        return 130
    return _recommend(found)


_STOPPED = "interrupted; the same command goes on where the search stopped"


@dataclass(frozen=True)
class _Found:
    """What a search found, with all that it takes to say so; processes hand it on.

    Attributes:
        best: outcomes of the algorithms.
        arms: by algorithm.
        shared: words that hold for all of them.
        folder: the search's own.
        seeds: that were tuned on.
        spaces: what was drawn, by algorithm.
    """

    best: Sequence[Any]
    arms: Mapping[str, Arm]
    shared: Sequence[str]
    folder: Path
    seeds: Sequence[int]
    spaces: Mapping[str, Mapping[str, Any]]


def _search(words: list[str], helping: bool = False, deadline: float | None = None) -> _Found | None:
    """Take part in a search; ``None`` where it was interrupted. A process that only helps another one has its deadline."""
    import time

    from locallearn.study.train import Interrupted, attached_task, weights_behind
    from locallearn.study.tune import PRUNERS, SAMPLERS, History, Options, file_of, masked, study_name
    from locallearn.study.tune import tune as search

    base, _, several, shared = arms_of("tune", words)
    arms = {arm.text: arm for arm in several}
    check_numbers(base.tune)
    if base.resume is not None:
        raise UsageError("resume goes with train; an interrupted search goes on when tune is called again")
    runs_dir = folder_setting(base, "runs_dir")
    seeds = seeds_of(base, words)
    shared = [word for word in shared if not word.startswith("seed=")]
    sampler_name, sampler = maker_of("sampler", base.tune.sampler, SAMPLERS)
    pruner_name, pruner = maker_of("pruner", base.tune.pruner, PRUNERS)
    if base.tune.objectives is not None and len(base.tune.objectives) > 1 and pruner_name != "none":
        raise UsageError(
            f"tune.pruner={pruner_name} goes with one objective, and tune.objectives are {list(base.tune.objectives)}: a trial "
            "may be behind in one and ahead in another; take one of both out"
        )
    storage = base.tune.storage or runs_dir / "tune.sqlite"
    file = file_of(storage)
    if file is not None:
        check_folder("tune.storage", file, runs_dir)
    command = command_line("tune", _unnamed(words, masked))

    def compose(algorithm: str, settings: Sequence[str] = ()) -> Any:
        return compose_settings([*shared, *arms[algorithm].overrides, *settings])

    def make(algorithm: str, settings: Sequence[str]) -> Any:
        cfg, choices = compose(algorithm, settings)
        # Trials have a folder of their own: a report on runs_dir must not mix them with what they were searched for.
        cfg.runs_dir = str(runs_dir / "tune")
        cfg.tune.storage = None if cfg.tune.storage is None else masked(cfg.tune.storage)
        return make_plan(cfg, choices, command, arms[algorithm])

    composed = {name: compose(name) for name in arms}
    arms = {arm.text: arm for arm in once(several, composed, seeds)}
    spaces = {
        name: space_of(
            arm.algorithm,
            base.tune.space,
            shared,
            [composed[name][0], *(cfg for cfg, _ in composed.values())],
            composed[name][1],
        )
        for name, arm in arms.items()
    }
    if not helping:
        _tried(arms, spaces, make)
    plan = make(next(iter(arms)), [])
    task = attached_task(plan)
    objectives = objectives_of(
        base.tune.objectives, task.metric, task.maximise, base.tune.workers, bool(base.meter.sources)
    )
    joules = any(objective.name.startswith("energy_j") for objective in objectives)
    weights = None if plan.init_from is None else weights_behind(plan.init_from)
    told = fixed_words(shared, seeds, base.tune.objectives, joules, weights)
    name = study_name(plan.names["dataset"], plan.names["net"], told)
    about = {
        "search": name,
        **{key: plan.names[key] for key in ("dataset", "net", "task")},
        "command": command,
        "storage": masked(str(storage)),
        "budget": {"trials": base.tune.trials, "timeout_s": base.tune.timeout},
        "seeds": seeds,
        "sampler": sampler_name,
        "pruner": pruner_name,
    }
    if not helping and base.tune.timeout is not None:
        deadline = time.monotonic() + base.tune.timeout
    options = Options(
        seeds=seeds,
        objectives=objectives,
        sampler=sampler,
        pruner=pruner,
        deadline=deadline,
        heartbeat_s=base.tune.heartbeat,
        by=None if base.tune.worker is None else str(base.tune.worker),
        history=History(runs_dir / "tune" / name, about),
    )
    try:
        with _helpers(words, base.tune.workers, deadline), nullcontext() if helping else Progress(of="trial") as show:
            found = search(
                list(arms),
                make,
                spaces,
                base.tune.trials,
                storage,
                name,
                show=show,
                say=lambda sentence: print(f"locallearn: {sentence}", file=sys.stderr),
                options=options,
            )
    except (Interrupted, KeyboardInterrupt):  # in a trial or between two
        return None
    return _Found(found, arms, shared, runs_dir / "tune" / name, seeds, spaces)


def _tried(arms: Iterable[str], spaces: Mapping[str, Any], make: Callable[[str, Sequence[str]], Any]) -> None:
    """Tell a mistake in the settings, or in what may be drawn, before anything is trained."""
    from locallearn.study.space import corners
    from locallearn.study.train import check

    for name in arms:
        for place, point in enumerate(corners(spaces[name])):
            try:
                check(make(name, point))
            except RuntimeError:  # too large for this machine, say: a trial of the search may fail
                if place == 0:
                    raise


def _unnamed(words: Sequence[str], masked: Any) -> list[str]:
    """The words without a password in them."""
    key = "tune.storage="
    return [
        f"{key}{masked(word.removeprefix(key).strip(chr(34) + chr(39)))}" if word.startswith(key) else word
        for word in words
    ]


@contextmanager
def _helpers(words: Sequence[str], workers: int, deadline: float | None = None) -> Iterator[None]:
    """Further processes that search along, and end when this one does: at its deadline, by the clock of the machine."""
    import multiprocessing
    import os

    import torch

    from locallearn.study._signals import deaf

    if workers == 1:
        yield
        return
    threads = torch.get_num_threads()
    share = max(1, threads // workers)
    boards = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(boards)))
    context = multiprocessing.get_context("spawn")
    own = [word for word in words if not word.startswith("tune.workers=")]
    processes = [
        context.Process(
            target=_help, args=(own, share, visible.split(",")[place % boards] if boards > 1 else None, deadline)
        )
        for place in range(1, workers)
    ]
    torch.set_num_threads(share)
    try:
        for process in processes:
            with deaf():  # it is told to end by this one, which a Ctrl-C in the midst of its imports would spoil
                process.start()
        yield
    except BaseException:
        for process in processes:
            if process.pid is not None:
                process.terminate()
        raise
    finally:
        torch.set_num_threads(threads)
        for process in processes:
            if process.pid is not None:
                process.join()


def _help(words: list[str], threads: int, board: str | None, deadline: float | None) -> None:
    """A process of ``tune.workers``, on a board of its own where there are several."""
    import os

    import torch

    if board is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = board
    torch.set_num_threads(threads)
    try:
        sys.exit(130 if _search(words, helping=True, deadline=deadline) is None else 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        code, sentence = explain(error, words)
        print(f"locallearn: a worker ended: {sentence}", file=sys.stderr)
        sys.exit(code)


def _launched(words: list[str]) -> int:
    """``tune -m``: Hydra's launcher starts the processes of one search, here or wherever it does; this one recommends."""
    first, _ = compose_settings(first_of(words))
    try:
        with launch_folder(folder_setting(first, "runs_dir")) as folder:
            words = located(words, folder)
            places = [word for word in words if word.startswith("hydra.searchpath=")]
            outcomes = multirun(words, partial(_take_part, tuple(places)), folder)
            codes = [outcome.code for outcome in outcomes]
            searches: dict[Path, _Found] = {}  # more than one where something else than tune.worker is swept
            for found in (outcome.found for outcome in outcomes if outcome.found is not None):
                # Where time was up, whoever ended last has seen the most trials.
                known = searches.get(found.folder, found)
                searches[found.folder] = max(known, found, key=lambda one: sum(best.trials for best in one.best))
            codes += [_recommend(found) for found in searches.values()]
    except Stopped:
        return 130
    return max(codes, default=0)


def _take_part(places: Sequence[str], cfg: Any, words: list[str]) -> Outcome:
    """One process's part in a launched search; the places where Hydra finds experiments are not among a job's own words."""
    own = [*words, *places]
    try:
        found = _search(own)
    except Exception as error:
        code, sentence = explain(error, own)
        return Outcome(code, sentence=sentence)
    return Outcome(130, sentence=_STOPPED) if found is None else Outcome(found=found)


def _recommend(search: _Found) -> int:
    """Print the best settings of every algorithm, and commands that run them; 1 where one has none."""
    found, arms, shared = search.best, search.arms, search.shared
    good = [best for best in found if best.value is not None]
    own = [word for word in shared if not word.startswith(("tune.", "report.", "bench."))]
    files = write_experiments(search.folder, good, arms, own, search.seeds)
    _table(found, search.seeds, search.spaces)
    for best in found:
        for name, shares in best.importances.items():
            if shares:
                told = ", ".join(f"{key} {share:.2f}" for key, share in shares.items())
                print(f"importance for {name}, {best.algorithm}: {told}")
        if best.failures:
            all_or_some = "all" if best.value is None else str(len(best.failures))
            advice = "; nothing can be recommended, search elsewhere" if best.value is None else ""
            print(
                f"locallearn: {all_or_some} of the {best.trials} trials of {best.algorithm} failed or diverged, "
                f"e.g. {best.failures[0]}{advice}",
                file=sys.stderr,
            )
    here = [word for word in unstaged(own) if _said_here(word)]
    for best in good:
        print(command_line("train", [f"experiment={files[best.algorithm][0]}", *here]))
    if good:
        compared = [
            word
            for word in own
            if word.startswith("compare.") and not word.startswith(("compare.algorithms=", "compare.overrides="))
        ]
        print(command_line("compare", [f"experiment={files[good[-1].algorithm][0]}", *here, *compared]))
    return 0 if len(good) == len(found) else 1


def _said_here(word: str) -> bool:
    """Whether a word says where a run computes, goes to or is watched: not found by a search, but typed for it."""
    bare = word.lstrip("+~")
    return group_of(word) in (*OF_PLACES, *OF_MEASURING) or bare.startswith(("hydra.searchpath=", *OF_THE_MACHINE))


def _table(found: Sequence[Any], seeds: Sequence[int], spaces: Mapping[str, Mapping[str, Any]]) -> None:
    """What every algorithm reached, from how many trials and settings; of several objectives a row for each of the best."""
    from rich.table import Table
    from rich.text import Text

    metric = next((best.metric for best in found if best.metric is not None), "metric")
    costs = list(found[0].importances)[1:]
    title = f"best of {found[0].trials} trials each, by validation {metric}"
    title += f", mean over {len(seeds)} seeds" if len(seeds) > 1 else ""
    title += f"; Pareto set with {', '.join(costs)}" if costs else ""
    table = Table(title=title, title_justify="left")
    headings = ("algorithm", "trials", "pruned", "seconds", "searched", f"validation {metric}", *costs, "settings")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for best in found:
        searched = len(spaces[best.algorithm])
        about = [best.algorithm, str(best.trials), str(best.pruned), f"{best.seconds:.0f}", str(searched)]
        if not best.points:
            table.add_row(*about, "none")
        for place, point in enumerate(best.points):
            values = [f"{point.values[0]:.4f}", *(f"{value:.4g}" for value in point.values[1:])]
            table.add_row(*(about if place == 0 else [""] * len(about)), *values, Text(" ".join(point.settings)))
    printing().print(table)
