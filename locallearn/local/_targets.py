"""What a network is to give: targets of the example, given or made up, and whether targets fit its outputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.losses._of_torch import bare, left_out
from locallearn.nets.blocks import width_of
from locallearn.nets.equal import rows_of, some_rows

Loss = Callable[[Tensor, Tensor], Tensor]

_OF_CLASSES = (F.cross_entropy, F.nll_loss, F.multi_margin_loss)
_MODULES_OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss)
_BY_ENTRY = (
    *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy, F.kl_div, F.poisson_nll_loss),
    *(F.binary_cross_entropy_with_logits, F.soft_margin_loss, F.multilabel_soft_margin_loss),
)
_MODULES_BY_ENTRY = (
    *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.KLDivLoss, nn.PoissonNLLLoss),
    *(nn.BCEWithLogitsLoss, nn.SoftMarginLoss, nn.MultiLabelSoftMarginLoss),
)


def of_classes(loss: Any) -> bool:
    """Whether a loss is one of PyTorch's that read class ids."""
    loss = bare(loss)
    return loss in _OF_CLASSES or isinstance(loss, _MODULES_OF_CLASSES)


def by_entry(loss: Any) -> bool:
    """Whether a loss is one of PyTorch's that compare outputs and targets entry by entry."""
    loss = bare(loss)
    return loss in _BY_ENTRY or isinstance(loss, _MODULES_BY_ENTRY)


def counted(labels: Tensor, loss: Any) -> Tensor:
    """Labels of places that a loss looks at: those that it leaves out are no class ids."""
    label = left_out(loss) if labels.ndim > 1 else None
    return labels if label is None else labels[labels != label]


def two_of(targets: Any, values: Mapping[str, Any]) -> Tensor:
    """Targets of the samples that rules are shown; of a graph all of them.

    Args:
        targets: as they were given beside the example.
        values: the example's inputs by name.

    Raises:
        ValueError: they are no tensor, or of another number of samples.
    """
    if not isinstance(targets, Tensor):
        raise ValueError(f"targets are a {type(targets).__name__}, expected a tensor, those of the example")
    rows = rows_of(values)
    if rows is None:
        return targets
    if not targets.ndim or len(targets) != rows:
        raise ValueError(
            f"the example has {rows} samples, and targets have shape {tuple(targets.shape)}: give those of the example"
        )
    two: Tensor = some_rows({"targets": targets}, 2)["targets"]
    return two


def made_up(result: Tensor, outputs: int, classes: bool) -> Tensor:
    """Targets for a trial: class ids where dimension 1 of the outputs is the classes, else zeros."""
    whole = outputs == width_of(result)
    if not classes:
        return torch.zeros_like(result) if whole else result.new_zeros(len(result), outputs)
    # Of features that are no scores, whatever their shape, a rule makes one class per sample.
    places = (len(result), *(result.shape[2:] if whole else ()))
    ids = (torch.arange(len(result), device=result.device) % outputs).view(-1, *[1] * (len(places) - 1))
    return ids.expand(places).contiguous()


def classes_in(shape: Sequence[int], targets: Tensor) -> int | None:
    """How many classes outputs of this shape tell apart at every place of the targets; ``None``: these do not fit."""
    if tuple(targets.shape) == (*shape[:1], *shape[2:]) and len(shape) > 1:
        return int(shape[1])
    return int(shape[-1]) if len(shape) > 1 and tuple(targets.shape) == tuple(shape[:-1]) else None


def are_ids(shape: Sequence[int], targets: Any, loss: Loss) -> bool:
    """Whether targets look like class ids for outputs of this shape."""
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dtype == torch.bool:
        return False
    count = classes_in(shape, targets)
    if count is None or not targets.numel():
        return False
    seen = counted(targets, loss)
    if seen.numel() and int(seen.max()) >= count:
        return False
    return targets.ndim > 1 or int(targets.min()) >= 0  # of places, losses may leave some out, by a number such as -100


