"""Where a guess is compared with its target: at a block's output, or at every weight of the block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from locallearn.algorithms.base import refuse_made_weights
from locallearn.functional.forward_gradient import Noise, guess_scales, tangents
from locallearn.nets.blocks import Blocks

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CHANNELS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)
_TRAILING = (nn.LayerNorm, nn.RMSNorm)
KNOWN = (nn.Linear, *_CONVOLUTIONS, *_CHANNELS, *_TRAILING)
"""Layers whose weights have gradients of single samples."""


class Call(NamedTuple):
    """One call of a layer: what it read, and what it put out."""

    layer: nn.Module
    read: Tensor
    output: Tensor


class Guess(NamedTuple):
    """Something per sample, ``(N, ...)``: of the block's output, or of one of its weights."""

    weight: nn.Parameter | None
    values: Tensor


Guesses = list[Guess]


class OnOutputs:
    """``perturb=activities``: one guess per block, for its output; inside of the block the gradient is exact."""

    divides_random = False
    """Whether a random guess is divided by its square."""

    def check(self, blocks: Blocks) -> None:
        """Any layer will do."""

    def run(self, block: nn.Module, inputs: Tensor) -> tuple[Tensor, list[Call]]:
        """The block's output; no single layer is looked at."""
        return block(inputs), []

    def at(self, calls: Sequence[Call], output: Tensor, gradient: Tensor, keep: bool) -> Guesses:
        """What a gradient at the output is here: itself."""
        return [Guess(None, gradient)]

    def draw(self, block: nn.Module, output: Tensor, noise: Noise, generator: Generator) -> Guesses:
        """A random guess for every sample."""
        return [Guess(None, tangents(output.shape, noise, generator, output.device, output.dtype))]

    def estimate(
        self, block: nn.Module, output: Tensor, guesses: Guesses, slopes: Sequence[Tensor], divided: bool, keep: bool
    ) -> dict[nn.Parameter, Tensor]:
        """Gradients of the block's weights: those that the estimate at its output has.

        Args:
            block: whose.
            output: of the block, with its graph.
            guesses: one.
            slopes: ⟨G_n, G̃_n⟩ of it, ``(N,)``.
            divided: by the guess's square.
            keep: the graph, because it is still needed.
        """
        [guess], [slope] = guesses, slopes
        scales = guess_scales(slope, guess.values, divided)
        at_output = guess.values * scales.to(guess.values.dtype).view(-1, *[1] * (guess.values.ndim - 1))
        weights = learning(block)
        found = torch.autograd.grad(output, weights, at_output, retain_graph=keep, allow_unused=True)
        return {p: gradient for p, gradient in zip(weights, found, strict=True) if gradient is not None}


