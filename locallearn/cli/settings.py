"""Settings: composed by Hydra, and checked against the signatures of what they make."""

from __future__ import annotations

import atexit
import hashlib
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
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

PLACES = "hydra.searchpath="
_STAGING = "locallearn-"  # how the name of a folder of experiments' files begins
STAGED = f"{_STAGING}experiments"  # that of a launch


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
    places = [word for word in overrides if word.startswith(PLACES)]
    _check_places(places)
    with initialize_config_module("locallearn.conf", version_base="1.3"):
        try:
            cfg = compose("config", list(overrides), return_hydra_config=True)
        except HydraException as error:
            error.overrides = overrides  # type: ignore[attr-defined]  # a compared algorithm has its own
            raise
        choices = {group: str(name) for group, name in cfg.hydra.runtime.choices.items() if group in GROUPS}
        chosen = experiment and any(word.startswith("algorithm=") for word in of_algorithm)
        if chosen and _algorithm_of(*experiment, *places) != choices["algorithm"]:
            cfg.algorithm = compose("config", [*of_algorithm, *places]).algorithm
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, choices


def _listed(word: str) -> list[str]:
    """The places that a search path names."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    places = OverridesParser.create().parse_override(word).value()
    return [str(place) for place in (places if isinstance(places, list) else [places])]


def _search_path(places: Sequence[str]) -> str:
    """The word that names these places."""
    named = [place if re.fullmatch(r"[\w:/.~-]+", place) else quoted(place) for place in places]
    return f"{PLACES}[{','.join(named)}]"


def _check_places(words: Sequence[str]) -> None:
    """Hydra only warns of a folder that is not there, and then knows nothing of what would be in it.

    Raises:
        UsageError: names the folder.
    """
    for word in words:
        for place in _listed(word):
            path = place.removeprefix("file://")
            if path and "://" not in path and "$" not in path and not Path(path).is_dir():
                raise UsageError(f"there is no folder {path} to look for settings in (hydra.searchpath)")


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
    staging = _staging() if folder is None else folder / STAGED
    found = by_content(words, staging)
    if found == list(words):
        return found
    given = [word for word in found if word.startswith(PLACES)]
    further = [place for word in given for place in _listed(word)]
    return [*(word for word in found if word not in given), _search_path([*further, f"file://{staging}"])]


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
        if word.startswith(PLACES):
            places = [place for place in _listed(word) if not Path(place).name.startswith(_STAGING)]
            if not places:
                continue
            word = _search_path(places)
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


def quoted(text: str) -> str:
    """A text as Hydra reads it in a word, whatever signs are in it."""
    return "'" + text.replace("'", "\\'") + "'"
