"""The reconstruction task: its error, what it keeps of a test pass, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from hydra.utils import instantiate
from PIL import Image
from torch import Tensor, nn

from locallearn.algorithms import Backprop
from locallearn.batch import Batch
from locallearn.nets import Blocks, autoencoder, mlp
from locallearn.strategies.local import LocalStrategy
from locallearn.tasks.reconstruction import Reconstruction

SHAPE = (1, 8, 8)
IMAGES = torch.randn(10, *SHAPE, generator=torch.Generator().manual_seed(0))
sgd = partial(torch.optim.SGD, lr=0.1)


def _net() -> Blocks:
    torch.manual_seed(0)
    net = autoencoder(SHAPE, (4, 6), decoder_scale=1.0)
    assert net.readout is not None
    for parameter in net.readout.parameters():  # else every output is zero at first
        nn.init.normal_(parameter, std=0.1)
    return net


def _task(**options: Any) -> Reconstruction:
    return Reconstruction(_net(), torch.zeros(2, *SHAPE), **options)


def _trainer(**options: Any) -> pl.Trainer:
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    given: dict[str, Any] = {"accelerator": "cpu", "devices": 1, **dict.fromkeys(off, False), **options}
    return pl.Trainer(**given)


class _Loader:
    """Images in a fixed order, with labels that nobody should read."""

    def __init__(self, size: int, images: Tensor = IMAGES) -> None:
        self.batches = [Batch(part, torch.full((len(part),), -1)) for part in torch.split(images, size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def _test(task: Reconstruction, size: int = 3, images: Tensor = IMAGES) -> dict[str, float]:
    return dict(_trainer().test(task, _Loader(size, images), verbose=False)[0])


# -- the error --------------------------------------------------------------------------------------------------------
def test_the_step_is_the_mean_squared_error_over_every_entry() -> None:
    task = _task()
    expected = sum(
        (out - image).square().sum() for out, image in zip(task.net(IMAGES), IMAGES, strict=True)
    ) / torch.tensor(IMAGES.numel())
    loss = task.training_step(Batch(IMAGES, torch.zeros(10)), 0)
    assert torch.allclose(loss, expected)
    weights = list(task.net.parameters())
    for got, want in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True):
        assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("size", [3, 10])
def test_logged_figures_are_means_over_images_however_they_are_batched(size: int) -> None:
    task = _task()
    with torch.no_grad():
        expected = float((task.net.eval()(IMAGES) - IMAGES).double().square().mean())
    assert _test(task, size) == {name: pytest.approx(expected, rel=1e-5) for name in ("test/mse", "test/loss")}
    (logged,) = _trainer().validate(task, _Loader(size), verbose=False)
    assert logged == {name: pytest.approx(expected, rel=1e-5) for name in ("validation/mse", "validation/loss")}
    assert (task.metric, task.maximise) == ("mse", False)


def test_figures_are_those_of_the_algorithms_own_inference() -> None:
    class Blank(Backprop):
        def predict(self, inputs: Tensor, *context: Any) -> Tensor:
            return torch.zeros_like(inputs)

    task = _task()
    task.use(Blank())
    assert _test(task)["test/mse"] == pytest.approx(float(IMAGES.square().mean()), rel=1e-5)
    assert task.samples is not None
    assert not task.samples[:, 1].any()


def test_plain_lightning_and_the_strategy_train_the_same_weights() -> None:
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    plain, driven = _task(optimizer=sgd, scheduler=scheduler), _task()
    before = _test(plain)["test/mse"]
    _trainer(max_epochs=3).fit(plain, _Loader(5), _Loader(5))
    _trainer(max_epochs=3, strategy=LocalStrategy(Backprop(), sgd, scheduler)).fit(driven, _Loader(5), _Loader(5))
    for a, b in zip(plain.net.parameters(), driven.net.parameters(), strict=True):
        assert torch.equal(a, b)
    assert _test(plain)["test/mse"] < 0.99 * before


def test_images_are_their_own_targets_however_they_come() -> None:
    task, labels, index = _task(), torch.arange(10), torch.arange(10)
    for raw in (IMAGES, (IMAGES, labels), [IMAGES, labels], Batch(IMAGES, labels, index=index)):
        batch = task.to_batch(raw)
        assert batch.inputs is IMAGES
        assert batch.targets is IMAGES
    assert task.to_batch(Batch(IMAGES, labels, index=index)).index is index


def test_an_algorithm_is_told_images_not_classes() -> None:
    info = Reconstruction(_net(), Batch(IMAGES[:2], torch.arange(2))).info()
    assert (info.outputs, info.classes) == (64, False)
    assert torch.equal(info.example.inputs, IMAGES[:2])
    assert torch.equal(info.example.targets, IMAGES[:2])
    assert info.loss(IMAGES, IMAGES + 2) == pytest.approx(4.0)


def test_the_settings_make_the_task() -> None:
    path = Path(__file__).parents[2] / "conf" / "task" / "reconstruction.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(instantiate(settings, net=_net(), example=torch.zeros(2, *SHAPE)), Reconstruction)


# -- what is kept for the record --------------------------------------------------------------------------------------
def test_a_test_pass_keeps_its_first_eight_images_and_what_became_of_them() -> None:
    task = _task()
    _test(task, size=3)
    assert task.samples is not None
    assert (task.samples.shape, task.samples.dtype) == ((8, 2, *SHAPE), torch.float16)
    assert torch.equal(task.samples[:, 0], IMAGES[:8].half())
    with torch.no_grad():
        assert torch.allclose(task.samples[:, 1].float(), task.net.eval()(IMAGES)[:8], atol=2e-3)
    _test(task, images=IMAGES[8:])  # the next pass starts anew
    assert torch.equal(task.samples[:, 0], IMAGES[8:].half())


def _pixels(path: Path, pairs: int, height: int, width: int) -> Tensor:
    """Pictures ``(2, pairs, 3, height, width)`` in shades 0 to 255, cut out of the grid of two rows."""
    grid = torch.from_numpy(np.array(Image.open(path))).movedim(2, 0)
    assert grid.shape == (3, 2 * (height + 2) + 2, pairs * (width + 2) + 2)
    rows = [
        torch.stack(
            [grid[:, 2 + y : 2 + y + height, 2 + x : 2 + x + width] for x in range(0, pairs * (width + 2), width + 2)]
        )
        for y in (0, height + 2)
    ]
    return torch.stack(rows).float()


def test_the_picture_has_inputs_above_and_outputs_below_in_the_range_of_the_inputs(tmp_path: Path) -> None:
    task, path = _task(), tmp_path / "pairs.png"
    inputs = torch.linspace(-2, 3, 3 * 3 * 4 * 5).reshape(3, 3, 4, 5)
    outputs = inputs.flip(0) * 1.5  # from -3 to 4.5: both ends are cut off
    task.samples = torch.stack((inputs, outputs), 1).half()
    task.write_samples(path)
    above, below = _pixels(path, 3, 4, 5)
    assert torch.allclose(above, (inputs + 2) / 5 * 255, atol=1)
    assert torch.allclose(below, ((outputs + 2) / 5).clamp(0, 1) * 255, atol=1)
    assert below.min() == 0
    assert below.max() == 255


def test_any_number_of_channels_and_broken_outputs_are_drawn(tmp_path: Path) -> None:
    task, path = _task(), tmp_path / "pairs.png"
    task.samples = torch.stack((torch.ones(2, 5, 4, 4), torch.full((2, 5, 4, 4), float("nan"))), 1).half()
    task.samples[0, 1] = float("inf")
    task.write_samples(path)
    above, below = _pixels(path, 2, 4, 4)
    assert not above.any()  # images without any contrast
    assert [float(picture.max()) for picture in below] == [255.0, 0.0]
    task.samples = torch.stack((torch.arange(5.0).reshape(1, 5, 1, 1).expand(2, 5, 4, 4),) * 2, 1).half()
    task.samples[0] = 0.0
    task.write_samples(path)
    above, _ = _pixels(path, 2, 4, 4)
    assert [float(picture.mean()) for picture in above] == [0.0, 255.0]  # the mean of the channels is 2 or 0


def test_there_is_no_picture_before_a_test_pass(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="make a test pass first"):
        _task().write_samples(tmp_path / "pairs.png")


# -- refusals ---------------------------------------------------------------------------------------------------------
def test_a_network_that_makes_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match=r"makes \(2, 10\) of images \(2, 1, 8, 8\).*net=autoencoder"):
        Reconstruction(mlp(SHAPE, 10, (5,)), torch.zeros(2, *SHAPE))
    with pytest.raises(ValueError, match=r"inputs of shape \(2, 64\).*dataset\.flatten=false"):
        Reconstruction(mlp((64,), 64, (5,)), torch.zeros(2, 64))


def test_the_check_leaves_the_network_as_it_was() -> None:
    net = _net()
    net[1].eval()
    before, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    Reconstruction(net, IMAGES[:2])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
