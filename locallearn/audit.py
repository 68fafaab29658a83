"""Locality is proved, not claimed: who can reach whom, found out by looking instead of trusting."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from locallearn.algorithms.base import Algorithm, Locality
from locallearn.batch import Batch


@dataclass(frozen=True)
class UnitAudit:
    """What was seen of one unit.

    Attributes:
        unit: its name.
        reaches: other units whose parameters the graph of this unit's loss reaches.
        depends_on_later: units that come later in the forward pass and change this unit's gradient when perturbed.
        backward_calls: how often the autograd engine ran for this unit in one batch.
        parameters: number of weights that the unit steps.
    """

    unit: str
    reaches: tuple[str, ...]
    depends_on_later: tuple[str, ...]
    backward_calls: int
    parameters: int


@dataclass(frozen=True)
class Audit:
    """Result of :func:`audit`.

    Attributes:
        algorithm: name of its class.
        claim: what the algorithm says.
        verdict: the strictest claim that what was seen allows.
        confirmed: whether the claim holds.
        reason: one sentence why, or why not.
        broadcast: what the algorithm says it sends to all blocks.
        units: what was seen of every unit.
    """

    algorithm: str
    claim: Locality
    verdict: Locality
    confirmed: bool
    reason: str
    broadcast: str
    units: tuple[UnitAudit, ...]


_Gradients = dict[str, dict[str, Tensor]]


def audit(
    algorithm: Algorithm,
    batch: Batch,
    batches: int = 2,
    warmup: int = 50,
    optimizers: Callable[[Algorithm], dict[str, Optimizer]] | None = None,
) -> Audit:
    """Check an algorithm's claim of locality on its network.

    All is done on copies, so that the algorithm is left as it was. After some steps of training, four things are looked
    at: the autograd graph of every unit's loss is walked to the parameters it reaches; calls of the autograd engine are
    counted; everything that belongs to one unit is perturbed, after which the gradients of units before it must be
    bit-equal; and of a unit that holds several blocks, all of the network's matrices are changed between the forward and
    the backward pass: gradients that stay bit-equal show that the error does not travel back through them.

    Args:
        algorithm: attached to a network.
        batch: one training batch on the algorithm's device.
        batches: how many batches the perturbed copies see; two, so that a rule that carries later weights over in a
            moving average is caught.
        warmup: steps of training before anything is looked at, because a fresh network may be where a loss is so sure
            that its gradient underflows, which would hide what it depends on.
        optimizers: makes the optimizer of every unit for these steps; ``None``: SGD with a rate of 0.01.

    Returns:
        The verdict with what was seen of every unit.

    Limits: a backward pass written by hand without autograd passes for forward-only; what is broadcast and the
    dependence on later units are printed.
    """
    algorithm = _trained(algorithm, batch, warmup, optimizers)
    seen, reaches, calls = _observe(algorithm, batch, batches)
    names = list(algorithm.units())
    depends: dict[str, list[str]] = {name: [] for name in names}
    for later_index, later in enumerate(names):
        if later_index == 0:
            continue
        changed, _, _ = _observe(algorithm, batch, batches, perturbed=later)
        for name in names[:later_index]:
            if not _same(seen[name], changed[name]):
                depends[name].append(later)
    units = tuple(
        UnitAudit(
            name,
            tuple(other for other in names if other in reaches[name]),
            tuple(depends[name]),
            calls[name],
            sum(p.numel() for group in algorithm.units()[name] for p in group["params"]),
        )
        for name in names
    )
    transported = False
    if any(_spans_blocks(algorithm, unit.unit) for unit in units):
        swapped, _, _ = _observe(algorithm, batch, 1, between=True)
        transported = any(
            not torch.equal(seen[unit][name], gradient) for unit in names for name, gradient in swapped[unit].items()
        )
    verdict, reason = _judge(algorithm, units, transported)
    confirmed, against = _holds(algorithm, verdict, units)
    return Audit(
        type(algorithm).__name__,
        algorithm.locality,
        verdict,
        confirmed,
        reason if confirmed else f"{against}: {reason}",
        algorithm.broadcast,
        units,
    )


@torch.random.fork_rng()
def _trained(
    algorithm: Algorithm, batch: Batch, steps: int, make: Callable[[Algorithm], dict[str, Optimizer]] | None
) -> Algorithm:
    """A copy that has begun to learn; the algorithm itself, where the copy's weights are not finite any more."""
    torch.manual_seed(0)  # of dropout inside a block
    twin = copy.deepcopy(algorithm)
    own = (
        {unit: torch.optim.SGD(groups, lr=0.01) for unit, groups in twin.units().items()}
        if make is None
        else make(twin)
    )
    twin.train()
    for _ in range(steps):
        for update in twin.updates(batch):
            # A rule that forgot to detach walks this graph again with its next unit; that shall be told, not crash.
            update.backward(_keeping)
        for optimizer in own.values():
            optimizer.step()
            optimizer.zero_grad()
    if all(bool(p.isfinite().all()) for p in twin.parameters()):
        return twin
    return algorithm  # whoever looks at it makes copies


