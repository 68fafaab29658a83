"""From what was found to a verdict, and whether a claim holds."""

from __future__ import annotations

from dataclasses import dataclass

from locallearn.algorithms.base import Algorithm, Locality
from locallearn.audit._examine import Findings

LIMITS = (
    "what happens for the first time after the last audited step, or less often than once in all of them",
    "a rule that recognises the audit and behaves",
    "what a network does outside of the shapes and values of these batches",
    "a backward pass that is written by hand and goes through weights of its own passes for forward-only",
)
"""What no audit sees, whatever the rule."""


@dataclass(frozen=True)
class UnitAudit:
    """What was seen of one unit.

    Attributes:
        unit: its name.
        reaches: other units whose parameters its graph leads to, or which it leaves gradients in.
        depends_on_later: units that come later in the forward pass and change what becomes of this one.
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
    """Result of :func:`locallearn.audit.audit`.

    Attributes:
        algorithm: name of its class.
        claim: what the algorithm says.
        verdict: the strictest claim that what was seen allows.
        confirmed: whether the claim holds.
        reason: one sentence why, or why not.
        broadcast: what the algorithm says it sends to all blocks.
        units: what was seen of every unit.
        limits: what this audit cannot see.
    """

    algorithm: str
    claim: Locality
    verdict: Locality
    confirmed: bool
    reason: str
    broadcast: str
    units: tuple[UnitAudit, ...]
    limits: tuple[str, ...] = LIMITS


def refused(algorithm: Algorithm, why: str) -> Audit:
    """The audit of a rule that cannot be followed; only one that claims nothing is confirmed."""
    claim = algorithm.locality
    confirmed = claim is Locality.GLOBAL
    reason = why if confirmed else f"claims {claim}, which cannot be confirmed: {why}"
    return Audit(type(algorithm).__name__, claim, Locality.GLOBAL, confirmed, reason, algorithm.broadcast, ())


def judged(found: Findings) -> Audit:
    """The verdict."""
    algorithm = found.algorithm
    order = list(found.parties)
    units = tuple(
        UnitAudit(
            name,
            tuple(other for other in order if other in found.border.reaches[name]),
            tuple(found.depends[name]),
            found.border.calls[name],
            sum(p.numel() for p in party.weights),
        )
        for name, party in found.parties.items()
        if party.is_unit or found.depends[name]
    )
    verdict, reason = _verdict(found)
    confirmed = _confirms(found, verdict)
    if found.infinite is not None and algorithm.locality is not Locality.GLOBAL:
        unit, step = found.infinite
        confirmed = False
        against = f"claims {algorithm.locality}, which cannot be confirmed"
        reason = (
            f"the gradients or weights of {unit!r} are not finite from step {step} on, and such values tell nothing"
        )
    else:
        against = f"claims {algorithm.locality}, but is {verdict}"
    return Audit(
        type(algorithm).__name__,
        algorithm.locality,
        verdict,
        confirmed,
        reason if confirmed else f"{against}: {reason}",
        algorithm.broadcast,
        units,
        (*LIMITS, *found.limits),
    )


def _verdict(found: Findings) -> tuple[Locality, str]:
    crossing = next(((name, other) for name, other in found.border.reaches.items() if other), None)
    if crossing is not None:
        return Locality.GLOBAL, f"the gradient of {crossing[0]!r} reaches {', '.join(sorted(crossing[1]))}"
    coupled = next((name for name, later in found.depends.items() if later), None)
    coupling = "" if coupled is None else f"that of {coupled!r} changes with {', '.join(found.depends[coupled])}"
    if found.crossings:
        block, later = found.crossings[0]
        how = "" if found.border.engine_ran else "autograd never ran, but "
        return Locality.GLOBAL, f"{how}an error comes back to {block!r} through the weights of {later!r}"
    if found.exact:
        block, later = found.exact[0]
        return Locality.GLOBAL, (
            f"the steps of {block!r}, below {later!r}, are the exact gradient of a loss at the network's output or have its "
            "signs, whatever way led there (by hand, forward mode, differences): that is backpropagation's step"
        )
    if not found.border.engine_ran:
        return Locality.FORWARD_ONLY, f"autograd never ran{f'; of the gradients, {coupling}' if coupling else ''}"
    if found.backward:
        return _of_one_unit(found)
    if coupling:
        return Locality.COUPLED, f"no gradient crosses a border, but {coupling}"
    alone = "no gradient crosses a border, and none changes with what later units hold"
    if found.spanning:
        return Locality.GROUP_LOCAL, f"{alone}; unit {found.spanning[0]!r} holds several blocks with a loss of its own"
    return Locality.LAYER_LOCAL, alone


def _of_one_unit(found: Findings) -> tuple[Locality, str]:
    unit = found.spanning[0]
    if found.transported:
        return Locality.GLOBAL, f"unit {unit!r} holds several blocks, differentiated as one"
    if found.uncarried:
        return Locality.GLOBAL, (
            f"the step of {min(found.uncarried)} does not change whichever feedback weights are set to zero, so the error "
            "comes another way"
        )
    return Locality.FEEDBACK, f"the backward pass of unit {unit!r} reads none of the network's matrices"


# How strict a claim is; a verdict confirms every claim that is not stricter than itself.
STRICTNESS = {
    Locality.GLOBAL: 0,
    Locality.FEEDBACK: 1,
    Locality.COUPLED: 2,
    Locality.GROUP_LOCAL: 3,
    Locality.LAYER_LOCAL: 4,
}


def _confirms(found: Findings, verdict: Locality) -> bool:
    claim = found.algorithm.locality
    if claim is Locality.GLOBAL or claim is verdict:
        return True
    if claim is Locality.FORWARD_ONLY:
        return False
    if verdict is Locality.FORWARD_ONLY:
        # Gradients made by hand cross no border of autograd's; whether they are local, the perturbation tells.
        local = not any(found.depends.values())
        if claim is Locality.GROUP_LOCAL:
            return local and (not found.spanning or found.groups > 1)
        return claim is not Locality.LAYER_LOCAL or (local and not found.spanning)
    if claim is Locality.FEEDBACK and found.spanning and verdict is not Locality.FEEDBACK:
        return False  # inside a group the error does travel through the forward weights
    return STRICTNESS[claim] <= STRICTNESS[verdict]
