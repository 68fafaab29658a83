"""Classification: one label per sample (or per selected row), cross entropy, accuracy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from locallearn.algorithms.base import TaskInfo, selected
from locallearn.batch import Batch
from locallearn.nets.blocks import Blocks
from locallearn.nets.graph import check_edge_features
from locallearn.tasks._checks import check_class_ids, check_inputs, class_ids, pair
from locallearn.tasks._task import Task


class Classification(Task):
    """Assign one of ``classes`` labels: cross entropy and accuracy, over the rows that carry labels.

    Args:
        net: the network; its output is ``(N, classes)``.
        example: two inputs with the shape and dtype of the real ones, ``(2, ...)``; or a whole batch, which a graph needs:
            with its labels, its context and its rows.
        classes: number of labels.
        optimizer: makes the optimizer of the backpropagation baseline from parameters; unused under ``LocalStrategy``,
            which brings its own.
        scheduler: makes its learning rate scheduler, advanced every epoch.
        context: what every block gets after its input (see :class:`~locallearn.batch.Batch`).
        label_smoothing: share of the target that is spread over all classes while training; validation and test judge by the
            plain cross entropy.
        views: 2: class scores are the mean of those of an image and of its mirror image (left and right), in validation, test
            and prediction; training stays as it is, and so do probes and what a rule judges itself by.

    Attributes:
        metric: what is judged by; ``validation/<metric>`` and ``test/<metric>`` are logged.
        maximise: whether more of it is better.

    Raises:
        ValueError: fewer than two classes, no share, a context beside that of an example batch, or two views of what is no
            image ``(N, channels, height, width)``.
    """

    metric = "accuracy"
    maximise = True

    def __init__(
        self,
        net: Blocks,
        example: Tensor | Batch,
        classes: int,
        optimizer: Callable[[Any], Optimizer] = torch.optim.Adam,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        context: tuple[Any, ...] = (),
        label_smoothing: float = 0.0,
        views: int = 1,
    ) -> None:
        super().__init__(net, optimizer, scheduler)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is {label_smoothing}, expected a share from 0 to below 1")
        if classes < 2:
            raise ValueError(f"classes is {classes}, expected at least 2")
        if isinstance(example, Batch) and context:
            raise ValueError("the example batch has a context of its own: leave context out")
        if not isinstance(example, Batch):
            example = Batch(example, torch.arange(len(example)) % classes, context)
        if views not in (1, 2) or isinstance(views, bool):
            raise ValueError(f"views is {views!r}, expected 1, or 2 for an image and its mirror image")
        if views == 2 and (example.inputs.ndim != 4 or example.context):
            raise ValueError(
                f"two views are an image and its mirror image, and the inputs have shape {tuple(example.inputs.shape[1:])}, "
                "expected (channels, height, width): set task.views=1"
            )
        self.views = views
        self._example = example
        self._classes = classes
        self._loss = partial(F.cross_entropy, label_smoothing=label_smoothing) if label_smoothing else F.cross_entropy

    @override
    def info(self) -> TaskInfo:
        """Shapes and loss, for an algorithm."""
        return TaskInfo(self._example, self._classes, self._loss)

    @override
    def infer(self, inputs: Tensor, *context: Any) -> Tensor:
        scores = super().infer(inputs, *context)
        return scores if self.views == 1 else (scores + super().infer(inputs.flip(3), *context)) / 2

    @override
    def to_batch(self, raw: Any) -> Batch:
        """A :class:`Batch` as it is; ``(inputs, labels)`` of an ordinary data loader is wrapped.

        Raises:
            ValueError: it is something else, or the labels are not one class id per sample.
        """
        if isinstance(raw, Batch):
            check_inputs(raw.inputs)
            labels = class_ids(raw.targets, len(raw.inputs))
            return raw if labels is raw.targets else raw._replace(targets=labels)
        inputs, labels = pair(raw)
        check_inputs(inputs)
        return Batch(inputs, class_ids(labels, len(inputs)), self._example.context)

    @override
    def check(self, batch: Batch) -> None:
        """Inputs must be finite, and labels class ids of this task.

        Raises:
            ValueError: they are not; says what to do.
        """
        super().check(batch)
        check_class_ids(batch.targets if batch.rows is None else batch.targets[batch.rows], self._classes)

    @override
    def judge(self, batch: Batch) -> Tensor:
        """Samples, hits and summed cross entropy."""
        scores, labels = selected(batch, self(batch.inputs, *batch.context))
        scores = scores.float()
        return torch.stack(
            (
                scores.new_tensor(float(len(labels))),
                (scores.argmax(1) == labels).sum(dtype=torch.float32),
                F.cross_entropy(scores, labels, reduction="sum"),
            )
        )

    @override
    def figures(self, sums: list[float]) -> dict[str, float]:
        """Accuracy and cross entropy."""
        samples, hits, loss = sums
        return {"accuracy": hits / samples, "loss": loss / samples}


class NodeClassification(Classification):
    """Assign a class to every node of a graph, learning from those whose classes are known.

    An algorithm that has a ``reveal(targets, rows, asked)`` (:meth:`locallearn.algorithms.ForwardGNN.reveal`) is told in
    validation and test which labels its inference may use and which nodes are asked for: in validation the labels of the
    training nodes, in the test the same ones, or also those of the validation nodes. They come from ``known("train")`` and
    ``known("train+validation")`` of the Trainer's data module (:class:`~locallearn.tasks.graphs.GraphData`), else from the
    example batch.

    Args:
        net: the network; its output is ``(N, classes)``.
        example: the whole graph with the labels of its training nodes in ``rows``.
        classes: number of labels.
        optimizer: see :class:`Classification`.
        scheduler: see :class:`Classification`.
        reveal_validation: whether the labels of the validation nodes may be used in the test. ForwardGNN's Forward-Forward
            variants were published so; rules that use no labels at inference then know less.

    Raises:
        ValueError: fewer than two classes, or an example that names no rows; at the test, a data module that cannot say
            what to reveal.
    """

    def __init__(
        self,
        net: Blocks,
        example: Batch,
        classes: int,
        optimizer: Callable[[Any], Optimizer] = torch.optim.Adam,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        reveal_validation: bool = False,
    ) -> None:
        super().__init__(net, example, classes, optimizer, scheduler)
        check_edge_features(net, self._example.context)
        if self._example.rows is None:
            raise ValueError(
                "node_classification learns from some nodes of a graph, and this example names no rows: use graph data, or the "
                "task classification"
            )
        self._reveal_validation = reveal_validation
        self._known: tuple[Tensor, Tensor] | None = None

    @override
    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._look_up("train")

    @override
    def on_test_epoch_start(self) -> None:
        super().on_test_epoch_start()
        self._look_up("train+validation" if self._reveal_validation else "train")

    @override
    def judge(self, batch: Batch) -> Tensor:
        reveal: Callable[..., None] | None = getattr(self.algorithm, "reveal", None)
        if reveal is not None and self._known is not None:
            reveal(*self._known, batch.rows)
        return super().judge(batch)

    def _look_up(self, part: str) -> None:
        if self.algorithm is None:
            return
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "known"):
            self._known = data.known(part)
        elif part == "train" and self._example.rows is not None:
            self._known = self._example.targets.to(self.device), self._example.rows.to(self.device)
        else:
            raise ValueError(
                f"the labels of {part} nodes are to be revealed, and the Trainer has no data module that knows them: train with"
                " GraphData, or set task.reveal_validation=false"
            )
