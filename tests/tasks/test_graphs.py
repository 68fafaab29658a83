"""Graph data: files, splits, hidden labels, sampled neighbourhoods, and the task of classifying nodes."""

from __future__ import annotations

import io
import os
import re
import urllib.error
import urllib.request
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sklearn.model_selection import KFold, train_test_split
from torch import Tensor, nn

from locallearn.algorithms import Backprop, ForwardGNN, MonoForward
from locallearn.batch import Batch
from locallearn.nets import Blocks
from locallearn.strategies import LocalStrategy
from locallearn.tasks import _digests
from locallearn.tasks._digests import DIGESTS
from locallearn.tasks.classification import Classification, NodeClassification
from locallearn.tasks.graphs import (
    GRAPHS,
    DataMissing,
    GeneratedGraph,
    GraphData,
    NeighbourLoader,
    NeighbourSampler,
    graph_status,
    load_graph,
    published_split,
)
from tests.tasks.conftest import quiet_trainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of third parties, on import
    from torch_geometric.data import Data
    from torch_geometric.datasets import KarateClub
    from torch_geometric.nn import GCNConv, SAGEConv
    from torch_geometric.transforms import NormalizeFeatures

CONF = Path(__file__).parents[2] / "conf"
FILE_SETS = [name for name, facts in GRAPHS.items() if facts.files]
# Directed edges as torch_geometric's documentation counts them; sizes of training, validation and test in the last split.
PUBLISHED = {
    "karate_club": (156, (4, 15, 15)),
    "cora_ml": (16_316, (1916, 480, 599)),
    "citeseer": (10_674, (2707, 677, 846)),
    "pubmed": (88_648, (12_619, 3155, 3943)),
    "photo": (238_162, (4896, 1224, 1530)),
    "github": (578_006, (24_128, 6032, 7540)),
    "planetoid_cora": (10_556, (140, 500, 1000)),
    "planetoid_citeseer": (9104, (120, 500, 1000)),
    "planetoid_pubmed": (88_648, (60, 500, 1000)),
}


def _graph(nodes: int = 60, features: int = 8, classes: int = 3, degree: float = 6.0, **more: Any) -> Any:
    return GeneratedGraph(nodes, degree, features, classes, noise=1.0, **more).data()


def _rows(batch: Batch) -> Tensor:
    assert batch.rows is not None
    return batch.rows


# Files


def _citeseer() -> bytes:
    """A made-up file in the format of CitationFull, of CiteSeer's sizes: a ring of nodes of class i mod 6."""
    nodes, features = 4230, 602
    here = np.arange(nodes)
    ring = sp.csr_matrix((np.ones(nodes), (here, (here + 1) % nodes)), shape=(nodes, nodes))
    words = sp.csr_matrix((np.full(nodes, 7.0), (here, here % features)), shape=(nodes, features))
    parts = {
        f"{name}_{part}": getattr(matrix, part)
        for name, matrix in (("adj", ring), ("attr", words))
        for part in ("data", "indices", "indptr", "shape")
    }
    file = io.BytesIO()
    np.savez(file, **parts, labels=here % 6)
    return file.getvalue()


_CITESEER = "graphs/CitationFull/citeseer/raw/citeseer.npz"


@pytest.fixture
def citeseer_dir(tmp_path: Path, known: Callable[[Mapping[str, bytes]], None]) -> Path:
    known({_CITESEER: _citeseer()})
    folder = tmp_path / "data" / "graphs" / "CitationFull" / "citeseer" / "raw"
    folder.mkdir(parents=True)
    (folder / "citeseer.npz").write_bytes(_citeseer())
    return tmp_path / "data"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """Make every connection fail at once; returns the timeouts that were asked for."""
    timeouts: list[float | None] = []

    def refuse(url: str, timeout: float | None = None) -> None:
        timeouts.append(timeout)
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return timeouts


def _snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}


