"""Several algorithms on the same data: run after run or side by side, none of which ends the others by failing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from locallearn.study._pool import Named, Show, side_by_side
from locallearn.study.train import Interrupted, run


def compare(plans: Sequence[Named], show: Show | None = None, workers: int = 1) -> tuple[list[Path], list[str]]:
    """Run plans, begun in the order given.

    Args:
        plans: name and maker of every run; a plan is made just before it runs, so that one run's objects are gone
            before the next one's exist.
        show: told ``(name, epoch, epochs, metrics)`` after every epoch.
        workers: how many runs go on at once, each in a process of its own with its share of this process's threads; the
            makers must then be picklable. A run's weights and metrics are bit by bit those of the same run alone with as
            many threads; seconds and joules are not, for the machine is shared.

    Returns:
        Folders of all runs in the order of the plans, the failed ones included, and a sentence for every run that failed.
        The folder of a run whose process was killed is not among them: :func:`locallearn.records.recover` finds it.

    Raises:
        Interrupted: the user stopped the comparison; what has run so far is on disk.
        ValueError: a plan cannot be handed to another process.
    """
    if workers > 1:
        return side_by_side(plans, workers, show)
    folders: list[Path] = []
    problems: list[str] = []
    for name, make in plans:
        plan = make()
        if show is not None:
            plan.progress = partial(show, name)
        try:
            folders.append(run(plan))
        except (Interrupted, KeyboardInterrupt):
            raise
        except Exception as error:
            folder = getattr(error, "run_folder", None)
            if folder is None:
                raise  # it never started: the settings are wrong, and the next run's will be too
            folders.append(folder)
            problems.append(f"{name} failed: {error}")
    return folders, problems
