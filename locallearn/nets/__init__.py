"""Networks as ordered blocks."""

from locallearn.nets.autoencoder import autoencoder
from locallearn.nets.blocks import Blocks
from locallearn.nets.feedforward import cnn, initialise, mlp
from locallearn.nets.graph import gnn
from locallearn.nets.residual import resnet

__all__ = ["Blocks", "autoencoder", "cnn", "gnn", "initialise", "mlp", "resnet"]
