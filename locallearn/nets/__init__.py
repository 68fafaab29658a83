"""Networks as ordered blocks."""

from locallearn.nets.autoencoder import autoencoder
from locallearn.nets.blocks import Blocks
from locallearn.nets.devices import PhysicalLayer
from locallearn.nets.feedforward import cafo_cnn, cnn, initialise, mlp
from locallearn.nets.graph import gnn
from locallearn.nets.locally_connected import LocallyConnected2d, locally_connected
from locallearn.nets.physical import physical
from locallearn.nets.residual import resnet, resnet18
from locallearn.nets.transformer import vit
from locallearn.nets.vgg import vgg8b, vgg11b

__all__ = [
    "Blocks",
    "LocallyConnected2d",
    "PhysicalLayer",
    "autoencoder",
    "cafo_cnn",
    "cnn",
    "gnn",
    "initialise",
    "locally_connected",
    "mlp",
    "physical",
    "resnet",
    "resnet18",
    "vgg8b",
    "vgg11b",
    "vit",
]
