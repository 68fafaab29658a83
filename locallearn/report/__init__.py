"""From records to what people read: one self-contained HTML page, and a table for the terminal."""

from locallearn.report._page import write_report
from locallearn.report._terminal import terminal_table

__all__ = ["terminal_table", "write_report"]
