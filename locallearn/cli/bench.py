"""``locallearn bench``: alternated measurements of speed and memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from locallearn.cli.arms import arms_of, once
from locallearn.cli.plans import command_line, make_plan
from locallearn.cli.settings import UsageError, compose_settings
from locallearn.cli.terminal import printing


def bench(words: list[str]) -> int:
    """Measure speed or memory, alternated."""
    from locallearn.study.bench import bench as measure

    cfg, _, several, shared = arms_of("bench", words)
    what, depths, counts = str(cfg.bench.what), cfg.bench.depths, cfg.bench.counts
    if isinstance(depths, str) or not isinstance(depths, Sequence):
        raise UsageError(f"bench.depths is {depths}, expected a list of numbers of blocks: [4,32]")
    if isinstance(counts, str) or not isinstance(counts, Sequence):
        raise UsageError(f"bench.counts is {counts}, expected a list of numbers of directions: [1,4,16]")

    # A mistake in the settings is told before anything is measured.
    known = {arm.text: compose_settings([*shared, *arm.overrides]) for arm in several}
    arms = {arm.text: arm for arm in once(several, known, [cfg.seed])}

    def make(name: str, *more: str) -> Any:
        composed, choices = compose_settings([*shared, *arms[name].overrides, "meter=none", *more])
        return make_plan(composed, choices, command_line("bench", words), arms[name])

    table, folder = measure(what, list(arms), make, cfg.bench.rounds, cfg.bench.steps, list(depths), list(counts))
    printing().print(table)
    print(folder)
    return 0
