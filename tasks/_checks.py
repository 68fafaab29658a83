"""What a batch must be before a weight is moved by it: one sentence says what came, what was wanted, and what to do."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

from locallearn.algorithms.base import Algorithm, TaskInfo, selected
from locallearn.batch import Batch
from locallearn.cost import drive, to_device
from locallearn.nets.blocks import Blocks
from locallearn.tasks._batches import batch_sizes


def pair(raw: Any) -> tuple[Any, Any]:
    """``(inputs, labels)`` of a batch from anybody's loader.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(raw, tuple | list) and len(raw) == 2:
        return raw[0], raw[1]
    if isinstance(raw, Mapping):
        what = f"a dict with the keys {', '.join(map(str, raw))}"
    else:
        what = f"a {type(raw).__name__}" + (f" of {len(raw)} things" if isinstance(raw, tuple | list) else "")
    raise ValueError(
        f"the batch is {what}, expected (inputs, labels): give the data loader a collate_fn that returns these two tensors"
    )


def check_inputs(inputs: Any) -> None:
    """Refuse inputs that are no tensor with a sample in every row; looks at no value.

    Raises:
        ValueError: says what they are.
    """
    if not isinstance(inputs, Tensor) or inputs.ndim < 1:
        what = "a number" if isinstance(inputs, Tensor) else f"a {type(inputs).__name__}"
        raise ValueError(f"the inputs of the batch are {what}, expected a tensor with one sample in every row")
    if len(inputs) == 0:
        raise ValueError("the batch is empty: leave batches without samples out")


def class_ids(labels: Any, samples: int) -> Tensor:
    """Labels as int64; other whole numbers are converted. Looks at no value.

    Args:
        labels: of a batch.
        samples: of the batch.

    Raises:
        ValueError: they are not one class id per sample.
    """
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"the labels of the batch are a {type(labels).__name__}, expected a tensor of class ids, int64 of shape (N,)"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.shape != (samples,):
        hint = ""
        if labels.ndim == 2 and labels.shape == (samples, 1):
            hint = ": take labels.squeeze(1)"
        elif labels.ndim == 2 and len(labels) == samples:
            hint = ": take labels.argmax(1), if they are one-hot"
        elif labels.shape == (samples,):
            hint = ": take labels.long(), if they are class ids"
        raise ValueError(
            f"the labels of the batch are {labels.dtype} of shape {tuple(labels.shape)} for {samples} samples, expected class "
            f"ids, int64 of shape ({samples},){hint}"
        )
    return labels if labels.dtype is torch.int64 else labels.long()


def check_class_ids(labels: Tensor, classes: int) -> None:
    """Refuse class ids out of range; waits for the device.

    Raises:
        ValueError: says where they go from and to.
    """
    if labels.numel() == 0:
        return
    low, high = map(int, labels.aminmax())
    if low < 0 or high >= classes:
        hint = "take samples without a label out, and check the number of classes"
        if low == 1 and high == classes:
            hint = "take labels - 1"
        raise ValueError(
            f"labels go from {low} to {high}, expected class ids from 0 to {classes - 1} for {classes} classes: {hint}"
        )


def check_finite(inputs: Tensor) -> None:
    """Refuse NaN and infinity; waits for the device.

    Raises:
        ValueError: in how many samples they are.
    """
    if not inputs.is_floating_point() or inputs.numel() == 0:
        return
    # A sum is the quickest look at all entries; if it overflows, they are looked at one by one.
    if not bool(inputs.sum(dtype=torch.float32 if inputs.itemsize < 4 else None).isfinite()):
        broken = (~inputs.isfinite()).flatten(1).any(1) if inputs.ndim > 1 else ~inputs.isfinite()
        if bool(broken.any()):
            raise ValueError(
                f"the inputs of {int(broken.sum())} of {len(inputs)} samples are not finite numbers: take NaN and infinity out "
                "of the data"
            )


