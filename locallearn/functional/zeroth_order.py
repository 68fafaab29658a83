"""Zeroth-order estimates: what is known of a gradient from losses at weights that were moved along random directions.

Two-point estimates (SPSA): J. C. Spall, IEEE Transactions on Automatic Control 37(3), 1992; in place from regenerated noise
(MeZO): S. Malladi et al., NeurIPS 2023, arXiv 2305.17333.
One-sided with signs and a step in units of the losses' spread (FZOO): S. Dang et al., arXiv 2506.09034.
Evolution strategies of low rank (EGGROLL): B. Sarkar et al., arXiv 2511.16652.
Evolution of quantised weights (QES): arXiv 2602.03120.
Directions weighed by curvature (1.5-SPSA): arXiv 2609.38095.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Noise = Literal["gaussian", "rademacher"]
Shaping = Literal["none", "zscore", "sign"]

GRID = 2.0**-22
"""Distance of the numbers that exact mode knows: below 4 all of them are float32 numbers, and so is any sum of two below 2."""
LIMIT = 2 - GRID
"""Largest size of a weight in exact mode."""


def scalars(plus: Tensor, minus: Tensor | None, base: Tensor | None, eps: float, shaping: Shaping = "none") -> Tensor:
    """One number per direction from the losses: the estimate is then mean_i c_i z_i.

    ======== ================================ ==========================================
    shaping  antithetic (``minus`` given)     one-sided
    ======== ================================ ==========================================
    none     (L⁺ − L⁻) / 2ε                   (L⁺ − L₀) / ε
    zscore   (L⁺ − L⁻) / 2s, s of all losses  (L⁺ − b) / s, b = L₀, or their mean without
    sign     sign(L⁺ − L⁻)                    sign(L⁺ − b)
    ======== ================================ ==========================================

    s is the standard deviation of the losses, with n − 1 in FZOO's place and over all 2n losses of pairs. Shaped numbers know
    neither ε nor the scale of the loss. Where all losses are equal (s = 0), all numbers are zero; where one is NaN, they are,
    too (of signs its own is zero).

    Args:
        plus: losses at θ + ε z_i, ``(n,)``.
        minus: losses at θ − ε z_i, ``(n,)``, or ``None``.
        base: the loss at θ, or ``None``; unused with ``minus``.
        eps: ε.
        shaping: see above.

    Returns:
        c, ``(n,)``, float32: what is written down and sent around, so nothing finer is used.

    Raises:
        ValueError: there is no such shaping, or too few losses for it.
    """
    if shaping not in get_args(Shaping):
        raise ValueError(f"shaping is {shaping!r}, expected {', '.join(get_args(Shaping))}")
    plus = plus.double()
    if minus is not None:
        minus = minus.double()
        difference, whole, factor = plus - minus, torch.cat([plus, minus]), 2.0
    else:
        known = base.double() if base is not None else None
        if known is None and shaping == "none":
            raise ValueError("one-sided differences need the loss of the weights themselves")
        difference, whole, factor = plus - (plus.mean() if known is None else known), plus, 1.0
    if shaping == "none":
        return (difference / (factor * eps)).float()
    if shaping == "sign":
        return difference.sign().float()
    if len(whole) < 2:
        raise ValueError("shaping=zscore needs the spread of at least two losses")
    spread = whole.std()
    return torch.where(spread == 0, 0.0, difference / (factor * spread)).float()


def curvature_weights(plus: Tensor, minus: Tensor, base: Tensor, eps: float, exponent: float = 0.1) -> Tensor:
    """What the numbers of directions are multiplied by where the loss is curved along them: 1/max(1, |h|^p).

    Args:
        plus: losses at θ + ε z_i, ``(n,)``.
        minus: losses at θ − ε z_i, ``(n,)``.
        base: the loss at θ, ``()`` or ``(n,)``.
        eps: ε.
        exponent: p.

    Returns:
        ``(n,)``, float64, with h_i = (L⁺ − 2 L₀ + L⁻)/ε², which is z_iᵀ H z_i of a small ε.
    """
    bend = (plus.double() - 2 * base.double() + minus.double()) / eps**2
    return 1 / bend.abs().pow(exponent).clamp(min=1)


def second_moment(size: int, count: int = 1, noise: Noise = "gaussian") -> float:
    """E‖ĝ‖² / ‖g‖² of the mean of n independent estimates by theory: (d + n + 1)/n Gaussian, (d + n − 1)/n of signs.

    Args:
        size: d.
        count: n.
        noise: of the directions.
    """
    return (size + count + (1 if noise == "gaussian" else -1)) / count


def second_moment_of_rank(rows: int, columns: int, rank: int) -> float:
    """The same for one direction E = A Bᵀ/√r of one matrix, both Gaussian: mn + 2 + 2(m + n + 1)/r.

    Args:
        rows: m.
        columns: n.
        rank: r.
    """
    return rows * columns + 2 + 2 * (rows + columns + 1) / rank


def low_rank(a: Tensor, b: Tensor) -> Tensor:
    """E_i = A_i B_iᵀ/√r.

    Args:
        a: ``(n, rows, r)``.
        b: ``(n, columns, r)``.

    Returns:
        ``(n, rows, columns)``.
    """
    made: Tensor = a @ b.transpose(1, 2) / a.shape[-1] ** 0.5
    return made


def low_rank_estimate(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Σ_i c_i E_i in one product, without any E_i.

    Args:
        c: ``(n,)``.
        a: ``(n, rows, r)``.
        b: ``(n, columns, r)``.

    Returns:
        ``(rows, columns)``.
    """
    weighted = a * c.to(a.dtype)[:, None, None]
    made: Tensor = weighted.transpose(0, 1).flatten(1) @ b.transpose(1, 2).flatten(0, 1) / a.shape[-1] ** 0.5
    return made


