"""Graph data on disk: what each set is, where its files lie, and reading them through torch_geometric."""

from __future__ import annotations

import contextlib
import http.client
import io
import shutil
import tempfile
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from locallearn.tasks._digests import check_file
from locallearn.tasks._image_files import (
    CONNECT_TIMEOUT_S,
    DataMissing,
    DataStatus,
    default_data_dir,
    move_in,
    reason,
)


@dataclass(frozen=True)
class GraphFacts:
    """What is known of a graph without reading it.

    Attributes:
        nodes: number of nodes.
        features: entries of a node's feature vector.
        classes: number of classes; labels are ``0 … classes - 1``.
        reader: name of the class in ``torch_geometric.datasets`` that reads it, and its arguments after ``root``.
        root: that class's ``root`` below ``data_dir/graphs``; ``None`` where the graph comes with the package.
        folder: where the raw files lie below ``root``.
        files: names of the raw files.
        url: folder on the web that holds the raw files.
    """

    nodes: int
    features: int
    classes: int
    reader: tuple[str, ...]
    root: str | None = None
    folder: str = ""
    files: tuple[str, ...] = ()
    url: str = ""


def _citation(nodes: int, features: int, classes: int, name: str) -> GraphFacts:
    url = "https://github.com/abojchevski/graph2gauss/raw/master/data"
    reader = ("CitationFull", name)
    return GraphFacts(nodes, features, classes, reader, "CitationFull", f"{name}/raw", (f"{name}.npz",), url)


def _planetoid(nodes: int, features: int, classes: int, name: str) -> GraphFacts:
    parts = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
    files = tuple(f"ind.{name.lower()}.{part}" for part in parts)
    url = "https://github.com/kimiyoung/planetoid/raw/master/data"
    return GraphFacts(nodes, features, classes, ("Planetoid", name), "Planetoid", f"{name}/raw", files, url)


GRAPHS: Mapping[str, GraphFacts] = MappingProxyType(
    {
        "karate_club": GraphFacts(34, 34, 4, ("KarateClub",)),
        "cora_ml": _citation(2995, 2879, 7, "cora_ml"),
        "citeseer": _citation(4230, 602, 6, "citeseer"),
        "pubmed": _citation(19_717, 500, 3, "pubmed"),
        "photo": GraphFacts(
            7650,
            745,
            8,
            ("Amazon", "Photo"),
            "Amazon",
            "Photo/raw",
            ("amazon_electronics_photo.npz",),
            "https://github.com/shchur/gnn-benchmark/raw/master/data/npz",
        ),
        "github": GraphFacts(
            37_700, 128, 2, ("GitHub",), "GitHub", "raw", ("github.npz",), "https://graphmining.ai/datasets/ptg"
        ),
        "planetoid_cora": _planetoid(2708, 1433, 7, "Cora"),
        "planetoid_citeseer": _planetoid(3327, 3703, 6, "CiteSeer"),
        "planetoid_pubmed": _planetoid(19_717, 500, 3, "PubMed"),
    }
)


def graph_facts(name: str) -> GraphFacts:
    """Look up a graph.

    Raises:
        ValueError: for an unknown name; the sentence lists the known ones.
    """
    if name not in GRAPHS:
        raise ValueError(
            f"There is no graph called {name!r}; choose one of {', '.join(GRAPHS)}, or give your own as graph or path."
        )
    return GRAPHS[name]


def load_graph(name: str, data_dir: Path | str | None = None) -> Any:
    """Read a graph with torch_geometric's own class, downloading its files first where they are missing.

    That class writes what it has processed beside what it reads, so it is given a private copy of the raw files:
    ``data_dir`` is only written to, and only created, when a download has succeeded.

    Args:
        name: one of ``GRAPHS``.
        data_dir: folder that holds ``graphs/``; ``None`` means ``default_data_dir()``.

    Returns:
        A ``torch_geometric.data.Data`` with ``x``, ``y`` and ``edge_index``; features of the npz sets are 0 and 1.

    Raises:
        ValueError: for an unknown name, files that are not those of this graph (their digests are known), or that cannot be
            read.
        DataMissing: when files are missing and cannot be downloaded.
    """
    facts = graph_facts(name)
    if facts.root is None:
        with quiet_geometric() as geometric:
            return getattr(geometric.datasets, facts.reader[0])()[0]
    folder = _folder(facts, data_dir)
    _ensure_files(name, facts, folder)
    return _read(name, facts, folder)


