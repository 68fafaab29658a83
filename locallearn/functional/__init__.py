"""The equations of the learning rules as pure functions, one module per rule, named as in the papers."""

from locallearn.functional import (
    cafo,
    channelwise,
    counter_current,
    emergent,
    feedback_alignment,
    ffzero,
    forward_forward,
    forward_gnn,
    forward_gradient,
    layer_collaboration,
    local_heads,
    mono_forward,
    pepita,
    physical_ff,
    scalable_ff,
    symba,
)

__all__ = [
    "cafo",
    "channelwise",
    "counter_current",
    "emergent",
    "feedback_alignment",
    "ffzero",
    "forward_forward",
    "forward_gnn",
    "forward_gradient",
    "layer_collaboration",
    "local_heads",
    "mono_forward",
    "pepita",
    "physical_ff",
    "scalable_ff",
    "symba",
]
