"""How a layer's gradient is made of what it reads and answers in the two passes: a class per variant, an object per batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from locallearn.algorithms.base import Update
from locallearn.algorithms.pepita._layers import Layer
from locallearn.functional.pepita import Reduction

Gradients = dict[nn.Parameter, Tensor]


class Steps(ABC):
    """One batch.

    Args:
        reduction: over the positions of a convolution's map.
        original: multiply with what a layer read in the first pass.
        second_error: the output layer's own answer is that of the second pass.
    """

    linear_optimizer: ClassVar[str | None] = None
    """Why an optimizer that is not linear in its gradients would not do."""

    def __init__(self, reduction: Reduction, original: bool, second_error: bool) -> None:
        self._reduction, self._original, self._second_error = reduction, original, second_error
        self._kept: list[tuple[Tensor | None, Tensor]] = []  # what every layer read and answered, until its own update

    @abstractmethod
    def first(self, layer: Layer, pre: Tensor, post: Tensor) -> tuple[Update, ...]:
        """Take what a layer read and answered in the first pass; updates that are due at once."""

    @abstractmethod
    def second(self, layer: Layer, pre: Tensor, post: Tensor) -> Gradients:
        """Gradients of a layer from what it reads and answers in the second pass; of the readout, what it should answer."""


class Standard(Steps):
    """(h − h̃)ᵀ h̃₋₁, or with h₋₁."""

    def first(self, layer: Layer, pre: Tensor, post: Tensor) -> tuple[Update, ...]:
        """Keep the answer."""
        self._kept.append((pre if self._original else None, post))
        return ()

    def second(self, layer: Layer, pre: Tensor, post: Tensor) -> Gradients:
        """From the difference of the answers."""
        read, answered = self._kept.pop(0)
        if self._second_error and not self._kept:  # the output layer is the last one
            answered = layer.weights(pre).softmax(1)
        return layer.gradients(answered - post, pre if read is None else read, self._reduction)


class Hebbian(Steps):
    """hᵀ h₋₁ − h̃ᵀ h̃₋₁."""

    def first(self, layer: Layer, pre: Tensor, post: Tensor) -> tuple[Update, ...]:
        """Keep both."""
        self._kept.append((pre, post))
        return ()

    def second(self, layer: Layer, pre: Tensor, post: Tensor) -> Gradients:
        """From the difference of the products."""
        read, answered = self._kept.pop(0)
        assert read is not None
        gradients = layer.gradients(answered, read, self._reduction)
        for parameter, gradient in layer.gradients(post, pre, self._reduction).items():
            gradients[parameter].sub_(gradient)
        return gradients


class TimeLocal(Steps):
    """The same in two steps, one after each layer of each pass; nothing is kept."""

    linear_optimizer = "the time-local variant steps twice per batch, and only the sum of the two steps means anything"

    def first(self, layer: Layer, pre: Tensor, post: Tensor) -> tuple[Update, ...]:
        """The first of the two steps."""
        return (Update(layer.name, gradients=layer.gradients(post, pre, self._reduction)),)

    def second(self, layer: Layer, pre: Tensor, post: Tensor) -> Gradients:
        """The other one."""
        return layer.gradients(-post, pre, self._reduction)


STEPS: dict[str, type[Steps]] = {"standard": Standard, "hebbian": Hebbian, "time_local": TimeLocal}
"""By the name of the variant."""