def graph_status(data_dir: Path | str | None = None) -> list[DataStatus]:
    """Say which graphs are there, one row for each of ``GRAPHS``; nothing is read, downloaded or written.

    Args:
        data_dir: as for ``load_graph``.
    """
    rows = []
    for name, facts in GRAPHS.items():
        if facts.root is None:
            rows.append(DataStatus(name, present=True, files=(), path=None, size_bytes=None))
            continue
        folder = _folder(facts, data_dir)
        present = not _missing(facts, folder)
        size = sum((folder / file).stat().st_size for file in facts.files) if present else None
        rows.append(DataStatus(name, present, facts.files, folder, size))
    return rows


@contextlib.contextmanager
def quiet_geometric() -> Iterator[Any]:
    """Import ``torch_geometric`` here, seconds that only graphs pay for, and keep its warnings and notes to itself."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        import torch_geometric
        import torch_geometric.datasets
        import torch_geometric.transforms

        yield torch_geometric


def _folder(facts: GraphFacts, data_dir: Path | str | None) -> Path:
    root = default_data_dir() if data_dir is None else Path(data_dir).expanduser()
    return root / "graphs" / str(facts.root) / facts.folder


def _place(facts: GraphFacts, file: str) -> str:
    """Where a raw file lies below ``data_dir``."""
    return f"graphs/{facts.root}/{facts.folder}/{file}"


def _missing(facts: GraphFacts, folder: Path) -> list[str]:
    return [file for file in facts.files if not (folder / file).is_file()]


def _read(name: str, facts: GraphFacts, folder: Path) -> Any:
    reader, *arguments = facts.reader
    with tempfile.TemporaryDirectory() as scratch, quiet_geometric() as geometric:
        raw = Path(scratch) / facts.folder
        raw.mkdir(parents=True)
        try:
            for file in facts.files:
                shutil.copyfile(folder / file, raw / file)
                check_file(raw / file, _place(facts, file))
            data = getattr(geometric.datasets, reader)(scratch, *arguments)[0]
            found = (data.num_nodes, data.num_node_features, int(data.y.max()) + 1)
        except Exception as error:  # whatever a reader of somebody else's makes of damaged files
            raise ValueError(
                f"The files in {folder} cannot be read as {name} ({reason(error)}); delete them so that they are"
                " downloaded again, or put sound copies there."
            ) from error
    if found != (facts.nodes, facts.features, facts.classes):
        raise ValueError(
            f"The files in {folder} hold {found[0]} nodes, {found[1]} features and {found[2]} classes, but {name} has"
            f" {facts.nodes}, {facts.features} and {facts.classes}: put the right files there."
        )
    return data


def _ensure_files(name: str, facts: GraphFacts, folder: Path) -> None:
    missing = _missing(facts, folder)
    if not missing:
        return
    try:
        # Downloaded aside and moved in whole, so that a broken download leaves neither half a file nor an empty folder.
        with tempfile.TemporaryDirectory() as scratch:
            for file in missing:
                _download(f"{facts.url}/{file}", Path(scratch) / file)
                check_file(Path(scratch) / file, _place(facts, file))
            folder.mkdir(parents=True, exist_ok=True)
            for file in missing:
                move_in(Path(scratch) / file, folder / file)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DataMissing(
            f"The files of {name} are not in {folder} and could not be fetched ({reason(error)}): put"
            f" {', '.join(facts.files)} there, or point LOCALLEARN_DATA or data_dir at a folder that holds"
            f" graphs/{facts.root}/{facts.folder} with them."
        ) from error


def _download(url: str, target: Path) -> None:
    # Not torch_geometric's own download: it has no timeout, takes any certificate, and may leave half a file behind.
    with urllib.request.urlopen(url, timeout=CONNECT_TIMEOUT_S) as answer, target.open("wb") as file:
        shutil.copyfileobj(answer, file)
