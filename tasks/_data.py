"""What all data in memory share: one device, loaders of three parts, and a training loader that goes on from a checkpoint."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, Protocol, TypeVar

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from locallearn.tasks._batches import BatchLoader, batch_sizes


class ResumableLoader(Protocol):
    """A loader with a place in its data."""

    def state_dict(self) -> dict[str, int]:
        """The place of the next batch, and what it depends on."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the last batch handed out by the loader that ``state`` comes from."""


_L = TypeVar("_L", bound=ResumableLoader)


class MemoryData(LightningDataModule):
    """Data that lie in memory on the Trainer's one device."""

    def __init__(self) -> None:
        super().__init__()
        self._train_loader: ResumableLoader | None = None
        self._place: dict[str, int] | None = None

    # Lightning keeps the loader's state too, but does not give it back from checkpoints made at the end of an epoch.
    def state_dict(self) -> dict[str, int]:
        """The place in the training data, for the checkpoint; empty where there is none."""
        return {} if self._train_loader is None else self._train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next training loader go on where the checkpoint was made; testing a checkpoint moves nothing."""
        if state_dict and (self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING):
            self._place = state_dict

    def _placed(self, loader: _L) -> _L:
        """A new training loader, led to where a checkpoint was made."""
        if self._place is not None:
            loader.load_state_dict(self._place)
            self._place = None
        # Lightning asks first; whoever asks during a run must not move the place that the checkpoints hold.
        if self._train_loader is None:
            self._train_loader = loader
        return loader

    def _epoch_batches(self, samples: int, batch_size: int, drop_last: bool = False) -> int | None:
        """After how many batches the Trainer ends an epoch; ``None``: all.

        Raises:
            ValueError: the Trainer makes new loaders on the way, which would start again.
        """
        if self.trainer is None:
            return None
        # The Trainer is given this attribute from outside its class, where mypy does not see it.
        if self.trainer.reload_dataloaders_every_n_epochs > 0:  # type: ignore[attr-defined]
            raise ValueError(
                f"A reloaded {type(self).__name__} would start its order and its draws again; leave"
                " reload_dataloaders_every_n_epochs at 0."
            )
        limit = self.trainer.limit_train_batches
        batches = samples // batch_size if drop_last else math.ceil(samples / batch_size)
        return int(limit * batches) if isinstance(limit, float) else limit

    def _device(self) -> torch.device:
        """The Trainer's device, or the CPU.

        Raises:
            ValueError: the Trainer runs several processes.
        """
        if self.trainer is None:
            return torch.device("cpu")
        if self.trainer.world_size > 1:
            raise ValueError(
                f"{type(self).__name__} feeds one process but the Trainer runs {self.trainer.world_size}, which would all"
                " train on the same batches; use one device."
            )
        return self.trainer.strategy.root_device


class SampleData(MemoryData):
    """Samples in three parts, each a tensor of inputs and one of targets; a subclass says how the parts are made.

    Attributes:
        shape: of one input; known before ``setup``.

    Args:
        batch_size: samples in a training batch.
        eval_batch_size: samples in a validation or test batch; ``None``: the whole part.
        seed: of the order.
        drop_last: leave out an epoch's last training batch if it is smaller.
    """

    shape: tuple[int, ...]

    def __init__(self, batch_size: int, eval_batch_size: int | None, seed: int, drop_last: bool = False) -> None:
        super().__init__()
        self._batch_size, self._eval_batch_size = batch_size, eval_batch_size
        self._seed, self._drop_last = seed, drop_last
        self._parts: dict[str, tuple[Tensor, Tensor]] = {}

    @abstractmethod
    def _make_parts(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Inputs and targets of ``train``, ``validation`` and ``test``, and of further parts."""

    def _training_samples(self) -> int:
        """How many samples an epoch has; where that is known before the data are there, a subclass says it."""
        self.setup()
        return len(self._parts["train"][0])

    def _options(self, training: bool) -> dict[str, Any]:
        """Of the loader, beside what all have."""
        return {"indexed": training}

    def setup(self, stage: str | None = None) -> None:
        """Make the parts once, for all stages.

        Raises:
            DataMissing: when files are missing and cannot be downloaded.
            ValueError: when files are damaged.
        """
        if stage == "fit":
            self._train_loader = None
        if not self._parts:
            self._parts = self._make_parts()

    def train_dataloader(self) -> BatchLoader:
        """Shuffled batches; ``Batch.index`` (augmented: ``source``) counts the samples left for training."""
        return self._placed(self._loader("train", training=True))

    def val_dataloader(self) -> BatchLoader:
        """The validation part in a fixed order."""
        return self._loader("validation")

    def test_dataloader(self) -> BatchLoader:
        """The test part in a fixed order."""
        return self._loader("test")

    def batch_sizes(self) -> set[int]:
        """How many samples there are in the training batches of an epoch."""
        return batch_sizes(self._training_samples(), self._batch_size, self._drop_last)

    def example(self) -> Tensor:
        """Two inputs of zeros, ``(2, *shape)``, float32 on the CPU; needs no data."""
        return torch.zeros(2, *self.shape)

    def _loader(self, part: str, *, training: bool = False) -> BatchLoader:
        self.setup()
        inputs, targets = self._parts[part]
        samples = len(inputs)
        return BatchLoader(
            inputs,
            targets,
            self._batch_size if training else self._eval_batch_size or samples,
            shuffle=training,
            seed=self._seed,
            device=self._device(),
            drop_last=self._drop_last and training,
            epoch_batches=self._epoch_batches(samples, self._batch_size, self._drop_last) if training else None,
            **self._options(training),
        )
