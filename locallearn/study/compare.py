"""Several algorithms on the same data: run after run, none of which ends the others by failing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from locallearn.study.train import Interrupted, Plan, run

Show = Callable[[str, int, int, dict[str, float]], None]


def compare(plans: Sequence[tuple[str, Callable[[], Plan]]], show: Show | None = None) -> tuple[list[Path], list[str]]:
    """Run plans in the order given.

    Args:
        plans: name and maker of every run; a plan is made just before it runs, so that one run's objects are gone
            before the next one's exist.
        show: told ``(name, epoch, epochs, metrics)`` after every epoch.

    Returns:
        Folders of all runs, the failed ones included, and a sentence for every run that failed.

    Raises:
        Interrupted: the user stopped the comparison; what has run so far is on disk.
    """
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
