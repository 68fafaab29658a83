"""From records to what people read: one self-contained HTML page, a table for the terminal, tables for papers."""

from locallearn.report._comparison import comparison_table, figures_table, write_comparison
from locallearn.report._page import check_place, write_report
from locallearn.report._terminal import terminal_table

__all__ = ["check_place", "comparison_table", "figures_table", "terminal_table", "write_comparison", "write_report"]
