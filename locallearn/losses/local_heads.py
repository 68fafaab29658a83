"""Losses of supervised local learning as modules: similarity, supervised contrast, reconstruction, movement."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.functional import local_heads
from locallearn.functional.local_heads import Reduction
from locallearn.nets.heads import Decoder, LinearHead
from locallearn.nets.layout import Signal, channel_axis


class SimilarityLoss(nn.Module):
    """Samples of one class should look alike to a trained map of the layer's output, and others should not.

    A map passes a convolution of kernel size 3, a vector a linear layer, both as wide as it and without bias. Tokens
    ``(T, D)`` are averaged and then taken as a vector, and a one-dimensional map is a map of one column (choices of ours: the
    paper has neither).

    Give the parameters of the layer and of this module to one optimizer, and detach what goes on to the next layer.

    Args:
        shape: of one sample of the layer's output: ``(C, H, W)``, ``(T, D)`` or ``(D,)``, or of a one-dimensional map
            ``Signal(C, L)`` (``locallearn.nets.layout``).
        classes: number of classes C.
        side: largest side of the map that is compared; larger ones are averaged down to it before the convolution
            (ours). ``None``: as it is.

    Raises:
        ValueError: fewer than two classes, or a shape of another kind.

    Paper: Nøkland and Eidnes, "Training Neural Networks with Local Error Signals", arXiv 1901.06656, the loss "sim".

    Example:
        >>> import torch
        >>> from locallearn.losses import SimilarityLoss
        >>> layer, local = torch.nn.Conv2d(3, 8, 3, padding=1), SimilarityLoss((8, 12, 12), classes=10)
        >>> images, targets = torch.rand(16, 3, 12, 12), torch.randint(10, (16,))
        >>> local(layer(images).relu(), targets).backward()
    """

    def __init__(self, shape: Sequence[int], classes: int, side: int | None = None) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes={classes}: labels of fewer than 2 classes are all alike.")
        if not 1 <= len(shape) <= 3:
            raise ValueError(f"shape={tuple(shape)}: expected (channels, height, width), (tokens, width) or (width,).")
        self.classes = classes
        self.signal = isinstance(shape, Signal)
        self.tokens = len(shape) == 2 and not self.signal
        self.pool: nn.Module = nn.Identity()
        self.layer: nn.Module
        if self.signal:
            if side is not None and shape[1] > side:
                self.pool = nn.AdaptiveAvgPool1d(side)
            self.layer = nn.Conv1d(shape[0], shape[0], 3, padding=1, bias=False)
        elif len(shape) == 3:
            if side is not None and max(shape[1:]) > side:
                self.pool = nn.AdaptiveAvgPool2d((min(side, shape[1]), min(side, shape[2])))
            self.layer = nn.Conv2d(shape[0], shape[0], 3, padding=1, bias=False)
        else:
            self.layer = nn.Linear(shape[-1], shape[-1], bias=False)

    def forward(self, activations: Tensor, targets: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Return the mean squared difference of similarities, a scalar.

        Args:
            activations: the layer's output, shape ``(N, *shape)``.
            targets: class ids ``(N,)``, int64, each in ``[0, classes)``.
            reduction: ``none``: of every sample the mean over its pairs, ``(N,)``.

        Raises:
            ValueError: ``targets`` is not one class id per sample.
        """
        x = activations.mean(1) if self.tokens else self.pool(activations)
        made = self.layer(x)
        return local_heads.similarity_loss(made[..., None] if self.signal else made, targets, self.classes, reduction)


class PredSimLoss(nn.Module):
    """Cross entropy of a head, times 1 - β, and the similarity of pairs, times β.

    Args:
        shape: of one sample of the layer's output.
        classes: number of classes C.
        beta: β.
        limit: largest number of inputs of the linear head, to which maps and tokens are averaged; vectors, and one value per
            channel, stay as they are; ``None``: no averaging.
        head: another head, ``(N, *shape)`` to ``(N, C)``; ``None``: linear with bias, its weights zero at the start.

    Attributes:
        head: gives class scores.
        similarity: a :class:`SimilarityLoss`.

    Raises:
        ValueError: β is not within 0 and 1, fewer than two classes, a shape that is none, or one beyond the limit.

    Paper: Nøkland and Eidnes, arXiv 1901.06656, the loss "predsim".
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        beta: float = 0.99,
        limit: int | None = 4096,
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= beta <= 1:
            raise ValueError(f"beta={beta} must be within 0 and 1.")
        self.beta = beta
        if head is None:
            if limit is not None:
                limit = max(limit, shape[channel_axis(shape) - 1])
            head = LinearHead(shape, classes, limit, bias=True)
            nn.init.zeros_(head.projection)
        self.head = head
        self.similarity = SimilarityLoss(shape, classes)

    def forward(self, activations: Tensor, targets: Tensor) -> Tensor:
        """Return the local loss, a scalar.

        Args:
            activations: the layer's output, shape ``(N, *shape)``.
            targets: class ids ``(N,)``, int64.

        Raises:
            ValueError: ``targets`` is not one class id per sample.
        """
        similarity: Tensor = self.similarity(activations, targets)
        return (1 - self.beta) * F.cross_entropy(self.head(activations), targets) + self.beta * similarity


class SupervisedContrastiveLoss(nn.Module):
    """Samples of one class should be nearer to each other than to all others. It has no weights.

    Args:
        temperature: divides the cosine similarities.

    Raises:
        ValueError: ``temperature`` is not positive.

    Paper: Khosla et al., arXiv 2004.11362, one view per sample, as in InfoPro (Wang et al., arXiv 2101.10832): a sample
    without a partner in the batch counts as 0 and stays in the mean.
    """

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be above 0.")
        self.temperature = temperature

    def forward(self, embeddings: Tensor, targets: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Return the mean loss, a scalar.

        Args:
            embeddings: a head's output, shape ``(N, d)``; it is scaled to length 1 here.
            targets: class ids ``(N,)``.
            reduction: ``none``: of every sample, ``(N,)``.
        """
        return local_heads.supervised_contrast(embeddings, targets, self.temperature, reduction)


