"""Settings: composed by Hydra, and checked against the signatures of what they make."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

GROUPS = (
    "algorithm",
    "dataset",
    "net",
    "task",
    "optimizer",
    "schedule",
    "trainer",
    "meter",
    "logger",
    "experiment",
)

_PLACES = "hydra.searchpath="
_STAGING = "locallearn-"  # how the name of a folder of experiments' files begins
_STAGED = f"{_STAGING}experiments"  # that of a launch
_ERROR = "error.txt"  # why a launch broke off


class UsageError(Exception):
    """The user asked for something that cannot be done; the message is one sentence."""


def compose_settings(overrides: Sequence[str]) -> tuple[Any, dict[str, str]]:
    """The composed configuration, and the name chosen in every group.

    What an experiment sets of its ``algorithm`` is meant for the one it names: where the overrides choose another algorithm,
    to run it under the same conditions, those settings are left out.
    """
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf import open_dict

    check_words(overrides)
    overrides = located(overrides)
    experiment = [word for word in overrides if word.startswith("experiment=")]
    of_algorithm = [word for word in overrides if re.match(r"[+~]*algorithm\b", word)]
    with initialize_config_module("locallearn.conf", version_base="1.3"):
        try:
            cfg = compose("config", list(overrides), return_hydra_config=True)
        except HydraException as error:
            error.overrides = overrides  # type: ignore[attr-defined]  # a compared algorithm has its own
            raise
        choices = {group: str(name) for group, name in cfg.hydra.runtime.choices.items() if group in GROUPS}
        chosen = experiment and any(word.startswith("algorithm=") for word in of_algorithm)
        places = [word for word in overrides if word.startswith(_PLACES)]
        if chosen and _algorithm_of(*experiment, *places) != choices["algorithm"]:
            cfg.algorithm = compose("config", of_algorithm).algorithm
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, choices


@cache  # a comparison asks for every run
def _algorithm_of(*experiment: str) -> str:
    """The algorithm that an experiment is for; Hydra must have been initialised."""
    from hydra import compose

    return str(compose("config", list(experiment), return_hydra_config=True).hydra.runtime.choices["algorithm"])


def located(words: Sequence[str], folder: Path | None = None) -> list[str]:
    """The same words, but an experiment that is named by its file is one that Hydra finds.

    Args:
        words: settings.
        folder: of a launch, to hold the file for jobs that run elsewhere; ``None``: this process's own.

    Raises:
        UsageError: there is no such file.
    """
    staging = _staging() if folder is None else folder / _STAGED
    found = by_content(words, staging)
    if found == list(words):
        return found
    given = [word for word in found if word.startswith(_PLACES)]
    further = [text for text in (word.partition("=")[2].strip("[] ") for word in given) if text]
    return [
        *(word for word in found if word not in given),
        f"{_PLACES}[{','.join([*further, _quoted(f'file://{staging}')])}]",
    ]


def by_content(words: Sequence[str], staging: Path | None = None) -> list[str]:
    """The same words, but an experiment's file goes by a name that changes with what it holds.

    Raises:
        UsageError: there is no such file.
    """
    found: list[str] = []
    for word in words:
        key, _, name = word.partition("=")
        own = key == "experiment" and name.endswith((".yaml", ".yml"))
        found.append(f"experiment={_staged(name, staging or _staging())}" if own else word)
    return found


def unstaged(words: Sequence[str]) -> list[str]:
    """The same words without the folder in which a process puts experiments' files: it is another one every time."""
    found = []
    for word in words:
        if word.startswith(_PLACES):
            places = word.removeprefix(_PLACES).strip("[] ").split(",")
            places = [place for place in places if not Path(place).name.startswith(_STAGING)]
            if not places:
                continue
            word = f"{_PLACES}[{','.join(places)}]"
        found.append(word)
    return found


def _staged(file: str, staging: Path) -> str:
    """An experiment's file, put where Hydra finds it; the name that it has there."""
    try:
        content = Path(file).expanduser().read_bytes()
    except OSError as error:
        raise UsageError(
            f"experiment={file} cannot be read ({error.strerror}): an experiment is one of {', '.join(options('experiment'))}, "
            "or a file"
        ) from None
    # A name of its own, so that no experiment of locallearn stands for it, and another one when the content changes.
    digest, stem = hashlib.sha256(content).hexdigest()[:8], re.sub(r"[^A-Za-z0-9_]", "_", Path(file).stem)
    staged = staging / "experiment" / f"own_{digest}_{stem}.yaml"
    staged.parent.mkdir(parents=True, exist_ok=True)
    if not staged.is_file():
        staged.write_bytes(content)
    return staged.stem


@cache
def _staging() -> Path:
    """A folder for this process, where Hydra finds experiments that are somebody's own files."""
    folder = tempfile.mkdtemp(prefix=_STAGING)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def check_words(overrides: Sequence[str]) -> None:
    """Refuse words that are no settings."""
    for word in overrides:
        if word.startswith("-"):
            raise UsageError(f"there is no option {word}; see locallearn --help")
        key, equals, value = word.partition("=")
        if not key or not (equals or word.startswith("~")):
            raise UsageError(f"{word!r} is not a setting: write KEY=VALUE, see locallearn --help")
        if key in GROUPS and value in ("?", "", "null"):
            raise UsageError(f"{key} is one of {', '.join(options(key))}")
        if key in GROUPS and value.startswith("["):
            raise UsageError(
                f"{word!r} names a list, and a run has one {key}: several go into compare.algorithms or train -m"
            )


