"""Activation checkpointing: a network run in segments whose inner activations are computed again for the backward pass."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from locallearn.batch import Batch
from locallearn.nets.blocks import Blocks, fitted

Checkpoint = str | int | Sequence[str]
"""``"auto"``, a number of segments, or names of the blocks after which a segment ends."""


class Segments:
    """Runs a network in segments; of all but the last only the input is kept for the backward pass.

    The last segment and the readout run as they are: what they keep is needed at once. Outputs, gradients and draws are
    those of the plain run, bit by bit. Buffers (normalisation statistics) move once: the second pass starts from what the
    first one started from, and what it makes of it is thrown away.

    Args:
        blocks: the network.
        cuts: places of the blocks after which a segment ends, in order; the network's end is none.
    """

    def __init__(self, blocks: Blocks, cuts: Sequence[int]) -> None:
        self._blocks = blocks
        self.cuts = list(cuts)

    def __call__(self, inputs: Any, *context: Any) -> Tensor:
        """The network's output."""
        start = 0
        for cut in self.cuts:
            members = [self._blocks[i] for i in range(start, cut + 1)]
            inputs = _again_later(members, inputs, context)
            start = cut + 1
        for i in range(start, len(self._blocks)):
            inputs = self._blocks[i](inputs, *context)
        readout = self._blocks.readout
        output: Tensor = inputs if readout is None else readout(inputs, *context)
        return output


def _again_later(members: Sequence[nn.Module], inputs: Any, context: tuple[Any, ...]) -> Any:
    leaves, shape = tree_flatten(inputs)

    def run(*given: Any) -> Any:
        x = tree_unflatten(given, shape)
        for block in members:
            x = block(x, *context)
        return x

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        first = _Noting(members)
        return first, _Returning(first)

    # preserve_rng_state: dropout draws the same again, and what comes after draws what it would have drawn
    return checkpoint(run, *leaves, use_reentrant=False, context_fn=contexts, preserve_rng_state=True)


