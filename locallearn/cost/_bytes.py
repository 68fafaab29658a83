"""Bytes that are kept alive: for gradients, from one update to the next, or from one step to the next."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


def storages(tensors: Iterable[Any]) -> dict[int, torch.UntypedStorage]:
    """The storages behind tensors, each once, by the place of its first byte; of a sparse tensor those of its parts."""
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            continue
        parts = _parts(tensor)
        if parts:
            found |= storages(parts)
            continue
        try:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage
        except (
            NotImplementedError,
            RuntimeError,
        ):  # opaque layouts tell nobody where they lie, zeros that are not there lie nowhere
            continue
    return found


def _parts(tensor: Any) -> list[Tensor]:
    """What a tensor without a storage of its own is made of."""
    if is_traceable_wrapper_subclass(tensor):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []


def bytes_of(tensors: Iterable[Any]) -> int:
    """Bytes of the storages behind tensors, each once."""
    return sum(storage.nbytes() for storage in storages(tensors).values())


# -- alive for gradients --------------------------------------------------------------------------------------------------
class ActivationBytes:
    """Bytes that are kept alive for gradients, now and at the peak. Filled in by :func:`activation_bytes`."""

    def __init__(self, without: Iterable[int] = ()) -> None:
        self._peak = 0
        self._without = frozenset(without)
        self._bytes = 0
        self._live: dict[int, list[int]] = {}  # place of a storage -> [holders, bytes]
        self._computed_again: dict[StorageWeakRef, int] = {}  # what checkpoints hold during a backward pass -> place
        self._contexts: list[
            weakref.ref[Any]
        ] = []  # of autograd Functions, on which something was set since the last look

    @property
    def peak(self) -> int:
        """Largest number of bytes so far; set it to go on from another one."""
        self.look()
        return self._peak

    @peak.setter
    def peak(self, size: int) -> None:
        self._peak = size

    @property
    def current(self) -> int:
        """Bytes that are kept alive now."""
        self.look()
        self._forget(expired=True)
        return self._bytes

    def hold(self, tensors: Iterable[Any], holder: Any) -> None:
        """Count the storages of ``tensors`` for as long as ``holder`` lives."""
        self.look()
        self._hold(tensors, holder)

    def watch(self, node: Any) -> None:
        """Look at a context as soon as something else happens: then its forward pass has put there what it keeps."""
        if not self._contexts or self._contexts[-1]() is not node:
            self.look()
            self._contexts.append(weakref.ref(node))

    def look(self) -> None:
        """Count what contexts hold by now; those that no graph took (there was none to build) are gone."""
        contexts, self._contexts = self._contexts, []
        for node in filter(None, (ref() for ref in contexts)):
            sizes = _generator_sizes()  # their states are no activations
            kept = [t for t in kept_tensors(vars(node), shared=False) if (t.dtype, t.numel()) not in sizes]
            self._hold(kept, node)

    def _hold(self, tensors: Iterable[Any], holder: Any) -> None:
        self._forget(expired=True)  # before its place is taken by another storage
        for place, storage in storages(tensors).items():
            if self._count(place, storage.nbytes()):
                weakref.finalize(holder, self._let_go, place)
        self._peak = max(self._peak, self._bytes)

    def hold_recomputed(self, tensor: Tensor) -> None:
        """Count what a checkpoint has just computed again: while it is there, but no longer than the backward pass."""
        self.look()
        self._forget(expired=True)
        for place, storage in storages([tensor]).items():
            ref = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            if ref in self._computed_again or not self._count(place, storage.nbytes()):
                continue
            if not self._computed_again and torch._C._current_graph_task_id() != -1:
                torch.autograd.Variable._execution_engine.queue_callback(self._forget)
            self._computed_again[ref] = place
        self._peak = max(self._peak, self._bytes)

    def _count(self, place: int, size: int) -> bool:
        if place in self._without:
            return False
        entry = self._live.setdefault(place, [0, size])
        entry[0] += 1
        if entry[0] == 1:
            self._bytes += size
        return True

    def _let_go(self, place: int) -> None:
        entry = self._live[place]
        entry[0] -= 1
        if entry[0] == 0:
            self._bytes -= entry[1]
            del self._live[place]

    def _forget(self, expired: bool = False) -> None:
        """Let go of everything that was computed again, or of what is no longer there."""
        for ref, place in list(self._computed_again.items()):
            if not expired or ref.expired():  # type: ignore[no-untyped-call]
                del self._computed_again[ref]
                self._let_go(place)


class _Saved:
    """Stands for what a graph holds of one tensor; dies with the graph."""

    __slots__ = ("__weakref__", "packed")

    def __init__(self, packed: Any) -> None:
        self.packed = packed


@contextmanager
def activation_bytes(module: nn.Module) -> Iterator[ActivationBytes]:
    """Count the bytes that graphs built inside the context keep alive for gradients, the same on CPU and GPU.

    Counted are, each once per storage and at the size of its storage,

    * every tensor that autograd saves, for as long as a graph holds it; where other hooks are at work inside
      (activation checkpointing, moving to the host, compression), what these give the graph in its place;
    * what activation checkpointing computes again in the backward pass, until it has been used;
    * tensors that an ``autograd.Function`` keeps on its context instead of saving them, for as long as its node lives.

    Weights and buffers of ``module`` do not count: they are there anyway. The input batch does.

    Args:
        module: holds the weights that are left out.
    """
    count = ActivationBytes(storages([*module.parameters(), *module.buffers()]))

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        count.hold([tensor], saved)
        return saved

    with saved_tensors_hooks(pack, _unpack), _seen_through(count), _contexts_seen(count):
        yield count


def _unpack(saved: _Saved) -> Tensor:
    packed: Tensor = saved.packed
    return packed


@contextmanager
def _seen_through(count: ActivationBytes) -> Iterator[None]:
    """Hooks that are entered inside do their work and are counted; PyTorch itself asks the innermost pair alone."""
    enter = saved_tensors_hooks.__enter__

    def entered(hooks: saved_tensors_hooks) -> None:
        inner_pack, inner_unpack = hooks.pack_hook, hooks.unpack_hook
        recomputing = isinstance(hooks, checkpoint._recomputation_hook)

        @functools.wraps(inner_pack)
        def pack(tensor: Tensor) -> _Saved:
            if recomputing:  # the checkpoint puts it aside, and may end here by an exception
                count.hold_recomputed(tensor)
            saved = _Saved(inner_pack(tensor))
            count.hold(tree_leaves(saved.packed), saved)
            return saved

        def unpack(saved: _Saved) -> Any:
            return inner_unpack(saved.packed)

        torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)

    saved_tensors_hooks.__enter__ = entered  # type: ignore[method-assign]
    try:
        yield
    finally:
        saved_tensors_hooks.__enter__ = enter  # type: ignore[method-assign]


@contextmanager
def _contexts_seen(count: ActivationBytes) -> Iterator[None]:
    """Tensors that contexts of autograd Functions hold beside the saved ones are counted.

    Seen is what is set on a context, since ``apply`` may have been taken from its class long before
    (``relu = MyReLU.apply``), and in some releases is not Python's.
    """

    def assigned(node: Any, name: str, value: Any) -> None:
        object.__setattr__(node, name, value)
        count.watch(node)

    BackwardCFunction.__setattr__ = assigned  # type: ignore[method-assign]
    try:
        yield
    finally:
        count.look()
        del BackwardCFunction.__setattr__


@functools.cache
def _generator_sizes() -> set[tuple[torch.dtype, int]]:
    return {(torch.uint8, torch.default_generator.get_state().numel()), (torch.uint8, 16)}  # of the CPU, of a GPU


# -- kept in attributes ---------------------------------------------------------------------------------------------------
def kept_tensors(value: Any, shared: bool = True) -> Iterator[Tensor]:
    """Tensors that ``value`` holds, in containers, partial functions, closures and plain objects; modules are not entered.

    Args:
        value: what to look into.
        shared: whether to look into objects whose class says ``shared_between_steps``, such as a graph's matrix.
    """
    yield from _kept(value, 6, set(), shared)


def _kept(value: Any, depth: int, seen: set[int], shared: bool) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if depth == 0 or id(value) in seen or isinstance(value, nn.Module | type | types.ModuleType | str | bytes):
        return
    seen.add(id(value))
    inside: Iterable[Any] = ()
    if isinstance(value, dict):
        inside = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        inside = value
    elif isinstance(value, functools.partial):
        inside = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.FunctionType):
        inside = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
    elif isinstance(value, types.MethodType):
        inside = (value.__self__,)
    elif shared or not getattr(type(value), "shared_between_steps", False):
        inside = [*getattr(value, "__dict__", {}).values(), *_slots(value)]
    for part in list(inside):
        yield from _kept(part, depth - 1, seen, shared)


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _slots(value: Any) -> list[Any]:
    names = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()) if isinstance(name, str)]
    return [getattr(value, name) for name in names if name != "__weakref__" and hasattr(value, name)]


def cache_bytes(module: nn.Module, without: Iterable[Any] = ()) -> int:
    """Bytes that a rule and its blocks keep in attributes beside weights and buffers: aggregates, frozen activations.

    Args:
        module: the rule.
        without: batches and the like, whose tensors are there anyway.
    """
    own = storages([*module.parameters(), *module.buffers(), *tree_leaves(list(without))])
    skipped = {"_parameters", "_buffers", "_modules", "_compiled_call_impl"}
    kept = [
        tensor
        for part in module.modules()
        for name, value in vars(part).items()
        if name not in skipped and "hook" not in name
        for tensor in kept_tensors(value)
    ]
    return sum(storage.nbytes() for place, storage in storages(kept).items() if place not in own)


# -- alive from one update to the next ---------------------------------------------------------------------------------
class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every storage that operations inside the context make, and tells how much of it is alive.

    Args:
        known: places of storages that were there before and do not count.
    """

    def __init__(self, known: Iterable[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = frozenset(known)
        self._made: dict[StorageWeakRef, tuple[int, int]] = {}  # -> place, bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for place, storage in storages(tree_leaves(made)).items():
            if place not in self._known:
                self._made[StorageWeakRef(storage)] = (place, storage.nbytes())  # type: ignore[no-untyped-call]
        return made

    def bytes(self, without: Iterable[Tensor] = ()) -> int:
        """Bytes that are alive now, those of some tensors left out."""
        self._made = {ref: entry for ref, entry in self._made.items() if not ref.expired()}  # type: ignore[no-untyped-call]
        out = storages(without)
        return sum(size for place, size in self._made.values() if place not in out)


class _Peak(Alive):  # type: ignore[no-untyped-call]
    """Notes the most that was alive at once."""

    peak: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_dispatch__(func, types, args, kwargs)
        self.peak = max(self.peak, self.bytes())
        return made


def working_bytes(run: Callable[[], None], known: Iterable[Tensor] = ()) -> int:
    """Peak bytes of all tensors that operations make while something runs, whether or not a gradient needs them.

    What libraries take for themselves inside of an operation, and what is computed outside of PyTorch, is not seen.

    Args:
        run: is called once.
        known: tensors that are there before (weights, the batch), and do not count when they are written into.
    """
    with _Peak(storages(known)) as watched:
        run()
    return int(watched.peak)
