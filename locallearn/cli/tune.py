"""``locallearn tune``: a search, and the best settings as commands that run them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from locallearn.cli.arms import Arm, arms_of
from locallearn.cli.plans import command_line, folder_setting, make_plan
from locallearn.cli.settings import UsageError, compose_settings
from locallearn.cli.spaces import quoted, read_space
from locallearn.cli.terminal import Progress, printing


def tune(words: list[str]) -> int:
    """Search settings on equal budgets, on validation data only."""
    from locallearn.study.space import corners
    from locallearn.study.train import Interrupted, check
    from locallearn.study.tune import study_name
    from locallearn.study.tune import tune as search

    base, chosen, several, shared = arms_of("tune", words)
    arms = {arm.text: arm for arm in several}
    if type(base.tune.trials) is not int or base.tune.trials < 1:
        raise UsageError(f"tune.trials is {base.tune.trials}, expected a whole number of at least 1")
    if base.resume is not None:
        raise UsageError("resume goes with train; an interrupted search goes on when tune is called again")
    runs_dir = folder_setting(base, "runs_dir")
    fixed = [
        word for word in shared if not word.startswith(("tune.trials=", "tune.algorithms=", "runs_dir=", "data_dir="))
    ]

    def compose(algorithm: str, settings: Sequence[str] = ()) -> Any:
        return compose_settings([*shared, *arms[algorithm].overrides, *settings])

    def make(algorithm: str, settings: Sequence[str]) -> Any:
        cfg, choices = compose(algorithm, settings)
        # Trials have a folder of their own: a report on runs_dir must not mix them with what they were searched for.
        cfg.runs_dir = str(runs_dir / "tune")
        return make_plan(cfg, choices, command_line("tune", words), arms[algorithm])

    space = read_space(base.tune.space, [compose(name)[0] for name in arms])
    for name in arms:  # a mistake in the settings, or in what may be drawn, is told before anything is trained
        for place, point in enumerate(corners(space)):
            try:
                check(make(name, point))
            except RuntimeError:  # too large for this machine, say: a trial of the search may fail
                if place == 0:
                    raise
    try:
        with Progress() as show:
            found = search(
                list(arms),
                make,
                space,
                base.tune.trials,
                runs_dir / "tune.sqlite",
                study_name(chosen["dataset"], chosen["net"], fixed),
                show=show,
                say=lambda sentence: print(f"locallearn: {sentence}", file=sys.stderr),
            )
    except Interrupted:
        print("locallearn: interrupted; the same command goes on where the search stopped", file=sys.stderr)
        return 130
    return _recommend(found, arms, shared)


def _recommend(found: Sequence[Any], arms: dict[str, Arm], shared: Sequence[str]) -> int:
    """Print the best settings of every algorithm, as commands that run them; 1 where one has none."""
    from rich.table import Table
    from rich.text import Text

    metric = next((best.metric for best in found if best.metric is not None), "metric")
    table = Table(title=f"best of {found[0].trials} trials each, by validation {metric}", title_justify="left")
    for heading in ("algorithm", "trials", f"validation {metric}", "settings"):
        table.add_column(heading, overflow="fold")
    good = [best for best in found if best.value is not None]
    for best in found:
        value = "none" if best.value is None else f"{best.value:.4f}"
        table.add_row(best.algorithm, str(best.trials), value, Text(" ".join(best.settings)))
    printing().print(table)
    for best in found:
        if best.failures:
            all_or_some = "all" if best.value is None else str(len(best.failures))
            advice = "; nothing can be recommended, search elsewhere" if best.value is None else ""
            print(
                f"locallearn: {all_or_some} of the {best.trials} trials of {best.algorithm} failed or diverged, "
                f"e.g. {best.failures[0]}{advice}",
                file=sys.stderr,
            )
    own = [word for word in shared if not word.startswith(("tune.", "compare.", "report.", "bench."))]
    for best in good:
        print(command_line("train", [*own, *arms[best.algorithm].overrides, *best.settings]))
    if good:
        print(f"to compare them: locallearn compare ...{_overrides(good)}")
    return 0 if len(good) == len(found) else 1


def _overrides(good: Sequence[Any]) -> str:
    """What ``compare`` takes to run the best settings, ready for a shell."""
    import shlex

    named = [best for best in good if "(" not in best.algorithm]  # Hydra's dictionaries take plain words as keys
    kept = ",".join(f"{best.algorithm}:[{','.join(map(quoted, best.settings))}]" for best in named)
    own = [quoted(f"{best.algorithm[:-1]},{','.join(best.settings)})") for best in good if best not in named]
    return (f" {shlex.quote(f'compare.overrides={{{kept}}}')}" if named else "") + (
        f" and in compare.algorithms: {shlex.quote(','.join(own))}" if own else ""
    )
