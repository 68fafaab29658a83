"""Networks as ordered blocks."""

from locallearn.nets.blocks import Blocks
from locallearn.nets.feedforward import cnn, initialise, mlp

__all__ = ["Blocks", "cnn", "initialise", "mlp"]
