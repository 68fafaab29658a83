"""Networks as ordered blocks."""

from locallearn.nets.autoencoder import autoencoder
from locallearn.nets.blocks import Blocks
from locallearn.nets.devices import PhysicalLayer
from locallearn.nets.feedforward import cafo_cnn, cnn, forward_projection_cnn, initialise, mlp
from locallearn.nets.graph import gnn
from locallearn.nets.local_mixer import local_mixer
from locallearn.nets.locally_connected import LocallyConnected2d, locally_connected
from locallearn.nets.physical import physical
from locallearn.nets.residual import resnet, resnet18
from locallearn.nets.transformer import char_transformer, vit
from locallearn.nets.vgg import vgg8b, vgg11b

__all__ = [
    "Blocks",
    "LocallyConnected2d",
    "PhysicalLayer",
    "autoencoder",
    "cafo_cnn",
    "char_transformer",
    "cnn",
    "forward_projection_cnn",
    "gnn",
    "initialise",
    "local_mixer",
    "locally_connected",
    "mlp",
    "physical",
    "resnet",
    "resnet18",
    "vgg8b",
    "vgg11b",
    "vit",
]
