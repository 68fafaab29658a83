"""Forward-Forward: every block learns to be loud on right data and quiet on wrong data."""

from __future__ import annotations

import inspect
import math
from collections.abc import Container, Iterator, Mapping
from typing import Any, ClassVar, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms.base import Locality, ParamGroup, TaskInfo, Update, choices
from locallearn.algorithms.forward_forward.frame import LabelledGoodness
from locallearn.algorithms.forward_forward.peers import last_relu, unit_count, unit_layer
from locallearn.batch import Batch
from locallearn.functional import emergent
from locallearn.functional import forward_forward as ff
from locallearn.losses.channelwise import Competition
from locallearn.losses.forward_forward import ForwardForwardLoss
from locallearn.losses.symba import SymBaLoss
from locallearn.nets.locally_connected import LocallyConnected2d

Negatives = Literal["uniform", "hard", "hybrid"]
Inference = Literal["goodness", "last", "softmax", "vote"]
Loss = Literal["logistic", "symba", "channelwise"]


class _ByOptions(LabelledGoodness):
    """``ForwardForward(...)`` makes an object of the kind that its options ask for, as ``pathlib.Path(...)`` does."""

    def __new__(cls, *args: Any, **options: Any) -> Self:
        kind: Any = cls
        if cls is ForwardForward:
            asked = inspect.signature(cls.__init__).bind_partial(None, *args, **options).arguments
            kind = _kind(asked.get("negatives"), asked.get("loss"), asked.get("recurrent"))
        made: Self = super().__new__(kind)
        return made


