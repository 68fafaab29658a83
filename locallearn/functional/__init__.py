"""The equations of the learning rules as pure functions, one module per rule, named as in the papers."""

from locallearn.functional import (
    cafo,
    channelwise,
    counter_current,
    counter_noise,
    emergent,
    feedback_alignment,
    forward_forward,
    forward_gnn,
    forward_gradient,
    layer_collaboration,
    local_heads,
    mono_forward,
    pepita,
    scalable_ff,
    symba,
    zeroth_order,
)

__all__ = [
    "cafo",
    "channelwise",
    "counter_current",
    "counter_noise",
    "emergent",
    "feedback_alignment",
    "forward_forward",
    "forward_gnn",
    "forward_gradient",
    "layer_collaboration",
    "local_heads",
    "mono_forward",
    "pepita",
    "scalable_ff",
    "symba",
    "zeroth_order",
]
