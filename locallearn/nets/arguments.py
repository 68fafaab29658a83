"""What a network takes and gives: arguments by name with a main one among them, and the tensor that counts in its output."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

_FIRST_CHOICES = ("logits", "out")


class OutputMissing(ValueError):
    """What is asked for of a network's output is not there."""


class Arguments:
    """How a network is called, learned from an example.

    Args:
        net: the network.
        example: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        main: name of the argument that the blocks work on; ``None``: the first tensor.

    Attributes:
        names: of all arguments, the main one first.
        values: the example's by name.

    Raises:
        ValueError: the network's forward does not take these, or no tensor is among them.
    """

    def __init__(self, net: nn.Module, example: Any, main: str | None = None) -> None:
        self._kind = dict if isinstance(example, Mapping) else tuple if isinstance(example, tuple | list) else Tensor
        given = example if isinstance(example, Mapping) else tuple(example) if self._kind is tuple else (example,)
        leading = next(
            (v for v in (given.values() if isinstance(given, Mapping) else given) if isinstance(v, Tensor)), None
        )
        if leading is not None and not leading.numel():
            raise ValueError(f"the example is empty, of shape {tuple(leading.shape)}: give a batch of some samples")
        positional = () if isinstance(given, Mapping) else given
        keywords = dict(given) if isinstance(given, Mapping) else {}
        owner = type(net).__name__
        signature = inspect.signature(net.forward)
        try:
            signature.bind(*positional, **keywords)
        except TypeError as error:
            raise ValueError(
                f"the forward of {owner} takes {signature}, and the example does not fit it: {error}; give a tensor, a tuple "
                "of all that it takes, or a dict by name"
            ) from error
        if isinstance(given, Mapping):
            self._order = [str(name) for name in given]
            found = {str(name): value for name, value in given.items()}
        else:
            named = [
                p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
            ]
            self._order = [named[i] if i < len(named) else f"argument{i}" for i in range(len(given))]
            found = dict(zip(self._order, given, strict=True))
        tensors = [name for name, value in found.items() if isinstance(value, Tensor)]
        if not tensors:
            raise ValueError(
                f"the example has no tensor, only {', '.join(type(v).__name__ for v in found.values()) or 'nothing'}"
            )
        if main is not None and main not in tensors:
            raise ValueError(f"input is {main!r}, which is no tensor of the example; it has {', '.join(tensors)}")
        first = main or tensors[0]
        self.names = [first, *(name for name in self._order if name != first)]
        self.values = {name: found[name] for name in self.names}

    def by_name(self, given: Any) -> dict[str, Any]:
        """Inputs that are given as the example was, by name.

        Raises:
            ValueError: they are given otherwise, or what is no tensor is another thing than in the example.
        """
        if self._kind is Tensor:
            values: dict[str, Any] = {self._order[0]: given}
        elif self._kind is tuple:
            if not isinstance(given, tuple | list) or len(given) != len(self._order):
                raise ValueError(f"inputs are a {type(given).__name__}, expected a tuple of {', '.join(self._order)}")
            values = dict(zip(self._order, given, strict=True))
        else:
            if not isinstance(given, Mapping) or set(given) != set(self._order):
                told = ", ".join(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
                raise ValueError(f"inputs are {told}, expected a dict of {', '.join(self._order)}, as the example was")
            values = dict(given)
        for name, known in self.values.items():
            if isinstance(known, Tensor) is not isinstance(values[name], Tensor):
                raise ValueError(
                    f"input {name!r} is a {type(values[name]).__name__}, and a {type(known).__name__} in the example that the "
                    "network was cut with"
                )
            if not isinstance(known, Tensor) and known is not values[name] and known != values[name]:
                raise ValueError(
                    f"input {name!r} is {values[name]!r}, and was {known!r} in the example that the network was cut with: cut "
                    "it again"
                )
        return {name: values[name] for name in self.names}

    def unlike(self, values: Mapping[str, Any]) -> str | None:
        """How tensors differ from the example's in dtype, device or the shape of a sample; ``None``: not at all.

        A network may well take others (larger images, longer texts), so this is for telling why something failed.
        """
        for name, known in self.values.items():
            value = values[name]
            if not isinstance(known, Tensor):
                continue
            pairs = ((tuple(value.shape), tuple(known.shape)), (value.dtype, known.dtype), (value.device, known.device))
            (shape, wanted), *rest = pairs
            if shape[1:] == wanted[1:] and len(shape) == len(wanted) and all(a == b for a, b in rest):
                continue
            what = "inputs are" if self._kind is Tensor else f"input {name!r} is"
            return (
                f"{what} {_told(value, known.device)}, and the example that the network was cut with "
                f"{_told(known, value.device)}"
            )
        return None

    def call(self, run: Callable[..., Any], values: Mapping[str, Any]) -> Any:
        """Run a forward on arguments by name."""
        if self._kind is dict:
            return run(**{name: values[name] for name in self._order})
        return run(*(values[name] for name in self._order))


def _told(tensor: Tensor, other: torch.device) -> str:
    where = "" if tensor.device == other else f" on {tensor.device}"
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}{where}"


