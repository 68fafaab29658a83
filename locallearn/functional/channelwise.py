"""Equations of channel-wise competition: every class has channels of its own, and the loudest group is the answer.

Source: A. Papachristodoulou, C. Kyrkou, S. Timotheou, T. Theocharides, "Convolutional Channel-wise Competitive Learning for
the Forward-Forward Algorithm", AAAI 2024, arXiv 2312.12668, and the code that goes with it (github andreaspapac/CwComp).

Symbols: B samples, C classes, S channels of a map, S/C of them each class's group, G (B, C) the goodness of the groups,
y the true class, θ a threshold, w a weight.

Deviation: the code clamps goodness at 50 and adds 1e-9 inside of its logarithm. Above the clamp a loud wrong group gets no
gradient, so here neither is done; below it the two agree to about 1e-9.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def group_goodness(x: Tensor, classes: int) -> Tensor:
    """Return the goodness of every class's channels, G_c = mean of x² over the channels of group c and all positions.

    Args:
        x: a block's output, shape ``(B, S, ...)``; of a fully connected block, units take the place of channels. Group c
            has the channels c·S/C to (c+1)·S/C − 1.
        classes: C.

    Returns:
        Shape ``(B, C)``, in at least single precision.

    Raises:
        ValueError: S is no multiple of C.
    """
    channels = x.shape[1]
    if channels % classes:
        raise ValueError(
            f"{channels} channels cannot be shared out among {classes} classes: give a multiple of {classes} channels."
        )
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.reshape(len(x), classes, -1).square().mean(2)


def cwc(goodness: Tensor, targets: Tensor) -> Tensor:
    """Return the paper's CwC loss, −mean log(exp G_y / Σ_c exp G_c): the cross entropy of the groups' goodness.

    Args:
        goodness: G, shape ``(B, C)``.
        targets: class ids y, shape ``(B,)``, int64.
    """
    return F.cross_entropy(goodness, targets)


def pvn(goodness: Tensor, targets: Tensor, threshold: float = 2.0) -> Tensor:
    """Return the paper's PvN loss: the true class's group against the mean of the others, each against θ.

    The mean over the 2B numbers softplus(θ − G_y) and softplus(mean_{c≠y} G_c − θ): Forward-Forward's own loss, with the
    other classes' channels in the place of negative data.

    Args:
        goodness: G, shape ``(B, C)``, of at least two classes.
        targets: class ids y, shape ``(B,)``, int64.
        threshold: θ.
    """
    own = goodness.gather(1, targets.unsqueeze(1))
    others = goodness.scatter(1, targets.unsqueeze(1), 0.0).sum(1, keepdim=True) / (goodness.shape[1] - 1)
    return -F.logsigmoid(torch.cat([own - threshold, threshold - others])).mean()


def cwg(goodness: Tensor, targets: Tensor, threshold: float = 2.0, weight: float = 0.28) -> Tensor:
    """Return the paper's CwG loss, w · CwC + (1 − w) · PvN.

    Args:
        goodness: G, shape ``(B, C)``, of at least two classes.
        targets: class ids y, shape ``(B,)``, int64.
        threshold: θ of PvN.
        weight: w, 0.28 in the code.
    """
    return weight * cwc(goodness, targets) + (1.0 - weight) * pvn(goodness, targets, threshold)
