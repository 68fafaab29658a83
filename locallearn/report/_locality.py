"""What every rule claims about who sees what."""

from __future__ import annotations

from collections.abc import Sequence

from locallearn.statistics import Row

_MEANINGS = {
    "layer-local": "No gradient crosses, and what becomes of a block is the same whatever later blocks hold.",
    "group-local": "Several blocks share one loss of their own; no gradient leaves the group.",
    "gradient-isolated, parameter-coupled": "No gradient crosses, but what becomes of a block depends on later weights.",
    "forward-only": "No backward pass at all: something is broadcast instead.",
    "feedback": "An error travels backward, but not through the transposes of the forward weights.",
    "global": "Everything may see everything.",
}


def locality_table(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heading and lines: every rule with its claim, the claim's meaning, and where it ran. Empty where no record says."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if claim := row.newest.text("locality"):
            found.setdefault((row.algorithm, claim), []).append(row)
    order = list(_MEANINGS)
    lines: list[tuple[str, ...]] = [
        (rule, claim, _MEANINGS.get(claim, "A claim of its own."), str(sum(len(row.records) for row in own)))
        for (rule, claim), own in sorted(
            found.items(), key=lambda item: (order.index(item[0][1]) if item[0][1] in order else 99, item[0])
        )
    ]
    return ("Rule", "Claim", "What it means", "Finished runs"), lines
