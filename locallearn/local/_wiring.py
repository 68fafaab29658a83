"""Whether a network still runs what it was cut into: blocks know nothing of what is exchanged in it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from locallearn.nets.cut import Cut
from locallearn.nets.trace import preserved

Change = tuple[bool, str]
"""Whether there was nothing in its place, and its name: what was exchanged comes before what was added."""


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
        self._counters: set[str] = set()
        self._look()

    def refuse_changes(self, known: Callable[[], set[int]]) -> None:
        """Compare it with the network as it is.

        Args:
            known: gives identities of the parameters that optimizers have, and of those that rest; asked where something has
                changed, which is hardly ever.

        Raises:
            ValueError: the network runs something else by now than its blocks, or they run what no optimizer has.
        """
        changed = [change for wires in self._wires for change in wires.changed()]
        changed += [change for one in self._attributes for change in one.changed(self._counters)]
        if not changed:
            return
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
                f"{min(changed)[1]} of {type(self._net).__name__} was exchanged after localize: the blocks run what stood "
                "there before, or no optimizer has what stands there now. Change the values of what is there "
                "(load_state_dict without assign=True), or localize the changed network"
            ) from error
        self._counters |= {name for one in self._attributes for name in one.counted()}
        self._look()

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
        self._attributes = [_Attributes(name, m, _constants(m)) for name, m in opened]

    def _runs_what_is_new(self) -> bool:
        """Whether the network runs a module that came later and is in no block.

        Raises:
            ValueError: network and blocks do not give the same.
        """
        held = {id(module) for module in (*self._had, *self._cut.blocks.modules())}
        ran: list[nn.Module] = []
        at = next((p for p in self._net.parameters() if p.is_floating_point()), torch.empty(0))
        values = {
            name: v.to(at.device, at.dtype if v.is_floating_point() else None) if isinstance(v, Tensor) else v
            for name, v in self._cut.arguments.values.items()
        }
        with ExitStack() as stack:
            for module in self._net.modules():
                if id(module) not in held and not _only_runs_others(module):
                    stack.callback(module.register_forward_pre_hook(lambda one, _: ran.append(one)).remove)
            stack.enter_context(preserved(self._cut.blocks))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            self._cut.check(self._net, values)
        return bool(ran)


def _only_runs_others(module: nn.Module) -> bool:
    compiled = type(module).__module__.startswith("torch._dynamo")
    return compiled or type(module).forward is nn.Sequential.forward


class _Wires(NamedTuple):
    """What one module of the network holds, as it was and as it is: comparing them costs less than listing all parameters."""

    name: str
    what: str
    before: dict[Any, Any]
    now: dict[Any, Any]

    @classmethod
    def of(cls, name: str, what: str, held: dict[Any, Any]) -> _Wires:
        """As it is now."""
        return cls(name, what, dict(held), held)

    def changed(self) -> Iterator[Change]:
        """What stood for something else, or for nothing."""
        if len(self.before) == len(self.now) and all(map(is_, self.before.values(), self.now.values())):
            return  # asked with every step
        for key in dict.fromkeys([*self.before, *self.now]):
            if self.before.get(key) is not self.now.get(key):
                path = f"{self.name}.{key}".lstrip(".")
                told = f"{self.what} {path!r}" if isinstance(key, str) else f"a {self.what} {self.name}".rstrip()
                yield self.before.get(key) is None, told


class _Attributes(NamedTuple):
    """Numbers, words and functions that a module's forward may read, as they were."""

    name: str
    module: nn.Module
    before: dict[str, Any]

    def changed(self, counters: set[str]) -> Iterator[Change]:
        """Those that are others, but for whole numbers that were seen to make no difference."""
        now = _constants(self.module)
        if now == self.before:
            return
        for key in dict.fromkeys([*self.before, *now]):
            path = f"{self.name}.{key}".lstrip(".")
            if path not in counters and (key not in self.before or self.before[key] != now.get(key)):
                yield key not in self.before, f"attribute {path!r}"

    def counted(self) -> Iterator[str]:
        """Whole numbers that are others by now: a network that counts its passes is not asked about with every one."""
        now = _constants(self.module)
        for key, value in self.before.items():
            if type(value) is int and type(now.get(key)) is int and now[key] != value:
                yield f"{self.name}.{key}".lstrip(".")


def _constants(module: nn.Module) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(module).items()
        if key not in _OF_PYTORCH
        and (value is None or isinstance(value, bool | int | float | str) or callable(value))
        and not isinstance(value, Tensor)
    }


_OF_PYTORCH = set(vars(nn.Module()))
