"""Simulated devices: a map, and what real ones suffer from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from locallearn.nets.devices._maps import Optical, Scatterer, Transmission
from locallearn.nets.devices._twin import Twin

_MAPS: Mapping[str, Callable[..., Any]] = {"scatterer": Scatterer, "optical": Optical, "twin": Twin}


class SimulatedDevice:
    """A map with converters, drift, saturation, dead channels and noise, in the order in which a signal meets them.

    DAC -> map (which may drift first) -> saturation -> dead channels -> noise -> ADC. Everything random comes from a generator
    of its own. :meth:`respond` is the same formula for tensors, with derivatives.

    Args:
        map: has ``respond(x)`` for tensors; or any callable of NumPy arrays, around which all but drift can be put.
        name: for messages.
        noise: standard deviation of multiplicative noise, ``y (1 + noise N)``.
        additive: standard deviation of additive noise, in the unit of the output.
        drift: epsilon of ``T <- sqrt(1 - eps²) T + eps N`` before every call.
        input_bits: of the DAC: every row is scaled into its range, rounded to 2^bits levels and scaled back.
        output_bits: of the ADC, the same.
        dropped: share of the output channels that are dead, the same ones for ever.
        saturation: level s of ``y / (1 + |y| / s)``.
        seed: of dead channels, noise and drift.

    Raises:
        ValueError: a number out of range, or drift of what has no transmission matrix.
    """

    def __init__(
        self,
        map: Any,
        name: str = "simulation",
        noise: float = 0.0,
        additive: float = 0.0,
        drift: float = 0.0,
        input_bits: int | None = None,
        output_bits: int | None = None,
        dropped: float = 0.0,
        saturation: float | None = None,
        seed: int = 0,
    ) -> None:
        for key, value in (("noise", noise), ("additive", additive)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{key} is {value}, expected a standard deviation of at least 0")
        for key, value in (("drift", drift), ("dropped", dropped)):
            if not 0 <= value < 1:
                raise ValueError(f"{key} is {value}, expected a share from 0 to below 1")
        for key, bits in (("input_bits", input_bits), ("output_bits", output_bits)):
            if bits is not None and (type(bits) is not int or not 1 <= bits <= 24):
                raise ValueError(f"{key} is {bits!r}, expected a whole number of bits from 1 to 24, or null")
        if saturation is not None and not 0 < saturation < float("inf"):
            raise ValueError(f"saturation is {saturation}, expected a level above 0, or null")
        if drift and not isinstance(map, Transmission):
            raise ValueError(
                f"drift is {drift}, and {name} has no transmission matrix that could wander: leave drift at 0, or take "
                "map=scatterer or map=optical"
            )
        self.map = map
        self.name = name
        self.noise, self.additive, self.drift = noise, additive, drift
        self.input_bits, self.output_bits = input_bits, output_bits
        self.dropped, self.saturation = dropped, saturation
        self._seed = seed
        self._generator = np.random.default_rng([seed, 1])

    def __call__(self, x: Any) -> Any:
        """Measure: arrays ``(B, m)`` to ``(B, r)``."""
        with torch.no_grad():
            return self._pass(torch.from_numpy(x)).numpy()

    def respond(self, x: Tensor) -> Tensor:
        """The same for tensors, inside autograd.

        Raises:
            ValueError: rounding, or a map that is only measured, has no derivative.
        """
        if self.input_bits is not None or self.output_bits is not None:
            raise ValueError(
                "a device with converters rounds, which has no derivative: set input_bits and output_bits to null for the "
                "differentiable control"
            )
        if not hasattr(self.map, "respond"):
            raise ValueError(
                f"{self.name} can only be measured, so it has no differentiable control: take map=scatterer, optical or twin"
            )
        return self._pass(x)

    def redraw(self, seed: int) -> None:
        """Put another medium of the same kind in its place: a sudden change.

        Raises:
            ValueError: the map has no medium.
        """
        if not isinstance(self.map, Transmission):
            raise ValueError(f"{self.name} has no transmission matrix that could be drawn anew")
        self.map.redraw(seed)

    def _pass(self, x: Tensor) -> Tensor:
        if self.drift:
            self.map.drift(self.drift, self._generator)
        x = x if self.input_bits is None else quantise(x, self.input_bits)
        y = self._mapped(x)
        if self.saturation is not None:
            y = y / (1.0 + y.abs() / self.saturation)
        if self.dropped:
            y = y * self._alive(y.shape[1]).to(y)
        if self.noise:
            y = y * (1.0 + self.noise * self._draw(y))
        if self.additive:
            y = y + self.additive * self._draw(y)
        return y if self.output_bits is None else quantise(y, self.output_bits)

    def _mapped(self, x: Tensor) -> Tensor:
        if hasattr(self.map, "respond"):
            answer: Tensor = self.map.respond(x)
            return answer
        y = np.asarray(self.map(x.numpy().copy()))
        if y.ndim != 2 or y.dtype.kind not in "fiub":
            raise ValueError(
                f"it gave {y.dtype} values of shape {y.shape}, expected real numbers (B, r): one row per sample"
            )
        return torch.from_numpy(y.astype(np.float64 if y.dtype == np.float64 else np.float32)).to(x.dtype)

    def _alive(self, channels: int) -> Tensor:
        order = np.random.default_rng([self._seed, 2]).permutation(channels)
        alive = torch.ones(channels)
        alive[torch.from_numpy(order[: round(self.dropped * channels)])] = 0.0
        return alive

    def _draw(self, like: Tensor) -> Tensor:
        return torch.from_numpy(self._generator.standard_normal(tuple(like.shape))).to(like)

    # -- checkpoints ---------------------------------------------------------------------------------------------------
    def get_state(self) -> dict[str, Tensor]:
        """The generator's state as bytes, and the medium where there is one."""
        text = json.dumps(self._generator.bit_generator.state).encode()
        state = {"generator": torch.tensor(list(text), dtype=torch.uint8)}
        return {**state, "medium": self.map.matrix.clone()} if isinstance(self.map, Transmission) else state

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        self._generator.bit_generator.state = json.loads(bytes(state["generator"].tolist()))
        if isinstance(self.map, Transmission):
            self.map.matrix = state["medium"].clone()


