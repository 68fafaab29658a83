"""Numbers over seeds: means, intervals, paired comparisons with the baseline, and the table of all of them."""

from locallearn.statistics._identity import age
from locallearn.statistics._inference import (
    PairedDifference,
    Summary,
    holm,
    paired,
    sign_flip_p,
    smallest_p,
    summarise,
    t_interval,
)
from locallearn.statistics._rows import Arrivals, Figure, Row, elsewhere, labelled
from locallearn.statistics._table import compare_table, is_cost, longest_stage, machine_bound, own_figure

__all__ = [
    "Arrivals",
    "Figure",
    "PairedDifference",
    "Row",
    "Summary",
    "age",
    "compare_table",
    "elsewhere",
    "holm",
    "is_cost",
    "labelled",
    "longest_stage",
    "machine_bound",
    "own_figure",
    "paired",
    "sign_flip_p",
    "smallest_p",
    "summarise",
    "t_interval",
]
