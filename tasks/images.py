"""Image classification data: kept in memory, on the device, and handed out as ``Batch``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from locallearn.tasks._batches import MEMORY_BUDGET_BYTES, Augment, BatchLoader
from locallearn.tasks._data import SampleData
from locallearn.tasks._image_files import (
    DATASETS,
    IMAGENET_SCALE,
    DataMissing,
    DataStatus,
    ImageFacts,
    ImageSet,
    data_status,
    default_data_dir,
    image_facts,
    load_images,
)

__all__ = [
    "DATASETS",
    "Augment",
    "BatchLoader",
    "DataMissing",
    "DataStatus",
    "ImageData",
    "ImageFacts",
    "ImageSet",
    "data_status",
    "default_data_dir",
    "load_images",
    "stratified_split",
]


def stratified_split(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose ``count`` samples at random so that every class has its share.

    Args:
        labels: class ids ``(N,)``, int64.
        count: how many samples to choose.
        seed: of the choice.

    Returns:
        Positions ``(N - count,)`` of the others and ``(count,)`` of the chosen ones, int64, each in rising order. Of a
        class with share ``p`` between ``p·count - 1`` and ``p·count + 1`` samples are chosen.

    Raises:
        ValueError: if ``count`` is not between 0 and N.
    """
    if not 0 <= count <= len(labels):
        raise ValueError(f"Cannot choose {count} of {len(labels)} samples; give a number from 0 to {len(labels)}.")
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    ordered = labels[by_class]
    sizes = torch.bincount(labels)
    rank = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[ordered]
    # The first `count` samples by their relative place in their class are an equal part of every class.
    place = (rank + 0.5).double() / sizes[ordered]
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[by_class[place.argsort(stable=True)[:count]]] = True
    return (~chosen).nonzero().squeeze(1), chosen.nonzero().squeeze(1)


