"""The loss of Forward-Forward with any goodness, over one layer or over several at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from locallearn.functional import emergent, forward_forward


class SummedGoodnessLoss(nn.Module):
    """Logistic loss that makes the summed goodness of layers large on positive data and small on negative data.

    Given one layer it is Forward-Forward's own loss of that layer; given all layers of a network, with nothing detached in
    between, it is the objective of backpropagation on Forward-Forward's goodness (BP/FF).

    Args:
        threshold: θ, at which a sample counts as undecided; 3 in the paper's code. ``None``: the summed goodness of outputs
            that are 1 everywhere.
        goodness: ``"squares"`` (Σ h²), ``"norm"`` (‖h‖₂) or ``"l1"`` (Σ |h|).

    Raises:
        ValueError: an unknown goodness.

    Paper: Tosato et al., arXiv 2305.18353.

    Deviation: log(1+exp(·)) is computed so that it stays finite; the paper's code writes it out, and a goodness of 95 in
    single precision then gives gradients that are no numbers.

    Example:
        >>> import torch
        >>> from locallearn.functional.emergent import unit_normalise
        >>> from locallearn.losses import SummedGoodnessLoss
        >>> one, two = torch.nn.Linear(20, 30), torch.nn.Linear(30, 30)
        >>> local = SummedGoodnessLoss(threshold=3.0, goodness="norm")
        >>> def run(x):
        ...     h = one(unit_normalise(x)).relu()
        ...     return [h, two(unit_normalise(h)).relu()]
        >>> loss = local(run(torch.rand(8, 20)), run(torch.rand(8, 20)))
        >>> loss.backward()
    """

    def __init__(self, threshold: float | None = None, goodness: emergent.Goodness = "squares") -> None:
        super().__init__()
        emergent.check_kind(goodness)
        self.threshold = threshold
        self.goodness = goodness

    def forward(self, positive: Sequence[Tensor] | Tensor, negative: Sequence[Tensor] | Tensor) -> Tensor:
        """Return the mean loss over all 2B rows, a scalar.

        Args:
            positive: outputs of the layers on positive data, before normalisation, each ``(B, ...)``; one layer may come as
                a tensor.
            negative: the same on negative data.

        Raises:
            ValueError: another number of layers, or of rows, on one side than on the other.
        """
        good, bad = ([part] if isinstance(part, Tensor) else list(part) for part in (positive, negative))
        if [tuple(h.shape) for h in good] != [tuple(h.shape) for h in bad]:
            raise ValueError(
                f"positive activations of shapes {[tuple(h.shape) for h in good]} and negative ones of shapes "
                f"{[tuple(h.shape) for h in bad]} differ: give as many negatives as positives, from the same layers."
            )
        threshold = self.threshold
        if threshold is None:
            threshold = sum(emergent.undecided(math.prod(h.shape[1:]), self.goodness) for h in good)
        return forward_forward.loss(
            emergent.summed_goodness(good, self.goodness), emergent.summed_goodness(bad, self.goodness), threshold
        )