def test_reads_from_a_folder_that_cannot_be_written_to(citeseer_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folders = [citeseer_dir, *(path for path in citeseer_dir.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    before = _snapshot(citeseer_dir)
    try:
        data = load_graph("citeseer", citeseer_dir)
        # Root may write anywhere, so what was written is looked at too.
        assert _snapshot(citeseer_dir) == before
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert data.y.tolist() == [i % 6 for i in range(4230)]
    assert data.num_edges == 2 * 4230
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", FILE_SETS)
def test_missing_files_are_named_in_one_sentence(name: str, tmp_path: Path, no_network: list[float | None]) -> None:
    with pytest.raises(DataMissing) as caught:
        GraphData(name, tmp_path / "absent").setup()
    message = str(caught.value)
    facts = GRAPHS[name]
    for file in facts.files:
        assert file in message
    assert str(tmp_path / "absent" / "graphs" / str(facts.root) / facts.folder) in message
    assert "no network" in message
    assert "LOCALLEARN_DATA" in message
    assert "\n" not in message
    assert not (tmp_path / "absent").exists()
    assert no_network
    assert all(timeout is not None and timeout <= 10 for timeout in no_network)


def test_missing_files_are_downloaded_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: Callable[[Mapping[str, bytes]], None]
) -> None:
    known({_CITESEER: _citeseer()})
    asked: list[str] = []

    class Cut(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise ConnectionResetError("cut short")

    def answer(stream: Callable[[bytes], io.BytesIO], url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        return stream(_citeseer())

    monkeypatch.setattr(urllib.request, "urlopen", partial(answer, Cut))
    with pytest.raises(DataMissing, match="cut short"):
        load_graph("citeseer", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(urllib.request, "urlopen", partial(answer, io.BytesIO))
    assert load_graph("citeseer", tmp_path / "new").num_nodes == 4230
    load_graph("citeseer", tmp_path / "new")
    assert asked == ["https://github.com/abojchevski/graph2gauss/raw/master/data/citeseer.npz"] * 2


def test_damaged_files_and_files_of_another_graph_are_told_in_one_sentence(
    citeseer_dir: Path, known: Callable[[Mapping[str, bytes]], None]
) -> None:
    folder = citeseer_dir / "graphs" / "CitationFull" / "citeseer" / "raw"
    (folder / "citeseer.npz").write_bytes(b"PK not a zip file")
    with pytest.raises(ValueError, match=re.escape(f"The files in {folder} cannot be read as citeseer")) as caught:
        load_graph("citeseer", citeseer_dir)
    assert "\n" not in str(caught.value)
    other = citeseer_dir / "graphs" / "CitationFull" / "cora_ml" / "raw"
    other.mkdir(parents=True)
    (other / "cora_ml.npz").write_bytes(_citeseer())
    with pytest.raises(
        ValueError, match=r"cora_ml\.npz is another file: expected Git SHA-1 2df67d57d5c3\.\.\. or SHA-256 ffbe"
    ):
        load_graph("cora_ml", citeseer_dir)
    known({"graphs/CitationFull/cora_ml/raw/cora_ml.npz": _citeseer()})
    with pytest.raises(
        ValueError, match="hold 4230 nodes, 602 features and 6 classes, but cora_ml has 2995, 2879 and 7"
    ):
        load_graph("cora_ml", citeseer_dir)


def test_another_download_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(_citeseer()))
    with pytest.raises(DataMissing, match=r"citeseer\.npz is another file"):
        load_graph("citeseer", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("objects", [True, False])
def test_a_file_that_nobody_knows_is_read_only_if_it_cannot_run_code(objects: bool, tmp_path: Path) -> None:
    folder = tmp_path / "graphs" / "GitHub" / "raw"
    folder.mkdir(parents=True)
    edges = np.array([[0, 1]], dtype=object if objects else np.int64)
    np.savez(folder / "github.npz", features=np.ones((2, 3)), target=np.array([0, 1]), edges=edges)
    message = "github.npz holds pickled objects" if objects else "hold 2 nodes, 3 features and 2 classes"
    with pytest.raises(ValueError, match=message):
        load_graph("github", tmp_path)


def test_every_file_of_every_graph_but_one_is_known() -> None:
    places = {f"graphs/{f.root}/{f.folder}/{file}" for f in GRAPHS.values() for file in f.files}
    assert places - set(DIGESTS) == {"graphs/GitHub/raw/github.npz"}
    assert all(
        re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", digest) for place in places for digest in DIGESTS.get(place, ())
    )


def test_git_digests_are_those_of_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # printf 'what is up, doc?' | git hash-object --stdin, from the Pro Git book
    (tmp_path / "file").write_bytes(b"what is up, doc?")
    monkeypatch.setattr(_digests, "DIGESTS", {"here": ("bd9dbf5aae1a3862dd1526723246b20206e5fc37",)})
    _digests.check_file(tmp_path / "file", "here")
    (tmp_path / "file").write_bytes(b"what is up, doc!")
    with pytest.raises(ValueError, match="another file: expected Git SHA-1 bd9dbf5aae1a"):
        _digests.check_file(tmp_path / "file", "here")


def test_status_says_what_is_there(citeseer_dir: Path) -> None:
    rows = {row.name: row for row in graph_status(citeseer_dir)}
    assert list(rows) == list(GRAPHS)
    assert rows["karate_club"].present
    assert rows["karate_club"].path is None
    assert rows["citeseer"].present
    assert rows["citeseer"].path == citeseer_dir / "graphs" / "CitationFull" / "citeseer" / "raw"
    assert rows["citeseer"].size_bytes == len(_citeseer())
    assert not rows["planetoid_citeseer"].present
    assert rows["planetoid_citeseer"].size_bytes is None
    assert len(rows["planetoid_citeseer"].files) == 8


# The sets


@pytest.mark.parametrize("name", list(GRAPHS))
def test_facts_agree_with_the_data(name: str) -> None:
    data_dir = os.environ.get("LOCALLEARN_DATA")
    if not {row.name: row.present for row in graph_status(data_dir)}[name]:
        pytest.skip(f"{name} is not in LOCALLEARN_DATA")
    one_split = name == "karate_club" or name.startswith("planetoid")
    data = GraphData(name, data_dir, normalize="none", split=0 if one_split else 4)
    edges, sizes = PUBLISHED[name]
    parts = [_rows(next(iter(load()))) for load in (data.train_dataloader, data.val_dataloader, data.test_dataloader)]
    assert tuple(len(part) for part in parts) == sizes
    batch = data.example()
    assert batch.inputs.shape == (GRAPHS[name].nodes, *data.shape)
    assert batch.context[0].shape == (2, edges)
    assert torch.unique(batch.targets[_rows(batch)]).tolist() == list(range(data.classes))


def test_real_files_are_left_alone(data_dir: Path) -> None:
    before = _snapshot(data_dir / "graphs")
    GraphData("planetoid_cora", data_dir).setup()
    assert _snapshot(data_dir / "graphs") == before


@pytest.mark.parametrize("name", list(GRAPHS))
def test_shape_and_classes_are_known_without_data(name: str, tmp_path: Path, no_network: list[float | None]) -> None:
    data = GraphData(name, tmp_path / "absent")
    assert (data.name, data.shape, data.classes) == (name, (GRAPHS[name].features,), GRAPHS[name].classes)
    assert not no_network


# Splits


@pytest.mark.parametrize("nodes", [5, 34, 2995, 4230, 7650])
@pytest.mark.parametrize("split", range(5))
def test_split_is_that_of_scikit_learn_with_the_published_seeds(nodes: int, split: int) -> None:
    rest, test = list(KFold(5, shuffle=True, random_state=101).split(np.arange(nodes)))[split]
    train, validation = train_test_split(rest, test_size=0.2, random_state=127 * split)
    found = published_split(nodes, split)
    assert found["train"].tolist() == sorted(train)
    assert found["validation"].tolist() == sorted(validation)
    assert found["test"].tolist() == sorted(test)


@pytest.mark.parametrize("name", ["cora_ml", "citeseer", "pubmed", "photo", "github"])
def test_split_has_the_published_sizes(name: str) -> None:
    assert tuple(len(part) for part in published_split(GRAPHS[name].nodes, 4).values()) == PUBLISHED[name][1]


def test_karate_club_has_its_four_training_nodes_and_the_others_in_turn() -> None:
    data = GraphData("karate_club")
    train, validation, test = (
        _rows(next(iter(load()))).tolist()
        for load in (data.train_dataloader, data.val_dataloader, data.test_dataloader)
    )
    assert train == [0, 4, 8, 24]
    assert validation[:6] == [1, 3, 6, 9, 11, 13]
    assert test[:6] == [2, 5, 7, 10, 12, 14]
    assert sorted(train + validation + test) == list(range(34))


def test_masks_of_a_graph_are_used_column_by_column() -> None:
    graph = _graph(10)
    masks = torch.zeros(3, 10, 2, dtype=torch.bool)
    for part in range(3):
        masks[part, part, 0] = masks[part, 9 - part, 1] = True
    graph.train_mask, graph.val_mask, graph.test_mask = masks
    for split, rows in ((0, [0, 1, 2]), (1, [9, 8, 7])):
        data = GraphData(graph=graph, split=split)
        loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
        assert [_rows(next(iter(loader))).tolist() for loader in loaders] == [[row] for row in rows]
    graph.train_mask, graph.val_mask, graph.test_mask = masks[..., 0]
    assert _rows(GraphData(graph=graph).example()).tolist() == [0]


# Batches of the whole graph


def test_every_part_sees_its_own_labels_and_no_other() -> None:
    graph = _graph()
    data = GraphData(graph=graph, split=2)
    seen = []
    for load in (data.train_dataloader, data.val_dataloader, data.test_dataloader):
        [batch] = load()
        rows = _rows(batch)
        assert torch.equal(batch.targets[rows], graph.y[rows])
        others = torch.ones(60, dtype=torch.bool)
        others[rows] = False
        assert (batch.targets[others] == -1).all()
        assert torch.equal(batch.context[0], graph.edge_index)
        assert batch.index is None
        seen += rows.tolist()
    assert sorted(seen) == list(range(60))
    assert torch.equal(data.example().targets, next(iter(data.train_dataloader())).targets)


def test_known_labels_are_those_of_training_or_also_of_validation() -> None:
    graph = _graph()
    data, parts = GraphData(graph=graph), published_split(60, 0)
    for part, rows in (
        ("train", parts["train"]),
        ("train+validation", torch.cat([parts["train"], parts["validation"]]).sort().values),
    ):
        targets, known = data.known(part)  # type: ignore[arg-type]
        assert torch.equal(known, rows)
        assert torch.equal(targets[known], graph.y[known])
        assert int((targets >= 0).sum()) == len(rows)
    with pytest.raises(ValueError, match="'test' is unknown"):
        data.known("test")  # type: ignore[arg-type]


def test_every_epoch_hands_out_the_same_tensors() -> None:
    data = GraphData(graph=_graph())
    loader = data.train_dataloader()
    [first], [second], [third] = loader, loader, data.train_dataloader()
    [validation] = data.val_dataloader()
    assert len(loader) == 1
    assert first is second is third
    assert first.inputs is validation.inputs
    assert first.context[0] is validation.context[0]
    assert data.known("train")[0] is first.targets


def test_features_are_scaled_as_torch_geometric_scales_them() -> None:
    graph = _graph()
    words = (graph.x > 0).float()
    words[7] = 0
    for x in (words, 3 * graph.x):
        expected = NormalizeFeatures()(Data(x=x.clone())).x
        torch.testing.assert_close(GraphData(graph=Data(x, graph.edge_index, y=graph.y)).example().inputs, expected)
    scaled = GraphData(graph=Data(words, graph.edge_index, y=graph.y), normalize="l2").example().inputs
    torch.testing.assert_close(scaled, F.normalize(words))
    assert torch.equal(scaled[7], torch.zeros(8))
    plain = GraphData(graph=Data(words, graph.edge_index, y=graph.y), normalize="none").example().inputs
    assert torch.equal(plain, words)
    assert (words[7] == 0).all(), "the graph that was given is changed"


# Graphs of one's own


def test_own_graphs_come_as_objects_and_as_files(tmp_path: Path) -> None:
    graph = _graph()
    torch.save(graph, tmp_path / "mine.pt")
    from_file, from_object = GraphData(path=tmp_path / "mine.pt"), GraphData(graph=graph)
    assert (from_file.name, from_file.shape, from_file.classes) == ("mine", (8,), 3)
    assert torch.equal(from_file.example().inputs, from_object.example().inputs)
    assert torch.equal(from_file.example().targets, from_object.example().targets)
    club = KarateClub()
    del club._data.train_mask
    assert GraphData(graph=club).shape == (34,)
    assert len(_rows(GraphData(graph=club).example())) == 21  # 34 without 7 and 6


class _Two(list[Any]):
    num_node_features = 8


def _changed(**changes: Any) -> Any:
    graph = _graph(10)
    for key, value in changes.items():
        graph[key] = value
    return graph


_MASK = torch.arange(10) < 5


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (_changed(x=None), "no node features"),
        (_changed(x=torch.zeros(10, 8).to_sparse()), "dense matrix"),
        (_changed(x=torch.full((10, 8), float("nan"))), "not finite"),
        (_changed(x=torch.full((10, 8), 1e300, dtype=torch.float64)), "in float32"),
        (_changed(y=None), "no labels"),
        (_changed(y=[0, 1] * 5), "it is a list"),
        (_changed(y=torch.arange(10) % 3 + 1), "labels y from 1 to 3, .* take y - 1"),
        (_changed(y=torch.arange(10) - 1 + 2**62), "labels y from .* expected class ids from 0"),
        (_changed(y=torch.tensor([0, 10**6] * 5)), "up to 1000000, more classes than its 10 nodes"),
        (_changed(edge_attr=torch.tensor(1.0)), r"edge_attr that is torch.float32 of shape \(\)"),
        (_changed(edge_attr=torch.eye(_graph(10).num_edges).to_sparse()), "edge_attr that is sparse_coo"),
        (
            _changed(edge_attr=torch.full((_graph(10).num_edges,), 1e300, dtype=torch.float64)),
            "not finite everywhere in float32",
        ),
        (_changed(y=torch.rand(10, 3)), r"shape \(10, 3\)"),
        (_changed(y=torch.rand(10)), "float32"),
        (_changed(y=torch.full((10,), -1)), "without a label"),
        (_changed(edge_index=None), "no edges"),
        (_changed(edge_index=torch.tensor([[0, 3], [1, 10]])), "nodes 0 and 10, but its nodes are 0 to 9"),
        (_changed(edge_index=torch.tensor([[0, -1], [1, 2]])), "nodes -1 and 2"),
        (_changed(edge_index=torch.zeros(5, 2).long()), r"torch.int64 of shape \(5, 2\), so take edge_index.T"),
        (_changed(edge_index=torch.zeros(2, 5).int()), r"torch.int32 of shape \(2, 5\)"),
        (_changed(x=torch.zeros(10, 8, dtype=torch.complex64)), "real numbers; it is torch.complex64"),
        (_changed(y=torch.zeros(10, dtype=torch.complex64)), "complex64"),
        (
            _changed(train_mask=torch.arange(5), val_mask=_MASK, test_mask=_MASK),
            r"train_mask is torch.int64 of shape \(5,\).*index_to_mask",
        ),
        (_changed(train_mask=_MASK, val_mask=_MASK[:, None, None], test_mask=_MASK), r"val_mask is .* \(10, 1, 1\)"),
        (_changed(train_mask=_MASK, val_mask=_MASK, test_mask=_MASK.float()), "test_mask is torch.float32"),
        (_changed(train_mask=_MASK), "some of train_mask"),
        (_changed(train_mask=~_MASK & _MASK, val_mask=_MASK, test_mask=~_MASK), "no train nodes"),
        (_changed(train_mask=_MASK, val_mask=_MASK, test_mask=~_MASK), "two of its masks"),
        (_changed(train_mask=_MASK[:9], val_mask=_MASK, test_mask=_MASK), "one row for each node"),
        (_changed(train_mask=_MASK.long(), val_mask=_MASK, test_mask=_MASK), "boolean"),
        (_graph(4), "at least 5 nodes"),
        (_Two([_graph(), _graph()]), "exactly one"),
        (3, "graph is int"),
    ],
)
def test_a_graph_that_cannot_be_learned_from_is_told_in_one_sentence(graph: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        GraphData(graph=graph).setup()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["missing", "no pickle", "a list", "code"])
def test_a_file_that_holds_no_graph_is_told_in_one_sentence(what: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.pt"
    if what == "no pickle":
        path.write_bytes(b"x, y")
    elif what != "missing":
        torch.save([1] if what == "a list" else Counter, path)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        GraphData(path=path).setup()
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)  # PyTorch says how to run what a file holds


def _written_by_version_1() -> Any:
    """Attributes in ``__dict__``, and no ``_store``."""
    old = Data.__new__(Data)
    vars(old).clear()
    vars(old).update(x=torch.rand(10, 4), y=torch.arange(10) % 2, edge_index=torch.zeros(2, 0).long(), edge_attr=None)
    return old


@pytest.mark.parametrize("file", [True, False])
def test_a_graph_of_torch_geometric_1_is_told_in_one_sentence(file: bool, tmp_path: Path) -> None:
    torch.save(_written_by_version_1(), tmp_path / "old.pt")
    data = GraphData(path=tmp_path / "old.pt") if file else GraphData(graph=_written_by_version_1())
    with pytest.raises(ValueError, match=r"written by PyTorch Geometric 1\.x.*make a new Data") as caught:
        data.setup()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "cora"}, "karate_club, cora_ml"),
        ({"name": None}, "one of the three"),
        ({"name": "cora_ml", "path": "mine.pt"}, "one of the three"),
        ({"name": "cora_ml", "split": 5}, "split=5 is out of range; give 0 to 4"),
        ({"name": "planetoid_cora", "split": 1}, "split=1"),
        ({"split": -1}, "split=-1"),
        ({"normalize": "rows"}, "sum, l2, none"),
        ({"batch_size": 10}, "go together"),
        ({"fanouts": [10]}, "go together"),
        ({"batch_size": 0, "fanouts": [10]}, "batch_size=0"),
        ({"batch_size": 10, "fanouts": []}, "fanouts=[]"),
        ({"batch_size": 10, "fanouts": [10, 0]}, "fanouts=[10, 0]"),
        ({"seed": -1}, "seed=-1"),
    ],
    ids=str,
)
def test_wrong_settings_get_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        GraphData(**({"name": "karate_club"} | settings))
    assert "\n" not in str(caught.value)


