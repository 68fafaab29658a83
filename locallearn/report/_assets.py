"""The page's style sheet and its script, kept as files of their own kind."""

from __future__ import annotations

from importlib.resources import files

STYLE = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
SCRIPT = files(__package__).joinpath("page.js").read_text(encoding="utf-8")
PLAIN = """
.off{display:table-cell}[data-choice][hidden]{display:block!important}
table.short tbody tr{display:table-row!important}.chart,button.all{display:none}
"""
"""Of a browser that runs no scripts: everything is to be seen that a script would open."""
