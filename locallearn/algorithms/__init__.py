"""Learning rules: one module each, the base class, and the frame of the layer-local ones."""

from locallearn.algorithms.backprop import Backprop
from locallearn.algorithms.backprop_l1 import BackpropL1
from locallearn.algorithms.base import Algorithm, Locality, ParamGroup, TaskInfo, Update, selected
from locallearn.algorithms.bp_ff import BackpropForwardForward
from locallearn.algorithms.cafo import CaFo
from locallearn.algorithms.counter_current import CounterCurrent
from locallearn.algorithms.deep_supervision import DeepSupervision
from locallearn.algorithms.feedback_alignment import FeedbackAlignment
from locallearn.algorithms.forward_forward import ForwardForward
from locallearn.algorithms.forward_gnn import ForwardGNN
from locallearn.algorithms.forward_gradient import ForwardGradient
from locallearn.algorithms.forward_projection import ForwardProjection
from locallearn.algorithms.layer_collaboration import LayerCollaboration
from locallearn.algorithms.layer_local import LayerLocal
from locallearn.algorithms.local_heads import LocalHeads
from locallearn.algorithms.man import MAN
from locallearn.algorithms.mono_forward import MonoForward
from locallearn.algorithms.pepita import Pepita
from locallearn.algorithms.physical_ff import PhysicalFF
from locallearn.algorithms.product_feedback_alignment import ProductFeedbackAlignment
from locallearn.algorithms.ridge import Ridge
from locallearn.algorithms.scalable_ff import ScalableForwardForward
from locallearn.algorithms.zeroth_order import ZerothOrder

__all__ = [
    "MAN",
    "Algorithm",
    "Backprop",
    "BackpropForwardForward",
    "BackpropL1",
    "CaFo",
    "CounterCurrent",
    "DeepSupervision",
    "FeedbackAlignment",
    "ForwardForward",
    "ForwardGNN",
    "ForwardGradient",
    "ForwardProjection",
    "LayerCollaboration",
    "LayerLocal",
    "LocalHeads",
    "Locality",
    "MonoForward",
    "ParamGroup",
    "Pepita",
    "PhysicalFF",
    "ProductFeedbackAlignment",
    "Ridge",
    "ScalableForwardForward",
    "TaskInfo",
    "Update",
    "ZerothOrder",
    "selected",
]
