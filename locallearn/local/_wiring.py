"""Whether a network still runs what it was cut into: blocks know nothing of what is exchanged in it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack
from operator import is_
from types import MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from locallearn.nets.cut import Cut
from locallearn.nets.pieces import Piece
from locallearn.nets.trace import preserved

Change = tuple[Any, str]
"""What stood there, and what it is called."""


class Wiring:
    """What a network was made of when it was cut.

    What it holds beside what runs (a probe, a copy of averaged weights) is nobody's business. So where anything is another
    than it was, network and blocks are both run on the example and compared, outputs and gradients; and what is new in the
    network must not run in it, though it may do nothing today (a wrapper that is switched on later).

    Args:
        net: the network.
        cut: its pieces.
    """

    def __init__(self, net: nn.Module, cut: Cut) -> None:
        self._net, self._cut = net, cut
        self._had = list(net.modules())
        self._written: set[str] = set()  # attributes that its own pass changes
        self._look()

    def refuse_changes(self, known: Callable[[], set[int]]) -> None:
        """Compare it with the network as it is.

        Args:
            known: gives identities of the parameters that optimizers have, and of those that rest; asked where something has
                changed, which is hardly ever.

        Raises:
            ValueError: the network runs something else by now than its blocks, or they run what no optimizer has.
        """
        changed = [change for wires in self._wires for change in wires.changed() if change[1] not in self._written]
        if not changed:
            return
        pieces = [part for part in self._cut.blocks.modules() if isinstance(part, Piece)]
        for piece in pieces:
            piece.renew(self._net, others=False)
        error: ValueError | None = None
        learned = known()
        strange = any(id(p) not in learned for p in self._cut.blocks.parameters())
        if not strange:
            try:
                strange = self._runs_what_is_new()
            except ValueError as unlike:
                error = unlike
        if strange or error is not None:
            raise ValueError(
                f"{self._told(changed)} exchanged after localize: the blocks run what stood there before, or no optimizer has "
                "what stands there now. Change the values of parameters and buffers in place (load_state_dict without "
                "assign=True), or localize the changed network"
            ) from error
        for piece in pieces:
            piece.renew(self._net, others=True)
        self._look()

    def _told(self, changed: Sequence[Change]) -> str:
        """What was exchanged, of all that the network holds: first what blocks run, and what is new last."""
        blocks = self._cut.blocks
        inside = {id(part) for part in (*blocks.modules(), *blocks.parameters(), *blocks.buffers())}
        changed = sorted(changed, key=lambda change: (id(change[0]) not in inside, change[0] is None))
        names = list(dict.fromkeys(name for _, name in changed))
        named = names[:_NAMED] + ([f"{len(names) - _NAMED} more"] if len(names) > _NAMED else [])
        *most, last = named
        return f"{', '.join(most)}{' and ' if most else ''}{last} of {type(self._net).__name__} {'were' if most else 'was'}"

    def _look(self) -> None:
        inside = {id(module) for module in self._cut.blocks.modules()}
        named = list(self._net.named_modules())
        # Through these the cuts go: pieces have what their forward did, with what it read then, and not the modules.
        opened = [
            (name, module)
            for name, module in named
            if id(module) not in inside and any(id(part) in inside for part in module.modules())
        ]
        self._wires = [
            *(_Wires.of(name, "module", m._modules) for name, m in named),
            *(_Wires.of(name, "parameter", m._parameters) for name, m in named),
            *(_Wires.of(name, "buffer", m._buffers) for name, m in opened),
            *(_Wires.of(name, "hook", m._forward_hooks) for name, m in opened),
            *(_Wires.of(name, "hook", m._forward_pre_hooks) for name, m in opened),
        ]
        self._opened = opened
        self._wires += self._attributes()

    def _attributes(self) -> list[_Wires]:
        seen: set[int] = set()
        return [wires for name, m in self._opened for wires in _attributes(name, m, seen, self._written)]

    def _runs_what_is_new(self) -> bool:
        """Whether the network runs a module that came later and is in no block.

        Raises:
            ValueError: network and blocks do not give the same.
        """
        held = {id(module) for module in (*self._had, *self._cut.blocks.modules())}
        ran: list[nn.Module] = []
        before: list[_Wires] = []

        def begin(*_: Any) -> None:
            before[:] = self._attributes()

        def end(*_: Any) -> None:
            self._written.update(name for wires in before for _, name in wires.changed())

        at = next((p for p in self._net.parameters() if p.is_floating_point()), torch.empty(0))
        values = {
            name: v.to(at.device, at.dtype if v.is_floating_point() else None) if isinstance(v, Tensor) else v
            for name, v in self._cut.arguments.values.items()
        }
        with ExitStack() as stack:
            for module in self._net.modules():
                if id(module) not in held and not _only_runs_others(module):
                    stack.callback(module.register_forward_pre_hook(lambda one, _: ran.append(one)).remove)
            stack.callback(self._net.register_forward_pre_hook(begin).remove)
            stack.callback(self._net.register_forward_hook(end).remove)
            stack.enter_context(preserved(self._cut.blocks))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            self._cut.check(self._net, values)
        return bool(ran)


def _only_runs_others(module: nn.Module) -> bool:
    compiled = type(module).__module__.startswith("torch._dynamo")
    return compiled or type(module).forward is nn.Sequential.forward


class _Wires(NamedTuple):
    """What a module of the network, or what it keeps as an attribute, holds, as it was and as it is."""

    name: str
    what: str
    before: Any
    owner: Any

    @classmethod
    def of(cls, name: str, what: str, owner: Any) -> _Wires:
        """As it is now."""
        held = _entries(owner)
        return cls(name, what, dict(held) if isinstance(held, dict) else list(held), owner)

    def changed(self) -> Iterator[Change]:
        """What stood for something else, or for nothing."""
        now, before = _entries(self.owner), self.before
        alike = len(before) == len(now) and all(map(is_, before, now))
        if alike and (type(before) is list or all(map(is_, before.values(), now.values()))):
            return  # asked with every step
        if isinstance(before, list):
            if not _same(tuple(before), tuple(now)):
                yield before, f"{self.what} {self.name!r}"
            return
        ignored = _OF_PYTORCH if isinstance(self.owner, nn.Module) else ()
        keys = [key for key in dict.fromkeys([*before, *now]) if key not in ignored]
        others = [key for key in keys if not _same(before.get(key), now.get(key))]
        for key in others:
            named = isinstance(key, str) or self.what == "attribute"  # hooks have numbers
            told = f"{self.what} {_inside(self.name, key)!r}" if named else f"a {self.what} {self.name}".rstrip()
            yield before.get(key), told
        if not others:  # but for the mode, or for the order
            before.clear()
            before.update(now)


def _attributes(name: str, value: Any, seen: set[int], written: Container[str], depth: int = 0) -> Iterator[_Wires]:
    """What a module keeps beside what PyTorch knows of: containers and plain objects in it, too.

    Args:
        name: of the value, by which it is called.
        value: the module, or what it keeps.
        seen: identities of what was met before.
        written: names of what is left out, because the network's own pass changes it.
        depth: how many objects hold it: of what objects in objects hold (a trainer's loops, say) there is no end.
    """
    if isinstance(value, tuple):
        for inner in value if len(value) <= _LONG else ():
            yield from _attributes(name, inner, seen, written, depth)
        return
    plain = isinstance(value, _CONTAINERS)
    closed = callable(value) or isinstance(value, Tensor | ModuleType) or not hasattr(value, "__dict__")
    if depth and not plain and (closed or depth > 1):
        return
    held = _entries(value)
    if id(value) in seen or len(held) > _LONG or f"attribute {name!r}" in written:
        return
    seen.add(id(value))
    wires = _Wires.of(name, "attribute", value)
    if not isinstance(held, dict):
        yield wires
        for inner in held:
            yield from _attributes(name, inner, seen, written, depth)
        return
    ignored = _OF_PYTORCH if isinstance(value, nn.Module) else ()
    for key in held:
        if f"attribute {_inside(name, key)!r}" in written:
            wires.before[key] = None  # whatever it was (an activation, say) is not to be kept
    yield wires
    for key, inner in held.items():
        if key not in ignored:
            yield from _attributes(_inside(name, key), inner, seen, written, depth + (not plain))


def _entries(owner: Any) -> Any:
    return owner if isinstance(owner, _CONTAINERS) else vars(owner)  # a copy of an object has other ones


def _inside(name: str, key: Any) -> str:
    return f"{name}.{key}".lstrip(".")


def _same(before: Any, now: Any) -> bool:
    """Whether a value still stands there: tensors, modules and whatever can be changed are none but themselves."""
    if before is now:
        return True
    if type(before) is not type(now):
        return False
    if isinstance(before, tuple):
        return len(before) == len(now) and all(map(_same, before, now))
    return isinstance(before, _VALUES) and bool(before == now)


_CONTAINERS = (dict, list, set)
_VALUES = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, MethodType)
_OF_PYTORCH = set(vars(nn.Module()))
_LONG = 1000  # a vocabulary, say, through which no step is to look
_NAMED = 3  # changes, in a message
