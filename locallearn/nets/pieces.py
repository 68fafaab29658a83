"""Pieces of a network: what its forward does between two borders, run as the forward runs it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from locallearn.nets.blocks import NORMALISATIONS
from locallearn.nets.border import Border
from locallearn.nets.trace import Tracer, lookup


class Slot(NamedTuple):
    """Stands for a value that an earlier step has made."""

    number: int


class Step(NamedTuple):
    """One operation of a piece.

    Attributes:
        kind: ``module``, ``method``, ``function``, ``functional`` or ``attribute``.
        target: path of a module or tensor, name of a method or of a function in ``torch.nn.functional`` (some of which cannot
            be pickled), or the function itself.
        args: constants and slots, nested as in the call.
        kwargs: the same.
        result: slot of what it gives.
        done: slots that nothing reads later.
    """

    kind: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: int
    done: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """What a piece does in one mode.

    Attributes:
        takes_main: slot of the main tensor that comes in, where it is read.
        takes: slots of what is carried in, by name.
        context: slots of the batch's context, by place in it.
        steps: in the order of the forward.
        size: number of slots.
        gives: slot of the main output.
        carries: slots of what is carried out, by name.
    """

    takes_main: int | None
    takes: Mapping[str, int]
    context: Mapping[int, int]
    steps: tuple[Step, ...]
    size: int
    gives: int
    carries: Mapping[str, int]

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self  # nothing in it changes


class Piece(nn.Module):
    """A part of somebody's network between two borders. It holds the network's own modules and parameters, under their paths.

    Input and output are a tensor, or a :class:`~locallearn.nets.border.Border` where several tensors cross. Training and
    evaluation run what the network's forward does in that mode.

    Args:
        root: the network.
        programs: what to do, by ``training``.
        constants: tensors that the forward holds beside parameters and buffers, by name.
    """

    def __init__(self, root: nn.Module, programs: Mapping[bool, Program], constants: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.programs = dict(programs)
        for program in programs.values():
            for step in program.steps:
                if step.kind == "module":
                    _put(self, step.target, root.get_submodule(step.target), root)
                elif step.kind == "attribute" and step.target in constants:
                    self.register_buffer(step.target, constants[step.target], persistent=False)
                elif step.kind == "attribute":
                    _put(self, step.target, lookup(root, step.target, {}), root)
        self.training = root.training

    def forward(self, given: Any, *context: Any) -> Any:
        """Run the steps.

        Raises:
            ValueError: the piece before was in another mode, in which it hands over something else.
        """
        program = self.programs[self.training]
        values: list[Any] = [None] * program.size
        carried: Mapping[str, Any] = {}
        if isinstance(given, Border):
            given, carried = given
        if program.takes_main is not None:
            values[program.takes_main] = given
        del given
        for name, number in program.takes.items():
            if name not in carried:
                raise ValueError(
                    f"this piece reads {name!r} from the one before, which does not hand it over in its mode: parts of this "
                    "network cannot train while others are frozen, because its forward differs between both modes"
                )
            values[number] = carried[name]
        for place, number in program.context.items():
            if place >= len(context):
                raise ValueError(
                    f"this network was cut for inputs with {place + 1} more beside the main one, and got {len(context)}"
                )
            values[number] = context[place]
        for kind, target, args, kwargs, result, done in program.steps:
            if kind == "module":
                values[result] = self._at(target)(*_filled(args, values), **_filled(kwargs, values))
            elif kind == "function":
                values[result] = target(*_filled(args, values), **_filled(kwargs, values))
            elif kind == "functional":
                values[result] = getattr(F, target)(*_filled(args, values), **_filled(kwargs, values))
            elif kind == "method":
                first, *others = _filled(args, values)
                values[result] = getattr(first, target)(*others, **_filled(kwargs, values))
                del first, others
            else:
                values[result] = self._at(target)
            for number in done:
                values[number] = None
        if not program.carries:
            return values[program.gives]
        return Border(values[program.gives], {name: values[number] for name, number in program.carries.items()})

    def _at(self, path: str) -> Any:
        value: Any = self
        for part in path.split("."):
            value = getattr(value, part)
        return value

    def extra_repr(self) -> str:
        """What is done between the modules."""
        between = [
            step.target if isinstance(step.target, str) else getattr(step.target, "__name__", str(step.target))
            for step in self.programs[self.training].steps
            if step.kind != "module"
        ]
        return f"between: {', '.join(between)}" if between else ""


class _Holder(nn.Module):
    """A level of the network's own tree, so that names of parameters stay."""


