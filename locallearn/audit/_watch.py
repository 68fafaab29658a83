"""Instruments: what a rule does while a batch goes through it, whichever door of PyTorch it takes."""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_KNOWN_OPERATORS = {"aten", "prim", "prims", "profiler", "inductor", "quantized", "torchvision"}
_UNWRITTEN = ("empty", "new_empty", "resize")  # how the names of operators begin that give memory nobody has written
_FORBIDDEN = {
    "subprocess.Popen": "starts a process",
    "os.system": "starts a process",
    "os.fork": "starts a process",
    "os.forkpty": "starts a process",
    "os.posix_spawn": "starts a process",
    "os.exec": "starts a process",
    "ctypes.dlopen": "calls a library through ctypes",
    "gc.get_objects": "looks for objects through gc",
    "gc.get_referrers": "looks for objects through gc",
    "sys._getframe": "looks at who calls it (sys._getframe)",
    "sys._current_frames": "looks at who calls it (sys._current_frames)",
    "sys.settrace": "traces the interpreter",
    "sys.setprofile": "traces the interpreter",
}


class Engine:
    """Every entry to the autograd engine that Python has, counted, while it is on.

    Attributes:
        calls: since :meth:`reset`.
        running: whether the engine runs now.
        roots: what each call since then was to differentiate: gradient functions.
    """

    def __init__(self) -> None:
        self.running = 0
        self.reset()

    def reset(self) -> None:
        """Count from zero."""
        self.calls = 0
        self.roots: list[list[Any]] = []

    def _counted(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(outputs: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.running:
                self.calls += 1
                self.roots.append([_function_of(t) for t in flat(outputs)])
            self.running += 1
            try:
                return run(outputs, *args, **kwargs)
            finally:
                self.running -= 1

        return call

    @contextmanager
    def on(self) -> Iterator[Engine]:
        """Count in this block."""
        holder, original = torch.autograd.Variable, torch.autograd.Variable._execution_engine
        counted = self._counted(torch.autograd.graph._engine_run_backward)
        with (
            mock.patch.object(torch.autograd, "_engine_run_backward", counted),
            mock.patch.object(torch.autograd.graph, "_engine_run_backward", counted),
            mock.patch.object(holder, "_execution_engine", _Door(original, self._counted(original.run_backward))),
        ):
            yield self


class _Door:
    """PyTorch's engine with a counter at its door."""

    def __init__(self, engine: Any, run_backward: Callable[..., Any]) -> None:
        self._engine = engine
        self.run_backward = run_backward

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def _function_of(output: Any) -> Any:
    """What a call starts from: a tensor's gradient function, the tensor where it is a leaf, a gradient edge's node."""
    if isinstance(output, Tensor):
        return output.grad_fn if output.grad_fn is not None else output
    return getattr(output, "node", output)


def leaves(roots: Sequence[Any]) -> Iterator[Tensor]:
    """Leaf tensors that graphs lead to."""
    stack, seen = list(roots), set()
    while stack:
        node = stack.pop()
        if isinstance(node, Tensor):
            yield node
            continue
        if node is None or node in seen or not hasattr(node, "next_functions"):
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf
        stack.extend(parent for parent, _ in node.next_functions)


def flat(values: Any) -> Iterator[Any]:
    if isinstance(values, (list, tuple)):
        for value in values:
            yield from flat(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from flat(value)
    else:
        yield values


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator, and which of the original's tensors it is given.

    Args:
        forbidden: what must not be touched, by the address of its memory.

    Attributes:
        touched: paths of those that were.
        foreign: names of operators that are not PyTorch's.
        names: of all operators, in order; whoever reads them empties the list.
    """

    def __init__(self, forbidden: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._forbidden = forbidden
        self.touched: set[str] = set()
        self.foreign: set[str] = set()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        if func.namespace not in _KNOWN_OPERATORS:
            self.foreign.add(f"{func.namespace}::{func._opname}")
        for value in flat((args, kwargs or {})):
            address = address_of(value)
            if address in self._forbidden:
                self.touched.add(self._forbidden[address])
        return func(*args, **(kwargs or {}))


def address_of(value: Any) -> int:
    """Where a tensor's memory begins; 0: it is no tensor, or has none."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return 0
    try:
        return value.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a wrapper without memory
        return 0


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Results of every operator outside of the engine, in order; on request some are replaced by those of another tape.

    Args:
        engine: while it runs, nothing is noted or replaced.
        pins: results by number of the operator: what takes the place of its own.
        names: of the operators, as the other tape has them.

    Attributes:
        results: tensors that every operator gave; none of one that leaves memory as it finds it, which holds anything.
        at_first_pin: called once, before the first operator whose result is replaced.
    """

    def __init__(self, engine: Engine, pins: dict[int, list[Tensor]] | None = None, names: Sequence[str] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.engine = engine
        self._pins = pins or {}
        self._names = names
        self.names: list[str] = []
        self.results: list[list[Tensor]] = []
        self.at_first_pin: Callable[[], None] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.at_first_pin is not None and not self.engine.running and len(self.names) == min(self._pins, default=-1):
            act, self.at_first_pin = self.at_first_pin, None
            act()
        out = func(*args, **(kwargs or {}))
        views = [r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns]
        if self.engine.running or any(views):
            return out
        number, name = len(self.names), str(func)
        self.names.append(name)
        pins = self._pins.get(number)
        if pins is not None and (number >= len(self._names) or self._names[number] != name):
            self._pins = {}  # another way is taken than before: numbers mean nothing any more
            pins = None
        written = any(r.alias_info is not None for r in func._schema.returns)
        if pins is not None:
            out = _replaced(out, iter(pins), written)
        if not self._names:
            given = [] if func._opname.startswith(_UNWRITTEN) else flat(out)
            self.results.append([t.detach().clone() for t in given if isinstance(t, Tensor)])
        return out


def _replaced(out: Any, pins: Iterator[Tensor], written: bool) -> Any:
    if isinstance(out, Tensor):
        pin = next(pins)
        if pin.shape != out.shape or pin.dtype is not out.dtype:
            return out
        return out.copy_(pin) if written else pin.clone()
    if isinstance(out, (list, tuple)):
        return type(out)(_replaced(part, pins, written) for part in out)
    return out


# -- what Python itself tells ---------------------------------------------------------------------------------------------
_listeners: list[set[str]] = []
_installed = False
_rule_files: set[str] = set()
_busy = threading.local()


def _heard(event: str, args: Any) -> None:
    if not _listeners or event not in _FORBIDDEN or getattr(_busy, "on", False):
        return
    _busy.on = True
    try:
        if _by_the_rule(direct="_getframe" in event):
            _listeners[-1].add(_FORBIDDEN[event])
    finally:
        _busy.on = False


def _by_the_rule(direct: bool) -> bool:
    """Whether the nearest caller that is neither the standard library's nor PyTorch's is the audited code, at work.

    Args:
        direct: the standard library may have been in between for reasons of its own: logging finds out who logs.
    """
    frame: Any = sys._getframe(2)
    caller = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_HERE):
            return bool(caller)
        if file.startswith("<frozen importlib"):
            return False  # a module is being imported
        installed = file not in _rule_files and ("site-packages" in file or "dist-packages" in file)
        library = installed or file.startswith(_LIBRARY)
        if not caller and not library:
            caller = file
        if not caller and file.startswith(_TORCH):
            return False
        if not caller and direct and os.path.basename(file) not in ("inspect.py", "traceback.py"):
            return False
        frame = frame.f_back
    return False


_TORCH = os.path.dirname(torch.__file__)
_HERE = os.path.dirname(__file__)
_LIBRARY = sysconfig.get_paths()["stdlib"]


@contextmanager
def forbidden_deeds(rule: nn.Module) -> Iterator[set[str]]:
    """What the rule's code, or code that it calls, does in this block that cannot be followed, in words."""
    global _installed
    if not _installed:  # it cannot be taken away again, and does nothing while nobody listens
        sys.addaudithook(_heard)
        _installed = True
    deeds: set[str] = set()
    modules = {kind.__module__ for module in rule.modules() for kind in type(module).__mro__}
    own = {getattr(sys.modules.get(name), "__file__", None) or "" for name in modules if not name.startswith("torch.")}
    _rule_files.update(own)
    start = threading.Thread.start

    def told(thread: threading.Thread) -> None:
        if _by_the_rule(direct=False):
            deeds.add("starts a thread")
        start(thread)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(threading.Thread, "start", told))
        import _thread

        begin = _thread.start_new_thread

        def told_too(*args: Any, **kwargs: Any) -> Any:
            deeds.add("starts a thread")
            return begin(*args, **kwargs)

        stack.enter_context(mock.patch.object(_thread, "start_new_thread", told_too))
        _listeners.append(deeds)
        try:
            yield deeds
        finally:
            _listeners.remove(deeds)
            _rule_files.clear()
