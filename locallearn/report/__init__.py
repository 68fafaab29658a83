"""From records to what people read: one self-contained HTML page, and a table for the terminal."""

from locallearn.report._page import check_place, write_report
from locallearn.report._terminal import terminal_table

__all__ = ["check_place", "terminal_table", "write_report"]
