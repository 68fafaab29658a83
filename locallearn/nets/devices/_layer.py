"""The seam between a network and a device: numbers go out, numbers come back, and no derivative."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

Encoding = Literal["unit", "minmax", "bits", "none"]


class PhysicalLayer(nn.Module):
    """A map that can be measured and nothing else: ``x (B, m) -> y (B, r)``.

    The device is given a NumPy array of its own and gives an array back, so no graph can lead through it; whoever wants to
    differentiate is refused. It has no parameters. Every call is counted. What a simulated device keeps (its generator, a
    medium that drifts) is in the checkpoint: tensors by name, from its ``get_state`` to its ``set_state``. A device without
    these keeps its state to itself, and one that cannot be copied (an instrument behind a socket) is shared by copies of the
    network.

    Args:
        device: any callable of NumPy arrays, ``(B, m)`` floating point in, ``(B, r)`` real numbers out, r the same in every
            call.
        inputs: m.
        differentiable: run ``device.respond``, which maps tensors, inside autograd instead: the control of a study, which only
            a simulation can have.

    Attributes:
        outputs: r, from one call with two rows of random numbers, on a copy where the device can be copied.
        calls: how often the device was asked.
        samples: rows of all calls together.
        training_calls: calls in training mode.

    Raises:
        ValueError: what is no callable, one that fails, gives another shape, numbers that are not finite or not real, or that
            has no ``respond`` where that is asked for; in later calls, too.
    """

    def __init__(self, device: Callable[[Any], Any], inputs: int, differentiable: bool = False) -> None:
        super().__init__()
        if not callable(device):
            raise ValueError(
                f"the device is {device!r}, expected a callable that maps an array (B, m) to an array (B, r): give a function, "
                "an object with __call__, or its dotted name"
            )
        self._held = (device,)  # in a tuple, so that a module inside is none of the network's
        self.inputs = inputs
        self.outputs: int | None = None
        self.differentiable = differentiable
        self.calls = self.samples = self.training_calls = 0
        self._try_out()

    @property
    def device(self) -> Callable[[Any], Any]:
        """What is measured."""
        return self._held[0]

    @property
    def name(self) -> str:
        """Of the device, for messages and tables."""
        return str(getattr(self.device, "name", None) or getattr(self.device, "__name__", type(self.device).__name__))

    def _try_out(self) -> None:
        if self.differentiable and not hasattr(self.device, "respond"):
            raise ValueError(
                f"the device {self.name} can only be measured, and net.differentiable=true needs its formula: take a simulated "
                "device (net.device._target_=locallearn.nets.devices.Simulation), or leave differentiable out"
            )
        given = np.random.default_rng(0).random((2, self.inputs), dtype=np.float32)
        device = _copied(self.device, {})  # the trial shall not use up draws, nor move what drifts
        try:
            answer = device(given)
        except Exception as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"the device {self.name} fails on an array of shape (2, {self.inputs}): {said}; a device maps (B, m) to (B, r)"
            ) from error
        self.outputs = int(self._checked(answer, 2).shape[1])
        if self.differentiable:
            device.respond(torch.from_numpy(given))  # refuses what has no derivative

    def forward(self, x: Tensor) -> Tensor:
        """Measure: ``(B, m)`` to ``(B, r)``, detached, on the device and in the dtype of ``x``."""
        self.calls += 1
        self.samples += len(x)
        self.training_calls += self.training
        if self.differentiable:
            with torch.autocast(x.device.type, enabled=False):  # halves are not what a medium computes in
                answer: Tensor = self.device.respond(x.to(torch.promote_types(x.dtype, torch.float32)))  # type: ignore[attr-defined]
            return answer.to(x.dtype)
        self._refuse_derivatives(x)
        with (
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
        ):  # a twin's layers know no other precision than its own
            given = x.detach().cpu()
            array = (given if given.dtype in (torch.float32, torch.float64) else given.float()).numpy().copy()
            answer = torch.from_numpy(self._checked(self.device(array), len(array)))
            return answer.to(x.device, x.dtype)

    def _refuse_derivatives(self, x: Tensor) -> None:
        tracked = x.requires_grad and torch.is_grad_enabled()
        if tracked or torch._C._functorch.is_functorch_wrapped_tensor(x) or _has_tangent(x):
            raise ValueError(
                f"a derivative through the device {self.name} is asked for, and it can only be measured: train with "
                "algorithm=physical_ff or another rule that stays within its block, or set net.differentiable=true for the "
                "control with a simulated device"
            )

    def _checked(self, answer: Any, rows: int) -> Any:
        array = np.asarray(answer.detach().cpu() if isinstance(answer, Tensor) else answer)
        columns = "r" if self.outputs is None else str(self.outputs)
        if array.ndim != 2 or len(array) != rows or (self.outputs not in (None, array.shape[1])) or array.shape[1] < 1:
            raise ValueError(
                f"the device {self.name} gave an array of shape {array.shape} for an input of shape ({rows}, {self.inputs}), "
                f"expected ({rows}, {columns}): one row per sample, as many columns in every call"
            )
        if array.dtype.kind not in "fiub":
            raise ValueError(
                f"the device {self.name} gave {array.dtype} values, expected real numbers: return intensities or amplitudes"
            )
        broken = ~np.isfinite(array).all(1)
        if broken.any():
            raise ValueError(
                f"the device {self.name} gave NaN or infinity in {int(broken.sum())} of {rows} rows (call {self.calls}): have "
                "it return finite numbers, whatever it is given"
            )
        return array.astype(np.float64 if array.dtype == np.float64 else np.float32)

    # -- copies and checkpoints ----------------------------------------------------------------------------------------
    def __deepcopy__(self, memo: dict[int, Any]) -> PhysicalLayer:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(
            {key: copy.deepcopy(value, memo) for key, value in self.__dict__.items() if key != "_held"}
        )
        twin.__dict__["_held"] = (_copied(self.device, memo),)
        return twin

    def get_extra_state(self) -> dict[str, Tensor]:
        """Counters, and what the device keeps: tensors by name."""
        state = {"counts": torch.tensor([self.calls, self.samples, self.training_calls])}
        get_state = getattr(self.device, "get_state", None)
        return {**state, **get_state()} if callable(get_state) else state

    def set_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        self.calls, self.samples, self.training_calls = map(int, state["counts"])
        if len(state) > 1 and hasattr(self.device, "set_state"):
            self.device.set_state({key: value for key, value in state.items() if key != "counts"})

    def extra_repr(self) -> str:
        """The device and its shape."""
        return f"{self.name}, {self.inputs} -> {self.outputs}"


class Measured(nn.Module):
    """What a layer's weights read: the device's answer to an encoded input, beside the input itself.

    ``u = [f(E(h)), h]`` with ``skip``, else ``f(E(h))``; without a device ``u = h``. Inputs of more dimensions are flattened.

    Args:
        inputs: entries of h.
        device: f; ``None``: no device, the ablation.
        encoding: E. ``unit``: |h| scaled to length 1 (acoustics); ``minmax``: every row from 0 to 1; ``bits``: after that two
            bits per value, so 2m inputs (microwaves); ``none``: h as it is.
        skip: hand h on beside the answer.
        differentiable: see :class:`PhysicalLayer`.

    Attributes:
        layer: f with its counters, or ``None``.
        outputs: entries of u.

    Raises:
        ValueError: an unknown encoding, or what :class:`PhysicalLayer` refuses.
    """

    def __init__(
        self,
        inputs: int,
        device: Callable[[Any], Any] | None,
        encoding: Encoding = "unit",
        skip: bool = True,
        differentiable: bool = False,
    ) -> None:
        super().__init__()
        self.encoding = encoding
        self.skip = skip
        width = encoded_width(encoding, inputs)
        self.layer = None if device is None else PhysicalLayer(device, width, differentiable)
        if self.layer is None:
            self.outputs = inputs
        else:
            assert self.layer.outputs is not None
            self.outputs = self.layer.outputs + inputs * skip

    def forward(self, h: Tensor) -> Tensor:
        """``(B, ...)`` to ``(B, outputs)``."""
        h = h.flatten(1)
        if self.layer is None:
            return h
        answer = self.layer(encode(h, self.encoding))
        return torch.cat((answer, h), 1) if self.skip else answer

    def extra_repr(self) -> str:
        """How the device is asked."""
        return f"encoding={self.encoding}, skip={self.skip}" if self.layer is not None else "no device"


def encoded_width(encoding: Encoding, inputs: int) -> int:
    """How many values the device is given for so many entries.

    Raises:
        ValueError: an unknown encoding.
    """
    if encoding not in ("unit", "minmax", "bits", "none"):
        raise ValueError(f"encode is {encoding!r}, expected one of unit, minmax, bits, none")
    return 2 * inputs if encoding == "bits" else inputs


def encode(h: Tensor, encoding: Encoding) -> Tensor:
    """What a device is given for ``h (B, m)``; rows without any spread, or of zeros, become zeros. ``h`` stays as it is.

    ``bits``: after the min-max of every row the exact minimum is 00, (0, .25] 01, (.25, .75] 10, above 11: the levels of the
    microwave code.
    """
    if encoding == "none":
        return h
    if encoding == "unit":
        length: Tensor = torch.linalg.vector_norm(h, dim=1, keepdim=True)
        return h.abs() / (length + 1e-6)  # as in the acoustic code
    low = h.amin(1, keepdim=True)
    span = h.amax(1, keepdim=True) - low
    scaled = (h - low) / torch.where(span > 0, span, torch.ones_like(span))
    if encoding == "minmax":
        return scaled
    level = (scaled > 0).long() + (scaled > 0.25).long() + (scaled > 0.75).long()
    return torch.stack((level // 2, level % 2), 2).flatten(1).to(h.dtype)


def _copied(device: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(device, memo)
    except Exception:  # an instrument: a lock, a socket, a serial line
        return device


def _has_tangent(x: Tensor) -> bool:
    if torch.autograd.forward_ad._current_level < 0:
        return False
    return torch.autograd.forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
