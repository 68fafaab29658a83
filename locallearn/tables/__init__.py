"""Tables as text: rows in, CSV, Markdown, LaTeX or JSON out. Knows nothing of runs.

Example:
    >>> from locallearn.tables import Cell, Column, Line, Table, render
    >>> table = Table(
    ...     "digits",
    ...     [Column("rule", "Rule"), Column("accuracy", "Accuracy", "%", numeric=True)],
    ...     [Line(["backprop", Cell(0.972, "97.2 ± 1.1")], notes=("Seed 3 failed.",)), Line(["pepita", None])],
    ... )
    >>> print(render(table, "csv"), end="")
    rule,accuracy,notes
    backprop,0.972,Seed 3 failed.
    pepita,,
"""

from locallearn.tables._latex import escaped
from locallearn.tables._numbers import plus_minus, range_text
from locallearn.tables._table import Cell, Column, Line, Table, Value
from locallearn.tables._write import FORMATS, check_place, kind_of, render, write

__all__ = [
    "FORMATS",
    "Cell",
    "Column",
    "Line",
    "Table",
    "Value",
    "check_place",
    "escaped",
    "kind_of",
    "plus_minus",
    "range_text",
    "render",
    "write",
]
