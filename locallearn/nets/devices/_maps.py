"""What light does on its way through a medium, as formulas."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Transmission:
    """A medium with a complex transmission matrix that can be drawn anew and drift.

    Args:
        shape: of the matrix, inputs first.
        seed: of the medium.
        scale: standard deviation of an entry's real and of its imaginary part.
    """

    def __init__(self, shape: tuple[int, int], seed: int, scale: float) -> None:
        self._shape, self._scale = shape, scale
        self.matrix = self._drawn(np.random.default_rng([seed, 0]))

    def _drawn(self, generator: np.random.Generator) -> Tensor:
        parts = generator.standard_normal((2, *self._shape)) * self._scale
        return torch.complex(torch.from_numpy(parts[0]), torch.from_numpy(parts[1]))

    def drift(self, size: float, generator: np.random.Generator) -> None:
        """``T <- sqrt(1 - size²) T + size N``, N drawn as T was: it wanders and keeps its strength."""
        self.matrix = math.sqrt(1.0 - size**2) * self.matrix + size * self._drawn(generator)

    def redraw(self, seed: int) -> None:
        """Put another medium of the same kind in its place."""
        self.matrix = self._drawn(np.random.default_rng([seed, 0]))


class Scatterer(Transmission):
    """A scattering medium behind a modulator: ``y = I / (1 + I)``, ``I = |(a e^{iπa}) T|²``, ``a = |x| / ‖x‖``.

    T is complex Gaussian over sqrt(2m), so that an entry of I has mean gain²/m.

    Args:
        inputs: m.
        outputs: r; ``None``: as many as inputs.
        seed: of T.
        gain: amplitude of the light that is modulated. With 1 the detector is hardly saturated; with sqrt(m) it is.
    """

    def __init__(self, inputs: int, outputs: int | None = None, seed: int = 0, gain: float = 1.0) -> None:
        super().__init__((inputs, inputs if outputs is None else outputs), seed, 1.0 / math.sqrt(2 * inputs))
        self.gain = gain

    def respond(self, x: Tensor) -> Tensor:
        """``(B, m)`` to ``(B, r)``."""
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        a = x.abs() / torch.where(length > 0, length, torch.ones_like(length))
        field = torch.polar(self.gain * a, math.pi * a) @ self.matrix.to(_complex(x))
        intensity = field.real.square() + field.imag.square()
        return intensity / (1.0 + intensity)


class Optical(Transmission):
    """A multimode fibre or scatterer between two lenses: FFT, a disc of modes, T, inverse FFT, |·|, 3x3 mean pool by 2.

    An input of k² values is an image; every pixel is doubled both ways, and the middle ``side`` x ``side`` taken (what is
    smaller is set into zeros). With a side of 51 the output has 26 x 26 values, whatever the input. The authors overlay the
    first layer's image in another way; their T is not released.

    Args:
        inputs: k².
        outputs: must be ``None`` or what comes out, ((side + 1) // 2)².
        seed: of T.
        side: of the square on which light is computed.
        radius: of the disc of spatial frequencies that pass, both ways.

    Raises:
        ValueError: no square image, other outputs, or a radius that does not fit.
    """

    def __init__(
        self, inputs: int, outputs: int | None = None, seed: int = 0, side: int = 51, radius: float = 16.0
    ) -> None:
        self._image = math.isqrt(inputs)
        if self._image**2 != inputs:
            raise ValueError(
                f"the optical device reads square images, and {inputs} values are none: give k², 784 of MNIST, 676 of the "
                "layer before (net.hidden=[676,676])"
            )
        if side < 3 or not 0 < radius <= side / 2:
            raise ValueError(
                f"side is {side} and radius {radius}, expected at least 3 and a radius up to half of the side"
            )
        pooled = ((side + 1) // 2) ** 2
        if outputs not in (None, pooled):
            raise ValueError(f"outputs is {outputs}, but an optical device of side {side} has {pooled}: leave it out")
        self._side = side
        far = torch.arange(side, dtype=torch.float64) - side // 2
        disc = far.square()[:, None] + far.square()[None, :] <= radius**2
        self._modes = disc.flatten().nonzero().squeeze(1)
        count = len(self._modes)
        super().__init__((count, count), seed, 1.0 / math.sqrt(2 * count))

    def respond(self, x: Tensor) -> Tensor:
        """``(B, k²)`` to ``(B, ((side + 1) // 2)²)``."""
        image = x.reshape(len(x), 1, self._image, self._image)
        image = image.repeat_interleave(2, 2).repeat_interleave(2, 3)
        image = _centred(image, self._side)[:, 0]
        kind = _complex(x)
        spectrum = torch.fft.fftshift(torch.fft.fft2(image.to(kind), norm="ortho"), dim=(1, 2)).flatten(1)
        modes = self._modes.to(x.device)
        passed = spectrum.index_select(1, modes) @ self.matrix.to(x.device, kind)
        behind = torch.zeros_like(spectrum).index_copy(1, modes, passed)
        behind = torch.fft.ifftshift(behind.view(-1, self._side, self._side), dim=(1, 2))
        amplitude = torch.fft.ifft2(behind, norm="ortho").abs()
        return F.avg_pool2d(amplitude[:, None], 3, 2, 1).flatten(1)


def _centred(image: Tensor, side: int) -> Tensor:
    missing = side - image.shape[2]
    before = missing // 2
    pad = (before, missing - before)
    return F.pad(image, (*pad, *pad))  # negative numbers crop


def _complex(x: Tensor) -> torch.dtype:
    return torch.complex128 if x.dtype == torch.float64 else torch.complex64