def everything(loader: Any) -> Any:
    """All that a loader of data in memory hands out in an epoch, as one raw batch; ``None``: it is not in memory."""
    if hasattr(loader, "everything"):
        return loader.everything()
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, TensorDataset):
        return loader.dataset.tensors if loader.collate_fn is default_collate else None
    return None


def sizes_of(loader: Any, limit: int) -> set[int]:
    """Sizes of a loader's batches, of the first ``limit`` alone; empty where it cannot be told."""
    if hasattr(loader, "batch_sizes"):
        sizes = set(loader.batch_sizes())
        return {max(sizes)} if sizes and hasattr(loader, "__len__") and limit < len(loader) else sizes
    if isinstance(loader, DataLoader) and loader.batch_size is not None:
        try:
            return batch_sizes(len(loader.sampler), loader.batch_size, loader.drop_last, limit)  # type: ignore[arg-type]
        except TypeError:  # a stream without a length
            return set()
    return set()


def check_batch_sizes(sizes: Iterable[int], net: Blocks, algorithm: Algorithm | None, info: TaskInfo) -> None:
    """Refuse training batches of one sample for a network that cannot be trained on them, found out on a copy.

    Normalisation over a batch has nothing to normalise by where a channel has one value: one sample, and no map or one of
    1x1. A rule that shows a sample twice has two.

    Args:
        sizes: of the training batches.
        net: the network.
        algorithm: what trains it; ``None``: plain backpropagation.
        info: what the task tells an algorithm.

    Raises:
        ValueError: it cannot be trained on one sample, though it can on two; or the algorithm takes a part of every batch, and
            cannot of one of these.
    """
    sizes = set(sizes)
    if algorithm is not None:
        for size in sorted(sizes, reverse=True):
            for unit in algorithm.units():
                algorithm.learned_from(unit, size)  # says what it cannot learn from
    single = _rows(info.example, 1) if 1 in sizes else None
    if single is None:
        return
    error = _failure(single, net, algorithm, info)
    double = _rows(info.example, 2)
    if error is None or double is None or _failure(double, net, algorithm, info) is not None:
        return
    several = max(sizes)
    which = "training batches have one sample" if several == 1 else "the last training batch of an epoch has one sample"
    raise ValueError(
        f"{which} (batch_size={several}), and this network cannot be trained on one ({error}): "
        + ("" if several == 1 else "leave it out with drop_last=true (dataset.drop_last=true), or ")
        + "choose another batch_size"
    )


def _rows(example: Batch, count: int) -> Batch | None:
    """So many samples as a batch; of a graph, a training node that no edge leads to, which a sampled batch may consist of."""
    if not example.context:
        rows = torch.arange(count) % len(example.inputs)
        return Batch(example.inputs[rows], example.targets[rows])
    edges, nodes = example.context[0], example.rows
    if nodes is None or nodes.ndim != 1 or not isinstance(edges, Tensor):
        return None
    nodes = nodes.nonzero().flatten() if nodes.dtype is torch.bool else nodes
    alone = nodes[~torch.isin(nodes, edges[1])]
    if len(alone) == 0:
        return None
    rows = alone[:1].repeat(count)
    context = (edges[:, :0], *(c[:0] for c in example.context[1:]))
    return Batch(example.inputs[rows], example.targets[rows], context, torch.arange(count))


def _failure(batch: Batch, net: Blocks, algorithm: Algorithm | None, info: TaskInfo) -> str | None:
    """Why a copy of the network cannot make a training step on this batch; ``None``: it can."""
    parameter = next(net.parameters())
    batch = to_device(batch, parameter.device)
    if batch.inputs.is_floating_point():
        batch = batch._replace(inputs=batch.inputs.to(parameter.dtype))
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            if algorithm is not None:
                drive(copy.deepcopy(algorithm).train(), batch)
            else:
                info.loss(*selected(batch, copy.deepcopy(net).train()(batch.inputs, *batch.context)))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None
