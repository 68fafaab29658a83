"""``net=torchvision`` and ``net=factory``: networks that nobody has made for us, trained, stopped, loaded and refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import locallearn
from locallearn.batch import Batch
from locallearn.cli import UsageError
from locallearn.local import factory
from locallearn.study._callbacks import _Keeper
from locallearn.study.train import Interrupted
from tests.cli.conftest import SMALL, Cli

_PARTS = """
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Images(pl.LightningDataModule):
    shape, classes = (3, 32, 32), 4

    def __init__(self, batch_size=8, seed=0):
        super().__init__()
        self.batch_size = batch_size

    def _part(self, count, size):
        draw = torch.Generator().manual_seed(count)
        labels = torch.arange(count) % 4
        images = torch.randn(count, 3, 32, 32, generator=draw) + labels.view(-1, 1, 1, 1)
        return DataLoader(TensorDataset(images, labels), size)

    def train_dataloader(self):
        return self._part(16, self.batch_size)

    def val_dataloader(self):
        return self._part(12, 12)

    def test_dataloader(self):
        return self._part(12, 12)

    def example(self):
        return torch.zeros(2, 3, 32, 32)


class Skipping(nn.Module):
    def __init__(self, num_classes, width=8):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(2 * width, width, 3, padding=1)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, images):
        early = self.stem(images).relu()
        late = self.middle(early).relu()
        x = self.last(torch.cat((early, late), 1)).relu()
        return {"logits": self.fc(x.mean((2, 3))), "features": x}


class Reading(nn.Module):
    def __init__(self, num_classes, width=8):
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, ids):
        return self.fc(self.second(self.first(self.embed(ids)).relu()).relu().mean(1))


class Carrying(nn.Module):
    def __init__(self, outputs, width=8):
        super().__init__()
        self.first = nn.Linear(5, width)
        self.second = nn.Linear(width, width)
        self.fc = nn.Linear(width, outputs)

    def forward(self, x, edge_index, edge_weight=None, edge_attr=None):
        scale = edge_weight if edge_attr is None else 2 * edge_attr.sum(1)
        for layer in (self.first, self.second):
            x = layer(x).relu()
            x = x.index_add(0, edge_index[1], x[edge_index[0]] * scale.unsqueeze(1))
        return self.fc(x)


def no_network(num_classes):
    return num_classes


made = Skipping(4)
_COUNT = 4
"""
_DATASET = "_target_: any_parts.Images\nbatch_size: 8\nseed: ${seed}\n"
_OWN = ("net=factory", "net.name=any_parts.Skipping", "net.cuts=[stem,middle]", "dataset.limit_train=64")
_TORCHVISION = (
    *("net=torchvision", "dataset=any_images", "hydra.searchpath=[file://any_conf]"),
    *("net.name=mobilenet_v3_small", "net.options={width_mult:0.25}"),
)


@pytest.fixture
def bare(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """``cli`` with small settings that fit any network, and parts of the user's own beside it."""
    (tmp_path / "any_parts.py").write_text(_PARTS, encoding="utf-8")
    (tmp_path / "any_conf" / "dataset").mkdir(parents=True)
    (tmp_path / "any_conf" / "dataset" / "any_images.yaml").write_text(_DATASET, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "any_parts", raising=False)  # that of another test's folder
    kept = tuple(word for word in SMALL if not word.startswith("net."))
    monkeypatch.setattr("tests.cli.conftest.SMALL", kept)
    return cli


def test_a_network_of_torchvision_trains_and_is_built_again(bare: Cli) -> None:
    outcome = bare("train", *_TORCHVISION, "net.cuts=[features.2,features.5]")
    assert outcome.code == 0, outcome.err
    record = outcome.record
    assert (record["status"], record["locality"]) == ("done", "layer-local")
    with pytest.raises(UsageError, match=r"'any_parts\.Images' as dataset"):  # the network alone would need no word
        locallearn.load(outcome.folder)
    saved = locallearn.load(outcome.folder, trust=True)
    images = torch.zeros(3, 3, 32, 32)
    assert saved.predict(images).shape == (3, 4)
    assert saved.algorithm.blocks.names == ["features_2", "features_5", "features_6"]
    predicted = bare("predict", str(outcome.folder), "--trust")
    assert predicted.code == 0, predicted.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["net.name=resnet81"], "torchvision has no classification network 'resnet81'; it has resnet18"),
        (["net.name=vit_b_16", "net.options={image_size:32,patch_sice:8}"], "there is no setting 'patch_sice'"),
        (["net.cuts=[features.99]"], "has no module 'features.99'"),
        (["net.cuts=99"], "blocks at most"),
        (["net.weights=DEFAULT"], "set net.weights=null"),
        (["dataset=digits"], "takes images of 3 channels, and these have 1"),
    ],
)
def test_what_torchvision_cannot_give_is_told(words: list[str], told: str, bare: Cli) -> None:
    kept = [word for word in _TORCHVISION if not any(word.split("=")[0] == one.split("=")[0] for one in words)]
    outcome = bare("train", *kept, *words)
    assert outcome.code == 2
    assert told in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_factory_of_the_users_own_wants_trust_once_it_comes_from_a_record(bare: Cli) -> None:
    outcome = bare("train", *_OWN)
    assert outcome.code == 0, outcome.err
    folder = outcome.folder
    refused = bare("predict", str(folder))
    assert refused.code == 2
    assert "'locallearn.local.factory' as net" in refused.err
    assert "--trust" in refused.err
    trusted = bare("predict", str(folder), "--trust")
    assert trusted.code == 0, trusted.err
    with pytest.raises(UsageError, match="factory"):
        locallearn.load(folder)
    saved = locallearn.load(folder, trust=True)
    assert saved.algorithm.blocks.names == ["stem", "middle", "last"]
    accuracy = trusted.out
    assert f"{outcome.record['test']['accuracy']:.4f}"[:5] in accuracy


