"""Directions in the space of what linear and convolutional layers put out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import jvp
from torch.utils._python_dispatch import TorchDispatchMode

from locallearn.algorithms._selection import each_loss
from locallearn.algorithms.base import refuse_made_weights
from locallearn.algorithms.forward_gradient._passes import Draws, refuse_no_mean, run, settle
from locallearn.batch import Batch
from locallearn.functional.forward_gradient import Noise, tangents
from locallearn.nets.blocks import Blocks
from locallearn.nets.local_mixer import GroupedLinear, Normalised

_unpack: Callable[[Tensor], Any] = forward_ad.unpack_dual
_make: Callable[[Tensor, Tensor], Tensor] = forward_ad.make_dual
OWNER = "forward gradients of activities"
Layer = nn.Linear | GroupedLinear | nn.Conv1d | nn.Conv2d | nn.Conv3d
Change = Callable[[int, Tensor], Tensor]  # of the direction at the i-th call of a pass
_TWO_ORDERS = (nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


class Call(NamedTuple):
    """One call of a layer: what it read, in which version, and the direction of what it put out.

    Of a layer whose outputs are ``normalised`` the direction is of what comes out there, and ``made`` is what went in.
    """

    layer: Layer
    read: Tensor
    version: int
    direction: Tensor
    normalised: Normalised | None = None
    made: Tensor | None = None


class _Direction(NamedTuple):
    """A weight and the direction in which it is moved."""

    weight: Tensor
    along: Tensor


class Activities:
    """One derivative of every sample's loss per direction, all layers perturbed at once.

    Args:
        blocks: the network.
        loss: of the task, a mean over samples.
        noise: of the directions.
        count: K, which pass one by one.
        mask: no noise where the ReLU that reads a layer's output is off.
    """

    def __init__(
        self,
        blocks: Blocks,
        loss: Callable[[Tensor, Tensor], Tensor],
        noise: Noise,
        count: int,
        mask: bool = False,
    ) -> None:
        self.blocks, self.loss = blocks, loss
        self.noise, self.count, self.mask = noise, count, mask
        self._compared = False

    def layers(self) -> dict[str, Layer]:
        """Layers whose weights learn, by name."""
        return {
            name: module
            for name, module in self.blocks.named_modules()
            if isinstance(module, Layer) and any(p.requires_grad for p in module.parameters())
        }

    def check(self, example: Batch) -> None:
        """Samples must not see one another, and every weight must belong to a layer that is known.

        Raises:
            ValueError: names the module.
        """
        if example.context or example.rows is not None:
            raise ValueError(
                f"{OWNER} take every sample's loss by itself, and nodes of a graph see one another: use perturb=weights"
            )
        for name, module in self.blocks.named_modules():
            # With statistics that rest, each sample is by itself.
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
                raise ValueError(
                    f"{name!r} is an nn.{type(module).__name__}, through which samples see one another, and {OWNER} take every "
                    "sample's loss by itself: use perturb=weights, or another normalisation"
                )
        layers = self.layers()
        for name, layer in layers.items():
            if type(layer) is not GroupedLinear:
                refuse_made_weights(name, layer, OWNER)
            if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and (
                isinstance(layer.padding, str) or layer.padding_mode != "zeros"
            ):
                raise ValueError(
                    f"{name!r} has padding={layer.padding!r}, padding_mode={layer.padding_mode!r}: {OWNER} are written "
                    "for numbers of zeros"
                )
        known = {id(p) for layer in layers.values() for p in layer.parameters()}
        for name, p in self.blocks.named_parameters():
            if p.requires_grad and id(p) not in known:
                raise ValueError(
                    f"the weight {name!r} belongs to no linear or convolutional layer, and {OWNER} know no other: use "
                    "perturb=weights, or freeze it with requires_grad_(False)"
                )

    def step(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[nn.Parameter, Tensor], Any]:
        """The loss, the estimate of every weight's gradient, and what is held for it: what all layers have read."""
        self.check(batch)
        made: dict[nn.Parameter, Tensor] = {}
        draws = Draws(batch.inputs.device)
        for _ in range(self.count):
            draws.again()
            outputs, along, calls, moved = self._pass(batch, generator)
            self._look(calls, len(batch.inputs))
            if not self._compared:
                refuse_no_mean(self.loss, outputs, batch.targets, OWNER, "use perturb=weights")
                self._compared = len(batch.inputs) > 2  # of two, as in the example, much looks alike
            losses, slopes = self._slopes(outputs, along, batch.targets)
            share = slopes / (len(slopes) * self.count)
            for call in calls:
                add(made, call, share.to(call.direction.dtype).view(-1, *[1] * (call.direction.ndim - 1)))
        settle(self.blocks, moved)  # what all passes made of the same state
        return losses.mean(), made, calls

    def try_out(self, batch: Batch, generator: torch.Generator) -> None:
        """One step, and what it cannot see.

        Raises:
            ValueError: samples see one another, a weight is used by others than its layer, or what is masked is read elsewhere.
        """
        self.step(batch, generator)
        if self.mask:
            self._check_mask(batch, generator)
        _, along, _, _ = self._pass(batch, generator, _first_sample)
        if along is not None and bool(((along[1:] != 0) & along[1:].isfinite()).any()):
            raise ValueError(
                "what the layers put out for one sample changes the outputs of another, and forward gradients of activities "
                "take every sample's loss by itself: use perturb=weights"
            )
        weights = {
            name: _Direction(p.detach(), tangents(p.shape, "gaussian", generator, p.device, p.dtype))
            for name, p in self.blocks.named_parameters()
            if p.requires_grad
        }
        if self._elsewhere(weights, batch):
            name = next((name for name, weight in weights.items() if self._elsewhere({name: weight}, batch)), "")
            raise ValueError(
                f"the weight {name!r} is used by more than its linear or convolutional layers (a tied decoder or embedding?), "
                "and forward gradients of activities would miss a part of its gradient: use perturb=weights, or freeze it "
                "with requires_grad_(False)"
            )

    def _elsewhere(self, weights: dict[str, _Direction], batch: Batch) -> bool:
        """Whether what layers read or the outputs depend on weights when all that layers put out is held still."""
        found: list[Tensor | None] = []

        def still(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
            found.append(_unpack(_read(given, named)).tangent)
            held: Tensor = _unpack(output).primal
            return held

        hooks = [layer.register_forward_hook(still, with_kwargs=True) for layer in self.layers().values()]
        try:
            with forward_ad.dual_level():
                dual = {name: _make(*weight) for name, weight in weights.items()}
                found.append(_unpack(run(self.blocks, dual, batch)[0]).tangent)
                return any(along is not None and bool((along != 0).any()) for along in found)
        finally:
            for hook in hooks:
                hook.remove()

    def _look(self, calls: list[Call], samples: int) -> None:
        """Every layer has put something out for every sample.

        Raises:
            ValueError: names the layer.
        """
        seen = {id(call.layer) for call in calls}
        others = {id(call.layer) for call in calls if len(call.direction) != samples}
        changed = {id(call.layer) for call in calls if call.read._version != call.version}
        for name, layer in self.layers().items():
            if id(layer) not in seen:
                raise ValueError(
                    f"the layer {name!r} is not called as a module, so forward gradients of activities cannot see what it "
                    "puts out: use perturb=weights, or freeze it with requires_grad_(False)"
                )
            if id(layer) in changed:
                raise ValueError(
                    f"what the layer {name!r} has read is written into afterwards, and its gradient needs it as it was: do "
                    "that out of place, or use perturb=weights"
                )
            if id(layer) in others:
                raise ValueError(
                    f"the layer {name!r} puts out rows that are not one per sample, and forward gradients of activities "
                    "take every sample's loss by itself: use perturb=weights"
                )

    def _check_mask(self, batch: Batch, generator: torch.Generator) -> None:
        """Where a ReLU is off, nothing else reads its input.

        Raises:
            ValueError: something does.
        """
        weights = self._drawn(generator)
        _, _, calls, _ = self._pass(batch, generator, weights=weights)
        masks = [call.direction == 0 for call in calls]
        _, along, _, _ = self._pass(batch, generator, lambda i, u: u * masks[i], weights)
        if along is not None and bool((along != 0).any()):
            raise ValueError(
                "what a layer puts out is read by more than the ReLU behind it, and where that is off it still matters: "
                "mask=true would miss a part of its gradient, so leave mask out"
            )

    def _drawn(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Other weights, so that nothing is hidden by those that start at zero."""
        return {
            name: tangents(p.shape, "gaussian", generator, p.device, p.dtype) * (len(p) / p.numel()) ** 0.5
            for name, p in self.blocks.named_parameters()
            if p.ndim and p.is_floating_point()
        }

    def _pass(
        self,
        batch: Batch,
        generator: torch.Generator,
        change: Change | None = None,
        weights: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, list[Call], dict[str, Tensor]]:
        """Outputs, their derivative, the calls, and buffers after the pass.

        Args:
            batch: what is read.
            generator: of the directions.
            change: of the direction at every call.
            weights: in place of the network's.
        """
        calls: list[Call] = []
        mapped: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # by layer: what it has read, and what went into its normalisation
        handed: list[Tensor] = []  # the perturbed output of the last call

        def moved(layer: nn.Module, read: Tensor, output: Tensor, behind: tuple[Any, ...] = ()) -> Tensor:
            primal, tangent = _unpack(output)
            u = tangents(primal.shape, self.noise, generator, primal.device, primal.dtype)
            if change is not None:
                u = change(len(calls), u)
            calls.append(Call(cast(Layer, layer), read, read._version, u, *behind))
            # An activation may write into what it is given, its tangent included: u has to stay what was drawn.
            handed[:] = [_make(primal, u.clone() if tangent is None else tangent + u)]
            return handed[0]

        def perturb(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
            return moved(layer, _unpack(_read(given, named)).primal, output)

        def note(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
            mapped[id(layer)] = _unpack(_read(given, named)).primal, _unpack(output).primal

        def perturb_behind(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
            behind = cast(Normalised, module)
            read, made = mapped.pop(id(behind.layer))
            return moved(behind.layer, read, output, (behind, made))

        def mask(relu: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
            if handed and given and given[0] is handed[0]:
                calls[-1].direction.mul_(_unpack(output).primal > 0)

        normalised = {id(m.layer): m for m in self.blocks.modules() if isinstance(m, Normalised)}
        hooks = []
        for layer in self.layers().values():
            behind = normalised.get(id(layer))
            if behind is None:
                hooks.append(layer.register_forward_hook(perturb, with_kwargs=True))
            else:
                hooks.append(layer.register_forward_hook(note, with_kwargs=True))
                hooks.append(behind.register_forward_hook(perturb_behind, with_kwargs=True))
        if self.mask:
            hooks += [m.register_forward_hook(mask) for m in self.blocks.modules() if type(m) is nn.ReLU]
        try:
            with _one_order(self.blocks), forward_ad.dual_level():
                made, state = run(self.blocks, weights or {}, batch)
                outputs, along = _unpack(made)
                return outputs, along, calls, {name: _unpack(buffer).primal for name, buffer in state.items()}
        finally:
            for hook in hooks:
                hook.remove()

    def _slopes(self, outputs: Tensor, along: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Every sample's loss, and its derivative."""

        def losses(outputs: Tensor) -> Tensor:
            return each_loss(self.loss, outputs, targets)

        if along is None:  # nothing learns
            return losses(outputs), outputs.new_zeros(len(outputs))
        return cast(tuple[Tensor, Tensor], jvp(losses, (outputs,), (along,)))


class _Passing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Does nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _one_order(blocks: Blocks) -> AbstractContextManager[Any]:
    """Have derivatives of normalisation always round in the same order.

    PyTorch writes them in place where nothing watches its operations, and in another order where something does; then a step
    that is counted or audited would differ in its last bits. So something always watches, which costs a call per operation.
    Of ``torch.func`` there is one order only.
    """
    found = any(isinstance(module, _TWO_ORDERS) for module in blocks.modules())
    return _Passing() if found else nullcontext()  # type: ignore[no-untyped-call]


def _read(given: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    read: Tensor = given[0] if given else named["input"]
    return read


def _first_sample(call: int, u: Tensor) -> Tensor:
    u[1:] = 0
    return u


def add(made: dict[nn.Parameter, Tensor], call: Call, slopes: Tensor) -> None:
    """Sum over samples of slope times direction times what was read; ``slopes`` is repeated along the direction's sizes."""
    u = call.direction * slopes
    if call.normalised is not None and call.made is not None:
        u = call.normalised.pull_back(call.made, u)
    layer, read = call.layer, call.read.to(u.dtype)
    if isinstance(layer, nn.Linear):
        found = [u.flatten(0, -2).T @ read.flatten(0, -2), u.flatten(0, -2).sum(0)]
    elif isinstance(layer, GroupedLinear):
        parts = [torch.unflatten(x.flatten(0, -2), -1, (layer.groups, -1)) for x in (u, read)]
        found = [torch.einsum("ngo,ngi->goi", *parts).flatten(0, 1), u.flatten(0, -2).sum(0)]
    else:
        # The product of a kernel's gradient, which nobody calls but this line: autograd's engine does not run.
        _, *found = torch.ops.aten.convolution_backward(
            u,
            read,
            layer.weight,
            None if layer.bias is None else list(layer.bias.shape),
            layer.stride,
            layer.padding,
            layer.dilation,
            False,
            [0] * len(layer.stride),
            layer.groups,
            [False, True, layer.bias is not None],
        )
    for parameter, gradient in zip((layer.weight, layer.bias), found, strict=True):
        if isinstance(parameter, nn.Parameter):
            gradient = gradient.to(parameter.dtype)  # autocast's are too coarse for sums
            made[parameter] = made[parameter] + gradient if parameter in made else gradient