def test_a_split_that_masks_do_not_have_is_refused() -> None:
    graph = _changed(train_mask=torch.arange(10) < 3, val_mask=torch.arange(10) == 4, test_mask=torch.arange(10) > 5)
    with pytest.raises(ValueError, match="split=1 is out of range"):
        GraphData(graph=graph, split=1).setup()


def test_several_processes_are_refused() -> None:
    class _Two:
        world_size = 2

    data = GraphData(graph=_graph())
    data.trainer = _Two()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="one process"):
        data.train_dataloader()


# Generated graphs


def test_generated_graph_has_what_was_asked_for() -> None:
    made = GeneratedGraph(nodes=20_000, degree=12.0, features=16, classes=5, homophily=0.7, noise=2.0, seed=3)
    data = GraphData(graph=made, normalize="none")
    assert (data.shape, data.classes, data._graph) == ((16,), 5, None)  # known before anything is made
    graph = made.data()
    source, target = graph.edge_index
    assert graph.is_undirected()
    assert not graph.has_self_loops()
    assert len(set(zip(source.tolist(), target.tolist(), strict=True))) == graph.num_edges
    assert graph.num_edges / 20_000 == pytest.approx(12, rel=0.01)
    # 240,000 edges: what stays inside a class by will and by chance, standard deviation 0.001.
    assert float((graph.y[source] == graph.y[target]).float().mean()) == pytest.approx(0.7 + 0.3 / 5, abs=0.01)
    assert torch.bincount(graph.y).tolist() == [4000] * 5
    centres = torch.stack([graph.x[graph.y == label].mean(0) for label in range(5)])
    spread = graph.x - centres[graph.y]
    assert float(spread.std()) == pytest.approx(2 / 5**0.5, rel=0.02)
    assert torch.equal(made.data().x, graph.x)
    assert torch.equal(made.data().edge_index, graph.edge_index)
    for bad in ({"nodes": 3, "classes": 4}, {"classes": 1}, {"degree": 0.0}, {"homophily": 1.5}, {"noise": -1.0}):
        with pytest.raises(ValueError, match="GeneratedGraph got"):
            GeneratedGraph(**bad)


