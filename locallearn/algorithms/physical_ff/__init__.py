"""Learning between black boxes: contrastive goodness (PhyLL), or fixed prototypes and differences (FFzero)."""

from locallearn.algorithms.physical_ff._ffzero import FFZero
from locallearn.algorithms.physical_ff._phyll import PhyLL
from locallearn.algorithms.physical_ff._rule import PhysicalFF

__all__ = ["FFZero", "PhyLL", "PhysicalFF"]
