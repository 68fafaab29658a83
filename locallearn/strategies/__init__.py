"""Running an algorithm inside Lightning's Trainer."""

from locallearn.strategies.local import Diverged, LocalStrategy, LocalTask
from locallearn.strategies.muon import Muon
from locallearn.strategies.rates import constant_then_linear, multistep_with_first_decay
from locallearn.strategies.schedule import Schedule

__all__ = [
    "Diverged",
    "LocalStrategy",
    "LocalTask",
    "Muon",
    "Schedule",
    "constant_then_linear",
    "multistep_with_first_decay",
]
