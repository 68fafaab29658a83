"""``locallearn data``: which data sets are here."""

from __future__ import annotations

from locallearn.cli.plans import folder_setting
from locallearn.cli.settings import compose_settings
from locallearn.cli.terminal import printing


def data(words: list[str]) -> int:
    """List the data sets and where their files lie."""
    from rich.table import Table

    from locallearn.tasks.graphs import graph_status
    from locallearn.tasks.images import data_status, default_data_dir

    cfg, _ = compose_settings(words)
    folder = default_data_dir() if cfg.data_dir is None else folder_setting(cfg, "data_dir")
    table = Table(title=f"data sets in {folder}", title_justify="left")
    for heading in ("dataset", "here", "files", "in"):
        table.add_column(heading, overflow="fold")
    for row in (*data_status(folder), *graph_status(folder)):
        place = "" if row.path is None else str(row.path.relative_to(folder))
        table.add_row(row.name, "yes" if row.present else "no", ", ".join(row.files) or "come with a package", place)
    printing().print(table)
    return 0
