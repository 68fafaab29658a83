"""Running an algorithm inside Lightning's Trainer."""

from locallearn.strategies.local import Diverged, LocalStrategy, LocalTask
from locallearn.strategies.schedule import Schedule

__all__ = ["Diverged", "LocalStrategy", "LocalTask", "Schedule"]