def _keeping(loss: Tensor) -> None:
    torch.autograd.backward(loss, retain_graph=True)


@torch.random.fork_rng()
def _observe(
    algorithm: Algorithm, batch: Batch, batches: int, perturbed: str | None = None, between: bool = False
) -> tuple[_Gradients, dict[str, set[str]], dict[str, int]]:
    """Gradients of every unit by batch and parameter, units that its graph reaches, engine calls; on a copy.

    ``between``: change the network's matrices between a unit's forward and its backward pass.
    """
    torch.manual_seed(0)  # dropout inside a block draws from the global generator, and must draw the same each time
    twin = copy.deepcopy(algorithm)
    for unit in twin.units():
        _perturb(twin, unit, 0.01)  # weights that start at zero would hide what depends on them
    if perturbed is not None:
        _perturb(twin, perturbed, 0.1)
    owner = {id(p): unit for unit, groups in twin.units().items() for group in groups for p in group["params"]}
    names = {id(p): name for name, p in twin.named_parameters()}
    gradients: _Gradients = {unit: {} for unit in twin.units()}
    reaches: dict[str, set[str]] = {unit: set() for unit in twin.units()}
    calls: dict[str, int] = dict.fromkeys(twin.units(), 0)
    twin.train()
    for number in range(batches):
        updates = twin.updates(batch)
        while True:
            twin.zero_grad(set_to_none=True)
            with _engine_calls() as engine:
                update = next(updates, None)
                if update is None:
                    break
                if update.loss is not None and update.gradients is None:
                    reaches[update.unit] |= {owner.get(i, "?") for i in _reached(update.loss)} - {update.unit}
                given = update.gradients
                matrices = [p for p in twin.blocks.parameters() if p.ndim > 1] if between else []
                kept = [p.detach().clone() for p in matrices]
                for matrix in matrices:
                    matrix.data.mul_(-2.0)  # past autograd's watch: what a graph has saved of it changes, too
                update.backward(_keeping)
                for matrix, value in zip(matrices, kept, strict=True):
                    matrix.data.copy_(value)
            if number == 0:
                calls[update.unit] += engine["calls"]
            own = twin.parameters() if given is None else given.keys()
            for parameter in own:
                if parameter.grad is not None:
                    gradients[update.unit][f"{number}/{names[id(parameter)]}"] = parameter.grad.detach().clone()
    return gradients, reaches, calls


