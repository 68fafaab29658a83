"""How alike two layers are, of one network or of two: representational similarity and centred kernel alignment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

_FEWEST = 4  # samples of an unbiased estimate


def dissimilarities(activations: Tensor) -> Tensor:
    """Return 1 − Pearson's correlation of every two samples' activations, ``(N, N)`` in double precision.

    Args:
        activations: shape ``(N, ...)``. Rows and columns of a sample whose units are all equal (a dead layer) are ``nan``.

    Source: N. Kriegeskorte et al., Frontiers in Systems Neuroscience 2, 2008.
    """
    flat = activations.flatten(1).double()
    flat = flat - flat.mean(1, keepdim=True)
    length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    # What is left of equal numbers after their mean is taken off is rounding.
    equal = length <= 1e-12 * activations.flatten(1).double().abs().amax(1, keepdim=True) * flat.shape[1] ** 0.5
    unit = flat / torch.where(equal, torch.nan, length)
    return (1 - unit @ unit.T).clamp(0, 2)


def rsa(first: Tensor, second: Tensor, correlation: Literal["spearman", "pearson"] = "spearman") -> float:
    """Return the correlation of two layers' dissimilarities over all pairs of samples (representational similarity).

    Args:
        first: activations on N samples, shape ``(N, ...)``.
        second: another layer's on the same samples in the same order, shape ``(N, ...)``.
        correlation: of ranks (ties share theirs), or of the values themselves.

    Returns:
        Between −1 and 1; ``nan`` where fewer than three pairs are known or all are alike. Pairs with a dead sample are left
        out.

    Raises:
        ValueError: numbers of samples differ, or an unknown correlation.
    """
    _same_samples(first, second)
    if correlation not in ("spearman", "pearson"):
        raise ValueError(f"correlation is {correlation!r}, expected 'spearman' or 'pearson'")
    upper = torch.triu_indices(len(first), len(first), offset=1)
    a, b = (dissimilarities(part.detach()).cpu()[upper[0], upper[1]] for part in (first, second))
    known = ~(a.isnan() | b.isnan())
    a, b = a[known], b[known]
    if len(a) < 3:
        return float("nan")
    if correlation == "spearman":
        a, b = _ranks(a), _ranks(b)
    a, b = a - a.mean(), b - b.mean()
    scale = a.norm() * b.norm()
    return float((a @ b / scale).clamp(-1, 1)) if scale > 0 else float("nan")


def linear_cka(first: Tensor, second: Tensor, unbiased: bool = False) -> float:
    """Return linear centred kernel alignment of two layers on the same samples.

    Biased, it is ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) of centred activations, between 0 and 1, and too large where samples are few
    beside units. Unbiased, each of the three terms is the estimate of Song et al. that leaves diagonals out: around 0 for
    layers that have nothing in common, and it may fall below.

    Args:
        first: X, shape ``(N, ...)``.
        second: Y on the same samples in the same order, shape ``(N, ...)``.
        unbiased: which of the two.

    Returns:
        1 for layers that differ by a rotation and one scale; ``nan`` where a layer does not vary (or, unbiased, where there
        are fewer than four samples, or noise outweighs what varies).

    Raises:
        ValueError: numbers of samples differ.

    Source: S. Kornblith et al., arXiv 1905.00414; unbiased: L. Song et al., JMLR 13, 2012, as in T. Nguyen et al., arXiv
    2010.15327.
    """
    _same_samples(first, second)
    x, y = (part.detach().flatten(1).double() for part in (first, second))
    if unbiased:
        products = _unbiased([x, y])
    else:
        x, y = x - x.mean(0), y - y.mean(0)
        grams = torch.stack([(part @ part.T).flatten() for part in (x, y)])
        products = grams @ grams.T
    return float(_aligned(products)[0, 1])


class BatchCKA:
    """Linear CKA of many layers from batch after batch, without ever holding all samples.

    Every batch gives the unbiased estimates of all pairs of layers; their means over batches, each with the weight of its
    samples, are put into the ratio (Nguyen et al., arXiv 2010.15327, section 3.1.1), so the batch size does not matter
    beyond noise. Means of *biased* estimates would grow as batches shrink.

    Attributes:
        samples: how many went in.
        left_out: how many did not, in batches of fewer than four.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.left_out = 0
        self._sum: Tensor | None = None

    def update(self, layers: Sequence[Tensor]) -> None:
        """Take in one batch.

        Args:
            layers: activations of all layers on the same samples, each ``(n, ...)``, the same layers in every batch.

        Raises:
            ValueError: numbers of samples or of layers differ.
        """
        for layer in layers[1:]:
            _same_samples(layers[0], layer)
        if not layers or (self._sum is not None and len(layers) != len(self._sum)):
            wanted = "at least 1" if self._sum is None else str(len(self._sum))
            raise ValueError(f"{len(layers)} layers were given, expected {wanted}: the same ones in every batch")
        rows = len(layers[0])
        if rows < _FEWEST:
            self.left_out += rows
            return
        products = rows * _unbiased([layer.detach().flatten(1).double().cpu() for layer in layers])
        self._sum = products if self._sum is None else self._sum + products
        self.samples += rows

    def result(self) -> Tensor:
        """CKA of every two layers, ``(L, L)``; ``nan`` where one does not vary, and everywhere without a batch."""
        return torch.full((0, 0), torch.nan) if self._sum is None else _aligned(self._sum)


def _same_samples(first: Tensor, second: Tensor) -> None:
    if len(first) != len(second):
        raise ValueError(
            f"the layers were given on {len(first)} and {len(second)} samples: give both on the same samples, in one order"
        )


def _unbiased(layers: Sequence[Tensor]) -> Tensor:
    """Unbiased estimates of the Hilbert-Schmidt criterion of every two layers' linear kernels, ``(L, L)``."""
    n = len(layers[0])
    if n < _FEWEST:
        return torch.full((len(layers), len(layers)), torch.nan, dtype=torch.float64)
    # Centring changes nothing in exact arithmetic, and much where activations are large beside what varies of them.
    centred = [layer - layer.mean(0) for layer in layers]
    grams = [(part @ part.T).fill_diagonal_(0) for part in centred]
    flat = torch.stack([gram.flatten() for gram in grams])
    rows = torch.stack([gram.sum(1) for gram in grams])
    totals = rows.sum(1)
    trace = flat @ flat.T
    cross = rows @ rows.T
    return (trace + torch.outer(totals, totals) / ((n - 1) * (n - 2)) - 2 / (n - 2) * cross) / (n * (n - 3))


def _aligned(products: Tensor) -> Tensor:
    own = products.diagonal()
    scale = torch.where(own > 0, own, torch.nan).sqrt()
    return products / torch.outer(scale, scale)


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1, ties sharing the mean of theirs."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
    ranks: Tensor = counts.cumsum(0).double() - (counts - 1) / 2
    return ranks[place]
