"""Graph networks: one convolution of PyTorch Geometric per block, and message passing as a sparse matrix product."""

from __future__ import annotations

import difflib
import inspect
import warnings
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary

from locallearn.nets.blocks import Blocks

_T = TypeVar("_T")
Readout = Literal["conv", "linear"]
TopDown = Literal["labels", "features"]

_SPARSE = 0.05
"""Largest share of features other than zero at which a sparse product is taken; at 5 % it is several times faster."""


def gnn(
    input_shape: Sequence[int],
    outputs: int,
    conv: str = "GCNConv",
    hidden: Sequence[int] = (128, 128),
    readout: Readout | None = "conv",
    conv_options: Mapping[str, Any] | None = None,
    dropout: float = 0.0,
    label_inputs: bool = False,
    top_down: TopDown | None = None,
    edge_dim: int | None = None,
) -> Blocks:
    """Blocks of ``conv -> ReLU -> dropout`` on a graph, and a readout; all take ``(x, edge_index)``.

    Where edges carry weights or features, blocks take them as a third argument (:class:`GraphBlock`).

    Weights are drawn as PyTorch Geometric draws them. A convolution with ``heads`` (GAT) shares the hidden width out
    among them and concatenates; in the readout they are averaged, as in PyTorch Geometric's own GAT. A convolution that
    wants a network (GIN) gets ``Linear -> ReLU -> Linear``.

    Args:
        input_shape: ``(F,)``, the features of one node.
        outputs: number of classes, or width of the embedding.
        conv: name of a convolution in ``torch_geometric.nn``, e.g. ``GCNConv``, ``SAGEConv``, ``GATConv``, ``GINConv``.
        hidden: width of every block.
        readout: ``"conv"``: one more convolution; ``"linear"``: a linear layer for every node; ``None``: features only.
        conv_options: further arguments of every convolution, e.g. ``{"heads": 4}``.
        dropout: after every block's ReLU.
        label_inputs: make the first block read ``outputs`` columns more, for a rule that writes labels there.
        top_down: make every block read the output of the block above it as well, after what comes from below. Above the
            last block stand the labels (``"labels"``, ``outputs`` columns) or nothing (``"features"``). Only a rule that
            fills these inputs can run such a network; it has no readout.
        edge_dim: features of an edge; ``None``: edges carry none, or weights. Convolutions that take features (GAT,
            TransformerConv) are made for so many.

    Raises:
        ValueError: the input is not one row per node; no hidden width, or one below 1; an unknown convolution, readout
            or ``top_down``; options that the convolution does not take; features of edges for one that takes none.
    """
    if len(input_shape) != 1:
        raise ValueError(f"input_shape is {tuple(input_shape)}, expected (features,) of one node")
    if not hidden or any(width < 1 for width in hidden):
        raise ValueError(f"hidden is {list(hidden)}, expected at least one positive width")
    if readout not in (*get_args(Readout), None):
        raise ValueError(f"readout is {readout!r}, expected 'conv', 'linear' or null")
    if top_down not in (*get_args(TopDown), None):
        raise ValueError(f"top_down is {top_down!r}, expected 'labels', 'features' or null")
    options = dict(conv_options or {})
    if edge_dim is not None:
        _check_takes(conv, _named(conv), "edge_attr")
        if "edge_dim" in inspect.signature(_named(conv).__init__).parameters:
            options.setdefault("edge_dim", edge_dim)
    above = [*hidden[1:], outputs if top_down == "labels" else 0]
    blocks: dict[str, nn.Module] = {}
    for i, (before, width) in enumerate(zip([input_shape[0], *hidden], hidden, strict=False)):
        before += outputs if label_inputs and i == 0 else 0
        before += above[i] if top_down is not None else 0
        after: list[nn.Module] = [nn.ReLU(), nn.Dropout(dropout)] if dropout > 0 else [nn.ReLU()]
        blocks[f"layer{i + 1}"] = GraphBlock(_convolution(conv, before, width, options), width, *after)
    if readout is None or top_down is not None:
        return Blocks(blocks)
    if readout == "linear":
        return Blocks(blocks, NodeLinear(hidden[-1], outputs))
    return Blocks(blocks, GraphBlock(_convolution(conv, hidden[-1], outputs, options, last=True), outputs))


