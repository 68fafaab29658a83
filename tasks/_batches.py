"""Batches from tensors that stay in memory: order, augmentation and scaling without per-sample Python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from locallearn.batch import Batch

MEMORY_BUDGET_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Augment:
    """Random crop and horizontal flip, drawn anew for every sample and applied to a whole batch at once.

    Each image is flipped with probability one half, padded on all sides, and cropped back to its size at a uniformly
    drawn offset. The usual augmentation for CIFAR (He et al. 2016, arXiv 1512.03385, section 4.2).

    Args:
        pad: pixels added on each side before cropping, so that an image moves by at most ``pad``; 0 never moves it.
        flip: whether to flip.
        padding_mode: ``zeros`` pads with black, ``reflect`` mirrors the image at its border, ``replicate`` repeats the border.

    Raises:
        ValueError: for a negative ``pad``, an unknown ``padding_mode``, or settings that change nothing.
    """

    pad: int = 4
    flip: bool = True
    padding_mode: Literal["zeros", "reflect", "replicate"] = "zeros"

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise ValueError(f"Augment got pad={self.pad}; give a number of pixels of at least 0.")
        if self.padding_mode not in ("zeros", "reflect", "replicate"):
            raise ValueError(f"Augment got padding_mode={self.padding_mode!r}; choose zeros or reflect, or replicate.")
        if self.pad == 0 and not self.flip:
            raise ValueError("Augment(pad=0, flip=False) changes nothing; leave the augmentation out instead.")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment a batch.

        Args:
            images: ``(N, C, H, W)`` of any dtype and device; not changed.
            generator: where every draw comes from. With one on the CPU the draws are the same for images on any device.

        Returns:
            New images of the same shape, dtype and device.

        Raises:
            ValueError: for images that are not ``(N, C, H, W)``, or too small to be mirrored by ``pad``.
        """
        if images.dim() != 4:
            raise ValueError(f"Augment got images of shape {tuple(images.shape)}; give (N, C, H, W).")
        if self.padding_mode == "reflect" and self.pad >= min(images.shape[2:]):
            raise ValueError(
                f"Augment cannot mirror {self.pad} pixels of images of shape {tuple(images.shape)};"
                " choose a pad smaller than height and width."
            )
        device, samples = generator.device, len(images)
        canvas = self._padded(images)
        source = torch.arange(samples, device=device)
        if self.flip:
            flipped = torch.randint(2, (samples,), generator=generator, device=device).nonzero().squeeze(1)
            # Flipped images are appended and pointed to: cheaper than writing them back into the batch.
            source[flipped] = torch.arange(samples, samples + len(flipped), device=device)
            canvas = torch.cat([canvas, canvas.index_select(0, flipped.to(images.device)).flip(-1)])
        top, left = torch.randint(2 * self.pad + 1, (2, samples), generator=generator, device=device)
        first = source * canvas[0].numel() + top * canvas.shape[3] + left
        return _windows(canvas, *images.shape[2:]).index_select(0, first.to(images.device))

    def _padded(self, images: Tensor) -> Tensor:
        """A contiguous batch with ``pad`` pixels more on each side."""
        pad, images = self.pad, images.contiguous()
        if pad == 0:
            return images
        if self.padding_mode == "zeros":
            return F.pad(images, (pad, pad, pad, pad))
        if self.padding_mode == "replicate":
            rows, columns = (torch.arange(-pad, side + pad, device=images.device) for side in images.shape[2:])
            rows, columns = rows.clamp(0, images.shape[2] - 1), columns.clamp(0, images.shape[3] - 1)
            return images.index_select(2, rows).index_select(3, columns)
        # torch's own reflection refuses uint8 on some devices.
        tall = torch.cat([images[:, :, 1 : pad + 1].flip(2), images, images[:, :, -pad - 1 : -1].flip(2)], dim=2)
        return torch.cat([tall[..., 1 : pad + 1].flip(3), tall, tall[..., -pad - 1 : -1].flip(3)], dim=3)


def _windows(canvas: Tensor, height: int, width: int) -> Tensor:
    """Every window ``(C, height, width)`` of a contiguous batch, by the place of its first pixel in memory.

    The windows overlap, so this is a view; picking entries of it copies whole rows, several times faster than a gather
    over pixels. Windows that reach over an image's border are among them and must not be asked for.
    """
    _, channels, rows, columns = canvas.shape
    area = rows * columns
    reach = (channels - 1) * area + (height - 1) * columns + width
    return canvas.as_strided((canvas.numel() - reach + 1, channels, height, width), (1, area, columns, 1))


