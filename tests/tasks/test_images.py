"""Image data: files, splits, augmentation, and a stream of batches that can be stopped and resumed anywhere."""

from __future__ import annotations

import functools
import gzip
import hashlib
import os
import pickle
import re
import socket
import struct
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from lightning.pytorch import Callback, LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import functional as transforms

from locallearn.batch import Batch
from locallearn.tasks._digests import DIGESTS
from locallearn.tasks.images import (
    DATASETS,
    Augment,
    BatchLoader,
    DataMissing,
    ImageData,
    data_status,
    default_data_dir,
    load_images,
    stratified_split,
)
from tests.tasks.conftest import quiet_trainer

# Lightning 2.6.6 asks torch 2.15 for it in its own loops.
pytestmark = pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")

FILE_SETS = [name for name, facts in DATASETS.items() if facts.files]
MNIST_FILES = DATASETS["mnist"].files


# Files


def _idx(array: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """The IDX format of the MNIST page: two zero bytes, type 8 (uint8), rank, sizes big-endian, then the pixels."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture(scope="module")
def made_up_mnist() -> dict[str, bytes]:
    """Files of MNIST's names and sizes: image i is filled with i mod 251, its label is i mod 10."""
    files = {}
    for part, samples in (("train", 60_000), ("t10k", 10_000)):
        numbers = np.arange(samples)
        pixels = np.broadcast_to((numbers % 251).astype(np.uint8)[:, None, None], (samples, 28, 28))
        files[f"{part}-images-idx3-ubyte"] = _idx(pixels)
        files[f"{part}-labels-idx1-ubyte"] = _idx((numbers % 10).astype(np.uint8))
    return files


@pytest.fixture
def known_mnist(made_up_mnist: dict[str, bytes], known: Callable[[Mapping[str, bytes]], None]) -> dict[str, bytes]:
    known({f"images/MNIST/raw/{name}": content for name, content in made_up_mnist.items()})
    return made_up_mnist


@pytest.fixture
def mnist_dir(tmp_path: Path, known_mnist: dict[str, bytes]) -> Path:
    folder = tmp_path / "data" / "images" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, content in known_mnist.items():
        (folder / name).write_bytes(content)
    return tmp_path / "data"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """Make every connection fail at once; returns the socket timeouts that were in force when it was tried."""
    timeouts: list[float | None] = []

    def refuse(*args: object, **kwargs: object) -> None:
        timeouts.append(socket.getdefaulttimeout())
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return timeouts


def _snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}


def test_reads_files_into_uint8_tensors(mnist_dir: Path) -> None:
    data = load_images("mnist", mnist_dir)
    assert data.train_images.dtype == data.test_images.dtype == torch.uint8
    assert data.train_images.shape == (60_000, 1, 28, 28)
    assert data.test_images.shape == (10_000, 1, 28, 28)
    assert torch.equal(data.train_images[:, 0, 27, 3].long(), torch.arange(60_000) % 251)
    assert torch.equal(data.train_labels, torch.arange(60_000) % 10)
    assert data.test_labels.dtype == torch.int64


