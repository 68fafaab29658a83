"""ForwardGNN: every layer of a graph network learns on its own, on a graph that has been made to show the labels."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from locallearn.algorithms.base import Locality, ParamGroup, TaskInfo, Update
from locallearn.algorithms.layer_local import LayerLocal
from locallearn.batch import Batch
from locallearn.functional import forward_gnn as fg
from locallearn.nets.graph import GraphBlock, check_edges, kept, sum_of

_T = TypeVar("_T")
Edges = Tensor | tuple[Tensor, ...]
"""An edge index ``(2, E)``; with the weights ``(E,)`` of edges that have some."""
Variant = Literal["sf", "ff_la", "ff_vn", "sf_top_to_loss", "sf_top_to_input", "ce", "ff", "ce_top_to_input"]
_LINKS = ("ce", "ff", "ce_top_to_input")
_FORWARD_FORWARD = ("ff_la", "ff_vn")
_TO_INPUT = ("sf_top_to_input", "ce_top_to_input")
_TOP_DOWN = ("sf_top_to_loss", *_TO_INPUT)

# Inference of the top-to-input variants: so many sweeps, of which those from the second one on are averaged.
_SWEEPS, _SKIPPED = 10, 2


class _View(NamedTuple):
    """What the blocks see of a graph, in one or several views that differ by the labels they show.

    Attributes:
        inputs: of the first block, with rows of length 1, shared by all views, ``(N, F)``; with virtual nodes
            ``(N + K, F)``.
        graphs: edges of every view, or one for all of them.
        columns: further columns of the first block's input by view, ``(G, N, K)`` (``ff_la``), or of the last block's,
            ``(N + K, K)`` (``sf_top_to_input``).
        raw: the inputs before their rows were scaled (``sf_top_to_loss``).
    """

    inputs: Tensor
    graphs: tuple[Edges, ...]
    columns: Tensor | None = None
    raw: Tensor | None = None


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
        variant: see above.
        threshold: θ of the Forward-Forward losses.
        temperature: τ of the inner products of the ``sf`` variants.
        aggregate_once: pass an input that does not change along the edges once and keep the result, where the
            convolution allows it (GCN, GraphSAGE) and the input is not sparse. Weights differ by rounding only.
        seed: of virtual nodes and of the order of wrong labels.

    Raises:
        ValueError: an unknown variant, or a temperature that is not above 0.
    """

    virtual: Tensor
    train_labels: Tensor
    known_labels: Tensor
    asked: Tensor
    negatives: Tensor
    _nodes: int
    _widths: list[int]

    def __init__(
        self,
        variant: Variant = "sf",
        threshold: float = 2.0,
        temperature: float = 1.0,
        aggregate_once: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        if variant not in get_args(Variant):
            raise ValueError(f"variant is {variant!r}, expected one of {', '.join(get_args(Variant))}")
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}, expected a number above 0")
        self._variant = variant
        self.threshold = threshold
        self.temperature = temperature
        self.aggregate_once = aggregate_once
        self._kept = _Kept()

    @property
    def variant(self) -> str:
        """As given."""
        return self._variant

    @property
    def links(self) -> bool:
        """Whether this variant predicts edges instead of classes of nodes."""
        return self._variant in _LINKS

    @property
    def locality(self) -> Locality:
        """Layer-local; top-down variants show a layer what the layers above it said one step before."""
        return Locality.COUPLED if self._variant in _TOP_DOWN else Locality.LAYER_LOCAL

    @property
    def broadcast(self) -> str:
        """Labels, as edges, as input columns or in the loss."""
        if self.links:
            what = "edge labels in the loss"
        elif self._variant == "ff_la":
            what = "labels in the input"
        else:
            what = "labels in the edges to virtual nodes" + ("" if self._variant == "ff_vn" else " and in the loss")
        return (
            f"{what}; to every layer the outputs of those above it, one step old"
            if self._variant in _TOP_DOWN
            else what
        )

    @property
    def net_settings(self) -> dict[str, Any]:
        """Room for the labels in the first block's input, or for the block above in every block's."""
        if self._variant == "ff_la":
            return {"label_inputs": True}
        return {"top_down": "features" if self.links else "labels"} if self._variant in _TO_INPUT else {}

    @property
    def stages(self) -> list[list[str]]:
        """One unit after the other; top-down variants need all layers to learn at once."""
        if self._variant in _TOP_DOWN:
            raise ValueError(
                f"ForwardGNN's {self._variant} lets every layer read the ones above it, so all layers learn together: use "
                "schedule=joint"
            )
        return super().stages

    # -- what is built ------------------------------------------------------------------------------------------------
    def build(self, task: TaskInfo) -> None:
        """Check graph and network, draw virtual nodes and wrong labels, and note the training labels."""
        example = task.example
        self._check_task(task)
        self._nodes, features = example.inputs.shape
        if not self.links:
            rows, labels = self._check_labels(example)
            known = torch.full((self._nodes,), -1).index_copy_(0, rows, labels)
            self.register_buffer("train_labels", known)
            if self._variant in _FORWARD_FORWARD:
                self.register_buffer("known_labels", known.clone())
                self.register_buffer("asked", torch.ones(self._nodes, dtype=torch.bool))
                self.register_buffer("negatives", fg.wrong_labels(labels, self.outputs, torch.default_generator))
            if self._variant != "ff_la":
                self.register_buffer("virtual", torch.randn(self.outputs, features))
        self._widths = self._check_widths(features, weighted=len(example.context) > 1)
        if self._variant in _TOP_DOWN:
            dtype = next(self.blocks.parameters()).dtype
            view = self._right_view(example.inputs.to(dtype), *example.context)
            with torch.no_grad():
                for i, state in enumerate(self._first_states(view)):
                    self.register_buffer(f"state{i + 1}", state)

    def block_groups(self, index: int) -> list[ParamGroup]:
        """All weights of the block; ``ce_top_to_input`` has no weight decay, as in the authors' code."""
        group: ParamGroup = {"params": list(self.blocks[index].parameters())}
        return [{**group, "weight_decay": 0.0} if self._variant == "ce_top_to_input" else group]

    def reveal(self, targets: Tensor, rows: Tensor, asked: Tensor | None = None) -> None:
        """Take these labels as known at inference; only ``ff_la`` and ``ff_vn`` use any but the training nodes'.

        There, the nodes that are asked for show one class after the other; what is neither known nor asked for shows none.

        Raises:
            ValueError: not one target for every node of the graph.
        """
        if self._variant not in _FORWARD_FORWARD:
            return
        if targets.shape != self.known_labels.shape:
            raise ValueError(
                f"labels of shape {tuple(targets.shape)} were revealed on a graph of {self._nodes} nodes: give one per node"
            )
        known = torch.full_like(self.known_labels, -1)
        known[rows] = targets[rows]
        shown = torch.full_like(self.asked, asked is None)
        if asked is not None:
            shown[asked] = True
        for mine, new in ((self.known_labels, known), (self.asked, shown)):
            if not torch.equal(mine, new):  # what was made of the old ones is kept until they change
                mine.copy_(new)

    # -- learning -----------------------------------------------------------------------------------------------------
    def prepare(self, batch: Batch) -> Batch:
        """The views of the graph that the blocks see; kept while the same whole graph comes again.

        Raises:
            ValueError: a top-down variant gets another graph than the one it was attached to.
        """
        tensors = (batch.inputs, batch.targets, *batch.context, *(() if batch.rows is None else (batch.rows,)))
        labelled = None if self.links else self._kept.get("labelled", tensors, lambda: _labelled(batch))
        if self._kept.get("whole", tensors, lambda: self._is_whole(batch, labelled)):
            if self._variant in _FORWARD_FORWARD:
                drawn = (self.negatives, *self._drawn)
                view = self._kept.get(
                    "training", (*tensors, *drawn), lambda: self._training_view(batch, labelled, self.negatives)
                )
            else:
                view = self._right_view(batch.inputs, *batch.context)
        elif self._variant in _TOP_DOWN:
            raise ValueError(
                f"ForwardGNN's {self._variant} keeps what every layer said of every node one step before, and this batch is "
                "not the graph that it was attached to: train on the whole graph, or choose a variant without top-down"
            )
        else:
            view = self._training_view(batch, labelled)
        rows = batch.rows if labelled is None else labelled[0]
        return Batch(view.inputs, batch.targets, (view.graphs, view.columns), rows)

    def run(self, index: int, inputs: Tensor, batch: Batch) -> Tensor:
        """Run block ``index`` on every view, ``(G, N, d)``; only the loss's rows where nothing else reads the output."""
        graphs, columns = batch.context
        rows = None
        if not self.links and index + 1 == self.depth and self.trains(self.blocks.names[index]):
            assert batch.rows is not None
            rows = batch.rows
            if self._variant == "sf":
                virtual = torch.arange(-self.outputs, 0, device=rows.device) + len(inputs)
                rows = torch.cat((rows, virtual))
        return self._layer(index, inputs, graphs, columns if index == 0 else None, rows)

    def local_loss(self, index: int, output: Tensor, batch: Batch) -> Tensor:
        """The layer's loss from its output on every view; of all nodes, or of the loss's alone."""
        rows = batch.rows
        assert rows is not None
        if self.links:
            logits = self._edge_logits(output[0], rows)
            if self._variant == "ff":
                true = batch.targets > 0.5
                return fg.forward_forward_loss(logits[true], logits[~true], threshold=0.0)  # θ is in the logits
            return F.binary_cross_entropy_with_logits(logits, batch.targets.to(logits.dtype))
        if self._variant in _FORWARD_FORWARD:
            loud = fg.goodness(output if output.shape[1] == len(rows) else output.index_select(1, rows))
            return fg.forward_forward_loss(loud[0], loud[1:], self.threshold)
        return F.cross_entropy(self._class_logits(output[0], rows), batch.targets[rows])

    def emit(self, index: int, output: Tensor) -> Tensor:
        """The output with rows of length 1: of every view for ``ff_la``, else of the first, which shows the true labels."""
        return fg.normalise((output if self._variant == "ff_la" else output[0]).detach())

    def updates(self, batch: Batch) -> Iterator[Update]:
        """The layers in order; with top-to-input the first, third, ... before the second, fourth, ..."""
        if self._variant not in _TOP_DOWN:
            yield from super().updates(batch)
            return
        prepared = self.prepare(batch)
        view, states, names = _View(prepared.inputs, *prepared.context), self._states(), self.blocks.names
        fresh: dict[int, Tensor] = {}
        for i in self._order():
            trains = self.trains(names[i])
            with torch.set_grad_enabled(trains):
                output = self._layer_between(i, view, states)
            if trains:
                yield Update(names[i], self.local_loss(i, self._with_above(output, states[i + 1 :]), prepared))
            fresh[i] = self.emit(i, output)
            del output  # the block's graph ends here
            if self._variant in _TO_INPUT:  # the layers that come later in this step read it already
                states[i].copy_(fresh[i])
        for i, state in fresh.items():
            states[i].copy_(state)

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
    def predict(self, inputs: Tensor, *context: Any) -> Tensor:
        """Class scores ``(N, K)``, or for edges the outputs of all layers side by side, ``(N, Σ d)``.

        ``sf`` variants give the logarithm of the mean over layers of their class probabilities. ``ff_la`` and ``ff_vn``
        give the sum over layers of the goodness when all nodes that are asked for are said to be of one class
        (:meth:`reveal`; at first all whose label is not known). The scores of the others tell nothing: known labels stay,
        and where neither holds, none is shown.

        Raises:
            ValueError: classes are asked for on a graph with another number of nodes than the one attached to.
        """
        if self._variant in _FORWARD_FORWARD:
            return self._goodness_by_class(inputs, *context)
        said = self._said(self._right_view(inputs, *context))
        if self.links:
            return torch.cat(said[-self.depth :], 1)
        rows = torch.arange(len(inputs), device=inputs.device)
        return fg.mean_log_softmax(torch.stack([self._class_logits(h, rows) for h in said]))

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
        if not self.links:
            raise ValueError(f"ForwardGNN's {self._variant} classifies nodes; edges are scored by {', '.join(_LINKS)}")
        said = self._said(self._right_view(inputs, edges, *weights))
        return fg.mean_probability_logit(torch.stack([self._edge_logits(h, pairs) for h in said]))

    def activations(self, inputs: Tensor, *context: Any) -> Iterator[Tensor]:
        """Output of every layer at inference for the real nodes; ``ff_la`` reads label columns of 1/K for all of them."""
        if self._variant == "ff_la":
            nobody = torch.zeros(0, dtype=torch.int64, device=inputs.device)
            view = self._view(inputs, context, nobody, nobody[None])
        else:
            view = self._right_view(inputs, *context)
        for h in self._said(view, len(self.blocks))[-len(self.blocks) :]:
            yield h[: len(inputs)]

    def _goodness_by_class(self, inputs: Tensor, *edges: Tensor) -> Tensor:
        self._check_nodes(inputs)
        known, asked = self.known_labels, self.asked

        def make() -> _View:
            rows = ((known >= 0) | asked).nonzero().flatten()
            classes = torch.arange(self.outputs, device=known.device)[:, None]
            return self._view(inputs, edges, rows, torch.where(known[rows] >= 0, known[rows], classes))

        view = self._kept.get("inference", (inputs, *edges, known, asked, *self._drawn), make)
        return sum_of(fg.goodness(output)[:, : len(inputs)] for output in self._said_upwards(view, self.depth)).T

    def _said(self, view: _View, depth: int | None = None) -> list[Tensor]:
        """What every layer says at inference, ``(N, d)`` each; top-to-input gives the layers of one sweep after another."""
        if self._variant in _TO_INPUT:
            states, said = self._first_states(view), []
            block, projected = self.blocks[0], None
            if isinstance(block, GraphBlock) and block.linear(view.inputs) and block.sparse(view.inputs):
                projected = block.project(view.inputs)  # once for all sweeps
            for sweep in range(_SWEEPS):
                outputs = {}
                for i in self._order():
                    outputs[i] = self._layer_between(i, view, states, projected)[0]
                    states[i] = fg.normalise(outputs[i])
                if sweep >= _SKIPPED:
                    said += [outputs[i] for i in sorted(outputs)]
            return said
        if self._variant == "sf_top_to_loss":
            states = self._first_states(view)
            own = [self._layer_between(i, view, states)[0] for i in range(len(states))]
            return [self._with_above(h, states[i + 1 :]) for i, h in enumerate(own)]
        return [output[0] for output in self._said_upwards(view, self.depth if depth is None else depth)]

    def _said_upwards(self, view: _View, depth: int) -> Iterator[Tensor]:
        """What layer after layer says of every view, ``(G, N, d)``; the layers below the one that trains are kept."""
        first, x = next((i for i, name in enumerate(self.blocks.names) if self.trains(name)), depth), view.inputs
        if not 0 < first < depth:
            yield from self._upwards(view, x, 0, depth)
            return
        below = self._kept.get("said", self._frozen(first, x), lambda: list(self._upwards(view, x, 0, first)))
        yield from below
        read = self._kept.get("read", (below[-1],), lambda: fg.normalise(below[-1]))
        yield from self._upwards(view, read, first, depth)

    def _upwards(self, view: _View, x: Tensor, start: int, stop: int) -> Iterator[Tensor]:
        for i in range(start, stop):
            output = self._layer(i, x, view.graphs, view.columns if i == 0 else None)
            yield output
            x = fg.normalise(output)

    # -- top-down -----------------------------------------------------------------------------------------------------
    def _states(self) -> list[Tensor]:
        return [getattr(self, f"state{i + 1}") for i in range(len(self.blocks))]

    def _order(self) -> list[int]:
        indices = range(len(self.blocks))
        return [*indices[::2], *indices[1::2]] if self._variant in _TO_INPUT else list(indices)

    def _first_states(self, view: _View) -> list[Tensor]:
        """Normalised outputs of one pass from below, with zeros where the layers above are read.

        That of top-to-loss is on raw inputs and hands raw outputs on, as in the authors' code.
        """
        states: list[Tensor] = []
        x = view.inputs if view.raw is None else view.raw
        for i, above in enumerate(self._above()):
            output = self._layer(i, x, view.graphs, x.new_zeros(len(x), above) if above else None)
            states.append(self.emit(i, output))
            x = states[-1] if view.raw is None else output[0].detach()
        return states

    def _layer_between(
        self, index: int, view: _View, states: list[Tensor], projected: list[Tensor] | None = None
    ) -> Tensor:
        """Output ``(1, N, d)`` of a layer that reads the states below it and, with top-to-input, above it."""
        above = None
        if self._variant in _TO_INPUT:
            above = states[index + 1] if index + 1 < len(states) else view.columns
        if index == 0:
            return self._layer(0, view.inputs, view.graphs, above, projected=projected)
        return self._layer(index, states[index - 1], view.graphs, above)

    def _with_above(self, output: Tensor, above: list[Tensor]) -> Tensor:
        """With top-to-loss the mean of an output and of all that stands above it."""
        return sum_of((output, *above)) / (1 + len(above)) if self._variant == "sf_top_to_loss" else output

    def _above(self) -> list[int]:
        """Columns that every layer reads from above."""
        if self._variant not in _TO_INPUT:
            return [0] * len(self.blocks)
        return [*self._widths[1:], 0 if self.links else self.outputs]

    # -- views of a graph ---------------------------------------------------------------------------------------------
    def _view(self, inputs: Tensor, edges: tuple[Tensor, ...], rows: Tensor, labels: Tensor) -> _View:
        """The graph with these nodes' labels shown, one view for each row of ``labels``, ``(G, M)``."""
        nodes = len(inputs)
        if self._variant == "ff_la":
            columns = fg.label_columns(rows, labels, nodes, self.outputs, inputs.dtype)
            # A row is as long whichever label it shows, so that all views share the features. Columns of a row sum to 1.
            joint = fg.normalise(torch.cat((inputs, columns[0]), 1))
            scale = joint[:, inputs.shape[1] :].sum(1, keepdim=True)
            return _View(joint[:, : inputs.shape[1]].contiguous(), (_edges(*edges),), columns * scale)
        raw = torch.cat((inputs, self.virtual.to(inputs.dtype)))
        x = fg.normalise(raw)
        # An edge to a virtual node weighs 1, as an edge without a weight does.
        index, *weights = edges
        weights = [torch.cat((w, w.new_ones(2 * len(rows)))) for w in weights]
        graphs = tuple(_edges(fg.join_virtual_nodes(index, rows, shown, nodes), *weights) for shown in labels)
        if self._variant == "sf_top_to_loss":
            return _View(x, graphs, raw=raw)
        if self._variant != "sf_top_to_input":
            return _View(x, graphs)
        columns = fg.label_columns(rows, labels[0], nodes, self.outputs, inputs.dtype)
        own = torch.eye(self.outputs, dtype=inputs.dtype, device=inputs.device)
        return _View(x, graphs, fg.normalise(torch.cat((columns, own))))

    def _right_view(self, inputs: Tensor, *edges: Tensor) -> _View:
        """The graph that shows the training labels; for edges the graph as it is."""

        def make() -> _View:
            if self.links:
                return _View(fg.normalise(inputs), (_edges(*edges),))
            rows = (self.train_labels >= 0).nonzero().flatten()
            return self._view(inputs, edges, rows, self.train_labels[rows][None])

        if not self.links:
            self._check_nodes(inputs)
        return self._kept.get("right", (inputs, *edges, *self._drawn), make)

    @property
    def _drawn(self) -> tuple[Tensor, ...]:
        """Features of the virtual nodes, where this variant has any."""
        return () if self.links or self._variant == "ff_la" else (self.virtual,)

    def _training_view(
        self, batch: Batch, labelled: tuple[Tensor, Tensor] | None, wrong: Tensor | None = None
    ) -> _View:
        """What a batch shows: the right labels, and for ``ff_la`` and ``ff_vn`` the wrong ones, ``(K - 1, M)``, as well."""
        if labelled is None:
            return _View(fg.normalise(batch.inputs), (_edges(*batch.context),))
        rows, labels = labelled
        shown = labels[None]
        if self._variant in _FORWARD_FORWARD:
            wrong = fg.wrong_labels(labels, self.outputs, self.rng(labels.device)) if wrong is None else wrong
            shown = torch.cat((shown, wrong))
        return self._view(batch.inputs, batch.context, rows, shown)

    def _is_whole(self, batch: Batch, labelled: tuple[Tensor, Tensor] | None) -> bool:
        """Whether a batch is the graph that the rule was attached to, with its training labels."""
        if labelled is None or len(batch.inputs) != self._nodes:
            return len(batch.inputs) == self._nodes
        rows, labels = labelled
        return torch.equal(torch.full_like(self.train_labels, -1).index_copy_(0, rows, labels), self.train_labels)

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
                    sums = block.spread(terms, *_apart(graphs[0]))
                else:
                    sums = torch.stack(
                        [
                            block.spread([_of_view(t, g) for t in terms], *_apart(edges))
                            for g, edges in enumerate(graphs)
                        ]
                    )
            if sums is not None:
                output = block.finish(sums)
                return output if output.ndim == 3 else output[None]
        count = max(len(graphs), *(len(part) for part in parts if part.ndim == 3), 1)
        outputs = [block(self._joined(index, g, parts), *_apart(graphs[g % len(graphs)])) for g in range(count)]
        return torch.stack(outputs) if count > 1 else outputs[0][None]

    def _joined(self, index: int, view: int, parts: list[Tensor]) -> Tensor:
        """All columns that a block reads in one view; of a whole graph with label columns kept, with its sparse form."""
        mine = [_of_view(part, view) for part in parts]
        if len(mine) == 1:
            return mine[0]
        if self._variant == "ff_la" and self._kept.holds(parts[0]):
            return kept(parts[1], ("joined", index, view), lambda: torch.cat(mine, 1))
        return torch.cat(mine, 1)

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
            whole = block.aggregate(part, *_apart(graphs[0]))
            return whole if chosen is None else [a.index_select(-2, chosen) for a in whole]

        # A whole graph is trained on by the same nodes in every step, so the rows need not be part of the key.
        sums = block.combine(kept(x, ("aggregate", index, chosen is None), lambda: aggregate(x)))
        return sums if more is None else sums + block.combine(aggregate(more), x.shape[-1])

    def _class_logits(self, h: Tensor, rows: Tensor) -> Tensor:
        # Not two slices, whose backward passes fill a tensor of zeros each.
        nodes, virtual = torch.split(h, [len(h) - self.outputs, self.outputs])
        if len(nodes) != len(rows):
            # Not nodes[rows], whose backward pass sorts the rows for the case that one comes twice.
            nodes = nodes.index_select(0, rows)
        return fg.virtual_logits(nodes, virtual, self.temperature)

    def _edge_logits(self, h: Tensor, pairs: Tensor) -> Tensor:
        products = fg.edge_products(h, pairs)
        return products.square().sum(1) - self.threshold if self._variant == "ff" else products.sum(1)

    # -- refusals -----------------------------------------------------------------------------------------------------
    def _check_task(self, task: TaskInfo) -> None:
        example = task.example
        name = f"ForwardGNN's {self._variant}"
        if len(example.context) not in (1, 2) or not all(isinstance(c, Tensor) for c in example.context):
            raise ValueError(
                f"ForwardGNN learns on graphs, whose batches carry an edge index and perhaps weights as context, and this "
                f"task's carry {len(example.context)} things: choose a graph task, or another algorithm"
            )
        if any(c.ndim != 1 for c in example.context[1:]):
            raise ValueError(
                "ForwardGNN joins nodes to virtual ones, and the edges of this graph carry features, which those edges could "
                "not have: set dataset.edge_features=false, give the graph edge_weight, or choose another algorithm"
            )
        pairs = example.rows is not None and example.rows.ndim == 2
        if self.links and (task.classes or not pairs):
            raise ValueError(f"{name} predicts edges, and this task has classes: choose sf, ff_la or ff_vn, or links")
        if not self.links and (not task.classes or pairs):
            raise ValueError(
                f"{name} classifies nodes, and this task has no classes: choose ce or ff, or a task with classes"
            )
        if example.inputs.ndim != 2 or not example.inputs.is_floating_point():
            raise ValueError(
                f"ForwardGNN reads one row of numbers per node, and inputs are {example.inputs.dtype} of shape "
                f"{tuple(example.inputs.shape)}: give floats of shape (N, F)"
            )
        if not bool(example.inputs.isfinite().all()):
            broken = (~example.inputs.isfinite()).any(1).nonzero().flatten().tolist()
            raise ValueError(
                f"features of {len(broken)} nodes are not finite, the first is node {broken[0]}: repair the data"
            )
        check_edges(example.context[0], len(example.inputs))
        if pairs:
            assert example.rows is not None
            check_edges(example.rows, len(example.inputs))

    def _check_labels(self, example: Batch) -> tuple[Tensor, Tensor]:
        rows, labels = _labelled(example)
        if not len(rows):
            raise ValueError("no node of this graph has a training label: check the training mask")
        if int(labels.min()) < 0 or int(labels.max()) >= self.outputs:
            raise ValueError(
                f"labels of training nodes go from {int(labels.min())} to {int(labels.max())}, expected 0 to "
                f"{self.outputs - 1}: check the number of classes"
            )
        return rows, labels

    def _check_nodes(self, inputs: Tensor) -> None:
        if len(inputs) != self._nodes:
            raise ValueError(
                f"ForwardGNN knows the labels of the {self._nodes} nodes of the graph it was attached to, and this graph has "
                f"{len(inputs)}: predict on that graph"
            )

    def _check_widths(self, features: int, weighted: bool) -> list[int]:
        """Width of every block's output, from a pass of a single node through one block after the other."""
        names, dtype = self.blocks.names, next(self.blocks.parameters()).dtype
        settings = ", ".join(f"{key}={value}" for key, value in self.net_settings.items())
        above = [0] * len(names)
        if self._variant in _TO_INPUT:
            for name, block in zip(names, self.blocks, strict=True):
                if not isinstance(block, GraphBlock):
                    raise ValueError(
                        f"block {name!r} does not say how wide its output is, which ForwardGNN's {self._variant} has to know "
                        f"of the block above: make the network with locallearn.nets.gnn and {settings}"
                    )
            if len(names) < 2:
                raise ValueError(
                    f"ForwardGNN's {self._variant} lets a layer read the one above it, and this network has one layer: use two "
                    "or more (net.hidden=[128,128])"
                )
            above = [cast(GraphBlock, block).width for block in list(self.blocks)[1:]]
            above.append(0 if self.links else self.outputs)
        widths: list[int] = []
        for i, (name, block) in enumerate(zip(names, self.blocks, strict=True)):
            wanted = (widths[-1] if widths else features) + above[i]
            wanted += self.outputs if self._variant == "ff_la" and i == 0 else 0
            loop = torch.zeros(2, 1, dtype=torch.int64)
            try:
                with torch.no_grad():
                    output = block(torch.zeros(1, wanted, dtype=dtype), loop, *([torch.ones(1)] if weighted else []))
            except Exception as error:
                hint = f": make the network with {settings}" if settings else ""
                raise ValueError(
                    f"block {name!r} does not take the {wanted} columns that ForwardGNN's {self._variant} gives it "
                    f"({error}){hint}"
                ) from error
            if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != 1:
                raise ValueError(f"block {name!r} does not give one row per node, which ForwardGNN needs")
            widths.append(output.shape[1])
        if self._variant == "sf_top_to_loss" and len(set(widths)) > 1:
            raise ValueError(
                f"ForwardGNN's {self._variant} averages the outputs of all blocks, which are {widths} wide: give all blocks "
                "the same width"
            )
        return widths

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": _Kept()}


