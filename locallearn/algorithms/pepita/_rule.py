"""PEPITA: a second forward pass on an input that the error has changed tells every layer what to learn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms.base import (
    Algorithm,
    Locality,
    ParamGroup,
    TaskInfo,
    Update,
    output_layer,
    refuse_dense,
    refuse_made_weights,
)
from locallearn.algorithms.dry_run import feature_sizes, unlike_classes
from locallearn.algorithms.pepita._layers import Layer, taken_apart
from locallearn.algorithms.pepita._steps import STEPS
from locallearn.batch import Batch
from locallearn.functional import pepita
from locallearn.nets.blocks import through
from locallearn.precision import multiplying

Variant = Literal["standard", "hebbian", "time_local"]
Sign = Literal["minus", "plus"]
OutputError = Literal["first", "second"]
Presynaptic = Literal["modulated", "original"]


class Pepita(Algorithm):
    """PEPITA (Dellaferrera and Kreiman, arXiv 2201.11665; Srinivasan et al., arXiv 2302.05440). No backward pass.

    The first pass gives h_l and the error e = softmax(scores) − y. The second pass, on x̃ = x − e Fᵀ with a fixed random F,
    gives h̃_l. A hidden layer steps along −(h_l − h̃_l)ᵀ h̃_{l−1} / N, the output layer along −eᵀ h̃_{L−1} / N.

    Everything runs without autograd, and learning outside of autocast and without TF32 or bfloat16 inside products, whatever
    the process is set to: h_l − h̃_l is small, and they would drown it.

    Deviations: biases, which the papers' networks do not have, learn as weights of an input that is always 1. The
    time-local variant shares its dropout masks between the passes, as the others do; the authors' code draws new ones.
    Normalisation layers and residual connections are refused.

    Args:
        variant: ``"standard"``; ``"hebbian"``: h_lᵀ h_{l−1} − h̃_lᵀ h̃_{l−1}, for the output layer h_Lᵀ h_{L−1} − yᵀ h̃_{L−1};
            ``"time_local"``: the same in two steps, one after each layer of each pass, so that nothing of the first pass
            is remembered but the masks.
        sign: ``"minus"``: x − e Fᵀ; ``"plus"``: x + e Fᵀ, as in the first paper's fully connected networks. The same
            in law, but F then turns away from the product of the weights instead of towards it.
        output_error: the pass whose error trains the output layer; ``"second"`` as in the first paper's fully connected
            networks. Standard variant only.
        presynaptic: which input a layer's step is multiplied with, ``"modulated"`` h̃_{l−1} or ``"original"`` h_{l−1}.
            Standard variant only.
        sign_of_error: modulate with the sign of e, and with F ten times smaller.
        dropout: share of every hidden layer's entries that is set to zero in training, by one mask for both passes.
        feedback_scale: F is drawn from U(−b, b), b = feedback_scale·√(6/d_0).
        normalise: divide every hidden activity, after dropout, by the Frobenius norm of the whole batch, in training and
            prediction.
        reduction: over the positions of a convolution's map, ``"sum"`` or ``"mean"``; ``"code"``: as in the code of the
            first paper, see :func:`locallearn.functional.pepita.conv_correlation`.
        mirror_steps: steps of weight mirroring before the first update. Any mirroring makes F a product of one matrix
            per layer; it needs a network of linear layers only, and ``sign="minus"``.
        mirror_every: batches from one step of weight mirroring to the next; ``None``: none during training.
        mirror_lr: its learning rate.
        mirror_decay: its weight decay.
        seed: of F and of the masks and the noise.

    Raises:
        ValueError: a setting that is none of these, or two that exclude each other.
    """

    feedback: Tensor

    def __init__(
        self,
        variant: Variant = "standard",
        sign: Sign = "minus",
        output_error: OutputError = "first",
        presynaptic: Presynaptic = "modulated",
        sign_of_error: bool = False,
        dropout: float = 0.1,
        feedback_scale: float = 0.05,
        normalise: bool = False,
        reduction: pepita.Reduction = "sum",
        mirror_steps: int = 0,
        mirror_every: int | None = None,
        mirror_lr: float = 0.1,
        mirror_decay: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        for what, value, known in (
            ("variant", variant, Variant),
            ("sign", sign, Sign),
            ("output_error", output_error, OutputError),
            ("presynaptic", presynaptic, Presynaptic),
            ("reduction", reduction, pepita.Reduction),
        ):
            if value not in get_args(known):
                raise ValueError(f"{what} is {value!r}, expected one of {', '.join(get_args(known))}")
        if variant != "standard" and (output_error, presynaptic) != ("first", "modulated"):
            raise ValueError(
                f"output_error is {output_error!r} and presynaptic {presynaptic!r}, but the {variant} variant leaves no "
                "choice of them: use 'first' and 'modulated', or variant=standard"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is {dropout}, expected a share from 0 up to, but not including, 1")
        if feedback_scale <= 0.0:
            raise ValueError(f"feedback_scale is {feedback_scale}, expected a number above 0")
        if mirror_steps < 0 or (mirror_every is not None and mirror_every < 1):
            raise ValueError(
                f"mirror_steps is {mirror_steps} and mirror_every {mirror_every}, expected a number of steps from 0 on, "
                "and a number of batches from 1 on or null"
            )
        if mirror_lr <= 0.0 or mirror_decay < 0.0:
            raise ValueError(
                f"mirror_lr is {mirror_lr} and mirror_decay {mirror_decay}, expected one above 0 and one from 0 on"
            )
        self._mirrored = mirror_steps > 0 or mirror_every is not None
        if self._mirrored and sign == "plus":
            raise ValueError(
                "weight mirroring turns F towards the product of the weights, and under sign=plus that would raise the "
                "loss: use sign=minus"
            )
        self._variant = variant
        self.sign = sign
        self.output_error = output_error
        self.presynaptic = presynaptic
        self.sign_of_error = sign_of_error
        self.dropout = dropout
        self.feedback_scale = feedback_scale
        self.normalise = normalise
        self.reduction = reduction
        self.mirror_steps = mirror_steps
        self.mirror_every = mirror_every
        self.mirror_lr = mirror_lr
        self.mirror_decay = mirror_decay

    @property
    def locality(self) -> Locality:
        """Autograd never runs."""
        return Locality.FORWARD_ONLY

    @property
    def broadcast(self) -> str:
        """What comes back: the error, once, to the input."""
        error = "the sign of the output error" if self.sign_of_error else "the output error"
        how = "matrices that mirror the weights" if self._mirrored else "a fixed random matrix"
        return f"{error}, sent to the input through {how}"

    @property
    def variant(self) -> str:
        """``standard``, ``hebbian`` or ``time_local``."""
        return self._variant

    @property
    def added_parameters(self) -> int:
        """Number of fixed or mirrored feedback weights."""
        return super().added_parameters + sum(b.numel() for b in self.buffers(recurse=False))

    @property
    def linear_optimizer(self) -> str | None:
        """The time-local variant learns from the sum of two steps."""
        return STEPS[self._variant].linear_optimizer

    # -- what it is made of -------------------------------------------------------------------------------------------
    def build(self, task: TaskInfo) -> None:
        """Take the blocks apart and draw F."""
        example = task.example
        if not task.classes:
            raise ValueError(
                "PEPITA sends the error of a softmax over classes to the input, and this task has no classes"
            )
        refuse_dense(task, "PEPITA")
        if example.context or example.rows is not None:
            raise ValueError(
                "PEPITA changes every input by the error of its own output, which a task with a context or with rows that "
                "carry no targets (a graph?) does not have: use another algorithm"
            )
        if not example.inputs.is_floating_point():
            raise ValueError(
                f"PEPITA adds an error to the inputs, and these are {example.inputs.dtype} (token ids?): give floating point "
                "inputs, embeddings instead of ids"
            )
        readout = output_layer(self.blocks, "PEPITA")
        self._hidden = [taken_apart(name, block) for name, block in zip(self.blocks.names, self.blocks, strict=True)]
        self._readout = taken_apart("readout", readout)
        if not isinstance(self._readout.weights, nn.Linear) or self._readout.activation or self._readout.after:
            raise ValueError("the readout must be an nn.Linear, or nn.Flatten and nn.Linear, and nothing after it")
        if self._readout.weights.out_features != task.outputs:
            raise unlike_classes(self._readout.weights.out_features, task.outputs)
        feature_sizes(self.blocks, example)  # refuses blocks that do not fit one another
        self._shapes = self._dry_run(example)
        width, weight = example.inputs[0].numel(), self._hidden[0].weights.weight
        scale = self.feedback_scale * (0.1 if self.sign_of_error else 1.0)
        if self._mirrored:
            if not self._linear:
                raise ValueError(
                    "weight mirroring needs a network of linear layers, and this one has convolutions: set mirror_steps=0 "
                    "and mirror_every=null"
                )
            self._deviation = scale * math.sqrt(2.0 / width)
            mirrors = pepita.mirror_matrices([width, *(shape[0] for shape in self._shapes), task.outputs], scale)
            for i, mirror in enumerate(mirrors):
                self.register_buffer(f"mirror{i + 1}", mirror.to(weight))
            feedback = torch.linalg.multi_dot(mirrors)
        else:
            feedback = pepita.feedback_matrix(width, task.outputs, scale)
        self.register_buffer("feedback", feedback.to(weight))

    @torch.no_grad()
    def _dry_run(self, example: Batch) -> list[torch.Size]:
        """Shape of one sample's activity in every block, before pooling."""
        weight, shapes = self._hidden[0].weights.weight, []
        x = example.inputs.to(weight.device, weight.dtype)
        for layer in (*self._hidden, self._readout):
            x = through(layer.before, x)
            if isinstance(layer.weights, nn.Linear) and (x.ndim != 2 or x.shape[1] != layer.weights.in_features):
                raise ValueError(
                    f"the nn.Linear in {layer.name!r} reads {layer.weights.in_features} numbers per sample and is given "
                    f"inputs of shape {tuple(x.shape)}: put an nn.Flatten in front of it, or make it as wide"
                )
            post = through(layer.activation, layer.weights(x))
            shapes.append(post.shape[1:])
            x = through(layer.after, post)
        return shapes[:-1]

    @property
    def _linear(self) -> bool:
        return all(isinstance(layer.weights, nn.Linear) for layer in self._hidden)

    def units(self) -> dict[str, list[ParamGroup]]:
        """One unit per block, and the readout."""
        return {layer.name: [{"params": list(layer.weights.parameters())}] for layer in (*self._hidden, self._readout)}

    # -- learning -----------------------------------------------------------------------------------------------------
    @property
    def period(self) -> int:
        """From one step of weight mirroring to the next."""
        return self.mirror_every or 1

    @torch.no_grad()
    def updates(self, batch: Batch) -> Iterator[Update]:
        """Two passes; every layer's update comes as soon as its activity in the second pass is there.

        The cross entropy of the first pass is reported with the readout. The time-local variant updates every unit
        twice.
        """
        updates = self._updates(batch)
        while True:
            # Around each piece, not around the loop: the context must not stay entered where the driver steps.
            with torch.autocast(batch.inputs.device.type, enabled=False), multiplying("highest", convolutions=False):
                update = next(updates, None)
            if update is None:
                return
            yield update

    def _updates(self, batch: Batch) -> Iterator[Update]:
        for layer in (*self._hidden, self._readout):
            refuse_made_weights(layer.name, layer.weights, "PEPITA")  # pruned after it was attached, say
        self._mirror_where_due(batch.inputs)
        masks = self._masks(batch.inputs)
        steps = STEPS[self._variant](self.reduction, self.presynaptic == "original", self.output_error == "second")
        x = batch.inputs
        for layer, mask in zip(self._hidden, masks, strict=True):
            pre, post, x = self._run(layer, x, mask)
            yield from steps.first(layer, pre, post)
        pre = through(self._readout.before, x)
        scores = self._readout.weights(pre)
        loss = F.cross_entropy(scores, batch.targets)
        outputs = scores.softmax(1)
        wanted = F.one_hot(batch.targets, self.outputs).to(outputs.dtype)
        error = outputs - wanted
        yield from steps.first(self._readout, pre, outputs)

        sent = error.sign() if self.sign_of_error else error
        x = pepita.modulate(batch.inputs, sent, self.feedback, -1.0 if self.sign == "minus" else 1.0)
        for layer, mask in zip(self._hidden, masks, strict=True):
            pre, post, x = self._run(layer, x, mask)
            yield Update(layer.name, gradients=steps.second(layer, pre, post))
        pre = through(self._readout.before, x)
        yield Update("readout", loss, steps.second(self._readout, pre, wanted))

    def _run(self, layer: Layer, x: Tensor, mask: pepita.Mask | None) -> tuple[Tensor, Tensor, Tensor]:
        """What the weights of a hidden layer read, what it answers, and what the next layer is given."""
        pre = through(layer.before, x)
        post = self._answer(layer, pre, mask)
        return pre, post, through(layer.after, post)

    def _answer(self, layer: Layer, pre: Tensor, mask: pepita.Mask | None) -> Tensor:
        """A hidden layer's activity: activation, then dropout, then the norm of what is left."""
        post = through(layer.activation, layer.weights(pre))
        if mask is not None:
            mask.apply_(post)
        return pepita.normalise(post) if self.normalise else post

    def _masks(self, inputs: Tensor) -> list[pepita.Mask | None]:
        """One mask per hidden layer."""
        if self.dropout == 0.0:
            return [None] * len(self._hidden)
        generator, samples = self.rng(inputs.device), len(inputs)
        return [pepita.dropout_mask((samples, *shape), self.dropout, generator) for shape in self._shapes]

    # -- weight mirroring ---------------------------------------------------------------------------------------------
    def _mirror_where_due(self, inputs: Tensor) -> None:
        if not self._mirrored:
            return
        steps = self.mirror_steps if self.batches_seen == 0 else 0
        if self.mirror_every is not None and self.batches_seen > 0 and self.batches_seen % self.mirror_every == 0:
            steps = 1
        for _ in range(steps):
            self._mirror(inputs)
        self.batches_seen += 1

    def _mirror(self, inputs: Tensor) -> None:
        """One step of weight mirroring, with as much noise as the batch has samples.

        The noise passes what activities pass, dropout by masks of its own and the norm included.
        """
        mirrors, masks = [], self._masks(inputs)
        for i, layer in enumerate((*self._hidden, self._readout)):
            shape = (len(inputs), layer.weights.weight.shape[1])
            noise = 0.1 * torch.randn(
                shape, generator=self.rng(inputs.device), device=inputs.device, dtype=inputs.dtype
            )
            noise -= noise.mean()
            last = layer is self._readout
            answer = layer.weights(noise).softmax(1) if last else self._answer(layer, noise, masks[i])
            old = self.get_buffer(f"mirror{i + 1}")
            mirrors.append(pepita.mirror_step(old, noise, answer, self.mirror_lr, self.mirror_decay))
        feedback, factor = pepita.compose(mirrors, self._deviation)
        for i, mirror in enumerate(mirrors):
            self.get_buffer(f"mirror{i + 1}").copy_(factor * mirror)
        self.feedback.copy_(feedback)

    # -- inference ----------------------------------------------------------------------------------------------------
    def predict(self, inputs: Tensor, *context: Any) -> Tensor:
        """Class scores ``(N, K)`` of the first pass without dropout; with ``normalise`` they depend on the whole batch."""
        if not self.normalise:
            return super().predict(inputs)
        *_, last = self.activations(inputs)
        scores: Tensor = self._readout.weights(through(self._readout.before, last))
        return scores

    def activations(self, inputs: Tensor, *context: Any) -> Iterator[Tensor]:
        """Output of every block at inference, normalised where the rule normalises."""
        if not self.normalise:
            yield from super().activations(inputs)
            return
        for layer in self._hidden:
            _, _, inputs = self._run(layer, inputs, None)
            yield inputs

    @torch.no_grad()
    def diagnostics(self) -> dict[str, dict[str, float]]:
        """Angles in degrees, of networks of linear layers: F to (W_L … W_1)ᵀ, and every mirror to its W_lᵀ."""
        if not self._linear:
            return {}
        weights = [layer.weights.weight for layer in (*self._hidden, self._readout)]
        product = weights[-1]
        for weight in reversed(weights[:-1]):
            product = product @ weight
        angles = {"input": {"feedback_angle": pepita.angle(self.feedback, product.T)}}
        if self._mirrored:
            for i, (name, weight) in enumerate(zip(self.units(), weights, strict=True)):
                own = angles.setdefault(name, {})  # a block may be named "input"
                own["mirror_angle"] = pepita.angle(self.get_buffer(f"mirror{i + 1}"), weight.T)
        return angles