class BatchLoader:
    """Batches of samples that lie in memory, as the training or validation data of a Lightning ``Trainer``.

    The stream of batches is a function of ``(seed, epoch, batch number)`` alone; every iteration is the next epoch.
    ``state_dict`` and ``load_state_dict`` hold the place inside an epoch; Lightning keeps it in its checkpoints, so a
    run stopped between two batches goes on with exactly the next one.

    Without augmentation the samples are kept as float32, scaled once, if that fits ``memory_budget``; otherwise they
    are kept as they came and scaled batch by batch. Both give the same numbers. Unshuffled batches are views, and are not
    to be written into: blocks get copies where they would (:class:`~locallearn.nets.inplace.InputGuard`), and whoever else
    writes is told with the next batch.

    Args:
        images: ``(N, ...)``; uint8 stands for 0 … 1 and is divided by 255, floating point is taken as it is, and so are other
            whole numbers, which are codes (of characters, say).
        labels: ``(N,)``.
        batch_size: samples in a batch; the last one of an epoch may be smaller.
        shuffle: draw a new order for every epoch.
        seed: of order and augmentation, at least 0.
        augment: applied to the unscaled images of every batch.
        scale: ``(mean, std)`` of each channel; the scaled images are ``(image - mean) / std``.
        flatten: hand out images as ``(N, D)``.
        device: where the data are kept and the batches made.
        drop_last: leave out the last batch of an epoch if it is smaller.
        indexed: hand out ``Batch.index``, the samples' positions ``0 … N - 1`` in ``images``. Meant for training data:
            elsewhere positions would be mistaken for positions in the training set.
        sourced: hand the same positions out as ``Batch.source``: for augmented samples, which are new ones every time.
        epoch_batches: after how many batches whoever iterates ends an epoch early, as a ``Trainer`` with
            ``limit_train_batches`` does: a checkpoint made there goes on with the next epoch. ``None`` means all.
        memory_budget: bytes that the scaled samples may take.

    Raises:
        ValueError: for sizes that do not fit together, a batch size below 1, a negative seed, or data that give no
            batch at all.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        augment: Augment | None = None,
        scale: tuple[Sequence[float], Sequence[float]] | None = None,
        flatten: bool = False,
        device: torch.device | str = "cpu",
        drop_last: bool = False,
        indexed: bool = True,
        sourced: bool = False,
        epoch_batches: int | None = None,
        memory_budget: int = MEMORY_BUDGET_BYTES,
    ) -> None:
        _check(images, labels, batch_size, seed, drop_last, scale)
        self.device = torch.device(device)
        self.samples = len(images)
        self.batch_size = batch_size
        self._shuffle, self._seed, self._drop_last = shuffle, seed, drop_last
        self._augment, self._flatten = augment, flatten
        self._scale = None if scale is None else tuple(self._per_channel(part, images) for part in scale)
        self._images = images.to(self.device)
        self._labels = labels.to(self.device)
        self._positions = torch.arange(self.samples, device=self.device)
        self._indexed, self._sourced = indexed, sourced
        self._ready = augment is None and images.numel() * 4 <= memory_budget
        if self._ready:
            self._images = self._scaled(self._images)
        self._kept = Untouched(self._images, self._labels)
        self._epoch_batches = len(self) if epoch_batches is None else min(epoch_batches, len(self))
        self._epoch, self._batch = 0, 0
        self._resuming = False

    def __len__(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(self.samples, self.batch_size)
        return full + (rest > 0 and not self._drop_last)

    def __iter__(self) -> Iterator[Batch]:
        """Go through the next epoch, or through the rest of the one that ``load_state_dict`` has led into."""
        # All this happens when the first batch is asked for: Lightning makes iterators from which it takes nothing.
        if (self._batch > 0 and not self._resuming) or self._batch >= self._epoch_batches:
            self._epoch, self._batch = self._epoch + 1, 0
        self._resuming = False
        epoch, order = self._epoch, self._order(self._epoch)
        for number in range(self._batch, len(self)):
            # Moved on before the batch is handed out: a checkpoint taken after its update must not repeat it.
            self._epoch, self._batch = epoch, number + 1
            yield self._make(epoch, number, order)

    def batch_sizes(self) -> set[int]:
        """How many samples there are in the batches of an epoch."""
        return batch_sizes(self.samples, self.batch_size, self._drop_last, self._epoch_batches)

    def everything(self) -> Batch:
        """All samples as they are kept, perhaps unscaled, with their labels."""
        return Batch(self._images, self._labels)

    def state_dict(self) -> dict[str, int]:
        """The place of the next batch, and what it depends on."""
        return {"epoch": self._epoch, "batch": self._batch, **self._stream()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the last batch handed out by the loader that ``state`` comes from.

        Raises:
            ValueError: if that loader had another seed, batch size or number of samples.
        """
        for key, value in self._stream().items():
            if state[key] != value:
                raise ValueError(
                    f"The checkpoint was made with {key}={state[key]} but the data now have {key}={value}; resume with"
                    " the same data, batch size and seed."
                )
        self._epoch, self._batch = state["epoch"], state["batch"]
        self._resuming = True

    def _stream(self) -> dict[str, int]:
        return {"seed": self._seed, "batch_size": self.batch_size, "samples": self.samples}

    def _make(self, epoch: int, number: int, order: Tensor | None) -> Batch:
        here = slice(number * self.batch_size, (number + 1) * self.batch_size)
        self._kept.check()
        if order is None:
            images, labels = self._images[here], self._labels[here]
            images = images if self._augment is None else images.clone()
            places = self._positions[here]
        else:
            places = order[here]
            images, labels = self._images.index_select(0, places), self._labels.index_select(0, places)
        if self._augment is not None:
            images = self._augment(images, stream_generator(self._seed, epoch, number + 1))
        index, source = (places if told else None for told in (self._indexed, self._sourced))
        return Batch(images if self._ready else self._scaled(images), labels, index=index, source=source)

    def _order(self, epoch: int) -> Tensor | None:
        if not self._shuffle:
            return None
        return torch.randperm(self.samples, generator=stream_generator(self._seed, epoch, 0)).to(self.device)

    def _scaled(self, images: Tensor) -> Tensor:
        if not images.is_floating_point() and images.dtype != torch.uint8:
            return images
        inputs = images.to(torch.float32)
        if images.dtype == torch.uint8:
            inputs.div_(255)
        if self._scale is not None:
            mean, std = self._scale
            inputs = inputs.sub(mean).div_(std)
        return inputs.flatten(1) if self._flatten else inputs

    def _per_channel(self, values: Sequence[float], images: Tensor) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device).view(-1, *[1] * (images.dim() - 2))