class _Kept:
    """Results that are kept while the tensors they were made of come again unchanged, the last one of every name.

    A step of a fused optimizer leaves a tensor's version as it was, so what learns must not be among these tensors.
    """

    def __init__(self) -> None:
        self._results: dict[str, tuple[tuple[Tensor, ...], tuple[int, ...], Any]] = {}

    def get(self, name: str, tensors: tuple[Tensor, ...], make: Callable[[], _T]) -> _T:
        versions = tuple(0 if t.is_inference() else t._version for t in tensors)
        known = self._results.get(name)
        same = known is not None and len(known[0]) == len(tensors)
        if known is not None and same and all(map(operator.is_, known[0], tensors)) and known[1] == versions:
            return cast(_T, known[2])
        # Validation runs in inference mode, and what it makes is to serve training, too.
        with torch.inference_mode(False), torch.no_grad():
            result = make()
        self._results[name] = (tensors, versions, result)
        return result

    def forget(self, *names: str) -> None:
        """Drop these results."""
        for name in names:
            self._results.pop(name, None)

    def holds(self, x: Tensor) -> bool:
        """Whether this is a kept result, or the input of a kept view."""
        results = [result for _, _, result in self._results.values()]
        return any(x is (result.inputs if isinstance(result, _View) else result) for result in results)


def _edges(index: Tensor, *weights: Tensor) -> Edges:
    return (index, *weights) if weights else index


def _apart(edges: Edges) -> tuple[Tensor, ...]:
    return (edges,) if isinstance(edges, Tensor) else edges


def _of_view(part: Tensor, index: int) -> Tensor:
    return part[index] if part.ndim == 3 else part


def _labelled(batch: Batch) -> tuple[Tensor, Tensor]:
    """Nodes whose labels train, in rising order, and those labels."""
    rows = batch.rows
    if rows is None:
        rows = torch.arange(len(batch.inputs), device=batch.inputs.device)
    rows = rows.nonzero().flatten() if rows.dtype == torch.bool else rows.sort().values
    return rows, batch.targets[rows]
