"""The equations of the learning rules as pure functions, one module per rule, named as in the papers."""

from locallearn.functional import (
    channelwise,
    counter_current,
    feedback_alignment,
    forward_forward,
    forward_gnn,
    layer_collaboration,
    mono_forward,
    pepita,
    symba,
)

__all__ = [
    "channelwise",
    "counter_current",
    "feedback_alignment",
    "forward_forward",
    "forward_gnn",
    "layer_collaboration",
    "mono_forward",
    "pepita",
    "symba",
]
