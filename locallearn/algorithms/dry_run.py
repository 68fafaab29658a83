"""What a dry run says of a network before a rule trains it: sizes, and what does not fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from locallearn.algorithms.base import TaskInfo
from locallearn.batch import Batch
from locallearn.losses._of_torch import reads_ids
from locallearn.nets.blocks import Blocks, fitted, width_of
from locallearn.nets.border import main
from locallearn.nets.trace import lacks_samples


def dry_run(blocks: Blocks, example: Batch, task: TaskInfo | None = None) -> list[Tensor]:
    """Main output of every block, without gradients.

    Args:
        blocks: the network.
        example: what is run.
        task: whose loss trains the readout, so that it has to have a score for every class; ``None``: none does.

    Raises:
        ValueError: a block that the example cannot pass, by name; or a readout for fewer classes.
    """
    outputs: list[Tensor] = []
    x: Any
    x, context = example.inputs, example.context
    if next(blocks.parameters(), None) is None:
        raise ValueError(
            f"the network has no parameters in its blocks {', '.join(blocks.names)}, so there is nothing to train"
        )
    x = fitted(blocks, x)
    with torch.no_grad():
        for name, block in zip(blocks.names, blocks, strict=True):
            try:
                x = block(x, *context)
            except Exception as error:
                raise ValueError(
                    f"block {name!r} cannot take what comes before it, of shape {tuple(main(x).shape)}: {error}"
                ) from error
            features = main(x)
            if not isinstance(features, Tensor) or features.ndim < 2:
                raise ValueError(
                    f"block {name!r} gives {type(features).__name__}, expected a tensor with samples as rows"
                )
            outputs.append(features)
        if task is not None and blocks.readout is not None:
            try:
                width = width_of(blocks.readout(outputs[-1], *context))
            except Exception:  # a readout that cannot run: the first batch says so
                return outputs
            refuse_narrow(width, task)
    return outputs


def feature_sizes(blocks: Blocks, example: Batch, task: TaskInfo | None = None) -> list[int]:
    """Entries per sample of every block's main output, from a dry run, for rules that look at a sample's features.

    The arguments are those of :func:`dry_run`.

    Raises:
        ValueError: as there; and a block that has no parameters, or whose output has other rows than samples (time first, or
            frames, patches or nodes as rows), by name.
    """
    outputs = dry_run(blocks, example, task)
    for name, block in zip(blocks.names, blocks, strict=True):
        if next(block.parameters(), None) is None:
            raise ValueError(
                f"block {name!r} has no parameters, so nothing in it learns: put it into the block before it"
            )
    samples = len(example.inputs)
    if example.rows is None:  # of several graphs, nodes are inputs, and every graph has a target
        samples = min(samples, len(example.targets))
    for name, output in zip(blocks.names, outputs, strict=True):
        if len(output) != samples:
            raise ValueError(_other_rows(name, f"{len(output)} rows for {samples} samples"))
    if not example.context and any(samples in output.shape[1:] for output in outputs):
        # As many rows as samples may be a coincidence: they are samples if twice as many give twice as many.
        twice = dry_run(blocks, example._replace(inputs=torch.cat([example.inputs, example.inputs])))
        for name, output in zip(blocks.names, twice, strict=True):
            if len(output) != 2 * samples:
                raise ValueError(_other_rows(name, f"{len(output)} rows for any number of samples"))
    return [output[0].numel() for output in outputs]


def refuse_narrow(width: int, task: TaskInfo) -> None:
    """Refuse a readout of fewer outputs than the task has classes, where its loss reads class ids.

    Raises:
        ValueError: says how many there are.
    """
    if task.classes and reads_ids(task.loss) and width < task.outputs:
        raise unlike_classes(width, task.outputs)


def unlike_classes(width: int, classes: int) -> ValueError:
    """What is wrong with a readout of that many outputs."""
    return ValueError(f"the readout has {width} outputs for {classes} classes: make it as wide")


def refuse_single(error: ValueError, block: str) -> None:
    """Say what PyTorch's normalisations say of a batch of one sample in words that name the block; pass over other errors.

    Raises:
        ValueError: from that error.
    """
    if lacks_samples(error):
        raise ValueError(
            f"block {block!r} has a normalisation, which has nothing to normalise by in a batch of one sample: use larger "
            "batches, and drop_last=True in the loader"
        ) from error


def _other_rows(name: str, found: str) -> str:
    return (
        f"block {name!r} gives {found}, and this rule looks at every sample's features: the first dimension has to be that of "
        "the samples; cut the network where it is (behind the pooling, or before dimensions are moved or merged)"
    )