def test_reads_from_a_folder_that_cannot_be_written_to(mnist_dir: Path) -> None:
    folders = [mnist_dir, *(path for path in mnist_dir.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    before = _snapshot(mnist_dir)
    try:
        load_images("mnist", mnist_dir)
        # Root may write anywhere, so what was written is looked at too.
        assert _snapshot(mnist_dir) == before
    finally:
        for folder in folders:
            folder.chmod(0o755)


@pytest.mark.parametrize("name", FILE_SETS)
def test_missing_files_are_named_in_one_sentence(
    name: str, tmp_path: Path, no_network: list[float | None], capfd: pytest.CaptureFixture[str]
) -> None:
    data_dir = tmp_path / "absent"
    before = socket.getdefaulttimeout()
    with pytest.raises(DataMissing) as caught:
        load_images(name, data_dir)
    message = str(caught.value)
    for file in DATASETS[name].files:
        assert file in message
    assert str(data_dir / "images" / str(DATASETS[name].folder)) in message
    assert "no network" in message
    assert "LOCALLEARN_DATA" in message
    assert "\n" not in message
    assert isinstance(caught.value, FileNotFoundError)
    assert not data_dir.exists()
    assert capfd.readouterr() == ("", "")
    assert no_network
    assert all(timeout is not None and timeout <= 10 for timeout in no_network)
    assert socket.getdefaulttimeout() == before


@pytest.fixture
def mirror(tmp_path: Path, known_mnist: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A web server on this machine that torchvision takes for MNIST's; yields the folder it serves."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    resources = []
    for name, content in known_mnist.items():
        packed = gzip.compress(content, compresslevel=1)
        (folder / f"{name}.gz").write_bytes(packed)
        resources.append((f"{name}.gz", hashlib.md5(packed, usedforsecurity=False).hexdigest()))

    class _Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
        yield folder
        server.shutdown()


def test_missing_files_are_downloaded(
    mirror: Path, tmp_path: Path, made_up_mnist: dict[str, bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "new" / "images" / "MNIST" / "raw" / MNIST_FILES[0]
    kept.parent.mkdir(parents=True)
    kept.write_bytes(made_up_mnist[MNIST_FILES[0]])
    written = kept.stat().st_mtime_ns
    data = load_images("mnist", tmp_path / "new")
    assert torch.equal(data.test_labels, torch.arange(10_000) % 10)
    assert sorted(path.name for path in kept.parent.iterdir()) == sorted(MNIST_FILES)
    assert kept.stat().st_mtime_ns == written
    assert capfd.readouterr().out == ""


def test_broken_download_leaves_nothing_behind(mirror: Path, tmp_path: Path) -> None:
    last = mirror / f"{MNIST_FILES[-1]}.gz"
    sound = last.read_bytes()
    last.write_bytes(sound[:100])
    with pytest.raises(DataMissing, match="corrupted"):
        load_images("mnist", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    last.write_bytes(sound)
    assert len(load_images("mnist", tmp_path / "new").train_images) == 60_000


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (MNIST_FILES[0], b"\0\0\x08\x03\0\0\xea\x60\0\0\0\x1c\0\0\0\x1c cut short"),
        (MNIST_FILES[1], b""),
        (MNIST_FILES[2], _idx(np.zeros((7, 28, 28), np.uint8))),
        (MNIST_FILES[3], _idx(np.full(10_000, 10, np.uint8))),
    ],
    ids=["cut", "empty", "too few", "wrong labels"],
)
def test_damaged_files_are_told_in_one_sentence(mnist_dir: Path, file: str, content: bytes) -> None:
    folder = mnist_dir / "images" / "MNIST" / "raw"
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"The files in {folder} cannot be read as mnist")) as caught:
        load_images("mnist", mnist_dir)
    assert "\n" not in str(caught.value)


def test_damaged_cifar_is_told_in_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for file in DATASETS["cifar10"].files:
        (folder / file).write_bytes(b"not a pickle")
    with pytest.raises(ValueError, match="cannot be read as cifar10"):
        load_images("cifar10", tmp_path)


def test_a_file_with_one_bit_changed_is_not_opened(mnist_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, file = mnist_dir / "images" / "MNIST" / "raw", MNIST_FILES[0]
    content = bytearray((folder / file).read_bytes())
    content[-1] ^= 1
    monkeypatch.setattr(torchvision.datasets, "MNIST", None)  # whoever opens it fails
    (folder / file).write_bytes(content)
    found = hashlib.sha256(content).hexdigest()[:12]
    with pytest.raises(ValueError, match=rf"{file} is another file: expected SHA-256 \w+\.\.\., found SHA-256 {found}"):
        load_images("mnist", mnist_dir)


class _Runs:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickles_that_are_not_the_known_ones_do_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for file in DATASETS["cifar10"].files:
        (folder / file).write_bytes(pickle.dumps(_Runs(tmp_path / "ran")))
    with pytest.raises(ValueError, match="cannot be read as cifar10"):
        load_images("cifar10", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_what_lies_beside_the_files_is_not_read(mnist_dir: Path) -> None:
    processed = mnist_dir / "images" / "MNIST" / "processed"  # torchvision prefers what older versions of it left here
    processed.mkdir()
    for file in ("training.pt", "test.pt"):
        torch.save((torch.zeros(60_000, 28, 28, dtype=torch.uint8), torch.zeros(60_000)), processed / file)
    assert int(load_images("mnist", mnist_dir).train_labels.max()) == 9


def test_every_file_of_every_set_is_known() -> None:
    for facts in DATASETS.values():
        for file in facts.files:
            digests = DIGESTS[f"images/{facts.folder}/{file}"]
            assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in digests)


def test_status_says_what_is_there(mnist_dir: Path) -> None:
    rows = {row.name: row for row in data_status(mnist_dir)}
    assert list(rows) == list(DATASETS)
    assert rows["digits"].present
    assert rows["digits"].size_bytes is None
    assert rows["mnist"].present
    # Headers of 16 and 8 bytes, 784 bytes an image, one a label.
    assert rows["mnist"].size_bytes == 70_000 * 785 + 2 * (16 + 8)
    assert rows["mnist"].path == mnist_dir / "images" / "MNIST" / "raw"
    assert not rows["cifar10"].present
    assert rows["cifar10"].size_bytes is None
    (mnist_dir / "images" / "MNIST" / "raw" / MNIST_FILES[3]).unlink()
    assert not {row.name: row for row in data_status(mnist_dir)}["mnist"].present


def test_data_dir_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOCALLEARN_DATA", str(tmp_path))
    assert default_data_dir() == tmp_path
    monkeypatch.setenv("LOCALLEARN_DATA", "")
    assert default_data_dir().name == "locallearn"


# The sets


def test_digits_are_those_of_scikit_learn_in_a_fixed_split() -> None:
    data = load_images("digits")
    original = load_digits()
    assert data.train_images.shape == (1437, 1, 8, 8)
    assert data.test_images.shape == (360, 1, 8, 8)
    together = torch.cat([data.train_images, data.test_images]).squeeze(1).numpy()
    labels = torch.cat([data.train_labels, data.test_labels]).numpy()
    # Every image of the package once, neither lost nor on both sides: 255 / 16 keeps its 17 grey values apart.
    ours = sorted((label, (image / 255 * 16).round().tobytes()) for image, label in zip(together, labels, strict=True))
    theirs = sorted((label, image.tobytes()) for image, label in zip(original.images, original.target, strict=True))
    assert ours == theirs
    assert together.max() == 255
    shares = np.bincount(original.target) * 360 / 1797
    assert np.abs(np.bincount(data.test_labels) - shares).max() < 1
    # The split is part of the data set: published figures hold for this one only.
    assert data.test_labels[:20].tolist() == [1, 4, 8, 6, 5, 9, 9, 1, 3, 2, 2, 2, 0, 7, 4, 8, 1, 5, 3, 9]


@pytest.mark.parametrize("name", list(DATASETS))
def test_facts_agree_with_the_data(name: str) -> None:
    if DATASETS[name].files and not os.environ.get("LOCALLEARN_DATA"):
        pytest.skip("LOCALLEARN_DATA is not set: no real image files to look at")
    facts = DATASETS[name]
    if not {row.name: row.present for row in data_status()}[name]:
        pytest.skip(f"{name} is not in LOCALLEARN_DATA")
    data = load_images(name)
    assert data.train_images.shape == (facts.train_samples, *facts.shape)
    assert data.test_images.shape == (facts.test_samples, *facts.shape)
    for labels in (data.train_labels, data.test_labels):
        assert sorted(set(labels.tolist())) == list(range(facts.classes))
    if facts.files:
        # Published: every class equally often, but for MNIST and the digits.
        even = name != "mnist"
        assert (len(set(torch.bincount(data.train_labels).tolist())) == 1) == even
    for channel, (mean, std) in enumerate(zip(facts.mean, facts.std, strict=True)):
        pixels = data.train_images[:, channel].numpy() / 255
        assert pixels.mean() == pytest.approx(mean, abs=5.1e-5)
        assert pixels.std() == pytest.approx(std, abs=5.1e-5)


@pytest.mark.parametrize("name", FILE_SETS)
def test_images_are_those_torchvision_hands_out(name: str) -> None:
    if not os.environ.get("LOCALLEARN_DATA"):
        pytest.skip("LOCALLEARN_DATA is not set: no real image files to look at")
    if not {row.name: row.present for row in data_status()}[name]:
        pytest.skip(f"{name} is not in LOCALLEARN_DATA")
    data = load_images(name)
    theirs = getattr(torchvision.datasets, str(DATASETS[name].reader))(default_data_dir() / "images", train=False)
    for position in (0, 17, 9_999):
        image, label = theirs[position]
        assert torch.equal(data.test_images[position], transforms.pil_to_tensor(image))
        assert data.test_labels[position] == label


# Splits


def test_split_is_disjoint_complete_seeded_and_stratified() -> None:
    labels = torch.randint(5, (997,), generator=torch.Generator().manual_seed(1)).clamp(max=3)
    rest, chosen = stratified_split(labels, 100, seed=0)
    assert len(chosen) == 100
    assert torch.equal(torch.cat([rest, chosen]).sort().values, torch.arange(997))
    shares = torch.bincount(labels) * 100 / 997
    assert (torch.bincount(labels[chosen]) - shares).abs().max() < 1
    assert torch.equal(stratified_split(labels, 100, seed=0)[1], chosen)
    assert not torch.equal(stratified_split(labels, 100, seed=1)[1], chosen)


def test_split_chooses_every_sample_equally_often() -> None:
    labels = torch.tensor([0] * 30 + [1] * 10)
    hits = torch.zeros(40)
    for seed in range(2000):
        hits[stratified_split(labels, 8, seed)[1]] += 1
    # Binomial with p = 1/5: mean 400, standard deviation 18.
    assert (hits - 400).abs().max() < 90


def test_validation_does_not_follow_the_seed() -> None:
    first, second = ImageData("digits", seed=0), ImageData("digits", seed=5)
    assert torch.equal(_inputs(first.val_dataloader()), _inputs(second.val_dataloader()))
    assert not torch.equal(_inputs(first.train_dataloader()), _inputs(second.train_dataloader()))
    assert not torch.equal(_inputs(first.val_dataloader()), _inputs(ImageData("digits", split_seed=1).val_dataloader()))


def test_training_and_validation_share_no_sample() -> None:
    data = ImageData("digits", validation=200)
    parts = [_inputs(data.train_dataloader()), _inputs(data.val_dataloader())]
    assert [len(part) for part in parts] == [1237, 200]
    together = torch.cat(parts).mul(255).round().flatten(1)
    everything = load_images("digits").train_images.flatten(1).float()
    assert sorted(together.tolist()) == sorted(everything.tolist())


def _inputs(loader: BatchLoader) -> Tensor:
    return torch.cat([batch.inputs for batch in loader])


# Augmentation


def _augment_one_by_one(images: Tensor, augment: Augment, generator: torch.Generator) -> Tensor:
    """The same draws, with torchvision's flip, pad and crop on one image after another."""
    flips = torch.randint(2, (len(images),), generator=generator) if augment.flip else torch.zeros(len(images))
    offsets = torch.randint(2 * augment.pad + 1, (2, len(images)), generator=generator)
    mode = {"zeros": "constant", "reflect": "reflect", "replicate": "edge"}[augment.padding_mode]
    results = []
    for image, flip, top, left in zip(images, flips, *offsets, strict=True):
        image = transforms.hflip(image) if flip else image
        image = transforms.pad(image, [augment.pad], padding_mode=mode)
        results.append(transforms.crop(image, int(top), int(left), *images.shape[2:]))
    return torch.stack(results)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(33, 3, 32, 32), (5, 1, 9, 12), (1, 2, 6, 5)])
@pytest.mark.parametrize(
    "augment",
    [
        Augment(),
        Augment(pad=2, padding_mode="reflect"),
        Augment(pad=9, padding_mode="replicate"),
        Augment(pad=0),
        Augment(flip=False),
        Augment(pad=1),
    ],
    ids=str,
)
def test_augmentation_equals_one_image_after_another(
    augment: Augment, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    images = torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = images.clone()
    for seed in range(3):
        result = augment(images, torch.Generator().manual_seed(seed))
        assert result.dtype == dtype
        assert torch.equal(result, _augment_one_by_one(images, augment, torch.Generator().manual_seed(seed)))
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    "augment", [Augment(), Augment(pad=0), Augment(flip=False), Augment(pad=3, padding_mode="reflect")], ids=str
)
def test_augmentation_does_not_depend_on_how_images_lie_in_memory(augment: Augment) -> None:
    images = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8)
    layouts = [images[7:13], images.transpose(2, 3)[7:13], images[7:13].to(memory_format=torch.channels_last)]
    for part in layouts:
        plain = part.clone(memory_format=torch.contiguous_format)
        expected = augment(plain, torch.Generator().manual_seed(4))
        assert torch.equal(augment(part, torch.Generator().manual_seed(4)), expected)