# Sampled neighbourhoods


def _in_neighbours(edges: Tensor, nodes: int) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(nodes)]
    for source, target in edges.T.tolist():
        found[target].append(source)
    return found


@pytest.mark.parametrize("fanouts", [[3, 2], [1], [-1, 2], [100, 100]], ids=str)
def test_sampled_edges_are_edges_of_the_graph_as_many_as_asked_for(fanouts: list[int]) -> None:
    edges = _graph(300, degree=8.0).edge_index
    sampler, neighbours = NeighbourSampler(edges, 300, fanouts), _in_neighbours(edges, 300)
    generator = torch.Generator().manual_seed(0)
    for seeds in (torch.tensor([5, 299, 0, 17]), torch.arange(300).flip(0), torch.tensor([42])):
        nodes, local = sampler(seeds, generator)
        assert torch.equal(nodes[: len(seeds)], seeds)
        assert len(torch.unique(nodes)) == len(nodes)
        drawn = _in_neighbours(nodes[local], 300)
        # Hop by hop: each node reached last draws its share, each time different ones, and reaches new ones.
        reached, frontier = set(seeds.tolist()), set(seeds.tolist())
        for fanout in fanouts:
            for node in frontier:
                wanted = len(neighbours[node]) if fanout < 0 else min(fanout, len(neighbours[node]))
                assert len(set(drawn[node])) == len(drawn[node]) == wanted
                assert set(drawn[node]) <= set(neighbours[node])
            frontier = {source for node in frontier for source in drawn[node]} - reached
            reached |= frontier
        assert reached == set(nodes.tolist())
        assert all(not drawn[node] for node in frontier)  # the last ones have not been asked


