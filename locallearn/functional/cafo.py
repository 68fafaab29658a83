"""Equations of Cascaded Forward (CaFo): a cascade of blocks, and a predictor of the labels on the output of each.

Source: Zhao, Wang, Jin, Lang, Li, Ling, "The Cascaded Forward Algorithm for Neural Network Training", arXiv 2303.09728
(Pattern Recognition 161, 2025). The paper's body could not be read; the equations follow what its public code computes, and
for direct feedback Spyra (arXiv 2509.19063 and 2511.01061). Sparsemax: Martins and Astudillo, arXiv 1602.02068.

Symbols: N samples, C classes, D entries of one sample of a block's output, X the flattened outputs ``(N, D)``, Y the one-hot
labels ``(N, C)``, W a predictor's weights ``(D, C)``, without bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from locallearn.functional import ridge as _ridge
from locallearn.functional.ridge import PANEL, Solution, gather_macs, ridge, solve_flops, symmetric

__all__ = [
    "PANEL",
    "Loss",
    "Solution",
    "check_targets",
    "gather",
    "gather_macs",
    "gradient",
    "output_error",
    "predictor_macs",
    "probabilities",
    "ridge",
    "solve_flops",
    "sparsemax",
    "sparsemax_loss",
    "symmetric",
    "unit_rows",
]


def check_targets(targets: Tensor, samples: int, classes: int) -> None:
    """Refuse what is not one class id per sample; values are looked at on a CPU only, where nobody has to wait for them.

    Raises:
        ValueError: says what came and what was wanted.
    """
    wrong = targets.is_floating_point() or targets.is_complex() or targets.dtype is torch.bool
    if wrong or targets.shape != (samples,):
        raise ValueError(
            f"targets are {targets.dtype} of shape {tuple(targets.shape)} for {samples} samples: give class ids, int64 of "
            f"shape ({samples},)"
        )
    if targets.device.type == "cpu" and targets.numel():
        low, high = map(int, targets.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(f"targets go from {low} to {high}, expected class ids from 0 to {classes - 1}")


# -- sparsemax -------------------------------------------------------------------------------------------------------------
def sparsemax(scores: Tensor) -> Tensor:
    """The Euclidean projection of every row onto the simplex, p = max(z − τ, 0).

    With z sorted downwards, k = max{j : 1 + j z_(j) > Σ_{r≤j} z_(r)} and τ = (Σ_{r≤k} z_(r) − 1) / k.

    Args:
        scores: z, shape ``(..., C)``.

    Returns:
        p, of the same shape: not negative, and of sum 1. Differentiable; adding a number to a row changes nothing.
    """
    shifted = scores - scores.detach().amax(-1, keepdim=True)  # small numbers, so that sums of large ones lose nothing
    ordered = shifted.sort(-1, descending=True).values
    sums = ordered.cumsum(-1)
    ranks = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=sums.dtype)
    k = (1 + ranks * ordered > sums).sum(-1, keepdim=True).clamp_min(1)  # 0 only where a score is not a number
    tau = (sums.gather(-1, k - 1) - 1) / k
    return (shifted - tau).clamp_min(0)


def sparsemax_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """−z_y + ½ Σ_{j∈S} (z_j² − τ²) + ½, the mean over samples; S holds the classes with p_j > 0.

    Worked out as ⟨p, z⟩ − ½‖p‖² + ½ − z_y with p held fixed: the same number, and its gradient is (p − Y)/N without a way
    through the sorting.

    Args:
        scores: z, shape ``(N, C)``.
        targets: class ids y, shape ``(N,)``, int64, each in ``[0, C)``.

    Raises:
        ValueError: ``targets`` is not one class id per sample.
    """
    check_targets(targets, len(scores), scores.shape[-1])
    shifted = scores - scores.detach().amax(-1, keepdim=True)
    p = sparsemax(shifted.detach())
    wanted = shifted.gather(-1, targets.long()[:, None])[:, 0]
    return ((p * shifted).sum(-1) - p.square().sum(-1) / 2 + 0.5 - wanted).mean()


# -- predictors ------------------------------------------------------------------------------------------------------------
Loss = Literal["ce", "sparsemax"]


def probabilities(scores: Tensor, loss: Loss) -> Tensor:
    """softmax(z) for ``ce``, sparsemax(z) for ``sparsemax``, by rows."""
    return scores.softmax(-1) if loss == "ce" else sparsemax(scores)


def gradient(
    features: Tensor, weights: Tensor, targets: Tensor, loss: Loss = "ce", rows: int = 1024
) -> tuple[Tensor, Tensor]:
    """Loss of one predictor and its gradient Xᵀ(S − Y)/N, S = softmax(XW) or sparsemax(XW), in chunks of rows.

    Nothing larger than a chunk's scores is made beside the gradient itself; autograd is not used.

    Args:
        features: X, shape ``(N, ...)``, flattened to D entries per sample.
        weights: W, shape ``(D, C)``.
        targets: class ids, shape ``(N,)``, int64, each in ``[0, C)``.
        loss: ``ce`` or ``sparsemax``.
        rows: of a chunk.

    Returns:
        The mean loss, a scalar of at least float32, and the gradient ``(D, C)`` in the dtype of W.

    Raises:
        ValueError: targets that are no class ids, features that do not fit W, or no sample at all.
    """
    x = features.flatten(1)
    if x.shape[1] != weights.shape[0]:
        raise ValueError(
            f"features of shape {tuple(features.shape)} have {x.shape[1]} entries per sample but the predictor reads "
            f"{weights.shape[0]}"
        )
    if len(x) == 0:
        raise ValueError("the batch is empty: leave batches without samples out")
    check_targets(targets, len(x), weights.shape[1])
    with torch.no_grad():
        total = torch.zeros((), dtype=torch.promote_types(weights.dtype, torch.float32), device=weights.device)
        result = torch.zeros_like(weights)
        for start in range(0, len(x), rows):
            part, labels = x[start : start + rows].to(weights.dtype), targets[start : start + rows].long()
            scores = (part @ weights).to(weights.dtype)
            if loss == "ce":
                total += F.cross_entropy(scores, labels, reduction="sum").to(total.dtype)
            else:
                total += sparsemax_loss(scores, labels) * len(part)
            error = probabilities(scores, loss).to(weights.dtype)
            error[torch.arange(len(part), device=error.device), labels] -= 1
            result += part.T @ error
        return total / len(x), result / len(x)


def gather(gram: Tensor, cross: Tensor, features: Tensor, targets: Tensor) -> None:
    """Add one batch to XᵀX and XᵀY, in their own dtype and in place.

    Of XᵀX only panels of rows from the diagonal on are written: :func:`symmetric` fills in the rest. That is half of the
    work for many columns.

    Args:
        gram: XᵀX so far, shape ``(D, D)``.
        cross: XᵀY so far, shape ``(D, C)``.
        features: X, shape ``(N, ...)``.
        targets: class ids, shape ``(N,)``, int64, each in ``[0, C)``.

    Raises:
        ValueError: ``targets`` is not one class id per sample.
    """
    check_targets(targets, len(features), cross.shape[1])
    onehot = F.one_hot(targets.long(), cross.shape[1]).to(gram.dtype)
    _ridge.gather(gram, cross, features.flatten(1), onehot)


# -- direct feedback -------------------------------------------------------------------------------------------------------
def unit_rows(classes: int, features: int, like: Tensor | None = None) -> Tensor:
    """A Gaussian matrix B ``(classes, features)`` with rows of length 1, drawn from PyTorch's generator on the CPU."""
    rows = F.normalize(torch.randn(classes, features), dim=1)
    return rows if like is None else rows.to(like.device, like.dtype)


def output_error(scores: Tensor, targets: Tensor) -> Tensor:
    """The gradient of the mean cross entropy, e = (softmax(z) − Y)/N; shape ``(N, C)``, no graph."""
    error = scores.detach().softmax(1)
    error[torch.arange(len(error), device=error.device), targets.long()] -= 1
    return error / len(error)


# -- costs -----------------------------------------------------------------------------------------------------------------
def predictor_macs(sizes: Sequence[int], classes: int) -> int:
    """MACs of one step of all gradient predictors per sample, 2C ΣD: scores and gradients (double it for FLOPs)."""
    return 2 * classes * sum(sizes)
