"""What one whole update costs: floating point operations, and bytes kept alive for gradients."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from locallearn.algorithms.base import Algorithm, Update
from locallearn.batch import Batch


@dataclass
class ActivationBytes:
    """Bytes that autograd keeps alive, now and at the peak. Filled in by :func:`activation_bytes`."""

    current: int = 0
    peak: int = 0
    _live: dict[int, list[int]] = field(default_factory=dict, repr=False)  # storage -> [holders, bytes]

    def _hold(self, storage: int, size: int) -> None:
        entry = self._live.setdefault(storage, [0, size])
        entry[0] += 1
        if entry[0] == 1:
            self.current += size
            self.peak = max(self.peak, self.current)

    def _let_go(self, storage: int) -> None:
        entry = self._live[storage]
        entry[0] -= 1
        if entry[0] == 0:
            self.current -= entry[1]
            del self._live[storage]


class _Saved:
    """Stands for one tensor that a graph saved; dies with the graph."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def activation_bytes(module: nn.Module) -> Iterator[ActivationBytes]:
    """Count the bytes that graphs built inside the context keep alive for gradients, the same on CPU and GPU.

    Every tensor that autograd saves counts once per storage for as long as a graph holds it, at the size of its
    storage. Weights and buffers of ``module`` do not count: they are there anyway. The input batch does.

    Args:
        module: holds the weights that are left out.
    """
    count = ActivationBytes()
    own = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            count._hold(storage.data_ptr(), storage.nbytes())
            weakref.finalize(saved, count._let_go, storage.data_ptr())
        return saved

    def unpack(saved: _Saved) -> Tensor:
        return saved.tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield count


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every storage that operations inside the context make, and tells how much of it is alive.

    Args:
        known: pointers of storages that were there before and do not count.
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = known
        self._made: dict[StorageWeakRef, tuple[int, int]] = {}  # -> pointer, bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._known:
                    self._made[StorageWeakRef(storage)] = (storage.data_ptr(), storage.nbytes())  # type: ignore[no-untyped-call]
        return made

    def bytes(self, without: Iterable[Tensor] = ()) -> int:
        """Bytes that are alive now, those of some tensors left out."""
        self._made = {ref: entry for ref, entry in self._made.items() if not ref.expired()}  # type: ignore[no-untyped-call]
        out = {tensor.untyped_storage().data_ptr() for tensor in without}
        return sum(size for pointer, size in self._made.values() if pointer not in out)


def _held_between_updates(algorithm: Algorithm, batch: Batch) -> int:
    """Largest number of bytes that a rule without graphs holds when it hands over an update: the batch, and what it made.

    Weights, buffers and the gradients that are handed over do not count.
    """
    given = [t for t in tree_leaves(tuple(batch)) if isinstance(t, Tensor)]
    own = [*algorithm.parameters(), *algorithm.buffers(), *given]
    peak = 0
    with _Alive({t.untyped_storage().data_ptr() for t in own}) as alive:

        def look(update: Update) -> None:
            nonlocal peak
            peak = max(peak, alive.bytes(without=(update.gradients or {}).values()))

        drive(algorithm, batch, look)
    return peak + sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in given}.values())


@dataclass(frozen=True)
class UpdateCost:
    """Cost of one whole update: forward passes, local backward passes, heads and feedback of every unit.

    Attributes:
        flops: floating point operations per sample, two per multiply-accumulate; matrix products and convolutions, as
            counted by PyTorch's ``FlopCounterMode`` (elementwise work is left out).
        activation_peak_bytes: peak bytes kept alive for gradients, for the whole batch: by graphs, or by a rule that builds
            none from one update to the next.
        samples: size of the batch.
    """

    flops: float
    activation_peak_bytes: int
    samples: int


def drive(algorithm: Algorithm, batch: Batch, look: Callable[[Update], None] = lambda update: None) -> None:
    """Run all updates of one batch without stepping: the gradients are computed and dropped.

    Args:
        algorithm: attached.
        batch: one training batch.
        look: is shown every update as it is handed over, before it is differentiated.
    """
    for update in algorithm.updates(batch):
        look(update)
        update.backward()
        algorithm.zero_grad(set_to_none=True)


def measure_update(algorithm: Algorithm, batch: Batch, sequential: bool = False) -> UpdateCost:
    """Measure one update on a copy of the algorithm, whose weights and random numbers stay as they are.

    Args:
        algorithm: attached; its device must be that of the batch.
        batch: one training batch.
        sequential: count one update of every stage, the frozen prefix included, and take the largest peak of them.
    """
    twin = copy.deepcopy(algorithm)
    twin.train()
    batch = batch._replace(inputs=batch.inputs.clone())  # a slice would count the whole data set's storage
    stages: list[frozenset[str] | None] = [None]
    if sequential:
        stages = [frozenset(stage) for stage in twin.stages]
    flops, peak = 0, 0
    for stage in stages:
        twin.train_only(stage)
        with FlopCounterMode(display=False) as counter:
            drive(twin, batch)
        flops += counter.get_total_flops()
        with activation_bytes(twin) as count:
            drive(twin, batch)
        peak = max(peak, count.peak or _held_between_updates(twin, batch))
    samples = len(batch.inputs)
    return UpdateCost(flops / samples, peak, samples)


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """Move every tensor of a batch."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return tuple(move(v) for v in value) if isinstance(value, tuple) else value

    return Batch(*(move(value) for value in batch))