class ReconstructionLoss(nn.Module):
    """Binary cross entropy of the image that a small decoder makes of a map, mean over pixels and channels.

    Args:
        channels: of the map.
        image: ``(C, H, W)``.

    Attributes:
        decoder: a :class:`~locallearn.nets.heads.Decoder`.

    Paper: Wang et al., InfoPro, arXiv 2101.10832.
    """

    def __init__(self, channels: int, image: Sequence[int]) -> None:
        super().__init__()
        self.decoder = Decoder(channels, image)

    def forward(self, activations: Tensor, images: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Return the mean loss, a scalar.

        Args:
            activations: a map, shape ``(N, channels, h, w)``.
            images: pixels in [0, 1], shape ``(N, *image)``.
            reduction: ``none``: of every sample, ``(N,)``.
        """
        losses = F.binary_cross_entropy_with_logits(self.decoder(activations), images, reduction=reduction)
        return losses if reduction == "mean" else losses.flatten(1).mean(1)


class InfoProLoss(nn.Module):
    """The image given back, times λ1, and the classes told apart, times λ2.

    Args:
        channels: of the map.
        image: ``(C, H, W)``.
        head: reads the map. Without ``temperature`` it gives class scores ``(N, C)``, else embeddings ``(N, d)``.
        reconstruction: λ1.
        classification: λ2.
        temperature: of the supervised contrast; ``None``: cross entropy.

    Attributes:
        head: as given.
        reconstruct: a :class:`ReconstructionLoss`.

    Raises:
        ValueError: a negative weight, both of them 0, or a temperature that is not positive.

    Paper: Wang et al., InfoPro, arXiv 2101.10832.

    Example:
        >>> import torch
        >>> from locallearn.losses import InfoProLoss
        >>> from locallearn.nets.heads import ConvHead
        >>> layer, head = torch.nn.Conv2d(3, 8, 3, padding=1), ConvHead(8, outputs=128, width=16, hidden=128)
        >>> local = InfoProLoss(8, (3, 12, 12), head, reconstruction=0.6, classification=0.4, temperature=0.07)
        >>> images, targets = torch.rand(16, 3, 12, 12), torch.randint(10, (16,))
        >>> local(layer(images).relu(), images, targets).backward()
    """

    def __init__(
        self,
        channels: int,
        image: Sequence[int],
        head: nn.Module,
        reconstruction: float = 1.0,
        classification: float = 1.0,
        temperature: float | None = None,
    ) -> None:
        super().__init__()
        if min(reconstruction, classification) < 0 or reconstruction == classification == 0:
            raise ValueError(
                f"reconstruction={reconstruction}, classification={classification}: neither may be negative, nor both be 0."
            )
        self.weights = (reconstruction, classification)
        self.head = head
        self.reconstruct = ReconstructionLoss(channels, image)
        self.classify = nn.CrossEntropyLoss() if temperature is None else SupervisedContrastiveLoss(temperature)

    def forward(self, activations: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        """Return the local loss, a scalar.

        Args:
            activations: a map, shape ``(N, channels, h, w)``.
            images: pixels in [0, 1], shape ``(N, *image)``.
            targets: class ids ``(N,)``, int64.
        """
        reconstruction, classification = self.weights
        image: Tensor = self.reconstruct(activations, images)
        labels: Tensor = self.classify(self.head(activations), targets)
        return reconstruction * image + classification * labels


class MovementLoss(nn.Module):
    """Half the squared length of a residual branch's output, times a weight: blocks should move what they get but little.

    Args:
        weight: 1/τ.

    Raises:
        ValueError: ``weight`` is negative.

    Paper: Karkar et al., "Module-wise Training of Neural Networks via the Minimizing Movement Scheme", arXiv 2309.17357.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        if weight < 0:
            raise ValueError(f"weight={weight} must not be negative.")
        self.weight = weight

    def forward(self, branch: Tensor) -> Tensor:
        """Return the term of one branch, a scalar.

        Args:
            branch: r(x), shape ``(N, ...)``, before the shortcut is added.
        """
        return self.weight * local_heads.movement(branch)
