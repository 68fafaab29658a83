"""Counter-current learning: a second network runs from the labels towards the data, and every layer meets its partner."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from locallearn.algorithms.base import Algorithm, Locality, ParamGroup, TaskInfo, Update, refuse_dense
from locallearn.algorithms.counter_current._mirror import NORMS, WEIGHTS, Layer, mirror, trace, weights
from locallearn.algorithms.counter_current._pairs import ClassPairs, MapPairs, Pairs
from locallearn.algorithms.dry_run import refuse_narrow
from locallearn.batch import Batch
from locallearn.functional import counter_current as ccl
from locallearn.losses.counter_current import CounterCurrentLoss
from locallearn.nets.blocks import evaluating, width_of

Target = Literal["class", "identity"]
Loss = Literal["auto", "mlp", "cnn", "autoencoder"]


class CounterCurrent(Algorithm):
    """Counter-current learning (Kao and Hariharan, arXiv 2409.19841, with the losses and settings of their code).

    The forward network runs ``a_l = f_l(detach(a_{l-1}))`` from the input to the output, a feedback network of its own
    weights runs ``b_{l-1} = g_l(detach(b_l))`` from the labels to a reconstruction of the input. ``g_l`` is made here as
    the mirror of block l: its layer with inputs and outputs swapped, poolings and strides as nearest upsampling, and the
    normalisation and activation of the block before, so that ``b_l`` has the shape of ``a_l``. Every pair
    ``(a_l, b_l)`` has a loss that trains the two layers that made it and nothing else; the output layer learns from the
    task's loss, and the pair (input, ``b_0``) trains the last feedback layer.

    With class labels the feedback network runs once for every class, K rows whatever the batch. Without classes, where
    targets are images, it runs from the target images (the autoencoder of the paper).

    Scale and shift of normalisations do not learn (``requires_grad`` is taken from those of the network), as in the
    code: a pair of maps could agree by shrinking to nothing.

    Deviations: every feedback layer runs a second time inside its own update, so that one pair's graph at a time is
    alive. Normalisations of the feedback network keep no running statistics, because it is not used at inference.
    Flooding judges samples by a pass in eval mode.

    Args:
        target: what the loss of a pair compares with: ``"class"``: every sample with every class, 1 for its own (the
            code); ``"identity"``: every sample with the signals of the batch's samples, 1 for itself and 0 for others of
            its class, too (the paper's text). Of tasks with classes.
        loss: ``"mlp"``: inner products divided by the width; ``"cnn"``: of rows of length 1, with Gram terms;
            ``"autoencoder"``: maps against maps; ``"auto"``: the last without classes, ``"cnn"`` where a block holds a
            convolution, else ``"mlp"``.
        c: factor of the pair's term; ``None``: the code's, 0.5 for ``mlp``, else 1.
        gram: factor of the Gram terms; ``None``: the code's, 0.5 for ``cnn``, else 0. Of tasks with classes.
        flooding: leave samples whose true class has a probability above this out of the pairs' losses, 0.9 in the
            code's CIFAR-10 run; ``None``: none. It costs one more forward pass.
        centralise: take the mean over inputs out of every weight's gradient.
        warmup_steps: the losses of that many first batches are scaled up linearly; 0: none.
        clip: largest norm of the gradient of each of the two networks; ``None``: none. The gradients of all layers are
            then held until the last of them is there. (``trainer.gradient_clip_val`` clips each unit by itself.)
        feedback_lr: learning rate of the feedback network; ``None``: that of the forward one; 0: its weights stay as
            they are drawn.
        seed: of the feedback network's weights.

    Raises:
        ValueError: a setting out of range.
    """

    steps: Tensor

    def __init__(
        self,
        target: Target = "class",
        loss: Loss = "auto",
        c: float | None = None,
        gram: float | None = None,
        flooding: float | None = None,
        centralise: bool = False,
        warmup_steps: int = 0,
        clip: float | None = None,
        feedback_lr: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        if target not in get_args(Target):
            raise ValueError(f"target is {target!r}, expected 'class' or 'identity'")
        if loss not in get_args(Loss):
            raise ValueError(f"loss is {loss!r}, expected 'auto', 'mlp', 'cnn' or 'autoencoder'")
        if c is not None and c <= 0:
            raise ValueError(f"c is {c}, expected a factor above 0, or null for the default of the loss")
        if gram is not None and gram < 0:
            raise ValueError(
                f"gram is {gram}, expected 0 (no Gram terms) or above, or null for the default of the loss"
            )
        if flooding is not None and not 0 < flooding < 1:
            raise ValueError(f"flooding is {flooding}, expected a probability between 0 and 1, or null for none")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps is {warmup_steps}, expected 0 (none) or a number of batches")
        if clip is not None and clip <= 0:
            raise ValueError(f"clip is {clip}, expected a norm above 0, or null for none")
        if feedback_lr is not None and feedback_lr < 0:
            raise ValueError(
                f"feedback_lr is {feedback_lr}, expected 0 (frozen) or above, or null for that of the blocks"
            )
        self.target = target
        self.loss = loss
        self.c = c
        self.gram = gram
        self.flooding = flooding
        self.centralise = centralise
        self.warmup_steps = warmup_steps
        self.clip = clip
        self.feedback_lr = feedback_lr
        self.kind: str = loss  # build() says what "auto" is
        self._norms: list[str] = []  # whose scale and shift the rule holds back, while their statistics go on
        if warmup_steps > 0:
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def locality(self) -> Locality:
        """Layer-local; a norm over a whole network, or the network's own output, couples what layers learn."""
        coupled = self.clip is not None or self.flooding is not None
        return Locality.COUPLED if coupled else Locality.LAYER_LOCAL

    @property
    def broadcast(self) -> str:
        """Labels, on the way through the feedback network; and what couples layers, where something does."""
        told = "labels, through a feedback network that sees nothing else"
        if self.clip is not None:
            told += "; the norm of each network's gradient"
        if self.flooding is not None:
            told += "; which samples are learned already"
        return told

    @property
    def label_path(self) -> list[nn.Module]:
        """The feedback network."""
        return [self.feedback]

    @property
    def variant(self) -> str | None:
        """``identity``, ``frozen``, or both, where chosen."""
        chosen = [name for name, used in (("identity", self.target == "identity"), ("frozen", self.frozen)) if used]
        return ", ".join(chosen) or None

    @property
    def frozen(self) -> bool:
        """Whether the feedback network keeps the weights it was drawn with."""
        return self.feedback_lr == 0

    def build(self, task: TaskInfo) -> None:
        """Make the mirror of every block and of the readout."""
        self._check(task)
        readout = self.blocks.readout
        assert readout is not None
        stages = [*zip(self.blocks.names, self.blocks, strict=True), ("readout", readout)]
        parameter = next(self.blocks.parameters())
        # A copy, because layers are tried out one by one, those that work in place among them.
        x = task.example.inputs[:2].to(parameter.device, parameter.dtype, copy=True)
        shapes, traced = [x.shape[1:]], []
        for name, stage in stages:
            layers, x = trace(name, stage, x)
            traced.append(layers)
            shapes.append(x.shape[1:])
        refuse_narrow(width_of(x), task)
        convolutional = any(isinstance(layer.module, nn.Conv2d) for layers in traced for layer in layers)
        self.kind = _kind(self.loss, task, convolutional)
        self._pairs: Pairs
        if self.kind == "autoencoder":
            self._check_images(task, stages, shapes)
            self._pairs = MapPairs(1.0 if self.c is None else self.c)
        else:
            self.local = CounterCurrentLoss(self.kind == "cnn", self.c, self.gram)
            self._pairs = ClassPairs(self.local, self.outputs, self.target == "identity")
        self._loss = task.loss
        before: list[Layer] = []
        self.feedback = nn.ModuleList()
        for i, ((name, _), layers) in enumerate(zip(stages, traced, strict=True)):
            # What makes the image at the feedback network's end has its counterpart in the readout, which makes the other one.
            counterpart = traced[-1] if i == 0 and self.kind == "autoencoder" else layers
            self.feedback.append(mirror(name, layers, before, biased=weights(counterpart).bias is not None))
            before = layers
        for path, module in self.blocks.named_modules():
            if isinstance(module, NORMS) and any(p.requires_grad for p in module.parameters()):
                module.requires_grad_(False)
                self._norms.append(path)
        self.feedback.to(parameter.device, parameter.dtype)
        self._pairs.initialise(self.feedback)
        self.feedback.requires_grad_(not self.frozen)
        self._check_mirror(stages, shapes, task)
        self._own = {unit: [p for group in groups for p in group["params"]] for unit, groups in self.units().items()}

    def _held(self) -> Container[int]:
        """Scales and shifts of normalisations."""
        return {id(p) for path in self._norms for p in self.blocks.get_submodule(path).parameters()}

    def units(self) -> dict[str, list[ParamGroup]]:
        """A block with the feedback layer that makes its partner, the readout, and the last feedback layer ("input")."""
        readout = self.blocks.readout
        assert readout is not None
        units: dict[str, list[ParamGroup]] = {}
        for i, (name, block) in enumerate(zip(self.blocks.names, self.blocks, strict=True)):
            units[name] = [{"params": _learned(block)}]
            if self.feedback_lr is None:
                units[name][0]["params"] += _learned(self.feedback[i + 1])
            elif not self.frozen:
                units[name].append(self._feedback_group(i + 1))
        units["readout"] = [{"params": _learned(readout)}]
        if not self.frozen:
            units["input"] = [self._feedback_group(0)]
        return units

    def updates(self, batch: Batch) -> Iterator[Update]:
        """One pair after another, each on detached inputs; with ``clip``, all gradients before the first step."""
        updates = self._updates(batch)
        if self.clip is None and not self.centralise:
            yield from updates
            return
        updates = map(self._differentiated, updates)
        if self.clip is None:
            yield from updates
            return
        backward = {id(p) for p in self.feedback.parameters()}
        held, networks, norms = [], defaultdict(list), defaultdict(list)
        for update in updates:
            for p, gradient in (update.gradients or {}).items():
                networks[id(p) in backward].append(gradient)
                norms[id(p) in backward].append(ccl.gradient_norm(gradient))  # now, while it is in the cache
            held.append(update)
        for own, gradients in networks.items():
            torch._foreach_mul_(gradients, ccl.clip_factor(norms[own], self.clip))
        networks.clear()
        while held:
            yield held.pop(0)

    def _updates(self, batch: Batch) -> Iterator[Update]:
        readout, scale = self.blocks.readout, None
        assert readout is not None
        if self.warmup_steps > 0:
            self.steps += 1
            scale = (self.steps / self.warmup_steps).clamp(max=1.0)
        signals = self._signals(batch.targets)
        pair_loss, end_loss = self._pairs.losses(batch.targets, self._keep(batch))
        torch.clear_autocast_cache()  # older PyTorch gives casts made without gradients back (pytorch/pytorch#158232)

        def update(unit: str, loss: Tensor) -> Update:
            return Update(unit, loss if scale is None else scale * loss)

        x = batch.inputs
        for i, (name, block) in enumerate(zip(self.blocks.names, self.blocks, strict=True)):
            output = block(x)
            yield update(name, pair_loss(output, self._partner(i + 1, signals)))
            x = output.detach()
            del output  # the block's graph ends here
        yield update("readout", self._readout_loss(readout(x), batch.targets))
        if not self.frozen:
            yield update("input", end_loss(batch.inputs, self._partner(0, signals)))

    def _readout_loss(self, output: Tensor, targets: Tensor) -> Tensor:
        return self._pairs.output(output, self._loss(output, targets))

    def _differentiated(self, update: Update) -> Update:
        """The same update with gradients in place of a graph."""
        assert update.loss is not None
        parameters = [p for p in self._own[update.unit] if p.requires_grad]
        gradients = _writable(torch.autograd.grad(update.loss, parameters) if parameters else ())
        if self.centralise:
            gradients = list(map(ccl.centralise, gradients))
        return Update(update.unit, update.loss.detach(), dict(zip(parameters, gradients, strict=True)))

    # -- the feedback network ----------------------------------------------------------------------------------------
    @torch.no_grad()
    def _signals(self, targets: Tensor) -> dict[int, Tensor]:
        """What the labels send in and ``b_l`` of the hidden layers, by l, without graphs; ``b_0`` is left to its pair."""
        last = len(self.feedback)
        signals = {last: self._pairs.sent(targets, next(self.feedback.parameters()).dtype)}
        for i in reversed(range(1, last)):
            signals[i] = self.feedback[i](signals[i + 1])
        return signals

    def _partner(self, index: int, signals: dict[int, Tensor]) -> Tensor:
        """``b_index`` with a graph of its own layer alone."""
        if self.frozen:
            return signals[index]
        signal: Tensor = self.feedback[index](signals[index + 1])
        return signal

    @torch.no_grad()
    def _keep(self, batch: Batch) -> Tensor | None:
        """Which samples the pairs learn from; ``None``: all."""
        if self.flooding is None:
            return None
        with evaluating(self.blocks):  # the pass must not move normalisation statistics a second time
            return ccl.unlearned(self.blocks(batch.inputs), batch.targets, self.flooding)

    def _feedback_group(self, index: int) -> ParamGroup:
        group: ParamGroup = {"params": _learned(self.feedback[index])}
        return group if self.feedback_lr is None else {**group, "lr": self.feedback_lr}

    # -- refusals ----------------------------------------------------------------------------------------------------
    def _check(self, task: TaskInfo) -> None:
        if self.blocks.readout is None:
            raise ValueError(
                "counter-current learning trains a readout with the task's loss, and this network has none"
            )
        if "input" in self.blocks.names:
            raise ValueError("a block is named 'input', which is the name of a unit of the rule: rename the block")
        if task.example.context or task.example.rows is not None:
            raise ValueError(
                "counter-current learning mirrors plain layers, and this task has a context or selected rows (a graph?): "
                "use another algorithm"
            )
        refuse_dense(task, "counter-current learning")
        if not task.classes:
            for name, given in (("gram", self.gram), ("flooding", self.flooding)):
                if given is not None:
                    raise ValueError(
                        f"{name} is {given}, but it needs class labels and this task has none: set it to null"
                    )
            if self.target == "identity":
                raise ValueError("target is 'identity', but this task has no class labels: set it to class")

    def _check_images(self, task: TaskInfo, stages: list[tuple[str, nn.Module]], shapes: list[torch.Size]) -> None:
        for name, shape in zip([name for name, _ in stages], shapes[1:], strict=True):
            if len(shape) != 3:
                raise ValueError(
                    f"{name!r} gives {tuple(shape)} per sample, but without class labels every layer must give a map "
                    "(channels, height, width): use a convolutional autoencoder"
                )
        if task.example.targets.shape[1:] != shapes[-1]:
            raise ValueError(
                f"targets are {tuple(task.example.targets.shape[1:])} per sample and the network gives "
                f"{tuple(shapes[-1])}: without class labels, targets must be images of the output's shape"
            )

    def _check_mirror(self, stages: list[tuple[str, nn.Module]], shapes: list[torch.Size], task: TaskInfo) -> None:
        parameter = next(self.feedback.parameters())
        signal = self._pairs.sent(task.example.targets.to(parameter.device), parameter.dtype)
        for i in reversed(range(len(stages))):
            name = stages[i][0]
            try:
                with torch.no_grad():
                    signal = self.feedback[i](signal)
            except Exception as error:
                raise ValueError(f"the mirror of {name!r} cannot take {tuple(signal.shape)}: {error}") from error
            if signal.shape[1:] != shapes[i]:
                raise ValueError(
                    f"the mirror of {name!r} gives {tuple(signal.shape[1:])} per row, but {name!r} reads {tuple(shapes[i])}: "
                    "its layers cannot be mirrored"
                )


def _kind(loss: Loss, task: TaskInfo, convolutional: bool) -> str:
    if (loss == "autoencoder") is task.classes and loss != "auto":
        wanted = "'mlp' or 'cnn'" if task.classes else "'autoencoder'"
        raise ValueError(f"loss is {loss!r}, but this task {'has' if task.classes else 'has no'} classes: use {wanted}")
    if loss != "auto":
        return loss
    if not task.classes:
        return "autoencoder"
    return "cnn" if convolutional else "mlp"


def _learned(part: nn.Module) -> list[nn.Parameter]:
    return [p for module in part.modules() if isinstance(module, WEIGHTS) for p in module.parameters()]


def _writable(gradients: Iterable[Tensor]) -> list[Tensor]:
    """Gradients that may be changed in place: autograd can give two parameters one tensor, or all entries one number."""
    seen: set[int] = set()
    own = []
    for gradient in gradients:
        memory = gradient.untyped_storage().data_ptr()
        own.append(gradient.clone() if memory in seen or 0 in gradient.stride() else gradient)
        seen.add(memory)
    return own
