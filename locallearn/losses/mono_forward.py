"""The Mono-Forward loss as a module."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from locallearn.functional import mono_forward


class MonoForwardLoss(nn.Module):
    """Cross-entropy of a layer's own linear projection onto the classes, learned together with the layer.

    Give the parameters of the layer and of this module to one optimizer, and detach what goes on to the next layer.

    Args:
        features: entries of one sample of the layer's activations, all dimensions after the batch multiplied.
        classes: number of classes C.

    Attributes:
        projection: M, shape ``(classes, features)``, Kaiming-uniform with a = √5 (the paper's choice is unknown; this
            is Spyra's and that of ``nn.Linear``).

    Raises:
        ValueError: ``features`` or ``classes`` is below 1.

    Paper: Gong, Li, Abdulla, "Mono-Forward", arXiv 2501.09238.

    Example:
        >>> import torch
        >>> from locallearn.losses import MonoForwardLoss
        >>> layer, local = torch.nn.Linear(784, 100), MonoForwardLoss(100, classes=10)
        >>> optimizer = torch.optim.Adam([*layer.parameters(), *local.parameters()])
        >>> images, targets = torch.rand(32, 784), torch.randint(10, (32,))
        >>> hidden = layer(images).relu()
        >>> loss = local(hidden, targets)
        >>> loss.backward()
        >>> optimizer.step()
        >>> next_input = hidden.detach()
        >>> local.goodness(next_input).shape
        torch.Size([32, 10])
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        if features < 1 or classes < 1:
            raise ValueError(f"features={features}, classes={classes}: both must be at least 1.")
        self.projection = nn.Parameter(torch.empty(classes, features))
        nn.init.kaiming_uniform_(self.projection, a=math.sqrt(5))

    def forward(self, activations: Tensor, targets: Tensor) -> Tensor:
        """Return the mean local cross-entropy, a scalar.

        Args:
            activations: the layer's output, shape ``(B, ...)`` with ``features`` entries per sample.
            targets: class ids, shape ``(B,)``, int64, each in ``[0, classes)``.

        Raises:
            ValueError: ``targets`` is not one class id per sample, or a sample has another number of entries.
        """
        return mono_forward.loss(activations, self.projection, targets)

    def goodness(self, activations: Tensor) -> Tensor:
        """Return the layer's class scores, shape ``(B, classes)``.

        Args:
            activations: the layer's output, shape ``(B, ...)`` with ``features`` entries per sample.

        Raises:
            ValueError: a sample has another number of entries.
        """
        return mono_forward.goodness(activations, self.projection)