class OnWeights:
    """``perturb=weights``: a guess for every weight and sample.

    Nothing holds a gradient of single samples, but they need not be asked for from the loss: a layer z_n = f(x_n; W) has
    G_n = (∂f(x_n; W)/∂W)ᵀ δ_n, of a linear layer δ_n x_nᵀ, with δ_n the gradient at what it put out for the sample. Likewise a
    weight that moves by another G̃_n for every sample is nothing that a pass could be given; what the layer puts out then
    moves by ż_n = (∂f(x_n; W)/∂W) G̃_n, of a linear layer G̃_n x_n, and that is. ⟨G_n, G̃_n⟩ = ⟨δ_n, ż_n⟩ = dℓ_n/N along ż,
    exactly, because the layers are linear in their weights.
    """

    divides_random = True

    def check(self, blocks: Blocks) -> None:
        """Every weight of a block but the last one's must belong to a layer that is known.

        Raises:
            ValueError: names the weight.
        """
        owner = "guessed forward gradients of weights"
        for name, block in list(blocks.members.items())[:-1]:
            known: set[int] = set()
            for path, layer in block.named_modules():
                if not isinstance(layer, KNOWN) or not any(p.requires_grad for p in layer.parameters()):
                    continue
                if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                    refuse_made_weights(f"{name}.{path}" if path else name, layer, owner)
                if isinstance(layer, _CONVOLUTIONS) and (
                    isinstance(layer.padding, str) or layer.padding_mode != "zeros"
                ):
                    raise ValueError(
                        f"block {name!r} has a convolution with padding={layer.padding!r}, padding_mode="
                        f"{layer.padding_mode!r}: {owner} are written for numbers of zeros; use perturb=activities"
                    )
                known |= {id(p) for p in layer.parameters()}
            for path, p in block.named_parameters():
                if p.requires_grad and id(p) not in known:
                    raise ValueError(
                        f"the weight {path!r} of block {name!r} belongs to no linear, convolutional or normalising layer, and "
                        f"{owner} know no other: use perturb=activities, or freeze it with requires_grad_(False)"
                    )

    def run(self, block: nn.Module, inputs: Tensor) -> tuple[Tensor, list[Call]]:
        """The block's output, and the calls of its layers that learn.

        Raises:
            ValueError: a layer puts out rows that are not one per sample.
        """
        calls: list[Call] = []

        def note(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
            if len(output) != len(inputs):
                raise ValueError(
                    f"a {type(layer).__name__} puts out {len(output)} rows for {len(inputs)} samples, and guessed forward "
                    "gradients of weights take every sample by itself: use perturb=activities"
                )
            calls.append(Call(layer, (given[0] if given else named["input"]).detach(), output))
            return output.clone()  # an activation may write into it

        with hooked(block, note):
            return block(inputs), calls

    def at(self, calls: Sequence[Call], output: Tensor, gradient: Tensor, keep: bool) -> Guesses:
        """Gradients of single samples of every weight, ``(N, *weight.shape)``, that a gradient at the output makes.

        Args:
            calls: of the block's layers.
            output: of the block, with its graph.
            gradient: at the output.
            keep: the graph, because it is still needed.
        """
        if not calls:
            return []
        places = [call.output for call in calls]
        found: Sequence[Tensor | None] = torch.autograd.grad(
            output, places, gradient, retain_graph=keep, allow_unused=True
        )
        made: dict[nn.Parameter, Tensor] = {}
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            for call, at_output in zip(calls, found, strict=True):
                if at_output is None:
                    continue
                for weight, values in sample_gradients(call.layer, call.read, at_output):
                    made[weight] = made[weight] + values if weight in made else values
        return [Guess(weight, values) for weight, values in made.items()]

    def draw(self, block: nn.Module, output: Tensor, noise: Noise, generator: Generator) -> Guesses:
        """A random guess for every weight and sample."""
        samples = len(output)
        return [
            Guess(p, tangents((samples, p.numel()), noise, generator, p.device, p.dtype).view(samples, *p.shape))
            for p in learning(block)
        ]

    def estimate(
        self, block: nn.Module, output: Tensor, guesses: Guesses, slopes: Sequence[Tensor], divided: bool, keep: bool
    ) -> dict[nn.Parameter, Tensor]:
        """Gradients of the block's weights: the sum over samples; see :meth:`OnOutputs.estimate`."""
        made: dict[nn.Parameter, Tensor] = {}
        for (weight, values), slope in zip(guesses, slopes, strict=True):
            assert weight is not None
            scales = guess_scales(slope, values, divided)
            made[weight] = torch.tensordot(scales.to(values.dtype), values, 1)
        return made


def learning(block: nn.Module) -> list[nn.Parameter]:
    """Weights of a block that learn."""
    return [p for p in block.parameters() if p.requires_grad]


@contextmanager
def hooked(block: nn.Module, hook: Callable[..., Tensor]) -> Iterator[None]:
    """Have ``hook`` see every call of a layer that is known and learns."""
    layers = [layer for layer in block.modules() if isinstance(layer, KNOWN) and learning(layer)]
    hooks = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def sample_gradients(layer: nn.Module, read: Tensor, at_output: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Of one call of a layer the gradients of its weights, sample by sample.

    Args:
        layer: one of those that are known.
        read: what it was given, ``(N, ...)``.
        at_output: gradient at what it put out, ``(N, ...)``.
    """
    weight, bias = cast(nn.Parameter | None, layer.weight), cast(nn.Parameter | None, getattr(layer, "bias", None))
    like = next(layer.parameters())
    read, at_output = read.to(like.dtype), at_output.to(like.dtype)
    if isinstance(layer, nn.Linear):
        made = torch.einsum(
            "ntq,ntp->nqp",
            at_output.flatten(1, -2) if at_output.ndim > 2 else at_output[:, None],
            read.flatten(1, -2) if read.ndim > 2 else read[:, None],
        )
        summed = at_output.flatten(1, -2).sum(1) if at_output.ndim > 2 else at_output
    elif isinstance(layer, _CONVOLUTIONS):
        summed = at_output.flatten(2).sum(2)
        made = torch.vmap(lambda x, d: _kernel(layer, x[None], d[None]))(read, at_output)
    elif isinstance(layer, _TRAILING):
        own = len(like.shape)
        made, summed = (
            values.flatten(1, -own - 1).sum(1) if values.ndim > own + 1 else values
            for values in (at_output * normalised(layer, read), at_output)
        )
    else:
        made, summed = (
            values.flatten(2).sum(2) if values.ndim > 2 else values
            for values in (at_output * normalised(layer, read), at_output)
        )
    for parameter, values in ((weight, made), (bias, summed)):
        if parameter is not None and parameter.requires_grad:
            yield parameter, values


def _kernel(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, read: Tensor, at_output: Tensor) -> Tensor:
    """The product that a kernel's gradient is, without autograd's engine."""
    made: Tensor = torch.ops.aten.convolution_backward(
        at_output,
        read,
        layer.weight,
        None,
        layer.stride,
        layer.padding,
        layer.dilation,
        False,
        [0] * len(layer.stride),
        layer.groups,
        [False, True, False],
    )[1]
    return made


def moved_outputs(layer: nn.Module, parameter: nn.Parameter, read: Tensor, along: Tensor, output: Tensor) -> Tensor:
    """How what a layer puts out moves when one of its weights moves by another direction for every sample.

    Args:
        layer: one of those that are known.
        parameter: its weight or its bias.
        read: what it was given, ``(N, ...)``.
        along: the directions, ``(N, *parameter.shape)``.
        output: what it put out, for the shape.
    """
    trailing = isinstance(layer, (nn.Linear, *_TRAILING))
    own = along.ndim - 1
    read = read.to(along.dtype)
    if isinstance(layer, nn.Linear) and parameter is layer.weight:
        many = read.flatten(1, -2) if read.ndim > 2 else read[:, None]
        return torch.einsum("ntp,nqp->ntq", many, along).view(output.shape)
    if isinstance(layer, _CONVOLUTIONS) and parameter is layer.weight:
        function = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}[
            next(kind for kind in _CONVOLUTIONS if isinstance(layer, kind))
        ]
        options: tuple[Any, ...] = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return torch.vmap(lambda x, w: function(x[None], w, None, *options)[0])(read, along)
    ones = output.ndim - 1 - own
    placed = (
        along.view(len(along), *[1] * ones, *along.shape[1:]) if trailing else along.view(*along.shape, *[1] * ones)
    )
    if parameter is getattr(layer, "bias", None):
        return placed.expand(output.shape)
    return placed * normalised(layer, read)


def normalised(layer: nn.Module, read: Tensor) -> Tensor:
    """What a normalising layer makes of its input before weight and bias; statistics do not move."""
    made: Tensor
    if isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.modules.instancenorm._InstanceNorm):
        of_batch = layer.training or layer.running_mean is None
        mean, var = (None, None) if of_batch else (layer.running_mean, layer.running_var)
        if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
            made = F.instance_norm(read, mean, var, None, None, of_batch, 0.0, layer.eps)
        else:
            made = F.batch_norm(read, mean, var, None, None, of_batch, 0.0, layer.eps)
    elif isinstance(layer, nn.GroupNorm):
        made = F.group_norm(read, layer.num_groups, None, None, layer.eps)
    elif isinstance(layer, nn.LayerNorm):
        made = F.layer_norm(read, layer.normalized_shape, None, None, layer.eps)
    else:
        assert isinstance(layer, nn.RMSNorm)
        made = F.rms_norm(read, layer.normalized_shape, None, layer.eps)
    return made