def test_augmentation_differs_from_sample_to_sample() -> None:
    image = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    results = Augment(pad=2)(image.expand(4000, 1, 8, 8), torch.Generator().manual_seed(0))
    counts = Counter(tuple(result) for result in results.flatten(1).tolist())
    # 5 × 5 offsets, flipped or not, all equally likely: mean 80, standard deviation 9.
    assert len(counts) == 50
    assert all(abs(count - 80) < 45 for count in counts.values())


def test_augmentation_draws_from_its_generator_alone() -> None:
    images = torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8)
    before = torch.random.get_rng_state()
    Augment(pad=2)(images, torch.Generator().manual_seed(0))
    list(BatchLoader(images, torch.zeros(16).long(), 4, shuffle=True, augment=Augment()))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_augmentation_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="pad=-1"):
        Augment(pad=-1)
    with pytest.raises(ValueError, match="zeros or reflect"):
        Augment(padding_mode="edge")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="changes nothing"):
        Augment(pad=0, flip=False)
    with pytest.raises(ValueError, match="pad smaller"):
        Augment(pad=4, padding_mode="reflect")(torch.zeros(1, 1, 4, 8), torch.Generator())
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        Augment()(torch.zeros(1, 4, 8), torch.Generator())


# Batches


def _numbered(samples: int = 10) -> tuple[Tensor, Tensor]:
    """Images whose every pixel is the sample's position, labelled with it."""
    positions = torch.arange(samples)
    return positions.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 4, 4).contiguous(), positions