class NodeLinear(nn.Linear):
    """A linear layer for every node, which has no use for the edges."""

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """``(N, in)`` to ``(N, out)``."""
        return F.linear(x, self.weight, self.bias)


class GraphBlock(nn.Module):
    """One convolution and what follows it: ``(x, edge_index)`` to ``after(conv(x, edge_index))``.

    What edges carry is a third argument: weights ``(E,)``, which the convolution gets as ``edge_weight``, or features
    ``(E, D)``, which it gets as ``edge_attr``.

    A GCN and a GraphSAGE with mean are sums of terms ``A x Wᵀ``, A either a normalised adjacency (one entry per edge) or
    the identity: ``x ↦ Σ A_j x W_jᵀ + b``. Such a block is :meth:`linear`, and is computed with sparse products and the
    convolution's own weights, to what the convolution itself gives but for rounding, and many times faster on a CPU.
    The two ways there, weights first (:meth:`project`, :meth:`spread`) and edges first (:meth:`aggregate`,
    :meth:`combine`), are open to whoever wants to keep one half; :meth:`finish` ends both. Wide inputs of which at most
    5 % are not zero are multiplied as sparse matrices on a CPU, by linear layers inside any convolution, too. Edges and
    such inputs are sorted once per tensor, and the result is kept as long as the tensor lives.

    Args:
        conv: a convolution of PyTorch Geometric, or any module that takes ``(x, edge_index)``.
        width: columns of its output.
        after: modules that follow it.
    """

    def __init__(self, conv: nn.Module, width: int, *after: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.width = width
        self.after = nn.Sequential(*after)
        self._kind = _kind(conv)

    def linear(self, x: Tensor) -> bool:
        """Whether the convolution is a sum of terms ``A x Wᵀ``, and there are sparse products where ``x`` lies."""
        return self._kind is not None and x.device.type in ("cpu", "cuda")

    def forward(self, x: Tensor, edges: Tensor, carried: Tensor | None = None) -> Tensor:
        """``(N, in)`` and ``(2, E)``, and what edges carry, to ``(N, width)``.

        Raises:
            ValueError: ``x`` is not as wide as the weights, an edge leads to a node that is not there, or the convolution
                has no use for what edges carry.
        """
        if carried is not None:
            self.check(carried)
        if not self.linear(x) or (carried is not None and carried.requires_grad):
            features = _sparse_features(x) if x.shape[-1] > self.width else None
            given = {} if carried is None else {_argument(carried): carried}
            with nullcontext() if features is None else _SparseLinear(x, features):
                output: Tensor = self.after(self.conv(x, edges, **given))
            return output
        wanted = self._terms()[0][0].shape[1]
        if x.shape[1:] != (wanted,):
            raise ValueError(f"input of shape {tuple(x.shape)} does not fit weights for {wanted} features of a node")
        if x.shape[1] > self.width:
            return self.finish(self.spread(self.project(x), edges, carried))
        return self.finish(self.combine(self.aggregate(x, edges, carried)))

    def check(self, carried: Tensor) -> None:
        """Refuse weights ``(E,)`` or features ``(E, D)`` of edges that the convolution would not take, or would ignore.

        Raises:
            ValueError: says which, and what to do.
        """
        name = _argument(carried)
        _check_takes(type(self.conv).__name__, self.conv, name)
        # Made without a width for them, these take features of edges and leave them aside without a word.
        if name == "edge_attr" and None in (getattr(self.conv, key, 0) for key in ("lin_edge", "in_edge_channels")):
            raise ValueError(
                f"{type(self.conv).__name__} was made for edges without features, and these carry {carried.shape[1]}: make it "
                "with edge_dim, or set dataset.edge_features=false to leave them aside"
            )

    def project(self, x: Tensor, start: int = 0) -> list[Tensor]:
        """``x W_jᵀ`` of every term, for columns of the input from ``start`` on.

        Args:
            x: ``(..., N, columns)``.
            start: first column of the weights that is used.
        """
        features = _sparse_features(x) if x.shape[-1] > self.width else None
        weights = [w[:, start : start + x.shape[-1]] for w, _ in self._terms()]
        if features is None:
            return [F.linear(x, w) for w in weights]
        return [_product(features, w.T) for w in weights]

    def spread(self, projected: Sequence[Tensor], edges: Tensor, weights: Tensor | None = None) -> Tensor:
        """``Σ A_j p_j`` of what :meth:`project` gave; with the weights ``(E,)`` of edges that carry some."""
        return sum_of(
            self._adjacent(p, edges, weights) if moves else p
            for p, (_, moves) in zip(projected, self._terms(), strict=True)
        )

    def aggregate(self, x: Tensor, edges: Tensor, weights: Tensor | None = None) -> list[Tensor]:
        """``A_j x`` of every term, for ``x`` of shape ``(..., N, columns)``; with the weights of edges that carry some."""
        return [self._adjacent(x, edges, weights) if moves else x for _, moves in self._terms()]

    def combine(self, aggregated: Sequence[Tensor], start: int = 0) -> Tensor:
        """``Σ a_j W_jᵀ`` of what :meth:`aggregate` gave, for columns of the input from ``start`` on."""
        return sum_of(
            F.linear(a, w[:, start : start + a.shape[-1]]) for a, (w, _) in zip(aggregated, self._terms(), strict=True)
        )

    def finish(self, sums: Tensor) -> Tensor:
        """Add the bias, and run what follows the convolution."""
        bias = self.conv.bias if self._kind == "gcn" else cast(nn.Linear, self.conv.lin_l).bias
        output: Tensor = self.after(sums if bias is None else sums + cast(Tensor, bias))
        return output

    @property
    def rowwise(self) -> bool:
        """Whether what follows the convolution treats every node by itself, so that some rows can go without the others."""
        return all(isinstance(module, nn.ReLU | nn.Dropout) for module in self.after)

    def sparse(self, x: Tensor) -> bool:
        """Whether :meth:`project` takes ``x`` as a sparse matrix."""
        return x.shape[-1] > self.width and _sparse_features(x) is not None

    def _terms(self) -> list[tuple[Tensor, bool]]:
        """Weights ``(width, in)`` of every term, and whether it passes along the edges."""
        if self._kind == "gcn":
            return [(cast(nn.Linear, self.conv.lin).weight, True)]
        neighbours: tuple[Tensor, bool] = (cast(nn.Linear, self.conv.lin_l).weight, True)
        return [neighbours, (cast(nn.Linear, self.conv.lin_r).weight, False)] if self.conv.root_weight else [neighbours]

    def _adjacent(self, x: Tensor, edges: Tensor, weights: Tensor | None) -> Tensor:
        if weights is not None:
            self.check(weights)
        matrix = self._adjacency(edges, weights, x.shape[-2], torch.promote_types(x.dtype, torch.float32))
        if x.ndim == 2:
            return _product(matrix, x)
        return torch.stack([self._adjacent(part, edges, weights) for part in x])

    def _adjacency(self, edges: Tensor, weights: Tensor | None, nodes: int, dtype: torch.dtype) -> _Matrix:
        if self._kind == "gcn":
            improved, loops = bool(self.conv.improved), bool(self.conv.add_self_loops)
            key: Hashable = ("gcn", improved, loops, nodes, dtype)
            if weights is None:
                return kept(edges, key, lambda: _gcn_matrix(edges, None, nodes, improved, loops, dtype))
            return _kept_of_both(
                edges, weights, key, lambda: _gcn_matrix(edges, weights, nodes, improved, loops, dtype)
            )
        return kept(edges, ("mean", nodes, dtype), lambda: _mean_matrix(edges, nodes, dtype))


def check_edge_features(net: Blocks, context: Sequence[Any]) -> None:
    """Refuse a network that has no use for what the edges of a graph carry.

    Args:
        net: the network.
        context: what its blocks get after their input: the edge index, and perhaps weights ``(E,)`` or features ``(E, D)``.

    Raises:
        ValueError: names the block, and says how to leave weights and features aside.
    """
    if len(context) < 2:
        return
    for name, block in (*net.members.items(), ("readout", net.readout)):
        if isinstance(block, GraphBlock):
            block.check(context[1])
        elif block is not None:
            try:
                inspect.signature(block.forward).bind(None, *context)
            except TypeError:
                raise ValueError(
                    f"block {name!r} takes {inspect.signature(block.forward)}, and the edges of this graph carry "
                    f"{_argument(context[1])} of shape {tuple(context[1].shape)}, which comes after the edge index: give its "
                    "forward one more argument, or set dataset.edge_features=false to leave them aside"
                ) from None


def check_edges(edges: Tensor, nodes: int) -> None:
    """Refuse what is no edge index of a graph of so many nodes.

    Raises:
        ValueError: says what is wrong with it.
    """
    if edges.ndim != 2 or edges.shape[0] != 2 or edges.dtype != torch.int64:
        raise ValueError(
            f"edges are {edges.dtype} of shape {tuple(edges.shape)}, expected an edge index: int64 of shape (2, E)"
        )
    if edges.numel() and (int(edges.min()) < 0 or int(edges.max()) >= nodes):
        raise ValueError(
            f"edges go from node {int(edges.min())} to node {int(edges.max())}, but the graph's {nodes} nodes are numbered "
            f"0 to {nodes - 1}"
        )


def sum_of(terms: Any) -> Tensor:
    """Sum of one or more tensors."""
    first, *others = terms
    for term in others:
        first = first + term
    return cast(Tensor, first)


# -- convolutions of PyTorch Geometric ----------------------------------------------------------------------------------
@cache
def _geometric() -> Any:
    """``torch_geometric.nn``, which is slow to import and warns of what is deprecated in others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch_geometric.nn

        return torch_geometric.nn


def _named(name: str) -> Any:
    """The convolution of this name.

    Raises:
        ValueError: there is none.
    """
    known = [n for n in _geometric().conv.__all__ if n != "MessagePassing"]
    if name not in known:
        stems = {n.lower().removesuffix("conv"): n for n in known}
        near = [stems[n] for n in difflib.get_close_matches(name.lower().removesuffix("conv"), stems)]
        raise ValueError(
            f"conv is {name!r}, which torch_geometric.nn does not have; "
            + (f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}")
        )
    return getattr(_geometric(), name)


def _argument(carried: Tensor) -> str:
    """By which name convolutions take weights ``(E,)`` or features ``(E, D)`` of edges."""
    return "edge_weight" if carried.ndim == 1 else "edge_attr"


def _check_takes(name: str, conv: Any, argument: str) -> None:
    takes = inspect.signature(conv.forward).parameters
    if argument not in takes:
        other = next((a for a in ("edge_weight", "edge_attr") if a in takes), None)
        raise ValueError(
            f"{name} takes no {argument}, which the edges of this graph carry"
            + (f" (it takes {other}: name them so in the graph if they are that)" if other else "")
            + ": choose another convolution (GCNConv takes edge_weight, GATConv edge_attr), or set "
            "dataset.edge_features=false to leave them aside"
        )


def _convolution(name: str, before: int, after: int, options: Mapping[str, Any], last: bool = False) -> nn.Module:
    make = _named(name)
    if "cached" in options:
        raise ValueError(
            "conv_options has cached, which would keep the first graph's edges for every other graph: drop it"
        )
    parameters = inspect.signature(make.__init__).parameters
    options = dict(options)
    width = after
    if "heads" in parameters and "concat" in parameters:
        if last:
            options["concat"] = False
        elif options.get("concat", True):
            heads = int(options.get("heads", 1))
            if after % heads:
                raise ValueError(f"a hidden width of {after} cannot be shared out among the {heads} heads of {name}")
            width = after // heads
    try:
        if "nn" in parameters:
            inner = nn.Sequential(nn.Linear(before, after), nn.ReLU(), nn.Linear(after, after))
            return cast(nn.Module, make(inner, **options))
        return cast(nn.Module, make(before, width, **options))
    except TypeError as error:
        raise ValueError(f"{name} cannot be made with conv_options={dict(options)}: {error}") from error


def _kind(conv: nn.Module) -> str | None:
    """Which sum of products this convolution is, if it is one of those written here."""
    if type(conv) is _geometric().GCNConv and conv.normalize and conv.flow == "source_to_target":
        return "gcn"
    if type(conv) is _geometric().SAGEConv and conv.aggr == "mean" and conv.flow == "source_to_target":
        return None if conv.project or conv.normalize else "mean"
    return None


# -- sparse products ----------------------------------------------------------------------------------------------------
@torch.library.custom_op("locallearn::sparse_product", mutates_args=())
def _sparse_product(crow: Tensor, column: Tensor, values: Tensor, rows: int, columns: int, dense: Tensor) -> Tensor:
    # An operator of its own, because FLOP counters take a sparse matrix for a dense one. Autocast would make halves of it.
    with torch.autocast(dense.device.type, enabled=False):
        return torch.sparse_csr_tensor(crow, column, values, (rows, columns), check_invariants=False) @ dense


@register_flop_formula(
    torch.ops.locallearn.sparse_product
)  # before PyTorch's counter begins, which then looks for no more
def _flops(crow: Any, column: Any, values: Any, rows: int, columns: int, dense: Any, *_: Any, **__: Any) -> int:
    """Two for every entry and column."""
    return int(2 * values[0] * dense[1])


@cache
def _set_up() -> None:
    """Once per process: let PyTorch say here that its sparse matrices are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.zeros(0, dtype=torch.int64), torch.zeros(0), (1, 1))


