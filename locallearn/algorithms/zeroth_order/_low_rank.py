"""Directions of low rank, and the losses of many of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms.zeroth_order._way import Setting, Way
from locallearn.functional.counter_noise import numbers
from locallearn.functional.zeroth_order import ExactSum, low_rank, low_rank_estimate
from locallearn.nets.blocks import Blocks


class LowRank(Way):
    """E = A Bᵀ/√r for every matrix (a kernel is one of a row per channel), noise of its own for every entry of a vector.

    Args:
        weights: that learn, by name.
        setting: of the rule.
        rank: r.
    """

    def __init__(self, weights: dict[str, nn.Parameter], setting: Setting, rank: int) -> None:
        super().__init__(weights, setting)
        self._rank = rank
        self._kept: dict[str, Tensor] | None = None
        self._drawn: dict[str, tuple[Tensor, ...]] = {}

    def begin(self, step: int) -> None:
        """Draw the factors of all directions."""
        super().begin(step)
        self._kept = None
        self._drawn = {name: self._factors(name, p) for name, p in self.weights.items()}

    def _factors(self, name: str, p: nn.Parameter) -> tuple[Tensor, ...]:
        """A ``(n, rows, r)`` and B ``(n, columns, r)``; of a vector its noise ``(n, *shape)``."""
        setting, members = self.setting, torch.arange(self.setting.count)

        def draw(stream: str, count: int) -> Tensor:
            word = setting.words[stream]
            found = numbers(setting.seed, self.step, members, word, 0, count, setting.noise, p.device)
            return found.to(p.dtype if p.dtype == torch.float64 else torch.float32)

        if p.ndim < 2:
            return (draw(name, p.numel()).view(-1, *p.shape),)
        rows, columns = p.shape[0], p[0].numel()
        a = draw(f"{name}/A", rows * self._rank).view(-1, rows, self._rank)
        b = draw(f"{name}/B", columns * self._rank).view(-1, columns, self._rank)
        return a, b

    def visit(self, member: int, sign: int) -> None:
        """With every direction written out."""
        if self._kept is None:
            self._kept = {name: p.detach().clone() for name, p in self.weights.items()}
        for name, p in self.weights.items():
            found = self._drawn[name]
            whole = found[0][member] if len(found) == 1 else low_rank(found[0][[member]], found[1][[member]])[0]
            p.copy_(self._kept[name] + (sign * self.setting.eps) * whole.view(p.shape))

    def home(self) -> None:
        """From the copy."""
        if self._kept is not None:
            for name, p in self.weights.items():
                p.copy_(self._kept[name])
        self._kept = None

    def estimates(self, c: Tensor) -> Iterator[dict[nn.Parameter, Tensor]]:
        """All at once."""
        n = self.setting.count
        with torch.autocast(next(iter(self.weights.values())).device.type, enabled=False):
            made = {p: self._estimate(p, c, self._drawn[name]).view(p.shape) / n for name, p in self.weights.items()}
        self._drawn = {}
        yield made

    def _estimate(self, p: nn.Parameter, c: Tensor, found: tuple[Tensor, ...]) -> Tensor:
        if self.setting.exact:
            total = ExactSum(p, c)
            for i, weight in enumerate(c.tolist()):
                if len(found) == 1:
                    total.add(found[0][i] * weight)
                else:  # one product of two numbers per entry, which is the same everywhere
                    a, b = found[0][i] * (weight / self._rank**0.5), found[1][i]
                    for k in range(self._rank):
                        total.add((a[:, k, None] * b[None, :, k]).view(p.shape))
            return total.value()
        if len(found) == 1:
            return (c.to(p.device, found[0].dtype) @ found[0].flatten(1)).view(p.shape)
        return low_rank_estimate(c.to(p.device), *found)

    # -- many at once --------------------------------------------------------------------------------------------------
    def together(self, blocks: Blocks, members: Tensor, signs: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """Outputs of the network at several directions in one pass, ``(len(members), N, ...)``.

        The first layer that learns is given the batch once; what it puts out there is the same for all directions, and what
        directions add to it is a product with r columns. Behind it every direction has rows of its own.

        Args:
            blocks: the network, at θ.
            members: directions.
            signs: of each of them, ±1.
            run: runs the network.

        Raises:
            NotImplementedError: a weight belongs to no layer whose share is known.
        """
        layers = known_layers(blocks, self.weights)
        shares = {
            name: tuple(part[members] for part in self._drawn[name])
            for layer in layers.values()
            for name in layer.values()
        }
        scale = signs.to(next(iter(self.weights.values())).device, torch.float32) * self.setting.eps
        many = len(members)

        def add(layer: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
            names = layers[layer]
            x = given[0]
            wide = x.shape[0] != rows[0]
            if not wide:
                output = output.repeat(many, *[1] * (output.ndim - 1))
            parts: dict[str, tuple[Tensor, ...]] = {key: shares[name] for key, name in names.items()}
            return output + _share(layer, x, output, parts, scale.to(output.dtype), many, wide)

        rows: list[int] = []

        def first(module: nn.Module, given: tuple[Any, ...]) -> None:
            if not rows:
                rows.append(given[0].shape[0])

        hooks = [blocks[0].register_forward_pre_hook(first)]
        hooks += [layer.register_forward_hook(add) for layer in layers]
        try:
            outputs = run()
        finally:
            for hook in hooks:
                hook.remove()
        return outputs.view(many, -1, *outputs.shape[1:])


def known_layers(blocks: Blocks, weights: dict[str, nn.Parameter]) -> dict[nn.Module, dict[str, str]]:
    """Layers that hold the weights, and of each of these its names in the layer and in the network.

    Raises:
        NotImplementedError: a weight that belongs to none whose share can be computed on the side, or to another module, too.
    """
    names = {id(p): name for name, p in weights.items()}
    found: dict[nn.Module, dict[str, str]] = {}
    for layer in blocks.modules():
        own = {key: names[id(p)] for key, p in layer.named_parameters(recurse=False) if id(p) in names}
        if own and not _known(layer):
            raise NotImplementedError
        if own:
            found[layer] = own
    held = [name for own in found.values() for name in own.values()]
    if sorted(held) != sorted(weights):
        raise NotImplementedError
    return found


def _known(layer: nn.Module) -> bool:
    """Whether what directions add to this layer's output can be computed on the side."""
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and not isinstance(layer.padding, str) and layer.padding_mode == "zeros"
    return type(layer) is nn.Linear or isinstance(layer, nn.LayerNorm | nn.GroupNorm | nn.modules.batchnorm._BatchNorm)


