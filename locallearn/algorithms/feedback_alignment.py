"""The feedback alignment family: backpropagation's chain, with other weights on the way back."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from locallearn.algorithms._error_path import Fault, error_path, inside_checkpoint
from locallearn.algorithms.base import Algorithm, Locality, ParamGroup, TaskInfo, Update, output_layer, selected
from locallearn.algorithms.dry_run import dry_run
from locallearn.batch import Batch
from locallearn.functional import feedback_alignment as fa
from locallearn.functional.feedback_alignment import Geometry
from locallearn.nets.blocks import fitted

Mode = Literal["fa", "dfa", "usf", "brsf", "frsf", "weight_mirror", "kolen_pollack"]

_BROADCAST: dict[Mode, str] = {
    "fa": "the error, through fixed random weights",
    "dfa": "the output's error, to every layer through fixed random weights",
    "usf": "the error, through the signs of the weights",
    "brsf": "the error, through the signs of the weights with random magnitudes, new for every batch",
    "frsf": "the error, through the signs of the weights with fixed random magnitudes",
    "weight_mirror": "the error, through weights learned from noise",
    "kolen_pollack": "the error, through weights that take the same steps as the forward weights",
}


class Call(NamedTuple):
    """One run of a layer.

    Attributes:
        inputs: h.
        weight: W.
        bias: b.
        geometry: of a convolution; ``None``: a linear layer.
    """

    inputs: Tensor
    weight: Tensor
    bias: Tensor | None
    geometry: Geometry | None


Carrier = Callable[[str, Call], Tensor]
"""Runs the layer of this name, so that its backward pass takes the rule's way."""


class Layer(NamedTuple):
    """A layer that receives feedback weights, as the dry run saw it.

    Attributes:
        parameter: path of its weight inside the network.
        input_shape: of the example's samples.
        output_shape: of the example's samples.
        geometry: of a convolution; ``None``: a linear layer.
        runs: how often one forward pass runs it.
    """

    parameter: str
    input_shape: torch.Size
    output_shape: torch.Size
    geometry: Geometry | None
    runs: int

    @property
    def name(self) -> str:
        """As figures and messages have it."""
        return _name(self.parameter)


