"""Any network under a local rule in one call, and what that is made of.

``_localize`` puts the other rooms together: ``_where`` (places to cut), ``_attach`` (rule and network) and ``_object`` (the
steps). ``_factories`` serves the command line.
"""

from locallearn.local._attach import attach_cut
from locallearn.local._factories import factory, torchvision
from locallearn.local._localize import localize
from locallearn.local._object import Local
from locallearn.local._where import Cuts, balanced, bytes_in, show

__all__ = ["Cuts", "Local", "attach_cut", "balanced", "bytes_in", "factory", "localize", "show", "torchvision"]
