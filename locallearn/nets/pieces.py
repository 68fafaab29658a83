"""Pieces of a network: what its forward does between two borders, run as the forward runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.nets.border import Border
from locallearn.nets.trace import lookup


class Slot(NamedTuple):
    """Stands for a value that an earlier step has made."""

    number: int


class Step(NamedTuple):
    """One operation of a piece.

    Attributes:
        kind: ``module``, ``method``, ``function``, ``functional`` or ``attribute``.
        target: path of a module or tensor, name of a method or of a function in ``torch.nn.functional`` (some of which cannot
            be pickled), or the function itself.
        args: constants and slots, nested as in the call.
        kwargs: the same.
        result: slot of what it gives.
        done: slots that nothing reads later.
    """

    kind: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: int
    done: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """What a piece does in one mode.

    Attributes:
        takes_main: slot of the main tensor that comes in, where it is read.
        takes: slots of what is carried in, by name.
        context: slots of the batch's context, by place in it.
        steps: in the order of the forward.
        size: number of slots.
        gives: slot of the main output.
        carries: slots of what is carried out, by name.
    """

    takes_main: int | None
    takes: Mapping[str, int]
    context: Mapping[int, int]
    steps: tuple[Step, ...]
    size: int
    gives: int
    carries: Mapping[str, int]

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self  # nothing in it changes


def kind_of(module: nn.Module) -> str:
    """What a module is called in messages: operations that a network does between its modules have no class of its own."""
    if isinstance(module, Piece):
        return "step that is no module of its own (F.relu or +, say: nn.ReLU() is one)"
    return type(module).__name__


class _Level(nn.Module):
    """Holds tensors of the network: moved, each is still the network's own, as PyTorch has it with parameters.

    Attributes:
        read: where in the network they are, by their names here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[str, str] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Level:
        held = {name: self._buffers[name] for name in self.read}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in held.items():
            moved = self._buffers[name]
            if buffer is None or moved is None or moved is buffer:
                continue
            # As PyTorch asks of parameters: no tensor takes the place of one without memory (meta).
            if torch._has_compatible_shallow_copy_type(buffer, moved):
                buffer.data = moved
                self._buffers[name] = buffer
        return self


