"""The SymBa loss as a module."""

from __future__ import annotations

from torch import Tensor, nn

from locallearn.functional import forward_forward, symba


class SymBaLoss(nn.Module):
    """Makes every positive louder than its negative, without a threshold.

    Goodness is the mean of squares over all entries of a sample. Give the layer normalised inputs
    (`locallearn.functional.forward_forward.rms_normalise`), and detach what goes on to the next layer.

    Args:
        alpha: α, steepness of the comparison, 4 in a public implementation.

    Raises:
        ValueError: ``alpha`` is not positive.

    Paper: H.-C. Lee, J. Song, "SymBa", arXiv 2303.08418.

    Example:
        >>> import torch
        >>> from locallearn.functional.forward_forward import embed_label, rms_normalise, wrong_labels_uniform
        >>> from locallearn.losses import SymBaLoss
        >>> layer, local = torch.nn.Linear(784, 100), SymBaLoss()
        >>> optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
        >>> images, targets = torch.rand(32, 784), torch.randint(10, (32,))
        >>> wrong = wrong_labels_uniform(targets, 10, torch.Generator().manual_seed(0))
        >>> positive = layer(rms_normalise(embed_label(images, targets, classes=10))).relu()
        >>> negative = layer(rms_normalise(embed_label(images, wrong, classes=10))).relu()
        >>> loss = local(positive, negative)
        >>> loss.backward()
        >>> optimizer.step()
        >>> next_input = rms_normalise(positive.detach())
    """

    def __init__(self, alpha: float = 4.0) -> None:
        super().__init__()
        if not alpha > 0:
            raise ValueError(f"alpha={alpha} must be above 0.")
        self.alpha = alpha

    def forward(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Return the mean loss over the pairs, a scalar.

        Args:
            positive: the layer's output on positive data, shape ``(B, ...)``, before normalisation.
            negative: the layer's output on the same samples' negatives, the same shape.

        Raises:
            ValueError: the two outputs differ in shape.
        """
        if positive.shape != negative.shape:
            raise ValueError(
                f"positive activations of shape {tuple(positive.shape)} and negative ones of shape "
                f"{tuple(negative.shape)} differ: give one negative for every positive, from the same layer."
            )
        good, bad = forward_forward.mean_goodness(positive), forward_forward.mean_goodness(negative)
        return symba.loss(good, bad, self.alpha)