def _stream(loader: BatchLoader, epochs: int) -> list[list[list[int]]]:
    return [[_index(batch) for batch in loader] for _ in range(epochs)]


def _index(batch: Batch) -> list[int]:
    assert batch.index is not None
    return list(batch.index.tolist())


@pytest.mark.parametrize("augment", [None, Augment(pad=0)])
def test_batches_carry_the_samples_that_index_names(augment: Augment | None) -> None:
    images, labels = _numbered(100)
    loader = BatchLoader(images, labels, 32, shuffle=True, augment=augment)
    batches = list(loader)
    assert len(batches) == len(loader) == 4
    assert [len(batch.targets) for batch in batches] == [32, 32, 32, 4]
    for batch in batches:
        assert batch.targets.tolist() == _index(batch)
        assert torch.equal(batch.inputs, (labels[batch.targets] / 255).view(-1, 1, 1, 1).expand(-1, 2, 4, 4))
        assert (batch.inputs.dtype, batch.targets.dtype) == (torch.float32, torch.int64)
        assert batch.context == ()
        assert batch.rows is None
    assert sorted(chain(*_stream(loader, 1)[0])) == list(range(100))


def test_unshuffled_batches_are_views_and_shuffled_ones_are_not() -> None:
    images, labels = _numbered()
    batches = list(BatchLoader(images, labels, 4, shuffle=False))
    starts = [batch.inputs.data_ptr() for batch in batches]
    assert [start - starts[0] for start in starts] == [0, 4 * 32 * 4, 8 * 32 * 4]
    assert len({batch.targets.untyped_storage().data_ptr() for batch in batches}) == 1
    shuffled = list(BatchLoader(images, labels, 4, shuffle=True))
    assert len({batch.inputs.untyped_storage().data_ptr() for batch in shuffled}) == 3


