"""Networks as ordered blocks."""

from locallearn.nets.autoencoder import autoencoder
from locallearn.nets.blocks import Blocks
from locallearn.nets.feedforward import cafo_cnn, cnn, initialise, mlp
from locallearn.nets.graph import gnn
__all__ = [
    "Blocks",
    "LocallyConnected2d",
    "autoencoder",
    "cafo_cnn",
    "cnn",
    "gnn",
    "initialise",
    "locally_connected",
    "mlp",
    "resnet",
    "resnet18",
]
