"""Counter-current learning: a second network runs from the labels towards the data, and every layer meets its partner.

``_pairs`` holds what tasks with classes and tasks with images differ in, ``_mirror`` makes the second network.
"""

from locallearn.algorithms.counter_current._rule import CounterCurrent

__all__ = ["CounterCurrent"]
