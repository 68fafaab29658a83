"""Forward gradients: the network learns from directional derivatives, which a forward pass has, along random directions."""

from locallearn.algorithms.forward_gradient._rule import ForwardGradient

__all__ = ["ForwardGradient"]