def test_every_set_of_neighbours_is_drawn_equally_often() -> None:
    # Node 0 has in-neighbours 1 … 5: 10 pairs, 1000 draws, mean 100, standard deviation 9.5.
    edges = torch.stack((torch.arange(1, 6), torch.zeros(5, dtype=torch.int64)))
    sampler, generator = NeighbourSampler(edges, 6, [2]), torch.Generator().manual_seed(1)
    counts = Counter(tuple(sorted(sampler(torch.tensor([0]), generator)[0][1:].tolist())) for _ in range(1000))
    assert len(counts) == 10
    assert all(abs(count - 100) < 45 for count in counts.values())


def test_with_all_neighbours_a_seed_has_the_output_it_has_in_the_whole_graph() -> None:
    graph = _graph(200, degree=5.0)
    torch.manual_seed(0)
    first, second = SAGEConv(8, 6), SAGEConv(6, 3)

    def net(x: Tensor, edges: Tensor) -> Tensor:
        out: Tensor = second(first(x, edges).relu(), edges)
        return out

    data = GraphData(graph=graph, normalize="none", batch_size=16, fanouts=[-1, -1])
    whole = net(graph.x, graph.edge_index)
    [batch, *_] = list(data.train_dataloader())
    assert len(batch.inputs) < 200
    nodes = torch.cat([(graph.x == row).all(1).nonzero().squeeze(1) for row in batch.inputs])
    torch.testing.assert_close(net(batch.inputs, *batch.context)[_rows(batch)], whole[nodes[_rows(batch)]])