@dataclass(eq=False)
class _Matrix:
    """A sparse matrix ``(rows, columns)`` by rows; an entry that is there twice counts twice."""

    crow: Tensor
    column: Tensor
    values: Tensor
    rows: int
    columns: int
    _transposed: _Matrix | None = None

    shared_between_steps = True  # locallearn.cost takes it for data, not for an activation

    @classmethod
    def of(cls, row: Tensor, column: Tensor, values: Tensor, rows: int, columns: int) -> _Matrix:
        _set_up()
        order = torch.argsort(row, stable=True)
        crow = row.new_zeros(rows + 1)
        crow[1:] = torch.bincount(row, minlength=rows).cumsum(0)
        return cls(crow, column[order], values[order], rows, columns)

    @property
    def transposed(self) -> _Matrix:
        if self._transposed is None:
            row = torch.arange(self.rows, device=self.crow.device).repeat_interleave(self.crow.diff())
            self._transposed = _Matrix.of(self.column, row, self.values, self.columns, self.rows)
        return self._transposed

    def times(self, dense: Tensor) -> Tensor:
        """Product with ``(columns, D)``; there are no sparse products in half precision, so these take the long way."""
        product: Tensor = _sparse_product(
            self.crow, self.column, self.values, self.rows, self.columns, dense.to(self.values.dtype)
        )
        return product.to(dense.dtype)


