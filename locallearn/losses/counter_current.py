"""The counter-current loss as a module."""

from __future__ import annotations

from torch import Tensor, nn

from locallearn.functional import counter_current


class CounterCurrentLoss(nn.Module):
    """Makes an activation of the forward network agree with the feedback network's for its own class, and no other.

    Both sides learn from it: detach what either of them hands on to its next layer.

    Args:
        normalise: scale every row of both sides to length 1, as the code does in convolutional networks; without it the
            loss is divided by the width.
        c: factor of the pair's term; ``None``: the code's, 1 with ``normalise`` and 0.5 without.
        gram: factor of the terms that keep the rows of either side apart; ``None``: the code's, 0.5 with ``normalise``
            and 0 without.

    Raises:
        ValueError: ``c`` is not positive, or ``gram`` is negative.

    Paper: C.-H. Kao, B. Hariharan, "Counter-Current Learning", NeurIPS 2024, arXiv 2409.19841, and its code.

    Deviation: a row of zeros stays zero under the normalisation; the code adds 1e-8 to its length.

    Example:
        >>> import torch
        >>> from locallearn.functional.counter_current import class_matches
        >>> from locallearn.losses import CounterCurrentLoss
        >>> forward, feedback, local = torch.nn.Linear(784, 100), torch.nn.Linear(10, 100), CounterCurrentLoss()
        >>> optimizer = torch.optim.SGD([*forward.parameters(), *feedback.parameters()], lr=0.1)
        >>> images, targets = torch.rand(32, 784), torch.randint(10, (32,))
        >>> hidden, signals = forward(images).tanh(), feedback(torch.eye(10)).tanh()
        >>> loss = local(hidden, signals, class_matches(targets, 10))
        >>> loss.backward()
        >>> optimizer.step()
        >>> next_input, next_signal = hidden.detach(), signals.detach()
    """

    def __init__(self, normalise: bool = False, c: float | None = None, gram: float | None = None) -> None:
        super().__init__()
        if c is not None and c <= 0:
            raise ValueError(f"c={c} must be above 0.")
        if gram is not None and gram < 0:
            raise ValueError(f"gram={gram} must be 0 (no Gram terms) or above.")
        self.normalise = normalise
        self.c = (1.0 if normalise else 0.5) if c is None else c
        self.gram = (0.5 if normalise else 0.0) if gram is None else gram

    def forward(self, activations: Tensor, signals: Tensor, matches: Tensor) -> Tensor:
        """Return the pair's loss, a scalar.

        Args:
            activations: the forward layer's output, shape ``(N, ...)``.
            signals: the feedback layer's output, shape ``(K, ...)`` with as many entries per row.
            matches: which row belongs to which, shape ``(N, K)``: 1 where they are of the same class, else 0.

        Raises:
            ValueError: shapes that do not fit.
        """
        pair = counter_current.normalised_pair_loss if self.normalise else counter_current.pair_loss
        loss = pair(activations, signals, matches, self.c)
        if self.gram == 0:
            return loss
        return loss + self.gram * (counter_current.gram_loss(activations) + counter_current.gram_loss(signals))