def _share(
    layer: nn.Module,
    x: Tensor,
    output: Tensor,
    parts: dict[str, tuple[Tensor, ...]],
    scale: Tensor,
    many: int,
    wide: bool,
) -> Tensor:
    """What directions add to a layer's output.

    Args:
        layer: it.
        x: what it has read, with rows for every direction (``wide``) or once for all.
        output: ``(many · N, ...)``.
        parts: factors or noise by name of the weight.
        scale: signs times ε, ``(many,)``.
        many: directions.
        wide: see above.
    """
    total: Tensor | float = 0.0
    if isinstance(layer, nn.Linear | nn.Conv2d):
        if "weight" in parts:
            a, b = (part.to(output.dtype) for part in parts["weight"])
            a = a * (scale / a.shape[-1] ** 0.5).view(-1, 1, 1)
            if isinstance(layer, nn.Linear):
                total = _of_linear(x, a, b, many, wide).view(output.shape)
            else:
                total = _of_convolution(layer, x, a, b, many, wide).reshape(output.shape)
        if "bias" in parts:
            axis = output.ndim - 1 if isinstance(layer, nn.Linear) else 1
            total = total + _spread(parts["bias"][0], scale, output, many, axis)
        return total  # type: ignore[return-value]
    if not wide:
        x = x.repeat(many, *[1] * (x.ndim - 1))
    axis = 1
    if isinstance(layer, nn.LayerNorm):
        even, axis = F.layer_norm(x, layer.normalized_shape, eps=layer.eps), output.ndim - len(layer.normalized_shape)
    elif isinstance(layer, nn.GroupNorm):
        even = F.group_norm(x, layer.num_groups, eps=layer.eps)
    else:
        norm: Any = layer
        even = F.batch_norm(x, norm.running_mean, norm.running_var, training=False, eps=norm.eps)
    if "weight" in parts:
        total = even * _spread(parts["weight"][0], scale, output, many, axis)
    if "bias" in parts:
        total = total + _spread(parts["bias"][0], scale, output, many, axis)
    return total  # type: ignore[return-value]


def _spread(noise: Tensor, scale: Tensor, output: Tensor, many: int, axis: int) -> Tensor:
    """Noise of a vector over the rows of its direction, along these axes of the output."""
    scaled = noise.to(output.dtype) * scale.view(-1, *[1] * (noise.ndim - 1))
    behind = output.ndim - axis - (noise.ndim - 1)
    shape = (many, 1, *[1] * (axis - 1), *noise.shape[1:], *[1] * behind)
    return scaled.view(shape).expand(many, output.shape[0] // many, *shape[2:]).flatten(0, 1)


def _of_linear(x: Tensor, a: Tensor, b: Tensor, many: int, wide: bool) -> Tensor:
    flat = x.reshape(many, -1, x.shape[-1]) if wide else x.reshape(1, -1, x.shape[-1]).expand(many, -1, -1)
    made: Tensor = (flat @ b) @ a.transpose(1, 2)
    return made


def _of_convolution(layer: nn.Conv2d, x: Tensor, a: Tensor, b: Tensor, many: int, wide: bool) -> Tensor:
    rank = b.shape[-1]
    filters = b.transpose(1, 2).reshape(many * rank, *layer.weight.shape[1:])
    padding: Any = layer.padding
    if wide:  # directions side by side as groups of channels
        x = x.view(many, -1, *x.shape[1:]).transpose(0, 1).flatten(1, 2)
    found = F.conv2d(x, filters, None, layer.stride, padding, layer.dilation, many if wide else 1)
    found = found.view(found.shape[0], many, rank, -1)
    return torch.einsum("bnrl,nor->nbol", found, a)