def piece(
    root: nn.Module, programs: Mapping[bool, Program], constants: Mapping[str, Tensor], alone: bool
) -> Piece | nn.Sequential:
    """A piece; where it does nothing but run modules one after another, an ``nn.Sequential`` under the same names.

    So rules that look at a block's modules (PEPITA, counter-current learning) see them.

    Args:
        root: the network.
        programs: what to do, by ``training``.
        constants: see :class:`Piece`.
        alone: whether the network has no other input than the main one; an ``nn.Sequential`` can be handed no more.
    """
    chains = [_chain(program) for program in programs.values()]
    paths = chains[0]
    if not alone or paths is None or any(other != paths for other in chains):
        return Piece(root, programs, constants)
    if any(hasattr(nn.Sequential, part) for path in paths for part in path.split(".")):
        return Piece(root, programs, constants)  # a module called "pop" can be no member of an nn.Sequential
    sequence = nn.Sequential()
    for path in paths:
        *parents, name = path.split(".")
        level = sequence
        for parent in parents:
            if parent not in level._modules:
                level.add_module(parent, nn.Sequential())
            inner = level._modules[parent]
            assert isinstance(inner, nn.Sequential)  # no path goes through a module that is run as a whole, see _chain
            level = inner
        level.add_module(name, root.get_submodule(path))
    sequence.training = root.training
    return sequence


def _chain(program: Program) -> list[str] | None:
    """Paths of the modules that a program runs one after another; ``None``: it does more, or in no order of a tree."""
    if program.takes_main is None or program.takes or program.context or program.carries or not program.steps:
        return None
    value, paths = program.takes_main, list[str]()
    for step in program.steps:
        if step.kind != "module" or step.kwargs or step.args != (Slot(value),):
            return None
        value = step.result
        paths.append(step.target)
    if value != program.gives or len({*paths}) != len(paths):
        return None
    return paths if _in_tree_order(paths) else None


def _in_tree_order(paths: Sequence[str]) -> bool:
    """Whether a walk through the tree of these paths meets them in this order, each as a leaf."""
    left: list[str] = []  # levels that the walk has come back from
    for before, path in pairwise(paths):
        if path.startswith(f"{before}.") or before.startswith(f"{path}."):
            return False
        parents = [f"{before[:i]}." for i, letter in enumerate(before) if letter == "."]
        left += [level for level in parents if not path.startswith(level)]
        if any(path.startswith(level) for level in left):
            return False
    return True


def _put(piece: nn.Module, path: str, value: Any, root: nn.Module) -> None:
    *parents, name = path.split(".")
    place = piece
    for parent in parents:
        if parent not in place._modules:
            place.add_module(parent, _Holder())
        inner = place._modules[parent]
        assert inner is not None
        if not isinstance(inner, _Holder):
            return  # a module that is held as a whole
        place = inner
    if isinstance(value, nn.Module):
        place.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        place.register_parameter(name, value)
    else:
        owner = root.get_submodule(".".join(parents))
        place.register_buffer(name, value, persistent=name not in owner._non_persistent_buffers_set)


def _filled(spec: Any, values: Sequence[Any]) -> Any:
    """Arguments with values in the place of slots."""
    kind = type(spec)
    if kind is Slot:
        return values[spec.number]
    if kind is tuple:
        return tuple([_filled(part, values) for part in spec])
    if kind is dict:
        return {key: _filled(part, values) for key, part in spec.items()} if spec else spec
    if kind is list:
        return [_filled(part, values) for part in spec]
    if kind is slice:
        return slice(*(_filled(part, values) for part in (spec.start, spec.stop, spec.step)))
    return spec