def test_drop_last_and_missing_index() -> None:
    images, labels = _numbered()
    loader = BatchLoader(images, labels, 4, shuffle=False, drop_last=True, indexed=False)
    batches = list(loader)
    assert len(batches) == len(loader) == 2
    assert all(batch.index is None for batch in batches)
    assert len(BatchLoader(images, labels, 5, shuffle=False)) == 2


def test_stream_depends_on_seed_and_epoch_alone() -> None:
    images, labels = _numbered()
    stream = _stream(BatchLoader(images, labels, 4, shuffle=True, seed=3), 3)
    torch.manual_seed(99)
    torch.rand(7)
    assert _stream(BatchLoader(images, labels, 4, shuffle=True, seed=3), 3) == stream
    assert stream[0] != stream[1] != stream[2] != stream[0]
    assert _stream(BatchLoader(images, labels, 4, shuffle=True, seed=4), 1)[0] != stream[0]
    # An epoch broken off does not move the next one.
    loader = BatchLoader(images, labels, 4, shuffle=True, seed=3)
    assert _index(next(iter(loader))) == stream[0][0]
    assert _stream(loader, 2) == stream[1:]


def test_augmentation_is_drawn_anew_for_epoch_and_batch_and_repeats_with_the_seed() -> None:
    images = torch.randint(256, (1, 3, 8, 8), dtype=torch.uint8).expand(12, 3, 8, 8)
    loader = BatchLoader(images, torch.zeros(12).long(), 4, shuffle=False, augment=Augment(), seed=1)
    batches = [batch.inputs for _ in range(2) for batch in loader]
    for first in range(6):
        for second in range(first):
            assert not torch.equal(batches[first], batches[second])
    again = BatchLoader(images, torch.zeros(12).long(), 4, shuffle=False, augment=Augment(), seed=1)
    assert all(torch.equal(old, batch.inputs) for old, batch in zip(batches, again, strict=False))


def test_scaling_equals_torchvision_and_does_not_depend_on_the_budget() -> None:
    images = torch.randint(256, (9, 3, 5, 7), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    expected = transforms.normalize(images / 255, list(mean), list(std))
    for budget in (images.numel() * 4, images.numel() * 4 - 1):
        loader = BatchLoader(
            images, torch.zeros(9).long(), 4, shuffle=False, scale=(mean, std), flatten=True, memory_budget=budget
        )
        assert torch.equal(_inputs(loader), expected.flatten(1))
    starts = {batch.inputs.untyped_storage().data_ptr() for batch in list(loader)}
    assert len(starts) == 3, "above the budget nothing but bytes may be kept"


def test_floating_point_images_are_taken_as_they_are_and_left_alone() -> None:
    images = torch.randn(6, 3)
    before = images.clone()
    loader = BatchLoader(images, torch.zeros(6).long(), 4, shuffle=False, scale=((1.0,), (2.0,)))
    assert torch.equal(_inputs(loader), (before - 1) / 2)
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"labels": torch.zeros(3)}, r"labels of shape \(3,\)"),
        ({"batch_size": 11, "drop_last": True}, "no batch of 11"),
        ({"images": torch.zeros(0, 2), "labels": torch.zeros(0)}, "0 samples"),
        ({"scale": ((0.1,) * 3, (0.2,) * 3)}, "images have 2"),
    ],
)
def test_loader_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    images, labels = _numbered()
    settings: dict[str, Any] = {"images": images, "labels": labels, "batch_size": 4, "shuffle": True}
    with pytest.raises(ValueError, match=message):
        BatchLoader(**(settings | change))


