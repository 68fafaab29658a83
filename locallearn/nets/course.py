"""The course of one forward as a graph: where borders may lie in it, and the programs of the pieces between them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from locallearn.nets.blocks import NORMALISATIONS
from locallearn.nets.pieces import Program, Slot, Step
from locallearn.nets.trace import Tracer, lookup

_LOOKS = {
    *("size", "dim", "ndimension", "shape", "ndim", "numel", "dtype", "device", "layout", "is_cuda", "requires_grad"),
}
_RESHAPES = {
    *(
        "flatten",
        "unflatten",
        "reshape",
        "reshape_as",
        "view",
        "view_as",
        "permute",
        "transpose",
        "squeeze",
        "unsqueeze",
    ),
    *("swapaxes", "swapdims", "movedim", "moveaxis", "T", "mT", "contiguous", "expand"),
    *("getitem", "getattr", "chunk", "split", "unbind", "select", "narrow", "tuple", "to", "float"),
    *("mean", "sum", "max", "amax"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
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
        if plain and _is_norm(module):  # with parameters or without
            return True
        if id(module) not in self._free or isinstance(module, _POOLS_OVER_ALL):
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
