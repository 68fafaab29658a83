"""ForwardGNN: every layer of a graph network learns on its own, on a graph that has been made to show the labels.

:class:`ForwardGNN` is the frame, and makes the class of the variant that it is asked for. ``_views`` is what all of them see
of a graph, ``_checks`` what they refuse.
"""

from locallearn.algorithms.forward_gnn._frame import ForwardGNN, Variant
from locallearn.algorithms.forward_gnn._links import Links, LoudLinks
from locallearn.algorithms.forward_gnn._nodes import ForwardForward, LabelColumns, SingleForward
from locallearn.algorithms.forward_gnn._top_down import LinksTopToInput, SingleForwardTopToInput, TopToLoss

__all__ = ["ForwardGNN", "Variant"]

ForwardGNN.kinds = {
    "sf": SingleForward,
    "ff_la": LabelColumns,
    "ff_vn": ForwardForward,
    "sf_top_to_loss": TopToLoss,
    "sf_top_to_input": SingleForwardTopToInput,
    "ce": Links,
    "ff": LoudLinks,
    "ce_top_to_input": LinksTopToInput,
}
