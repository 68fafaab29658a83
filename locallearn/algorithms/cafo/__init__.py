"""Cascaded Forward: what a block is (frozen or trained by direct feedback) and what its predictor is are parts."""

from locallearn.algorithms.cafo._rule import CaFo

__all__ = ["CaFo"]