class FeedbackWeights(nn.Module):
    """Feedback weights of one layer: fixed ones are buffers, learned ones parameters.

    Args:
        fixed: what no optimizer steps.
        learned: what the optimizer steps together with the network.
        mask: which of the learned ones exist; ``None``: all.
    """

    fixed: Tensor
    learned: Tensor
    mask: Tensor | None

    def __init__(self, fixed: Tensor | None = None, learned: Tensor | None = None, mask: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("fixed", fixed)
        self.register_parameter("learned", None if learned is None else nn.Parameter(learned))
        self.register_buffer("mask", mask)


class FeedbackChain(Algorithm):
    """What all rules of the family share: which layers there are, and how their backward pass is replaced.

    During the training forward pass every ``F.linear`` and ``F.conv2d`` whose weight is one of the network's is run by
    the rule's :meth:`carrier` instead. The network's modules are neither changed nor exchanged; what stands between those
    layers (normalisation, activations, pooling, sums) is differentiated exactly; inference is the plain forward pass.
    Every training pass is checked by its graph (:mod:`locallearn.algorithms._error_path`): whatever else would send the
    error through a matrix is refused by name, whether it was there when the rule was attached or not.

    The first layer has no feedback weights, because nothing below it learns.
    """

    layers: dict[str, Layer]
    feedback: nn.ModuleDict
    _lowest: list[str]  # paths of the weights that have nothing below that learns
    _products: list[str]  # layers below products of activations, which were warned of
    angle_name = "weight_angle"

    @property
    def locality(self) -> Locality:
        """An error travels backward, but not through the transposes of the forward weights."""
        return Locality.FEEDBACK

    @abstractmethod
    def make(self, layer: Layer, weight: Tensor) -> FeedbackWeights:
        """Draw the feedback weights of a layer on the CPU; ``weight`` is its W, for shape and dtype."""

    @abstractmethod
    def carrier(self) -> Carrier:
        """What runs the layers in one forward pass."""

    @abstractmethod
    def path(self, name: str) -> Tensor:
        """What stands for W on the way back from this layer, in the shape of W."""

    def build(self, task: TaskInfo) -> None:
        """Find the layers by a dry run, and draw their feedback weights."""
        output_layer(self.blocks, type(self).__name__)
        self._loss = task.loss
        self.layers = self._find_layers(task)
        self.feedback = nn.ModuleDict()
        for name, layer in self.layers.items():
            weight = self.blocks.get_parameter(layer.parameter).detach()
            self.feedback[_key(name)] = self.make(layer, weight.cpu()).to(weight.device, weight.dtype)

    @property
    def added_parameters(self) -> int:
        """Number of feedback weights, fixed ones among them."""
        fixed = (held.fixed for held in map(self.weights, self.layers) if held.fixed is not None)
        return super().added_parameters + sum(b.numel() for b in fixed)

    @property
    def carries(self) -> bool:
        """The network runs as a whole, whatever crosses the borders."""
        return True

    def units(self) -> dict[str, list[ParamGroup]]:
        """One unit: the network, with the feedback weights that are learned."""
        return {"network": [{"params": [*self.blocks.parameters(), *self.feedback.parameters()]}]}

    def updates(self, batch: Batch) -> Iterator[Update]:
        """The task's loss on the network's output.

        Raises:
            ValueError: in this pass the error would go through a matrix as in backpropagation; names the layer.
        """
        drawn = self.get_extra_state()  # before this batch's draws, which stay the same if its loss is made anew

        def again() -> Tensor:
            self.set_extra_state(drawn)
            return self._loss_of(batch)

        yield Update("network", self._loss_of(batch), again=again)

    def _loss_of(self, batch: Batch) -> Tensor:
        # By the identity of the weight, found anew for every batch, so that copies of the algorithm find their own.
        known = {id(self._weight(name)): name for name in self.layers}
        return self._loss(*selected(batch, self._run(batch, self.carrier(), known)))

    def _run(self, batch: Batch, carrier: Carrier, known: Mapping[int, str]) -> Tensor:
        """A forward pass; what it really did is looked at in autograd's graph, every time.

        Args:
            batch: what to run on.
            carrier: runs the known layers.
            known: names of layers by the identity of their weights.
        """
        lowest = {id(self.blocks.get_parameter(path)): _name(path) for path in self._lowest}
        outputs: Tensor
        with _Intercept(known, lowest, carrier) as intercept:
            outputs = self.blocks(batch.inputs, *batch.context)
        path = error_path(outputs)
        for name in (name for name in intercept.ungraded if name not in path.carried):
            raise ValueError(
                f"layer {name!r} was run without gradients in a training pass, so that it learns nothing, or runs once more in "
                "the backward pass (activation checkpointing?), where the error would go through its weight as in "
                "backpropagation: let F.linear and F.conv2d record what they do, and take checkpointing out"
            )
        for fault in path.faults:
            raise ValueError(self._refusal(fault, intercept.ran))
        for name in path.products:
            if name not in self._products:
                self._products.append(name)
                warnings.warn(
                    f"attention after layer {name!r}: its products of queries, keys and values are differentiated exactly, "
                    "only the layers around it send the error through feedback weights",
                    stacklevel=3,
                )
        return outputs

    def _refusal(self, fault: Fault, ran: Container[str]) -> str:
        """What stands in the error's way, in a sentence; ``ran`` names the layers that were carried."""
        paths = {id(p): path for path, p in self.blocks.named_parameters()}
        known = [paths[id(p)] for p in fault.weights if id(p) in paths]
        matrices = [path for path in known if self.blocks.get_parameter(path).ndim > 1]
        order = list(paths.values())
        through = min(matrices or known, key=order.index, default=None)
        after = f" after layer {fault.after[0]!r}" if fault.after else ""
        if "Checkpoint" in fault.function:
            return (
                f"what comes{after} runs once more in the backward pass (activation checkpointing: {fault.function}), where "
                "the error would go through its weights as in backpropagation: take the checkpointing out"
            )
        if through is None:
            return (
                f"{fault.function}{after} multiplies activations by a matrix that takes no gradient (a buffer, a constant, "
                "something detached), so the error would go through its transpose as in backpropagation: make it the weight "
                "of an nn.Linear with requires_grad_(False), which gets feedback weights of its own, or use another algorithm"
            )
        if _name(through) in ran or _name(through) in self.layers or through in self._lowest:
            return (
                f"the weight of layer {_name(through)!r} is also used outside of F.linear and F.conv2d, or made into something "
                f"else before (DropConnect, noise, quantisation?): {fault.function}{after}, where the error would go through "
                "it as in backpropagation: give that place a weight of its own, and F.linear the weight itself"
            )
        owner = type(self.blocks.get_submodule(through.rpartition(".")[0])).__name__
        return (
            f"{_name(through)!r} ({owner}) meets the activations{after} neither as the weight of F.linear or F.conv2d nor "
            f"entry by entry, but by way of {fault.function}, so the error would go through it as in backpropagation: use a "
            "network of linear layers and Conv2d, each run with the weight itself"
        )

    def weights(self, name: str) -> FeedbackWeights:
        """The feedback weights of a layer, by its dotted path inside the network."""
        held = self.feedback[_key(name)]
        assert isinstance(held, FeedbackWeights)
        return held

    @torch.no_grad()
    def diagnostics(self) -> dict[str, dict[str, float]]:
        """Angle in degrees between what carries the error and W, and the ratio of their norms, by layer."""
        figures = {}
        for name in self.layers:
            path, weight = self.path(name), self._weight(name)
            figures[name] = {self.angle_name: fa.angle(path, weight), "norm_ratio": fa.norm_ratio(path, weight)}
        return figures

    def _weight(self, name: str) -> nn.Parameter:
        return self.blocks.get_parameter(self.layers[name].parameter)

    def _find_layers(self, task: TaskInfo) -> dict[str, Layer]:
        """Run the network once and note the layers above the first, in the order of the forward pass.

        Raises:
            ValueError: the error would pass a matrix as in backpropagation; a layer that the backward pass runs again.
        """
        for path, parameter in self.blocks.named_parameters():
            if is_lazy(parameter):
                raise ValueError(
                    f"layer {_name(path)!r} is lazy, so its feedback weights have no shape yet: run the network once before "
                    "it is trained"
                )
        example = task.example
        dry_run(self.blocks, example, task)  # tells which block it is that cannot run
        inputs = fitted(self.blocks, example.inputs)
        frozen = [p for p in self.blocks.parameters() if not p.requires_grad and p.is_floating_point()]
        self.layers, self._lowest, self._products = {}, [], []
        lowest: dict[str, None] = {}
        found: dict[str, Layer] = {}
        runs: Counter[str] = Counter()

        def note(name: str, call: Call) -> Tensor:
            output = fa.carry(*call[:3], call.weight.detach(), call.geometry)
            runs[name] += 1
            path = paths[id(call.weight)]
            if call.inputs.requires_grad:  # something below it learns
                found[name] = Layer(path, call.inputs.shape, output.shape, call.geometry, runs[name])
            else:
                lowest[path] = None
            return output

        paths = {id(p): path for path, p in self.blocks.named_parameters()}
        try:
            for p in frozen:  # they may learn later
                p.requires_grad_(True)
            with torch.enable_grad():
                self._run(example._replace(inputs=inputs), note, {key: _name(path) for key, path in paths.items()})
        finally:
            for p in frozen:
                p.requires_grad_(False)
        carried = {layer.parameter for layer in found.values()}
        self._lowest = [path for path in lowest if path not in carried]
        return found


class FeedbackAlignment(FeedbackChain):
    """Feedback alignment and its relatives, on any network of linear layers and 2-d convolutions.

    ``fa``: fixed random B (Lillicrap et al. 2016). ``dfa``: the output's error goes straight to every layer (Nøkland
    2016). ``usf``, ``brsf``, ``frsf``: signs of W with uniform, batchwise or fixed random magnitudes (Liao et al. 2016).
    ``weight_mirror``: B follows W by what noise shows of it; ``kolen_pollack``: B takes the steps of W (Akrout et al.
    2019). Equations: :mod:`locallearn.functional.feedback_alignment`.

    Deviations: DFA's error enters at the input of every layer, and a residual network's skips pass on what they receive.
    The mirror's estimate decays at the rate at which it grows, B ← (1 - η) B + η mean(ζᵀ ξ), so that B settles at W
    itself; its noise has variance 1, passes the linear part of a layer only, without bias, and covers the padding, too.

    Args:
        mode: see above.
        mirror_lr: η of ``weight_mirror``, above 0 and up to 1.
        mirror_every: updates for one step of ``weight_mirror``.
        seed: of the feedback weights, of the magnitudes of ``brsf`` and of the mirror's noise.

    Raises:
        ValueError: an unknown mode, or ``mirror_lr`` or ``mirror_every`` out of range.
    """

    def __init__(self, mode: Mode = "fa", mirror_lr: float = 0.01, mirror_every: int = 1, seed: int = 0) -> None:
        super().__init__(seed)
        if mode not in get_args(Mode):
            raise ValueError(f"mode is {mode!r}, expected one of {', '.join(get_args(Mode))}")
        if not 0 < mirror_lr <= 1:
            raise ValueError(f"mirror_lr is {mirror_lr}, expected a number above 0 and up to 1")
        if mirror_every < 1:
            raise ValueError(f"mirror_every is {mirror_every}, expected at least 1")
        self.mode: Mode = mode
        self.mirror_lr = mirror_lr
        self.mirror_every = mirror_every

    @property
    def variant(self) -> str:
        """The mode."""
        return self.mode

    @property
    def broadcast(self) -> str:
        """The error, and what it travels through."""
        return _BROADCAST[self.mode]

    @property
    def linear_optimizer(self) -> str | None:
        """Kolen-Pollack needs equal steps for B and W."""
        if self.mode != "kolen_pollack":
            return None
        return (
            "Kolen-Pollack's B comes to equal W because both take the same steps and weight decay wears their difference "
            "away; steps that are scaled weight by weight are not the same"
        )

    @property
    def period(self) -> int:
        """From one look of the mirror to the next."""
        return self.mirror_every if self.mode == "weight_mirror" else 1

    def make(self, layer: Layer, weight: Tensor) -> FeedbackWeights:
        """Xavier-uniform in the shape of W; for ``dfa`` of shape ``(entries of δ_L, entries of the layer's input)``."""
        if self.mode in ("usf", "brsf"):
            return FeedbackWeights()
        if self.mode == "kolen_pollack":
            return FeedbackWeights(learned=fa.xavier_uniform(weight))
        if self.mode == "dfa":
            output = self._last.output_shape
            if layer.runs > 1 or layer.input_shape[0] != output[0]:
                raise ValueError(
                    f"layer {layer.name!r} runs {layer.runs} times in a forward pass, on {layer.input_shape[0]} "
                    f"rows for {output[0]} of the output: direct feedback needs layers that see every sample once; use "
                    "another mode"
                )
            return FeedbackWeights(
                fa.xavier_uniform(weight.new_empty(output[1:].numel(), layer.input_shape[1:].numel()))
            )
        return FeedbackWeights(fa.xavier_uniform(weight))

    def carrier(self) -> Carrier:
        """The chain through B; for ``dfa``, with a place for the output's error."""
        return partial(self._direct, fa.OutputError()) if self.mode == "dfa" else self._chain

    def path(self, name: str) -> Tensor:
        """B; for ``brsf`` with magnitudes that no batch has seen."""
        weight = self._weight(name)
        return self._feedback(name, weight, torch.Generator(weight.device).manual_seed(self.seed))

    def diagnostics(self) -> dict[str, dict[str, float]]:
        """Angle in degrees between B and W, and ratio of their norms; nothing for ``dfa``, whose B has another shape."""
        return {} if self.mode == "dfa" else super().diagnostics()

    def updates(self, batch: Batch) -> Iterator[Update]:
        """Let the mirror look where it is time to, then the task's loss on the network's output."""
        if self.mode == "weight_mirror":
            if self.batches_seen % self.mirror_every == 0:
                self._mirror(len(batch.inputs))
            self.batches_seen += 1
        yield from super().updates(batch)

    @property
    def _last(self) -> Layer:
        """The output layer."""
        return self.layers[next(reversed(self.layers))]

    def _chain(self, name: str, call: Call) -> Tensor:
        feedback = self._feedback(name, call.weight, self.rng(call.weight.device))
        return fa.carry(call.inputs, call.weight, call.bias, feedback, call.geometry)

    def _direct(self, error: fa.OutputError, name: str, call: Call) -> Tensor:
        last = self.layers[name] is self._last
        feedback = self.weights(name).fixed
        return fa.carry_direct(call.inputs, call.weight, call.bias, feedback, error, last, call.geometry)

    def _feedback(self, name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
        """B of a layer; what is made of W is made now, so that the backward pass need not look at it."""
        held = self.weights(name)
        if self.mode == "usf":
            return fa.sign_symmetric(weight.detach())
        if self.mode == "brsf":
            return fa.sign_magnitude(weight.detach(), fa.xavier_uniform(weight.detach(), generator))
        if self.mode == "frsf":
            return fa.sign_magnitude(weight.detach(), held.fixed)
        return held.learned if self.mode == "kolen_pollack" else held.fixed

    @torch.no_grad()
    def _mirror(self, samples: int) -> None:
        """One step of every B towards what noise shows of W."""
        for name, layer in self.layers.items():
            weight, fixed, geometry = self._weight(name), self.weights(name).fixed, layer.geometry
            shape = [samples, *layer.input_shape[1:]]
            if geometry is not None:
                for i, zeros in enumerate(geometry.padding):
                    shape[2 + i] += 2 * zeros
                geometry = geometry._replace(padding=(0, 0))
            noise = torch.empty(shape, dtype=weight.dtype, device=weight.device)
            noise.uniform_(-(3**0.5), 3**0.5, generator=self.rng(weight.device))
            with torch.autocast(weight.device.type, enabled=False):
                fixed.lerp_(fa.mirror(noise, weight, geometry), self.mirror_lr)


class _Intercept(TorchFunctionMode):
    """While it is on, ``F.linear`` and ``F.conv2d`` of known weights are run by a carrier.

    Hooks on the modules would have to be put there and taken away for every batch, would miss layers that are run by
    their weights alone, and could not tell how a convolution pads; the call itself says everything.

    Args:
        known: names of layers by the identity of their weights.
        lowest: the same of layers with nothing below that learns; they only have their name put to their graph.
        carrier: runs the known ones.

    Attributes:
        ran: names of the layers that it has run.
        ungraded: those among them that learn and were run without gradients at least once, in this order.
    """

    def __init__(self, known: Mapping[int, str], lowest: Mapping[int, str], carrier: Carrier) -> None:
        super().__init__()
        self._known = known
        self._lowest = lowest
        self._carrier = carrier
        self._grading = torch.is_grad_enabled()
        self.ran: set[str] = set()
        self.ungraded: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear or func is F.conv2d:
            call = (_linear_call if func is F.linear else _conv2d_call)(*args, **(kwargs or {}))
            name = self._known.get(id(call.weight)) or self._lowest.get(id(call.weight))
            if name is not None:
                return self._run(name, call)
        return func(*args, **(kwargs or {}))

    def _run(self, name: str, call: Call) -> Tensor:
        self.ran.add(name)
        if self._grading and inside_checkpoint():
            raise ValueError(
                f"layer {name!r} runs once more in the backward pass (activation checkpointing?), where the error "
                "would go through its weight as in backpropagation: take the checkpointing out"
            )
        if self._grading and not torch.is_grad_enabled() and call.weight.requires_grad:
            self.ungraded[name] = None
        if id(call.weight) in self._known:
            output = self._carrier(name, call)
        elif call.inputs.requires_grad:
            raise ValueError(
                f"layer {name!r} has no feedback weights, because nothing below it learned when the rule was attached, and now "
                "something does: attach the rule to a network that is as it will be trained"
            )
        else:
            output = fa.carry(*call[:3], None, call.geometry)
        if output.grad_fn is not None:
            output.grad_fn.layer = name  # type: ignore[attr-defined]
        return output


def _linear_call(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:
    return Call(_cast(input), weight, bias, None)


def _conv2d_call(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Call:
    spread = _pair(dilation)
    if padding == "same":
        zeros = [d * (side - 1) for d, side in zip(spread, weight.shape[2:], strict=True)]
        if any(total % 2 for total in zeros):  # one zero more at the end than at the start, which no Geometry can say
            input = F.pad(input, [0, zeros[1] % 2, 0, zeros[0] % 2])
        padding = (zeros[0] // 2, zeros[1] // 2)
    around = (0, 0) if isinstance(padding, str) else _pair(padding)
    return Call(_cast(input), weight, bias, Geometry(_pair(stride), around, spread, groups))


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else (*value, *value)[:2]


def _cast(inputs: Tensor) -> Tensor:
    """What the layer reads under autocast, so that this is what its backward pass keeps."""
    kind = inputs.device.type
    if inputs.dtype is torch.float64 or not torch.is_autocast_enabled(kind):
        return inputs
    return inputs.to(torch.get_autocast_dtype(kind))


def _name(path: str) -> str:
    """``members.layer1.0.weight`` → ``layer1.0``."""
    return path.removeprefix("members.").removesuffix(".weight")


def _key(name: str) -> str:
    """Modules cannot hold dots in their names."""
    return name.replace(".", "/")
