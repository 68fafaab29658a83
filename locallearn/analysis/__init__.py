"""What trained networks represent: sparsity, ensembles, maps of activity, and likeness of layers.

Functions on tensors, for anybody's networks; :func:`representations` takes the tensors from what a rule of this project has
trained, and :func:`analyse` and :func:`similarity` say everything at once. Nothing here touches a model, its modes, its
gradients or any generator.
"""

from locallearn.analysis._collect import (
    Label,
    Representations,
    check_analysable,
    passes,
    representations,
)
from locallearn.analysis._ensembles import (
    ActivationMap,
    Activity,
    Sharing,
    activation_map,
    activity,
    class_means,
    ensembles,
    jaccard,
    overlaps,
    sharing,
)
from locallearn.analysis._similarity import BatchCKA, dissimilarities, linear_cka, rsa
from locallearn.analysis._sparsity import Sparsity, class_sparsity, hoyer, mean_sparsity, sparsity
from locallearn.analysis._summary import LayerStatistics, analyse, similarity

__all__ = [
    "ActivationMap",
    "Activity",
    "BatchCKA",
    "Label",
    "LayerStatistics",
    "Representations",
    "Sharing",
    "Sparsity",
    "activation_map",
    "activity",
    "analyse",
    "check_analysable",
    "class_means",
    "class_sparsity",
    "dissimilarities",
    "ensembles",
    "hoyer",
    "jaccard",
    "linear_cka",
    "mean_sparsity",
    "overlaps",
    "passes",
    "representations",
    "rsa",
    "sharing",
    "similarity",
    "sparsity",
]
