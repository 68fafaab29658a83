"""The Forward-Forward line: one frame, and a class for every kind of data and loss.

``ForwardForward(...)`` makes the kind that its options ask for.
"""

from locallearn.algorithms.forward_forward.frame import LabelledGoodness
from locallearn.algorithms.forward_forward.supervised import ForwardForward

__all__ = ["ForwardForward", "LabelledGoodness"]
