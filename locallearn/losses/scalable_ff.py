"""The loss of Scalable Forward-Forward as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from locallearn.functional import scalable_ff


class ScalableForwardForwardLoss(nn.Module):
    """Class maps by a small convolution; the mean square of the right class's map shall be the largest.

    Give the parameters of the block and of this module to one optimizer, and hand the block's output on normalised and
    detached (`locallearn.functional.scalable_ff.normalise`).

    Args:
        channels: of the block's output.
        classes: number of classes C.
        kernel_size: of the convolution, odd, so that the map keeps its size.
        margin: m, by how much the right class must lead.
        temperature: T, divides goodness and margin.
        gain: scale of the starting weights, Kaiming-normal times this.

    Attributes:
        layer: the convolution, without bias.

    Raises:
        ValueError: a value out of range. At ``gain=0`` all maps would start at zero, where a square has no gradient.

    Paper: A. Krutsylo, arXiv 2501.03176. Margin, temperature and start are choices of ours: the paper's could not be read.

    Example:
        >>> import torch
        >>> from locallearn.functional.scalable_ff import normalise
        >>> from locallearn.losses import ScalableForwardForwardLoss
        >>> block, local = torch.nn.Conv2d(3, 8, 3, padding=1), ScalableForwardForwardLoss(8, classes=10)
        >>> images, targets = torch.rand(16, 3, 12, 12), torch.randint(10, (16,))
        >>> hidden = block(images).relu()
        >>> local(hidden, targets).backward()
        >>> next_input = normalise(hidden.detach())
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        kernel_size: int = 1,
        margin: float = 0.0,
        temperature: float = 1.0,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        check(kernel_size, margin, temperature, gain)
        if classes < 2:
            raise ValueError(f"classes={classes}: the right class is told from others, so there must be at least 2.")
        self.margin = margin
        self.temperature = temperature
        self.layer = nn.Conv2d(channels, classes, kernel_size, padding=kernel_size // 2, bias=False)
        nn.init.kaiming_normal_(self.layer.weight)
        with torch.no_grad():
            self.layer.weight.mul_(gain)

    def forward(self, activations: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss, a scalar.

        Args:
            activations: the block's output, shape ``(B, channels, H, W)``, before normalisation.
            targets: class ids, shape ``(B,)``, int64.

        Raises:
            ValueError: ``targets`` is not one class id per sample.
        """
        return scalable_ff.loss(self.goodness(activations), targets, self.margin, self.temperature)

    def goodness(self, activations: Tensor) -> Tensor:
        """Return every class's goodness, shape ``(B, C)``.

        Args:
            activations: the block's output, shape ``(B, channels, H, W)``.
        """
        return scalable_ff.goodness(self.layer(activations))


def check(kernel_size: int, margin: float, temperature: float, gain: float) -> None:
    """Refuse settings under which nothing can be learned.

    Raises:
        ValueError: a value out of range.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size} must be odd and positive, so that maps keep their size.")
    if margin < 0:
        raise ValueError(f"margin={margin} must not be negative: it is the lead that the right class shall have.")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above 0.")
    if gain <= 0:
        raise ValueError(
            f"gain={gain} must be above 0: class maps that start at zero get no gradient, their squares have none."
        )
