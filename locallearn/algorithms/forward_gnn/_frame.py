"""The frame of ForwardGNN's kinds: layers that run on views of a graph, and what is kept of a graph that stays the same."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from locallearn.algorithms.base import Locality, ParamGroup, TaskInfo
from locallearn.algorithms.forward_gnn._checks import check_columns, check_graph
from locallearn.algorithms.forward_gnn._views import Edges, Kept, View, apart, of_view
from locallearn.algorithms.layer_local import LayerLocal
from locallearn.batch import Batch
from locallearn.functional import forward_gnn as fg
from locallearn.nets.graph import GraphBlock, kept

Variant = Literal["sf", "ff_la", "ff_vn", "sf_top_to_loss", "sf_top_to_input", "ce", "ff", "ce_top_to_input"]


class ForwardGNN(LayerLocal):
    """ForwardGNN (Park et al., ICLR 2024, arXiv 2403.11004, with what the authors' code settles).

    A layer's output is H = ReLU(GNN(X, A)), and every layer reads rows of length 1. Nodes are classified by

    * ``sf`` (single forward): one virtual node per class is joined to the class's training nodes, and a layer learns to
      tell by the inner product of a node's row with the rows of the virtual nodes which one it belongs to;
    * ``ff_la`` (labels appended): K label columns stand beside the features, right ones in a positive and wrong ones in
      K − 1 negative graphs, and a layer learns to be loud on the positive one;
    * ``ff_vn`` (virtual nodes): the same, with edges to the virtual node of the right or a wrong class;
    * ``sf_top_to_loss``, ``sf_top_to_input``: ``sf`` in which the outputs of the layers above, one step old, take part in
      a layer's loss, or in its input. They are kept for every node, so each step needs the whole graph.

    and edges are predicted by ``ce`` (cross entropy of Σ h_i h_j), ``ff`` (the Forward-Forward loss of Σ (h_i h_j)²) and
    ``ce_top_to_input``.

    The labels of the training nodes are those of the example that the task shows; nothing else is looked at. A rule
    without top-down states is meant for ``schedule=sequential``, one layer after the other.

    Deviations: see docs/algorithms/forward_gnn.md. The network's own readout is not used.

    Args:
        variant: see above; what is made is of the variant's own class.
        threshold: θ of the Forward-Forward losses.
        temperature: τ of the inner products of the ``sf`` variants.
        aggregate_once: pass an input that does not change along the edges once and keep the result, where the
            convolution allows it (GCN, GraphSAGE) and the input is not sparse. Weights differ by rounding only.
        seed: of virtual nodes and of the order of wrong labels.

    Raises:
        ValueError: an unknown variant, or a temperature that is not above 0.
    """

    kinds: ClassVar[dict[str, type[ForwardGNN]]] = {}
    """The class of every variant."""
    variant: str
    locality: Locality = Locality.LAYER_LOCAL
    _shows: str  # what tells layers the labels
    _nodes: int

    def __new__(
        cls,
        variant: Variant = "sf",
        threshold: float = 2.0,
        temperature: float = 1.0,
        aggregate_once: bool = True,
        seed: int = 0,
    ) -> ForwardGNN:
        """Make the class of this variant."""
        if cls is ForwardGNN and variant not in cls.kinds:
            raise ValueError(f"variant is {variant!r}, expected one of {', '.join(cls.kinds)}")
        return super().__new__(cls.kinds[variant] if cls is ForwardGNN else cls)

    def __init__(
        self,
        variant: Variant = "sf",
        threshold: float = 2.0,
        temperature: float = 1.0,
        aggregate_once: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}, expected a number above 0")
        self.threshold = threshold
        self.temperature = temperature
        self.aggregate_once = aggregate_once
        self._kept = Kept()

    @property
    def broadcast(self) -> str:
        """Labels, as edges, as input columns or in the loss."""
        return self._shows

    # -- what is built ------------------------------------------------------------------------------------------------
    def build(self, task: TaskInfo) -> None:
        """Check graph and network, and note the graph that is learned on."""
        self._note(task)
        hint = f": make the network with {self._settings}" if self.net_settings else ""
        weighted = len(task.example.context) > 1
        features = task.example.inputs.shape[1]
        check_columns(self.blocks, features, self._beside(), weighted, f"ForwardGNN's {self.variant}", hint)

    def _note(self, task: TaskInfo) -> None:
        """Check that the task is of this kind; keep and draw what is needed of its example."""
        check_graph(task)
        self._nodes = len(task.example.inputs)

    @property
    def _settings(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.net_settings.items())

    def _beside(self) -> list[int]:
        """Columns that every block reads beside what comes from below."""
        return [0] * len(self.blocks)

    def block_groups(self, index: int) -> list[ParamGroup]:
        """All weights of the block."""
        return [{"params": list(self.blocks[index].parameters())}]

    def reveal(self, targets: Tensor, rows: Tensor, asked: Tensor | None = None) -> None:
        """Tell which labels may be used at inference from now on, on the graph whose nodes are all known.

        Only the Forward-Forward variants use any but the training nodes'; for all others nothing changes.

        Args:
            targets: class ids ``(N,)`` of all nodes; those outside of ``rows`` must not be looked at.
            rows: index or mask of the nodes whose labels are known.
            asked: index or mask of the nodes whose classes will be asked for; ``None``: all others.
        """

    # -- learning -----------------------------------------------------------------------------------------------------
    def prepare(self, batch: Batch) -> Batch:
        """The views of the graph that the blocks see; kept while the same whole graph comes again."""
        view, rows = self._training_view(batch)
        return Batch(view.inputs, batch.targets, (view.graphs, view.columns), rows)

    @abstractmethod
    def _training_view(self, batch: Batch) -> tuple[View, Tensor | None]:
        """What a batch shows, and the nodes or pairs of nodes that the loss is about."""

    def run(self, index: int, inputs: Tensor, batch: Batch) -> Tensor:
        """Run block ``index`` on every view, ``(G, N, d)``; only the loss's rows where nothing else reads the output."""
        graphs, columns = batch.context
        last = index + 1 == self.depth and self.trains(self.blocks.names[index])
        rows = self._judged(batch.rows, len(inputs)) if last else None
        return self._layer(index, inputs, graphs, columns if index == 0 else None, rows)

    def _judged(self, rows: Tensor | None, nodes: int) -> Tensor | None:
        """Nodes whose outputs the loss reads; ``None``: all."""
        return None

    def emit(self, index: int, output: Tensor) -> Tensor:
        """The output with rows of length 1; of several views that of the first, which shows the true labels."""
        return fg.normalise(output[0].detach())

    def train_only(self, units: frozenset[str] | None) -> None:
        """Train these units only, and forget what was kept of the layers below those that trained before."""
        self._kept.forget("prefix", "said", "read")
        super().train_only(units)

    def cache_frozen(self, keep: bool) -> None:
        """Refused: the frozen outputs of a whole graph are kept anyway.

        Raises:
            ValueError: if they are to be kept by sample.
        """
        if keep:
            raise ValueError(
                "ForwardGNN keeps the outputs of frozen layers for a whole graph by itself, and cannot look up those of "
                "single nodes: set schedule.cache=false"
            )

    def _frozen_prefix(self, first: int, batch: Batch, prepared: Batch) -> Any:
        run = super()._frozen_prefix
        if not 0 < first < len(self.blocks) or not self._kept.holds(prepared.inputs):
            return run(first, batch, prepared)
        return self._kept.get("prefix", self._frozen(first, prepared.inputs), lambda: run(first, batch, prepared))

    def _frozen(self, first: int, inputs: Tensor) -> tuple[Tensor, ...]:
        """What the outputs of the blocks before ``first`` depend on."""
        return inputs, *(t for block in list(self.blocks)[:first] for t in (*block.parameters(), *block.buffers()))

    # -- inference ----------------------------------------------------------------------------------------------------
    @abstractmethod
    def _right_view(self, inputs: Tensor, *edges: Tensor) -> View:
        """The graph that shows the training labels; for edges the graph as it is. Kept."""

    def _open_view(self, inputs: Tensor, *edges: Tensor) -> View:
        """What probes read."""
        return self._right_view(inputs, *edges)

    def score_pairs(self, inputs: Tensor, edges: Tensor, pairs: Tensor, *weights: Tensor) -> Tensor:
        """Logit of the mean over layers of their probabilities that these pairs of nodes are joined.

        Args:
            inputs: features of all nodes, ``(N, F)``.
            edges: edge index that messages pass along, ``(2, E)``.
            pairs: ``(2, M)``.
            weights: of the edges, ``(E,)``, where they have some.

        Returns:
            Shape ``(M,)``.

        Raises:
            ValueError: the variant classifies nodes.
        """
        raise ValueError(f"ForwardGNN's {self.variant} classifies nodes; edges are scored by ce, ff, ce_top_to_input")

    def activations(self, inputs: Tensor, *context: Any) -> Iterator[Tensor]:
        """Output of every layer at inference for the real nodes; ``ff_la`` reads label columns of 1/K for all of them."""
        for h in self._said(self._open_view(inputs, *context), len(self.blocks))[-len(self.blocks) :]:
            yield h[: len(inputs)]

    def _said(self, view: View, depth: int) -> list[Tensor]:
        """What every layer says at inference, ``(N, d)`` each."""
        return [output[0] for output in self._said_upwards(view, depth)]

    def _said_upwards(self, view: View, depth: int) -> Iterator[Tensor]:
        """What layer after layer says of every view, ``(G, N, d)``; the layers below the one that trains are kept."""
        first, x = next((i for i, name in enumerate(self.blocks.names) if self.trains(name)), depth), view.inputs
        if not 0 < first < depth:
            yield from self._upwards(view, x, 0, depth)
            return
        below = self._kept.get("said", self._frozen(first, x), lambda: list(self._upwards(view, x, 0, first)))
        yield from below
        read = self._kept.get("read", (below[-1],), lambda: fg.normalise(below[-1]))
        yield from self._upwards(view, read, first, depth)

    def _upwards(self, view: View, x: Tensor, start: int, stop: int) -> Iterator[Tensor]:
        for i in range(start, stop):
            output = self._layer(i, x, view.graphs, view.columns if i == 0 else None)
            yield output
            x = fg.normalise(output)

    # -- one layer ----------------------------------------------------------------------------------------------------
    def _layer(
        self,
        index: int,
        x: Tensor,
        graphs: tuple[Edges, ...],
        more: Tensor | None = None,
        rows: Tensor | None = None,
        projected: list[Tensor] | None = None,
    ) -> Tensor:
        """Output of a block on every view, ``(G, N, d)``.

        Args:
            index: of the block.
            x: ``(N, columns)``, shared by all views, or ``(G, N, columns)``.
            graphs: edges of every view, or one for all.
            more: further columns on the right of ``x``, shared or by view.
            rows: nodes of a whole graph whose output is wanted; taken up only where a kept aggregate has a row for each
                node, so that the output is that of all nodes, or of these.
            projected: ``x`` times the block's weights, where somebody has it.
        """
        block = self.blocks[index]
        parts = [x] if more is None else [x, more]
        if isinstance(block, GraphBlock) and block.linear(x):
            sums = self._kept_aggregate(index, block, x, graphs, more, rows)
            if sums is None and (len(graphs) > 1 or any(part.ndim == 3 for part in parts) or more is not None):
                # Weights first: what the views share is multiplied once.
                terms = block.project(x) if projected is None else projected
                if more is not None:
                    terms = [a + b for a, b in zip(terms, block.project(more, x.shape[-1]), strict=True)]
                if len(graphs) == 1:
                    sums = block.spread(terms, *apart(graphs[0]))
                else:
                    sums = torch.stack(
                        [block.spread([of_view(t, g) for t in terms], *apart(edges)) for g, edges in enumerate(graphs)]
                    )
            if sums is not None:
                output = block.finish(sums)
                return output if output.ndim == 3 else output[None]
        count = max(len(graphs), *(len(part) for part in parts if part.ndim == 3), 1)
        outputs = [block(self._joined(index, g, parts), *apart(graphs[g % len(graphs)])) for g in range(count)]
        return torch.stack(outputs) if count > 1 else outputs[0][None]

    def _joined(self, index: int, view: int, parts: list[Tensor]) -> Tensor:
        """All columns that a block reads in one view."""
        mine = [of_view(part, view) for part in parts]
        return mine[0] if len(mine) == 1 else torch.cat(mine, 1)

    def _kept_aggregate(
        self,
        index: int,
        block: GraphBlock,
        x: Tensor,
        graphs: tuple[Edges, ...],
        more: Tensor | None,
        rows: Tensor | None,
    ) -> Tensor | None:
        """Sums of the block from the kept aggregate of an input that stays the same; ``None`` where that does not pay."""
        if not (self.aggregate_once and len(graphs) == 1 and self._kept.holds(x)) or block.sparse(x):
            return None
        chosen = rows if block.rowwise else None

        def aggregate(part: Tensor) -> list[Tensor]:
            whole = block.aggregate(part, *apart(graphs[0]))
            return whole if chosen is None else [a.index_select(-2, chosen) for a in whole]

        # A whole graph is trained on by the same nodes in every step, so the rows need not be part of the key.
        sums = block.combine(kept(x, ("aggregate", index, chosen is None), lambda: aggregate(x)))
        return sums if more is None else sums + block.combine(aggregate(more), x.shape[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": Kept()}
