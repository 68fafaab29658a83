"""The losses of channel-wise competition as a module."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

from locallearn.functional import channelwise

Competition = Literal["cwc", "pvn", "cwg"]


class ChannelwiseCompetitiveLoss(nn.Module):
    """Makes the channels of the true class louder than those of the others; no negative data, no label in the input.

    Detach what goes on to the next layer.

    Args:
        classes: C; the layer's channels are shared out among them in order.
        competition: ``"cwc"``: cross entropy of the groups' goodness; ``"pvn"``: the true group and the mean of the others,
            each against ``threshold``; ``"cwg"``: ``weight`` of the first and the rest of the second.
        threshold: θ of ``pvn`` and ``cwg``.
        weight: share of the cross entropy in ``cwg``.

    Raises:
        ValueError: fewer than two classes, an unknown competition, or a weight outside of 0 to 1.

    Paper: A. Papachristodoulou et al., "Convolutional Channel-wise Competitive Learning for the Forward-Forward Algorithm",
    AAAI 2024, arXiv 2312.12668, and its code.

    Deviation: goodness is not clamped at 50, see `locallearn.functional.channelwise`.

    Example:
        >>> import torch
        >>> from locallearn.losses import ChannelwiseCompetitiveLoss
        >>> layer = torch.nn.Sequential(torch.nn.Conv2d(1, 20, 3, padding=1), torch.nn.ReLU(), torch.nn.BatchNorm2d(20))
        >>> local, optimizer = ChannelwiseCompetitiveLoss(10), torch.optim.Adam(layer.parameters(), lr=1e-2)
        >>> images, targets = torch.rand(32, 1, 28, 28), torch.randint(10, (32,))
        >>> output = layer(images)
        >>> loss = local(output, targets)
        >>> loss.backward()
        >>> optimizer.step()
        >>> guess, next_input = local.goodness(output).argmax(1), output.detach()
    """

    def __init__(
        self, classes: int, competition: Competition = "cwc", threshold: float = 2.0, weight: float = 0.28
    ) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes={classes} leaves no group to compete with: at least 2 are needed.")
        if competition not in get_args(Competition):
            raise ValueError(f"competition is {competition!r}, expected 'cwc', 'pvn' or 'cwg'.")
        if not 0 <= weight <= 1:
            raise ValueError(f"weight={weight} must be between 0 and 1.")
        self.classes = classes
        self.competition = competition
        self.threshold = threshold
        self.weight = weight

    def goodness(self, output: Tensor) -> Tensor:
        """Goodness of every class's channels, shape ``(B, C)``: class scores."""
        return channelwise.group_goodness(output, self.classes)

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss over the samples, a scalar.

        Args:
            output: of the layer, shape ``(B, S, ...)`` with S a multiple of the classes.
            targets: class ids, shape ``(B,)``, int64.

        Raises:
            ValueError: the channels cannot be shared out.
        """
        goodness = self.goodness(output)
        if self.competition == "cwc":
            return channelwise.cwc(goodness, targets)
        if self.competition == "pvn":
            return channelwise.pvn(goodness, targets, self.threshold)
        return channelwise.cwg(goodness, targets, self.threshold, self.weight)
