"""The order of execution of a network as a graph: modules as single nodes, and what happens between them."""

from __future__ import annotations

import copy
import linecache
import traceback
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.fx.proxy import Attribute
from torch.utils._pytree import tree_leaves

from locallearn.nets.arguments import OutputMissing

# They make tensors from numbers alone, so nothing of the trace would show in them; recorded, they run in every pass anew.
_FACTORIES = (
    "arange",
    "empty",
    "eye",
    "full",
    "linspace",
    "logspace",
    "normal",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
)
# They want a dtype itself, and take no symbol of one.
_FACTS = ("finfo", "iinfo")


_BY_VALUES = "what it does depends on the values in a tensor"
_READS_VALUES = {"item", "tolist", "numpy"}


class CannotTrace(ValueError):
    """A forward does what no graph can show. ``path`` is the innermost opened module that was at work, ``""`` the network."""

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message)
        self.path = path


class _Known(fx.Proxy):
    """What a symbol can be asked for while it is traced: facts of shape, type and device, as they are for the example."""

    tracer: Tracer

    def __getattr__(self, name: str) -> Any:
        return _KnownAttribute(self, name)

    def __len__(self) -> int:
        return len(self.tracer.value(self.node))

    def __index__(self) -> int:
        return int(self.tracer.fact(self.node).__index__())

    def __int__(self) -> int:
        return int(self.tracer.fact(self.node))

    def __float__(self) -> float:
        return float(self.tracer.fact(self.node))


class _KnownAttribute(_Known, Attribute):
    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        if self._node is None:
            self._node = self.tracer.create_proxy("call_function", getattr, (self.root, self.attr), {}).node
        return self._node


