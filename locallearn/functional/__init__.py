"""The equations of the learning rules as pure functions, one module per rule, named as in the papers."""

from locallearn.functional import (
    counter_current,
    feedback_alignment,
    forward_forward,
    forward_gnn,
    local_heads,
    mono_forward,
    pepita,
    scalable_ff,
)

__all__ = [
    "counter_current",
    "feedback_alignment",
    "forward_forward",
    "forward_gnn",
    "local_heads",
    "mono_forward",
    "pepita",
    "scalable_ff",
]
