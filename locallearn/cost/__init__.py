"""What learning costs: operations of a step and of what is done once, and bytes kept alive."""

from locallearn.cost._bytes import ActivationBytes, activation_bytes, bytes_of, cache_bytes, working_bytes
from locallearn.cost._flops import FlopCounter, counting
from locallearn.cost._update import (
    StageCost,
    UpdateCost,
    drive,
    measure_update,
    optimizer_bytes,
    to_device,
    undisturbed,
)

__all__ = [
    "ActivationBytes",
    "FlopCounter",
    "StageCost",
    "UpdateCost",
    "activation_bytes",
    "bytes_of",
    "cache_bytes",
    "counting",
    "drive",
    "measure_update",
    "optimizer_bytes",
    "to_device",
    "undisturbed",
    "working_bytes",
]