class Simulation:
    """Settings of a simulated device, from which every layer is given one of its own.

    Args:
        map: ``scatterer``, ``optical`` or ``twin``; or a callable of NumPy arrays, or its dotted name, that everything but
            drift is put around.
        outputs: r; ``None``: what the map has by itself (the scatterer: as many as inputs).
        noise: see :class:`SimulatedDevice`; so are the others.
        additive: the same.
        drift: the same.
        input_bits: the same.
        output_bits: the same.
        dropped: the same.
        saturation: the same.
        seed: of the media and of everything random. It does not follow the run's seed: training is repeated, the device is
            what it is.
        options: what else the map is made with: ``{gain: 4}`` of the scatterer, ``{side: 51, radius: 16}`` of the optical one,
            ``{path: FILE}`` and more of the twin.

    Raises:
        ValueError: an unknown map; when made for a layer, what the map and :class:`SimulatedDevice` refuse.
    """

    def __init__(
        self,
        map: Any = "scatterer",
        outputs: int | None = None,
        noise: float = 0.0,
        additive: float = 0.0,
        drift: float = 0.0,
        input_bits: int | None = None,
        output_bits: int | None = None,
        dropped: float = 0.0,
        saturation: float | None = None,
        seed: int = 0,
        options: dict[str, Any] | None = None,
    ) -> None:
        if isinstance(map, str) and "." in map:
            map = named(map)
        if not callable(map) and map not in _MAPS:
            raise ValueError(
                f"map is {map!r}, expected one of {', '.join(_MAPS)}, or a callable of arrays, by its dotted name"
            )
        if outputs is not None and outputs < 1:
            raise ValueError(f"outputs is {outputs}, expected at least 1, or null")
        if type(seed) is not int or seed < 0:
            raise ValueError(f"seed is {seed!r}, expected a whole number of at least 0: it is the device's own")
        if callable(map) and (outputs is not None or options):
            raise ValueError(
                "outputs and options belong to the maps that come along: a device of your own has what it has"
            )
        self._map, self._outputs, self._options, self._seed = map, outputs, dict(options or {}), seed
        self._twins: dict[int, Twin] = {}
        self._settings: dict[str, Any] = {
            "noise": noise,
            "additive": additive,
            "drift": drift,
            "input_bits": input_bits,
            "output_bits": output_bits,
            "dropped": dropped,
            "saturation": saturation,
        }

    def made_for(self, inputs: int, index: int) -> SimulatedDevice:
        """The device of layer ``index``, which reads ``inputs`` values. Media differ from layer to layer; a twin is one."""
        seed = int(np.random.default_rng([self._seed, index]).integers(2**31))
        if callable(self._map):
            name = str(getattr(self._map, "__name__", type(self._map).__name__))
            return SimulatedDevice(self._map, name, **self._settings, seed=seed)
        made = self._twins.get(inputs)  # fitted once
        if made is None:
            given = self._seed if self._map == "twin" else seed
            try:
                made = _MAPS[self._map](inputs, self._outputs, given, **self._options)
            except TypeError as error:
                raise ValueError(f"options is {self._options}, which map={self._map} does not take: {error}") from error
        if isinstance(made, Twin):
            self._twins[inputs] = made
        return SimulatedDevice(made, self._map, **self._settings, seed=seed)


def named(name: str) -> Any:
    """What goes by a dotted name, ``my_lab.device``.

    Raises:
        ValueError: there is nothing callable by this name.
    """
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the device is {name!r}, expected the dotted name of a callable, my_lab.device: {error}"
        ) from error
    if not callable(found):
        raise ValueError(
            f"the device {name} is a {type(found).__name__}, expected a callable of arrays (B, m) -> (B, r)"
        )
    return found


def quantise(x: Tensor, bits: int) -> Tensor:
    """Round every row to 2^bits levels between its least and its greatest value; a constant row stays."""
    low = x.amin(1, keepdim=True)
    span = x.amax(1, keepdim=True) - low
    step = torch.where(span > 0, span, torch.ones_like(span)) / (2**bits - 1)
    rounded: Tensor = ((x - low) / step).round() * step + low
    return rounded
