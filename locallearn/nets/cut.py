"""Cut any network at named modules: pieces that run what its forward does in between, checked against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from locallearn.nets.arguments import Arguments, Output
from locallearn.nets.blocks import NORMALISATIONS, Blocks, width_of
from locallearn.nets.course import Course, is_layer, name_of
from locallearn.nets.equal import Values, check_equal, rows_of, some_rows
from locallearn.nets.pieces import piece
from locallearn.nets.trace import CannotTrace, in_mode, preserved, trace

_LEAVES = (nn.modules.rnn.RNNBase, nn.MultiheadAttention, nn.Transformer, nn.TransformerEncoderLayer)


class Cut(NamedTuple):
    """A network in pieces.

    Attributes:
        blocks: the pieces.
        arguments: how the network is called.
        unused: parameters that its output does not depend on; no piece holds them.
        output: picks what counts of what it gives.
    """

    blocks: Blocks
    arguments: Arguments
    unused: tuple[str, ...]
    output: Output

    def check(self, net: nn.Module, values: Values) -> None:
        """Compare the pieces with the network's own forward on these arguments.

        Raises:
            ValueError: they are not what it runs.
        """

        def own(values: Values) -> Tensor:
            result: Tensor = self.output(self.arguments.call(net, values))
            return result

        def chained(values: Values) -> Tensor:
            first, *context = values.values()
            result: Tensor = self.blocks(first, *context)
            return result

        readout = {} if self.blocks.readout is None else {"readout": self.blocks.readout}
        check_equal(net, self.blocks, own, chained, values, dict(self.blocks.members.items()) | readout)


def cut_network(
    net: nn.Module,
    cuts: Sequence[str],
    example: Any,
    *,
    input: str | None = None,
    output: str | int | None = None,
    readout: str | bool = True,
    outputs: int | None = None,
) -> Cut:
    """Cut a network behind named modules. Its modules and parameters are used as they are; it can still be called itself.

    The forward is traced with ``torch.fx``, in training and in evaluation mode. Modules are single steps of the trace unless a
    cut lies inside of them. What the forward does between modules goes to the piece that first needs it; behind a named
    module, functions (activations, poolings, additions) and modules without parameters that run several times still
    belong to it. Where several tensors cross a border, pieces hand over a :class:`~locallearn.nets.border.Border`.

    Args:
        net: the network.
        cuts: names of the modules behind which a piece ends, in the order of execution, e.g. ``["layer1", "layer2"]``.
        example: a batch: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        input: name of the main input; ``None``: the first tensor. The others are the context of every piece that reads them.
        output: key, field or place of the output that counts; ``None``: ``logits``, else ``out``, else the first tensor.
        readout: whether the last layer, with what pools and reshapes before it, is kept apart as the readout; or the name of
            the module that it begins with. Where it cannot be (more than one tensor would reach it, or it shares a weight with
            the block before), the readout is ``nn.Identity``: the last block gives what the network gives.
        outputs: number of outputs that are wanted; where the network gives another, these are features, and there is no
            readout, because rules that need an output layer add one, or say so. ``None``: as many as it gives.

    Raises:
        CannotTrace: the forward cannot be followed; names file and line.
        ValueError: a name that is unknown, named twice, in the wrong order, inside of another, run more or less than once; a
            piece without parameters, or a parameter in two; an example that does not fit; or the pieces do not give
            what the network gives.
    """
    owner = type(net).__name__
    if not any(True for _ in net.parameters()):
        raise ValueError(f"{owner} has no parameters, so there is nothing to train")
    arguments = Arguments(net, example, input)
    named = [_named(net, name, owner) for name in cuts]
    _refuse_names(cuts, named)
    opened = {id(net.get_submodule(parent)) for name in cuts for parent in _parents(name)}
    start = None
    if isinstance(readout, str):
        start = _named(net, readout, owner)
        opened |= {id(net.get_submodule(parent)) for parent in _parents(readout)}

    picks = Output(output, owner)

    def call(run: Any, values: Mapping[str, Any]) -> Any:
        return picks(arguments.call(run, values))

    while True:
        courses = {}
        for training in (True, False):
            graph, tracer = trace(net, arguments.values, call, opened, training)
            courses[training] = Course(net, graph, tracer, arguments.names)
        if _gives_features(courses[False], outputs):
            readout, start = False, None
        ends = {mode: _ends(course, named, cuts, owner, picks) for mode, course in courses.items()}
        starts = {mode: course.readout_start(ends[mode], start) for mode, course in courses.items()} if readout else {}
        found = {mode: [*ends[mode], node] for mode, node in starts.items() if node is not None}
        apart = len(found) == 2 and not _shares(courses[False], found[False], len(cuts))
        inner = _only_module(courses[False], ends[False]) if readout and not apart and start is None else None
        if inner is None:
            break
        opened.add(id(inner))  # the layers of the last piece are all in one module: look for the readout inside
    if apart:
        ends = found
    names = [name.replace(".", "_") for name in cuts]
    alone = bool(readout) and not apart and bool(cuts) and _can_be_readout(courses, ends)
    if not alone:
        names.append(_last_name(courses[False], ends[False], len(cuts), names))
    pieces = _pieces(net, courses, ends)
    # Without a layer that can be kept apart, the last block gives the network's own output: that is what its loss is about.
    last = pieces.pop() if apart or alone else _AsItIs() if readout else None
    blocks = Blocks(dict(zip(names, pieces, strict=True)), last)
    bare = next((i for i, part in enumerate(pieces) if not any(True for _ in part.parameters())), None)
    if bare is not None:
        raise ValueError(_nothing_between(bare, names, cuts, last, owner) + _other_output(picks))
    blocks.train(net.training)

    inside = {id(p) for p in blocks.parameters()}
    unused = tuple(name for name, p in net.named_parameters() if id(p) not in inside)
    cut = Cut(blocks, arguments, unused, picks)
    cut.check(net, arguments.values)
    picks.warn(unused)
    return cut


def _gives_features(course: Course, outputs: int | None) -> bool:
    """Whether a network gives something else than the outputs that are wanted."""
    return outputs not in (None, width_of(course.tensor(course.result)))


def _named(net: nn.Module, name: Any, owner: str) -> nn.Module:
    if isinstance(name, nn.Module):
        told = next((repr(path) for path, module in net.named_modules() if module is name), None)
        raise ValueError(
            f"a cut is a {type(name).__name__} itself, expected its name in {owner}"
            + (f": write {told}" if told is not None else ", which does not contain it")
        )
    if not isinstance(name, str) or not name:
        raise ValueError(f"a cut is {name!r}, expected the name of a module of {owner}")
    try:
        return net.get_submodule(name)
    except AttributeError:
        parent = name
        while parent:
            parent = parent.rpartition(".")[0]
            try:
                children = [child for child, _ in net.get_submodule(parent).named_children()]
                break
            except AttributeError:
                continue
        inside = f"{parent!r}" if parent else owner
        raise ValueError(f"{owner} has no module {name!r}; {inside} has {', '.join(children) or 'none'}") from None


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _refuse_names(cuts: Sequence[str], named: Sequence[nn.Module]) -> None:
    for i, (name, module) in enumerate(zip(cuts, named, strict=True)):
        for j, (other, held) in enumerate(zip(cuts, named, strict=True)):
            if i != j and module is held:
                raise ValueError(
                    f"the cuts name {name!r} twice" + ("" if name == other else f", the other time as {other!r}")
                )
            if i != j and other.startswith(f"{name}."):
                raise ValueError(f"the cut {other!r} lies inside of {name!r}, which is named as well: name one of them")
        if type(module).forward is nn.Module.forward:
            raise ValueError(
                f"the cut {name!r} is a {type(module).__name__}, which has no forward: name one of its members"
            )


def _nothing_between(number: int, names: Sequence[str], cuts: Sequence[str], last: nn.Module | None, owner: str) -> str:
    """Of a block without parameters: what the user has named before and behind it."""
    if number == len(cuts) and cuts and (last is None or isinstance(last, _AsItIs)):
        return (
            f"block {names[number]!r} would have no parameters: {cuts[-1]!r} holds the last layer on the way to the output of "
            f"{owner}, so leave out the cut behind it"
        )
    behind = repr(cuts[number]) if number < len(cuts) else "the readout"
    where = f"between {cuts[number - 1]!r} and {behind}" if number else f"before {behind}"
    return (
        f"block {names[number]!r} would have no parameters, so there is nothing to train {where}: leave out the cut before or "
        "behind it"
    )


def _other_output(picks: Output) -> str:
    """Where the output was guessed: perhaps that is why something cannot be cut."""
    return f" ({picks.guess}: if it is another one, say which with output=)" if picks.guess else ""


def _ends(course: Course, named: Sequence[nn.Module], cuts: Sequence[str], owner: str, picks: Output) -> list[fx.Node]:
    """The nodes behind which pieces end."""
    nodes = []
    for name, module in zip(cuts, named, strict=True):
        calls = course.calls(module)
        if len(calls) != 1:
            times = "does not run on the way to the output" if not calls else f"runs {len(calls)} times"
            raise ValueError(
                f"{owner} cannot be cut behind {name!r}, which {times}: name a module that runs once{_other_output(picks)}"
            )
        nodes += calls
    order = sorted(cuts, key=lambda name: course.place[nodes[list(cuts).index(name)]])
    if order != list(cuts):
        raise ValueError(f"cuts are {list(cuts)}, and {owner} runs them in the order {order}: name them in that order")
    return [course.end_of(node, set(nodes)) for node in nodes]


def _only_module(course: Course, ends: Sequence[fx.Node]) -> nn.Module | None:
    """The one module that holds all layers of the last piece, where it can be opened."""
    stage = course.stages(ends)
    learning = [node for node in course.nodes if stage[node] == len(ends) and course.learns(node)]
    if len(learning) != 1:
        return None
    module = course.module(learning[0])
    if module is None or isinstance(module, _LEAVES) or (ends and not any(True for _ in module.children())):
        return None
    if ends:  # what comes behind the last cut is one layer already: that is the readout
        return None
    return module if any(any(True for _ in child.parameters()) for child in module.children()) else None


def _shares(course: Course, ends: Sequence[fx.Node], border: int) -> bool:
    """Whether a parameter is needed on both sides of a border, by pieces next to it."""
    stage = course.stages(ends)
    below, above = (
        {id(p) for node in course.nodes if stage[node] == side for p in course.parameters(node)}
        for side in (border, border + 1)
    )
    return bool(below & above)


class _AsItIs(nn.Identity):
    """A readout that changes nothing, and like every readout is handed the context."""

    def forward(self, input: Tensor, *context: Any) -> Tensor:
        return input


def _can_be_readout(courses: Mapping[bool, Course], ends: Mapping[bool, Sequence[fx.Node]]) -> bool:
    """Whether what comes behind the last cut is one layer, which reads one tensor."""
    for mode, course in courses.items():
        stage = course.stages(ends[mode])
        number = len(ends[mode])
        if course.crossing(stage, number - 1) != [ends[mode][-1]]:
            return False
        if sum(1 for node in course.nodes if stage[node] == number and course.learns(node)) != 1:
            return False
    return True


def _last_name(course: Course, ends: Sequence[fx.Node], number: int, taken: Sequence[str]) -> str:
    """The last block is named for its first layer."""
    stage = course.stages(ends)
    learning = [n for n in course.nodes if stage[n] == number and course.learns(n)]
    learning.sort(key=lambda n: n.op != "call_module")  # the sort is stable
    names = [name_of(n).replace(".", "_") for n in learning]
    name = names[0] if names and number else "network"
    while name in taken or name == "readout":
        name += "_"
    return name


def _pieces(net: nn.Module, courses: Mapping[bool, Course], ends: Mapping[bool, Sequence[fx.Node]]) -> list[nn.Module]:
    if courses[True].signature(ends[True]) != courses[False].signature(ends[False]):
        courses[True].prefix = "training "  # what one mode hands over is nothing to the other
    programs = {mode: course.programs(ends[mode]) for mode, course in courses.items()}
    constants = {mode: course.tracer.constants for mode, course in courses.items()}
    held = constants[True] | constants[False]
    alone = len(courses[True].inputs) == 1
    return [
        piece(net, {True: train, False: evaluate}, held, alone)
        for train, evaluate in zip(programs[True], programs[False], strict=True)
    ]


class Place(NamedTuple):
    """Where a network may be cut, and what lies between the place before and this one.

    Attributes:
        names: of the modules behind which the cut would lie, the outermost first; empty: the network's end.
        shape: of the tensor that crosses, of several the one that rules and losses see.
        flops: of a forward pass of the whole example, two per multiply-accumulate.
        bytes: kept for gradients in a training pass of the whole example.
        parameters: numbers that are trained.
        beside: how many tensors a skip connection has cross beside it.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    flops: float
    bytes: int
    parameters: int
    beside: int = 0

    @property
    def name(self) -> str:
        """The outermost module's; empty: the network's end."""
        return self.names[0] if self.names else ""


