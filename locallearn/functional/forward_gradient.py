"""Forward gradients: what is known of a gradient from directional derivatives along random tangents.

Weights: A. G. Baydin, B. A. Pearlmutter, D. Syme, F. Wood, P. Torr, "Gradients without Backpropagation", 2022, arXiv
2202.08587.
Activities: M. Ren, S. Kornblith, R. Liao, G. Hinton, "Scaling Forward Gradient With Local Losses", ICLR 2023, arXiv 2210.03310.
Several tangents: K. Flügel, D. Coquelin, M. Weiel, A. Streit, M. Götz, "Beyond Backpropagation: Optimization with Multi-Tangent
Forward Gradients", 2024, arXiv 2410.17764.
Guessed directions: L. Fournier, S. Rivaud, E. Belilovsky, M. Eickenberg, E. Oyallon, "Can Forward Gradient Match
Backpropagation?", ICML 2023, arXiv 2306.06968.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Noise = Literal["gaussian", "rademacher", "sphere"]
Combine = Literal["mean", "projection"]
_EPSILON = 1e-16  # as in the reference numbers; a guess of zeros then stays one


def tangents(
    shape: Sequence[int],
    noise: Noise = "gaussian",
    generator: Generator | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Random directions with unit covariance, E[v vᵀ] = 1.

    Args:
        shape: ``(..., P)``; every row is a direction.
        noise: ``gaussian``: N(0, 1); ``rademacher``: ±1; ``sphere``: uniform on the sphere of radius √P.
        generator: draws; lies on ``device``.
        device: of the result.
        dtype: of the result, floating point.

    Returns:
        Directions, ``shape``.

    Raises:
        ValueError: there is no such noise.
    """
    if noise not in get_args(Noise):
        raise ValueError(f"noise is {noise!r}, expected gaussian, rademacher or sphere")
    if noise == "rademacher":
        return _signs(shape, generator, device, dtype)
    made = torch.empty(tuple(shape), device=device, dtype=dtype).normal_(generator=generator)
    if noise == "sphere":
        made.mul_(made.shape[-1] ** 0.5 / made.norm(dim=-1, keepdim=True))
    return made


def _signs(shape: Sequence[int], generator: Generator | None, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Random ±1: eight signs at a time are looked up for a random byte, which takes a fraction of a draw for each."""
    size = math.prod(shape)
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], device=device)
    signs = torch.arange(256, device=device)[:, None].bitwise_and(places).ne(0).to(dtype).mul_(2).sub_(1)
    drawn = torch.randint(256, (-(-size // 8),), generator=generator, device=device, dtype=torch.int32)
    return F.embedding(drawn, signs).flatten()[:size].view(tuple(shape))


def estimate(directions: Tensor, slopes: Tensor, combine: Combine = "mean") -> Tensor:
    """The gradient's estimate from K directional derivatives c = V g.

    ``mean``: Vᵀ c / K, unbiased for directions of unit covariance. ``projection``: Vᵀ (V Vᵀ)⁻¹ c, the gradient's orthogonal
    projection on what the directions span; with K = P independent ones it is the gradient. Directions that depend on one
    another count once (V Vᵀ and its pseudo-inverse in float64). Precision is that of the directions, autocast or not.

    Args:
        directions: V, ``(K, P)``.
        slopes: c, ``(K,)``.
        combine: ``mean`` or ``projection``.

    Returns:
        ĝ, ``(P,)``.

    Raises:
        ValueError: there is no such way to combine, or more directions than entries are projected on.
    """
    count, size = directions.shape
    if combine not in get_args(Combine):
        raise ValueError(f"combine is {combine!r}, expected mean or projection")
    if combine == "projection" and count > size:
        raise ValueError(
            f"{count} directions are more than the {size} entries of the gradient: projection needs at most as many"
        )
    with torch.autocast(directions.device.type, enabled=False):
        if combine == "mean":
            weights = slopes / count
        else:
            # Piece by piece, so that no copy in float64 lies beside all of them.
            gram = sum(part @ part.T for part in (piece.double() for piece in torch.split(directions, 2**16, 1)))
            weights = torch.linalg.pinv(gram, hermitian=True) @ slopes.double()
        made: Tensor = weights.to(directions.dtype) @ directions
        return made


def guess_scales(slopes: Tensor, guess: Tensor, divided: bool = True) -> Tensor:
    """What every sample's guess is multiplied by: the estimate is Ĝ_n = ⟨G_n, G̃_n⟩ / (‖G̃_n‖² + ε) · G̃_n.

    So Ĝ_n is the target's orthogonal projection on the guess, never longer than the target, and the target itself where the
    guess points along it. Without the division it is unbiased for random guesses of unit covariance.

    Args:
        slopes: ⟨G_n, G̃_n⟩, ``(N,)``.
        guess: G̃, ``(N, ...)``.
        divided: by the guess's square.

    Returns:
        Scales, ``(N,)``, in the slopes' precision or float32, whichever is wider.
    """
    scales = slopes.to(torch.promote_types(slopes.dtype, torch.float32))
    if divided:
        # Summed at that precision without a copy of the guess in it.
        scales = scales / (torch.linalg.vector_norm(guess.flatten(1), dim=1, dtype=scales.dtype).square() + _EPSILON)
    return scales


def guess_slopes(target: Tensor, guess: Tensor) -> Tensor:
    """⟨G_n, G̃_n⟩ of two tensors ``(N, ...)``, where both are known: ``(N,)``, in float32 at least."""
    wide = torch.promote_types(target.dtype, torch.float32)
    return (target.flatten(1).to(wide) * guess.flatten(1).to(wide)).sum(1)


def relative_error(size: int, count: int = 1, noise: Noise = "gaussian", combine: Combine = "mean") -> float:
    """E‖ĝ − g‖² / ‖g‖² by theory.

    ``mean``: (P + 1)/K for Gaussian directions, (P − 1)/K for signs and for the sphere. ``projection``: 1 − K/P, of signs up to
    the chance that rows depend on one another.

    Args:
        size: P.
        count: K.
        noise: see :func:`tangents`.
        combine: see :func:`estimate`.
    """
    if combine == "projection":
        return 1 - count / size
    return (size + (1 if noise == "gaussian" else -1)) / count
