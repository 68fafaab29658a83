"""Networks as ordered blocks."""

from locallearn.nets.autoencoder import autoencoder
from locallearn.nets.blocks import Blocks
from locallearn.nets.feedforward import cnn, initialise, mlp
from locallearn.nets.graph import gnn
from locallearn.nets.locally_connected import LocallyConnected2d, locally_connected
from locallearn.nets.residual import resnet

__all__ = [
    "Blocks",
    "LocallyConnected2d",
    "autoencoder",
    "cnn",
    "gnn",
    "initialise",
    "locally_connected",
    "mlp",
    "resnet",
]
