"""Train neural networks without backpropagating an error through the whole network, and measure what that costs.

``import locallearn`` brings PyTorch and nothing else: Lightning, Hydra and the meters are imported by the modules that
use them.
"""

from locallearn.batch import Batch
from locallearn.nets.blocks import Blocks

__version__ = "0.1.0"

__all__ = ["Batch", "Blocks", "__version__"]
