"""The Forward-Forward loss as a module."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from locallearn.functional import emergent, forward_forward


class ForwardForwardLoss(nn.Module):
    """Logistic loss that makes a layer's activity long on positive data and short on negative data.

    Give the layer normalised inputs (`locallearn.functional.forward_forward.rms_normalise`), and detach what goes on to
    the next layer.

    Args:
        threshold: θ, the goodness at which a sample counts as undecided; ``None`` takes that of an output which is 1
            everywhere: of squares the number of entries of one sample, as in Hinton's code.
        temperature: T, divides G − θ.
        minimise: make positive data quiet instead of loud (min-ssq).
        peer: λ of peer normalisation, 0.03 in Hinton's code, 0 for none.
        features: number of units n, dimension 1 of the activations; wanted only with ``peer`` above 0.
        goodness: ``"squares"`` (Σ z²), Hinton's; ``"norm"`` (‖z‖₂), that of Tosato et al., who take θ = 3 and inputs of
            length 1 (`locallearn.functional.emergent.unit_normalise`); ``"l1"`` (Σ |z|).

    Attributes:
        peer_mean: with ``peer`` above 0, a buffer of shape ``(features,)``: the running mean activity of every unit on
            positive data. It moves with every call in training mode and stays put after ``.eval()``.

    Raises:
        ValueError: ``temperature`` is not positive, ``peer`` is negative, or comes without ``features``, or an unknown
            goodness.

    Paper: G. Hinton, "The Forward-Forward Algorithm", arXiv 2212.13345, and its Matlab code; of the other kinds of goodness
    Tosato et al., arXiv 2305.18353.

    Deviations: with T other than 1 the gradient carries 1/T (it is that of the loss), Hinton's hand-made one does not.
    In convolutional maps the unit of peer normalisation is the channel.

    Example:
        >>> import torch
        >>> from locallearn.functional.forward_forward import embed_label, rms_normalise, wrong_labels_uniform
        >>> from locallearn.losses import ForwardForwardLoss
        >>> layer, local = torch.nn.Linear(784, 100), ForwardForwardLoss()
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3, momentum=0.9)
        >>> images, targets = torch.rand(32, 784), torch.randint(10, (32,))
        >>> wrong = wrong_labels_uniform(targets, 10, torch.Generator().manual_seed(0))
        >>> positive = layer(rms_normalise(embed_label(images, targets, classes=10))).relu()
        >>> negative = layer(rms_normalise(embed_label(images, wrong, classes=10))).relu()
        >>> loss = local(positive, negative)
        >>> loss.backward()
        >>> optimizer.step()
        >>> next_input = rms_normalise(positive.detach())
    """

    peer_mean: Tensor

    def __init__(
        self,
        threshold: float | None = None,
        temperature: float = 1.0,
        minimise: bool = False,
        peer: float = 0.0,
        features: int | None = None,
        goodness: emergent.Goodness = "squares",
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be above 0.")
        if peer < 0:
            raise ValueError(f"peer={peer} must be 0 (no peer normalisation) or above.")
        emergent.check_kind(goodness)
        self.goodness = goodness
        self.threshold = threshold
        self.temperature = temperature
        self.minimise = minimise
        self.peer = peer
        if peer > 0:
            if features is None:
                raise ValueError(f"peer={peer} needs features, the number of units whose mean activity is tracked.")
            self.register_buffer("peer_mean", torch.full((features,), 0.5))

    def forward(self, positive: Tensor, negative: Tensor, pre_activation: Tensor | None = None) -> Tensor:
        """Return the mean loss over all rows, a scalar; with ``peer`` above 0, the peer term is part of it.

        Args:
            positive: the layer's output on positive data, shape ``(B, ...)``, before normalisation.
            negative: the layer's output on negative data, the same shape.
            pre_activation: with ``peer`` above 0, what the layer's ReLU reads on positive data, shape
                ``(B, features, ...)``. Where only the output can be had, pass ``positive`` again: the term is then
                gated by the ReLU and, unlike Hinton's, does not revive units that are dead on the whole batch.

        Raises:
            ValueError: the two outputs differ in shape, or ``pre_activation`` is missing or does not fit.
        """
        if positive.shape != negative.shape:
            raise ValueError(
                f"positive activations of shape {tuple(positive.shape)} and negative ones of shape "
                f"{tuple(negative.shape)} differ: give as many negatives as positives, from the same layer."
            )
        threshold = self.threshold
        if threshold is None:
            threshold = emergent.undecided(math.prod(positive.shape[1:]), self.goodness)
        good, bad = emergent.goodness(positive, self.goodness), emergent.goodness(negative, self.goodness)
        loss = forward_forward.loss(good, bad, threshold, self.temperature, self.minimise)
        return loss + self._peer_term(positive, pre_activation) if self.peer > 0 else loss

    def _peer_term(self, positive: Tensor, pre_activation: Tensor | None) -> Tensor:
        if pre_activation is None:
            raise ValueError(f"peer={self.peer} needs pre_activation, what the layer's ReLU reads on positive data.")
        if pre_activation.shape[0] != positive.shape[0]:
            raise ValueError(
                f"pre_activation has {pre_activation.shape[0]} rows for {positive.shape[0]} positives: "
                "give those of the positive data alone."
            )
        if self.training:
            self.peer_mean.copy_(forward_forward.update_peer_mean(self.peer_mean, positive))
        return forward_forward.peer_term(pre_activation, self.peer_mean, self.peer)