class _Product(torch.autograd.Function):
    """``A x`` with its gradient ``Aᵀ g``. The matrix is the graph's or the data's, so it counts as no activation."""

    @staticmethod
    def forward(dense: Tensor, matrix: _Matrix) -> Tensor:
        return matrix.times(dense)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _Matrix], output: Tensor) -> None:
        ctx.matrix = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.matrix.transposed.times(grad), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        product: Tensor = ctx.matrix.times(tangent)
        return product


def _product(matrix: _Matrix, dense: Tensor) -> Tensor:
    return cast(Tensor, _Product.apply(dense, matrix))


def _gcn_matrix(
    edges: Tensor, carried: Tensor | None, nodes: int, improved: bool, loops: bool, dtype: torch.dtype
) -> _Matrix:
    """``D^-1/2 (A + I) D^-1/2``, as PyTorch Geometric weighs the edges; row: where an edge ends."""
    from torch_geometric.nn.conv.gcn_conv import gcn_norm

    check_edges(edges, nodes)
    if carried is not None:
        carried = carried.to(dtype)
    weighted, weights = gcn_norm(edges, carried, nodes, improved, loops, "source_to_target", dtype)
    if not bool(weights.isfinite().all()):
        raise ValueError(
            "edge weights below 0 leave a node with a negative sum of weights, of which GCNConv takes a root: scale them to be "
            "positive, choose another convolution, or set dataset.edge_features=false"
        )
    return _Matrix.of(weighted[1], weighted[0], weights, nodes, nodes)


