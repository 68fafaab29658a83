"""Guessed directions: every block guesses what its gradient is, and a loss above it says how much of the guess is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Generator, Tensor, nn

from locallearn.algorithms.base import Locality, ParamGroup, TaskInfo, Update, choices, output_layer, refuse_dense
from locallearn.algorithms.dry_run import feature_sizes
from locallearn.algorithms.forward_gradient._guesses import Call, Guesses, OnOutputs, OnWeights, learning
from locallearn.algorithms.forward_gradient._passes import Draws, refuse_no_mean
from locallearn.algorithms.forward_gradient._rule import ForwardGradient, _told, plain_attention
from locallearn.algorithms.forward_gradient._targets import Chain, slopes_at_output, slopes_at_weights
from locallearn.batch import Batch
from locallearn.functional.forward_gradient import guess_slopes
from locallearn.nets.blocks import fitted
from locallearn.nets.heads import Pooled, PooledHead
from locallearn.nets.trace import preserved
from locallearn.nets.units import sample_shapes

Guessed = Literal["random", "local", "ntk", "fixed-ntk"]
Target = Literal["global", "local", "next"]


class _Taught(NamedTuple):
    """What a block has of heads of its own.

    Attributes:
        loss: of its head; ``None`` where none learns.
        own: gradient of that loss at the block's output.
        guess: gradient at the block's output that is the guess; ``None`` where the guess is random.
        gradients: of the head's weights.
    """

    loss: Tensor | None
    own: Tensor | None
    guess: Tensor | None
    gradients: dict[nn.Parameter, Tensor]


class _Run(NamedTuple):
    """A block that has run, with its graph, on an input that ends the graph."""

    inputs: Tensor
    output: Tensor
    calls: list[Call]


class GuidedForwardGradient(ForwardGradient):
    """Forward gradients along guesses (Fournier et al. 2023, arXiv 2306.06968). Made by ``ForwardGradient(guess=...)``.

    Every block but the last one has a guess G̃_n of its gradient for every sample n, and moves by the part of it that a target
    G_n has: Ĝ_n = ⟨G_n, G̃_n⟩ / (‖G̃_n‖² + ε) · G̃_n, summed over samples. Under ``perturb=weights`` these are gradients of every
    weight tensor by itself, under ``perturb=activities`` one at the block's output, and the gradient inside of the block is
    exact. A random guess is drawn for every sample anew; at outputs it is not divided by its square, so that the estimate is
    unbiased, of weights it is, as in the paper's code. The last block learns with the readout by its exact gradient, and heads
    by that of their own loss on the block's detached output.

    Honest (the default): blocks learn one after the other. ⟨G_n, G̃_n⟩ of a target above the block is the derivative of the
    samples' losses along the guess, one forward pass from the block on that carries tangents; no gradient crosses a border.
    Under ``perturb=weights`` guesses move a weight by another amount for every sample, which enters as the movement of what the
    weight's layer puts out; a pass carries one direction for every tensor of the block. The local target is a gradient inside
    of the block itself and needs no pass.

    ``simulated``: the target's gradient is found by backpropagation, and projected on the guess. It is the same up to rounding,
    works where samples see one another (BatchNorm; G_n is then what sample n's activations contribute to the gradient of the
    mean loss, as in the paper's code), and what it costs says nothing about the rule.

    Deviations from the paper's code: biases get the estimate of their own gradients (there those of weights are overwritten by
    them); heads of a local target learn under random guesses, too; the next block's target is that of the next block for all
    blocks; the local target beside an ``ntk`` guess is that of a head that learns.

    Args:
        args: those of :class:`ForwardGradient`.
        options: the same; ``tangents``, ``combine``, ``mask`` and, without random guesses, ``noise`` mean nothing here.

    Raises:
        ValueError: a setting that does not exist or means nothing beside the others; when attached, a network of one block,
            a graph, a task without classes where heads are needed, a weight of an unknown layer under ``perturb=weights``, and
            where honest, samples that see one another on the way to the target, and a loss that is no mean over samples.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for name, value, kind in (
            ("guess", self.guess, Guessed),
            ("target", self.target, Target),
            ("head", self.head, Pooled),
        ):
            if value not in get_args(kind):
                raise ValueError(f"{name} is {value!r}, expected {', '.join(get_args(kind))}")
        if self.tangents != 1 or self.combine != "mean":
            raise ValueError(
                f"tangents={self.tangents}, combine={self.combine} are of directions drawn for the whole network, and "
                f"guess={self.guess} has one guess for every sample: leave them out"
            )
        if self.noise != "gaussian" and self.guess != "random":
            raise ValueError(f"noise={self.noise} is of random guesses, and guess is {self.guess!r}: leave it out")
        if not self._headed and (self.head, self.head_width) != ("linear", None):
            raise ValueError("guess=random with target=global has no heads: leave head and head_width out")
        if self.head_width is not None and self.head == "linear":
            raise ValueError(
                f"head_width={self.head_width} is of hidden layers, and head=linear has none: leave it out"
            )
        if self.head_width is not None and (type(self.head_width) is not int or self.head_width < 1):
            raise ValueError(f"head_width is {self.head_width!r}, expected a whole number of at least 1")
        if self.simulated and self.chunk is not None:
            raise ValueError("chunk is of passes that carry tangents, and simulated=true has none: leave it out")
        if self.target == "local" and self.chunk is not None:
            raise ValueError("chunk is of passes that carry tangents, and target=local needs none: leave it out")
        self._compared = False
        self._space: OnOutputs | OnWeights = OnWeights() if self.perturb == "weights" else OnOutputs()

    # -- claims -------------------------------------------------------------------------------------------------------
    @property
    def estimates_along(self) -> str | None:
        """Of a guess there is none to choose."""
        return None

    @property
    def locality(self) -> Locality:
        """Layer-local with local targets; else coupled for honest random guesses, and global for all others.

        No gradient crosses a border in an honest step, one number per sample (and weight tensor) comes back. But how a block's
        step changes with later weights is then, with a guess that comes from a head, what an error at the output of a later
        block that is as wide could have made of it: only where blocks become narrower can that be told apart, and the audit
        then says coupled.
        """
        if self.target == "local":
            return Locality.LAYER_LOCAL
        return Locality.COUPLED if self.guess == "random" and not self.simulated else Locality.GLOBAL

    @property
    def carries(self) -> bool:
        """Blocks hand over one tensor, in which samples are rows."""
        return False

    @property
    def broadcast(self) -> str:
        """Labels, and of every sample numbers, or where simulated the error."""
        if self.target == "local":
            return "labels"
        whose = "the loss" if self.target == "global" else "the next block's loss"
        if self.simulated:
            return f"the gradient of {whose}, of which a projection on the guess is used (simulated)"
        return f"labels; the derivative of {whose} along a guess, of every sample" + (
            " and weight tensor" if self.perturb == "weights" else ""
        )

    @property
    def untimed(self) -> str | None:
        """Backpropagation does what passes with tangents would do."""
        if not self.simulated:
            return None
        return (
            "simulated=true finds the target by backpropagation and projects it, so its seconds, operations, bytes and joules "
            "are not those of forward gradients"
        )

    @property
    def variant(self) -> str | None:
        """Space, guess and target, and before all that it is simulated."""
        heads = (
            ("head", "head_width", "head_norm") if self._headed else ()
        )  # a table's settings may hold where there are none
        names = ("simulated", "perturb", "noise", "guess", *heads, "target")
        told = choices(self, ForwardGradient.__init__, *names)
        return f"{told}, target=global" if self.target == "global" else told  # the default is a choice, too

    # -- what is built ------------------------------------------------------------------------------------------------
    @property
    def _headed(self) -> bool:
        """Whether any block has a head beside it."""
        return self.guess != "random" or self.target != "global"

    def _learned_head(self, index: int) -> bool:
        """Whether block ``index`` has a head that learns."""
        return self.guess == "local" or self.target == "local" or (self.target == "next" and index > 0)

    def build(self, task: TaskInfo) -> None:
        """Give blocks their heads; a step is tried on a copy of what it moves."""
        feature_sizes(self.blocks, task.example)  # refuses a network that cannot take the data
        output_layer(self.blocks, "ForwardGradient")
        if task.example.context or task.example.rows is not None:
            raise ValueError(
                "guesses are made for every sample by itself, and nodes of a graph see one another: leave guess out"
            )
        if len(self.blocks) < 2:
            raise ValueError(
                f"the last block learns by its exact gradient, and this network is one block, {self.blocks.names[0]!r}: cut it"
            )
        if self._headed:
            if not task.classes:
                raise ValueError("the heads of guesses tell classes apart, and this task has none: leave guess out")
            refuse_dense(task, "the heads of guesses")
        self._space.check(self.blocks)
        self._loss = task.loss
        inputs = fitted(self.blocks, task.example.inputs)
        shapes, _ = sample_shapes(self.blocks, inputs, task.example.context)
        with torch.no_grad():
            self._outputs = self.blocks(inputs).shape[1:]
        names = self.blocks.names[:-1]
        self._made = [
            self._maker(name, shape, task.outputs) for name, shape in zip(names, shapes, strict=False) if self._headed
        ]
        learned = [i for i in range(len(self._made)) if self._learned_head(i)]
        self.heads = nn.ModuleDict({str(i): self._made[i]() for i in learned})
        self.guess_heads = nn.ModuleList(make() for make in self._made if self.guess in ("ntk", "fixed-ntk"))
        self.guess_heads.requires_grad_(False)
        targets = task.example.targets[: len(inputs)].to(inputs.device)
        self._attempt(Batch(inputs, targets))

    def _maker(self, name: str, shape: tuple[int, ...], outputs: int) -> Callable[[], nn.Module]:
        """Makes the head of a block.

        Raises:
            ValueError: it cannot read what the block gives.
        """
        make = partial(PooledHead, self.head, shape, outputs, self.head_width, self.head_norm)
        try:
            make()
        except ValueError as error:
            raise ValueError(f"block {name!r}: {error}; use another head") from None
        return make

    def _held(self) -> Container[int]:
        """Heads that only guess normalise over the batch, although they never learn."""
        return {id(p) for p in self.guess_heads.parameters()}

    def units(self) -> dict[str, list[ParamGroup]]:
        """One unit per block, with its head or the readout."""
        beside = {**self.heads, str(len(self.blocks) - 1): output_layer(self.blocks, "ForwardGradient")}
        return {
            name: [
                {"params": [p for part in (block, beside.get(str(i))) if part is not None for p in part.parameters()]}
            ]
            for i, (name, block) in enumerate(zip(self.blocks.names, self.blocks, strict=True))
        }

    # -- one batch ----------------------------------------------------------------------------------------------------
    def updates(self, batch: Batch) -> Iterator[Update]:
        """Estimates for the blocks, from the first to the last one, whose gradient is exact."""
        generator = self.rng(batch.inputs.device)
        yield from self._projected(batch, generator) if self.simulated else self._honest(batch, generator)

    def _honest(self, batch: Batch, generator: Generator) -> Iterator[Update]:
        """One block after the other; the graph of one is gone before the next one runs."""
        self._check(batch)
        self._redraw(generator)
        x, last = batch.inputs, len(self.blocks) - 1
        learn = self._learn_at_weights if self.perturb == "weights" else self._learn_at_output
        for index, name in enumerate(self.blocks.names[:last]):
            loss, gradients, x = learn(index, x, batch, generator)
            yield Update(name, loss, gradients)
            del gradients

        def lost() -> Tensor:
            return self._loss(self._above(last)(self.blocks[last](x)), batch.targets)

        yield Update(self.blocks.names[last], lost(), again=lost)

    def _learn_at_output(
        self, index: int, x: Tensor, batch: Batch, generator: Generator
    ) -> tuple[Tensor | None, dict[nn.Parameter, Tensor], Tensor]:
        """Loss, gradients and output of a block, which runs twice: so its graph does not lie beside the target's pass."""
        block, before, after = self.blocks[index], Draws(x.device), Draws(x.device)
        before.again()
        with torch.no_grad():
            output = Chain([block]).still(x)
        after.again()
        taught, learns = self._teach(index, output, batch), bool(learning(block))
        loss, gradients = taught.loss, dict(taught.gradients)
        guesses, slopes = Guesses(), list[Tensor]()
        if learns:
            guesses = self._guesses(index, output, [], taught, generator, False)
            if self.target == "local":
                slopes = self._known(self._space.at([], output, _there(taught.own), False), guesses)
            else:
                with torch.no_grad(), plain_attention():
                    losses, slopes = slopes_at_output(self._above(index), self._loss, output, guesses, batch.targets)
                loss = losses.sum() if loss is None else loss
        before.again()
        with torch.set_grad_enabled(learns):
            again = block(x)  # moves what a pass moves
        if learns:
            gradients |= self._space.estimate(block, again, guesses, slopes, self._divided, False)
        return loss, gradients, output

    def _learn_at_weights(
        self, index: int, x: Tensor, batch: Batch, generator: Generator
    ) -> tuple[Tensor | None, dict[nn.Parameter, Tensor], Tensor]:
        """Loss, gradients and output of a block, whose graph is gone when the target's pass runs."""
        block, before, after = self.blocks[index], Draws(x.device), Draws(x.device)
        learns = bool(learning(block))
        before.again()
        with torch.set_grad_enabled(learns and (self.guess != "random" or self.target == "local")):
            graph, calls = self._space.run(block, x)
        after.again()
        output = graph.detach()
        taught = self._teach(index, output, batch)
        loss, gradients = taught.loss, dict(taught.gradients)
        if learns:
            both = self.target == "local" and self.guess != "random"
            guesses = self._guesses(index, graph, calls, taught, generator, both)
            if self.target == "local":
                slopes = self._known(self._space.at(calls, graph, _there(taught.own), False), guesses)
            else:
                calls = [call._replace(output=call.output.detach()) for call in calls]
                del graph
                before.again()
                with torch.no_grad(), plain_attention():
                    losses, slopes = slopes_at_weights(
                        block, self._above(index), self._loss, x, calls, guesses, batch.targets, self.chunk
                    )
                loss = losses.sum() if loss is None and losses is not None else loss
                after.again()
            gradients |= self._space.estimate(block, output, guesses, slopes, self._divided, False)
        return loss, gradients, output

    def _projected(self, batch: Batch, generator: Generator) -> Iterator[Update]:
        """The same by backpropagation: gradients of the target, projected on the guesses."""
        self._redraw(generator)
        runs, taught, guesses = list[_Run](), list[_Taught](), list[Guesses]()
        x, last = batch.inputs, len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            inputs = x.detach().requires_grad_(index > 0)
            x, calls = (block(inputs), []) if index == last else self._space.run(block, inputs)
            runs.append(_Run(inputs, x, calls))
            if index < last:
                taught.append(self._teach(index, x.detach(), batch))
                draws = bool(learning(block))
                guesses.append(self._guesses(index, x, calls, taught[-1], generator, True) if draws else [])
        loss = self._loss(self._above(last)(x), batch.targets)
        weights = learning(self.blocks[last]) + learning(output_layer(self.blocks, "ForwardGradient"))
        coming, *found = torch.autograd.grad(loss, [runs[last].inputs, *weights], allow_unused=True)
        gradients = [dict(each.gradients) for each in taught]
        gradients.append({p: made for p, made in zip(weights, found, strict=True) if made is not None})
        for index in reversed(range(last)):
            block, run, own = self.blocks[index], runs.pop(index), taught[index].own
            below = index > 0 and self.target != "local"  # something there waits for this block's gradient
            if learning(block):
                target = self._space.at(run.calls, run.output, _there(own if self.target == "local" else coming), True)
                slopes = self._known(target, guesses[index])
                gradients[index] |= self._space.estimate(
                    block, run.output, guesses[index], slopes, self._divided, below
                )
            if below:
                [coming] = torch.autograd.grad(
                    run.output, [run.inputs], _there(own if self.target == "next" else coming)
                )
        loss = loss.detach()
        losses = [*(loss if each.loss is None else each.loss for each in taught), loss]
        del runs, run, x, taught, guesses
        for index, name in enumerate(self.blocks.names):
            yield Update(name, losses[index], gradients[index])
            gradients[index] = {}

    # -- parts of it --------------------------------------------------------------------------------------------------
    @property
    def _divided(self) -> bool:
        return self.guess != "random" or self._space.divides_random

    def _above(self, index: int) -> Chain:
        """From a block's output to the scores of its target."""
        last = len(self.blocks) - 1
        if self.target == "next" and index + 1 < last:
            return Chain([self.blocks[index + 1], self.heads[str(index + 1)]])
        return Chain([*list(self.blocks)[index + 1 :], output_layer(self.blocks, "ForwardGradient")])

    def _teach(self, index: int, output: Tensor, batch: Batch) -> _Taught:
        """Exact gradients of the head's own loss, at the head's weights and at the block's output."""
        output = output.detach().requires_grad_()
        loss: Tensor | None = None
        own: Tensor | None = None
        guess: Tensor | None = None
        gradients: dict[nn.Parameter, Tensor] = {}
        if str(index) in self.heads:
            head = self.heads[str(index)]
            weights = learning(head)
            loss = self._loss(head(output), batch.targets)
            own, *found = torch.autograd.grad(loss, [output, *weights])
            loss, gradients = loss.detach(), dict(zip(weights, found, strict=True))
        if self.guess == "local":
            guess = own
        elif self.guess != "random":
            [guess] = torch.autograd.grad(self._loss(self.guess_heads[index](output), batch.targets), [output])
        return _Taught(loss, own, guess, gradients)

    def _guesses(
        self, index: int, output: Tensor, calls: list[Call], taught: _Taught, generator: Generator, keep: bool
    ) -> Guesses:
        if taught.guess is None:
            return self._space.draw(self.blocks[index], output, self.noise, generator)
        return self._space.at(calls, output, taught.guess, keep)

    @staticmethod
    def _known(targets: Guesses, guesses: Guesses) -> list[Tensor]:
        """⟨G_n, G̃_n⟩ where the target is known; a weight that it does not reach has zeros."""
        by_weight = {id(target.weight): target.values for target in targets}
        return [guess_slopes(by_weight.get(id(weight), torch.zeros_like(values)), values) for weight, values in guesses]

    def _redraw(self, generator: Generator) -> None:
        """New weights for heads that only guess, as a new head would have them."""
        if self.guess != "ntk":
            return
        seeds = torch.randint(2**62, (len(self._made),), generator=generator, device=generator.device).tolist()
        with torch.random.fork_rng(devices=[]):
            for head, make, seed in zip(self.guess_heads, self._made, seeds, strict=True):
                torch.default_generator.manual_seed(seed)
                head.load_state_dict(make().state_dict())

    # -- what is refused ----------------------------------------------------------------------------------------------
    def _check(self, batch: Batch) -> None:
        """Samples must not see one another on the way to the target, and the loss must be a mean over them.

        Raises:
            ValueError: names the module, or both losses.
        """
        if self.target == "local":
            return
        first = 0 if self.perturb == "weights" else 1
        parts = {name: (block, "") for name, block in list(self.blocks.members.items())[first:]}
        parts["readout"] = output_layer(self.blocks, "ForwardGradient"), ""
        if self.target == "next":
            heads = {self.blocks.names[int(i)]: head for i, head in self.heads.items() if int(i) > 0}
            parts |= {f"head of {name}": (head, "head_norm=false, ") for name, head in heads.items()}
        for name, (part, advice) in parts.items():
            for path, module in part.named_modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
                    module.training or module.running_mean is None
                ):
                    raise ValueError(
                        f"{f'{name}.{path}'.rstrip('.')!r} is an nn.{type(module).__name__}, through which samples see one "
                        f"another, and one pass finds every sample's derivative only where they do not: set {advice}"
                        "simulated=true, or use another normalisation"
                    )
        if not self._compared:
            rows = len(batch.inputs), *self._outputs  # those of a new network are much alike
            scores = torch.linspace(-1, 1, math.prod(rows)).to(next(self.blocks.parameters())).reshape(rows)
            refuse_no_mean(self._loss, scores, batch.targets, "guessed forward gradients", "set simulated=true")
            self._compared = len(batch.inputs) > 2  # of two, as in the example, much looks alike

    def _attempt(self, batch: Batch) -> None:
        """One step that leaves no trace.

        Raises:
            ValueError: an operation has no forward-mode derivative, or samples see one another.
        """
        self._compared = False
        weight = next(self.blocks.parameters())
        for heads in (self.heads, self.guess_heads):  # which attach() moves only afterwards
            heads.to(weight.device, weight.dtype).train(len(batch.inputs) > 1)
        with _told(self.blocks), preserved(self), self._practice(len(batch.inputs) > 1):
            generator = Generator(weight.device).manual_seed(0)
            for _ in self._projected(batch, generator) if self.simulated else self._honest(batch, generator):
                pass
            if not self.simulated and self.target != "local":
                with torch.no_grad(), plain_attention():
                    self._refuse_mixing(batch, generator)
        for heads in (self.heads, self.guess_heads):
            heads.train()

    def _refuse_mixing(self, batch: Batch, generator: Generator) -> None:
        """Move what the first sample has alone, and look at the losses of the others."""
        x = batch.inputs
        for index, name in enumerate(self.blocks.names[:-1]):
            block = self.blocks[index]
            output, calls = self._space.run(block, x)
            guesses = self._space.draw(block, output, "gaussian", generator)
            for guess in guesses:
                guess.values[1:] = 0
            if self.perturb == "weights":
                _, slopes = slopes_at_weights(
                    block, self._above(index), self._loss, x, calls, guesses, batch.targets, 1
                )
            else:
                _, slopes = slopes_at_output(self._above(index), self._loss, output, guesses, batch.targets)
            if any(bool(((slope[1:] != 0) & slope[1:].isfinite()).any()) for slope in slopes):
                raise ValueError(
                    f"what block {name!r} makes of one sample changes the loss of another, and one pass finds every sample's "
                    "derivative only where it does not: set simulated=true"
                )
            x = output


def _there(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient
