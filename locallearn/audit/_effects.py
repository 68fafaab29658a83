"""Effects on one batch: what becomes of the updates when the weights on the way back are others, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from locallearn.algorithms._error_path import error_path
from locallearn.algorithms.base import Algorithm, Update
from locallearn.audit._copies import duplicate, held_tensors
from locallearn.audit._exact import alike, exact_gradients
from locallearn.audit._replay import Driver, Observer, bits, moved, perturb, rows_of, stages
from locallearn.audit._watch import Engine, Tape, address_of, flat, leaves
from locallearn.batch import Batch
from locallearn.nets.blocks import NORMALISATIONS

Change = Callable[[Algorithm], None]
_RATE = 0.01


@dataclass
class _Step(Observer):
    """One batch: what every weight of the network is moved by, be it a gradient or written into it."""

    tape: Tape
    moved: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    held: dict[str, Tensor] = field(default_factory=dict)
    outputs: list[bytes] = field(default_factory=list)
    _hooks: list[Any] = field(default_factory=list)
    _network: dict[str, nn.Parameter] = field(default_factory=dict)
    _stepped: dict[str, list[nn.Parameter]] = field(default_factory=dict)
    _names: dict[int, str] = field(default_factory=dict)
    _before: dict[str, Tensor] = field(default_factory=dict)

    def begin(self, twin: Algorithm) -> None:
        named = {f"{name}.{path}": p for name, stage in stages(twin).items() for path, p in stage.named_parameters()}
        self._names = {id(p): name for name, p in named.items()}
        for module in {id(m): m for stage in stages(twin).values() for m in stage.modules()}.values():
            self._hooks.append(module.register_forward_hook(self._note_output))
        self._stepped = {unit: [p for g in groups for p in g["params"]] for unit, groups in twin.units().items()}
        self.moved = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in named.items()}
        self._network = named

    def asked(self, twin: Algorithm) -> AbstractContextManager[Any]:
        self._before = {name: p.detach().clone() for name, p in self._network.items()}
        return self.tape

    def interrupted_by(self, change: Change, twin: Algorithm) -> None:
        """Make a change while the generator runs, which is not the rule's own writing."""
        change(twin)
        self._before = {name: p.detach().clone() for name, p in self._network.items()}

    def got(self, twin: Algorithm, update: Update | None) -> None:
        if update is None:
            self._note_writing()

    def differentiated(self, twin: Algorithm, unit: str) -> None:
        self._note_writing()
        for p in self._stepped[unit]:
            if p.grad is not None and id(p) in self._names:
                self.moved[self._names[id(p)]] += p.grad.detach().double().cpu()

    def finished(self, twin: Algorithm, number: int) -> None:
        for hook in self._hooks:
            hook.remove()
        self.weights = {name: p.detach().clone() for name, p in self._network.items()}
        self.held = {path: t.detach().clone() for path, t in held_by_rule(twin).items()}

    def _note_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.tape.engine.running:
            self.outputs.append(bits(t for t in flat(output) if address_of(t)))

    def _note_writing(self) -> None:
        for name, p in self._network.items():
            if not torch.equal(p, self._before[name]):
                self.moved[name] -= (p.detach() - self._before[name]).double().cpu() / _RATE


