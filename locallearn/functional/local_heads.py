"""Equations of supervised local learning with auxiliary heads: what a block's head is asked for beside the classes.

Sources, one rule each:

- similarity: A. Nøkland and L. H. Eidnes, "Training Neural Networks with Local Error Signals", arXiv 1901.06656.
- supervised contrast, and weights that run from the first local block to the last: Wang et al., InfoPro, arXiv 2101.10832.
- movement of residual branches: Karkar et al., TRGL, arXiv 2309.17357.
- depth of the heads and the units that they mirror: Ma et al., AugLocal, arXiv 2402.17318.

Symbols: N samples, C classes, K blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["mean", "none"]


def similarity_matrix(activations: Tensor) -> Tensor:
    """Return the cosine similarities of all pairs of samples, centred over features.

    A map with more than three channels and more than one row counts by its channels' standard deviations over positions
    (unbiased); anything else is flattened.

    Args:
        activations: ``(N, channels, height, width)`` or ``(N, ...)``.

    Returns:
        R, shape ``(N, N)``, within [-1, 1].
    """
    x = _exact(activations)
    x = x.flatten(2).std(2) if x.ndim == 4 and x.shape[1] > 3 and x.shape[2] > 1 else x.flatten(1)
    x = x - x.mean(1, keepdim=True)
    x = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-8)
    return _pairs(x).clamp(-1, 1)


def similarity_loss(activations: Tensor, targets: Tensor, classes: int, reduction: Reduction = "mean") -> Tensor:
    """Return the mean squared difference of the samples' similarities and those of their one-hot labels.

    Two samples of one class should be alike by 1, two of different classes by -1/(C-1). All N² pairs count, a sample with
    itself, too.

    Args:
        activations: ``(N, ...)``, what :func:`similarity_matrix` takes.
        targets: class ids ``(N,)``, int64, each in ``[0, classes)``.
        classes: C, at least 2.
        reduction: ``mean``: a scalar; ``none``: ``(N,)``, of every sample the mean over its pairs.

    Raises:
        ValueError: ``targets`` is not one class id per sample.
    """
    if targets.shape != activations.shape[:1]:
        raise ValueError(
            f"targets of shape {tuple(targets.shape)} do not fit activations of shape {tuple(activations.shape)}: "
            f"give one class id per sample, shape ({activations.shape[0]},)."
        )
    found = similarity_matrix(activations)
    wanted = similarity_matrix(F.one_hot(targets, classes).to(found.dtype))
    return F.mse_loss(found, wanted) if reduction == "mean" else (found - wanted).square().mean(1)


def supervised_contrast(
    embeddings: Tensor, targets: Tensor, temperature: float = 0.07, reduction: Reduction = "mean"
) -> Tensor:
    """Return the supervised contrastive loss (Khosla et al., arXiv 2004.11362) of one view per sample.

    Rows are scaled to length 1. Every sample asks for its partners (those of its class) among all others; the log
    probabilities of its partners are averaged. A sample without a partner counts as 0 and stays in the mean, as in
    InfoPro's code.

    Args:
        embeddings: ``(N, d)``.
        targets: class ids ``(N,)``.
        temperature: divides the similarities.
        reduction: ``mean``: a scalar; ``none``: of every sample, ``(N,)``.
    """
    z = F.normalize(_exact(embeddings), dim=1)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (_pairs(z) / temperature).masked_fill(own, -torch.inf)
    partners = (targets[:, None] == targets) & ~own
    log_probability = logits - logits.logsumexp(1, keepdim=True)
    chosen = torch.where(partners, log_probability, 0).sum(1)
    losses = chosen / partners.sum(1).clamp(min=1)
    return -(losses.mean() if reduction == "mean" else losses)


def movement(branch: Tensor) -> Tensor:
    """Return half the squared length of a residual branch's output, summed over entries and averaged over samples.

    TRGL adds it, times 1/τ, for every residual branch of a block.

    Args:
        branch: r(x), shape ``(N, ...)``, before the shortcut is added.
    """
    return _exact(branch).square().sum() / (2 * len(branch))


def ramp(ends: Sequence[float], index: int, count: int) -> float:
    """Return a weight that runs linearly from the first to the last of ``count`` local blocks.

    Args:
        ends: weights of the first and of the last local block.
        index: of the block, from 0.
        count: number of local blocks.
    """
    first, last = ends
    return first if count < 2 else first + (last - first) * index / (count - 1)


def auglocal_depth(index: int, blocks: int, depth: int, decay: float = 0.5) -> int:
    """Return the number of units in the head of block ``index``, d_l = max(1, round(d(1 - τ·l/(K-2)) + τ·l/(K-2))).

    Rounded half to even, as the official code does.

    Args:
        index: l, from 0 to K-2.
        blocks: K; the last one has no head.
        depth: d, that of the first head.
        decay: τ; 0: all heads are as deep.
    """
    share = decay * index / (blocks - 2) if blocks > 2 else 0.0
    return max(1, round(depth * (1 - share) + share))


def auglocal_units(unit: int, units: int, depth: int) -> list[int]:
    """Return the later units that a head of ``depth`` units mirrors: round(l + j(n-1-l)/d), j = 1..d, the last one always.

    Args:
        unit: l, index of the block's own last unit.
        units: n, of the whole network.
        depth: d. Where fewer units are left, the head mirrors all of them.
    """
    left = units - 1 - unit
    depth = min(depth, left)
    return [round(unit + j * left / depth) for j in range(1, depth + 1)]


def halvings(size: int, later: Sequence[int]) -> list[int]:
    """Return the strides of a head's units: a unit halves where the map is still larger than that of the unit it mirrors.

    One halving per unit at most, as in AugLocal; there the widths decide, which comes to the same where widths double when
    sides are halved, and goes wrong with narrower heads.

    Args:
        size: side of the map that enters the head.
        later: sides of the maps of the units that it mirrors.
    """
    strides = []
    for side in later:
        strides.append(2 if size > side else 1)
        size = -(-size // strides[-1])
    return strides


def _pairs(x: Tensor) -> Tensor:
    """Inner products of all pairs of rows, as exact as the rows: autocast would round them to halves again."""
    with torch.autocast(x.device.type, enabled=False):
        product: Tensor = x @ x.T
        return product


def _exact(x: Tensor) -> Tensor:
    """Halves lose too much in sums of squares."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
