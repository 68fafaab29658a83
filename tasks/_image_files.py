"""Image data on disk: what each set is, where its files lie, and reading them into memory."""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import pickle
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import platformdirs
import torch
from torch import Tensor

from locallearn.tasks._digests import check_file

CONNECT_TIMEOUT_S = 5.0


class DataMissing(FileNotFoundError):
    """Raw files of a data set are not there and could not be downloaded."""


@dataclass(frozen=True)
class ImageFacts:
    """What is known of an image set without reading it.

    Attributes:
        shape: ``(C, H, W)`` of one image.
        classes: number of classes; labels are ``0 … classes - 1``.
        mean: mean of each channel over the training images, pixels in ``[0, 1]``.
        std: standard deviation of each channel over the training images, pixels in ``[0, 1]``.
        train_samples: number of training images, validation included.
        test_samples: number of test images.
        folder: where the raw files lie below ``data_dir/images``; ``None`` where the data come with a package.
        files: names of the raw files.
        reader: name of the class in ``torchvision.datasets`` that reads them; ``None`` where there are no files.
    """

    shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_samples: int
    test_samples: int
    folder: str | None = None
    files: tuple[str, ...] = ()
    reader: str | None = None


IMAGENET_SCALE = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Means and standard deviations of ImageNet's channels as torchvision's models have them."""

_IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

DATASETS: Mapping[str, ImageFacts] = MappingProxyType(
    {
        "digits": ImageFacts((1, 8, 8), 10, (0.3054,), (0.3760,), 1437, 360),
        "mnist": ImageFacts(
            (1, 28, 28), 10, (0.1307,), (0.3081,), 60_000, 10_000, "MNIST/raw", _IDX_FILES, reader="MNIST"
        ),
        "fashion_mnist": ImageFacts(
            (1, 28, 28), 10, (0.2860,), (0.3530,), 60_000, 10_000, "FashionMNIST/raw", _IDX_FILES, reader="FashionMNIST"
        ),
        "cifar10": ImageFacts(
            (3, 32, 32),
            10,
            (0.4914, 0.4822, 0.4465),
            (0.2470, 0.2435, 0.2616),
            50_000,
            10_000,
            "cifar-10-batches-py",
            (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
            reader="CIFAR10",
        ),
        "cifar100": ImageFacts(
            (3, 32, 32),
            100,
            (0.5071, 0.4865, 0.4409),
            (0.2673, 0.2564, 0.2762),
            50_000,
            10_000,
            "cifar-100-python",
            ("train", "test", "meta"),
            reader="CIFAR100",
        ),
    }
)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """An image set in memory.

    Attributes:
        name: its name in ``DATASETS``.
        classes: number of classes.
        train_images: ``(N, C, H, W)``, uint8.
        train_labels: ``(N,)``, int64.
        test_images: ``(M, C, H, W)``, uint8.
        test_labels: ``(M,)``, int64.
    """

    name: str
    classes: int
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class DataStatus:
    """Whether one image set can be read.

    Attributes:
        name: its name in ``DATASETS``.
        present: whether every wanted file is there (their content is not checked).
        files: names of the wanted files; empty where the data come with a package.
        path: the folder they are wanted in; ``None`` where the data come with a package.
        size_bytes: what the files take on disk; ``None`` where they are not all there or there are none.
    """

    name: str
    present: bool
    files: tuple[str, ...]
    path: Path | None
    size_bytes: int | None


def default_data_dir() -> Path:
    """The data folder where none is named: the environment's ``LOCALLEARN_DATA``, else the user's cache folder."""
    named = os.environ.get("LOCALLEARN_DATA")
    return Path(named).expanduser() if named else platformdirs.user_cache_path("locallearn")


def image_facts(name: str) -> ImageFacts:
    """Look up an image set.

    Raises:
        ValueError: for an unknown name; the sentence lists the known ones.
    """
    if name not in DATASETS:
        raise ValueError(f"There is no image set called {name!r}; choose one of {', '.join(DATASETS)}.")
    return DATASETS[name]


def load_images(name: str, data_dir: Path | str | None = None) -> ImageSet:
    """Read a whole image set into memory, downloading its files first where they are missing.

    ``digits`` comes with scikit-learn: its 1797 images of 8×8 pixels with values 0 … 16 are scaled to 0 … 255 and split
    once for all into 1437 training and 360 test images by ``sklearn.model_selection.train_test_split`` with
    ``test_size=360``, stratified by class, ``random_state=0``, each part in the data's own order. The others keep
    their published split.

    Args:
        name: one of ``DATASETS``.
        data_dir: folder that holds ``images/``, torchvision's root; ``None`` means ``default_data_dir()``. It is only
            written to, and only created, when a download has succeeded.

    Returns:
        Images as uint8 tensors ``(N, C, H, W)``, labels as int64 tensors ``(N,)``.

    Raises:
        ValueError: for an unknown name, files that are not those of this set (their digests are known), or that cannot be
            read.
        DataMissing: when files are missing and cannot be downloaded.
    """
    facts = image_facts(name)
    if facts.folder is None or facts.reader is None:
        return _load_digits(facts)
    root = _root(data_dir)
    _ensure_files(name, facts, facts.reader, root / facts.folder)
    return _read(name, facts, facts.reader, root)


def data_status(data_dir: Path | str | None = None) -> list[DataStatus]:
    """Say which image sets are there, one row for each of ``DATASETS``; nothing is read, downloaded or written.

    Args:
        data_dir: as for ``load_images``.
    """
    rows = []
    for name, facts in DATASETS.items():
        if facts.folder is None:
            rows.append(DataStatus(name, present=True, files=(), path=None, size_bytes=None))
            continue
        folder = _root(data_dir) / facts.folder
        present = not _missing(facts, folder)
        size = sum((folder / file).stat().st_size for file in facts.files) if present else None
        rows.append(DataStatus(name, present, facts.files, folder, size))
    return rows


def _root(data_dir: Path | str | None) -> Path:
    return (default_data_dir() if data_dir is None else Path(data_dir).expanduser()) / "images"


def _missing(facts: ImageFacts, folder: Path) -> list[str]:
    return [file for file in facts.files if not (folder / file).is_file()]


def _load_digits(facts: ImageFacts) -> ImageSet:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    positions = range(len(labels))
    train, test = train_test_split(positions, test_size=facts.test_samples, stratify=labels, random_state=0)
    train, test = sorted(train), sorted(test)
    return ImageSet("digits", facts.classes, images[train], labels[train], images[test], labels[test])


def _read(name: str, facts: ImageFacts, reader: str, root: Path) -> ImageSet:
    # Imported here: torchvision takes seconds to load and the digits do without it.
    import torchvision

    dataset_class = getattr(torchvision.datasets, reader)
    folder = root / str(facts.folder)
    try:
        # From a folder that holds these files and no other: torchvision also reads what it finds beside them.
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / str(facts.folder)).mkdir(parents=True)
            for file in facts.files:
                check_file(folder / file, f"images/{facts.folder}/{file}")
                (Path(scratch) / str(facts.folder) / file).symlink_to((folder / file).resolve())
            train = _tensors(dataset_class(scratch, train=True), facts, facts.train_samples)
            test = _tensors(dataset_class(scratch, train=False), facts, facts.test_samples)
    # What torchvision's readers raise for files cut short, overwritten or not readable.
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"The files in {folder} cannot be read as {name} ({reason(error)}); delete them so that they are"
            " downloaded again, or put sound copies there."
        ) from error
    return ImageSet(name, facts.classes, *train, *test)


def _tensors(dataset: Any, facts: ImageFacts, samples: int) -> tuple[Tensor, Tensor]:
    images = torch.as_tensor(dataset.data)
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    labels = torch.as_tensor(dataset.targets).long()
    if images.shape != (samples, *facts.shape) or labels.shape != (samples,):
        raise ValueError(f"images of shape {tuple(images.shape)} with {labels.numel()} labels")
    if not 0 <= int(labels.min()) <= int(labels.max()) < facts.classes:
        raise ValueError(f"labels from {int(labels.min())} to {int(labels.max())}")
    return images, labels


def _ensure_files(name: str, facts: ImageFacts, reader: str, folder: Path) -> None:
    missing = _missing(facts, folder)
    if not missing:
        return
    try:
        # Downloaded aside and moved in whole, so that a broken download leaves neither half a file nor an empty folder.
        with tempfile.TemporaryDirectory() as scratch:
            _download(reader, scratch)
            folder.mkdir(parents=True, exist_ok=True)
            for file in missing:
                move_in(Path(scratch) / str(facts.folder) / file, folder / file)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise DataMissing(
            f"The files of {name} are not in {folder} and could not be fetched ({reason(error)}): put"
            f" {', '.join(facts.files)} there, or point LOCALLEARN_DATA or data_dir at a folder that holds"
            f" images/{facts.folder} with them."
        ) from error


def _download(reader: str, root: str) -> None:
    import torchvision

    with _short_timeout(), contextlib.redirect_stdout(io.StringIO()):
        getattr(torchvision.datasets, reader)(root, download=True)


@contextlib.contextmanager
def _short_timeout() -> Iterator[None]:
    """Let connections fail after seconds; torchvision has no setting for it."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def move_in(source: Path, target: Path) -> None:
    # The process id keeps parallel runs apart; the last one to finish wins with the same content.
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.copyfile(source, part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def reason(error: Exception) -> str:
    """The last line of an error: torchvision lists one mirror after another, each in lines of its own."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