class Effects:
    """One batch of a rule, again and again from the same state, with one thing changed at a time.

    The steps of the forward pass are told by effect: an operator's result that changes with the inputs and not with the
    targets belongs to it. These results can be pinned to what they were, so that weights may be others while every
    activation is the same, and what still changes has used the weights themselves.

    Args:
        algorithm: the state to start from.
        driver: as in training; steps are made by SGD here.
        batch: one training batch.
        whole: take all of its samples instead of a few.
        times: how often it is given, with steps of size zero if more than once: what acts a batch later is seen, too.
        seed: of all random numbers.
    """

    def __init__(
        self, algorithm: Algorithm, driver: Driver, batch: Batch, whole: bool = False, times: int = 1, seed: int = 0
    ) -> None:
        self._algorithm = algorithm
        self._driver = Driver(driver.randomness, sgd if times == 1 else partial(sgd, lr=0.0), driver.context)
        self._times, self._seed = times, seed
        self.mirrored = False  # whether feedback weights were seen to follow the matrices by what noise shows of them
        self._factors = _factors(algorithm, batch)
        self.batch = batch if whole else _small(algorithm, batch)
        self._engine = Engine()
        self._pins: dict[int, list[Tensor]] = {}
        self._names: list[str] = []
        try:
            plain = self._run(self.batch)
        except (ValueError, RuntimeError):  # what it remembers has the size of the batches that it knows
            self.batch = batch
            plain = self._run(batch)
        self.moved = plain.moved
        self._names = plain.tape.names
        self.plain = plain
        self._rows = 1 if batch.context or batch.rows is not None else len(self.batch.inputs)
        try:
            other = self._run(self.batch._replace(targets=_other(self.batch))).tape
            shifted = self._run(self.batch._replace(inputs=moved(self.batch.inputs, 3))).tape
        except (ValueError, RuntimeError):  # a rule that takes one graph and no other
            return
        self._pins = dict(_forward(plain.tape, [other], [shifted], self._rows))

    @property
    def pinned(self) -> int:
        """Results that belong to the forward pass."""
        return len(self._pins)

    def _run(self, batch: Batch, change: Change | None = None, pinned: bool = False, late: bool = False) -> _Step:
        twin = duplicate(self._algorithm)
        if change is not None and not late:
            change(twin)
        tape = Tape(self._engine, self._pins if pinned else None, self._names if pinned else ())
        step = _Step(tape)
        step.begin(twin)
        if change is not None and late:
            tape.at_first_pin = partial(step.interrupted_by, change, twin)
        with self._engine.on():
            self._driver.run(twin, [_copy(batch) for _ in range(self._times)], step, self._seed)
        return step

    def with_other(self, change: Change, pinned: bool = True, late: bool = False) -> _Step:
        """The same batch after this change; ``late``: made only when the first activation is about to be computed."""
        return self._run(self.batch, change, pinned, late)

    def changed(self, step: _Step) -> set[str]:
        """Weights of the network that are moved by something else than without the change."""
        return {name for name, value in step.moved.items() if bits([value]) != bits([self.moved[name]])}

    def of_stage(self, step: _Step, stage: str) -> Tensor:
        """What the weights of a block are moved by, as one vector."""
        parts = [value.flatten() for name, value in step.moved.items() if name.startswith(f"{stage}.")]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    # -- what the error travels through ------------------------------------------------------------------------------
    def transports(self) -> set[str]:
        """Weights whose step changes when all of the network's matrices are others and every activation is the same.

        Feedback weights that follow the network's by what noise shows of them (a weight mirror) are no transport: then
        nothing changes if the matrices become others after the mirror has looked. Those that are copied are.
        """

        def others(twin: Algorithm) -> None:
            scale([m for name in stages(twin) for m in self._matrices(twin, name)])

        early = self.with_other(others)
        found = self.changed(early)
        self.mirrored = bool(found) and self._mirrors(early, others, found)
        return set() if self.mirrored else found

    def _mirrors(self, early: _Step, others: Change, found: set[str]) -> bool:
        """Whether these weights answer only to what the rule learns of the matrices from noise, before the forward pass."""
        if self.changed(self.with_other(others, late=True)) & found:
            return False
        followers = [path for path, t in early.held.items() if bits([t]) != bits([self.plain.held[path]])]
        copies = [path for path in followers if self._is_copy(early.held[path] - self.plain.held[path], others)]
        return bool(followers) and not copies

    def _is_copy(self, difference: Tensor, others: Change) -> bool:
        """Whether a change is proportional to the change that ``others`` makes of one of the network's matrices."""
        twin = duplicate(self._algorithm)
        held = [m for name in stages(twin) for m in self._matrices(twin, name)]
        before = [m.detach().clone() for m in held]
        others(twin)
        for old, new in zip(before, held, strict=True):
            change = (new.detach() - old).double()
            for form in (change, change.transpose(0, 1)) if change.numel() == difference.numel() else ():
                if bool(form.any()) and _explained(difference.double().flatten(), form.flatten()[None]) > 0.99:
                    return True
        return False

    def _matrices(self, twin: Algorithm, name: str) -> list[Tensor]:
        """Matrices of a block; what meets the activations entry by entry, as the graph shows, is none."""
        stage = stages(twin)[name]
        spared = {id(p) for path, p in stage.named_parameters() if f"{name}.{path}" in self._factors}
        return [m for m in matrices(stage) if id(m) not in spared]

    def crossings(self, apart: Callable[[str, str], bool]) -> list[tuple[str, str]]:
        """Pairs (block, later block): the step of the first answers to the matrices of the second as to a Jacobian.

        Activations are pinned. An update that has merely read those weights (a norm, say) changes, too, but either by a
        factor or in a direction that no error at the later block's output can explain.

        Args:
            apart: whether there is a border between two blocks.
        """
        names = list(stages(self._algorithm))
        found = []
        for place, later in enumerate(names):
            if place == 0:
                continue

            def others(twin: Algorithm, later: str = later) -> None:
                scale(self._matrices(twin, later))

            step = self.with_other(others)
            below = {key for key in self.changed(step) if key.partition(".")[0] in names[:place]}
            if not below or self._mirrors(step, others, below):
                continue
            for name in names[:place]:
                own, now = self.of_stage(self.plain, name), self.of_stage(step, name)
                if not apart(name, later) or torch.equal(own, now) or _explained(now - own, own[None]) > 1 - 1e-6:
                    continue
                # Where labels enter the forward pass nothing can be pinned, and a change of values tells nothing.
                if self._as_a_jacobian(name, later, now - own, otherwise=step.outputs == self.plain.outputs):
                    found.append((name, later))
        return found

    def _as_a_jacobian(self, stage: str, later: str, difference: Tensor, otherwise: bool) -> bool:
        """Whether an error at the output of ``later``, or at the network's, explains how the step of ``stage`` changed.

        ``otherwise``: the answer where a network is too narrow to tell, or cannot be run on the inputs as they are.
        """
        shares = []
        for until in {later, list(stages(self._algorithm))[-1]}:
            try:
                before, after = self._jacobians(stage, later, until)
            except (RuntimeError, ValueError, TypeError, IndexError):  # the rule puts something in front of the network
                continue
            if len(before) <= 0.75 * before.shape[1]:
                shares.append(_explained(difference, after - before))
        return max(shares) > 0.95 if shares else otherwise

    def _jacobians(self, stage: str, later: str, until: str) -> tuple[Tensor, Tensor]:
        """Derivatives of the output of ``until`` by the weights of ``stage``: as it is, and with others in ``later``."""
        plain, shifted = Tape(self._engine), Tape(self._engine)
        before = self._jacobian(plain, stage, until)
        self._jacobian(shifted, stage, until, moved(self.batch.inputs, 3), only_forward=True)
        pins = dict(_forward(plain, [], [shifted], self._rows))
        pinned = Tape(self._engine, pins, plain.names)
        return before, self._jacobian(pinned, stage, until, other=later)

    def _jacobian(
        self,
        tape: Tape,
        stage: str,
        until: str,
        inputs: Tensor | None = None,
        other: str | None = None,
        only_forward: bool = False,
    ) -> Tensor:
        twin = duplicate(self._algorithm).train()
        held = stages(twin)
        if other is not None:
            scale(self._matrices(twin, other))
        x = self.batch.inputs if inputs is None else inputs
        weights = [p.requires_grad_() for p in held[stage].parameters()]
        with self._driver.randomness.repeated(self._seed), torch.enable_grad():
            with self._driver.context(), tape:
                for name, module in held.items():
                    x = module(x, *self.batch.context)
                    if name == until:
                        break
            if only_forward:
                return torch.zeros(0)
            rows = []
            for entry in x.flatten():
                gradients = torch.autograd.grad(entry, weights, retain_graph=True, allow_unused=True)
                parts = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, weights, strict=True)]
                rows.append(torch.cat([part.double().cpu().flatten() for part in parts]))
        return torch.stack(rows)

    def uncarried(self) -> set[str]:
        """Weights below the output layer whose step does not change whichever feedback weights are set to zero.

        A rule that holds none, or none of use, gets the signs of the network's matrices turned instead, activations pinned.
        """
        carried: set[str] = set()
        paths = [path for path, t in held_by_rule(self._algorithm).items() if t.is_floating_point() and t.ndim > 1]
        for path in paths:
            carried |= self.changed(self.with_other(partial(_zero_held, path)))
        if not carried:
            for stage in stages(self._algorithm):
                carried |= self.changed(self.with_other(partial(self._negate, stage)))
            if not carried and not self._is_backpropagation():
                return set()  # they are made anew from a seed, perhaps
        top = list(stages(self._algorithm))[-1]
        return {n for n, v in self.moved.items() if not n.startswith(f"{top}.") and bool(v.any())} - carried

    def _negate(self, stage: str, twin: Algorithm) -> None:
        with torch.no_grad():
            for tensor in self._matrices(twin, stage):
                tensor.neg_()

    def _is_backpropagation(self) -> bool:
        """Whether some error at the network's output, sent back exactly, explains the step of a block below the last."""
        *below, top = stages(self._algorithm)
        for stage in below:
            try:
                rows = self._jacobian(Tape(self._engine), stage, top)
            except (RuntimeError, ValueError, TypeError, IndexError):
                continue
            step = self.of_stage(self.plain, stage)
            if len(rows) <= 0.75 * rows.shape[1] and bool(step.any()) and _explained(step, rows) > 0.98:
                return True
        return False

    @cached_property
    def shifted(self) -> _Step:
        """The same batch with all of the network's weights others, nothing pinned."""
        return self.with_other(self._shift, pinned=False)

    def strangers(self) -> bool:
        """Whether no step changes with the network's weights: then it has been found in another network."""
        known = all(bool(v.isfinite().all()) for v in self.moved.values())
        return known and any(bool(v.any()) for v in self.moved.values()) and not self.changed(self.shifted)

    def overwritten(self) -> set[str]:
        """Weights that are the same after a batch whatever they were before: what learns is kept somewhere else."""
        twin = duplicate(self._algorithm)
        before = {f"{n}.{k}": p.detach().clone() for n, s in stages(twin).items() for k, p in s.named_parameters()}
        self._shift(twin)
        shifted = {f"{n}.{k}": p.detach() for n, s in stages(twin).items() for k, p in s.named_parameters()}
        after = self.shifted.weights
        found = set()
        for name, old in before.items():
            was, now = (shifted[name] - old).double(), (after[name] - self.plain.weights[name]).double()
            if bool(was.isfinite().all()) and float(now.norm()) < 0.05 * float(was.norm()):
                found.add(name)
        return found

    @staticmethod
    def _shift(twin: Algorithm, seed: int = 9, size: float = 0.3) -> None:
        perturb([p for stage in stages(twin).values() for p in stage.parameters()], seed, size)

    def exact(self, apart: Callable[[str, str], bool]) -> list[tuple[str, str]]:
        """Pairs (block, later block): the steps of the first are the exact gradient, or have its signs, whatever way led there.

        They must be so with other weights in the whole network, too, which feedback weights that happen to equal the network's
        do not follow. What a rule remembers (momentum) is in both steps, so their difference may be exact instead.

        Args:
            apart: whether there is a border between two blocks.
        """
        below = self._below(apart)
        if not below or not any(bool(self.moved[name].any()) for name in below):
            return []
        changes: list[Change | None] = [None, *(partial(self._shift, seed=seed, size=0.6) for seed in range(11, 15))]
        steps = [self.moved, *(self.with_other(change, pinned=False).moved for change in changes[1:] if change)]
        gradients = list(zip(*map(self._exact_gradients, changes), strict=False))  # by loss, then by state
        floats = self.batch.targets.is_floating_point()  # one output: signs of weights alone give the gradient's signs
        several = (self.batch.targets[0].numel() if floats else self._algorithm.outputs) > 1
        for name, later in below.items():
            for known in gradients:
                pairs = [
                    (step[name], exact.get(name, torch.zeros(()))) for step, exact in zip(steps, known, strict=True)
                ]
                (step, exact), *others = pairs
                apart_by = [(s - step, e - exact) for s, e in others]
                if any(all(alike(s, e, several) for s, e in seen) for seen in (pairs, apart_by)):
                    return [(name.partition(".")[0], later)]
        return []

    def _below(self, apart: Callable[[str, str], bool]) -> dict[str, str]:
        """Weights with a later block that holds matrices beyond a border, and that block."""
        names = list(stages(self._algorithm))
        mixing = [name for name in names if self._matrices(self._algorithm, name)]
        found = {}
        for name in self.moved:
            stage = name.partition(".")[0]
            later = next(
                (other for other in mixing if names.index(other) > names.index(stage) and apart(stage, other)), ""
            )
            if later:
                found[name] = later
        return found

    def _exact_gradients(self, change: Change | None) -> list[dict[str, Tensor]]:
        twin = duplicate(self._algorithm)
        if change is not None:
            change(twin)
        return exact_gradients(twin, self.batch, self._driver.randomness, self._driver.context, self._seed)

    # -- what runs from the labels alone -----------------------------------------------------------------------------
    def label_path_sees(self) -> str:
        """What the label path depends on beside labels and its own weights; empty: nothing."""
        plain = self._heard(self.batch)
        if self._heard(self.batch._replace(inputs=moved(self.batch.inputs, 3))) != plain:
            return "the inputs"
        return "the network's weights" if self._heard(self.batch, self._shift) != plain else ""

    def _heard(self, batch: Batch, change: Change | None = None) -> list[bytes]:
        """Everything that the label path's modules give in one batch without a step."""
        twin = duplicate(self._algorithm)
        if change is not None:
            change(twin)
        heard: list[bytes] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            heard.append(bits(t for t in flat(output) if isinstance(t, Tensor)))

        for module in {id(m): m for top in twin.label_path for m in top.modules()}.values():
            module.register_forward_hook(note)
        still = Driver(self._driver.randomness, partial(sgd, lr=0.0), self._driver.context)
        still.run(twin, [_copy(batch)], Observer())
        return heard


