"""PEPITA: a second forward pass on an input that the error has changed tells every layer what to learn.

``_steps`` holds what the variants differ in, ``_layers`` takes blocks apart.
"""

from locallearn.algorithms.pepita._rule import Pepita

__all__ = ["Pepita"]
