"""``tune.space``: what a search may draw, read from the settings and checked against what they take."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from locallearn.cli.settings import UsageError, hints_of

_DEFAULT: dict[str, Any] = {"optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}}
_RANGE = "{low:NUMBER,high:NUMBER}, with log:true, step:NUMBER or type:int if wanted, or {choices:[VALUE,...]}"
_PLAIN = re.compile(r"[A-Za-z_][\w./-]*")
_NOT_TEXT = ("true", "false", "null", "nan", "inf")


def read_space(given: Any, configs: Sequence[Any]) -> dict[str, Any]:
    """Ranges and choices by setting.

    Args:
        given: ``tune.space``; ``None`` for the learning rate.
        configs: the composed settings of every algorithm: whether a setting takes whole numbers is looked up there.

    Raises:
        UsageError: something that is neither a range nor choices, or does not go with its setting.
    """
    from omegaconf import OmegaConf

    space = OmegaConf.to_container(given, resolve=True) if OmegaConf.is_config(given) else given
    if space is None:
        space = _DEFAULT
    if not isinstance(space, Mapping) or not space:
        raise UsageError(f"tune.space is {space}, expected ranges by setting: {{optimizer.lr:{{low:1e-4,high:1e-2}}}}")
    return {str(key): _part(str(key), part, configs) for key, part in space.items()}


def _part(key: str, part: Any, configs: Sequence[Any]) -> Any:
    from locallearn.study.space import Choices, Range

    where = f"tune.space.{key}"
    if not isinstance(part, Mapping):
        raise UsageError(f"{where} is {part}, expected {_RANGE}")
    try:
        if set(part) == {"choices"} and isinstance(part["choices"], list):
            return Choices(tuple(written(value) for value in part["choices"]))
        if not {"low", "high"} <= set(part) <= {"low", "high", "log", "step", "type"}:
            raise UsageError(f"{where} is {part}, expected {_RANGE}")
        _check_part(where, part)
        whole = _whole(key, part, configs)
        numbers = {name: part[name] for name in ("low", "high", "step") if part.get(name) is not None}
        if whole:
            numbers = {name: int(value) if float(value).is_integer() else value for name, value in numbers.items()}
        return Range(**numbers, log=part.get("log", False), whole=whole)
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
