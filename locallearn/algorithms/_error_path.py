"""Which way an error takes down a network: what autograd's graph of one forward pass shows of it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Functions of autograd that multiply matrices, and the edges of those whose last or first operand is only added.
_PRODUCTS = re.compile(
    r"(mm|mv|linear|convolution\w*|conv\d\w*|convnd\w*)$|^(dot|vdot|addr|cdist|pdist|trilinear)$|dotproduct|attention"
)
_RECURRENT = re.compile(r"rnn|lstm|gru")
_ADDED = {"addmm": 0, "addmv": 0, "baddbmm": 0, "addbmm": 0, "addr": 0, "sparseaddmm": 0}
_BIASED = re.compile(r"^linear$|^mkldnnlinear$|conv")
# Functions that take a weight and activations entry by entry, or add up, or put one beside the other.
_ENTRYWISE = re.compile(
    r"^(r?sub|add|mul|div|addcmul|addcdiv|lerp|pow|atan2|hypot|where|maximum|minimum|max|min|fmax|fmin|clamp(min|max)?|logaddexp2?"
    r"|copysign|xlogy|prelu(kernel)?|cat|stack|maskedfill|maskedscatter|indexput(impl)?|index(add|copy)|scatter(add)?"
    r"|(slice|select)scatter|copy(slices)?|native(layer|group|batch)norm|(cudnn|miopen)?batchnorm|(fused)?rmsnorm|mseloss)$"
)
# Functions after which an error depends on what activations and the weights beside them are, not only on where they were.
_CURVED = re.compile(r"^(pow|abs|exp|expm1|sqrt|norm|linalgvectornorm)$")
# Functions of two operands, or of one and a constant, each of whose entries comes of one entry of either.
_FACTORS = frozenset(("mul", "div"))
_MEETING = _FACTORS | {"add", "sub", "rsub", "addcmul", "addcdiv", "lerp", "pow", "maximum", "minimum"}
# A slice that keeps the shape: older versions of PyTorch make one of every `:` between brackets.
_IN_PLACE = _FACTORS | {
    "add",
    "sub",
    "rsub",
    "neg",
    "nativedropout",
    "fuseddropout",
    "clone",
    "tocopy",
    "alias",
    "slice",
}
_MOVING = frozenset(("view", "reshapealias", "unsafeview", "unsqueeze", "squeeze", "transpose", "permute", "t"))
# Functions that add up entries, by the number of last dimensions along which they do; none: they say themselves which.
_MIXING = dict.fromkeys(("sum", "mean", "cumsum", "fftr2c", "fftc2c", "fftc2r"), 0) | {
    "avgpool2d": 2,
    "avgpool3d": 3,
    "adaptiveavgpool2d": 2,
    "adaptiveavgpool3d": 3,
    "mkldnnadaptiveavgpool2d": 2,
}
_SUMS = frozenset(("add", "sub", "rsub"))
_SPREADING = frozenset(("expand", "repeat", "repeatinterleave", "unsqueeze", "broadcastto"))


class Fault(NamedTuple):
    """A place where an error would pass a matrix as in backpropagation.

    Attributes:
        function: autograd's name of what is computed there.
        weights: the weights that it would pass, or those that are in doubt; none: a matrix that takes no gradient.
        after: the carried layers that come next below.
    """

    function: str
    weights: list[Tensor]
    after: list[str]


class ErrorPath(NamedTuple):
    """What a graph shows.

    Attributes:
        faults: see there, from the input to the output.
        products: carried layers right below products of activations (attention).
        carried: how often each layer is carried.
    """

    faults: list[Fault]
    products: list[str]
    carried: dict[str, int]


class _Below(NamedTuple):
    """What the graph below a function holds.

    Attributes:
        carried: a carried layer.
        product: a product of matrices, so that this is no weight any more but activations.
        spread: a sum in which every entry of activations meets several of a weight (distances to prototypes).
    """

    carried: bool
    product: bool
    spread: bool = False

    @property
    def activations(self) -> bool:
        return self.carried or self.product


def error_path(output: Tensor) -> ErrorPath:
    """Walk the graph of a forward pass.

    Nodes whose attribute ``layer`` is a name are carried layers. Anything else that multiplies activations by something
    that learns, or by a matrix that takes no gradient, sends the error through its transpose; so may a function that is
    not known here. Where activations and weights meet entry by entry, as in normalisations, scales and positional
    parameters, the gradient of each is local and nothing is wrong.

    Args:
        output: of the network.
    """
    root = output.grad_fn
    path = ErrorPath([], [], {})
    if root is None:
        return path
    below: dict[Any, _Below] = {}
    pending: list[Any] = [root]
    while pending:  # operands first, without recursion: graphs are deep
        node = pending[-1]
        if node in below:
            pending.pop()
            continue
        operands = [operand for operand, _ in node.next_functions if operand is not None]
        unseen = [operand for operand in operands if operand not in below]
        if unseen:
            pending += unseen
            continue
        pending.pop()
        below[node] = _looked_at(node, below, path)
    return path


def _looked_at(node: Any, below: Mapping[Any, _Below], path: ErrorPath) -> _Below:
    layer = getattr(node, "layer", None)
    edges = [operand for operand, _ in node.next_functions]
    if isinstance(layer, str):
        path.carried[layer] = path.carried.get(layer, 0) + 1
        return _Below(True, True)
    name = _plain(node)
    somebodys = isinstance(node, torch.autograd.function.BackwardCFunction)
    learning = [edge for edge in edges if edge is not None]
    carried = any(below[edge].carried for edge in learning)
    if somebodys:
        mixed = len(learning) > 1 and not all(below[edge].activations for edge in learning)
        unknown = mixed or "checkpoint" in name
        if unknown and (len(learning) > 1 or carried):
            path.faults.append(_fault(node, learning, below))
        elif carried:
            hidden = _hidden(node)
            if hidden:
                learned: list[Tensor] = [t for t in hidden if isinstance(t, torch.nn.Parameter)]
                path.faults.append(Fault(node.name(), learned, _nearest(learning)))
        return _Below(carried, any(below[edge].product for edge in learning))
    recurrent = _RECURRENT.search(name) is not None
    if not recurrent and _PRODUCTS.search(name) is None:
        met = [edge for edge in learning if not below[edge].activations]
        mixed = 0 < len(met) < len(learning)
        spread = mixed and _spreads(node, below)
        if mixed and (_ENTRYWISE.match(name) is None or (spread and name not in _SUMS)):
            path.faults.append(_fault(node, met, below))
        elif name in _MIXING:
            path.faults.extend(_summed(node, below))
        spread = spread or (bool(learning) and all(below[edge].spread for edge in learning))
        if spread and (_CURVED.match(name) or (name == "mul" and len(learning) > 1 and not mixed)):
            path.faults.append(_fault(node, learning, below))
            spread = False
        looked_up = name.startswith("embedding")  # a row per token: activations
        return _Below(carried, looked_up or any(below[edge].product for edge in learning), spread)
    if name in _ADDED:
        factors = [edge for i, edge in enumerate(edges) if i != _ADDED[name] and edge is not None]
    else:
        factors = [edge for edge in (edges[:2] if _BIASED.search(name) else edges) if edge is not None]
    if len(factors) > 1 and all(below[edge].carried for edge in factors):
        path.products.extend(_nearest(factors))
    elif len(factors) > 1:
        path.faults.append(_fault(node, [e for e in factors if not below[e].carried], below))
    elif factors and below[factors[0]].activations and not name.startswith("sparse"):
        weights = [] if carried else _leaves(factors)
        path.faults.append(Fault(node.name(), weights, _nearest(factors)))
    return _Below(carried, True)


def _fault(node: Any, through: Iterable[Any], below: Mapping[Any, _Below]) -> Fault:
    return Fault(node.name(), _leaves(through), _nearest([edge for edge, _ in node.next_functions if edge in below]))


def _spreads(node: Any, below: Mapping[Any, _Below]) -> bool:
    """Whether activations are repeated so that each meets several entries of a weight: a matrix product in disguise."""
    if _plain(node) not in _MEETING:
        return False
    size = _entries(node, 0)
    for operand, output in node.next_functions:
        if operand is None or not below[operand].activations:
            continue
        while _plain(operand) in _SPREADING:
            inner, output = operand.next_functions[0]
            if inner is None:
                break
            operand = inner
        if _entries(operand, output) < size:
            return True
    return False


def _summed(node: Any, below: Mapping[Any, _Below]) -> Iterator[Fault]:
    """Sums of entries times weights that differ along them: a matrix of one row, or of moving windows, in disguise."""
    factor, output = node.next_functions[0]
    if factor is None:
        return
    size = _shape(factor, output)
    dims = _added_along(node, len(size))
    while factor is not None:  # down to the product, past what leaves every entry as it is, wherever it puts it
        size = _shape(factor, output)
        edges = [(edge, number) for edge, number in factor.next_functions if edge is not None]
        weights = [(edge, number) for edge, number in edges if not below[edge].activations]
        if len(edges) == 2 and len(weights) == 1 and _plain(factor) in _FACTORS:
            shape = _shape(*weights[0])
            shape = torch.Size([1] * (len(size) - len(shape)) + list(shape))
            if any(shape[dim] > 1 for dim in dims):
                yield _fault(factor, [weights[0][0]], below)
                return
        rest = [edge for edge in edges if edge not in weights]
        name = _plain(factor)
        if len(rest) != 1 or isinstance(getattr(factor, "layer", None), str) or name not in _IN_PLACE | _MOVING:
            return
        if name in _MOVING:
            dims = _before(factor, dims, size, _shape(*rest[0]))
        elif _shape(*rest[0]) != size:
            return
        factor, output = rest[0]


def _added_along(node: Any, count: int) -> set[int]:
    """Of the dimensions of its operand those along which a node adds up."""
    if not count:
        return set()
    last = _MIXING[_plain(node)]
    if last:
        return {dim for dim in range(count - last, count) if dim >= 0}
    said = getattr(node, "_saved_dim", None)
    if said is None or said == () or said == []:
        return set(range(count))
    return {_positive(dim, count) for dim in ((said,) if isinstance(said, int) else said)}


def _hidden(node: Any) -> list[Tensor]:
    """Matrices on the context of somebody's own function: of floats, with no side that comes of the number of rows given.

    A constant that its code takes from somewhere else cannot be seen from here.
    """
    shapes = [_shape(edge, output) for edge, output in node.next_functions if edge is not None]
    shapes += [torch.Size(metadata.shape) for metadata in node._input_metadata]
    sides: set[int] = set()
    for shape in filter(None, shapes):  # rows, or rows times places, as in a map laid out as a matrix
        sides |= functools.reduce(lambda known, side: known | {n * side for n in known}, shape[1:], {shape[0]})
    try:
        pending: list[Any] = [*node.saved_tensors, *node.__dict__.values()]
    except (RuntimeError, AttributeError):  # let go of already
        return []
    found, seen = [], set()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            large = [side for side in value.shape if side > 1]
            if value.is_floating_point() and len(large) > 1 and not sides.intersection(large):
                found.append(value)
        elif isinstance(value, torch.nn.Module):
            pending += [*value.parameters(), *value.buffers()]
        elif isinstance(value, Mapping):
            pending += value.values()
        elif isinstance(value, (list, tuple)):
            pending += value
        else:
            pending += [cell.cell_contents for cell in getattr(value, "__closure__", None) or () if _filled(cell)]
    return found


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _before(node: Any, dims: set[int], after: torch.Size, before: torch.Size) -> set[int]:
    """Dimensions of what a view, or a transposition, was made of from which these of its own come."""
    name = _plain(node)
    if name == "t":
        return {len(before) - 1 - dim for dim in dims}
    if name == "permute":
        order = [_positive(dim, len(before)) for dim in node._saved_dims]
        return {order[dim] for dim in dims}
    if name == "transpose":
        one, other = (_positive(dim, len(before)) for dim in (node._saved_dim0, node._saved_dim1))
        return {other if dim == one else one if dim == other else dim for dim in dims}
    found: set[int] = set()
    i = j = 0
    while i < len(after) or j < len(before):  # runs of dimensions that hold the same entries
        start, begin, mine, theirs = i, j, 1, 1
        while i == start or mine != theirs:
            if i < len(after) and (mine <= theirs or j == len(before)):
                mine, i = mine * after[i], i + 1
            elif j < len(before):
                theirs, j = theirs * before[j], j + 1
            else:
                break
        while mine == theirs and i == len(after) and j < len(before):
            j += 1
        if dims & set(range(start, i)):
            found |= set(range(begin, j))
        if i == start and j == begin:
            break
    return found


def _positive(dim: int, count: int) -> int:
    """A dimension counted from the front; autograd keeps negative ones as large numbers."""
    return (dim if dim < 2**63 else dim - 2**64) % count


def _plain(node: Any) -> str:
    """Name of what a node differentiates, in small letters."""
    return re.sub(r"backward\d*$", "", node.name().rpartition("::")[2].lower())


def _shape(node: Any, output: int) -> torch.Size:
    return torch.Size(node._input_metadata[output].shape)


def _entries(node: Any, output: int) -> int:
    return int(_shape(node, output).numel())


def _leaves(nodes: Iterable[Any]) -> list[Tensor]:
    """Weights below these nodes, as far as no carried layer stands between."""
    found: dict[int, Tensor] = {}
    pending, seen = list(nodes), set()
    while pending:
        node = pending.pop()
        if node in seen or isinstance(getattr(node, "layer", None), str):
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
        pending += [operand for operand, _ in node.next_functions if operand is not None]
    return list(found.values())


def _nearest(nodes: Sequence[Any]) -> list[str]:
    """Carried layers that a way down from these nodes meets first."""
    found: dict[str, None] = {}
    pending, seen = list(nodes), set()
    while pending:
        node = pending.pop(0)
        if node in seen:
            continue
        seen.add(node)
        layer = getattr(node, "layer", None)
        if isinstance(layer, str):
            found[layer] = None
        else:
            pending += [operand for operand, _ in node.next_functions if operand is not None]
    return list(found)


def inside_checkpoint() -> bool:
    """Whether what is saved for the backward pass now is packed by ``torch.utils.checkpoint``, to be made once more there.

    Its reentrant form saves nothing and runs without gradients instead. PyTorch 2.6 does not tell; there, what the backward
    pass gets back is not what was saved, which it refuses itself.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    hooks = None if top is None else top(False)
    return hooks is not None and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint"
