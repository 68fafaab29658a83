"""Reconstruction: a network gives back the images it was shown; mean squared error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from locallearn.algorithms.base import TaskInfo
from locallearn.batch import Batch
from locallearn.nets.blocks import Blocks, evaluating
from locallearn.tasks._checks import check_inputs, pair
from locallearn.tasks._task import Task

_SAMPLES = 8


class Reconstruction(Task):
    """Give back the input: mean squared error over all entries.

    The error is that of the images as the data module hands them out, so it depends on their normalisation.

    Args:
        net: the network; its output has the shape of its input, as that of ``locallearn.nets.autoencoder`` has.
        example: two images with the shape and dtype of the real ones, ``(2, C, H, W)``, or a batch of them.
        optimizer: makes the optimizer of the backpropagation baseline from parameters; unused under ``LocalStrategy``,
            which brings its own.
        scheduler: makes its learning rate scheduler, advanced every epoch.

    Attributes:
        samples: after a test pass, the first 8 test images and what became of them, ``(n, 2, C, H, W)``, float16 on the
            CPU, normalised as the data are; before it ``None``.

    Raises:
        ValueError: the inputs are not images, or the network's output has another shape.
    """

    metric = "mse"
    maximise = False

    def __init__(
        self,
        net: Blocks,
        example: Tensor | Batch,
        optimizer: Callable[[Any], Optimizer] = torch.optim.Adam,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> None:
        super().__init__(net, optimizer, scheduler)
        images = example.inputs if isinstance(example, Batch) else example
        if images.ndim != 4:
            raise ValueError(
                f"reconstruction got inputs of shape {tuple(images.shape)}, expected images (N, C, H, W): set "
                "dataset.flatten=false"
            )
        _check_shape(net, images)
        self.samples: Tensor | None = None
        self._example = images

    @override
    def info(self) -> TaskInfo:
        """Shapes and loss, for an algorithm; the targets are images, not classes."""
        return TaskInfo(Batch(self._example, self._example), self._example[0].numel(), F.mse_loss, classes=False)

    @override
    def to_batch(self, raw: Any) -> Batch:
        """Images as their own targets; whatever labels the loader gave are dropped.

        Raises:
            ValueError: there are no images in it.
        """
        if isinstance(raw, Batch):
            check_inputs(raw.inputs)
            return raw._replace(targets=raw.inputs)
        alone = isinstance(raw, tuple | list) and len(raw) == 1
        images = raw if isinstance(raw, Tensor) else raw[0] if alone else pair(raw)[0]
        check_inputs(images)
        return Batch(images, images)

    @override
    def on_test_epoch_start(self) -> None:
        super().on_test_epoch_start()
        self.samples = None

    @override
    def test_step(self, raw: Any, batch_idx: int) -> None:
        batch = self.to_batch(raw)
        outputs: Tensor = self(batch.inputs)
        self._add(_errors(outputs, batch))
        wanted = _SAMPLES - (0 if self.samples is None else len(self.samples))
        if wanted > 0:
            pairs = torch.stack((batch.inputs[:wanted], outputs[:wanted]), 1).to("cpu", torch.float16)
            self.samples = pairs if self.samples is None else torch.cat((self.samples, pairs))

    @override
    def judge(self, batch: Batch) -> Tensor:
        """Samples and summed error."""
        return _errors(self(batch.inputs), batch)

    @override
    def figures(self, sums: list[float]) -> dict[str, float]:
        """Mean squared error, which is the loss, too."""
        samples, error = sums
        return {"mse": error / samples, "loss": error / samples}

    def write_samples(self, path: str | Path) -> None:
        """Write :attr:`samples` as one picture, inputs above, outputs below.

        Black and white are the smallest and the largest entry of these inputs; outputs beyond them are cut off. Images of
        neither one nor three channels are drawn as the grey mean of their channels.

        Args:
            path: of the file, ending in ``.png``.

        Raises:
            ValueError: no test pass has been made.
        """
        if self.samples is None:
            raise ValueError("there are no reconstructions to write: make a test pass first (Trainer.test)")
        # Imported here: torchvision takes seconds to load.
        from torchvision.utils import save_image

        pairs = self.samples.float()
        if pairs.shape[2] not in (1, 3):
            pairs = pairs.mean(2, keepdim=True)
        low, high = pairs[:, 0].aminmax()
        shades = ((pairs - low) / (high - low).clamp_min(1e-6)).nan_to_num().clamp(0, 1)
        save_image(shades.transpose(0, 1).flatten(0, 1), path, nrow=len(pairs), pad_value=1.0)


def _errors(outputs: Tensor, batch: Batch) -> Tensor:
    errors = (outputs.float() - batch.targets.float()).square().flatten(1).mean(1)
    return torch.stack((errors.new_tensor(float(len(errors))), errors.sum()))


def _check_shape(net: Blocks, images: Tensor) -> None:
    with evaluating(net), torch.no_grad():
        outputs = net(images)
    if outputs.shape != images.shape:
        raise ValueError(
            f"the network makes {tuple(outputs.shape)} of images {tuple(images.shape)}, but a reconstruction has its "
            "input's shape: use net=autoencoder"
        )
