"""Locality is proved, not claimed: who can reach whom, found out by changing one thing and looking at everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.optim import Optimizer

from locallearn.algorithms.base import Algorithm
from locallearn.audit._copies import Unfollowable
from locallearn.audit._examine import Examination
from locallearn.audit._judge import Audit, UnitAudit, judged, refused
from locallearn.batch import Batch

__all__ = ["Audit", "UnitAudit", "audit"]


def audit(
    algorithm: Algorithm,
    batch: Batch | Iterable[Batch],
    batches: int = 30,
    warmup: int = 50,
    optimizers: Callable[[Algorithm], dict[str, Optimizer]] | None = None,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Audit:
    """Check an algorithm's claim of locality on its network.

    Everything is done on copies, which train as the training loop trains: a unit is differentiated, stepped and its
    gradients set to zero, then the generator goes on, to its end. One copy is watched: graphs are walked, calls of the
    engine counted. Of the others each has one later unit's weights, buffers and thereby everything that follows from them
    changed, at the start and again after the warm-up; gradients, weights and buffers of the units before it must stay
    bit-equal, batch after batch. What sends an error back is given other weights while all activations are pinned to
    what they were: steps that change have used these weights. ``docs/audit.md`` has it all, and what cannot be seen.

    Args:
        algorithm: attached to a network; it is left as it is, and so are all random number generators.
        batch: one training batch on the algorithm's device, of which others are made, or several.
        batches: steps after the warm-up.
        warmup: steps before the perturbed copies are perturbed for the second time. They are compared from the first step
            on; what happens for the first time after ``warmup + batches`` steps cannot be seen.
        optimizers: makes the optimizer of every unit; ``None``: SGD with a rate of 0.01. If weights do not stay finite,
            SGD with smaller rates takes their place.
        context: entered whenever the rule runs, as a strategy enters its precision, e.g. ``partial(torch.autocast, "cpu")``.

    Returns:
        The verdict with what was seen of every unit, and what could not be seen.

    Raises:
        ValueError: no batch, no step, or the rule yields a unit that it does not name.
    """
    given = [batch] if isinstance(batch, Batch) else list(batch)
    if not given or not all(isinstance(one, Batch) for one in given):
        raise ValueError("the audit needs a Batch, or several")
    if batches < 1 or warmup < 0:
        raise ValueError(f"batches is {batches} and warmup {warmup}, expected at least 1, and 0 or more")
    try:
        return judged(Examination(algorithm, given, batches, warmup, optimizers, context).run())
    except Unfollowable as reason:
        return refused(algorithm, str(reason))