# Stopping and going on


@pytest.mark.parametrize("taken", range(8))
def test_state_goes_on_after_any_batch_of_a_plain_loop(taken: int) -> None:
    images, labels = _numbered()
    whole = list(chain(*_stream(BatchLoader(images, labels, 4, shuffle=True), 4)))
    first = BatchLoader(images, labels, 4, shuffle=True)
    seen: list[list[int]] = []
    while len(seen) < taken:
        for batch in first:
            seen.append(_index(batch))
            if len(seen) == taken:
                break
    second = BatchLoader(images, labels, 4, shuffle=True)
    second.load_state_dict(first.state_dict())
    while len(seen) < len(whole):
        seen += [_index(batch) for batch in second]
    assert seen == whole


def test_state_of_other_data_is_refused() -> None:
    images, labels = _numbered()
    state = BatchLoader(images, labels, 4, shuffle=True).state_dict()
    with pytest.raises(ValueError, match="batch_size=4 but the data now have batch_size=5"):
        BatchLoader(images, labels, 5, shuffle=True).load_state_dict(state)


def _fingerprint(batch: Batch) -> tuple[list[int], float]:
    """Labels of a batch, and a sum that every augmented pixel enters with a weight of its own."""
    weights = torch.arange(batch.inputs.numel(), dtype=torch.float64).cos()
    return batch.targets.tolist(), float(batch.inputs.double().flatten() @ weights)


