"""Zeroth order: the network learns from losses at weights that were moved at random; nothing is ever differentiated."""

from locallearn.algorithms.zeroth_order._rule import ZerothOrder

__all__ = ["ZerothOrder"]
