"""A tiny problem, the module that holds it, and a Trainer that does nothing beside training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from locallearn.batch import Batch
from locallearn.nets import Blocks, mlp
from locallearn.tasks.classification import Classification

WIDTH, CLASSES, SAMPLES, BATCHES = 12, 3, 16, 4


class Loader:
    """Batches in a fixed order that keep their place in a checkpoint, as those of ``locallearn.tasks.images`` do."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches
        self.place = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for i in range(self.place % len(self.batches), len(self.batches)):
            self.place = i + 1
            yield self.batches[i]
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def make_batches(seed: int, number: int) -> list[Batch]:
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(9))
    draw = torch.Generator().manual_seed(seed)
    result = []
    for i in range(number):
        labels = torch.randint(CLASSES, (SAMPLES,), generator=draw)
        inputs = centres[labels] + torch.randn(SAMPLES, WIDTH, generator=draw)
        result.append(Batch(inputs, labels, index=torch.arange(SAMPLES) + i * SAMPLES))
    return result


@pytest.fixture
def train() -> Loader:
    return Loader(make_batches(0, BATCHES))


@pytest.fixture
def validation() -> Loader:
    return Loader(make_batches(1, 2))


@pytest.fixture
def make_net() -> Callable[[], Blocks]:
    def make() -> Blocks:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return mlp((WIDTH,), CLASSES, (10, 9, 8))

    return make


@pytest.fixture
def make_module(make_net: Callable[[], Blocks]) -> Callable[..., Classification]:
    def make(net: Blocks | None = None, **options: Any) -> Classification:
        return Classification(make_net() if net is None else net, torch.zeros(2, WIDTH), CLASSES, **options)

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    return partial(
        pl.Trainer,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