def _mean_matrix(edges: Tensor, nodes: int, dtype: torch.dtype) -> _Matrix:
    """Mean over the nodes that an edge leads from; a node that none leads to gets zeros."""
    check_edges(edges, nodes)
    shares = 1 / torch.bincount(edges[1], minlength=nodes).to(dtype)
    return _Matrix.of(edges[1], edges[0], shares[edges[1]], nodes, nodes)


def _sparse_features(x: Tensor) -> _Matrix | None:
    """The sparse form of an input that is nearly all zeros; on a GPU dense products are left dense."""
    if x.ndim != 2 or x.requires_grad or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return None

    def make() -> _Matrix | None:
        entries = x.nonzero() if x.count_nonzero() <= _SPARSE * x.numel() else None
        if entries is None:
            return None
        row, column = entries.unbind(1)
        return _Matrix.of(row, column.contiguous(), x[row, column], *x.shape)

    return kept(x, "features", make)


class _SparseLinear(TorchFunctionMode):
    """Inside, ``F.linear`` of this very input is a sparse product: convolutions like GAT begin with one."""

    def __init__(self, x: Tensor, features: _Matrix) -> None:
        super().__init__()
        self._x = x
        self._features = features

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Only ``F.linear(x, weight)`` and ``F.linear(x, weight, bias)`` with arguments by position."""
        if func is F.linear and not kwargs and args[0] is self._x:
            product = _product(self._features, args[1].T)
            return product if len(args) < 3 or args[2] is None else product + args[2]
        return func(*args, **(kwargs or {}))


_KEPT = WeakTensorKeyDictionary()


def kept(tensor: Tensor, name: Hashable, make: Callable[[], _T]) -> _T:
    """What ``make`` made of this very tensor before, as long as it lives and nobody writes into it.

    Args:
        tensor: what the result is made of; the result must not refer to it.
        name: which of the things that are made of it.
        make: called without gradients, the first time.
    """
    version = 0 if tensor.is_inference() else tensor._version
    known: tuple[int, dict[Hashable, Any]] | None = _KEPT.get(tensor)  # type: ignore[no-untyped-call]
    if known is None or known[0] != version:
        known = _KEPT[tensor] = (version, {})
    if name not in known[1]:
        # Validation runs in inference mode, and what it makes is to serve training, too.
        with torch.inference_mode(False), torch.no_grad():
            known[1][name] = make()
    return cast(_T, known[1][name])


def _kept_of_both(edges: Tensor, weights: Tensor, name: Hashable, make: Callable[[], _T]) -> _T:
    """The same for two tensors; of weights that come with an edge index, the last ones' result is kept."""
    version = 0 if weights.is_inference() else weights._version
    cell: list[Any] = kept(edges, ("weighted", name), list)
    if not cell or cell[0]() is not weights or cell[1] != version:
        with torch.inference_mode(False), torch.no_grad():
            cell[:] = [weakref.ref(weights), version, make()]
    return cast(_T, cell[2])
