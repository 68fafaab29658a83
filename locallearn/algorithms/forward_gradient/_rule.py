"""The rule: one loss for the whole network, differentiated in forward mode along directions drawn for every batch."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from locallearn.algorithms.base import ByOptions, Locality, ParamGroup, TaskInfo, Update, choices, output_layer
from locallearn.algorithms.dry_run import dry_run
from locallearn.algorithms.forward_gradient._activities import Activities
from locallearn.algorithms.forward_gradient._weights import Weights
from locallearn.batch import Batch
from locallearn.functional.forward_gradient import Combine, Noise, relative_error
from locallearn.nets.blocks import Blocks, fitted, rest
from locallearn.nets.heads import Pooled
from locallearn.nets.trace import preserved

Perturb = Literal["weights", "activities"]
Losses = Literal["global", "local"]


class ForwardGradient(ByOptions):
    """Learn from the loss's derivative along random directions: one forward pass that carries tangents, no backward pass.

    ``perturb=weights`` (Baydin et al. 2022, arXiv 2202.08587): a direction v for all weights, the derivative c = ∂L/∂v of the
    batch's loss, ĝ = c v. ``perturb=activities`` (Ren et al. 2023, arXiv 2210.03310, FG-A): a direction u for what every linear
    or convolutional layer puts out, a derivative c_n for every sample, and of a layer with inputs x the gradient
    mean_n c_n u_n x_nᵀ. Several directions are averaged, or g is projected on what they span.

    Noise does not vanish with a small step: the rate has to be about P times smaller than backpropagation's, P the number of
    what is perturbed. Statistics of normalisation move once per batch, and all directions see the same dropout masks.

    ``losses="local"`` makes an object of the subclass
    :class:`~locallearn.algorithms.forward_gradient._local.LocalForwardGradient`: every block has losses of its own.

    Deviations: Baydin et al. draw for each layer, here one call draws for all weights, which is faster. Ren et al. put no noise
    where a ReLU is off, which under one global loss is done where ``mask=True`` asks for it.

    Args:
        seed: of the directions.
        perturb: ``weights`` or ``activities``.
        noise: ``gaussian``, ``rademacher`` (signs) or ``sphere``; ``activities`` have the first two.
        tangents: K, directions per batch.
        combine: ``mean``, or ``projection`` on what the directions span (``weights`` only).
        chunk: directions that pass at once; ``null`` all. Fewer need less memory and more time; the result is the same up to
            rounding. With 1 no operation has to take several at once.
        losses: ``global``: the task's, of the whole network; ``local``: of every block, and under ``activities`` of every patch
            and every group of channels.
        groups: of channels under ``losses="local"``; ``None``: those that a block of the network has, and 1 where it has none.
        mask: ``activities`` only: no noise where the ReLU (an ``nn.ReLU``) that reads it is off, which leaves the mean and
            lowers the variance; ``None``: under ``losses="local"``.
        guess: ``None``; or ``random``, ``local``, ``ntk``, ``fixed-ntk``: every block guesses its gradient, another rule,
            :class:`~locallearn.algorithms.forward_gradient._guided.GuidedForwardGradient`. ``local``: the gradient of a head
            that learns with the block; ``ntk``: of one drawn anew for every batch; ``fixed-ntk``: of one drawn once.
        target: of a guess: the task's loss (``global``), that of the block's own head (``local``), or that of the next block's
            (``next``; of the last block's output the task's).
        simulated: find the target by backpropagation and project it on the guess, which is no forward gradient.
        head: of a block beside a guess: ``linear``, ``mlp`` or ``cnn`` (:class:`~locallearn.nets.heads.PooledHead`).
        head_width: of its hidden layers; ``None``: 1024 for ``mlp``, 32 for ``cnn``.
        head_norm: whether it has BatchNorms.

    Raises:
        ValueError: a setting that does not exist; when attached, an operation that has no forward-mode derivative, or that
            does not take several directions, more directions than weights under ``projection``, and under ``activities``
            weights that are not only those of linear and convolutional layers, anything through which samples see one
            another (BatchNorm, graphs), and a loss that is no plain mean over samples.
    """

    def __init__(
        self,
        seed: int = 0,
        perturb: Perturb = "weights",
        noise: Noise = "gaussian",
        tangents: int = 1,
        combine: Combine = "mean",
        chunk: int | None = None,
        losses: Losses = "global",
        groups: int | None = None,
        mask: bool | None = None,
        *,
        guess: str | None = None,
        target: str = "global",
        simulated: bool = False,
        head: Pooled = "linear",
        head_width: int | None = None,
        head_norm: bool = True,
    ) -> None:
        super().__init__(seed)
        for name, value, kind in (
            ("perturb", perturb, Perturb),
            ("noise", noise, Noise),
            ("combine", combine, Combine),
            ("losses", losses, Losses),
        ):
            if value not in get_args(kind):
                raise ValueError(f"{name} is {value!r}, expected {', '.join(get_args(kind))}")
        for name, number in (("tangents", tangents), ("chunk", chunk), ("groups", groups)):
            if number is not None and (type(number) is not int or number < 1):
                raise ValueError(f"{name} is {number!r}, expected a whole number of at least 1")
        if perturb == "activities" and combine != "mean":
            raise ValueError(
                "perturb=activities has a derivative for every sample, and only combine=mean: leave combine out"
            )
        if perturb == "activities" and noise == "sphere":
            raise ValueError("perturb=activities draws entry by entry: noise is gaussian or rademacher there")
        if perturb == "activities" and chunk not in (None, 1):
            raise ValueError("perturb=activities passes its directions one by one: leave chunk out")
        if groups is not None and (losses == "global" or perturb == "weights"):
            raise ValueError(
                f"groups is {groups}, and only losses=local with perturb=activities has a loss for every group: leave it out"
            )
        if guess is not None and losses == "local":
            raise ValueError(
                f"guess is {guess} and losses is local, which are two rules: guesses have their own local losses (target=local)"
            )
        if mask is not None and type(mask) is not bool:
            raise ValueError(f"mask is {mask!r}, expected true, false or null")
        for name, switch in (("simulated", simulated), ("head_norm", head_norm)):
            if type(switch) is not bool:
                raise ValueError(f"{name} is {switch!r}, expected true or false")
        if mask is not None and guess is not None:
            raise ValueError(f"mask is of noise in front of ReLUs, and guess={guess} puts none there: leave mask out")
        if mask is not None and perturb == "weights":
            raise ValueError("mask is of noise in activities: leave it out under perturb=weights")
        self.perturb: Perturb = perturb
        self.noise: Noise = noise
        self.tangents = tangents
        self.combine: Combine = combine
        self.chunk = chunk
        self.losses: Losses = losses
        self.groups = groups
        self.mask = mask
        self.guess, self.target, self.simulated = guess, target, simulated
        self.head, self.head_width, self.head_norm = head, head_width, head_norm
        if guess is None and (target, simulated, head, head_width, head_norm) != (
            "global",
            False,
            "linear",
            None,
            True,
        ):
            raise ValueError(
                f"target={target}, simulated={str(simulated).lower()} and settings of heads belong to a guess, and guess is "
                "null: set guess=random, local or ntk, or leave them out"
            )

    @staticmethod
    def _kind(asked: Mapping[str, Any]) -> type[ForwardGradient]:
        """The class for these options; what does not go together, it refuses itself."""
        # Imported here, because they are kinds of this class.
        if asked.get("guess") is not None:
            from locallearn.algorithms.forward_gradient._guided import GuidedForwardGradient

            return GuidedForwardGradient
        if asked.get("losses") == "local":
            from locallearn.algorithms.forward_gradient._local import LocalForwardGradient

            return LocalForwardGradient
        return ForwardGradient

    @property
    def locality(self) -> Locality:
        """Forward-only: no backward pass at all."""
        return Locality.FORWARD_ONLY

    @property
    def carries(self) -> bool:
        """Whatever crosses the borders: the network runs as a whole."""
        return True

    @property
    def broadcast(self) -> str:
        """One number per direction, or one per direction and sample."""
        return "the loss's derivative along a random direction" + (
            " of every sample" if self.perturb == "activities" else ""
        )

    @property
    def variant(self) -> str | None:
        """What is perturbed, and how often."""
        return choices(
            self, ForwardGradient.__init__, "perturb", "noise", "tangents", "combine", "losses", "groups", "mask"
        )

    @property
    def estimates_along(self) -> str | None:
        """K."""
        return "tangents"

    def expected_error(self, size: int) -> float | None:
        """See :func:`~locallearn.functional.forward_gradient.relative_error`; of activities there is no such sentence."""
        return None if self.perturb == "activities" else relative_error(size, self.tangents, self.noise, self.combine)

    def build(self, task: TaskInfo) -> None:
        """Add nothing; one step is tried, so that what has no forward-mode derivative is told before training."""
        dry_run(self.blocks, task.example, task)  # refuses a network that cannot take the data
        output_layer(self.blocks, "ForwardGradient")
        self._make(task)
        with _told(self.blocks), self._practice(len(task.example.inputs) > 1):
            inputs = fitted(self.blocks, task.example.inputs)
            move = partial(torch.utils._pytree.tree_map_only, Tensor, lambda value: value.to(inputs.device))
            targets = task.example.targets if task.example.rows is not None else task.example.targets[: len(inputs)]
            example = task.example._replace(inputs=inputs, targets=move(targets), context=move(task.example.context))
            with torch.no_grad(), plain_attention():
                self._try_out(example, torch.Generator(inputs.device).manual_seed(0))

    def _make(self, task: TaskInfo) -> None:
        self._way: Weights | Activities
        if self.perturb == "weights":
            self._way = Weights(self.blocks, task.loss, self.noise, self.tangents, self.combine, self.chunk)
        else:
            self._way = Activities(self.blocks, task.loss, self.noise, self.tangents, bool(self.mask))

    def _try_out(self, example: Batch, generator: torch.Generator) -> None:
        self._way.try_out(example, generator)

    @contextmanager
    def _practice(self, as_in_training: bool) -> Iterator[None]:
        """A step that leaves no trace. Normalisation cannot train on a single sample."""
        with preserved(self.blocks):
            if as_in_training:  # attach() puts everybody back into the mode that it found
                self.blocks.train()
                rest(self.blocks, frozenset(), (), ())
            yield

    def units(self) -> dict[str, list[ParamGroup]]:
        """One unit: the network."""
        return {"network": [{"params": list(self.blocks.parameters())}]}

    def updates(self, batch: Batch) -> Iterator[Update]:
        """Estimated gradients of all weights; the loss is reported."""
        loss, gradients, kept = self._step(batch, self.rng(batch.inputs.device))
        yield Update("network", loss, gradients)
        del kept  # until here, so that it is counted

    def _step(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[nn.Parameter, Tensor], Any]:
        with torch.no_grad(), plain_attention():
            return self._way.step(batch, generator)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Fused attention has no forward-mode derivative; the plain one has, and is the same up to rounding."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _told(blocks: Blocks) -> Iterator[None]:
    """Say in one sentence which operation of which block has no forward-mode derivative."""
    running: list[str] = []  # modules, the innermost last; one that fails is never left

    def enter(name: str, *_: Any) -> None:
        running.append(name)

    def leave(*_: Any) -> None:
        running.pop()

    parts = [*blocks.members.items(), *([] if blocks.readout is None else [("readout", blocks.readout)])]
    hooks = []
    for name, block in parts:
        for path, module in block.named_modules():
            told = f"block {name!r}" + (f" by {path!r} ({type(module).__name__})" if path else "")
            hooks.append(module.register_forward_pre_hook(partial(enter, told)))
            hooks.append(module.register_forward_hook(leave))
    try:
        with warnings.catch_warnings():  # of PyTorch's own, which loads derivatives written in what it calls deprecated
            warnings.filterwarnings("ignore", message=".*torch.jit.script.*deprecated", category=FutureWarning)
            yield
    except (NotImplementedError, RuntimeError) as error:
        text = " ".join(str(error).split())
        found = re.search(
            r"Trying to use forward AD with (\S+) that does not support it|forward.{0,40} for (\S+)", text
        )
        if re.search("atching rule|vmap: |tried to vmap", text):
            raise ValueError(
                f"several directions cannot pass at once through an operation of this network in PyTorch ({text[:160]}): set "
                "chunk=1, and they pass one by one"
            ) from error
        if "forward AD" not in text and "jvp" not in text and "forward mode" not in text.lower():
            raise
        name = (next((group for group in found.groups() if group), None) if found else None) or "one of these"
        where = f", and is run in {running[-1]}" if running else ""
        instead = (
            "put operations in its place that have one (sums of products for distances, plain attention for fused attention, "
            "your autograd.Function with a jvp), or use another rule"
        )
        if re.search("rnn|lstm|gru", name):
            instead = (
                "on a CPU, attach and train within torch.backends.mkldnn.flags(enabled=False), which runs plain operations in "
                "its place; else write the recurrence with nn.Linear, or use another rule (zeroth_order, mono_forward)"
            )
        raise ValueError(
            f"forward gradients need the forward-mode derivative of every operation, and {name} has none in "
            f"PyTorch{where} ({text[:160]}): {instead}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