class Output:
    """Picks the tensor that counts of what a network gives, and knows where it had to guess.

    Args:
        key: name or place; ``None``: ``logits``, else ``out``, else the first tensor. Where the output is a tensor, itself.
        owner: class of the network, for messages.

    Attributes:
        guess: what was given and that the first tensor of it was taken; ``None``: there was no other, or it was said which.
    """

    def __init__(self, key: str | int | None, owner: str) -> None:
        self.key, self.owner = key, owner
        self.guess: str | None = None
        self._plainly = False  # whether there are several without looking into what is nested

    def __call__(self, output: Any) -> Any:
        """The tensor that counts in a tensor, mapping, dataclass, named tuple, tuple or list; symbols of a trace, too.

        Raises:
            OutputMissing: nothing goes by the key, or there is no tensor.
        """
        return self._picked(output, self.key, self.key is None)

    def warn(self, unused: Sequence[str] | None = None) -> None:
        """Warn where one of several tensors was taken for no reason but its place.

        Args:
            unused: names of parameters that this one does not depend on; ``None``: not known. Where there are some, a tensor
                that lies deeper (a state beside the outputs) counts as another, too.
        """
        if self.guess is None or not (self._plainly or unused):
            return
        beside = ""
        if unused:
            more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
            beside = f", and nothing trains {unused[0]!r}{more}, on which it does not depend"
        warnings.warn(f"{self.guess}{beside}: say which one is with output=", stacklevel=3)

    def _picked(self, output: Any, key: str | int | None, guesses: bool) -> Any:
        value = output.tracer.value(output.node) if isinstance(output, fx.Proxy) else output  # type: ignore[attr-defined]
        if isinstance(value, Tensor | fx.Proxy):
            return output
        names = _names(value)
        if names is None:
            raise OutputMissing(
                f"the output of {self.owner} is a {type(value).__name__}, in which there is no tensor to learn from"
            )
        if key is not None:
            name: Any = key
            if isinstance(key, int) and names and isinstance(names[0], str):
                name = names[key] if -len(names) <= key < len(names) else key
            elif isinstance(key, int) and -len(names) <= key < 0:
                name = names[key]
            if name not in names:
                raise OutputMissing(f"output is {key!r}, and {self.owner} gives {', '.join(map(str, names))}")
            return self._picked(_part(output, value, name), None, False)
        order = [name for name in _FIRST_CHOICES if name in names] or names
        if order is names and guesses:
            self._note(value, names)
        for name in order:
            part = _part(value, value, name)
            if part is not None and (isinstance(part, Tensor | fx.Proxy) or _names(part)):
                return self._picked(_part(output, value, name), None, False)
        raise OutputMissing(f"the output of {self.owner} has no tensor, only {', '.join(map(str, names)) or 'nothing'}")

    def _note(self, value: Any, names: Sequence[Any]) -> None:
        several = [name for name in names if isinstance(_part(value, value, name), Tensor | fx.Proxy)]
        held = sum(isinstance(leaf, Tensor | fx.Proxy) for name in names for leaf in _leaves(_part(value, value, name)))
        if held < 2:
            return
        self._plainly |= len(several) > 1
        called = ", ".join(several) if several and isinstance(several[0], str) else None
        what = called if called and len(several) > 1 else f"a {type(value).__name__} with {held} tensors"
        self.guess = f"{self.owner} gives {what}, of which the first is taken for its output"


def _leaves(value: Any) -> list[Any]:
    """What is no container, in all that is nested."""
    names = None if isinstance(value, Tensor | fx.Proxy) else _names(value)
    return [value] if names is None else [leaf for name in names for leaf in _leaves(_part(value, value, name))]


def _names(value: Any) -> list[Any] | None:
    if isinstance(value, Mapping):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [field.name for field in dataclasses.fields(value)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(value._fields)
    return list(range(len(value))) if isinstance(value, tuple | list) and not isinstance(value, torch.Size) else None


def _part(output: Any, value: Any, name: Any) -> Any:
    return output[name] if isinstance(value, Mapping) or isinstance(name, int) else getattr(output, name)