def names_for(chosen: Sequence[Place]) -> list[str]:
    """Names under which these places can be cut at once: none may lie inside of another."""
    inner = [place.names[-1] for place in chosen]
    return [
        next(
            name
            for name in place.names
            if not any(other.startswith(f"{name}.") for other in inner if other != place.names[-1])
        )
        for place in chosen
    ]


def places(
    net: nn.Module,
    example: Any,
    weigh: Callable[[Callable[[], Any]], tuple[Any, float, dict[int, int]]],
    *,
    input: str | None = None,
    output: str | int | None = None,
    readout: str | bool = True,
    outputs: int | None = None,
    several: bool = False,
    closed: list[CannotTrace] | None = None,
) -> list[Place]:
    """Where a network may be cut so that every piece has parameters and one tensor crosses; the last entry is its end.

    Whole numbers (token ids) and what is made from the context alone (an attention mask) may cross beside it: no gradient is
    lost with them.

    Args:
        net: the network.
        example: a batch, as for :func:`cut_network`.
        weigh: runs something and tells its result, its operations, and the bytes that it keeps for gradients by storage.
        input: see :func:`cut_network`.
        output: see :func:`cut_network`.
        readout: see :func:`cut_network`.
        outputs: see :func:`cut_network`.
        several: take places in, too, where a skip connection crosses beside it, behind modules inside of which no other
            place lies further out.
        closed: gets what modules said that could not be followed, inside of which there are no places.

    Raises:
        CannotTrace: the network's own forward cannot be followed.
    """
    owner = type(net).__name__
    if not any(True for _ in net.parameters()):
        raise ValueError(f"{owner} has no parameters, so there is nothing to train")
    arguments = Arguments(net, example, input)

    picks = Output(output, owner)

    def call(run: Any, values: Mapping[str, Any]) -> Any:
        return picks(arguments.call(run, values))

    few = some_rows(arguments.values)
    rows = rows_of(arguments.values)
    factor = 1.0 if rows is None else rows / len(few[arguments.names[0]])
    within = _named(net, readout, owner) if isinstance(readout, str) else None
    course = _open_course(net, few, call, arguments, closed, within)
    if _gives_features(course, outputs):
        readout = False
    start = course.readout_start([], within) if readout else None
    kept = {start, *course.ancestors([start])} if start is not None else set(course.nodes)
    found: dict[frozenset[fx.Node], tuple[list[str], fx.Node, int]] = {}
    outer: set[str] = set()
    for path, given in sorted(course.tracer.ends.items(), key=lambda end: end[0].count(".")):
        behind = {node: course.end_of(node, {node}) for node in given if node in course.place}
        node = next((node for node, end in behind.items() if course.is_tensor(end)), None)
        if node is None or course.tracer.counts[path] != 1:
            continue
        end = behind[node]
        stage = course.stages([end])
        below = frozenset(n for n in course.nodes if stage[n] == 0 and course.learns(n))
        above = [n for n in course.nodes if stage[n] == 1 and course.learns(n)]
        crossing = [
            n for n in course.crossing(stage, 0) if n is end or (course.holds_tensors(n) and not course.aside(n))
        ]
        inside = any(path.startswith(f"{other}.") for other in outer)
        fits = crossing == [end] or (several and end in crossing and not inside)
        if fits:
            outer.add(path)
        if not below or not any(n in kept for n in above) or not fits or _shares(course, [end], 0):
            continue
        first = course.module(above[0])
        if (
            (course.learns(node) and isinstance(first, NORMALISATIONS))
            or course.tensor(end).ndim < 2
            or course.is_tail(node)
        ):
            continue
        known, beside = found.get(below), len(crossing) - 1
        if known is not None and known[1] is node:
            known[0].append(path)
        elif known is None or (-known[2], course.place[known[1]]) < (-beside, course.place[node]):
            found[below] = (
                [path],
                node,
                beside,
            )  # of places with the same layers below, the last with the fewest tensors
    ordered = sorted(found.values(), key=lambda item: course.place[item[1]])
    ends = [course.end_of(node, {node}) for _, node, _ in ordered]
    stage = course.stages(ends)
    sizes = [[0.0, 0, 0] for _ in range(len(ends) + 1)]
    with in_mode(net, True), preserved(net):
        seen: set[int] = {p.untyped_storage().data_ptr() for p in net.parameters()}
        for node, (flops, storages) in course.weighed(weigh).items():
            size = sizes[stage[node]]
            size[0] += flops * factor
            size[1] += int(sum(n for place, n in storages.items() if place not in seen) * factor)
            seen |= storages.keys()
    owned: set[int] = set()
    for node in course.nodes:
        if course.learns(node):
            held = [p for p in course.parameters(node) if id(p) not in owned]
            owned |= {id(p) for p in held}
            sizes[stage[node]][2] += sum(p.numel() for p in held)
    picks.warn()
    names = [(tuple(paths), beside) for paths, _, beside in ordered]
    shapes = [tuple(course.tensor(end).shape) for end in [*ends, course.result]]
    if rows is not None:
        shapes = [(rows, *shape[1:]) for shape in shapes]
    return [
        Place(name, shape, flops, int(size), int(count), beside)
        for (name, beside), shape, (flops, size, count) in zip([*names, ((), 0)], shapes, sizes, strict=True)
    ]


def _open_course(
    net: nn.Module,
    example: Mapping[str, Any],
    call: Callable[..., Any],
    arguments: Arguments,
    closed: list[CannotTrace] | None,
    within: nn.Module | None,
) -> Course:
    """The pass in evaluation mode with every module opened that can be followed; ``closed`` gets what the others said.

    The module that the readout begins with (``within``) stays whole.
    """
    opened = {id(m): m for m in net.modules() if m is not within and not is_layer(m)}
    while True:
        try:
            graph, tracer = trace(net, example, call, opened, training=False)
            return Course(net, graph, tracer, arguments.names)
        except CannotTrace as error:
            if not error.path:
                raise
            if closed is not None:
                closed.append(error)
            kind = type(net.get_submodule(error.path))
            known = len(opened)
            opened = {key: m for key, m in opened.items() if type(m) is not kind or m is net}
            if len(opened) == known:
                raise


__all__ = ["CannotTrace", "Cut", "Place", "cut_network", "names_for", "places"]
