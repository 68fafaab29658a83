"""What a search may draw, from ``tune.space`` or ``conf/tune``, read and checked against what the settings take."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from locallearn.cli.settings import UsageError, hints_of, located
from locallearn.records._settings import OF_COMMANDS, OF_MEASURING, OF_PLACES, OF_THE_RUN, PLACES_WITHIN, group_of

_DEFAULT: dict[str, Any] = {"optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}}
_RANGE = (
    "{low:NUMBER,high:NUMBER}, with log:true, step:NUMBER or type:int if wanted, or {choices:[VALUE,...]}, either with "
    "when:{SETTING:VALUE} if wanted"
)
_PLAIN = re.compile(r"[A-Za-z_][\w./-]*")
_NOT_TEXT = ("true", "false", "null", "nan", "inf")


def space_of(
    algorithm: str, given: Any, words: Sequence[str], configs: Sequence[Any], choices: Mapping[str, str]
) -> dict[str, Any]:
    """The space of one algorithm: ``tune.space``, else that of ``conf/tune`` in its name.

    Args:
        algorithm: its name.
        given: ``tune.space``.
        words: the settings as they were typed: they may name further folders with a ``tune`` folder in them.
        configs: composed settings, the algorithm's own first; see :func:`read_space`.
        choices: names chosen in the groups of settings.

    Raises:
        UsageError: see :func:`read_space`.
    """
    if given is not None:
        return read_space(given, configs, choices)
    own = _file(algorithm, words)
    space = {**(_file("default", words) or _DEFAULT), **(own or {})}
    return read_space({key: part for key, part in space.items() if part is not None}, configs, choices, of=algorithm)


def _file(name: str, words: Sequence[str]) -> dict[str, Any] | None:
    """What stands in ``tune/NAME.yaml``, here or in a folder that the settings name."""
    from hydra import compose, initialize_config_module
    from hydra.errors import MissingConfigException
    from omegaconf import OmegaConf

    places = [word for word in located(words) if word.startswith("hydra.searchpath=")]
    with initialize_config_module("locallearn.conf", version_base="1.3"):
        try:
            found = compose("config", [*places, f"+tune@found={name}"]).found
        except MissingConfigException:
            return None
    space: Any = OmegaConf.to_container(found, resolve=True)
    return dict(space)


def read_space(
    given: Any, configs: Sequence[Any], choices: Mapping[str, str] | None = None, of: str | None = None
) -> dict[str, Any]:
    """Ranges and choices by setting.

    Conditions on settings that are not searched are those of the settings as they are: what does not hold is left out. Of a
    list the first entry counts whose conditions hold.

    Args:
        given: ``tune.space``; ``None`` for the learning rate.
        configs: the composed settings, the algorithm's own first: whether a setting takes whole numbers is looked up there.
        choices: names chosen in the groups of settings.
        of: the algorithm whose file this is; ``None``: it was typed.

    Raises:
        UsageError: something that is neither a range nor choices, or does not go with its setting, or a setting that is the
            same in all trials.
    """
    from omegaconf import OmegaConf

    where = "tune.space" if of is None else f"tune/{of}.yaml"
    space = OmegaConf.to_container(given, resolve=True) if OmegaConf.is_config(given) else given
    if space is None:
        space = _DEFAULT
    if not isinstance(space, Mapping) or not space:
        raise UsageError(f"{where} is {space}, expected ranges by setting: {{optimizer.lr:{{low:1e-4,high:1e-2}}}}")
    found: dict[str, Any] = {}
    for key, parts in space.items():
        name = str(key)
        _check_key(f"{where}.{name}", name)
        several = parts if isinstance(parts, list) else [parts]
        kept = [
            (part, when)
            for part, when in ((part, _when(f"{where}.{name}", part)) for part in several)
            if all(_is(parent, values, configs, choices or {}) for parent, values in when if parent not in space)
        ]
        if len(several) > 1 and any(parent in space for _, when in kept for parent, _ in when):
            raise UsageError(
                f"{where}.{name} is a list, of which the first counts whose conditions hold: they cannot be on what is "
                "searched, too"
            )
        for part, when in kept[:1]:
            searched = tuple((parent, values) for parent, values in when if parent in space)
            found[name] = _part(f"{where}.{name}", name, part, configs, searched)
    if not found:
        raise UsageError(f"{where} has nothing to search with these settings: none of its conditions holds")
    return found


def _check_key(where: str, key: str) -> None:
    """Refuse what would be drawn without effect, or is no trial's own."""
    group = group_of(key)
    if group == "seed":
        raise UsageError(f"{where}: seeds of trials are tune.seeds")
    if group == "algorithm" and "." not in key:  # an arm would be trained as another one
        raise UsageError(f"{where}: algorithms to tune are tune.algorithms")
    if group in (*OF_COMMANDS, *OF_PLACES, *OF_MEASURING, "hydra") or key.lstrip("+~") in PLACES_WITHIN:
        others = ", ".join(name for name in OF_THE_RUN if name != "seed")
        raise UsageError(f"{where} is the same in all trials; a search draws settings of {others}")