class Tracer(fx.Tracer):
    """Trace a network with all modules as single nodes but those that are opened.

    Where a forward asks a symbol for a fact (``if x.dim() == 4``, ``range(x.shape[1])``), it gets that of the example; of
    the values of a tensor it gets none.

    Args:
        opened: ids of the modules whose forward is followed; the network's own always is.
    """

    def __init__(self, opened: Container[int]) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True
        self.constants: dict[str, Tensor] = {}
        self._opened = opened
        self._stack: list[str] = []
        self._failed: str | None = None
        self._concrete = False
        self._values: dict[fx.Node, Any] = {}
        self._inputs: Mapping[str, Any] = {}
        self._net = nn.Module()
        self.ends: dict[str, tuple[fx.Node, ...]] = {}
        """What modules gave, by path; of a tuple, list or dict what is in it."""
        self.counts: dict[str, int] = {}
        """How often modules ran, by path."""

    def record(self, net: nn.Module, inputs: Mapping[str, Any], call: Callable[..., Any]) -> fx.Graph:
        """The graph of one pass.

        Args:
            net: the network, in the mode that is to be traced.
            inputs: an example of every argument by name; those that are no tensors are taken as they are.
            call: runs a forward on such arguments and picks what of the output counts.

        Raises:
            CannotTrace: says where.
        """
        self._net, self._inputs, self._call = net, inputs, call
        try:
            with self._factories(), preserved(net), _buffers_written_into():
                return self.trace(net)
        except CannotTrace:
            raise
        except Exception as error:
            self._check_example()
            where = self._failed or ""
            owner = type(net.get_submodule(where)).__name__
            whole = (
                f"give no cuts inside of {where!r}, so that it stays whole"
                if where
                else "put that into a module of its own"
            )
            raise CannotTrace(
                f"{type(net).__name__} cannot be followed through {_place(error)}, in the forward of {owner}: "
                f"{_first_line(error)}; {whole}, or cut the network by hand with locallearn.Blocks",
                where,
            ) from error

    def _check_example(self) -> None:
        """Whether the network itself runs the example; where it does not, the trace is not to blame.

        Raises:
            ValueError: it does not; or what is asked for of its output is not there.
        """
        before, self._concrete = self._concrete, True
        mode = "training" if self._net.training else "evaluation"
        values = {name: v.clone() if isinstance(v, Tensor) else v for name, v in self._inputs.items()}
        entered = [""]

        def enter(name: str, module: nn.Module, args: Any) -> None:
            entered[0] = name

        hooks = [m.register_forward_pre_hook(partial(enter, name)) for name, m in self._net.named_modules() if name]
        try:
            with torch.no_grad(), preserved(self._net):
                self._call(self._net, values)
        except OutputMissing:
            raise
        except Exception as error:
            where = f", because {entered[0]!r} normalises over the batch" if entered[0] else ""
            more = f"; give an example of several samples{where}" if lacks_samples(error) else ""
            if "Half" in str(error):
                more = "; Half is float16: give network and example both in float32 or both in bfloat16"
            raise ValueError(
                f"{type(self._net).__name__} cannot run the example in {mode} mode: {_first_line(error)}{more}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
            self._concrete = before

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        """See :meth:`record`."""
        return super().trace(root, concrete_args)

    def value(self, node: fx.Node) -> Any:
        """What a node gives for the example, without gradients."""
        if node not in self._values:
            before, self._concrete = self._concrete, True
            try:
                with torch.no_grad():
                    for other in self.graph.nodes:
                        if other.op != "output" and other not in self._values:
                            self._values[other] = self._compute(other)
                        if other is node:
                            break
            finally:
                self._concrete = before
        return self._values[node]

    def fact(self, node: fx.Node) -> Any:
        """The same of what is no tensor.

        Raises:
            TypeError: it depends on the values of a tensor.
        """
        value = self.value(node)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)) and not isinstance(value, tuple | list | dict):
            raise TypeError(_BY_VALUES)
        sources = [node]
        for source in sources:  # a number that was read out of a tensor is no fact either
            if source.op == "call_method" and source.target in _READS_VALUES:
                raise TypeError(_BY_VALUES)
            sources += [other for other in source.all_input_nodes if other not in sources]
        return value

    def weighed(
        self, nodes: Iterable[fx.Node], weigh: Callable[[Callable[[], Any]], tuple[Any, float, dict[int, int]]]
    ) -> dict[fx.Node, tuple[float, dict[int, int]]]:
        """Run these nodes once more, with gradients; ``weigh`` tells what each costs."""
        values = {node: self._compute(node, {}) for node in self.graph.nodes if node.op == "placeholder"}
        costs = {}
        with torch.enable_grad():
            for node in nodes:
                values[node], flops, storages = weigh(partial(self._compute, node, values))
                costs[node] = (flops, storages)
        return costs

    def _compute(self, node: fx.Node, values: Mapping[fx.Node, Any] | None = None) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), (self._values if values is None else values).__getitem__)
        if node.op == "placeholder":
            value = self._inputs[str(node.target)]
            return value.clone() if isinstance(value, Tensor) else value
        if node.op == "get_attr":
            return lookup(self._net, str(node.target), self.constants)
        if node.op == "call_module":
            return self._net.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    @contextmanager
    def _factories(self) -> Iterator[None]:
        def recorded(make: Callable[..., Any], always: bool) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if self._concrete or not (always or any(isinstance(a, fx.Proxy) for a in (*args, *kwargs.values()))):
                    return make(*args, **kwargs)
                return self.create_proxy("call_function", make, args, kwargs)

            return call

        with ExitStack() as stack:
            for name in (*_FACTORIES, *_FACTS):
                made = recorded(getattr(torch, name), always=name in _FACTORIES)
                stack.enter_context(mock.patch.object(torch, name, made))
            yield

    # -- what fx asks for ------------------------------------------------------------------------------------------------
    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Symbols for the tensors among the inputs; whatever else was given is taken as it is."""
        symbols = {
            name: self.create_proxy("placeholder", name, (), {}) if _symbolic(value) else value
            for name, value in self._inputs.items()
        }

        def run() -> Any:
            return self._call(self._net.forward, symbols)

        return run, []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Everything that was not opened."""
        return id(m) not in self._opened

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Follow, or make a node."""
        if self._concrete:
            return forward(*args, **kwargs)
        if not any(m is module for module in self._net.modules()):
            if any(True for _ in m.parameters()) or any(True for _ in m.buffers()):
                raise ValueError(
                    f"it runs a {type(m).__name__} that is no member of the network, so nothing would train its weights; make "
                    "it one (nn.ModuleList and nn.ModuleDict hold lists and dicts of modules)"
                )
            return forward(*args, **kwargs)  # made in the forward itself: nn.ReLU()(x) is what relu(x) is
        path = self.path_of_module(m)
        self.counts[path] = self.counts.get(path, 0) + 1
        try:
            result = super().call_module(m, forward, args, kwargs)
            self.ends[path] = tuple(given.node for given in _parts(result) if isinstance(given, fx.Proxy))
            return result
        except Exception:
            if self._failed is None:
                self._failed = path if id(m) in self._opened else ".".join(path.split(".")[:-1])
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters and buffers as symbols."""
        return attr_val if self._concrete else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Symbols that know facts."""
        return _Known(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Decide by facts.

        Raises:
            TypeError: it depends on the values of a tensor.
        """
        return bool(self.fact(obj.node))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """As many symbols as there are for the example."""
        value = self.value(obj.node)
        return iter(value) if isinstance(value, dict) else iter([obj[i] for i in range(len(value))])  # type: ignore[index]

    def create_arg(self, a: Any) -> Any:
        """Tensors that the forward has made or keeps outside of parameters and buffers become constants."""
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            if any(a is buffer for buffer in self.root.buffers()):
                return super().create_arg(a)
            name = next((name for name, known in self.constants.items() if known is a), None)
            if name is None:
                name = f"_constant{len(self.constants)}"
                self.constants[name] = a
            return self.create_node("get_attr", name, (), {})
        if a is None or isinstance(a, torch.device | torch.dtype | torch.layout | torch.memory_format):
            return a
        try:
            return super().create_arg(a)
        except NotImplementedError as error:
            kind = type(a).__name__
            without = ", for which the example may be a dict with use_cache=False" if "Cache" in kind else ""
            raise TypeError(
                f"it passes a {kind} on, and a graph shows tensors, numbers, strings, tuples, lists and dicts alone: have the "
                f"network do without it{without}"
            ) from error


