"""What all data in memory share: one device, and a training loader that goes on where a checkpoint was made."""

from __future__ import annotations

import math
from typing import Protocol, TypeVar

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn


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