def options(group: str) -> list[str]:
    """Names of a group's choices."""
    from importlib.resources import files

    folder = files("locallearn.conf").joinpath(group)
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def setting_names(cfg: Any, prefix: str = "") -> list[str]:
    """Every key below ``cfg``, dotted."""
    found: list[str] = []
    for key in cfg:
        found.append(f"{prefix}{key}")
        value = cfg._get_node(key)
        if hasattr(value, "keys") and not value._is_none():
            found += setting_names(value, f"{prefix}{key}.")
    return found


def check_types(node: Any, prefix: str = "") -> None:
    """Every value below ``node`` against the signature of what its ``_target_`` makes."""
    from hydra.utils import get_object

    for key in node:
        child = node[key]
        if not isinstance(child, dict):
            continue
        where = f"{prefix}{key}"
        target = child.get("_target_")
        if isinstance(target, str):
            try:
                made = get_object(target)
            except (ImportError, ValueError):
                continue  # making it says what is wrong with the name
            check_arguments(made, {k: v for k, v in child.items() if not k.startswith("_")}, where)
        check_types(child, f"{where}.")


def accepted(target: str, offered: dict[str, Any]) -> dict[str, Any]:
    """Those of the offered arguments that the signature behind a ``_target_`` has."""
    parameters = _parameters(target)
    if parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return offered
    return {key: value for key, value in offered.items() if key in parameters}


def names_argument(target: str, name: str) -> bool:
    """Whether the signature behind a ``_target_`` has an argument of this name."""
    return name in (_parameters(target) or {})


def takes_mapping(target: str, name: str) -> bool:
    """Whether an argument of what a ``_target_`` names is a mapping by its type."""
    from hydra.utils import get_object

    try:
        return "a mapping" in _spoken(hints_of(get_object(target)).get(name))
    except (ImportError, NameError, TypeError, ValueError):
        return False  # somebody else's signature that cannot be read


def _parameters(target: str) -> Mapping[str, Any] | None:
    """The signature behind a ``_target_``; ``None`` where it cannot be read: making it says what is wrong with the name."""
    import inspect

    from hydra.utils import get_object

    try:
        return inspect.signature(get_object(target)).parameters
    except (ImportError, ValueError, TypeError):
        return None


def check_arguments(made: Any, values: dict[str, Any], where: str) -> None:
    """Values against the signature of what they are handed to."""
    import inspect

    try:
        parameters = inspect.signature(made).parameters
        hints = hints_of(made)
    except (NameError, TypeError, ValueError):
        return  # somebody else's signature that cannot be read
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key, value in values.items():
        if key not in parameters and not open_ended:
            names = [name for name in parameters if name not in ("self", "params", "optimizer")]
            raise UsageError(
                f"there is no setting '{where}.{key}'; {where} has {', '.join(names)} (a _target_ of your own wants a YAML of "
                "your own: docs/own-network.md)"
            )
        if key in hints and not isinstance(value, dict) and not _fits(value, hints[key]):
            raise UsageError(f"{where}.{key} is {value!r}, expected {_spoken(hints[key]) or hints[key]}")


def hints_of(made: Any) -> dict[str, Any]:
    """Types of the arguments of a class or function."""
    from typing import get_type_hints

    return get_type_hints(vars(made).get("__init__", made) if isinstance(made, type) else made)


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML can be what a signature asks for; true where that cannot be told."""
    from collections.abc import Iterable
    from types import UnionType
    from typing import Literal, Union, get_args, get_origin

    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in arguments)
    if origin is Literal:
        return value in arguments
    if isinstance(origin, type) and issubclass(origin, Iterable) and not issubclass(origin, dict):
        return isinstance(value, list) and all(_fits(part, arguments[0]) for part in value)
    if hint is float:
        return type(value) in (int, float)
    if hint is Any:
        return True
    if hint in _WORDS:
        return type(value) is hint
    if hint is Path:
        return isinstance(value, str)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _spoken(hint: Any) -> str:
    from typing import Literal, get_args, get_origin

    if hint in _WORDS:
        return _WORDS[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(repr(part) for part in arguments)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping"
    parts = [spoken for spoken in map(_spoken, arguments) if spoken]
    if isinstance(origin, type) and parts and issubclass(origin, Sequence):
        return f"a list, each entry {parts[0]}"
    return " or ".join(dict.fromkeys(parts))


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
        override = parser.parse_override(word)
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
    told = [f"hydra.sweep.dir={_quoted(str(folder))}", *words, "hydra.mode=MULTIRUN"]
    with initialize_config_module("locallearn.conf", job_name="locallearn", version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        try:
            returned = hydra.multirun("config", _Job(job, folder, swept, _process()), told)
        except Exception as error:
            if {path.name for path in folder.iterdir()} <= {"multirun.yaml", _STAGED}:  # nothing has been launched
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


def _quoted(text: str) -> str:
    """A text as Hydra reads it in a word, whatever signs are in it."""
    return "'" + text.replace("'", "\\'") + "'"