def _numbered(**settings: Any) -> GraphData:
    """A graph whose only feature is the node's number."""
    graph = _graph(60)
    graph.x = torch.arange(60.0)[:, None]
    defaults: dict[str, Any] = {"batch_size": 7, "fanouts": [3, 2], "normalize": "none"}
    return GraphData(graph=graph, **(defaults | settings))


def _nodes(batch: Batch) -> list[int]:
    return [int(number) for number in batch.inputs.squeeze(1).tolist()]


def test_every_training_node_comes_once_per_epoch_with_its_label_alone() -> None:
    data = _numbered()
    loader = data.train_dataloader()
    train = published_split(60, 0)["train"].tolist()
    orders = []
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader) == 6
        for batch in batches:
            rows = _rows(batch)
            assert rows.tolist() == list(range(len(rows)))
            assert batch.targets[rows].tolist() == [node % 3 for node in _nodes(batch)[: len(rows)]]
            assert (batch.targets[len(rows) :] == -1).all()
            assert batch.index is None
        orders.append([node for batch in batches for node in _nodes(batch)[: len(_rows(batch))]])
        assert sorted(orders[-1]) == train
    assert orders[0] != orders[1]
    assert len(next(iter(data.val_dataloader())).inputs) == 60


def _fingerprint(batch: Batch) -> tuple[list[int], list[list[int]]]:
    return _nodes(batch), batch.context[0].tolist()