# -- from a graph to programs ---------------------------------------------------------------------------------------------
_LOOKS = {
    "size",
    "dim",
    "shape",
    "ndim",
    "dtype",
    "device",
    "numel",
    "is_cuda",
    "requires_grad",
    "ndimension",
    "layout",
}
_RESHAPES = {
    *(
        "flatten",
        "reshape",
        "view",
        "permute",
        "transpose",
        "squeeze",
        "unsqueeze",
        "getitem",
        "chunk",
        "split",
        "unbind",
    ),
    *(
        "contiguous",
        "expand",
        "swapaxes",
        "swapdims",
        "movedim",
        "moveaxis",
        "T",
        "mT",
        "unflatten",
        "select",
        "narrow",
    ),
    *("mean", "sum", "amax", "max", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "getattr"),
    *(
        "adaptive_max_pool1d",
        "adaptive_max_pool2d",
        "adaptive_max_pool3d",
        "view_as",
        "reshape_as",
        "to",
        "float",
        "tuple",
    ),
}
_TAIL = {*_RESHAPES, "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"}
_POOLS_OVER_ALL = (
    *(nn.Flatten, nn.Unflatten, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_TAIL_MODULES = (*_POOLS_OVER_ALL, *_DROPOUTS, nn.Identity)


class Course:
    """One pass through the network, as a graph, with the borders in it.

    Args:
        net: the network.
        graph: of one mode, with nodes that know their values through ``tracer``.
        tracer: which made it.
        inputs: names of its inputs; the first is the main one.
    """

    def __init__(self, net: nn.Module, graph: fx.Graph, tracer: Tracer, inputs: Sequence[str]) -> None:
        self.net, self.tracer, self.inputs = net, tracer, list(inputs)
        self.output: fx.Node = next(n for n in graph.nodes if n.op == "output")
        result = self.output.args[0]
        assert isinstance(result, fx.Node)
        self.result = result
        self._needs, self._readers = _dependencies(net, list(graph.nodes))
        alive = self.ancestors([self.output])
        self.nodes = [node for node in graph.nodes if node in alive and node.op not in ("placeholder", "output")]
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.prefix = ""
        """Of the names under which tensors are carried."""
        self._free = {id(m) for m in net.modules() if not any(True for _ in m.parameters())}

    def users(self, node: fx.Node) -> list[fx.Node]:
        """Who reads this value, or what this node writes, among those that count."""
        return [user for user in self._readers[node] if user in self.place or user is self.output]

    def ancestors(self, nodes: Sequence[fx.Node]) -> set[fx.Node]:
        """These nodes and all that they need."""
        found: set[fx.Node] = set()
        stack = list(nodes)
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                stack.extend(self._needs[node])
        return found

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module behind a node."""
        return self.net.get_submodule(str(node.target)) if node.op == "call_module" else None

    def learns(self, node: fx.Node) -> bool:
        """Whether a node holds parameters."""
        module = self.module(node)
        if module is not None:
            return id(module) not in self._free
        return node.op == "get_attr" and isinstance(
            lookup(self.net, str(node.target), self.tracer.constants), nn.Parameter
        )

    def calls(self, module: nn.Module) -> list[fx.Node]:
        """Nodes that run this module."""
        return [node for node in self.nodes if self.module(node) is module]

    def is_tensor(self, node: fx.Node) -> bool:
        """Whether a node gives a tensor."""
        return isinstance(self.tracer.value(node), Tensor)

    def holds_tensors(self, node: fx.Node) -> bool:
        """Whether what a node gives is a tensor or has some in it; else it is numbers, a size for example."""
        return any(isinstance(leaf, Tensor) for leaf in tree_leaves(self.tracer.value(node)))

    def tensor(self, node: fx.Node) -> Tensor:
        """What a node gives for the example."""
        value = self.tracer.value(node)
        assert isinstance(value, Tensor)
        return value

    def parameters(self, node: fx.Node) -> list[nn.Parameter]:
        """Parameters that a node holds."""
        module = self.module(node)
        if module is not None:
            return list(module.parameters())
        value = lookup(self.net, str(node.target), self.tracer.constants) if node.op == "get_attr" else None
        return [value] if isinstance(value, nn.Parameter) else []

    def weighed(
        self, weigh: Callable[[Callable[[], Any]], tuple[Any, float, dict[int, int]]]
    ) -> dict[fx.Node, tuple[float, dict[int, int]]]:
        """What every node costs, in a pass with gradients; see :func:`~locallearn.nets.cut.places`."""
        return self.tracer.weighed(self.nodes, weigh)

    def end_of(self, node: fx.Node, cuts: Collection[fx.Node]) -> fx.Node:
        """Where the border behind a module really lies: behind what follows it and cannot be named.

        Functions, and modules without parameters that run several times, belong to what comes before them, unless they
        reshape, pool over everything, or need a layer that runs later. So do activations and dropout behind what has
        parameters, and the normalisation of a single layer.

        Args:
            node: runs the module.
            cuts: nodes of all modules that borders are named for.
        """
        layer = self.learns(node)
        named = self.module(node)
        plain = layer and named is not None and is_layer(named) and not _is_norm(named)
        if not self.is_tensor(node):
            items = [user for user in self.users(node) if _picks(user) and self.is_tensor(user)]
            node = min(items, key=lambda item: str(item.args[1]), default=node)
        while True:
            users = [user for user in self.users(node) if not self._looks(user)]
            if len(users) != 1 or users[0] is self.output or users[0] in cuts:
                return node
            if not self._follows(users[0], layer, plain):
                return node
            new = self.ancestors(users) - self.ancestors([node]) - {users[0]}
            if any(other in cuts or (self.learns(other) and self.module(other) is not None) for other in new):
                return node
            node = users[0]

    def _follows(self, node: fx.Node, layer: bool, plain: bool) -> bool:
        if not self.is_tensor(node) or name_of(node) in _RESHAPES:
            return False
        module = self.module(node)
        if module is None:
            return node.op in ("call_function", "call_method")
        if id(module) not in self._free:
            return plain and _is_norm(module)
        if isinstance(module, _POOLS_OVER_ALL):
            return False
        return isinstance(module, nn.Identity) or len(self.calls(module)) > 1 or (layer and _is_activation(module))

    def _looks(self, node: fx.Node) -> bool:
        name = name_of(node)
        return name in _LOOKS or (name == "getattr" and len(node.args) > 1 and node.args[1] in _LOOKS)

    def readout_start(self, ends: Sequence[fx.Node], within: nn.Module | None = None) -> fx.Node | None:
        """What the readout reads: the input of the last layer with parameters and of what only reshapes or pools before it.

        Args:
            ends: of the pieces before.
            within: the layer that the readout begins with; ``None``: the last one that has parameters.

        Returns:
            The last piece's end; ``None`` where more than one tensor would cross, or where no layer is left in front of it.
        """
        stage = self.stages(ends)
        last = [node for node in self.nodes if stage[node] == len(ends) and self.learns(node)]
        if within is not None:
            last = last[: 1 + next((i for i, node in enumerate(last) if self.module(node) is within), len(last))]
        if not last:
            return None
        node = last[-1]
        if node.op == "get_attr":
            readers = [user for user in self.users(node) if user is not self.output]
            node = readers[0] if readers else node
        while True:
            sources = [source for source in node.all_input_nodes if self.is_tensor(source) and not self.fixed(source)]
            if len(sources) != 1 or sources[0].op == "placeholder" or sources[0] in ends:
                break
            node = sources[0]
            if not self.is_tail(node):
                break
        if node is last[-1] or node in ends or node.op == "placeholder" or self.is_tail(node):
            return None
        cut = self.stages([*ends, node])
        alone = self.crossing(cut, len(ends)) == [node]
        return node if alone and any(cut[n] == len(ends) for n in last) else None

    def fixed(self, node: fx.Node) -> bool:
        """Whether a value comes from parameters, constants and the context alone."""
        return not any(n.op == "call_module" or n.target == self.inputs[0] for n in self.ancestors([node]))

    def aside(self, node: fx.Node) -> bool:
        """Whether no gradient is lost where a value crosses a border: it is no number of the reals, or comes from the context.

        A mask does, though it takes its size and type from other tensors.
        """
        value = self.tracer.value(node)
        if isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex()):
            return True
        seen: set[fx.Node] = set()
        stack = [node]
        while stack:
            node = stack.pop()
            if node in seen or self._looks(node):
                continue
            if node.op == "call_module" or node.target == self.inputs[0] or self.learns(node):
                return False
            seen.add(node)
            stack.extend(self._needs[node])
        return True

    def is_tail(self, node: fx.Node) -> bool:
        """Whether a node only reshapes, pools over everything or drops out, as what comes before a readout does."""
        module = self.module(node)
        if module is None:
            return name_of(node) in _TAIL and not self._taken(node)
        return isinstance(module, _TAIL_MODULES) or (id(module) in self._free and self._makes_vectors(node))

    def _taken(self, node: fx.Node) -> bool:
        """Whether a node takes a tensor with all samples out of a tuple that a module gives, as an LSTM's outputs are."""
        return (
            _picks(node)
            and self.is_tensor(node)
            and not self.is_tensor(node.all_input_nodes[0])
            and self.tensor(node).shape[:1] == self.tensor(self.result).shape[:1]
        )

    def _makes_vectors(self, node: fx.Node) -> bool:
        """Whether a node makes a vector per sample of something larger: a pooling of somebody's own, say."""
        sources = [source for source in node.all_input_nodes if self.is_tensor(source)]
        return len(sources) == 1 and self.is_tensor(node) and self.tensor(node).ndim == 2 < self.tensor(sources[0]).ndim

    def stages(self, ends: Sequence[fx.Node]) -> dict[fx.Node, int]:
        """The piece of every node: the first one that needs it."""
        limit = {end: i for i, end in enumerate(ends)}
        stage: dict[fx.Node, int] = {}
        for node in reversed(self.nodes):
            readers = [stage.get(user, len(ends)) for user in self.users(node)]
            stage[node] = min([*readers, limit.get(node, len(ends))])
        for (
            node
        ) in self.nodes:  # numbers cross, not the tensors that they are read from, and tensors, not tuples of them
            if len(node.all_input_nodes) == 1:
                source = node.all_input_nodes[0]
                if (not self.holds_tensors(node) or (_picks(node) and not self.is_tensor(source))) and not self.learns(
                    node
                ):
                    stage[node] = min(stage[node], stage.get(source, 0))
        return stage

    def crossing(self, stage: Mapping[fx.Node, int], border: int) -> list[fx.Node]:
        """Values that are made in pieces up to ``border`` and read later; tensors of the network itself do not count."""
        made = [node for node in self.nodes if stage[node] <= border and node.op != "get_attr"]
        first = [node for node in self._placeholders() if node.target == self.inputs[0]]
        return [
            node
            for node in [*first, *made]
            if any(stage.get(user, len(stage) + 1) > border for user in self.users(node))
        ]

    def signature(self, ends: Sequence[fx.Node]) -> list[list[tuple[str, str, Any]]]:
        """What crosses every border: name, origin and shape."""
        stage = self.stages(ends)
        return [
            [
                (node.name, name_of(node), getattr(self.tracer.value(node), "shape", None))
                for node in self.crossing(stage, i)
            ]
            for i in range(len(ends))
        ]

    def _placeholders(self) -> list[fx.Node]:
        found: dict[fx.Node, None] = {}
        for node in [*self.nodes, self.output]:
            found |= {source: None for source in node.all_input_nodes if source.op == "placeholder"}
        return list(found)

    def programs(self, ends: Sequence[fx.Node]) -> list[Program]:
        """What every piece does, from the first border to the output.

        Raises:
            ValueError: nothing behind a border reads the output of what it is named for.
        """
        stage = self.stages(ends)
        made = []
        mains = [*ends, self.result]
        for i in range(len(mains)):
            taken = self.crossing(stage, i - 1) if i else []
            given = self.crossing(stage, i) if i < len(ends) else []
            if i < len(ends) and ends[i] not in given:
                raise ValueError(
                    f"nothing behind {_told(ends[i])} reads what it gives, so the network cannot be cut there"
                )
            made.append(self._program(stage, i, ends[i - 1] if i else None, taken, mains[i], given))
        return made

    def _program(
        self,
        stage: Mapping[fx.Node, int],
        number: int,
        before: fx.Node | None,
        taken: Sequence[fx.Node],
        main: fx.Node,
        given: Sequence[fx.Node],
    ) -> Program:
        slots: dict[fx.Node, int] = {}

        def slot(node: fx.Node) -> int:
            return slots.setdefault(node, len(slots))

        own = {node for node in self.nodes if node.op != "get_attr" and stage[node] == number}
        reads = {source for node in own for source in node.all_input_nodes} | {main, *given}
        todo = [node for node in self.nodes if node in own or (node.op == "get_attr" and node in reads)]
        context = {
            self.inputs.index(str(node.target)) - 1: slot(node)
            for node in self._placeholders()
            if node in reads and node.target != self.inputs[0]
        }
        takes_main = None if before is None else slot(before)
        if before is None:
            takes_main = next((slot(node) for node in self._placeholders() if node.target == self.inputs[0]), None)
        takes = {self.prefix + node.name: slot(node) for node in taken if node is not before}
        kept = {main, *given}
        last: dict[fx.Node, fx.Node] = {}
        for node in todo:
            for source in node.all_input_nodes:
                last[source] = node
        steps = []
        for node in todo:
            args, kwargs = (_spec(part, slot) for part in (node.args, node.kwargs))
            kind = {"call_module": "module", "call_function": "function", "call_method": "method"}.get(
                node.op, "attribute"
            )
            target = node.target
            if kind == "function" and getattr(F, name_of(node), None) is target:
                kind, target = "functional", name_of(node)
            unread = [node] if node not in last and node not in kept else []
            done = [source for source in node.all_input_nodes if last.get(source) is node and source not in kept]
            steps.append(Step(kind, target, args, kwargs, slot(node), tuple(slot(n) for n in [*done, *unread])))
        carries = {self.prefix + node.name: slot(node) for node in given if node is not main}
        gives = slot(main)
        return Program(takes_main, takes, context, tuple(steps), len(slots), gives, carries)


def is_layer(module: nn.Module) -> bool:
    """Modules that are never looked into: PyTorch's layers, and convolutions of graphs."""
    kinds = [kind.__name__ for kind in type(module).__mro__]
    own = type(module).__module__.startswith(("torch.nn.", "torch.ao.nn"))
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return "MessagePassing" in kinds or (own and not isinstance(module, containers))


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, NORMALISATIONS) or type(module).__module__.startswith("torch_geometric.nn.norm")


def _is_activation(module: nn.Module) -> bool:
    return isinstance(module, _DROPOUTS) or type(module).__module__ == "torch.nn.modules.activation"


def _spec(value: Any, slot: Callable[[fx.Node], int]) -> Any:
    if isinstance(value, fx.Node):
        return Slot(slot(value))
    if isinstance(value, tuple):
        return tuple(_spec(part, slot) for part in value)
    if isinstance(value, list):
        return [_spec(part, slot) for part in value]
    if isinstance(value, dict):
        return {key: _spec(part, slot) for key, part in value.items()}
    if isinstance(value, slice):
        return slice(*(_spec(part, slot) for part in (value.start, value.stop, value.step)))
    return value


def _dependencies(
    net: nn.Module, nodes: Sequence[fx.Node]
) -> tuple[dict[fx.Node, list[fx.Node]], dict[fx.Node, list[fx.Node]]]:
    """What every node needs and who reads it; who reads what has been written into needs the one that wrote."""
    needs: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
    wrote: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        found = dict.fromkeys(node.all_input_nodes)
        for source in node.all_input_nodes:
            found |= dict.fromkeys(wrote.get(source, ()))
        needs[node] = list(found)
        if _writes(net, node):
            for source in _written(net, node):
                wrote.setdefault(source, []).append(node)
    readers: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
    for node, sources in needs.items():
        for source in sources:
            readers[source].append(node)
    return needs, readers


def name_of(node: fx.Node) -> str:
    """Path of a module, name of a method or function."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _told(node: fx.Node) -> str:
    return repr(node.target) if node.op == "call_module" else f"{name_of(node)}()"


def _picks(node: fx.Node) -> bool:
    return name_of(node) in ("getitem", "getattr") and bool(node.all_input_nodes)


def _writes(net: nn.Module, node: fx.Node) -> bool:
    """Whether a node works in place."""
    name = name_of(node)
    if node.op == "call_module":
        return bool(getattr(net.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return name.endswith("_") and not name.endswith("__")
    if node.op == "call_function":
        inplace = node.kwargs.get("inplace") is True or "out" in node.kwargs
        return inplace or name == "setitem" or name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return False


_IN_PLACE = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imatmul", "iand", "ior", "ixor"}


def _written(net: nn.Module, node: fx.Node) -> list[fx.Node]:
    """What a node may write into: its first argument, and what that is a view of, or was itself written into."""
    found = []
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        found.append(node)
        if name_of(node) not in _RESHAPES and not _writes(net, node):
            break
    return found