def held_by_rule(algorithm: Algorithm) -> dict[str, Tensor]:
    """Tensors that a rule holds beside the network, wherever: in modules, attributes, containers, closures."""
    network = {address_of(t) for s in stages(algorithm).values() for t in (*s.parameters(), *s.buffers())}
    return {path: t for path, t in held_tensors(algorithm).items() if address_of(t) not in network}


def matrices(stage: nn.Module) -> Iterator[Tensor]:
    """What maps activations: parameters and buffers of two dimensions or more, but for normalisations and mere scales."""
    for module in stage.modules():
        if isinstance(module, NORMALISATIONS):
            continue
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None or not tensor.is_floating_point() or tensor.ndim < 2:
                continue
            if sum(size > 1 for size in tensor.shape) > 1 or isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                yield tensor


class _Entering(torch.autograd.Function):
    """Hands activations on; what follows from them is told by this mark in the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.layer = "input"
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Tensor:
        return delta


def _factors(algorithm: Algorithm, batch: Batch) -> set[str]:
    """Weights of two dimensions or more that meet activations entry by entry only: positional parameters, scales of maps."""
    twin = duplicate(algorithm).train()
    held = stages(twin)
    named = {f"{name}.{path}": p for name, stage in held.items() for path, p in stage.named_parameters()}
    candidates = {name: p for name, p in named.items() if p.ndim > 1 and p.requires_grad and p.shape[0] == 1}
    if not candidates or not batch.inputs.is_floating_point():
        return set()
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            x = _Entering.apply(batch.inputs.detach().clone().requires_grad_())
            for stage in held.values():
                x = stage(x, *batch.context)
    except (RuntimeError, ValueError, TypeError, IndexError):  # the rule puts something in front of the network
        return set()
    reached = {id(leaf) for leaf in leaves([x.grad_fn])}
    through = {id(p) for fault in error_path(x).faults for p in fault.weights}
    return {name for name, p in candidates.items() if id(p) in reached and id(p) not in through}


@torch.no_grad()
def scale(tensors: Iterator[Tensor] | list[Tensor], seed: int = 5) -> None:
    """Give every entry a factor between 1/2 and 3/2 of its own: signs stay."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor.mul_((0.5 + torch.rand(tensor.shape, generator=generator)).to(tensor.device, tensor.dtype))


