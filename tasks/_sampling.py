"""Batches of a graph: all of it at once, or sampled neighbourhoods of some of its nodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from locallearn.batch import Batch
from locallearn.tasks._batches import BatchLoader, Untouched, stream_generator


class WholeGraph:
    """One batch in every epoch, always the same object: what an algorithm worked out for it can be kept.

    Args:
        batch: the graph.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._kept = Untouched(*(t for t in (*batch, *batch.context) if isinstance(t, Tensor)))

    def __len__(self) -> int:
        """One."""
        return 1

    def batch_sizes(self) -> set[int]:
        """Number of nodes."""
        return {len(self._batch.inputs)}

    def everything(self) -> Batch:
        """The graph."""
        return self._batch

    def __iter__(self) -> Iterator[Batch]:
        """The graph.

        Raises:
            ValueError: somebody wrote into it.
        """
        self._kept.check()
        yield self._batch


class NeighbourSampler:
    """Draws the neighbourhood that decides the output of a few nodes (GraphSAGE; Hamilton et al. 2017, arXiv 1706.02216).

    In every hop each node that was reached in the hop before draws ``fanout`` of its in-neighbours, uniformly and
    without replacement, all of them where it has no more. Deviation from the paper, which draws with replacement; PyG's
    ``NeighborLoader`` does as here. All edges point towards the seeds: of an undirected graph the other direction is
    not among them, unless it was drawn too.

    Args:
        edges: ``(2, E)``, int64, from row 0 to row 1, on the CPU.
        nodes: number of nodes.
        fanouts: in-neighbours per node, hop after hop; -1 takes all.
    """

    def __init__(self, edges: Tensor, nodes: int, fanouts: Sequence[int]) -> None:
        source, target = edges.cpu()
        self._fanouts = tuple(fanouts)
        self._order = target.argsort(stable=True)
        self._neighbours = source[self._order]
        self._first = torch.zeros(nodes + 1, dtype=torch.int64)
        self._first[1:] = torch.bincount(target, minlength=nodes).cumsum(0)
        self._local = torch.full(
            (nodes,), -1
        )  # kept between calls: a new one would cost as much as the graph has nodes

    def __call__(self, seeds: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw.

        Args:
            seeds: node ids ``(S,)``, each once, on the CPU.
            generator: where every draw comes from, on the CPU.

        Returns:
            Ids of all reached nodes ``(N',)``, the seeds first and in their order; edges ``(2, E')`` in positions in it.
        """
        return self.draw(seeds, generator)[:2]

    def draw(self, seeds: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The same, and which of the graph's edges were drawn, ``(E',)``."""
        found, edges, drawn = [seeds], [], []
        self._local[seeds] = torch.arange(len(seeds))
        reached, frontier = len(seeds), seeds
        for fanout in self._fanouts:
            places, target = self._draw(frontier, fanout, generator)
            source = self._neighbours[places]
            frontier = torch.unique(source[self._local[source] < 0])
            self._local[frontier] = torch.arange(reached, reached + len(frontier))
            reached += len(frontier)
            found.append(frontier)
            edges.append(torch.stack((self._local[source], self._local[target])))
            drawn.append(self._order[places])
        nodes = torch.cat(found)
        self._local[nodes] = -1
        return nodes, torch.cat(edges, 1), torch.cat(drawn)

    def _draw(self, nodes: Tensor, fanout: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Places of drawn in-neighbours, and the node that each was drawn for."""
        first = self._first[nodes]
        degree = self._first[nodes + 1] - first
        few = degree <= fanout if fanout >= 0 else torch.ones_like(degree, dtype=torch.bool)
        counts = degree[few]
        before = counts.cumsum(0) - counts
        places = torch.arange(int(counts.sum())) + (first[few] - before).repeat_interleave(counts)
        drawn = first[~few, None] + _distinct(degree[~few], fanout, generator)
        target = torch.cat((nodes[few].repeat_interleave(counts), nodes[~few].repeat_interleave(drawn.shape[1])))
        return torch.cat((places, drawn.flatten())), target


def _distinct(sizes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """For every size n, ``count`` different numbers below n, all sets equally likely: ``(len(sizes), count)``.

    Floyd's algorithm (Bentley and Floyd 1987), for all rows at once: its cost does not grow with n, so a node with a
    million neighbours costs no more than another.
    """
    chosen = sizes.new_empty(len(sizes), max(count, 0))
    for j in range(count if len(sizes) else 0):
        last = sizes - count + j
        draw = (torch.rand(len(sizes), generator=generator, dtype=torch.float64) * (last + 1)).long()
        taken = (chosen[:, :j] == draw[:, None]).any(1)
        chosen[:, j] = torch.where(taken, last, draw)
    return chosen


class NeighbourLoader:
    """Batches of seed nodes with their sampled neighbourhoods, as the training data of a Lightning ``Trainer``.

    Every epoch goes through all seed nodes once, in a new order. A batch is
    ``Batch(x, y, (edges,), rows)``: features of the sampled nodes, their labels (-1 but for the seeds), edges in
    positions in the batch (and behind them what these carry), and the positions ``0 … S - 1`` of the seeds. It is a function of
    ``(seed, epoch, batch number)`` alone and the same on every device; it can be stopped and resumed as
    :class:`~locallearn.tasks.images.BatchLoader`, which draws the order.

    Args:
        x: features of all nodes ``(N, F)``; where they lie, the batches are made.
        y: class ids ``(N,)``, looked at for the seed nodes only.
        seeds: ids of the nodes to learn from.
        sampler: draws the neighbourhoods.
        batch_size: seed nodes in a batch; the last one of an epoch may be smaller.
        seed: of the order and of the draws.
        epoch_batches: see :class:`~locallearn.tasks.images.BatchLoader`.
        drop_last: leave out the last batch of an epoch if it is smaller.
        carried: weights or features of all edges of the sampler's graph, ``(E, ...)``.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        seeds: Tensor,
        sampler: NeighbourSampler,
        batch_size: int,
        seed: int = 0,
        epoch_batches: int | None = None,
        drop_last: bool = False,
        carried: Tensor | None = None,
    ) -> None:
        self._x, self._y, self._sampler, self._seed = x, y, sampler, seed
        self._carried, self._seeds = carried, seeds
        seeds = seeds.cpu()
        # Samples without entries: only the order and its place in the epoch are wanted.
        self._order = BatchLoader(
            torch.empty(len(seeds), 0),
            seeds,
            batch_size,
            shuffle=True,
            seed=seed,
            epoch_batches=epoch_batches,
            drop_last=drop_last,
        )

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._order)

    def __iter__(self) -> Iterator[Batch]:
        """Go through the next epoch, or through the rest of the one that ``load_state_dict`` has led into."""
        for chosen in self._order:
            seeds, place = chosen.targets, self._order.state_dict()
            draw = stream_generator(self._seed, place["epoch"], place["batch"])
            nodes, edges, drawn = self._sampler.draw(seeds, draw)
            device = self._x.device
            context = [edges.to(device)]
            if self._carried is not None:
                context.append(self._carried.index_select(0, drawn.to(device)))
            nodes, rows = nodes.to(device), torch.arange(len(seeds), device=device)
            labels = self._y.new_full((len(nodes),), -1)
            labels[rows] = self._y[nodes[rows]]
            yield Batch(self._x.index_select(0, nodes), labels, tuple(context), rows=rows)

    def batch_sizes(self) -> set[int]:
        """How many seed nodes there are in the batches of an epoch."""
        return self._order.batch_sizes()

    def everything(self) -> Batch:
        """The whole graph's features and labels, without its edges, with all seed nodes as rows."""
        return Batch(self._x, self._y, rows=self._seeds)

    def state_dict(self) -> dict[str, int]:
        """The place of the next batch, and what it depends on."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the last batch handed out by the loader that ``state`` comes from.

        Raises:
            ValueError: if that loader had another seed, batch size or number of seed nodes.
        """
        self._order.load_state_dict(state)