def _reached(loss: Tensor) -> Iterator[int]:
    """Ids of the leaf tensors that the graph of ``loss`` leads to."""
    stack, seen = [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield id(leaf)
        stack.extend(parent for parent, _ in node.next_functions)


@contextmanager
def _engine_calls() -> Iterator[dict[str, int]]:
    """Count how often Python hands a graph to the autograd engine."""
    count = {"calls": 0}
    run = torch.autograd.graph._engine_run_backward

    def counted(*args: Any, **kwargs: Any) -> Any:
        count["calls"] += 1
        return run(*args, **kwargs)

    with (
        mock.patch.object(torch.autograd, "_engine_run_backward", counted),
        mock.patch.object(torch.autograd.graph, "_engine_run_backward", counted),
    ):
        yield count


def _perturb(twin: Algorithm, unit: str, size: float) -> None:
    """Change every parameter of the unit, and every weight and buffer of the block that bears its name.

    A label path stays as it is: what runs from the labels alone is broadcast, and comes before every unit.
    """
    spared = {id(p) for module in twin.label_path for p in module.parameters()}
    tensors: list[Tensor] = [p for group in twin.units()[unit] for p in group["params"]]
    if unit in twin.blocks.names:
        block: nn.Module = twin.blocks[twin.blocks.names.index(unit)]
        tensors += [*block.parameters(), *block.buffers()]
    if unit == twin.blocks.names[-1] and twin.blocks.readout is not None:
        tensors += [*twin.blocks.readout.parameters(), *twin.blocks.readout.buffers()]
    generator = torch.Generator().manual_seed(1)
    for tensor in {id(t): t for t in tensors}.values():
        if tensor.is_floating_point() and id(tensor) not in spared:
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
            # A matrix of zeros gets the size of a drawn one: what it is about to say must be loud enough to be heard.
            asleep = tensor.ndim > 1 and not bool(tensor.any())
            with torch.no_grad():
                tensor.add_(noise, alpha=max(size, tensor[0].numel() ** -0.5) if asleep else size)


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _judge(algorithm: Algorithm, units: tuple[UnitAudit, ...], transported: bool) -> tuple[Locality, str]:
    coupled = next((unit for unit in units if unit.depends_on_later), None)
    coupling = "" if coupled is None else f"that of {coupled.unit!r} changes with {', '.join(coupled.depends_on_later)}"
    if not any(unit.backward_calls for unit in units):
        return Locality.FORWARD_ONLY, f"autograd never ran{f'; of the gradients, {coupling}' if coupling else ''}"
    spanning = next((unit for unit in units if _spans_blocks(algorithm, unit.unit)), None)
    if spanning is not None and transported:
        return Locality.GLOBAL, f"unit {spanning.unit!r} holds several blocks, differentiated as one"
    if spanning is not None:
        return Locality.FEEDBACK, f"the backward pass of unit {spanning.unit!r} reads none of the network's matrices"
    crossing = next((unit for unit in units if unit.reaches), None)
    if crossing is not None:
        return Locality.GLOBAL, f"the gradient of {crossing.unit!r} reaches {', '.join(crossing.reaches)}"
    if coupling:
        return Locality.COUPLED, f"no gradient crosses a border, but {coupling}"
    return Locality.LAYER_LOCAL, "no gradient crosses a border, and none changes with what later units hold"


def _spans_blocks(algorithm: Algorithm, unit: str) -> bool:
    own = {id(p) for group in algorithm.units()[unit] for p in group["params"]}
    return sum(any(id(p) in own for p in block.parameters()) for block in algorithm.blocks) > 1


# How strict a claim is; a verdict confirms every claim that is not stricter than itself.
_STRICTNESS = {
    Locality.GLOBAL: 0,
    Locality.FEEDBACK: 1,
    Locality.COUPLED: 2,
    Locality.LAYER_LOCAL: 3,
}


def _holds(algorithm: Algorithm, verdict: Locality, units: tuple[UnitAudit, ...]) -> tuple[bool, str]:
    claim = algorithm.locality
    against = f"claims {claim}, but is {verdict}"
    if claim is Locality.GLOBAL or claim is verdict:
        return True, ""
    if claim is Locality.FORWARD_ONLY:
        return False, against
    if verdict is Locality.FORWARD_ONLY:
        # Gradients made by hand cross no border of autograd's; whether they are local, the perturbation tells.
        sees_later = any(unit.depends_on_later or _spans_blocks(algorithm, unit.unit) for unit in units)
        return claim is not Locality.LAYER_LOCAL or not sees_later, against
    return _STRICTNESS[claim] <= _STRICTNESS[verdict], against
