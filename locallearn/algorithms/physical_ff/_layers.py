"""Blocks taken apart at their weights: what they read is measured once, what they answer is judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms.base import refuse_made_weights
from locallearn.nets.blocks import NORMALISATIONS, in_order
from locallearn.nets.devices import Measured
from locallearn.nets.pieces import kind_of

Pointwise = Callable[[Tensor], tuple[Tensor, Tensor]]


class Layer(NamedTuple):
    """A block taken apart.

    Attributes:
        name: of the block.
        before: modules without weights in front of them: a device, flattening.
        weights: the linear or convolutional layer.
        norm: normalisation behind it.
        after: modules without weights behind that.
    """

    name: str
    before: tuple[nn.Module, ...]
    weights: nn.Linear | nn.Conv2d
    norm: tuple[nn.Module, ...]
    after: tuple[nn.Module, ...]

    @property
    def measured(self) -> Measured | None:
        """The device in front of the weights, where there is one."""
        return next((part for part in self.before if isinstance(part, Measured) and part.layer is not None), None)


def taken_apart(name: str, block: nn.Module, owner: str) -> Layer:
    """Split a block at its weights.

    Raises:
        ValueError: the block is not one linear or convolutional layer with modules without weights around it; names the block.
    """
    before: list[nn.Module] = []
    norm: list[nn.Module] = []
    after: list[nn.Module] = []
    weights: nn.Linear | nn.Conv2d | None = None
    for module in in_order(block):
        if isinstance(module, nn.Linear | nn.Conv2d):
            refuse_made_weights(name, module, owner)
            if weights is not None:
                raise ValueError(
                    f"block {name!r} has two layers of weights, and {owner} trains one per block: make it two"
                )
            weights = module
        elif isinstance(module, nn.modules.dropout._DropoutNd):
            raise ValueError(f"block {name!r} has an nn.{type(module).__name__}, and {owner} knows none: take it out")
        elif isinstance(module, NORMALISATIONS) and weights is not None and not after:
            norm.append(module)
        elif any(True for _ in module.parameters()) or (
            any(True for _ in module.children()) and type(module) is not Measured
        ):
            raise ValueError(
                f"block {name!r} has a {kind_of(module)}, and {owner} trains blocks of one nn.Linear or nn.Conv2d with "
                "modules without weights around it: write such a block, or use another algorithm"
            )
        else:
            (before if weights is None else after).append(module)
    if weights is None:
        raise ValueError(f"block {name!r} has no nn.Linear or nn.Conv2d: put its layers into the block before it")
    return Layer(name, tuple(before), weights, tuple(norm), tuple(after))


def pointwise(name: str, modules: Sequence[nn.Module], owner: str) -> Pointwise | None:
    """An activation with the derivative written out; ``None`` where there is none.

    Raises:
        ValueError: a module whose derivative is not written out here; names the block.
    """
    if not modules:
        return None
    found = _POINTWISE.get(type(modules[0]))
    if len(modules) > 1 or found is None or getattr(modules[0], "approximate", "none") != "none":
        raise ValueError(
            f"block {name!r} has {', '.join(type(module).__name__ for module in modules)} behind its weights, and {owner} "
            f"makes its gradient by hand for {', '.join(kind.__name__ for kind in _POINTWISE)}, or nothing: put one of these "
            "there, or set algorithm.protocol=ffzero"
        )
    module = modules[0]
    return lambda h: found(module, h)


def _gelu(module: nn.Module, h: Tensor) -> tuple[Tensor, Tensor]:
    below = 0.5 * (1.0 + torch.erf(h / 2**0.5))
    return F.gelu(h), below + h * torch.exp(-0.5 * h.square()) / (2.0 * torch.pi) ** 0.5


def _relu(module: nn.Module, h: Tensor) -> tuple[Tensor, Tensor]:
    return h.relu(), (h > 0).to(h)


def _leaky(module: nn.Module, h: Tensor) -> tuple[Tensor, Tensor]:
    slope = float(module.negative_slope)  # type: ignore[arg-type]
    return F.leaky_relu(h, slope), torch.where(h > 0, torch.ones_like(h), torch.full_like(h, slope))


def _elu(module: nn.Module, h: Tensor) -> tuple[Tensor, Tensor]:
    alpha = float(module.alpha)  # type: ignore[arg-type]
    return F.elu(h, alpha), torch.where(h > 0, torch.ones_like(h), alpha * h.clamp(max=0).exp())


def _tanh(module: nn.Module, h: Tensor) -> tuple[Tensor, Tensor]:
    value = h.tanh()
    return value, 1.0 - value.square()


_POINTWISE: dict[type[nn.Module], Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]] = {
    nn.GELU: _gelu,
    nn.ReLU: _relu,
    nn.LeakyReLU: _leaky,
    nn.ELU: _elu,
    nn.Tanh: _tanh,
}