class ForwardForward(_ByOptions):
    """Forward-Forward (Hinton, arXiv 2212.13345, with the settings of the Matlab code that goes with it).

    The label is written into the first ``classes`` entries of the input: the true one makes a positive sample, a wrong
    one a negative sample. Block i learns from softplus((theta-G+)/T) and softplus((G- - theta)/T), G the sum of squares of
    its output; the next block sees that output scaled to RMS 1. With ``goodness="norm", threshold=3.0, normalise="unit",
    inference="vote"`` it is the Forward-Forward of Tosato et al. (arXiv 2305.18353).

    Options that change more than a part of this make an object of another class, a subclass of this one:
    ``negatives="hybrid"`` learns without labels
    (:class:`~locallearn.algorithms.forward_forward.unsupervised.HybridForwardForward`), ``loss="channelwise"`` without
    negatives (:class:`~locallearn.algorithms.forward_forward.channelwise.ChannelwiseForwardForward`), and ``recurrent``
    lets blocks see the block above them
    (:class:`~locallearn.algorithms.forward_forward.recurrent.RecurrentForwardForward`).

    Deviations: negatives are drawn uniformly unless asked otherwise, because hard negatives come from a softmax on later
    blocks, and then what a block learns depends on the weights of blocks above it (``locallearn audit`` shows it). The
    network's own readout is not used. Inputs of more than one dimension are flattened for the label's slots only.

    Args:
        negatives: ``"uniform"``: any wrong label; ``"hard"``: drawn from the readout's softmax with the true class ruled
            out, on a pass with the neutral label; ``"hybrid"``: images mixed from two, no label in the input.
        inference: ``"goodness"``: for every label one pass, argmax of the summed goodness; ``"last"``: of the last block's
            alone; ``"softmax"``: one pass with the neutral label and the readout; ``"vote"``: for every label one pass,
            argmax of the sum over blocks of the softmax over labels of their goodness; ``None``: what the kind can do, in
            this order (``"last"`` with ``loss="channelwise"``).
        threshold: theta; ``None``: the goodness of an output that is 1 everywhere (of squares the number of its entries), 2
            with ``loss="channelwise"``.
        temperature: T.
        minimise: positives quiet instead of loud (min-ssq).
        peer: strength of peer normalisation, 0.03 in the Matlab code; every block must then contain an ``nn.ReLU``.
        skip_first: leave the first block out of inference and readout, as the Matlab code does; a network of one block
            keeps it. ``None``: true where the first block reads the label from its input, and with hybrids; else false, and
            with ``inference="vote"``, where all blocks vote.
        label_strength: value of the label's slot.
        readout_lr: learning rate of the readout, where there is one (hard negatives, hybrids, ``"softmax"``); ``None``: that of
            the blocks.
        readout_weight_decay: weight decay of the readout; ``None``: that of the blocks.
        seed: of negatives, and of weights from above with ``recurrent`` (the readout starts at zero).
        loss: ``"logistic"``: as above; ``"symba"``: softplus(-alpha (G+ - G-)) with G the mean of squares;
            ``"channelwise"``: classes compete for the loudest channels.
        alpha: of ``loss="symba"``.
        competition: of ``loss="channelwise"``: ``"cwc"``, ``"pvn"`` or ``"cwg"``, see
            :class:`~locallearn.losses.ChannelwiseCompetitiveLoss`.
        blurs: of ``negatives="hybrid"``: how often a mask of random bits is blurred before it is thresholded.
        recurrent: number of time steps, or ``{"steps": 8, "damping": 0.3, "read": [3, 5]}``; ``None``: one pass upward.
        goodness: ``"squares"``: the sum of squares; ``"norm"``: the Euclidean length; ``"l1"``: the sum of magnitudes.
        normalise: what a block sees of the input and of the block below: ``"rms"``: scaled to RMS 1; ``"unit"``: to length 1.

    Raises:
        ValueError: an unknown choice, or an option that means nothing beside the others.
    """

    inferences: ClassVar[tuple[Inference, ...]] = get_args(Inference)
    """What the kind can answer by; the first one is its own."""
    skips_first: ClassVar[bool] = True
    """Whether the first block is left out of inference unless asked for."""

    def __init__(
        self,
        negatives: Negatives = "uniform",
        inference: Inference | None = None,
        threshold: float | None = None,
        temperature: float = 1.0,
        minimise: bool = False,
        peer: float = 0.0,
        skip_first: bool | None = None,
        label_strength: float = 1.0,
        readout_lr: float | None = None,
        readout_weight_decay: float | None = None,
        seed: int = 0,
        *,
        loss: Loss = "logistic",
        alpha: float = 4.0,
        competition: Competition = "cwc",
        blurs: int = 6,
        recurrent: int | Mapping[str, Any] | None = None,
        goodness: emergent.Goodness = "squares",
        normalise: emergent.Normalise = "rms",
    ) -> None:
        super().__init__(label_strength, minimise, seed)
        if negatives not in get_args(Negatives):
            raise ValueError(f"negatives is {negatives!r}, expected 'uniform', 'hard' or 'hybrid'")
        if loss not in get_args(Loss):
            raise ValueError(f"loss is {loss!r}, expected 'logistic', 'symba' or 'channelwise'")
        if inference is not None and inference not in get_args(Inference):
            raise ValueError(f"inference is {inference!r}, expected 'goodness', 'last', 'softmax' or 'vote'")
        emergent.check_kind(goodness)
        emergent.check_scale(normalise)
        self.negatives = negatives
        if threshold is not None and not math.isfinite(threshold):
            raise ValueError(f"threshold is {threshold}, expected a finite number, or null for the output's own")
        self.inference: Inference = self.inferences[0] if inference is None else inference
        self.threshold = threshold
        self.temperature = temperature
        self.peer = peer
        self.skip_first = self.skips_first and inference != "vote" if skip_first is None else skip_first
        self.readout_lr = readout_lr
        self.readout_weight_decay = readout_weight_decay
        self.loss = loss
        self.alpha = alpha
        self.competition = competition
        self.blurs = blurs
        self.recurrent = recurrent
        self.goodness: emergent.Goodness = goodness
        self.normalise: emergent.Normalise = normalise
        self.readout: nn.Linear | None = None
        self._pre_activation: Tensor | None = None
        self._neutral: Tensor | None = None
        if self.inference not in self.inferences:
            raise ValueError(
                f"inference is {inference!r}, and {self._kind_in_words()} answers by {' or '.join(map(repr, self.inferences))}"
            )
        self._refuse_idle()

    # -- which options mean something ------------------------------------------------------------------------------------
    def _kind_in_words(self) -> str:
        return f"loss={self.loss}"

    def _idle(self) -> tuple[str, ...]:
        """Options that would do nothing in this kind."""
        of_loss = (
            ("alpha",) if self.loss == "logistic" else ("threshold", "temperature", "minimise", "peer", "goodness")
        )
        return (*of_loss, "competition", "blurs")

    def _refuse_idle(self) -> None:
        defaults = inspect.signature(ForwardForward.__init__).parameters
        for name in self._idle():
            value, default = getattr(self, name), defaults[name].default
            if value != default:
                raise ValueError(
                    f"{name} is {value!r}, which means nothing with {self._kind_in_words()}: leave it at {default!r}"
                )

    # -- claims ----------------------------------------------------------------------------------------------------------
    @property
    def locality(self) -> Locality:
        """Layer-local with uniform negatives; hard ones let later blocks choose what earlier ones learn from."""
        return Locality.COUPLED if self.negatives == "hard" else Locality.LAYER_LOCAL

    @property
    def broadcast(self) -> str:
        """Nothing but the label in the input and the positive/negative bit."""
        bit = "label in the input, positive/negative bit"
        return f"{bit}; wrong labels drawn from the readout's softmax" if self.negatives == "hard" else bit

    @property
    def stages(self) -> list[list[str]]:
        """One block after the other, then the readout.

        Raises:
            ValueError: negatives would come from a readout that has not learned yet.
        """
        if self.negatives == "hard":
            raise ValueError(
                "negatives=hard draws wrong labels from the readout, which in a sequential schedule learns behind all blocks "
                "and until then takes every label for as likely: set algorithm.negatives=uniform, or use schedule=joint"
            )
        return super().stages

    @property
    def variant(self) -> str | None:
        """What makes another rule of it: data, loss and goodness, where they are not Hinton's supervised ones."""
        return choices(self, ForwardForward.__init__, "negatives", "loss", "competition", "goodness", "minimise")

    # -- parts -----------------------------------------------------------------------------------------------------------
    def build(self, task: TaskInfo) -> None:
        """Give every block its loss, and the network a readout where hard negatives or one-pass inference want one."""
        sizes = self.sizes = self.check(task)
        self.local = nn.ModuleList(self._make_loss(i) for i in range(len(self.blocks)))
        if self.negatives == "hard" or self.inference == "softmax":
            self.readout = nn.Linear(sum(sizes[i] for i in self.readable(len(sizes))), task.outputs, bias=False)
            nn.init.zeros_(self.readout.weight)
        if self.peer > 0:
            for i in range(len(self.blocks)):
                last_relu(self.blocks, i).register_forward_pre_hook(self._keep_pre_activation)

    def _make_loss(self, index: int) -> nn.Module:
        if self.loss == "symba":
            return SymBaLoss(self.alpha)
        units: int | None = None
        if self.peer > 0:
            last_relu(self.blocks, index)
            units = unit_count(unit_layer(self.blocks, index))
        return ForwardForwardLoss(self.threshold, self.temperature, self.minimise, self.peer, units, self.goodness)

    def _asleep(self) -> Container[str]:
        """The blocks that do not train now, and the mean activities of all that rest."""
        still = [i for i, block in enumerate(self.blocks) if not any(p.requires_grad for p in block.parameters())]
        names = self.blocks.names
        idle = [i for i, name in enumerate(names) if not self.trains(name)]
        return {*(f"blocks.members.{names[i]}" for i in idle), *(f"local.{i}" for i in (*still, *idle))}

    def extra_units(self) -> dict[str, list[ParamGroup]]:
        """The readout, where there is one."""
        if self.readout is None:
            return {}
        group: ParamGroup = {"params": list(self.readout.parameters())}
        if self.readout_lr is not None:
            group["lr"] = self.readout_lr
        if self.readout_weight_decay is not None:
            group["weight_decay"] = self.readout_weight_decay
        return {"readout": [group]}

    # -- the way of a batch ----------------------------------------------------------------------------------------------
    def prepare(self, batch: Batch) -> Batch:
        """Positives on top of negatives, ``(2N, ...)``, scaled."""
        if self.readout is not None and (self.negatives == "hard" or self.trains("readout")):
            with torch.no_grad():
                self._neutral = self._features(self.activations(batch.inputs))
        if self.negatives != "hard":
            return super().prepare(batch)
        assert self.readout is not None
        assert self._neutral is not None
        with torch.no_grad():
            logits = self.readout(self._neutral)
        wrong = ff.wrong_labels_hard(logits, batch.targets, self.rng(batch.targets.device))
        return Batch(self.pairs(batch, wrong), batch.targets)

    def local_loss(self, index: int, output: Tensor, batch: Batch) -> Tensor:
        """The loss of the goodness of both halves."""
        positive, negative = output.chunk(2)
        pre: Tensor | None = None
        if self._pre_activation is not None:
            pre, self._pre_activation = self._pre_activation[: len(positive)], None
            if isinstance(unit_layer(self.blocks, index), LocallyConnected2d):  # every entry is a unit of its own
                positive, negative, pre = positive.flatten(1), negative.flatten(1), pre.flatten(1)
        loss: Tensor = self.local[index](positive, negative, *(() if pre is None else (pre,)))
        return loss

    def extra_updates(self, batch: Batch, prepared: Batch) -> Iterator[Update]:
        """Train the readout on the neutral pass; no gradient enters the blocks."""
        if self.readout is not None and self.trains("readout"):
            assert self._neutral is not None
            neutral, self._neutral = self._neutral, None
            yield Update("readout", F.cross_entropy(self.readout(neutral), batch.targets))

    def scaled(self, x: Tensor) -> Tensor:
        """Scaled to RMS 1, or to length 1."""
        return emergent.normalise(x, self.normalise)

    # -- inference -------------------------------------------------------------------------------------------------------
    def goodness_of(self, output: Tensor) -> Tensor:
        """Sum of squares, their mean with ``loss="symba"``, Euclidean length or sum of magnitudes."""
        return ff.mean_goodness(output) if self.loss == "symba" else emergent.goodness(output, self.goodness)

    def said(self, goodness: Tensor) -> Tensor:
        """Goodness (negated for min-ssq), or a softmax of it over the labels where blocks vote."""
        said = super().said(goodness)
        return said.softmax(1) if self.inference == "vote" else said

    def predict(self, inputs: Tensor, *context: Any) -> Tensor:
        """Summed goodness of every label (negated for min-ssq), the blocks' votes, or the readout's logits, ``(N, C)``."""
        if self.by_readout:
            assert self.readout is not None
            scores: Tensor = self.readout(self._features(self.activations(inputs)))
        elif self.inference == "vote":
            scores = self.said(self.goodness_by_label(inputs))[:, :, list(self.read(self.depth))].sum(2)
        else:
            scores = super().predict(inputs)
        self._pre_activation = None  # the hook cannot tell prediction from learning, and would keep a graph alive
        return scores

    @property
    def by_readout(self) -> bool:
        """Whether the readout answers: not in stages before its own, in which goodness judges what a block has learned."""
        return self.inference == "softmax" and self.trains("readout")

    def readable(self, depth: int) -> range:
        """Blocks that a readout reads, of so many that are trained."""
        return range(1 if self.skip_first and depth > 1 else 0, depth)

    def read(self, depth: int) -> range:
        """Blocks whose goodness is summed: those that a readout would read, or the last one alone."""
        return range(depth - 1, depth) if self.inference == "last" else self.readable(depth)

    def _features(self, activations: Iterator[Tensor]) -> Tensor:
        read = self.readable(len(self.blocks))
        return torch.cat([x.flatten(1) for i, x in enumerate(activations) if i in read], 1)

    def _keep_pre_activation(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled() and self.training:  # the module itself rests in a frozen block
            self._pre_activation = args[0]


def _kind(negatives: object, loss: object, recurrent: object) -> type[ForwardForward]:
    """The class for these options; what does not go together, it refuses itself."""
    # Imported here, because all of them are kinds of the class above.
    from locallearn.algorithms.forward_forward.channelwise import ChannelwiseForwardForward
    from locallearn.algorithms.forward_forward.recurrent import RecurrentForwardForward
    from locallearn.algorithms.forward_forward.unsupervised import HybridForwardForward

    if recurrent is not None:
        return RecurrentForwardForward
    if loss == "channelwise":
        return ChannelwiseForwardForward
    return HybridForwardForward if negatives == "hybrid" else ForwardForward
