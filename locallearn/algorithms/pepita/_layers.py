"""Blocks taken apart: one layer of weights, and what stands around it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from locallearn.algorithms.base import refuse_made_weights
from locallearn.functional import pepita
from locallearn.nets.blocks import in_order
from locallearn.nets.pieces import kind_of

_ELEMENTWISE = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Softplus,
    nn.Softsign,
    nn.Sigmoid,
    nn.Tanh,
    nn.Hardtanh,
)
_POOLINGS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d)
_DROPOUTS = (nn.modules.dropout._DropoutNd,)


class Layer(NamedTuple):
    """A block taken apart: one layer of weights, and what stands around it."""

    name: str
    before: tuple[nn.Module, ...]
    weights: nn.Linear | nn.Conv2d
    activation: tuple[nn.Module, ...]
    after: tuple[nn.Module, ...]

    def gradients(self, post: Tensor, pre: Tensor, reduction: pepita.Reduction) -> dict[nn.Parameter, Tensor]:
        """Correlations of a post-synaptic term with what the weights read, by parameter."""
        module = self.weights
        held = dict(module.named_parameters())  # these and no others: refused where it was taken apart
        weight = held.pop("weight")
        gradients = {bias: pepita.bias_correlation(post, reduction) for bias in held.values()}
        if isinstance(module, nn.Linear):
            gradients[weight] = pepita.correlation(post, pre)
        else:
            assert not isinstance(module.padding, str)  # refused where it was taken apart
            shape = (module.kernel_size, module.stride, module.padding, module.dilation, module.groups)
            gradients[weight] = pepita.conv_correlation(post, pre, *shape, reduction)
        return gradients


def taken_apart(name: str, block: nn.Module) -> Layer:
    """Split a block at its weights.

    Raises:
        ValueError: the block is not one linear or convolutional layer with what may stand around it; names the block.
    """
    before: list[nn.Module] = []
    activation: list[nn.Module] = []
    after: list[nn.Module] = []
    weights: nn.Linear | nn.Conv2d | None = None
    for module in in_order(block):
        if isinstance(module, nn.Linear | nn.Conv2d) and not any(map(is_lazy, module.parameters())):
            refuse_made_weights(name, module, "PEPITA")
            if weights is not None:
                raise ValueError(
                    f"block {name!r} has two layers of weights, and PEPITA trains one per block: make it two"
                )
            weights = module
        elif isinstance(module, nn.Flatten) and weights is None:
            before.append(module)
        elif isinstance(module, _ELEMENTWISE) and weights is not None and not after:
            activation.append(module)
        elif isinstance(module, (*_POOLINGS, nn.Flatten)) and weights is not None:
            after.append(module)
        elif isinstance(module, _DROPOUTS):
            raise ValueError(
                f"block {name!r} has an nn.{type(module).__name__}, and PEPITA draws masks of its own, the same for both "
                "passes: take it out and set algorithm.dropout"
            )
        else:
            raise ValueError(
                f"block {name!r} has a {kind_of(module)} where PEPITA has no rule for it: a block is nn.Flatten or "
                "nothing, one nn.Linear or nn.Conv2d, elementwise activations without weights, then pooling"
            )
    if weights is None:
        raise ValueError(f"block {name!r} has no nn.Linear or nn.Conv2d: put its layers into the block before it")
    if isinstance(weights, nn.Conv2d) and (isinstance(weights.padding, str) or weights.padding_mode != "zeros"):
        raise ValueError(
            f"block {name!r} has a convolution with padding={weights.padding!r}, padding_mode={weights.padding_mode!r}: "
            "PEPITA's step is written for numbers of zeros"
        )
    return Layer(name, tuple(before), weights, tuple(activation), tuple(after))
