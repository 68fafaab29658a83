"""What the blocks of a trained network say of samples, taken from a copy so that the original never knows."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from locallearn.algorithms.base import Algorithm
from locallearn.algorithms.bp_ff import BackpropForwardForward
from locallearn.algorithms.layer_local import LayerLocal
from locallearn.batch import Batch

Label = Literal["plain", "true", "neutral"]
"""What stands in the input's label slots: nothing (a rule that writes no label), the true label, or none in particular."""

_ROWS = 250  # samples that go through the network at once


class Representations(NamedTuple):
    """What the blocks gave for some samples.

    Attributes:
        layers: outputs of the trained blocks in order, by name, ``(n, ...)`` each: behind the activation, before whatever the
            rule does to them on the way to the next block.
        labels: class ids, ``(n,)``.
        predictions: class ids by the rule's own inference, ``(n,)``.
    """

    layers: dict[str, Tensor]
    labels: Tensor
    predictions: Tensor

    @property
    def right(self) -> Tensor:
        """Which samples are classified rightly, bool ``(n,)``."""
        return self.predictions == self.labels

    def chosen(self, rows: Tensor) -> Representations:
        """Those of some rows, by mask or index."""
        return Representations(
            {name: layer[rows] for name, layer in self.layers.items()}, self.labels[rows], self.predictions[rows]
        )


def check_analysable(algorithm: Algorithm, batch: Batch) -> None:
    """Refuse what has no samples, classes and blocks to look at.

    Raises:
        ValueError: says what is wrong.
    """
    if batch.context or batch.rows is not None:
        raise ValueError(
            "the samples are nodes of a graph, and their representations depend on each other: what is analysed are samples "
            "that go through the network alone"
        )
    if batch.targets.ndim != 1 or batch.targets.is_floating_point() or len(batch.targets) != len(batch.inputs):
        raise ValueError("the samples have no class labels, by which representations are sorted")


def passes(algorithm: Algorithm, batch: Batch) -> tuple[Label, ...]:
    """Ways in which this rule can be shown samples whose class is known: ``("true", "neutral")`` or ``("plain",)``.

    A rule writes labels into its inputs if the positives that it prepares are others for other labels.

    Args:
        algorithm: attached; it is copied.
        batch: two samples or more of the data.
    """
    check_analysable(algorithm, batch)
    twin = copy.deepcopy(algorithm).eval()
    if not isinstance(twin, LayerLocal | BackpropForwardForward):
        return ("plain",)
    few = Batch(batch.inputs[:8], batch.targets[:8])
    others = few._replace(targets=(few.targets + 1) % twin.outputs)
    with _undrawn(few.inputs), torch.no_grad():
        one, two = (twin.prepare(given).inputs for given in (few, others))
    n = len(few.inputs)
    stacked = len(one) == len(two) == 2 * n  # positives on top of negatives
    return ("true", "neutral") if stacked and not torch.equal(one[:n], two[:n]) else ("plain",)


def representations(
    algorithm: Algorithm, batches: Iterable[Batch], label: Label | None = None
) -> Iterator[Representations]:
    """Run samples through a trained network and yield what every block gives, batch after batch.

    Works on a deep copy in eval mode without gradients: weights, buffers, modes, gradients, hooks and generators of the
    original stay as they are, and so do PyTorch's global ones.

    Args:
        algorithm: attached and trained, on the device of the batches. Of a rule whose training ended at an earlier unit the
            blocks that were trained.
        batches: samples with class labels; batches are cut into pieces of 250.
        label: ``None``: the first of :func:`passes`. ``"true"`` shows a rule that writes labels into its input the true one,
            as it learned with it, which makes part of what the first block says of the class trivial; ``"neutral"`` is the
            control for that.

    Raises:
        ValueError: samples of a graph or without classes; a label for a rule that writes none, or none for one that does; a
            block that gives no tensor, by name.
    """
    twin: Algorithm | None = None
    for whole in batches:
        check_analysable(algorithm, whole)
        if twin is None:
            known = passes(algorithm, whole)
            label = known[0] if label is None else label
            if label not in known:
                raise ValueError(
                    f"label is {label!r}, expected {' or '.join(map(repr, known))} for {type(algorithm).__name__}"
                )
            twin = copy.deepcopy(algorithm).eval()
        for start in range(0, len(whole.inputs), _ROWS):
            piece = slice(start, start + _ROWS)
            yield _seen(twin, Batch(whole.inputs[piece], whole.targets[piece]), label or "plain")


def _seen(twin: Algorithm, batch: Batch, label: Label) -> Representations:
    names, outputs = twin.blocks.names, dict[str, Tensor]()
    hooks = [
        block.register_forward_hook(_keeper(name, outputs)) for name, block in zip(names, twin.blocks, strict=True)
    ]
    try:
        with _undrawn(batch.inputs), torch.no_grad():
            if label == "true":
                _show_truth(twin, batch)
            else:
                for _ in twin.activations(batch.inputs):
                    pass
            layers = {name: outputs[name] for name in _trained(twin) if name in outputs}
            predictions = twin.predict(batch.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    rows = len(batch.inputs)
    if predictions.ndim != 2:
        raise ValueError(f"the network gives outputs of shape {tuple(predictions.shape)}, expected class scores (N, C)")
    return Representations({name: layer[:rows] for name, layer in layers.items()}, batch.targets, predictions.argmax(1))


def _show_truth(twin: Algorithm, batch: Batch) -> None:
    """Send the samples through with their labels, as the rule does when it learns: positives, and its negatives below."""
    assert isinstance(twin, LayerLocal | BackpropForwardForward)
    prepared = twin.prepare(batch)
    if isinstance(twin, LayerLocal):
        twin._run_frozen(prepared.inputs, 0, twin.depth, prepared)
    else:
        twin.outputs_of_blocks(prepared.inputs)


def _trained(twin: Algorithm) -> list[str]:
    return twin.blocks.names[: twin.depth] if isinstance(twin, LayerLocal) else twin.blocks.names


def _keeper(name: str, outputs: dict[str, Tensor]) -> Any:
    def keep(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        main = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(main, Tensor) or main.ndim < 2:
            raise ValueError(f"block {name!r} gives {type(main).__name__}, expected a tensor with samples as rows")
        outputs[name] = main  # a rule that runs a block several times: what it gave at last

    return keep


def _undrawn(inputs: Tensor) -> Any:
    """Global generators are afterwards as they were."""
    devices = [inputs.device] if inputs.device.type == "cuda" else []
    return torch.random.fork_rng(devices=devices)
