"""Buffers that are empty until the first batch says how large they must be, and what is kept of every training sample."""

from __future__ import annotations

import torch
from torch import Tensor

from locallearn.algorithms._grown import Grown

GIB = 2**30


class Standard(Grown):
    """Takes mean and deviation of every channel out of a block's outputs, as measured once on training data.

    A channel is an entry of a vector, a map of an image or of a sequence ``(N, C, L)``, or, of tokens ``(N, T, D)``, an entry
    of every token; one that never varies keeps its scale.

    Args:
        axis: of the channels in the outputs.
    """

    eps = 1e-4  # as in the normalisation of the paper's blocks
    mean: Tensor
    variance: Tensor

    def __init__(self, axis: int) -> None:
        super().__init__()
        self._axis = axis
        for name in ("mean", "variance"):
            self.register_buffer(name, torch.zeros(0))

    @property
    def measured(self) -> bool:
        """Whether :meth:`measure` has been called; before, outputs pass as they are."""
        return len(self.mean) > 0

    def measure(self, outputs: Tensor) -> None:
        """Take mean and variance of every channel of these outputs, ``(N, C, ...)`` or ``(N, T, D)``."""
        over = [d for d in range(outputs.ndim) if d != self._axis]
        variance, mean = torch.var_mean(outputs.double(), over, correction=0)
        self.mean, self.variance = mean.to(self.mean), variance.to(self.mean)

    def forward(self, outputs: Tensor) -> Tensor:
        """Outputs of the same shape."""
        if not self.measured:
            return outputs
        shape = [1] * outputs.ndim
        shape[self._axis] = -1
        scale = torch.where(self.variance > 0, self.variance + self.eps, 1).rsqrt()
        return (outputs - self.mean.view(shape)) * scale.view(shape)


class Epoch(Grown):
    """Which training samples have come since the epoch began, where batches say so, and how many epochs have ended."""

    seen: Tensor
    ended: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(0, dtype=torch.bool))
        self.register_buffer("ended", torch.zeros((), dtype=torch.int64))

    def begins_with(self, rows: Tensor | None) -> bool:
        """Note these samples; whether one of them had come before, so that a new epoch begins with them."""
        if rows is None:
            return False
        needed = int(rows.max()) + 1
        if needed > len(self.seen):
            self.seen = torch.cat((self.seen, self.seen.new_zeros(needed - len(self.seen))))
        again = bool(self.seen[rows].any())
        if again:
            self.seen.zero_()
        self.seen[rows] = True
        return again

    def end(self) -> None:
        """Begin anew."""
        self.seen = self.seen.new_zeros(0)
        self.ended += 1


class FeatureStore:
    """Outputs of all blocks for every training sample seen, one matrix for each block, by position in the training set.

    Args:
        limit_gib: most that all of it may take.
    """

    def __init__(self, limit_gib: float) -> None:
        self.limit_gib = limit_gib
        self._kept: dict[int, Tensor] = {}
        self._filled: dict[int, Tensor] = {}

    def holds(self, index: int, rows: Tensor) -> bool:
        """Whether the outputs of block ``index`` are there for all of these samples."""
        filled = self._filled.get(index)
        return filled is not None and int(rows.max()) < len(filled) and bool(filled[rows].all())

    def get(self, index: int, rows: Tensor) -> Tensor:
        """Outputs of block ``index`` for these samples."""
        return self._kept[index][rows]

    def put(self, index: int, rows: Tensor, values: Tensor) -> None:
        """Keep the outputs of block ``index``.

        Raises:
            ValueError: all blocks together would take more than the limit.
        """
        needed = int(rows.max()) + 1
        kept = self._kept.get(index)
        if kept is None or needed > len(kept):
            more = needed
            if kept is not None:  # rows that come in order want room for more, others have shown nearly the last one
                more = max(needed, len(kept) + len(kept) // (4 if bool(self._filled[index].all()) else 64))
            others = sum(store.numel() * store.itemsize for i, store in self._kept.items() if i != index)
            size = more * values[0].numel() * values.itemsize
            if others + size > self.limit_gib * GIB:
                raise ValueError(
                    f"the outputs of {len(self._kept | {index: None})} blocks for {more} training samples take "
                    f"{(others + size) / GIB:.1f} GiB, and algorithm.memory_gib is {self.limit_gib:g}: raise it, or set "
                    "algorithm.cache=false"
                )
            grown, filled = values.new_empty((more, *values.shape[1:])), rows.new_zeros(more, dtype=torch.bool)
            if kept is not None:
                grown[: len(kept)] = kept
                filled[: len(kept)] = self._filled[index]
            self._kept[index], self._filled[index] = grown, filled
        self._kept[index][rows] = values
        self._filled[index][rows] = True

    def clear(self) -> None:
        """Forget everything."""
        self._kept, self._filled = {}, {}