class ImageData(SampleData):
    """An image set with a validation part, for a Lightning ``Trainer`` or a plain loop.

    Args:
        name: one of ``DATASETS``.
        data_dir: folder that holds ``images/``; ``None`` means ``default_data_dir()``.
        batch_size: samples in a training batch; the last one of an epoch may be smaller.
        eval_batch_size: samples in a validation or test batch.
        validation: how much of the training data is kept for validation: a number of samples (int) or a fraction
            (float), the same share of every class.
        split_seed: of the validation part and of ``limit_train``; it does not follow the run's seed, so that
            all seeds of a study are judged on the same samples.
        seed: of order and augmentation.
        normalize: ``unit`` gives inputs in ``[0, 1]``; ``standard`` subtracts the channel means of ``DATASETS`` and
            divides by its standard deviations; ``imagenet`` does so with those of ImageNet, for images of three channels.
        augment: augmentation of the training batches.
        flatten: hand out images as vectors ``(N, D)`` instead of ``(N, C, H, W)``.
        limit_train: keep only that many training samples, the same share of every class; ``None`` keeps all.
        exclude: classes whose samples are left out of training, validation and test, so that the network never sees them;
            :meth:`excluded_dataloader` has them. The split is the same as without.
        drop_last: leave out an epoch's last training batch if it is smaller.
        memory_budget: bytes that the training data may take as float32; above it they are kept as uint8.

    Attributes:
        name: as given.
        shape: of one input, ``(C, H, W)`` or ``(D,)``; known before ``setup``.
        classes: number of classes; known before ``setup``.

    Raises:
        ValueError: for an unknown name or a number that is out of range.
    """

    def __init__(
        self,
        name: str,
        data_dir: Path | str | None = None,
        *,
        batch_size: int = 128,
        eval_batch_size: int = 1000,
        validation: int | float = 0.1,
        split_seed: int = 0,
        seed: int = 0,
        normalize: Literal["unit", "standard", "imagenet"] = "unit",
        augment: Augment | None = None,
        flatten: bool = False,
        limit_train: int | None = None,
        exclude: Sequence[int] = (),
        drop_last: bool = False,
        memory_budget: int = MEMORY_BUDGET_BYTES,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed, drop_last)
        facts = image_facts(name)
        self._validation_samples = _validation_count(validation, facts.train_samples)
        _check_at_least("batch_size", batch_size, 1)
        _check_at_least("eval_batch_size", eval_batch_size, 1)
        _check_at_least("split_seed", split_seed, 0)
        _check_at_least("seed", seed, 0)
        if normalize not in ("unit", "standard", "imagenet"):
            raise ValueError(f"normalize={normalize!r} is unknown; choose unit or standard, or imagenet.")
        if normalize == "imagenet" and facts.shape[0] != 3:
            raise ValueError(f"normalize=imagenet is for images of three channels, and {name} has {facts.shape[0]}.")
        available = facts.train_samples - self._validation_samples
        if limit_train is not None and not 1 <= limit_train <= available:
            raise ValueError(f"limit_train={limit_train} is out of range; {name} leaves 1 to {available} for training.")
        _check_excluded(exclude, facts.classes)
        self.exclude = tuple(exclude)
        self._train_samples = available if limit_train is None else limit_train
        if drop_last and self._train_samples < batch_size:
            raise ValueError(
                f"drop_last=true leaves nothing of {self._train_samples} training samples in batches of {batch_size}; give a"
                " smaller batch_size, or drop_last=false."
            )
        self.name: str = name
        self.classes = facts.classes
        channels, height, width = facts.shape
        self.shape = (channels * height * width,) if flatten else facts.shape
        self._data_dir = data_dir
        self._split_seed = split_seed
        scales = {"unit": None, "standard": (facts.mean, facts.std), "imagenet": IMAGENET_SCALE}
        self._scale = scales[normalize]
        self._augment, self._flatten = augment, flatten
        self._limit_train, self._memory_budget = limit_train, memory_budget

    def _make_parts(self) -> dict[str, tuple[Tensor, Tensor]]:
        data = load_images(self.name, self._data_dir)
        train, validation = stratified_split(data.train_labels, self._validation_samples, self._split_seed)
        test = torch.arange(len(data.test_labels))
        out = torch.tensor(self.exclude, dtype=data.train_labels.dtype)
        unseen = {
            "validation": validation[torch.isin(data.train_labels[validation], out)],
            "test": test[torch.isin(data.test_labels, out)],
        }
        train, validation = (part[~torch.isin(data.train_labels[part], out)] for part in (train, validation))
        test = test[~torch.isin(data.test_labels, out)]
        if self._limit_train is not None:
            if self._limit_train > len(train):
                raise ValueError(
                    f"limit_train={self._limit_train} is out of range; {self.name} without the excluded classes leaves 1 to "
                    f"{len(train)} for training."
                )
            train = train[stratified_split(data.train_labels[train], self._limit_train, self._split_seed)[1]]
        return {
            "train": (data.train_images[train], data.train_labels[train]),
            "validation": (data.train_images[validation], data.train_labels[validation]),
            "test": (data.test_images, data.test_labels)
            if not self.exclude
            else (data.test_images[test], data.test_labels[test]),
            "excluded validation": (data.train_images[unseen["validation"]], data.train_labels[unseen["validation"]]),
            "excluded test": (data.test_images[unseen["test"]], data.test_labels[unseen["test"]]),
        }

    def excluded_dataloader(self, part: Literal["validation", "test"]) -> BatchLoader:
        """The samples of the excluded classes in a part, in a fixed order.

        Raises:
            ValueError: nothing is excluded.
        """
        if not self.exclude:
            raise ValueError("no class is excluded; give exclude=[3] to keep the samples of class 3 from the network.")
        return self._loader(f"excluded {part}")

    def _training_samples(self) -> int:
        return super()._training_samples() if self.exclude else self._train_samples

    def _options(self, training: bool) -> dict[str, Any]:
        return {
            "augment": self._augment if training else None,
            "scale": self._scale,
            "flatten": self._flatten,
            # An augmented sample is a new one every time, so its place in the training set says nothing about its values.
            "indexed": training and self._augment is None,
            "sourced": training and self._augment is not None,
            "memory_budget": self._memory_budget,
        }


def _validation_count(validation: int | float, samples: int) -> int:
    # A fraction that is no number compares false with everything and so ends in the refusal too.
    fraction = isinstance(validation, float) and 0 < validation < 1
    count = round(validation * samples) if fraction else validation
    if isinstance(count, bool | float) or not 1 <= count < samples:
        raise ValueError(
            f"validation={validation!r} is out of range; give a number of samples from 1 to {samples - 1}, or a"
            " fraction between 0 and 1."
        )
    return count


def _check_excluded(exclude: Sequence[int], classes: int) -> None:
    known = all(type(c) is int and 0 <= c < classes for c in exclude)
    if not known or len(set(exclude)) != len(exclude) or len(exclude) > classes - 2:
        raise ValueError(
            f"exclude={list(exclude)} is out of range; give different classes from 0 to {classes - 1}, and leave two at least."
        )


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}={value} is out of range; give at least {least}.")
