"""Learning rules: one module each, the base class, and the frame of the layer-local ones."""

from locallearn.algorithms.backprop import Backprop, DeepSupervision
from locallearn.algorithms.base import Algorithm, Locality, ParamGroup, TaskInfo, Update, selected
from locallearn.algorithms.forward_forward import ForwardForward
from locallearn.algorithms.layer_local import LayerLocal
from locallearn.algorithms.mono_forward import MonoForward

__all__ = [
    "Algorithm",
    "Backprop",
    "DeepSupervision",
    "ForwardForward",
    "LayerLocal",
    "Locality",
    "MonoForward",
    "ParamGroup",
    "TaskInfo",
    "Update",
    "selected",
]
