"""Forward Projection: every layer is a ridge regression onto drawn projections of what it reads and of the labels."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from locallearn.algorithms._closed_form import ClosedFormLayers, Form
from locallearn.algorithms._grown import Grown
from locallearn.algorithms._linear_layers import LinearLayer
from locallearn.algorithms.base import TaskInfo, choices
from locallearn.algorithms.dry_run import feature_sizes, unlike_classes
from locallearn.functional import forward_projection as equations
from locallearn.functional.ridge import check_penalty
from locallearn.nets.activations import Mod2, Square

Target = Literal["projection", "label", "noisy_label", "random"]


class _Draws(Grown):
    """Q and U of the layer that is fitted now."""

    q: Tensor
    u: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "u"):
            self.register_buffer(name, torch.zeros(0))


class ForwardProjection(ClosedFormLayers):
    """Forward Projection (O'Shea and Rajendran, arXiv 2501.16476): labels travel forward, and nothing comes back.

    A hidden layer that reads X is fitted onto Z = sign(XQ) + sign(YU) + shift, with Q and U drawn N(0, 1) and Y the one-hot
    labels, by ridge regression, W = (XᵀX + λI)⁻¹XᵀZ; the next layer reads what its activation makes of XW. The network's last
    layer is fitted onto 2Y − 1. Every layer takes one pass over the data, in which sums are gathered in float64; passes come
    one after the other, whatever the schedule. Of a convolution rows are patches, every one of them with its image's label, of
    a layer over tokens they are tokens. A bias is the weight of a column of ones, penalised like the others, as in the paper.

    All linear and convolutional layers are fitted, in the order in which the network runs them; one whose weights are frozen
    when the rule is attached stays as it is, and so does every other parameter (normalisations, positions, tokens).

    Deviations: the public code inverts XᵀX in single precision and goes on with W = XᵀZ, silently, where that fails; here a
    singular problem is refused. Its readout of maps that are not averaged has a column of ones for every place, here one.

    Args:
        target: ``projection``; the paper's controls: ``label`` (sign(XQ) left out), ``noisy_label`` (signs of noise in its
            place, drawn anew for every row), ``random`` (hidden layers are drawn and not fitted).
        lambda_: λ of hidden layers, of a sum over rows. 10 in the paper's experiments.
        readout_lambda: λ of the readout.
        shift: of the targets of hidden layers; ``None``: .5 where a ``Mod2`` or ``Square`` follows the layer, else 0.
        form: ``sums``, or ``rows``: keep what layers read, for fewer rows than features.
        positions: patches or tokens that are taken of every sample, at random; ``None``: all.
        rows: patches that are worked with at a time.
        memory_gib: most that the sums of one layer may take.
        seed: of Q and U of all layers, see :meth:`draws`.

    Raises:
        ValueError: an unknown choice or a number out of range; when attached, a task without classes, a graph, a readout that
            is not linear, a convolution in groups, or sums that take too much memory.
    """

    def __init__(
        self,
        target: Target = "projection",
        lambda_: float = 10.0,
        readout_lambda: float = 1.0,
        shift: float | None = None,
        form: Form = "sums",
        positions: int | None = None,
        rows: int = 16384,
        memory_gib: float = 8.0,
        seed: int = 0,
    ) -> None:
        super().__init__(seed, form, positions, rows, memory_gib)
        if target not in get_args(Target):
            raise ValueError(f"target is {target!r}, expected one of {', '.join(get_args(Target))}")
        check_penalty(lambda_, "lambda_")
        check_penalty(readout_lambda, "readout_lambda")
        if not -(2**47) <= seed < 2**47:
            raise ValueError(f"seed is {seed}, expected a number of at most 47 bits: every layer's own is made from it")
        self.target: Target = target
        self.lambda_ = lambda_
        self.readout_lambda = readout_lambda
        self.shift = shift

    @property
    def variant(self) -> str | None:
        """Which control it is."""
        return choices(self, ForwardProjection.__init__, "target")

    def build(self, task: TaskInfo) -> None:
        """Find the layers, and freeze the network."""
        if not task.classes:
            raise ValueError(
                "ForwardProjection projects class labels to every layer, and this task has none: use ridge"
            )
        feature_sizes(self.blocks, task.example)  # every row of a layer's input has its sample's label
        super().build(task)
        if self.layers[-1].width < task.outputs:
            raise unlike_classes(self.layers[-1].width, task.outputs)
        *hidden, readout = self.layers
        learns = [layer for layer in hidden if layer.module.weight.requires_grad]
        if not readout.module.weight.requires_grad:
            raise ValueError("the weights of the readout are frozen, and ForwardProjection solves for them: thaw them")
        self._hidden = [] if self.target == "random" else learns
        self._check_memory([*self._hidden, readout])
        self.projections = _Draws()
        if self.target == "random":
            for layer in learns:
                bias = layer.module.bias is not None
                generator = self._generator(layer)
                drawn = equations.random_weights(layer.features + bias, layer.width, generator)
                layer.write(drawn[: layer.features], drawn[-1])
        self.blocks.requires_grad_(False)

    @property
    def passes(self) -> int:
        """One for every layer."""
        return len(self._hidden) + 1

    def _layer(self, number: int) -> LinearLayer:
        return self._hidden[number] if number < len(self._hidden) else self.layers[-1]

    def _generator(self, layer: LinearLayer) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed << 16) + self.layers.index(layer))

    def draws(self, layer: LinearLayer) -> tuple[Tensor, Tensor]:
        """Q, shape ``(D, width)``, with one row more for a bias, and U, shape ``(C, width)``: N(0, 1), float32.

        Drawn on the CPU from PyTorch's generator with the seed ``(seed << 16) + i``, i the layer's place in :attr:`layers`.
        While the layer is fitted they are in the state dict; afterwards nobody needs them.
        """
        features = layer.features + (layer.module.bias is not None)
        return equations.projections(features, layer.width, self.outputs, self._generator(layer))

    def _take(self, number: int, rows: Tensor, targets: Tensor) -> None:
        if number == len(self._hidden):
            self.sums.gather(rows, (2 * targets - 1).to(rows.dtype))
            return
        layer, held = self._layer(number), self.projections
        if not held.q.numel():
            held.q, held.u = (drawn.to(rows) for drawn in self.draws(layer))
        shape = len(rows), layer.width
        if self.target == "projection":
            projected = equations.project(rows, held.q.to(rows.dtype))
        elif self.target == "label":
            projected = rows.new_zeros(shape)
        else:
            projected = torch.randn(shape, generator=self.rng(rows.device), device=rows.device, dtype=rows.dtype)
        self.sums.gather(rows, equations.target(projected, targets, held.u.to(rows.dtype), self._shift(layer)))

    def _shift(self, layer: LinearLayer) -> float:
        if self.shift is not None:
            return self.shift
        return 0.5 if any(isinstance(module, Mod2 | Square) for module in layer.after) else 0.0

    def _conclude(self, number: int) -> None:
        hidden = number < len(self._hidden)
        penalty, name = (self.lambda_, "lambda_") if hidden else (self.readout_lambda, "readout_lambda")
        self._solve(self._layer(number), penalty, "penalised", name)
        self.sums.forget()
        self.projections.q, self.projections.u = (b.new_zeros(0) for b in self.projections.buffers())
