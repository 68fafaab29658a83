"""Networks of physical devices with trainable digital layers between them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Literal

from torch import nn

from locallearn.nets.blocks import Blocks
from locallearn.nets.devices import Measured
from locallearn.nets.devices._layer import Encoding, encoded_width
from locallearn.nets.devices._simulation import named


def physical(
    input_shape: Sequence[int],
    outputs: int,
    hidden: Sequence[int] = (20, 20),
    device: Any = None,
    encode: Encoding = "unit",
    skip: bool = True,
    activation: Literal["gelu"] | None = None,
    differentiable: bool = False,
) -> Blocks:
    """Blocks of ``device -> Linear``, and a linear readout: the networks of PhyLL (Momeni et al., Science 382, 2023).

    Layer k reads ``u = [f_k(E(h)), h]`` (:class:`~locallearn.nets.devices.Measured`) and gives ``h = u W + b``, with weights
    and biases as PyTorch draws them. Physical forward-forward does not use the readout; the differentiable control does.

    Args:
        input_shape: of one sample; flattened.
        outputs: number of classes.
        hidden: width of every digital layer.
        device: f. A callable of NumPy arrays ``(B, m) -> (B, r)`` or its dotted name, asked by every layer; or
            :class:`~locallearn.nets.devices.Simulation` (anything with ``made_for(inputs, index)``), which makes one per layer.
            ``None``: no device, ``u = h``: the ablation.
        encode: E, see :class:`~locallearn.nets.devices.Measured`.
        skip: whether u holds h beside the measurement.
        activation: ``gelu`` behind the linear map, as in the digital net of PhyLL; ``None``: the physical variants.
        differentiable: run the formula of a simulated device inside autograd instead of measuring it: the control. Refused
            where there is none.

    Raises:
        ValueError: no hidden width, or one below 1; an unknown activation or encoding; a device that cannot be measured.
    """
    if not hidden or any(width < 1 for width in hidden):
        raise ValueError(f"hidden is {list(hidden)}, expected at least one positive width")
    if activation not in (None, "gelu"):
        raise ValueError(f"activation is {activation!r}, expected gelu, or null for none")
    if isinstance(device, str):
        device = named(device)
    if isinstance(device, type):
        raise ValueError(
            f"the device {device.__name__} is a class: write _target_: {device.__module__}.{device.__name__} with its "
            "settings, and an object is made of it"
        )
    if differentiable and device is None:
        raise ValueError("differentiable=true speaks of a device, and device is null: leave it out")
    width = prod(input_shape)
    blocks: dict[str, nn.Module] = {}
    for i, units in enumerate(hidden):
        own = device.made_for(encoded_width(encode, width), i) if hasattr(device, "made_for") else device
        measured = Measured(width, own, encode, skip, differentiable)
        after: list[nn.Module] = [nn.GELU()] if activation == "gelu" else []
        blocks[f"layer{i + 1}"] = nn.Sequential(measured, nn.Linear(measured.outputs, units), *after)
        width = units
    return Blocks(blocks, nn.Linear(width, outputs))