def test_stream_depends_on_seed_and_epoch_alone() -> None:
    loader = _numbered(seed=3).train_dataloader()
    stream = [[_fingerprint(batch) for batch in loader] for _ in range(2)]
    torch.manual_seed(99)
    again = _numbered(seed=3).train_dataloader()
    next(iter(_numbered(seed=3).train_dataloader()))  # another loader of the same kind
    assert [[_fingerprint(batch) for batch in again] for _ in range(2)] == stream
    assert stream[0] != stream[1]
    assert [_fingerprint(batch) for batch in _numbered(seed=4).train_dataloader()] != stream[0]
    state = torch.get_rng_state()
    list(loader)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("taken", [1, 5, 6, 8])
def test_state_goes_on_after_any_batch(taken: int) -> None:
    whole = _numbered().train_dataloader()
    stream = [_fingerprint(batch) for _ in range(3) for batch in whole]
    first = _numbered()
    loader = first.train_dataloader()
    assert isinstance(loader, NeighbourLoader)
    seen: list[Any] = []
    while len(seen) < taken:
        seen += [_fingerprint(batch) for batch in islice(loader, taken - len(seen))]
    second = _numbered()
    second.load_state_dict(first.state_dict())
    going_on = second.train_dataloader()
    while len(seen) < len(stream):
        seen += [_fingerprint(batch) for batch in going_on]
    assert seen == stream
    third = _numbered(batch_size=8)
    third.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="batch_size=7"):
        third.train_dataloader()


# The task


class _Convolution(nn.Module):
    def __init__(self, before: int, after: int, last: bool = False) -> None:
        super().__init__()
        self.convolution = GCNConv(before, after)
        self.last = last

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        out: Tensor = self.convolution(x, edges)
        return out if self.last else out.relu()


def _net(features: int, classes: int) -> Blocks:
    torch.manual_seed(0)
    return Blocks({"a": _Convolution(features, 16), "b": _Convolution(16, 16)}, _Convolution(16, classes, last=True))


_adam = partial(torch.optim.Adam, lr=1e-2)


def _club() -> tuple[GraphData, NodeClassification]:
    data = GraphData("karate_club")
    return data, NodeClassification(_net(34, 4), data.example(), 4)


def test_nodes_are_classified_under_the_strategy(tmp_path: Path) -> None:
    data, task = _club()
    trainer = quiet_trainer(tmp_path, strategy=LocalStrategy(MonoForward(seed=0), _adam), max_epochs=40)
    trainer.fit(task, datamodule=data)
    [figures] = trainer.test(task, datamodule=data, verbose=False)
    [batch] = data.test_dataloader()
    with torch.no_grad():
        guesses = task(batch.inputs, *batch.context).argmax(1)
    right = (guesses == KarateClub()[0].y)[_rows(batch)].float().mean()
    assert figures["test/accuracy"] == pytest.approx(float(right))
    assert figures["test/accuracy"] > 0.6
    assert (task.metric, task.maximise) == ("accuracy", True)


