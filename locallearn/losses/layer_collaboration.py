"""The loss of layer collaboration as a module."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor, nn

from locallearn.functional import forward_forward, layer_collaboration
from locallearn.functional.layer_collaboration import NegativeLoss


class LayerCollaborationLoss(nn.Module):
    """Forward-Forward's loss in which other layers' goodness says how much a sample still counts.

    Give the layer normalised inputs (`locallearn.functional.forward_forward.rms_normalise`), detach what goes on to the next
    layer, and hand in the summed goodness of the other layers on the same rows.

    Args:
        threshold: θ of the summed goodness, see `locallearn.functional.layer_collaboration.threshold`; ``None``: halfway
            between the mean scores of positives and of negatives of every batch.
        negative_loss: ``"softplus"`` or ``"log_p"``, see `locallearn.functional.layer_collaboration.loss`.

    Raises:
        ValueError: an unknown ``negative_loss``, or a threshold that is not finite.

    Paper: G. Lorberbom et al., "Layer Collaboration in the Forward-Forward Algorithm", AAAI 2024, arXiv 2305.12393.

    Example:
        >>> import torch
        >>> from locallearn.functional.forward_forward import embed_label, goodness, rms_normalise, wrong_labels_uniform
        >>> from locallearn.losses import LayerCollaborationLoss
        >>> first, second = torch.nn.Linear(784, 100), torch.nn.Linear(100, 80)
        >>> optimizer = torch.optim.Adam(second.parameters(), lr=1e-3)
        >>> images, targets = torch.rand(32, 784), torch.randint(10, (32,))
        >>> wrong = wrong_labels_uniform(targets, 10, torch.Generator().manual_seed(0))
        >>> good, bad = (first(rms_normalise(embed_label(images, y, 10))).relu().detach() for y in (targets, wrong))
        >>> local = LayerCollaborationLoss(threshold=180.0)
        >>> outputs = (second(rms_normalise(x)).relu() for x in (good, bad))
        >>> loss = local(*outputs, goodness(good), goodness(bad))
        >>> loss.backward()
        >>> optimizer.step()
    """

    def __init__(self, threshold: float | None = None, negative_loss: NegativeLoss = "softplus") -> None:
        super().__init__()
        if negative_loss not in get_args(NegativeLoss):
            raise ValueError(f"negative_loss is {negative_loss!r}, expected 'softplus' or 'log_p'.")
        if threshold is not None and not math.isfinite(threshold):
            raise ValueError(f"threshold={threshold} must be a finite number, or None.")
        self.threshold = threshold
        self.negative_loss: NegativeLoss = negative_loss

    def forward(
        self,
        positive: Tensor,
        negative: Tensor,
        gamma_positive: Tensor | None = None,
        gamma_negative: Tensor | None = None,
    ) -> Tensor:
        """Return the mean loss over all rows, a scalar; nothing is differentiated but this layer's own output.

        Args:
            positive: the layer's output on positive data, shape ``(B, ...)``, before normalisation.
            negative: the layer's output on negative data, the same shape.
            gamma_positive: summed goodness of the other layers on the same positives, shape ``(B,)``; ``None``: none.
            gamma_negative: the same on the same negatives.

        Raises:
            ValueError: the two outputs differ in shape, or a γ has not one number per row.
        """
        if positive.shape != negative.shape:
            raise ValueError(
                f"positive activations of shape {tuple(positive.shape)} and negative ones of shape "
                f"{tuple(negative.shape)} differ: give as many negatives as positives, from the same layer."
            )
        good, bad = forward_forward.goodness(positive), forward_forward.goodness(negative)
        loud, quiet = (
            torch.zeros_like(good) if gamma is None else gamma.detach() for gamma in (gamma_positive, gamma_negative)
        )
        for gamma in (loud, quiet):
            if gamma.shape != good.shape:
                raise ValueError(
                    f"gamma of shape {tuple(gamma.shape)} must have one number per row, shape {tuple(good.shape)}."
                )
        theta: float | Tensor | None = self.threshold
        if theta is None:
            theta = layer_collaboration.midpoint(good + loud, bad + quiet)
        return layer_collaboration.loss(good, bad, loud, quiet, theta, self.negative_loss)
