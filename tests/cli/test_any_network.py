"""``net=torchvision`` and ``net=factory``: networks that nobody has made for us, trained, stopped, loaded and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import locallearn
from locallearn.cli import UsageError
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


def no_network(num_classes):
    return num_classes
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
        (["net.options={widht:3}"], "widht"),
        (["net.cuts=[middle,stem]"], "name them in that order"),
        (["net.cuts=true"], "cuts is True"),
    ],
)
def test_what_a_factory_cannot_give_is_told(words: list[str], told: str, bare: Cli) -> None:
    outcome = bare("train", *_OWN, *words)
    assert outcome.code == 2
    assert told in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_name_is_missing(bare: Cli) -> None:
    outcome = bare("train", "net=factory")
    assert outcome.code == 2
    assert "net.name" in outcome.err
    assert outcome.err.count("\n") == 1