class Piece(_Level):
    """A part of somebody's network between two borders. It holds the network's own modules and parameters, under their paths.

    Input and output are a tensor, or a :class:`~locallearn.nets.border.Border` where several tensors cross. Training and
    evaluation run what the network's forward does in that mode.

    Args:
        root: the network.
        programs: what to do, by ``training``.
        constants: tensors that the forward holds beside parameters and buffers, by name.
    """

    def __init__(self, root: nn.Module, programs: Mapping[bool, Program], constants: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.programs = dict(programs)
        for program in programs.values():
            for step in program.steps:
                if step.kind == "module":
                    _put(self, step.target, root.get_submodule(step.target), root)
                elif step.kind == "attribute" and step.target in constants:
                    self.register_buffer(step.target, constants[step.target], persistent=False)
                    owner = _attribute(root, constants[step.target])
                    if owner is not None:  # else the forward has it from elsewhere, a cache of all devices, say
                        self.read[step.target] = owner
                elif step.kind == "attribute":
                    _put(self, step.target, lookup(root, step.target, {}), root)
        self.training = root.training

    def forward(self, given: Any, *context: Any) -> Any:
        """Run the steps.

        Raises:
            ValueError: the piece before was in another mode, in which it hands over something else.
        """
        program = self.programs[self.training]
        values: list[Any] = [None] * program.size
        carried: Mapping[str, Any] = {}
        if isinstance(given, Border):
            given, carried = given
        if program.takes_main is not None:
            values[program.takes_main] = given
        del given
        for name, number in program.takes.items():
            if name not in carried:
                raise ValueError(
                    f"this piece reads {name!r} from the one before, which does not hand it over in its mode: parts of this "
                    "network cannot train while others are frozen, because its forward differs between both modes"
                )
            values[number] = carried[name]
        for place, number in program.context.items():
            if place >= len(context):
                raise ValueError(
                    f"this network was cut for inputs with {place + 1} more beside the main one, and got {len(context)}"
                )
            values[number] = context[place]
        for kind, target, args, kwargs, result, done in program.steps:
            if kind == "module":
                values[result] = self._at(target)(*_filled(args, values), **_filled(kwargs, values))
            elif kind == "function":
                values[result] = target(*_filled(args, values), **_filled(kwargs, values))
            elif kind == "functional":
                values[result] = getattr(F, target)(*_filled(args, values), **_filled(kwargs, values))
            elif kind == "method":
                first, *others = _filled(args, values)
                values[result] = getattr(first, target)(*others, **_filled(kwargs, values))
                del first, others
            else:
                values[result] = self._at(target)
            for number in done:
                values[number] = None
        if not program.carries:
            return values[program.gives]
        return Border(values[program.gives], {name: values[number] for name, number in program.carries.items()})

    def _at(self, path: str) -> Any:
        value: Any = self
        for part in path.split("."):
            value = getattr(value, part)
        return value

    def renew(self, root: nn.Module, others: bool) -> None:
        """Hold the network's own tensors again: whoever moves the network alone puts new ones in the place of its buffers.

        Args:
            root: the network.
            others: those with other values, too.
        """
        owners = dict(root.named_modules())
        for level in _levels(self):
            for name, path in level.read.items():
                parent, _, attribute = path.rpartition(".")
                held, own = level._buffers[name], getattr(owners.get(parent), attribute, None)
                if held is own or held is None or not isinstance(own, Tensor) or isinstance(own, nn.Parameter):
                    continue
                if others or torch.equal(held.to(own), own):
                    level._buffers[name] = own

    def extra_repr(self) -> str:
        """What is done between the modules."""
        between = [
            step.target if isinstance(step.target, str) else getattr(step.target, "__name__", str(step.target))
            for step in self.programs[self.training].steps
            if step.kind != "module"
        ]
        return f"between: {', '.join(between)}" if between else ""


class _Holder(_Level):
    """A level of the network's own tree, so that names of parameters stay."""


def piece(
    root: nn.Module, programs: Mapping[bool, Program], constants: Mapping[str, Tensor], alone: bool
) -> Piece | nn.Sequential:
    """A piece; where it does nothing but run modules one after another, an ``nn.Sequential`` under the same names.

    So rules that look at a block's modules (PEPITA, counter-current learning) see them.

    Args:
        root: the network.
        programs: what to do, by ``training``.
        constants: see :class:`Piece`.
        alone: whether the network has no other input than the main one; an ``nn.Sequential`` can be handed no more.
    """
    chains = [_chain(program) for program in programs.values()]
    paths = chains[0]
    if not alone or paths is None or any(other != paths for other in chains):
        return Piece(root, programs, constants)
    if any(hasattr(nn.Sequential, part) for path in paths for part in path.split(".")):
        return Piece(root, programs, constants)  # a module called "pop" can be no member of an nn.Sequential
    sequence = nn.Sequential()
    for path in paths:
        *parents, name = path.split(".")
        level = sequence
        for parent in parents:
            if parent not in level._modules:
                level.add_module(parent, nn.Sequential())
            inner = level._modules[parent]
            assert isinstance(inner, nn.Sequential)  # no path goes through a module that is run as a whole, see _chain
            level = inner
        level.add_module(name, root.get_submodule(path))
    sequence.training = root.training
    return sequence


def _chain(program: Program) -> list[str] | None:
    """Paths of the modules that a program runs one after another; ``None``: it does more, or in no order of a tree."""
    if program.takes_main is None or program.takes or program.context or program.carries or not program.steps:
        return None
    value, paths = program.takes_main, list[str]()
    for step in program.steps:
        if step.kind != "module" or step.kwargs or step.args != (Slot(value),):
            return None
        value = step.result
        paths.append(step.target)
    if value != program.gives or len({*paths}) != len(paths):
        return None
    return paths if _in_tree_order(paths) else None


def _in_tree_order(paths: Sequence[str]) -> bool:
    """Whether a walk through the tree of these paths meets them in this order, each as a leaf."""
    left: list[str] = []  # levels that the walk has come back from
    for before, path in pairwise(paths):
        if path.startswith(f"{before}.") or before.startswith(f"{path}."):
            return False
        parents = [f"{before[:i]}." for i, letter in enumerate(before) if letter == "."]
        left += [level for level in parents if not path.startswith(level)]
        if any(path.startswith(level) for level in left):
            return False
    return True


def _put(piece: Piece, path: str, value: Any, root: nn.Module) -> None:
    *parents, name = path.split(".")
    place: _Level = piece
    for parent in parents:
        if parent not in place._modules:
            place.add_module(parent, _Holder())
        inner = place._modules[parent]
        assert inner is not None
        if not isinstance(inner, _Holder):
            return  # a module that is held as a whole
        place = inner
    if isinstance(value, nn.Module):
        place.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        place.register_parameter(name, value)
    else:
        owner = root.get_submodule(".".join(parents))
        place.register_buffer(name, value, persistent=name not in owner._non_persistent_buffers_set)
        place.read[name] = path


def _levels(level: _Level) -> Iterator[_Level]:
    yield level
    for inner in level._modules.values():
        if isinstance(inner, _Holder):
            yield from _levels(inner)


def _attribute(root: nn.Module, tensor: Tensor) -> str | None:
    """The path of a tensor that is a plain attribute."""
    paths = (
        f"{path}.{name}".lstrip(".")
        for path, module in root.named_modules()
        for name, value in vars(module).items()
        if value is tensor
    )
    return next(paths, None)


def _filled(spec: Any, values: Sequence[Any]) -> Any:
    """Arguments with values in the place of slots."""
    kind = type(spec)
    if kind is Slot:
        return values[spec.number]
    if kind is tuple:
        return tuple([_filled(part, values) for part in spec])
    if kind is dict:
        return {key: _filled(part, values) for key, part in spec.items()} if spec else spec
    if kind is list:
        return [_filled(part, values) for part in spec]
    if kind is slice:
        return slice(*(_filled(part, values) for part in (spec.start, spec.stop, spec.step)))
    return spec
