"""Product feedback alignment: the error goes back through a fixed and a learned matrix, whose product follows W."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from locallearn.algorithms.feedback_alignment import Call, Carrier, FeedbackChain, FeedbackWeights, Layer
from locallearn.functional import feedback_alignment as fa


class ProductFeedbackAlignment(FeedbackChain):
    """Product feedback alignment, PFA (Li and Benna, "Deep Learning without Weight Symmetry", arXiv 2405.20594).

    m = δ B, g = m R, ∇R = mᵀ h, with B fixed and R learned under the same optimizer as W. Then R comes to BᵀW, and the
    path B R to B BᵀW ≈ W, although no matrix is the transpose of another. Equations:
    :mod:`locallearn.functional.feedback_alignment`.

    Deviations: where it needs fewer operations, B R and Bᵀ ∇W are multiplied out instead of m, which is the same but for
    rounding. Convolutions in groups have a B for every group.

    Args:
        expansion: k; the layer between B and R is k times as wide as the layer's output; ``None``: the paper's, 10, and 1
            for an orthogonal B.
        orthogonal: orthonormal rows in B, so that B Bᵀ = I (PFA-o).
        density: share of the entries of B and R that exist, above 0 and up to 1.
        seed: of B, R and their gaps.

    Raises:
        ValueError: ``expansion`` or ``density`` out of range, or an orthogonal B with gaps.
    """

    angle_name = "path_angle"

    def __init__(
        self, expansion: int | None = None, orthogonal: bool = False, density: float = 1.0, seed: int = 0
    ) -> None:
        super().__init__(seed)
        if expansion is None:
            expansion = 1 if orthogonal else 10
        if expansion < 1:
            raise ValueError(f"expansion is {expansion}, expected at least 1")
        if not 0 < density <= 1:
            raise ValueError(f"density is {density}, expected a number above 0 and up to 1")
        if orthogonal and density < 1:
            raise ValueError(
                f"orthogonal feedback has no gaps, and density is {density}: set it to 1, or orthogonal=false"
            )
        self.expansion = expansion
        self.orthogonal = orthogonal
        self.density = density

    @property
    def variant(self) -> str | None:
        """``orthogonal``, or ``None`` for a random B."""
        return "orthogonal" if self.orthogonal else None

    @property
    def broadcast(self) -> str:
        """The error, and what it travels through."""
        return "the error, through products of fixed and learned weights"

    @property
    def linear_optimizer(self) -> str:
        """R follows BᵀW because both take the same steps."""
        return (
            "product feedback alignment's R comes to equal BᵀW because both take the same steps and weight decay wears "
            "their difference away; steps that are scaled weight by weight are not the same"
        )

    def make(self, layer: Layer, weight: Tensor) -> FeedbackWeights:
        """B with E[B Bᵀ] = I, R Xavier-uniform; warns of a layer that runs more than once in a forward pass."""
        if layer.runs > 1:
            warnings.warn(
                f"layer {layer.name!r} runs {layer.runs} times in a forward pass: all of its runs send the error "
                "through one B and one R, which product feedback alignment was published without",
                stacklevel=2,
            )
        groups = 1 if layer.geometry is None else layer.geometry.groups
        fixed = fa.fixed_product_weights(len(weight), self.expansion, groups, self.density, self.orthogonal)
        learned = fa.xavier_uniform(weight.new_empty(self.expansion * len(weight), *weight.shape[1:]))
        mask = torch.rand_like(learned) < self.density if self.density < 1 else None
        fixed = fixed.to(weight.dtype).reshape(*fixed.shape, *[1] * (weight.ndim - 2))
        return FeedbackWeights(fixed, learned if mask is None else learned * mask, mask)

    def carrier(self) -> Carrier:
        """The chain through B and R."""
        return self._chain

    def path(self, name: str) -> Tensor:
        """B R."""
        geometry = self.layers[name].geometry
        return fa.product(self.weights(name).fixed, self._learned(name), 1 if geometry is None else geometry.groups)

    def _chain(self, name: str, call: Call) -> Tensor:
        fixed = self.weights(name).fixed
        return fa.carry_product(call.inputs, call.weight, call.bias, fixed, self._learned(name), call.geometry)

    def _learned(self, name: str) -> Tensor:
        """R, its gaps kept open whatever an optimizer does."""
        held = self.weights(name)
        return held.learned if held.mask is None else held.learned * held.mask