class _Noting:
    """The first pass: keeps the buffers of all parts that train as they were before it."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        self._members = members
        self.before: list[tuple[dict[str, Tensor | None], str, Tensor]] = []

    def __enter__(self) -> None:
        # Which of them the pass moves is not to be seen: BatchNorm writes past the version counter.
        self.before = [
            (part._buffers, name, buffer.clone())
            for member in self._members
            for part in member.modules()
            if part.training
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]

    def __exit__(self, *raised: object) -> None:
        """Nothing to undo."""


class _Returning:
    """The second pass: works on copies of those buffers as they were, and leaves the real ones alone."""

    def __init__(self, first: _Noting) -> None:
        self._first = first

    def __enter__(self) -> None:
        self._real = [holder[name] for holder, name, _ in self._first.before]
        for holder, name, old in self._first.before:
            holder[name] = old.clone()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for (holder, name, _), real in zip(self._first.before, self._real, strict=True):
            holder[name] = real


def segments(blocks: Blocks, wanted: Checkpoint, example: Batch) -> Segments:
    """The segments that were asked for.

    Args:
        blocks: the network.
        wanted: ``"auto"``: those with the fewest peak bytes kept for gradients, and of equal ones those with the least work
            done twice; a number: the best of all ways to make so many segments; or the names of the blocks, in order, after
            which a segment ends.
        example: of the data; segments are chosen by a dry run of it on a copy.

    Raises:
        ValueError: a block that is not there, is named twice or out of order, or is the last one; more segments than blocks.
    """
    names = blocks.names
    if wanted == "auto":
        return Segments(blocks, _Sizes(blocks, example).best())
    if isinstance(wanted, int):
        if isinstance(wanted, bool) or not 1 <= wanted <= len(names):
            raise ValueError(
                f"checkpoint is {wanted}, but the network has {len(names)} blocks: ask for 1 to {len(names)} segments"
            )
        return Segments(blocks, _Sizes(blocks, example).best(wanted))
    listed = [wanted] if isinstance(wanted, str) else list(wanted)
    for name in listed:
        if name not in names:
            raise ValueError(
                f"checkpoint names {name!r}, and the network has no such block to cut after; it has {', '.join(names)}"
            )
    cuts = [names.index(name) for name in listed]
    if cuts != sorted(set(cuts)):
        raise ValueError(f"checkpoint is {listed}, expected blocks in the order of the forward pass, each once")
    if cuts and cuts[-1] == len(names) - 1:
        raise ValueError(f"checkpoint names {listed[-1]!r}, after which the network ends: leave it out")
    return Segments(blocks, cuts)


class _Sizes:
    """What every block keeps for gradients and takes to run, from a dry run in training mode on a copy."""

    def __init__(self, blocks: Blocks, example: Batch) -> None:
        twin = copy.deepcopy(blocks).train()
        known = _places([*twin.parameters(), *twin.buffers()])
        x: Any = fitted(twin, example.inputs)
        self._saved: list[dict[int, int]] = []  # of every block: place of a storage -> bytes
        self._inputs: list[dict[int, int]] = []
        self._flops: list[int] = []
        alive: list[Any] = []  # places are told apart by what lies there, so nothing may go

        def pack(tensor: Tensor) -> Tensor:
            alive.append(tensor)
            self._saved[-1].update({k: v for k, v in _places([tensor]).items() if k not in known})
            return tensor

        counter = FlopCounterMode(display=False)
        with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor), counter:
            for block in twin:
                self._inputs.append(_places(tree_leaves(x)))
                self._saved.append(dict(self._inputs[-1]))
                alive.append(x)
                x = block(x, *example.context)
                self._flops.append(counter.get_total_flops() - sum(self._flops))
            if twin.readout is not None:
                twin.readout(x, *example.context)

    @cached_property
    def _within(self) -> list[list[int]]:
        """Bytes that blocks ``i`` to ``j - 1`` keep together, their input included."""
        table = []
        for i in range(len(self._saved)):
            row, union, size = [0] * (i + 1), dict[int, int](), 0
            for saved in self._saved[i:]:
                size += sum(value for key, value in saved.items() if key not in union)
                union |= saved
                row.append(size)
            table.append(row)
        return table

    def best(self, parts: int | None = None) -> list[int]:
        """Cuts with the fewest peak bytes; of equal ones those with the least work done twice, and then the fewest."""
        low, high = 0, self._within[0][-1] + sum(sum(held.values()) for held in self._inputs)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._fits(middle, parts) else (middle + 1, high)
        return self._cheapest(low, parts)

    def _fits(self, bound: int, parts: int | None) -> bool:
        """Whether some cuts stay within the bound: fewer bytes held before a segment are always better."""
        count = len(self._saved)
        held: dict[tuple[int, int], int] = {(0, 0): 0}  # (segments so far, place) -> bytes of their inputs
        for i in range(count):
            for made in range(i + 1):
                before = held.get((made, i))
                if before is None:
                    continue
                if before + self._within[i][count] <= bound and parts in (None, made + 1):
                    return True
                own = before + sum(self._inputs[i].values())
                for j in range(i + 1, count):
                    if before + self._within[i][j] <= bound:
                        key = (0 if parts is None else made + 1, j)
                        held[key] = min(held.get(key, own), own)
        return False

    def _cheapest(self, bound: int, parts: int | None) -> list[int]:
        """Of all cuts within the bound those with the least work done twice."""
        count = len(self._saved)
        # (bytes held, work done twice, cuts): at every place those that no other one beats in both
        states: list[list[tuple[int, int, tuple[int, ...]]]] = [[] for _ in range(count)]
        states[0].append((0, 0, ()))
        ends: list[tuple[int, int, tuple[int, ...]]] = []
        for i in range(count):
            for held, work, cuts in _unbeaten(states[i], parts is not None):
                if held + self._within[i][count] <= bound and parts in (None, len(cuts) + 1):
                    ends.append((work, len(cuts), cuts))
                own = held + sum(self._inputs[i].values())
                for j in range(i + 1, count):
                    if held + self._within[i][j] <= bound:
                        states[j].append((own, work + sum(self._flops[i:j]), (*cuts, j - 1)))
        return list(min(ends)[2])


def _unbeaten(
    states: Iterable[tuple[int, int, tuple[int, ...]]], by_number: bool
) -> list[tuple[int, int, tuple[int, ...]]]:
    kept: list[tuple[int, int, tuple[int, ...]]] = []
    least: dict[int, int] = {}
    for held, work, cuts in sorted(states, key=lambda s: (s[0], s[1], len(s[2]))):
        number = len(cuts) if by_number else 0
        if number not in least or work < least[number]:
            least[number] = work
            kept.append((held, work, cuts))
    return kept


def _places(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes of storages by their place; tensors without a storage of their own (sparse ones) count nothing."""
    found = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            try:
                storage = tensor.untyped_storage()
            except (NotImplementedError, RuntimeError):
                continue
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found