def trace(
    net: nn.Module, inputs: Mapping[str, Any], call: Callable[..., Any], opened: Container[int], training: bool
) -> tuple[fx.Graph, Tracer]:
    """The graph of a pass in training or evaluation mode, and the tracer, which knows constants and values.

    Raises:
        CannotTrace: names file and line.
    """
    tracer = Tracer(opened)
    with in_mode(net, training):
        graph = tracer.record(net, inputs, call)
        with preserved(net):
            for node in graph.nodes:
                if node.op != "output":
                    tracer.value(node)
    return graph, tracer


@contextmanager
def _buffers_written_into() -> Iterator[None]:
    """A forward that is traced must not replace a buffer.

    Raises:
        TypeError: it does, which no graph shows.
    """
    plain = nn.Module.__setattr__

    def put(module: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, fx.Proxy) and name in module._buffers:
            raise TypeError(
                f"it puts a new tensor in the place of the buffer {name!r}, where only writing into it can be followed "
                f"(self.{name}.copy_(...))"
            )
        plain(module, name, value)

    with mock.patch.object(nn.Module, "__setattr__", put):
        yield


def _parts(result: Any) -> list[Any]:
    """What a module gave, in the order in which a named cut looks for the tensor that counts."""
    if isinstance(result, Mapping):
        return [result[key] for key in sorted(result, key=str)]
    return list(result) if isinstance(result, tuple | list) else [result]


def _symbolic(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def lookup(root: nn.Module, path: str, constants: Mapping[str, Any]) -> Any:
    """A parameter, a buffer, a module, or a constant of the trace, by its path."""
    if path in constants:
        return constants[path]
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Put a module into a mode and every part back into its own afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def preserved(*modules: nn.Module) -> Iterator[None]:
    """Put buffers, gradients and PyTorch's generators back afterwards: what runs in here leaves no trace.

    Nor do activations that modules keep as attributes (attention maps, say): they would hold a graph, and not be copied.
    """
    parts = {id(part): part for module in modules for part in module.modules()}
    attributes = [(part, dict(part.__dict__)) for part in parts.values()]
    kept = [
        (part, name, value, None if value is None else value.detach().clone())
        for part in parts.values()
        for name, value in part._buffers.items()
    ]
    devices = {value.get_device() for _, _, value, _ in kept if value is not None and value.is_cuda}
    devices |= {p.get_device() for module in modules for p in module.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            yield
        finally:
            with torch.no_grad():
                for part, name, value, before in kept:
                    if value is not None and before is not None:
                        value.data.copy_(before)
                        part._buffers[name] = value
            for part, known in attributes:
                left = [
                    k for k, v in part.__dict__.items() if isinstance(v, Tensor | fx.Proxy) and v is not known.get(k)
                ]
                for name in left:
                    del part.__dict__[name]
                    if name in known:
                        part.__dict__[name] = known[name]


def _place(error: BaseException) -> str:
    """The innermost line that is neither PyTorch's nor ours, as ``file:line: code``."""
    frames = traceback.extract_tb(error.__traceback__)
    foreign = [f for f in frames if not f.filename.startswith(_INTERNAL) and f.filename != __file__]
    if not foreign:
        return "its forward"
    frame = foreign[-1]
    line = frame.line or linecache.getline(frame.filename, frame.lineno or 0).strip()
    return f"{frame.filename}:{frame.lineno} ({line})"


_INTERNAL = tuple(path for path in (torch.__path__[0], contextmanager.__code__.co_filename, copy.__file__))


def lacks_samples(error: Exception) -> bool:
    """Whether this is what PyTorch's normalisations say of a batch of one sample."""
    return "more than 1 value per channel" in str(error)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0].rstrip(".") if text else type(error).__name__
