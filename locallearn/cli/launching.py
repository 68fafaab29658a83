"""Many runs by one command: Hydra's sweeper makes the combinations, a launcher runs them, here or in other processes."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from locallearn.cli.settings import STAGED, check_words, quoted

_ERROR = "error.txt"  # why a launch broke off


@dataclass(frozen=True)
class Outcome:
    """What a job of a launch leaves for the process that launched it: small, and able to travel between processes.

    Attributes:
        code: exit code.
        folder: of the run's record, where there is one.
        sentence: what went wrong, as long as nobody has told it.
        found: what a search found.
    """

    code: int = 0
    folder: str | None = None
    sentence: str | None = None
    found: Any = None


class Stopped(KeyboardInterrupt):
    """A job was interrupted in the process that launched it, and so no other one begins; why has been told."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__()
        self.outcome = outcome


@contextmanager
def launch_folder(runs_dir: Path) -> Iterator[Path]:
    """A folder that all machines of a launch reach, for what its jobs need and its launcher leaves.

    It goes when every job that began has ended. Else it stays, with the launcher's logs: jobs may still need it.
    """
    there = runs_dir.is_dir()
    runs_dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".launch-", dir=runs_dir.absolute()))
    try:
        yield folder
    finally:
        if not _unended(folder) and not (folder / _ERROR).exists():
            shutil.rmtree(folder, ignore_errors=True)
            if not there:
                with suppress(OSError):  # there are runs in it
                    runs_dir.rmdir()


def first_of(words: Sequence[str]) -> list[str]:
    """The words of the first of all combinations; what has no first value stays as it is by default."""
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    check_words(words)
    with initialize_config_module("locallearn.conf", version_base="1.3"):
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())  # which knows what a glob stands for
    found = []
    for word in words:
        if word.startswith("experiment=") and word.endswith(
            (".yaml", ".yml")
        ):  # a path need not follow Hydra's grammar
            found.append(word)
            continue
        (override,) = parser.parse_overrides([word])  # the plural names the word in its errors
        if not override.is_sweep_override():
            found.append(word)
        elif override.is_choice_sweep() or override.is_range_sweep():
            values = [*override.sweep_string_iterator()][:1]
            found += [f"{override.get_key_element()}={value}" for value in values]
    return found


def multirun(words: Sequence[str], job: Callable[[Any, list[str]], Outcome], folder: Path) -> list[Outcome]:
    """Have Hydra's own sweeper and launcher call ``job`` with every combination that the words stand for.

    Args:
        words: settings, located in ``folder``.
        job: takes the settings of a combination and the words that make it; a launcher may pickle it.
        folder: the launch's own.

    Returns:
        What the jobs returned; of a launch that broke off what is known of those that began, and one more for the rest.

    Raises:
        Stopped: a job was interrupted in this very process.
    """
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    first = first_of(words)
    swept = tuple(word.partition("=")[0] for word in words if word not in first)
    told = [f"hydra.sweep.dir={quoted(str(folder))}", *words, "hydra.mode=MULTIRUN"]
    with initialize_config_module("locallearn.conf", job_name="locallearn", version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        try:
            returned = hydra.multirun("config", _Job(job, folder, swept, _process()), told)
        except Exception as error:
            if {path.name for path in folder.iterdir()} <= {"multirun.yaml", STAGED}:  # nothing has been launched
                raise
            outcomes = _broken_off(error, folder)
        else:
            outcomes = [one.return_value for batch in returned for one in batch]
    for outcome in outcomes:
        if outcome.sentence is not None:
            print(f"locallearn: {outcome.sentence}", file=sys.stderr)
    return outcomes


@dataclass(frozen=True)
class _Job:
    """What a launcher calls, in whatever process.

    What becomes of a job also stands in a file, because a launcher that loses one process gives up without the results of all
    others.
    """

    job: Callable[[Any, list[str]], Outcome]
    folder: Path
    swept: tuple[str, ...]
    launched_by: tuple[str, int]

    def __call__(self, cfg: Any) -> Outcome:
        from hydra.core.global_hydra import GlobalHydra
        from hydra.core.hydra_config import HydraConfig

        runtime = HydraConfig.get()
        words = list(runtime.overrides.task)
        file = self.folder / f"{runtime.job.num}.job"
        name = " ".join(word for word in words if word.partition("=")[0] in self.swept)
        _write_down(file, {"name": name})
        launching = GlobalHydra.instance().hydra
        GlobalHydra.instance().hydra = None  # a search composes settings itself
        outcome = Outcome(130)  # unless it comes to say something else
        try:
            outcome = self.job(cfg, words)
            if name and outcome.sentence is not None and outcome.code != 130:
                outcome = replace(outcome, sentence=f"{name}: {outcome.sentence}")
        finally:
            GlobalHydra.instance().hydra = launching
            _write_down(file, {"code": outcome.code, "folder": outcome.folder, "sentence": outcome.sentence})
        if self.launched_by != _process():  # whose terminal may be another one
            return outcome
        if outcome.sentence is not None:
            print(f"locallearn: {outcome.sentence}", file=sys.stderr)
        outcome = replace(outcome, sentence=None)
        if outcome.code == 130:
            raise Stopped(outcome)  # anything less Hydra keeps to itself until all have run
        return outcome


def _process() -> tuple[str, int]:
    """This process among those of all machines."""
    return platform.node(), os.getpid()


def _write_down(file: Path, content: Mapping[str, Any]) -> None:
    aside = file.with_suffix(".new")
    with suppress(OSError):  # it matters only if a process dies, too
        aside.write_text(json.dumps(content), encoding="utf-8")
        aside.replace(file)  # whoever reads it meanwhile sees the former content


def _jobs(folder: Path) -> list[dict[str, Any]]:
    """What is written down of the jobs that began, in their order."""
    files = sorted(folder.glob("*.job"), key=lambda file: int(file.stem))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def _unended(folder: Path) -> list[str]:
    """The jobs that began and have not told their end, by what was swept."""
    return [job["name"] for job in _jobs(folder) if "name" in job]


def _broken_off(error: Exception, folder: Path) -> list[Outcome]:
    """The outcomes that are known of a launch in which a process died; the last one stands for the rest."""
    (folder / _ERROR).write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    why = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
    ended = [Outcome(**job) for job in _jobs(folder) if "name" not in job]
    unended = _unended(folder)
    died = f"of jobs that died or had not ended: {'; '.join(unended)}; " if unended else ""
    rest = f"the launcher gave up ({why}); {died}combinations that had not begun are left out; more is in {folder}"
    return [*ended, Outcome(1, sentence=rest)]