class _Told(Backprop):
    """Backpropagation that notes which labels it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def reveal(self, targets: Tensor, rows: Tensor, asked: Tensor | None = None) -> None:
        self.told.append((targets, rows, asked))


@pytest.mark.parametrize("reveal_validation", [False, True])
def test_labels_are_revealed_before_validation_and_test(reveal_validation: bool, tmp_path: Path) -> None:
    data = GraphData("karate_club")
    task = NodeClassification(_net(34, 4), data.example(), 4, reveal_validation=reveal_validation)
    algorithm = _Told()
    trainer = quiet_trainer(tmp_path, strategy=LocalStrategy(algorithm, _adam), max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(task, datamodule=data)
    trainer.test(task, datamodule=data, verbose=False)
    last = "train+validation" if reveal_validation else "train"
    assert len(algorithm.told) == 3
    asked = [data._batch(part).rows for part in ("validation", "validation", "test")]
    for (targets, rows, judged), part, nodes in zip(algorithm.told, ("train", "train", last), asked, strict=True):
        assert targets is data.known(part)[0]  # type: ignore[arg-type]
        assert rows is data.known(part)[1]  # type: ignore[arg-type]
        assert judged is nodes


def test_a_checkpoint_from_when_all_variants_were_one_class_is_taken() -> None:
    data = GraphData("karate_club")
    data.prepare_data()
    data.setup("fit")
    task = NodeClassification(_net(34, 4), data.example(), 4)
    task.use(ForwardGNN("sf"))
    task.on_load_checkpoint({"algorithm": "ForwardGNN", "state_dict": {}})
    written: dict[str, Any] = {"state_dict": {}}
    task.on_save_checkpoint(written)
    task.on_load_checkpoint(written)
    with pytest.raises(ValueError, match="trained by LabelColumns, and the task predicts with SingleForward"):
        task.on_load_checkpoint({"algorithm": "LabelColumns", "state_dict": {}})


def test_without_a_data_module_the_example_tells_the_training_labels(tmp_path: Path) -> None:
    data, task = _club()
    algorithm = _Told()
    trainer = quiet_trainer(tmp_path, strategy=LocalStrategy(algorithm, _adam), max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(task, train_dataloaders=data.train_dataloader(), val_dataloaders=data.val_dataloader())
    [(targets, rows, _)] = algorithm.told
    assert torch.equal(targets, data.known("train")[0])
    assert torch.equal(rows, data.known("train")[1])
    asking = NodeClassification(_net(34, 4), data.example(), 4, reveal_validation=True)
    trainer = quiet_trainer(tmp_path, strategy=LocalStrategy(_Told(), _adam))
    with pytest.raises(ValueError, match="reveal_validation=false"):
        trainer.test(asking, dataloaders=data.test_dataloader(), verbose=False)


def test_backpropagation_under_the_strategy_is_that_of_a_plainquiet_trainer(tmp_path: Path) -> None:
    weights = []
    for strategy in ("auto", LocalStrategy(Backprop(), _adam)):
        data, task = _club()
        task._optimizer = _adam
        quiet_trainer(tmp_path, strategy=strategy, max_epochs=3).fit(task, datamodule=data)
        weights.append([p.detach().clone() for p in task.net.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_the_algorithm_is_told_the_whole_example() -> None:
    data, task = _club()
    info = task.info()
    assert info.example is data.example()
    assert (info.outputs, info.classes) == (4, True)
    with pytest.raises(ValueError, match="leave context out"):
        Classification(_net(34, 4), data.example(), 4, context=(1,))


@pytest.mark.parametrize("sampled", [False, True])
def test_a_stopped_run_goes_on_to_the_same_weights(sampled: bool, tmp_path: Path) -> None:
    graph = _graph()

    def parts() -> tuple[GraphData, NodeClassification, LocalStrategy]:
        more: dict[str, Any] = {"batch_size": 10, "fanouts": [3, 2]} if sampled else {}
        data = GraphData(graph=graph, **more)
        task = NodeClassification(_net(8, 3), data.example(), 3)
        return data, task, LocalStrategy(MonoForward(seed=0), _adam)

    steps = 4 if sampled else 1  # batches in an epoch
    data, whole, strategy = parts()
    quiet_trainer(tmp_path, strategy=strategy, max_steps=3 * steps).fit(whole, datamodule=data)
    data, _, strategy = parts()
    half = NodeClassification(_net(8, 3), data.example(), 3)
    trainer = quiet_trainer(tmp_path, strategy=strategy, max_steps=2 * steps - 1 if sampled else 2)
    trainer.fit(half, datamodule=data)
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    data, resumed, strategy = parts()
    quiet_trainer(tmp_path, strategy=strategy, max_steps=3 * steps).fit(
        resumed, datamodule=data, ckpt_path=tmp_path / "stopped.ckpt", weights_only=True
    )
    for name, value in whole.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, resumed.state_dict()[name]), name


# Settings


def _yaml(name: str) -> dict[str, Any]:
    text = (CONF / "dataset" / f"{name}.yaml").read_text(encoding="utf-8")
    settings = {key: value for key, value in yaml.safe_load(text).items() if key != "defaults"}
    filled = OmegaConf.create({"data_dir": None, "seed": 1, "dataset": settings})
    resolved = OmegaConf.to_container(filled.dataset, resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


@pytest.mark.parametrize("name", [*GRAPHS, "generated_graph", "own_graph"])
def test_every_graph_has_settings_that_make_it(name: str, tmp_path: Path) -> None:
    settings = _yaml(name)
    if name == "own_graph":
        torch.save(_graph(), tmp_path / "mine.pt")
        settings["path"] = str(tmp_path / "mine.pt")
    data = instantiate(settings, _convert_="all")
    assert isinstance(data, GraphData)
    assert data.classes >= 2
    if name in GRAPHS:
        assert data.name == name


def test_a_graph_chooses_task_and_net_and_the_command_line_chooses_others() -> None:
    from locallearn.cli.settings import compose_settings

    cfg, choices = compose_settings(["dataset=cora_ml"])
    assert (choices["task"], choices["net"]) == ("node_classification", "gcn")
    assert cfg.task._target_.endswith("NodeClassification")
    cfg, choices = compose_settings(["dataset=cora_ml", "task=link_prediction", "net=sage", "dataset.split=3"])
    assert (choices["task"], choices["net"]) == ("link_prediction", "sage")
    assert cfg.task.split == 3
    assert compose_settings(["dataset=digits"])[1]["task"] == "classification"