def _forward(plain: Tape, others: list[Tape], shifted: list[Tape], rows: int) -> Iterator[tuple[int, list[Tensor]]]:
    """Results of the forward pass by number: of samples, the same with ``others``' targets, not so with other inputs."""
    for number, results in enumerate(plain.results):
        if any(number >= len(t.names) or t.names[number] != plain.names[number] for t in (*others, *shifted)):
            return
        of_samples = any(r.is_floating_point() and any(s and s % rows == 0 for s in r.shape) for r in results)
        if (
            of_samples
            and all(_equal(results, t.results[number]) for t in others)
            and not all(_equal(results, t.results[number]) for t in shifted)
        ):
            yield number, results


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return bits(one) == bits(other)


def _explained(vector: Tensor, rows: Tensor) -> float:
    """Share of a vector's square that a combination of these rows explains."""
    total = float(vector.square().sum())
    if total == 0.0 or not bool(vector.isfinite().all()) or not bool(rows.isfinite().all()):
        return 0.0
    weights = torch.linalg.lstsq(rows.T, vector[:, None], driver="gelsd").solution
    return 1.0 - float((vector - (rows.T @ weights)[:, 0]).square().sum()) / total


def _zero_held(path: str, twin: Algorithm) -> None:
    with torch.no_grad():
        held_by_rule(twin)[path].zero_()


