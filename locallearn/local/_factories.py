"""What ``net=torchvision`` and ``net=factory`` make on the command line: networks of others in blocks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

from locallearn.local._where import balanced
from locallearn.nets.blocks import Blocks
from locallearn.nets.cut import cut_network


def torchvision(
    name: str,
    input_shape: Sequence[int],
    outputs: int,
    cuts: int | list[str] = 4,
    options: dict[str, Any] | None = None,
    weights: str | None = None,
) -> Blocks:
    """A classification network of torchvision in blocks, with random weights and as many outputs as there are classes.

    Args:
        name: as ``torchvision.models.get_model`` knows it, e.g. ``resnet18``.
        input_shape: ``(C, H, W)`` of one sample.
        outputs: number of classes.
        cuts: names of the modules behind which blocks end, or the number of blocks; see :func:`localize`.
        options: what else the network is made with, e.g. ``{"width_mult": 0.5}``.
        weights: must be ``None``: trained weights belong to other classes.

    Raises:
        ValueError: there is no such network, it does not take these images, or it cannot be cut there.
    """
    from torchvision import models

    if weights is not None:
        raise ValueError(
            f"weights is {weights!r}: a comparison of rules starts from random weights, set net.weights=null"
        )
    known = models.list_models(module=models)
    if name not in known:
        near = (
            ", ".join(get_close_matches(name, known, 3)) or "resnet18, vgg11, mobilenet_v3_small, vit_b_16 and others"
        )
        raise ValueError(f"torchvision has no classification network {name!r}; it has {near}")
    return _in_blocks(_made(name, partial(models.get_model, name, weights=None), outputs, options), input_shape, cuts)


def factory(
    name: str,
    input_shape: Sequence[int],
    outputs: int,
    cuts: int | list[str] = 4,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """A network of anybody's making in blocks.

    Args:
        name: dotted name of a class or function that makes a network. It is told the number of classes as ``num_classes``,
            ``num_labels``, ``outputs`` or ``out_channels``, and ``input_shape``, where its signature has them.
        input_shape: of one sample.
        outputs: number of classes.
        cuts: names of the modules behind which blocks end, or the number of blocks; see :func:`localize`.
        options: what else it is made with.

    Raises:
        ValueError: there is nothing by this name, it makes no network, or that cannot be cut there.
    """
    module, _, attribute = name.rpartition(".")
    try:
        make = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"name is {name!r}, expected a class or function with its module, my_package.make_net: {error}"
        ) from error
    given = dict(options or {})
    parameters = inspect.signature(make).parameters
    if "input_shape" in parameters:
        given.setdefault("input_shape", tuple(input_shape))
    net = _made(name, make, outputs, given)
    return net if isinstance(net, Blocks) else _in_blocks(net, input_shape, cuts)


_COUNTS = ("num_classes", "num_labels", "outputs", "out_channels")


def _made(name: str, make: Callable[..., Any], outputs: int, options: Mapping[str, Any] | None) -> nn.Module:
    parameters = inspect.signature(make).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    key = next((key for key in _COUNTS if key in parameters), "num_classes" if open_ended else None)
    given = dict(options or {})
    if key is not None:
        given.setdefault(key, outputs)
    try:
        net = make(**given)
    except TypeError as error:
        raise ValueError(f"{name} cannot be made with {', '.join(given) or 'nothing'}: {error}") from error
    if not isinstance(net, nn.Module):
        raise ValueError(f"{name} makes a {type(net).__name__}, expected a torch.nn.Module")
    return net


def _in_blocks(net: nn.Module, input_shape: Sequence[int], cuts: int | Sequence[str]) -> Blocks:
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    if layers and len(input_shape) == 3 and layers[0].in_channels != input_shape[0]:
        raise ValueError(
            f"{type(net).__name__} takes images of {layers[0].in_channels} channels, and these have {input_shape[0]}: use "
            "another data set, or a factory of your own that makes its first layer fit"
        )
    example = torch.randn(4, *input_shape, generator=torch.Generator().manual_seed(0))
    names = balanced(net, cuts, example) if isinstance(cuts, int) else list(cuts)
    return cut_network(net, names, example).blocks