def _when(where: str, part: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The conditions of a part."""
    if not isinstance(part, Mapping) or "when" not in part:
        return ()
    when = part["when"]
    if not isinstance(when, Mapping) or not when:
        raise UsageError(f"{where}.when is {when}, expected settings with a value or a list of them: {{optimizer:sgd}}")
    try:
        return tuple(
            (str(parent), tuple(map(written, values if isinstance(values, list) else [values])))
            for parent, values in when.items()
        )
    except ValueError as error:
        raise UsageError(f"{where}.when: {error}") from None


def _is(parent: str, values: Sequence[str], configs: Sequence[Any], choices: Mapping[str, str]) -> bool:
    """Whether a setting that is not searched has one of these values."""
    from omegaconf import OmegaConf

    if parent in choices:
        return choices[parent] in values
    if not configs:
        return False
    try:
        value = OmegaConf.select(configs[0], parent)
        return written(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value) in values
    except Exception:  # no such setting
        return False


def _part(
    where: str, key: str, part: Any, configs: Sequence[Any], when: tuple[tuple[str, tuple[str, ...]], ...]
) -> Any:
    from locallearn.study.space import Choices, Range

    if not isinstance(part, Mapping):
        raise UsageError(f"{where} is {part}, expected {_RANGE}")
    try:
        if "choices" in part and set(part) <= {"choices", "when"} and isinstance(part["choices"], list):
            return Choices(tuple(written(value) for value in part["choices"]), when)
        if not {"low", "high"} <= set(part) <= {"low", "high", "log", "step", "type", "when"}:
            raise UsageError(f"{where} is {part}, expected {_RANGE}")
        _check_part(where, part)
        whole = _whole(key, part, configs)
        numbers = {name: part[name] for name in ("low", "high", "step") if part.get(name) is not None}
        if whole:
            numbers = {name: int(value) if float(value).is_integer() else value for name, value in numbers.items()}
        return Range(**numbers, log=part.get("log", False), whole=whole, when=when)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None


def _check_part(where: str, part: Mapping[str, Any]) -> None:
    for name in ("low", "high", "step"):
        value = part.get(name)
        if type(value) not in (int, float) and not (name == "step" and value is None):
            raise UsageError(f"{where}.{name} is {value!r}, expected a number")
    if type(part.get("log", False)) is not bool:
        raise UsageError(f"{where}.log is {part['log']!r}, expected true or false")
    if part.get("type", "int") not in ("int", "float"):
        raise UsageError(f"{where}.type is {part['type']!r}, expected int or float")


def _whole(key: str, part: Mapping[str, Any], configs: Sequence[Any]) -> bool:
    """Whether whole numbers are drawn: as ``type`` says, else as the setting takes them, else as they are written."""
    if "type" in part:
        return bool(part["type"] == "int")
    for config in configs:
        known = _takes_whole(config, key)
        if known is not None:
            return known
    return all(type(part.get(name, 0)) is int for name in ("low", "high", "step"))


def _takes_whole(config: Any, key: str) -> bool | None:
    """Whether a setting takes whole numbers only, from the signature of what it is for, else from its present value."""
    from typing import get_args

    from hydra.utils import get_object
    from omegaconf import OmegaConf

    parent, _, name = key.rpartition(".")
    try:
        node = OmegaConf.select(config, parent) if parent else config
        values: Any = OmegaConf.to_container(node, resolve=True)
        value, target = values[name], values.get("_target_")
    except Exception:  # no such setting here; composing the settings says so
        return None
    try:
        hint = hints_of(get_object(target)).get(name) if isinstance(target, str) else None
    except (ImportError, ValueError, NameError, TypeError):
        hint = None
    kinds = {kind for kind in (hint, *get_args(hint)) if kind in (int, float)} or {type(value)}
    return False if float in kinds else True if int in kinds else None


def written(value: Any) -> str:
    """A value from YAML as it stands behind the equals sign of a setting, to be read as the same value again."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is no number to choose")
        return repr(value)
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) and value.lower() not in _NOT_TEXT else quoted(value)
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{written(entry)}' for key, entry in value.items())}}}"
    raise ValueError(f"{value!r} is nothing to choose")


def quoted(text: str) -> str:
    """A text in quotation marks, as Hydra reads them."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.double).with_quotes()
