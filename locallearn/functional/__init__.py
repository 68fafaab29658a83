"""The equations of the learning rules as pure functions, one module per rule, named as in the papers."""

from locallearn.functional import forward_forward, mono_forward

__all__ = ["forward_forward", "mono_forward"]