def refuse_strangers(labels: Tensor, outputs: int, loss: Loss) -> None:
    """Refuse labels some of which are no class ids; those that the loss leaves out may be anything.

    Raises:
        ValueError: names the least and the greatest.
    """
    seen = counted(labels, loss)
    if not seen.numel():
        return
    low, high = int(seen.min()), int(seen.max())
    ignored = labels.ndim > 1 and not of_classes(loss)  # such as -100, by a loss of the user's own
    if (low >= 0 or ignored) and high < outputs:
        return
    said = f"labels go from {low} to {high}, expected class ids 0 to {outputs - 1}: the network has {outputs} outputs"
    label = left_out(loss)
    if label in (low, high) and not 0 <= label < outputs and labels.ndim == 1:
        # Most rules read the label of every sample themselves, not through the loss.
        raise ValueError(
            f"{said}; samples labelled {label}, which the loss leaves out, have to be left out, too (nodes by rows=)"
        )
    raise ValueError(
        f"{said}; where they are numbers to predict, give {'a loss for them and ' if of_classes(loss) else ''}classes=False"
    )


def refuse_no_ids(dtype: torch.dtype) -> None:
    """Refuse labels of a dtype that holds no class ids.

    Raises:
        ValueError: names it.
    """
    if dtype.is_floating_point or dtype == torch.bool:
        raise ValueError(
            f"labels are {dtype}, expected class ids of dtype int64; where they are numbers to predict or probabilities, give "
            "classes=False"
        )


def refuse_unfit(targets: Tensor, result: Tensor, loss: Loss, classes: bool) -> None:
    """Given targets against what the network gives for the example.

    Raises:
        ValueError: the loss would compare others than belong together, or class ids are no such.
    """
    shape = tuple(result.shape)
    given = tuple(targets.shape)
    if classes:
        refuse_no_ids(targets.dtype)
        if of_classes(loss) and given != (*shape[:1], *shape[2:]):
            raise ValueError(
                f"targets have shape {told(given)}, and class ids for outputs of shape {told(shape)} have shape "
                f"{told((*shape[:1], *shape[2:]))}: PyTorch's losses read classes in dimension 1"
                + (f"{_LAST}" if given == shape[:-1] else "")
            )
    elif by_entry(loss) and given != shape:
        raise ValueError(unfit(given, shape, loss))


_LAST = "; where they come last, give loss=lambda o, t: F.cross_entropy(o.flatten(0, -2), t.flatten())"


def unfit(given: Sequence[int], outputs: Sequence[int], loss: Loss) -> str:
    """What is wrong with targets that fit only by broadcasting, or not at all."""
    inner = bare(loss)
    name = getattr(inner, "__name__", type(inner).__name__)
    return (
        f"targets have shape {told(given)}, and {name} compares them entry by entry with outputs of shape {told(outputs)}: "
        "give targets of that shape, else every sample would be compared with those of others"
    )


def only_broadcast(given: Sequence[int], known: Sequence[int]) -> bool:
    """Whether targets differ from those that fit in what broadcasting makes up for; other sizes are up to the network."""
    return len(given) != len(known) or any(a != b and 1 in (a, b) for a, b in zip(given[1:], known[1:], strict=True))


def dense(labels: Sequence[int], known: Sequence[int], outputs: int, given: bool) -> str:
    """What is wrong with class ids of places that have another shape than the outputs have places.

    Args:
        labels: shape of the labels.
        known: shape of the example's.
        outputs: number of classes.
        given: whether ``targets=`` gave the example's.
    """
    return (
        f"labels have shape {told(labels)}, expected class ids of shape {told(known)}: PyTorch's losses read the classes in "
        f"dimension 1 of the outputs, which have shape {told((known[0], outputs, *known[1:]))}{_LAST}"
        + ("" if given else " and targets=")
    )


def told(shape: Sequence[int]) -> str:
    """A shape whose first dimension is samples."""
    return f"(N, {', '.join(map(str, shape[1:]))})" if len(shape) > 1 else "(N,)" if shape else "()"


def blamed(loss: Loss, result: Tensor, targets: Tensor, given: bool) -> str | None:
    """Whether the loss is why a trial failed: what it says to the network's outputs; ``None``: it takes them."""
    try:
        with torch.no_grad():
            value = loss(result, targets)
        if isinstance(value, Tensor) and value.numel() == 1:
            return None
        gives = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        return f"loss= gives {gives}, expected a tensor of one number: its mean over the samples, say"
    except Exception as error:
        if isinstance(error, TypeError) and re.search("(positional|keyword-only) argument", str(error)):
            return f"loss= is called as loss(outputs, targets), and says: {error}"
        said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    what = f"{told(targets.shape)}, {targets.dtype}"
    if given:
        return f"loss= fails on outputs of shape {told(result.shape)} and the given targets of shape {what} ({said})"
    return (
        f"loss= fails on outputs of shape {told(result.shape)} and targets of shape {what}, which were made up for want of "
        f"real ones ({said}): give those of the example as targets="
    )
