"""The sparsemax loss as a module."""

from __future__ import annotations

from torch import Tensor, nn

from locallearn.functional import cafo


class SparsemaxLoss(nn.Module):
    """−z_y + ½ Σ_{j∈S} (z_j² − τ²) + ½ over the support S of sparsemax(z), the mean over samples.

    Convex, at least 0, and 0 where the right class leads by 1 or more; its gradient by the scores is (sparsemax(z) − Y)/N.
    Many public versions add ½ once per class, which makes the value too large by ½(C − 1) and changes no gradient.

    Paper: Martins, Astudillo, "From Softmax to Sparsemax", arXiv 1602.02068; as a predictor's loss in Zhao et al., "The
    Cascaded Forward Algorithm", arXiv 2303.09728.

    Example:
        >>> import torch
        >>> from locallearn.losses import SparsemaxLoss
        >>> head, local = torch.nn.Linear(100, 10), SparsemaxLoss()
        >>> features, targets = torch.randn(32, 100), torch.randint(10, (32,))
        >>> local(head(features), targets).backward()
        >>> local.probabilities(head(features)).shape
        torch.Size([32, 10])
    """

    def forward(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss, a scalar.

        Args:
            scores: z, shape ``(B, C)``.
            targets: class ids, shape ``(B,)``, int64, each in ``[0, C)``.

        Raises:
            ValueError: ``targets`` is not one class id per sample.
        """
        return cafo.sparsemax_loss(scores, targets)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Return sparsemax(z), shape ``(B, C)``: rows that are not negative, sum to 1, and have zeros.

        Args:
            scores: z, shape ``(B, C)``.
        """
        return cafo.sparsemax(scores)
