"""What ``net=torchvision`` and ``net=factory`` make on the command line: networks of others in blocks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from locallearn.batch import Batch
from locallearn.local._where import kind, names_of
from locallearn.nets.blocks import Blocks, evaluating
from locallearn.nets.cut import cut_network
from locallearn.nets.trace import preserved


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
    example: Tensor | Batch | None = None,
) -> nn.Module:
    """A network of anybody's making in blocks.

    Args:
        name: dotted name of a class or function that makes a network. It is told the number of classes as ``num_classes``,
            ``num_labels``, ``outputs`` or ``out_channels``, and ``input_shape``, where its signature has them.
        input_shape: of one sample.
        outputs: number of classes.
        cuts: names of the modules behind which blocks end, or the number of blocks; see :func:`localize`.
        options: what else it is made with.
        example: inputs as the data have them, by which the network is run to be cut; of a graph the batch, whose context the
            forward takes after the inputs: the edge index, then what edges carry (see :func:`_inputs`). Default: float32
            numbers of ``input_shape``.

    Raises:
        ValueError: there is nothing by this name, it makes no network, that does not take these data, or cannot be cut there.
    """
    module, _, attribute = name.rpartition(".")
    try:
        with torch.random.fork_rng(devices=[]):  # a module may draw when it is imported, which it is once in a process
            make = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"name is {name!r}, expected a class or function with its module, my_package.make_net: {error}"
        ) from error
    if isinstance(make, nn.Module) or not callable(make):
        raise ValueError(
            f"name is {name!r}, which is {kind(make)}, an object and nothing that makes networks: name its class, or a "
            "function that returns a new network every time, because every run starts from weights of its own"
        )
    given = dict(options or {})
    parameters = inspect.signature(make).parameters
    if "input_shape" in parameters:
        given.setdefault("input_shape", tuple(input_shape))
    net = _made(name, make, outputs, given)
    return net if isinstance(net, Blocks) else _in_blocks(net, input_shape, cuts, example)


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


def _in_blocks(
    net: nn.Module, input_shape: Sequence[int], cuts: int | Sequence[str], example: Tensor | Batch | None = None
) -> Blocks:
    given = _inputs(net, torch.zeros(2, *input_shape) if example is None else example)
    if isinstance(given, Tensor) and len(input_shape) == 3:
        _refuse_channels(net, given)
    return cut_network(net, names_of(net, cuts, given), given).blocks


def _refuse_channels(net: nn.Module, images: Tensor) -> None:
    """Say what is wrong where already the first convolution that runs cannot take images of so many channels."""
    ran: list[nn.Module] = []
    gave: list[nn.Module] = []
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    hooks = [layer.register_forward_pre_hook(lambda layer, _: ran.append(layer)) for layer in layers]
    hooks += [layer.register_forward_hook(lambda layer, *_: gave.append(layer)) for layer in layers]
    try:
        with evaluating(net), preserved(net), torch.no_grad():
            net(images)
    except Exception as error:
        takes = ran[0].in_channels if ran and not gave else images.shape[1]
        if takes != images.shape[1]:
            raise ValueError(
                f"{type(net).__name__} takes images of {takes} channels, and these have {images.shape[1]}: use another data "
                "set, or a factory of your own that makes its first layer fit"
            ) from error
    finally:
        for hook in hooks:
            hook.remove()


def _inputs(net: nn.Module, example: Tensor | Batch) -> Tensor | dict[str, Tensor] | tuple[Any, ...]:
    """What the network is run on to be cut.

    Plain numbers are drawn, because an example is zeros as a rule, on which many networks are the same. Ids stay what they
    are, because only the data know which there are, and so does a graph, whose edges go with its nodes. What edges carry is
    handed over by the name that torch_geometric's networks have for it, where the forward has it.
    """
    inputs, context = (example.inputs, example.context) if isinstance(example, Batch) else (example, ())
    if context:
        names = list(inspect.signature(net.forward).parameters)
        carried = ("edge_weight" if context[1].ndim == 1 else "edge_attr") if len(context) == 2 else None
        if carried is None or carried not in names[2:]:
            return (inputs, *context)
        return {names[0]: inputs, names[1]: context[0], carried: context[1]}
    if not inputs.is_floating_point():
        return inputs
    draw = torch.Generator().manual_seed(0)
    return torch.randn(4, *inputs.shape[1:], generator=draw, dtype=inputs.dtype)
