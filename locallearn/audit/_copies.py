"""Copies that the original cannot be reached from: an audit works on nothing else."""

from __future__ import annotations

import copy
import types
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from locallearn.algorithms.base import Algorithm

_LARGEST = 200_000  # objects that are looked at


class Unfollowable(Exception):
    """Something about a rule that an audit cannot look into; the sentence names it."""


def duplicate(algorithm: Algorithm) -> Algorithm:
    """A deep copy that takes along what :func:`copy.deepcopy` leaves behind.

    A function made inside another one keeps what it read there, and so do its defaults; a weak reference points to the
    original; a generator cannot be copied; hooks of a parameter are lost. All of these lead to the copy's own parts here.

    Raises:
        Unfollowable: it cannot be copied, or the copy is not like the original.
    """
    memo: dict[int, Any] = {}
    dispatch = cast(dict[type, Any], copy._deepcopy_dispatch)  # type: ignore[attr-defined]
    own = {types.FunctionType: _function, weakref.ref: _weak, types.ModuleType: _itself, torch.Generator: _generator}
    with mock.patch.dict(dispatch, own):
        try:
            twin = copy.deepcopy(algorithm, memo)
            for tensor in [t for t in held_tensors(algorithm).values() if id(t) in memo]:
                _carry_hooks(tensor, memo[id(tensor)], memo)
        except Exception as error:
            raise Unfollowable(f"it cannot be copied ({error}), and the audit works on copies only") from error
    shared = _shared_memory(algorithm)
    if shared:
        raise Unfollowable(shared)
    difference = _difference(algorithm, twin)
    if difference:
        raise Unfollowable(f"its copy is not like the original: {difference}")
    return twin


def held_tensors(root: Any) -> dict[str, Tensor]:
    """Every tensor that can be reached from an object, by a path that says how: through attributes, containers, closures."""
    return {path: value for path, value in _held(root) if isinstance(value, Tensor)}


def _held(root: Any) -> Iterator[tuple[str, Any]]:
    """Tensors and NumPy arrays that can be reached, with paths."""
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [("", root)]
    while stack and len(seen) < _LARGEST:
        path, value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (Tensor, np.ndarray)):
            yield path or "tensor", value
        else:
            stack.extend((f"{path}.{name}" if path else name, part) for name, part in _parts(value))


def _shared_memory(algorithm: Algorithm) -> str:
    """A NumPy array that is a window on a weight, which a copy loses; empty: there is none."""
    held = list(_held(algorithm))
    spans = []
    for path, value in held:
        if isinstance(value, Tensor) and value.device.type == "cpu" and value.layout is torch.strided:
            storage = value.untyped_storage()
            spans.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes(), path))
    for path, value in held:
        if isinstance(value, np.ndarray) and value.size:
            at = value.__array_interface__["data"][0]
            for start, stop, tensor in spans:
                if start <= at < stop:
                    return f"the NumPy array {path!r} shares its memory with {tensor!r}, which a copy cannot keep up"
    return ""


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds, one step deep, with names; classes and modules of code are not entered."""
    if isinstance(value, Mapping):
        yield from ((str(key), part) for key, part in value.items())
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((str(i), part) for i, part in enumerate(value))
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield name, cell.cell_contents
            except ValueError:  # not filled yet
                continue
        yield from (("default", part) for part in value.__defaults__ or ())
        yield from (value.__kwdefaults__ or {}).items()
    elif isinstance(value, types.MethodType):
        yield "self", value.__self__
    elif isinstance(value, weakref.ref):
        yield "target", value()
    elif not isinstance(value, (type, types.ModuleType, str, bytes, int, float, complex)):
        if hasattr(value, "func") and hasattr(value, "keywords"):  # functools.partial
            yield from (("function", value.func), ("arguments", value.args), ("keywords", value.keywords))
        if isinstance(value, nn.Module):
            for kind in ("_parameters", "_buffers", "_modules"):
                yield from ((name, part) for name, part in vars(value)[kind].items() if part is not None)
            yield from ((n, p) for n, p in vars(value).items() if n not in ("_parameters", "_buffers", "_modules"))
        elif hasattr(value, "__dict__"):
            yield from vars(value).items()
        for cls in type(value).__mro__:
            names = vars(cls).get("__slots__", ())
            for name in (names,) if isinstance(names, str) else names:
                part = getattr(value, name, None)
                if part is not None:
                    yield name, part


def _itself(value: Any, memo: dict[int, Any]) -> Any:
    return value


def _weak(reference: weakref.ref[Any], memo: dict[int, Any]) -> weakref.ref[Any]:
    target = reference()
    return reference if target is None else weakref.ref(copy.deepcopy(target, memo))


def _generator(generator: torch.Generator, memo: dict[int, Any]) -> torch.Generator:
    twin = torch.Generator(device=generator.device)
    twin.set_state(generator.get_state())
    memo[id(generator)] = twin
    return twin


def _function(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    """A function that reads the copy's parts where this one reads the original's."""
    if function.__closure__ is None and not function.__defaults__ and not function.__kwdefaults__:
        return function
    cells = tuple(types.CellType() for _ in function.__closure__ or ())
    twin = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, cells or None)
    memo[id(function)] = twin  # before its cells are filled: a function may read itself
    for cell, old in zip(cells, function.__closure__ or (), strict=True):
        try:
            cell.cell_contents = copy.deepcopy(old.cell_contents, memo)
        except ValueError:  # not filled yet
            continue
    twin.__defaults__ = copy.deepcopy(function.__defaults__, memo)
    twin.__kwdefaults__ = copy.deepcopy(function.__kwdefaults__, memo)
    twin.__qualname__, twin.__module__, twin.__doc__ = function.__qualname__, function.__module__, function.__doc__
    twin.__dict__.update(function.__dict__)
    return twin


def _carry_hooks(original: Tensor, twin: Tensor, memo: dict[int, Any]) -> None:
    """Hooks of a parameter, which its copy comes without."""
    for kind, register in (
        ("_backward_hooks", twin.register_hook),
        ("_post_accumulate_grad_hooks", twin.register_post_accumulate_grad_hook),
    ):
        if not getattr(twin, kind, None):
            for hook in (getattr(original, kind, None) or {}).values():
                register(copy.deepcopy(hook, memo))  # type: ignore[no-untyped-call]


def _difference(original: nn.Module, twin: nn.Module) -> str:
    """What tells a copy from the original, from the outside; empty: nothing does."""
    ours, theirs = dict(original.named_modules()), dict(twin.named_modules())
    if ours.keys() != theirs.keys():
        return f"it has other modules ({', '.join(sorted(ours.keys() ^ theirs.keys()))})"
    for path, module in ours.items():
        other, name = theirs[path], path or "the rule"
        if type(module) is not type(other):
            return f"{name} is a {type(other).__name__} instead of a {type(module).__name__}"
        mine, its = vars(module), vars(other)
        for key in mine.keys() | its.keys():
            simple = isinstance(mine.get(key), (bool, int, float, str)) or isinstance(
                its.get(key), (bool, int, float, str)
            )
            a, b = mine.get(key), its.get(key)
            if simple and (type(a) is not type(b) or (a != b and a == a)):
                return f"{key!r} of {name} is {b!r} instead of {a!r}"
    copied = twin.state_dict()
    for key, value in original.state_dict().items():
        if isinstance(value, Tensor) and not _same_bits(value, copied.get(key)):
            return f"{key!r} has other values"
    return ""


def _same_bits(one: Tensor, other: Any) -> bool:
    if not isinstance(other, Tensor) or one.shape != other.shape or one.dtype is not other.dtype:
        return False
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())