class ExactSum:
    """A sum that is the same in any order: terms are rounded to a grid on which float64 adds without rounding.

    Args:
        like: has the shape and the device of the sum.
        c: the weights of all terms, of which the largest sets the grid: 2⁻²⁸ of it.
    """

    def __init__(self, like: Tensor, c: Tensor) -> None:
        self._sum = torch.zeros(like.shape, dtype=torch.float64, device=like.device)
        largest = float(c.abs().max()) if len(c) else 0.0
        self._grid = 2.0 ** (int(torch.tensor(largest).frexp().exponent) - 28) if largest > 0 else 1.0

    def add(self, term: Tensor) -> None:
        """Add a term."""
        self._sum += (term.double() / self._grid).round_()

    def value(self, divide: int = 1) -> Tensor:
        """The sum over a number, float32."""
        return (self._sum * (self._grid / divide)).float()


def on_grid(values: Tensor, uniform: Tensor | None = None) -> Tensor:
    """Multiples of :data:`GRID`: the nearest, or one of the two around it by chance, so that small steps are not lost.

    Args:
        values: any.
        uniform: numbers between 0 and 1, of the same shape, that decide; ``None``: the nearest, of two the even one.

    Returns:
        Of the same dtype.
    """
    scaled = values.double() / GRID
    whole = scaled.round() if uniform is None else (scaled + uniform).floor()
    return (whole * GRID).to(values.dtype)


# -- quantised weights ------------------------------------------------------------------------------------------------------
def quantise(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes −2^(bits−1) … 2^(bits−1) − 1 and a scale for every row: the largest entry of a row gets the largest code.

    Args:
        weight: ``(rows, ...)``.
        bits: 2 to 8.

    Returns:
        Codes, int8, and scales, ``(rows, 1, ...)``; of a row of zeros the scale is 1.
    """
    top = 2 ** (bits - 1) - 1
    scale = weight.flatten(1).abs().amax(1) / top
    scale = torch.where(scale > 0, scale, 1.0).view(-1, *[1] * (weight.ndim - 1))
    codes = (weight / scale).round().clamp(-top - 1, top).to(torch.int8)
    return codes, scale


def integer_noise(normal: Tensor, uniform: Tensor, sigma: float) -> Tensor:
    """Whole numbers that are σ z on average: rounded down or up by chance.

    Args:
        normal: z.
        uniform: between 0 and 1, decides.
        sigma: σ.
    """
    return (normal * sigma + uniform).floor()


def within(codes: Tensor, moves: Tensor, low: int, high: int) -> Tensor:
    """Codes after their moves; a move that would leave ``low`` … ``high`` is left out as a whole."""
    moved = codes + moves
    return torch.where((moved < low) | (moved > high), codes, moved)


def fire(codes: Tensor, step: Tensor, residual: Tensor, decay: float, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Accumulate steps that are smaller than a code until they move one.

    What is due is the step and what was left of earlier ones. It is rounded (half to even) to a move; one that would leave the
    range is left out as a whole. What was not moved is left, at most 1.5.

    Args:
        codes: whole numbers.
        step: in codes.
        residual: what was left.
        decay: share of it that is kept.
        low: smallest code.
        high: largest code.

    Returns:
        Codes and residual after it.
    """
    due = step + decay * residual
    moved = within(codes, due.round(), low, high)
    return moved, (due - (moved - codes)).clamp(-1.5, 1.5)
