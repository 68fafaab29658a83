"""Replace layers of a trained network by smaller ones, layer by layer, in closed form."""

from locallearn.distillation._fit import (
    METHODS,
    PENALTIES,
    Distiller,
    Fit,
    Inputs,
    Method,
    Recipe,
    check_distillation,
)
from locallearn.distillation._kept import load_student, packed
from locallearn.distillation._moments import Moments
from locallearn.distillation._sites import Predict, Site, find_sites, install, replaced

__all__ = [
    "METHODS",
    "PENALTIES",
    "Distiller",
    "Fit",
    "Inputs",
    "Method",
    "Moments",
    "Predict",
    "Recipe",
    "Site",
    "check_distillation",
    "find_sites",
    "install",
    "load_student",
    "packed",
    "replaced",
]
