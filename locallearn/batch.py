"""What a task hands to an algorithm for one step."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """One step's worth of data, free of any assumption about images.

    Attributes:
        inputs: what the first block reads, shape ``(N, ...)``.
        targets: what the loss compares with, e.g. class ids ``(N,)`` of dtype int64.
        context: further positional arguments that every block receives after its input, e.g. the edge index of a
            graph. Empty for plain networks.
        rows: which rows of an output carry targets, as an index or mask of length N; ``None`` means all of them.
            A graph passes its training nodes here; ``targets`` then still has one entry per row of ``inputs``. An index
            of shape ``(2, M)`` means pairs of rows (the ends of edges), with one target for each pair, ``(M,)``.
        index: position of every sample in the training set, shape ``(N,)``, int64; ``None`` where samples have no
            stable position. A cache of frozen activations is looked up by it.
        source: the same of samples that augmentation makes anew every time, whose values must not be looked up: position of
            the sample that each was made from, shape ``(N,)``, int64; ``None`` where ``index`` says it, or nobody knows.
    """

    inputs: Tensor
    targets: Tensor
    context: tuple[Any, ...] = ()
    rows: Tensor | None = None
    index: Tensor | None = None  # type: ignore[assignment]  # shadows tuple.index, which nobody needs here
    source: Tensor | None = None

    @property
    def places(self) -> Tensor | None:
        """Which samples of the training set these are, whatever became of their values; ``None``: nobody knows."""
        return self.source if self.index is None else self.index
