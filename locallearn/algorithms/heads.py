"""The parts of a block's local loss: a head, what the head is asked for, and a term beside it.

========  =========================  ===========  ==============  ========
loss      of the head                weight       beside it       weight
========  =========================  ===========  ==============  ========
ce        the task's loss            1
sim       (no head)                               similarity      1
predsim   the task's loss            1 - β        similarity      β
infopro   the task's loss, or        λ2 by block  reconstruction  λ1 by
          supervised contrast                     of the image    block
========  =========================  ===========  ==============  ========

Every one of them may be joined by the movement of the block's residual branches. The network's readout, where it has one, is
the last block's head, with the task's loss.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any, Literal, TypeVar, cast, get_args, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms._selection import sample_losses
from locallearn.algorithms.base import ParamGroup, TaskInfo, choices, refuse_dense, selected
from locallearn.algorithms.dry_run import feature_sizes
from locallearn.batch import Batch
from locallearn.functional import local_heads as equations
from locallearn.functional.local_heads import Reduction
from locallearn.losses.local_heads import (
    MovementLoss,
    ReconstructionLoss,
    SimilarityLoss,
    SupervisedContrastiveLoss,
)
from locallearn.nets.blocks import Blocks, fitted
from locallearn.nets.heads import ConvHead, LinearHead, MLPHead, ResidualHead, TokenHead
from locallearn.nets.layout import Signal, channel_axis
from locallearn.nets.trace import lacks_samples
from locallearn.nets.units import residual_branches, sample_shapes

Head = Literal["linear", "conv1", "1c2f", "dgl", "man", "mirror", "auglocal", "token"]
Loss = Literal["ce", "sim", "predsim", "infopro"]
_Init = TypeVar("_Init", bound=Callable[..., None])

_EMBEDDING = 128  # entries of what the contrast compares, and of the hidden layer of InfoPro's head
_LIMIT = 4096  # inputs of predsim's linear head, as in its code
# Which head or loss a setting belongs to; elsewhere it would do nothing, and is refused.
_OWNERS = {
    "width": ("head", ("conv1", "1c2f", "dgl", "man", "mirror", "auglocal")),
    "depth": ("head", ("auglocal",)),
    "decay": ("head", ("auglocal",)),
    "head_limit": ("head", ("linear",)),
    "smoothing": ("loss", ("ce", "predsim", "infopro")),
    "beta": ("loss", ("predsim",)),
    "similarity_side": ("loss", ("sim", "predsim")),
    "reconstruction": ("loss", ("infopro",)),
    "classification": ("loss", ("infopro",)),
    "contrast": ("loss", ("infopro",)),
    "temperature": ("loss", ("infopro",)),
    "pixels": ("loss", ("infopro",)),
}


@dataclass(frozen=True)
class HeadParts:
    """What a block's local loss is made of.

    Attributes:
        head: ``linear``: on the flattened output; ``conv1``: one convolution of size 3 and stride 2, mean, linear (TRGL);
            ``1c2f``: the same with a hidden layer (InfoPro); ``dgl``: DGL's "mlp-sr"; ``man``: MAN++'s form of it;
            ``mirror``: a residual unit of stride 2 for every later stage; ``auglocal``: some of the later units (AugLocal);
            ``token``: LayerNorm, the first token, linear layer (vision transformers).
        width: ω, scales the channels of every head but ``linear`` and ``token``.
        depth: d of AugLocal: units of the first block's head.
        decay: τ of AugLocal: how much shallower the last head is.
        head_limit: largest number of inputs of a linear head, maps are averaged down to it; ``None``: 4096 under predsim
            where there is something to average, none elsewhere.
        loss: ``ce``: the task's loss; ``sim``, ``predsim``: similarity of pairs, alone or with the task's loss;
            ``infopro``: reconstruction of the image and the task's loss or supervised contrast.
        smoothing: of the labels in every head's cross entropy, the readout's, too.
        beta: weight of the similarity in predsim.
        similarity_side: largest side of the map whose similarity is taken, larger ones are averaged down to it; ``None``:
            no averaging.
        reconstruction: λ1 of InfoPro, of the first and of the last local block.
        classification: λ2 of InfoPro, likewise.
        contrast: the head gives 128 entries for the supervised contrastive loss instead of class scores.
        temperature: of the contrast.
        pixels: values of the input that are black and white for the decoder; ``None``: every channel's smallest and largest
            value in the training batches so far.
        movement: 1/τ of TRGL's term; several: one per block.

    Raises:
        ValueError: a value out of range, or a setting that the chosen head or loss has no use for.
    """

    head: Head = "linear"
    width: float = 1.0
    depth: int = 2
    decay: float = 0.5
    head_limit: int | None = None
    loss: Loss = "ce"
    smoothing: float = 0.0
    beta: float = 0.99
    similarity_side: int | None = None
    reconstruction: Sequence[float] = (1.0, 0.0)
    classification: Sequence[float] = (0.0, 1.0)
    contrast: bool = False
    temperature: float = 0.07
    pixels: Sequence[float] | None = None
    movement: float | Sequence[float] = 0.0

    def __post_init__(self) -> None:
        for name, kind in (("head", Head), ("loss", Loss)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(get_args(kind))}")
        for name in ("reconstruction", "classification", "pixels"):
            self._check_pair(name)
        moves = self.movement if isinstance(self.movement, int | float) else tuple(self.movement)
        object.__setattr__(self, "movement", moves)
        wanted = {
            "width": (0 < self.width < math.inf, "above 0"),
            "depth": (1 <= self.depth < math.inf and self.depth == int(self.depth), "a whole number, at least 1"),
            "decay": (0 <= self.decay <= 1, "within 0 and 1"),
            "head_limit": (self.head_limit is None or self.head_limit >= 1, "at least 1, or null"),
            "smoothing": (0 <= self.smoothing < 1, "at least 0 and below 1"),
            "beta": (0 <= self.beta <= 1, "within 0 and 1"),
            "similarity_side": (self.similarity_side is None or self.similarity_side >= 1, "at least 1, or null"),
            "temperature": (0 < self.temperature < math.inf, "above 0"),
            "reconstruction": (_weights(self.reconstruction), "not negative"),
            "classification": (_weights(self.classification), "not negative"),
            "pixels": (
                self.pixels is None or -math.inf < self.pixels[0] < self.pixels[1] < math.inf,
                "a smaller and a larger value",
            ),
            "movement": (_weights((moves,) if isinstance(moves, int | float) else moves), "not negative"),
        }
        for name, (right, what) in wanted.items():
            if not right:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {what}")
        self._refuse_idle()

    def _check_pair(self, name: str) -> None:
        value = getattr(self, name)
        if value is None and name == "pixels":
            return
        pair = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
        if len(pair) != 2:
            raise ValueError(f"{name} is {value!r}, expected two numbers")
        object.__setattr__(self, name, pair)

    def _refuse_idle(self) -> None:
        """A setting that nothing reads must not look as if it had done something."""
        defaults = {field.name: field.default for field in fields(self)}
        for name, (part, owners) in _OWNERS.items():
            if getattr(self, name) != defaults[name] and getattr(self, part) not in owners:
                raise ValueError(
                    f"{name}={getattr(self, name)} is for {part}={', '.join(owners)}, and {part} is {getattr(self, part)!r}: "
                    "leave it out"
                )
        if self.loss == "sim" and self.head != "linear":
            raise ValueError(f"loss=sim has no head, and head is {self.head!r}: leave it out, or use loss=predsim")
        if self.temperature != defaults["temperature"] and not self.contrast:
            raise ValueError(
                f"temperature={self.temperature} is for contrast=true, and contrast is false: leave it out"
            )
        if self.pixels is not None and not self.decodes:
            raise ValueError(
                f"pixels={self.pixels} is for a decoder, and reconstruction is 0 for all blocks: leave it out"
            )
        if self.loss == "infopro" and not any(self.classification) and (self.contrast or self.head != "linear"):
            idle = "contrast=true" if self.contrast else f"head={self.head}"
            raise ValueError(f"{idle} is for a head, and classification is 0 for all blocks: leave it out")

    @property
    def variant(self) -> str | None:
        """What makes another rule of it: the parts, not their sizes."""
        return choices(self, type(self).__init__, "head", "loss", "contrast", "movement")

    @property
    def decodes(self) -> bool:
        """Whether any block gives the image back."""
        return self.loss == "infopro" and any(weight > 0 for weight in self.reconstruction)

    def moves(self, blocks: int) -> list[float]:
        """Weight of the movement by block.

        Raises:
            ValueError: not as many weights as blocks.
        """
        if isinstance(self.movement, int | float):
            return [float(self.movement)] * blocks
        if len(self.movement) != blocks:
            raise ValueError(f"movement has {len(self.movement)} weights for {blocks} blocks: give one for every block")
        return [float(weight) for weight in self.movement]


def _weights(given: Sequence[float]) -> bool:
    return all(0 <= weight < math.inf for weight in given)


def takes_parts(init: _Init) -> _Init:
    """Write the fields of :class:`HeadParts` into the signature of an ``__init__(self, ..., **parts)`` that hands them on.

    So a misspelt name is told as such, by Python and by the command line, which also reads the types there.
    """
    own, hints = inspect.signature(init), get_type_hints(HeadParts)
    named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    names = {p.name for p in named}
    parts = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(HeadParts)
        if field.name not in names
    ]
    known = [p.name for p in (*named[1:], *parts)]

    @wraps(init)
    def checked(self: Any, *args: Any, **settings: Any) -> None:
        for name in settings:
            if name not in known:
                raise TypeError(f"{type(self).__name__} has no setting {name!r}; it has {', '.join(known)}")
        init(self, *args, **settings)

    checked.__signature__ = own.replace(parameters=[*named, *parts])  # type: ignore[attr-defined]
    checked.__annotations__ = {**init.__annotations__, **{p.name: p.annotation for p in parts}}
    return cast(_Init, checked)


class BlockHeads(nn.Module):
    """A head and a term for every block but the last one, whose head is the network's readout.

    Args:
        blocks: the network. Without a readout its last block gets a head like the others.
        task: gives the shapes, the number of classes and the loss.
        owner: who asks, for messages.
        parts: what heads and losses are made of; default: linear heads and the task's loss, those of Mono-Forward.
        shapes: of one sample of what the heads read, where that is not the blocks' output.

    Attributes:
        projections: the heads, in order; where the loss has none, an identity that nothing calls.
        terms: what stands beside the heads, likewise; empty where no loss has such a term.

    Raises:
        ValueError: targets are not class ids, or a block whose output a head or a term cannot read, by name.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        blocks: Blocks,
        task: TaskInfo,
        owner: str,
        parts: HeadParts | None = None,
        shapes: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        if not task.classes:
            raise ValueError(f"{owner} compares every block with class labels, and this task has none")
        if task.outputs < 2:
            raise ValueError(f"{owner} tells classes apart, and this task has {task.outputs}: it takes at least 2")
        refuse_dense(task, owner)
        parts = HeadParts() if parts is None else parts
        self.parts = parts
        self.names = blocks.names
        self._loss = task.loss
        self._moved = [MovementLoss(weight) if weight else None for weight in parts.moves(len(blocks))]
        sizes = feature_sizes(blocks, task.example, task)  # says what cannot be run
        self._check(blocks, task, owner)
        self._local = len(sizes) if blocks.readout is None else len(sizes) - 1
        self.weights = [self._weights_of(i) for i in range(self._local)]
        idle = next((name for name, weights in zip(self.names, self.weights, strict=False) if not any(weights)), None)
        if idle is not None:
            raise ValueError(
                f"block {idle!r} has nothing to learn from: with reconstruction={list(parts.reconstruction)} and "
                f"classification={list(parts.classification)} both are 0 there; give one of them more than 0"
            )
        maps: list[list[tuple[int, ...]]] = [[] for _ in sizes]
        if shapes is None:
            shapes = [(size,) for size in sizes]
            if parts != HeadParts(movement=parts.movement, smoothing=parts.smoothing):
                shapes, maps = sample_shapes(blocks, fitted(blocks, task.example.inputs), task.example.context)
        elif parts.head in ("mirror", "auglocal"):
            _, maps = sample_shapes(blocks, fitted(blocks, task.example.inputs), task.example.context)
        image = tuple(task.example.inputs.shape[1:])
        self.projections = nn.ModuleList(self._make_head(i, shapes[i], maps, task.outputs) for i in range(self._local))
        self.terms = nn.ModuleList()
        if parts.loss != "ce":
            self.terms.extend(self._make_term(i, shapes[i], task.outputs, image) for i in range(self._local))
        if self._observes:
            self.register_buffer("low", torch.full((image[0],), torch.inf))
            self.register_buffer("high", torch.full((image[0],), -torch.inf))
        if parts.loss == "infopro" and self._local == 1:
            for part in ("reconstruction", "classification"):
                first, last = getattr(parts, part)
                if first != last:
                    raise ValueError(
                        f"{part}={[first, last]} runs from the first to the last local block, and block {self.names[0]!r} is "
                        f"the only one: give both ends one weight, e.g. {part}=[1,1], or cut the network into more blocks"
                    )
        self._contrast = SupervisedContrastiveLoss(parts.temperature)

    # -- making -------------------------------------------------------------------------------------------------------
    def _weights_of(self, index: int) -> tuple[float, float]:
        """Weight of the head's loss and of the term beside it."""
        parts = self.parts
        if parts.loss == "infopro":
            return (
                equations.ramp(parts.classification, index, self._local),
                equations.ramp(parts.reconstruction, index, self._local),
            )
        return {"ce": (1.0, 0.0), "sim": (0.0, 1.0), "predsim": (1 - parts.beta, parts.beta)}[parts.loss]

    def _check(self, blocks: Blocks, task: TaskInfo, owner: str) -> None:
        parts = self.parts
        if blocks.readout is None and (parts.loss == "sim" or parts.contrast):
            raise ValueError(
                f"{owner} with {'loss=sim' if parts.loss == 'sim' else 'contrast=true'} gives no class scores but by the "
                "network's output layer, and this network has no readout: name one in Blocks.cut(..., readout=...)"
            )
        if parts.smoothing:
            scores = torch.linspace(-1, 1, 2 * task.outputs).reshape(2, task.outputs)
            targets = torch.tensor([0, 1])
            if not torch.allclose(task.loss(scores, targets), F.cross_entropy(scores, targets)):
                raise ValueError(
                    "smoothing is that of the cross entropy's labels, and this task's loss is another: leave it out"
                )
        if any(self._moved) and not any(residual_branches(block) for block in blocks):
            raise ValueError(
                f"movement is that of residual branches, and none of the blocks {', '.join(blocks.names)} has one that is "
                "known: leave it out, or name them in an attribute residual_branches of your residual unit"
            )

    def _make_head(
        self, index: int, shape: Sequence[int], maps: Sequence[Sequence[tuple[int, ...]]], classes: int
    ) -> nn.Module:
        parts = self.parts
        if self.weights[index][0] == 0:
            return nn.Identity()
        outputs = _EMBEDDING if parts.contrast else classes
        if parts.head == "linear":
            return self._linear(index, shape, outputs)
        if parts.head == "token":
            if len(shape) != 2 or isinstance(shape, Signal):
                given = "a one-dimensional map (C, L) of shape " if isinstance(shape, Signal) else ""
                raise ValueError(
                    f"head=token reads tokens of shape (T, D), the class token first, and block {self.names[index]!r} gives "
                    f"{given}{tuple(shape)}: use another head"
                )
            return TokenHead(shape[1], outputs)

        def scaled(channels: int) -> int:
            return max(1, round(parts.width * channels))

        if parts.head == "conv1" and isinstance(shape, Signal):
            return ConvHead(shape.channels, outputs, scaled(shape.channels), dimensions=1)
        channels, height, width = self._map(index, shape, f"head={parts.head}")
        later = [unit for inner in maps[index + 1 :] for unit in inner]
        smaller = _stages(height * width, later)
        if parts.head == "conv1":
            return ConvHead(channels, outputs, scaled(channels))
        if parts.head == "1c2f":  # as wide as the next stage, and as small; within the last one as it is
            after = smaller[0][0] if smaller else channels
            return ConvHead(channels, outputs, scaled(after), 2 if smaller else 1, scaled(_EMBEDDING))
        if parts.head == "dgl":
            return MLPHead(channels, outputs, scaled(channels), (-(-height // 4), -(-width // 4)))
        if parts.head == "man":
            return MLPHead(channels, outputs, scaled(128), (8, 8), pooled=1)
        norm = False
        if parts.head == "auglocal":
            count = [len(inner) for inner in maps]
            own, total = sum(count[: index + 1]) - 1, sum(count)
            depth = equations.auglocal_depth(index, len(maps), int(parts.depth), parts.decay)
            chosen = equations.auglocal_units(own, total, depth) if own + 1 < total else []
            smaller = [later[unit - own - 1] for unit in chosen]
            norm = len(chosen) == 1
        widths = [scaled(unit[0]) for unit in smaller]
        strides = equations.halvings(max(height, width), [max(unit[1:]) for unit in smaller])
        return ResidualHead(channels, outputs, widths, strides, norm)

    def _linear(self, index: int, shape: Sequence[int], outputs: int) -> nn.Module:
        predsim, asked = self.parts.loss == "predsim", self.parts.head_limit
        limit = asked
        if predsim and asked is None:
            limit = max(_LIMIT, shape[channel_axis(shape) - 1])  # vectors, and channels, stay as they are
        try:
            head = LinearHead(shape, outputs, limit, bias=predsim)
        except ValueError as error:
            raise ValueError(f"block {self.names[index]!r}: {error}; raise head_limit, or leave it out") from None
        if predsim:
            nn.init.zeros_(head.projection)  # so its block learns from the similarity alone at first
        return head

    def _make_term(self, index: int, shape: Sequence[int], classes: int, image: tuple[int, ...]) -> nn.Module:
        if self.weights[index][1] == 0:
            return nn.Identity()
        if self.parts.loss == "infopro":
            if len(image) != 3:
                raise ValueError(
                    f"loss=infopro has every block give the image back, (C, H, W), and this network's inputs are of shape "
                    f"{image}: use another loss"
                )
            return ReconstructionLoss(self._map(index, shape, "loss=infopro")[0], image)
        return SimilarityLoss(shape, classes, self.parts.similarity_side)

    def _map(self, index: int, shape: Sequence[int], what: str) -> tuple[int, int, int]:
        if len(shape) != 3:
            given = {1: "vectors", 2: "tokens"}.get(len(shape), "a tensor")
            instead = "head=token, or head=linear" if len(shape) == 2 else "head=linear"
            if isinstance(shape, Signal):
                given, instead = "a one-dimensional map (C, L)", "head=linear or head=conv1"
            raise ValueError(
                f"{what} reads maps of shape (C, H, W), and block {self.names[index]!r} gives {given} of shape "
                f"{tuple(shape)}: use {instead} with loss=ce, sim or predsim, or another network"
            )
        channels, height, width = shape
        return channels, height, width

    # -- use ----------------------------------------------------------------------------------------------------------
    def groups(self, blocks: Blocks, index: int) -> list[ParamGroup]:
        """Parameters of block ``index``, of its head and of its term."""
        own: list[nn.Parameter] = list(blocks[index].parameters())
        if index >= self._local:
            assert blocks.readout is not None
            own += blocks.readout.parameters()
        else:
            own += self.projections[index].parameters()
            if len(self.terms):
                own += self.terms[index].parameters()
        return [{"params": own}]

    @property
    def classifies(self) -> bool:
        """Whether every block has class scores of its own."""
        return not self.parts.contrast and all(weight for weight, _ in self.weights)

    def scores(self, blocks: Blocks, index: int, output: Tensor, batch: Batch) -> Tensor:
        """What the head of block ``index`` makes of the block's output: class scores ``(N, C)``, but for the contrast.

        Raises:
            ValueError: the head normalises over a batch of one sample.
        """
        if index >= self._local:
            assert blocks.readout is not None
            scores: Tensor = blocks.readout(output, *batch.context)
            return scores
        try:
            read: Tensor = self.projections[index](output)
        except ValueError as error:
            if not lacks_samples(error):
                raise
            raise ValueError(
                f"the head of block {self.names[index]!r} normalises over the batch, and this one has {len(output)} "
                "sample: give it at least two (drop_last=true leaves a last one out), or another head"
            ) from None
        return read

    @property
    def _observes(self) -> bool:
        """Whether what is black and white must be found out."""
        decodes = self.parts.loss == "infopro" and any(beside for _, beside in self.weights)
        return decodes and self.parts.pixels is None

    def observe(self, inputs: Tensor) -> None:
        """Note the smallest and the largest value of every channel of the images, for those who give them back."""
        if self._observes:
            axes = (0, 2, 3)
            self.low.copy_(torch.minimum(self.low, inputs.detach().amin(axes)))
            self.high.copy_(torch.maximum(self.high, inputs.detach().amax(axes)))

    def images(self, inputs: Tensor) -> Tensor:
        """The network's inputs as pixels in [0, 1]."""
        if self.parts.pixels is not None:
            low, high = self.parts.pixels
            return ((inputs - low) / (high - low)).clamp(0, 1)
        low_, span = self.low[:, None, None], (self.high - self.low)[:, None, None]
        return ((inputs - low_) / torch.where(span > 0, span, 1)).clamp(0, 1)

    @contextmanager
    def watching(self, blocks: Blocks, index: int) -> Iterator[list[Tensor]]:
        """Collect the movement of the residual branches of block ``index`` while it runs; empty where it has no weight."""
        loss, found = self._moved[index], list[Tensor]()

        def note(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            assert loss is not None
            found.append(loss(output))
            return output.clone()  # the shortcut may be added in place, and the square still needs this one

        hooks = [branch.register_forward_hook(note) for branch in residual_branches(blocks[index])] if loss else []
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def loss(
        self,
        blocks: Blocks,
        index: int,
        output: Tensor,
        batch: Batch,
        moved: Sequence[Tensor] = (),
        each: list[Tensor] | None = None,
    ) -> Tensor:
        """The local loss of block ``index``, over the rows that carry targets.

        Args:
            blocks: the network.
            index: of the block.
            output: of the block, or what else its head reads.
            batch: inputs, targets, context and rows.
            moved: what :meth:`watching` collected.
            each: where given, what every sample costs by the head and by the term goes in here, ``(N,)`` without a graph.
        """
        reduction: Reduction = "mean" if each is None else "none"

        def mean(values: Tensor, share: float) -> Tensor:
            if each is not None:
                each.append(share * values.detach())
                values = values.mean()
            return values if share == 1 else share * values

        weight, beside = self.weights[index] if index < self._local else (1.0, 0.0)
        found: list[Tensor] = []
        if weight:
            scores, targets = selected(batch, self.scores(blocks, index, output, batch))
            if index < self._local and self.parts.contrast:
                found.append(mean(self._contrast(scores, targets, reduction), weight))
            else:  # the task's loss is whatever the task says, and a mean
                value = self._classify(scores, targets)
                found.append(value if weight == 1 else weight * value)
                if each is not None:
                    each.append(weight * sample_losses(self._classify, scores, targets))
        if beside:
            term = self.terms[index]
            if isinstance(term, ReconstructionLoss):
                found.append(mean(term(output, self.images(batch.inputs), reduction), beside))
            else:
                found.append(mean(term(*selected(batch, output), reduction), beside))
        first, *others = [*found, *moved]
        return sum(others, start=first)

    def _classify(self, scores: Tensor, targets: Tensor) -> Tensor:
        if self.parts.smoothing:
            return F.cross_entropy(scores, targets, label_smoothing=self.parts.smoothing)
        return self._loss(scores, targets)


def _stages(size: int, later: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Of every smaller size among the maps of later units the last one."""
    stages: list[tuple[int, ...]] = []
    for unit in later:
        area = unit[1] * unit[2]
        if stages and area == stages[-1][1] * stages[-1][2]:
            stages[-1] = unit
        elif area < size:
            stages.append(unit)
            size = area
    return stages
