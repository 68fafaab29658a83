"""Directions in the space of what linear and convolutional layers put out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import jvp

from locallearn.algorithms._selection import each_loss
from locallearn.algorithms.base import refuse_made_weights
from locallearn.algorithms.forward_gradient._passes import Draws, refuse_no_mean, run, settle
from locallearn.batch import Batch
from locallearn.functional.forward_gradient import Noise, tangents
from locallearn.nets.blocks import Blocks

_unpack: Callable[[Tensor], Any] = forward_ad.unpack_dual
_make: Callable[[Tensor, Tensor], Tensor] = forward_ad.make_dual
OWNER = "forward gradients of activities"
_Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


class _Call(NamedTuple):
    """One call of a layer: what it read, in which version, and the direction of what it put out."""

    layer: _Layer
    read: Tensor
    version: int
    direction: Tensor


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
    """

    def __init__(self, blocks: Blocks, loss: Callable[[Tensor, Tensor], Tensor], noise: Noise, count: int) -> None:
        self.blocks, self.loss = blocks, loss
        self.noise, self.count = noise, count
        self._compared = False

    def layers(self) -> dict[str, _Layer]:
        """Layers whose weights learn, by name."""
        return {
            name: module
            for name, module in self.blocks.named_modules()
            if isinstance(module, _Layer) and any(p.requires_grad for p in module.parameters())
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
            refuse_made_weights(name, layer, OWNER)
            if not isinstance(layer, nn.Linear) and (isinstance(layer.padding, str) or layer.padding_mode != "zeros"):
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
            for call in calls:
                _add(made, call, slopes / (len(slopes) * self.count))
        settle(self.blocks, moved)  # what all passes made of the same state
        return losses.mean(), made, calls

    def try_out(self, batch: Batch, generator: torch.Generator) -> None:
        """One step, and what it cannot see.

        Raises:
            ValueError: samples see one another, or a weight is used by others than its layer.
        """
        self.step(batch, generator)
        _, along, _, _ = self._pass(batch, generator, first=True)
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

    def _look(self, calls: list[_Call], samples: int) -> None:
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

    def _pass(
        self, batch: Batch, generator: torch.Generator, first: bool = False
    ) -> tuple[Tensor, Tensor | None, list[_Call], dict[str, Tensor]]:
        """Outputs, their derivative, the calls, and buffers after the pass; ``first``: perturbs the first sample alone."""
        calls: list[_Call] = []

        def perturb(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
            primal, tangent = _unpack(output)
            u = tangents(primal.shape, self.noise, generator, primal.device, primal.dtype)
            if first:
                u[1:] = 0
            read = _unpack(_read(given, named)).primal
            calls.append(_Call(cast(_Layer, layer), read, read._version, u))
            # An activation may write into what it is given, its tangent included: u has to stay what was drawn.
            return _make(primal, u.clone() if tangent is None else tangent + u)

        hooks = [layer.register_forward_hook(perturb, with_kwargs=True) for layer in self.layers().values()]
        try:
            with forward_ad.dual_level():
                made, moved = run(self.blocks, {}, batch)
                outputs, along = _unpack(made)
                return outputs, along, calls, {name: _unpack(buffer).primal for name, buffer in moved.items()}
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


def _read(given: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    read: Tensor = given[0] if given else named["input"]
    return read


def _add(made: dict[nn.Parameter, Tensor], call: _Call, slopes: Tensor) -> None:
    """Sum over samples of slope times direction times what was read."""
    u = call.direction * slopes.to(call.direction.dtype).view(-1, *[1] * (call.direction.ndim - 1))
    layer, read = call.layer, call.read.to(u.dtype)
    if isinstance(layer, nn.Linear):
        found = [u.flatten(0, -2).T @ read.flatten(0, -2), u.flatten(0, -2).sum(0)]
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