def batch_sizes(samples: int, batch_size: int, drop_last: bool, limit: int | None = None) -> set[int]:
    """Sizes of the batches that so many samples are handed out in; empty where there is none.

    ``limit`` is how many batches an epoch has at most.
    """
    full, rest = divmod(samples, batch_size)
    if drop_last or (limit is not None and limit <= full):
        rest = 0
    return ({batch_size} if full else set()) | ({rest} if rest else set())


def reached(batches: int, limit: float) -> int:
    """How many of so many batches an epoch has: at most ``limit`` of them (int), or this share (float)."""
    return int(batches * limit) if isinstance(limit, float) else min(batches, limit)


class Untouched:
    """Tensors that nobody may write into, with the state they were in.

    Args:
        tensors: what is kept.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        self._versions = [self._version(tensor) for tensor in tensors]

    def check(self) -> None:
        """Costs nothing on any device: PyTorch counts the writes.

        Raises:
            ValueError: one of them was written into.
        """
        for tensor, version in zip(self._tensors, self._versions, strict=True):
            if self._version(tensor) != version:
                raise ValueError(
                    f"data of shape {tuple(tensor.shape)} were written into after they had been given to a loader: whoever "
                    "changes a batch (a callback, a loss) must change a copy of it, batch.inputs.clone()"
                )

    @staticmethod
    def _version(tensor: Tensor) -> int:
        return 0 if tensor.is_inference() else tensor._version


def stream_generator(seed: int, epoch: int, stream: int) -> torch.Generator:
    """A generator of its own for one use; stream 0 is the order, ``1 + b`` the augmentation of batch ``b``."""
    # Hashed, because torch's CPU generator keeps 32 bits of its seed and sums of small numbers would collide. On the
    # CPU, so that a run on another device sees the same data.
    word = np.random.SeedSequence((seed, epoch, stream)).generate_state(1)[0]
    return torch.Generator().manual_seed(int(word))


def _check(
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    seed: int,
    drop_last: bool,
    scale: tuple[Sequence[float], Sequence[float]] | None,
) -> None:
    if images.dim() < 2 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"BatchLoader got images of shape {tuple(images.shape)} and labels of shape {tuple(labels.shape)};"
            " give (N, ...) and (N,)."
        )
    if batch_size < 1:
        raise ValueError(f"BatchLoader got batch_size={batch_size}; give at least 1.")
    if seed < 0:
        raise ValueError(f"BatchLoader got seed={seed}; give a whole number of at least 0.")
    if len(images) < (batch_size if drop_last else 1):
        raise ValueError(
            f"BatchLoader got {len(images)} samples, which make no batch of {batch_size};"
            " give more samples or a smaller batch size."
        )
    if scale is not None and any(len(part) not in (1, images.shape[1]) for part in scale):
        raise ValueError(
            f"BatchLoader got a scale for {len(scale[0])} and {len(scale[1])} channels;"
            f" the images have {images.shape[1]}."
        )