class _Recorder(LightningModule):
    """Learns nothing worth having; remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[list[int], float]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen.append(_fingerprint(batch))
        return self.weight.sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert batch.index is None

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.seen.append((batch.targets.tolist(), 0.0))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _data() -> ImageData:
    """Four batches of training data and an augmentation, so that every kind of draw is in play."""
    return ImageData("digits", batch_size=10, limit_train=37, validation=20, augment=Augment(pad=1))


EPOCHS = 3


@pytest.fixture(scope="module", params=[1.0, 3, 0.5], ids="limit_train_batches={}".format)
def uninterrupted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int | float, int, _Recorder]:
    """``limit_train_batches``, the batches in an epoch, and what a run of three epochs saw that was never stopped."""
    limit: int | float = request.param
    recorder = _Recorder()
    trainer = quiet_trainer(tmp_path_factory.mktemp("whole"), max_epochs=EPOCHS, limit_train_batches=limit)
    trainer.fit(recorder, datamodule=_data())
    return limit, {1.0: 4, 3: 3, 0.5: 2}[limit], recorder


def test_trainer_sees_the_stream_of_a_plain_loop(uninterrupted: tuple[int | float, int, _Recorder]) -> None:
    _, batches, whole = uninterrupted
    loader = _data().train_dataloader()
    plain = [batch for _ in range(EPOCHS) for _, batch in zip(range(batches), loader, strict=False)]
    assert whole.seen == [_fingerprint(batch) for batch in plain]
    assert len({str(entry) for entry in whole.seen}) == EPOCHS * batches


@pytest.mark.parametrize("steps", [1, 3, 4, 6])
def test_trainer_resumes_with_exactly_the_next_batch(
    steps: int, uninterrupted: tuple[int | float, int, _Recorder], tmp_path: Path
) -> None:
    limit, batches, whole = uninterrupted
    first = _Recorder()
    trainer = quiet_trainer(tmp_path, max_steps=steps, limit_train_batches=limit)
    trainer.fit(first, datamodule=_data())
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    second = _Recorder()
    # Counted in steps: of a run stopped by max_steps, Lightning takes the broken epoch for a whole one.
    quiet_trainer(tmp_path, max_steps=EPOCHS * batches, limit_train_batches=limit).fit(
        second, datamodule=_data(), ckpt_path=tmp_path / "stopped.ckpt", weights_only=True
    )
    assert first.seen + second.seen == whole.seen


class _SaveEverywhere(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _save(self, trainer: Trainer, when: str) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step} {when}.ckpt")

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        self._save(trainer, "batch")

    def on_validation_end(self, trainer: Trainer, *args: object) -> None:
        self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer: Trainer, *args: object) -> None:
        self._save(trainer, "epoch")


def test_trainer_resumes_from_checkpoints_taken_on_the_way(
    uninterrupted: tuple[int | float, int, _Recorder], tmp_path: Path
) -> None:
    limit, batches, whole = uninterrupted
    settings: dict[str, Any] = {"max_epochs": EPOCHS, "limit_train_batches": limit, "num_sanity_val_steps": 0}
    quiet_trainer(tmp_path, callbacks=[_SaveEverywhere(tmp_path)], **settings).fit(_Recorder(), datamodule=_data())
    for step in (1, batches, 2 * batches - 1, 2 * batches):
        for when in ("batch", "validation", "epoch") if step % batches == 0 else ("batch",):
            checkpoint = tmp_path / f"{step} {when}.ckpt"
            resumed = _Recorder()
            quiet_trainer(tmp_path, **settings).fit(
                resumed, datamodule=_data(), ckpt_path=checkpoint, weights_only=True
            )
            assert resumed.seen == whole.seen[step:], checkpoint.stem


def test_other_uses_of_the_data_during_a_run_do_not_move_its_place(
    uninterrupted: tuple[int | float, int, _Recorder], tmp_path: Path
) -> None:
    limit, batches, whole = uninterrupted

    class _Meddler(_SaveEverywhere):
        def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
            data = trainer.datamodule  # type: ignore[attr-defined]
            list(data.train_dataloader())
            list(data.val_dataloader())

    settings: dict[str, Any] = {"max_epochs": EPOCHS, "limit_train_batches": limit}
    data, checkpoint = _data(), tmp_path / f"{2 * batches} epoch.ckpt"
    for callbacks in ([], [_Meddler(tmp_path)]):
        again = _Recorder()
        quiet_trainer(tmp_path, callbacks=callbacks, **settings).fit(again, datamodule=data)
        assert again.seen == whole.seen
    quiet_trainer(tmp_path).test(_Recorder(), datamodule=data, ckpt_path=checkpoint, weights_only=True, verbose=False)
    afresh, resumed = _Recorder(), _Recorder()
    quiet_trainer(tmp_path, **settings).fit(afresh, datamodule=data)
    assert afresh.seen == whole.seen, "testing a checkpoint must not move the training data"
    quiet_trainer(tmp_path, **settings).fit(resumed, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    assert resumed.seen == whole.seen[2 * batches :]


def test_reloading_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave reload_dataloaders_every_n_epochs at 0"):
        quiet_trainer(tmp_path, max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(_Recorder(), datamodule=_data())


def test_trainer_tests_on_the_whole_test_set(tmp_path: Path) -> None:
    recorder = _Recorder()
    quiet_trainer(tmp_path).test(recorder, datamodule=ImageData("digits", eval_batch_size=100), verbose=False)
    assert list(chain(*(labels for labels, _ in recorder.seen))) == load_images("digits").test_labels.tolist()


# The data module


@pytest.mark.parametrize("name", list(DATASETS))
def test_shape_and_classes_are_known_without_data(name: str, tmp_path: Path) -> None:
    facts = DATASETS[name]
    data = ImageData(name, tmp_path / "absent")
    assert (data.name, data.shape, data.classes) == (name, facts.shape, facts.classes)
    assert data.example().shape == (2, *facts.shape)
    flat = ImageData(name, tmp_path / "absent", flatten=True)
    assert flat.shape == (int(np.prod(facts.shape)),)
    assert flat.example().shape == (2, *flat.shape)


def test_flat_and_standard_inputs() -> None:
    plain = ImageData("digits")
    changed = ImageData("digits", flatten=True, normalize="standard")
    mean, std = DATASETS["digits"].mean[0], DATASETS["digits"].std[0]
    expected = ((_inputs(plain.test_dataloader()) - mean) / std).flatten(1)
    torch.testing.assert_close(_inputs(changed.test_dataloader()), expected)
    train = _inputs(changed.train_dataloader())
    assert train.mean().abs() < 0.02
    assert abs(train.std() - 1) < 0.02


def test_only_training_batches_are_augmented() -> None:
    plain, augmented = ImageData("digits"), ImageData("digits", augment=Augment(pad=1))
    # A cache of activations is looked up by position, and an augmented sample is another one every time.
    first, same = next(iter(plain.train_dataloader())), next(iter(augmented.train_dataloader()))
    assert first.index is not None
    assert first.source is None
    assert same.index is None
    # Where it came from is known all the same.
    assert same.source is not None
    assert torch.equal(same.source, first.index)
    assert torch.equal(first.places, same.places)  # type: ignore[arg-type]
    assert next(iter(augmented.val_dataloader())).places is None
    assert torch.equal(_inputs(augmented.val_dataloader()), _inputs(plain.val_dataloader()))
    assert torch.equal(_inputs(augmented.test_dataloader()), _inputs(plain.test_dataloader()))
    assert not torch.equal(_inputs(augmented.train_dataloader()), _inputs(plain.train_dataloader()))


def test_limit_keeps_the_share_of_every_class_and_leaves_validation_alone() -> None:
    data, small = ImageData("digits"), ImageData("digits", limit_train=100)
    labels = torch.cat([batch.targets for batch in small.train_dataloader()])
    assert len(labels) == 100
    assert torch.bincount(labels).tolist() == pytest.approx([10] * 10, abs=1)
    assert torch.equal(_inputs(small.val_dataloader()), _inputs(data.val_dataloader()))
    assert max(max(indices) for indices in _stream(small.train_dataloader(), 1)[0]) == 99


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "mnits"}, "digits, mnist, fashion_mnist, cifar10, cifar100"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"eval_batch_size": -3}, "eval_batch_size=-3"),
        ({"seed": -1}, "seed=-1"),
        ({"split_seed": -1}, "split_seed=-1"),
        ({"validation": 0}, "validation=0 "),
        ({"validation": 0.0}, "validation=0.0"),
        ({"validation": 1.0}, "validation=1.0"),
        ({"validation": 1437}, "1 to 1436"),
        ({"validation": True}, "validation=True"),
        ({"validation": float("nan")}, "validation=nan"),
        ({"limit_train": 0}, "limit_train=0"),
        ({"limit_train": 1300}, "1 to 1293"),
        ({"normalize": "minmax"}, "unit or standard"),
        ({"normalize": "imagenet"}, "three channels"),
    ],
    ids=str,
)
def test_wrong_settings_get_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        ImageData(**({"name": "digits"} | settings))
    assert str(caught.value).count("\n") == 0


def test_several_processes_are_refused() -> None:
    class _Two:
        world_size = 2

    data = ImageData("digits")
    data.trainer = _Two()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="one process"):
        data.train_dataloader()


def test_agrees_with_a_torch_data_loader() -> None:
    data = ImageData("digits", eval_batch_size=50)
    reference = load_images("digits")
    theirs = DataLoader(TensorDataset(reference.test_images / 255, reference.test_labels), batch_size=50)
    for ours, (inputs, labels) in zip(data.test_dataloader(), theirs, strict=True):
        assert torch.equal(ours.inputs, inputs)
        assert torch.equal(ours.targets, labels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("augment", [None, Augment(), Augment(pad=2, padding_mode="reflect")])
def test_batches_on_a_gpu_are_those_on_the_cpu(augment: Augment | None) -> None:
    images, labels = torch.randint(256, (50, 3, 32, 32), dtype=torch.uint8), torch.arange(50)
    here = BatchLoader(images, labels, 16, shuffle=True, augment=augment)
    there = BatchLoader(images, labels, 16, shuffle=True, augment=augment, device="cuda")
    for ours, theirs in zip(here, there, strict=True):
        assert theirs.inputs.is_cuda
        torch.testing.assert_close(theirs.inputs.cpu(), ours.inputs)
        assert _index(theirs) == _index(ours)


def test_whoever_writes_into_a_batch_that_is_a_view_is_told() -> None:
    loader = BatchLoader(torch.rand(6, 4), torch.zeros(6).long(), 2, shuffle=False)
    first = next(iter(loader))
    next(iter(loader))
    first.inputs.mul_(2)
    with pytest.raises(ValueError, match=r"data of shape \(6, 4\) were written into"):
        next(iter(loader))


# -- classes that the network never sees ---------------------------------------------------------------------------------


def test_excluded_classes_are_in_no_part_and_the_others_are_split_as_without() -> None:
    whole = ImageData("digits", batch_size=50, validation=200)
    data = ImageData("digits", batch_size=50, validation=200, exclude=[3, 7])
    sizes = data.batch_sizes()  # before setup
    for make in ("train_dataloader", "val_dataloader", "test_dataloader"):
        everything, kept = (getattr(one, make)().everything() for one in (whole, data))
        stays = ~torch.isin(everything.targets, torch.tensor([3, 7]))
        assert torch.equal(kept.inputs, everything.inputs[stays])
        assert torch.equal(kept.targets, everything.targets[stays])
        if make != "train_dataloader":
            part = "validation" if make == "val_dataloader" else "test"
            unseen = data.excluded_dataloader(part).everything()  # type: ignore[arg-type]
            assert torch.equal(unseen.inputs, everything.inputs[~stays])
            assert unseen.targets.unique().tolist() == [3, 7]
    assert sizes == {len(batch.inputs) for batch in data.train_dataloader()}
    assert data.classes == 10
    few = ImageData("digits", validation=200, exclude=[3], limit_train=90)
    few.setup()
    assert few.train_dataloader().samples == 90
    with pytest.raises(ValueError, match="no class is excluded"):
        whole.excluded_dataloader("test")
    with pytest.raises(ValueError, match="without the excluded classes leaves 1 to"):
        ImageData("digits", validation=200, exclude=[3], limit_train=1200).setup()


@pytest.mark.parametrize("exclude", [[10], [-1], [1, 1], [0.5], [True], list(range(9))])
def test_classes_that_cannot_be_excluded_are_refused(exclude: list[int]) -> None:
    with pytest.raises(ValueError, match="exclude="):
        ImageData("digits", exclude=exclude)
