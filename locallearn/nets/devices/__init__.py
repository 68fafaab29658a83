"""Black boxes between the layers of a network: what they are asked by, and simulations of some.

A device is any callable ``x (B, m) -> y (B, r)`` of NumPy arrays. Nothing is known of its inside.
"""

from locallearn.nets.devices._layer import Measured, PhysicalLayer
from locallearn.nets.devices._maps import Optical, Scatterer
from locallearn.nets.devices._simulation import SimulatedDevice, Simulation
from locallearn.nets.devices._twin import Twin

__all__ = ["Measured", "Optical", "PhysicalLayer", "Scatterer", "SimulatedDevice", "Simulation", "Twin"]
