"""Forward-Forward: every block learns to be loud on right data and quiet on wrong data."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms.base import Locality, ParamGroup, TaskInfo, Update
from locallearn.algorithms.layer_local import LayerLocal, feature_sizes
from locallearn.batch import Batch
from locallearn.functional import forward_forward as ff
from locallearn.losses.forward_forward import ForwardForwardLoss
from locallearn.nets.blocks import Blocks

Negatives = Literal["uniform", "hard"]
Inference = Literal["goodness", "softmax"]


class ForwardForward(LayerLocal):
    """Supervised Forward-Forward (Hinton, arXiv 2212.13345, with the settings of the Matlab code that goes with it).

    The label is written into the first ``classes`` entries of the input: the true one makes a positive sample, a wrong
    one a negative sample. Block i learns from softplus((theta-G+)/T) and softplus((G- - theta)/T), G the sum of squares of
    its output; the next block sees that output scaled to RMS 1.

    Deviations: negatives are drawn uniformly unless asked otherwise, because hard negatives come from a softmax on later
    blocks, and then what a block learns depends on the weights of blocks above it (``locallearn audit`` shows it). The
    network's own readout is not used. Inputs of more than one dimension are flattened for the label's slots only.

    Args:
        negatives: ``"uniform"``: any wrong label; ``"hard"``: drawn from the readout's softmax with the true class ruled
            out, on a pass with the neutral label.
        inference: ``"goodness"``: for every label one pass, argmax of the summed goodness; ``"softmax"``: one pass
            with the neutral label and the readout.
        threshold: theta; ``None``: the number of entries of a block's output.
        temperature: T.
        minimise: positives quiet instead of loud (min-ssq).
        peer: strength of peer normalisation, 0.03 in the Matlab code; every block must then contain an ``nn.ReLU``.
        skip_first: leave the first block out of inference and readout, as the Matlab code does; a network of one block
            keeps it.
        label_strength: value of the label's slot.
        readout_lr: learning rate of the readout; ``None``: that of the blocks.
        readout_weight_decay: weight decay of the readout; ``None``: that of the blocks.
        seed: of negatives (and of nothing else: the readout starts at zero).
    """

    def __init__(
        self,
        negatives: Negatives = "uniform",
        inference: Inference = "goodness",
        threshold: float | None = None,
        temperature: float = 1.0,
        minimise: bool = False,
        peer: float = 0.0,
        skip_first: bool = True,
        label_strength: float = 1.0,
        readout_lr: float | None = None,
        readout_weight_decay: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        if negatives not in get_args(Negatives):
            raise ValueError(f"negatives is {negatives!r}, expected 'uniform' or 'hard'")
        if inference not in get_args(Inference):
            raise ValueError(f"inference is {inference!r}, expected 'goodness' or 'softmax'")
        self.negatives = negatives
        self.inference = inference
        self.threshold = threshold
        self.temperature = temperature
        self.minimise = minimise
        self.peer = peer
        self.skip_first = skip_first
        self.label_strength = label_strength
        self.readout_lr = readout_lr
        self.readout_weight_decay = readout_weight_decay
        self.readout: nn.Linear | None = None
        self._pre_activation: Tensor | None = None
        self._neutral: Tensor | None = None

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
    def deterministic(self) -> bool:
        """Negatives are drawn anew for every batch."""
        return False

    def build(self, task: TaskInfo) -> None:
        """Give every block its loss, and the network a readout where hard negatives or one-pass inference want one."""
        if not task.classes:
            raise ValueError("Forward-Forward writes class labels into the input, and this task has none")
        if task.example.context:
            raise ValueError(
                "Forward-Forward stacks positives and negatives into one batch, which cannot be done with the context of "
                "this task (a graph?): use another algorithm"
            )
        ff.embed_neutral(task.example.inputs, task.outputs)  # refuses inputs that are too small for the label
        sizes = feature_sizes(self.blocks, task.example)
        units = [self._units(i) if self.peer > 0 else None for i in range(len(self.blocks))]
        self.local = nn.ModuleList(
            ForwardForwardLoss(self.threshold, self.temperature, self.minimise, self.peer, features)
            for features in units
        )
        if self.negatives == "hard" or self.inference == "softmax":
            self.readout = nn.Linear(sum(sizes[i] for i in self._read(len(sizes))), task.outputs, bias=False)
            nn.init.zeros_(self.readout.weight)
        if self.peer > 0:
            for i in range(len(self.blocks)):
                _last_relu(self.blocks, i).register_forward_pre_hook(self._keep_pre_activation)

    def _asleep(self) -> Container[str]:
        """The blocks that do not train now, and the mean activities of all that rest."""
        still = [i for i, block in enumerate(self.blocks) if not any(p.requires_grad for p in block.parameters())]
        names = self.blocks.names
        idle = [i for i, name in enumerate(names) if not self.trains(name)]
        return {*(f"blocks.members.{names[i]}" for i in idle), *(f"local.{i}" for i in (*still, *idle))}

    def block_groups(self, index: int) -> list[ParamGroup]:
        """Weights, and biases without weight decay, as in the Matlab code."""
        weights = [p for p in self.blocks[index].parameters() if p.ndim > 1]
        others = [p for p in self.blocks[index].parameters() if p.ndim <= 1]
        groups: list[ParamGroup] = [{"params": weights}]
        return [*groups, {"params": others, "weight_decay": 0.0}] if others else groups

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

    def prepare(self, batch: Batch) -> Batch:
        """Positives on top of negatives, ``(2N, ...)``, scaled to RMS 1."""
        labels = batch.targets
        if self.readout is not None and (self.negatives == "hard" or self.trains("readout")):
            with torch.no_grad():
                self._neutral = self._readable(self.activations(batch.inputs), len(self.blocks))
        if self.negatives == "hard":
            assert self.readout is not None
            assert self._neutral is not None
            with torch.no_grad():
                logits = self.readout(self._neutral)
            wrong = ff.wrong_labels_hard(logits, labels, self.rng(labels.device))
        else:
            wrong = ff.wrong_labels_uniform(labels, self.outputs, self.rng(labels.device))
        both = torch.cat((self._label(batch.inputs, labels), self._label(batch.inputs, wrong)))
        return Batch(ff.rms_normalise(both), labels)

    def local_loss(self, index: int, output: Tensor, batch: Batch) -> Tensor:
        """The logistic loss of the goodness of both halves."""
        positive, negative = output.chunk(2)
        pre = None
        if self._pre_activation is not None:
            pre, self._pre_activation = self._pre_activation[: len(positive)], None
        loss: Tensor = self.local[index](positive, negative, pre)
        return loss

    def emit(self, index: int, output: Tensor) -> Tensor:
        """The output scaled to RMS 1, so that the next block sees no goodness, only the pattern."""
        return ff.rms_normalise(output.detach())

    def extra_updates(self, batch: Batch, prepared: Batch) -> Iterator[Update]:
        """Train the readout on the neutral pass; no gradient enters the blocks."""
        if self.readout is not None and self.trains("readout"):
            assert self._neutral is not None
            neutral, self._neutral = self._neutral, None
            yield Update("readout", F.cross_entropy(self.readout(neutral), batch.targets))

    def predict(self, inputs: Tensor, *context: Any) -> Tensor:
        """Summed goodness of every label (negated for min-ssq), or the readout's logits, shape ``(N, C)``."""
        if self.inference == "softmax" and self.depth == len(self.blocks):
            assert self.readout is not None
            scores: Tensor = self.readout(self._readable(self.activations(inputs), len(self.blocks)))
        else:
            scores = torch.stack([self._total_goodness(inputs, label) for label in range(self.outputs)], 1)
        self._pre_activation = None  # the hook cannot tell prediction from learning, and would keep a graph alive
        return scores

    def activations(self, inputs: Tensor, *context: Any) -> Iterator[Tensor]:
        """What every block hands on in a pass with the neutral label."""
        x = ff.rms_normalise(ff.embed_neutral(inputs, self.outputs, self.label_strength))
        for i, block in enumerate(self.blocks):
            x = self.emit(i, block(x))
            yield x

    def _label(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return ff.embed_label(inputs, labels, self.outputs, self.label_strength)

    def _read(self, depth: int) -> range:
        """Blocks that inference looks at."""
        return range(1 if self.skip_first and depth > 1 else 0, depth)

    def _readable(self, activations: Iterator[Tensor], depth: int) -> Tensor:
        read = self._read(depth)
        return torch.cat([x.flatten(1) for i, x in enumerate(activations) if i in read], 1)

    def _total_goodness(self, inputs: Tensor, label: int) -> Tensor:
        labels = torch.full((len(inputs),), label, device=inputs.device)
        x = ff.rms_normalise(self._label(inputs, labels))
        total = x.new_zeros(len(x), dtype=torch.float32)
        for i in range(self.depth):
            output = self.blocks[i](x)
            if i in self._read(self.depth):
                total = total + ff.goodness(output)
            x = self.emit(i, output)
        return -total if self.minimise else total

    def _units(self, index: int) -> int:
        """Number of units that peer normalisation tells apart: width of the block's last layer."""
        _last_relu(self.blocks, index)
        widths = [
            layer.weight.shape[0] for layer in self.blocks[index].modules() if isinstance(layer, nn.Linear | nn.Conv2d)
        ]
        if not widths:
            raise ValueError(f"peer normalisation needs a linear or convolutional layer in block {index}")
        return int(widths[-1])

    def _keep_pre_activation(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled() and self.training:  # the module itself rests in a frozen block
            self._pre_activation = args[0]


def _last_relu(blocks: Blocks, index: int) -> nn.ReLU:
    relus = [module for module in blocks[index].modules() if isinstance(module, nn.ReLU)]
    if not relus or relus[-1].inplace:
        raise ValueError(
            f"peer normalisation reads what the ReLU of block {blocks.names[index]!r} reads, and that block has no nn.ReLU "
            "that leaves its input alone: add one with inplace=False, or set peer=0"
        )
    return relus[-1]