def test_an_interrupted_factory_run_goes_on_with_trust(bare: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (*_OWN, "trainer.max_epochs=3", "trainer.checkpoint_s=0.0001")
    whole = bare("train", *words)
    assert whole.code == 0, whole.err
    save = _Keeper._save_or_stop

    def stop(keeper: Any, trainer: Any) -> None:
        save(keeper, trainer)
        if trainer.global_step == 2:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(_Keeper, "_save_or_stop", stop)
        stopped = bare("train", *words)
    assert stopped.code == 130
    refused = bare("train", f"resume={stopped.folder}")
    assert refused.code == 2
    assert "'locallearn.local.factory' as net" in refused.err
    resumed = bare("train", f"resume={stopped.folder}", "--trust")
    assert resumed.code == 0, resumed.err
    assert resumed.record["test"] == whole.record["test"]
    assert resumed.record["validation"] == whole.record["validation"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["net.name=any_parts.Skiping"], "Skiping"),
        (["net.name=Skipping"], "my_package.make_net"),
        (["net.name=any_parts.no_network"], "makes a int, expected a torch.nn.Module"),
        (["net.name=any_parts.made"], "a Skipping, an object and nothing that makes networks"),
        (["net.name=any_parts._COUNT"], "a int, an object and nothing that makes networks"),
        (["net.options={widht:3}"], "widht"),
        (["net.options.width=4"], "write '+net.options.width=4', or all at once, 'net.options={width:4}'"),
        (["net.cuts=[middle,stem]"], "name them in that order"),
        (["net.cuts=true"], "cuts is True"),
    ],
)
def test_what_a_factory_cannot_give_is_told(words: list[str], told: str, bare: Cli) -> None:
    outcome = bare("train", *_OWN, *words)
    assert outcome.code == 2
    assert told in outcome.err
    assert outcome.err.count("\n") == 1


_GCN = "net.options={in_channels:34,hidden_channels:8,num_layers:3,out_channels:4}"


@pytest.mark.parametrize(
    ("words", "blocks"),
    [
        (("dataset=python_topics", "dataset.limit_train=64", "net.name=any_parts.Reading"), ["first", "second"]),
        (("dataset=karate_club", "net.name=torch_geometric.nn.GCN", _GCN), ["convs_0", "convs_1"]),
    ],
)
def test_a_factorys_network_is_cut_by_the_example_of_its_data(
    words: tuple[str, ...], blocks: list[str], bare: Cli
) -> None:
    outcome = bare("train", "net=factory", "net.cuts=2", *words)
    assert outcome.code == 0, outcome.err
    assert outcome.record["locality"] == "layer-local"
    saved = locallearn.load(outcome.folder, trust=True)
    assert saved.algorithm.blocks.names == blocks
    predicted = bare("predict", str(outcome.folder), "--trust")
    assert f"{outcome.record['test']['accuracy']:.4f}"[:5] in predicted.out


@pytest.mark.usefixtures("bare")
def test_a_cut_network_of_token_ids_has_the_weights_that_the_factory_draws() -> None:
    from any_parts import Reading  # type: ignore[import-not-found]  # written by the fixture

    ids = torch.randint(256, (5, 12), dtype=torch.int32)
    torch.manual_seed(3)
    blocks = factory("any_parts.Reading", (12,), 4, cuts=2, example=ids)
    torch.manual_seed(3)
    net = Reading(4)
    assert torch.equal(blocks(ids), net(ids))
    assert sum(p.numel() for p in blocks.parameters()) == sum(p.numel() for p in net.parameters())


@pytest.mark.usefixtures("bare")
def test_a_factory_that_is_imported_for_the_first_time_draws_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for first in (True, False):
        if first:
            monkeypatch.delitem(sys.modules, "any_parts", raising=False)  # which makes a network when it is imported
        torch.manual_seed(3)
        drawn.append(factory("any_parts.Reading", (12,), 4, cuts=2, example=torch.randint(256, (5, 12))).state_dict())
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(("shape", "name"), [((7,), "edge_weight"), ((7, 2), "edge_attr")])
def test_what_edges_carry_reaches_the_argument_that_is_meant_for_it(shape: tuple[int, ...], name: str) -> None:
    from any_parts import Carrying

    x, edges, carried = torch.randn(6, 5), torch.randint(6, (2, 7)), torch.rand(shape)
    torch.manual_seed(3)
    example = Batch(x, torch.zeros(6, dtype=torch.int64), (edges, carried))
    blocks = factory("any_parts.Carrying", (5,), 4, cuts=2, example=example)
    torch.manual_seed(3)
    assert torch.allclose(blocks(x, edges, carried), Carrying(4)(x, edges, **{name: carried}), atol=1e-5)


def test_a_name_is_missing(bare: Cli) -> None:
    outcome = bare("train", "net=factory")
    assert outcome.code == 2
    assert "net.name" in outcome.err
    assert outcome.err.count("\n") == 1