def sgd(algorithm: Algorithm, lr: float = _RATE, alike: bool = True) -> dict[str, Optimizer]:
    """Plain gradient descent for every unit; ``alike``: without the options that a unit asks for."""
    return {
        unit: torch.optim.SGD([{"params": group["params"]} for group in groups] if alike else groups, lr=lr)
        for unit, groups in algorithm.units().items()
    }


def _small(algorithm: Algorithm, batch: Batch) -> Batch:
    """A few samples, so many that no weight has a side that could be taken for them; a graph stays whole."""
    if batch.context or batch.rows is not None:
        return batch
    sides = {side for p in algorithm.parameters() for side in p.shape}
    count = len(batch.inputs)
    fit = [n for n in (5, 7, 11, 13, 17, 3) if n <= count and not any(side % n == 0 for side in sides)]
    order = torch.arange(count)
    if batch.targets.ndim == 1 and not batch.targets.is_floating_point():  # different labels first
        seen: dict[int, int] = {}
        ranks = []
        for label in batch.targets.tolist():
            seen[label] = seen.get(label, -1) + 1
            ranks.append(seen[label])
        order = torch.tensor(ranks).argsort(stable=True)
    return rows_of(batch, order[: fit[0] if fit else min(5, count)])


def _other(batch: Batch) -> Tensor:
    """Other targets of the same kind: those of the sample before, or where all are the same, others altogether.

    On a graph only the nodes that are learned from get others: the rest may have none at all.
    """
    rows = None if batch.rows is None or batch.rows.ndim == 2 else batch.rows  # pairs of rows have targets of their own
    known = batch.targets if rows is None else batch.targets[rows]
    other = known.roll(1, 0)
    if torch.equal(other, known):
        other = known + 1 if known.is_floating_point() else known.max() - known
    if rows is None:
        return other
    targets = batch.targets.clone()
    targets[rows] = other
    return targets


def _copy(batch: Batch) -> Batch:
    return batch._replace(inputs=batch.inputs.clone(), targets=batch.targets.clone())
