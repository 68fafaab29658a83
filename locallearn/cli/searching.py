"""The settings of a search, found good: seeds, objectives, sampler, pruner, workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from locallearn.cli.arms import distinct, refuse_shared
from locallearn.cli.plans import check_seed
from locallearn.cli.settings import UsageError, by_content, unstaged
from locallearn.records._settings import ENDS, OF_COMMANDS, OF_MEASURING, OF_PLACES, group_of

SEED = 1000
"""What is tuned on where nothing is said: none of the seeds that ``compare`` has by default."""

# Settings of commands that make another search of it.
_OF_THE_SEARCH = ("tune.space", "tune.sampler", "tune.pruner", *(f"compare.{key}" for key in ENDS))


def check_numbers(tune: Any) -> None:
    """Refuse budgets and numbers of workers that are none."""
    for key in ("trials", "workers"):
        if type(tune[key]) is not int or tune[key] < 1:
            raise UsageError(f"tune.{key} is {tune[key]}, expected a whole number of at least 1")
    if type(tune.heartbeat) is not int or tune.heartbeat < 1:
        raise UsageError(f"tune.heartbeat is {tune.heartbeat}, expected whole seconds, at least 1")
    if tune.timeout is not None and (type(tune.timeout) not in (int, float) or not tune.timeout > 0):
        raise UsageError(f"tune.timeout is {tune.timeout}, expected seconds above 0, or null for no limit")
    if tune.storage is not None and (not isinstance(tune.storage, str) or not tune.storage):
        raise UsageError(f"tune.storage is {tune.storage}, expected a file or an URL of a database")


def fixed_words(
    words: Sequence[str], seeds: Sequence[int], objectives: Any, joules: bool = False, weights: str | None = None
) -> list[str]:
    """What makes this search another one than that with other words.

    Args:
        words: typed, for all algorithms; a file among them counts by its content.
        seeds: of every trial.
        objectives: ``tune.objectives``.
        joules: they are looked for, so it matters how they are measured.
        weights: digest of those that every trial begins with, whatever they were called.
    """
    apart = {*OF_PLACES, *OF_COMMANDS, *(() if joules else OF_MEASURING), "seed", "init_from"}
    kept = [
        word
        for word in unstaged(by_content(words))
        if group_of(word) not in apart or word.lstrip("+~").startswith(_OF_THE_SEARCH)
    ]
    told = [] if objectives is None else [f"objectives={list(objectives)}"]
    return [*kept, f"seeds={list(seeds)}", *told, *([] if weights is None else [f"init_from={weights}"])]


def seeds_of(cfg: Any, words: Sequence[str]) -> list[int]:
    """Seeds of every trial.

    Raises:
        UsageError: no seeds, or such as are compared later.
    """
    typed = any(word.startswith("seed=") for word in words)
    seeds = cfg.tune.seeds
    if seeds is None:
        seeds = [cfg.seed if typed else SEED]
    elif typed:
        raise UsageError(
            "tune.seeds are the seeds of every trial, so seed= has no place beside it: take one of them out"
        )
    if not distinct(seeds, int):
        raise UsageError(f"tune.seeds is {seeds}, expected different whole numbers: [1000,1001]")
    for seed in seeds:
        check_seed("tune.seeds", seed)
    refuse_shared(seeds, cfg.compare.seeds)
    return [int(seed) for seed in seeds]


def objectives_of(given: Any, metric: str, maximise: bool, workers: int, metered: bool) -> list[Any]:
    """What is looked for.

    Args:
        given: ``tune.objectives``.
        metric: the task's.
        maximise: more of it is better.
        workers: that search on this machine.
        metered: there are sources of joules.

    Raises:
        UsageError: something that cannot be looked for.
    """
    from locallearn.records import COST_COLUMNS
    from locallearn.study.tune import ALIASES, Objective

    names = [metric] if given is None else given
    if not distinct(names, str):
        raise UsageError(f"tune.objectives is {names}, expected a list with every one once: [{metric},energy_j]")
    figures = {metric: maximise, "loss": False}
    found = []
    for name in names:
        known = ALIASES.get(name, name)
        if name in figures:
            found.append(Objective(name, figures[name]))
        elif known in COST_COLUMNS or known.partition("/")[0] == "energy_j":
            found.append(Objective(known, False))
        else:
            raise UsageError(
                f"tune.objectives names {name!r}; there are {', '.join(figures)} (of validation data), and as costs "
                f"{', '.join([*ALIASES, 'energy_j', 'energy_j/SOURCE', *COST_COLUMNS])}"
            )
    if found[0].cost:
        raise UsageError(
            f"the first of tune.objectives is {names[0]}, expected a figure of validation data, {metric} say"
        )
    if len({objective.name for objective in found}) < len(found):
        raise UsageError(f"tune.objectives is {list(names)}, of which two are the same figure")
    measured = [objective.name for objective in found if objective.measured]
    if measured and workers > 1:
        raise UsageError(
            f"tune.workers is {workers}, but {measured[0]} would be that of all of them: take tune.workers=1, or flops or bytes"
        )
    if any(name.startswith("energy_j") for name in measured) and not metered:
        raise UsageError("energy_j is to be made small, but meter=none reads none: choose another meter")
    return found


def maker_of(what: str, given: Any, known: Mapping[str, Callable[..., Any]]) -> tuple[str, Callable[..., Any]]:
    """Name and maker of the sampler or pruner that a setting names.

    Args:
        what: ``sampler`` or ``pruner``.
        given: a name, or a mapping with ``_target_`` and arguments.
        known: makers by name.

    Raises:
        UsageError: neither, or it cannot be made.
    """
    import optuna
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    base = {"sampler": optuna.samplers.BaseSampler, "pruner": optuna.pruners.BasePruner}[what]
    where = f"tune.{what}"
    if isinstance(given, str) and given in known:
        return given, known[given]
    settings = OmegaConf.to_container(given, resolve=True) if OmegaConf.is_config(given) else given
    if not isinstance(settings, dict) or not isinstance(settings.get("_target_"), str):
        raise UsageError(
            f"{where} is {given}, expected one of {', '.join(known)}, or {{_target_:optuna.{what}s.NAME,...}} of Optuna's"
        )
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    make = partial(instantiate, _convert_="all")
    try:
        maker = make({**settings, "_partial_": True})
        made = maker()
    except Exception as error:  # whatever a constructor makes of its arguments
        cause = error.__cause__ or error
        raise UsageError(f"{where} cannot be made: {str(cause).strip().partition(chr(10))[0]}") from error
    if not isinstance(made, base):
        raise UsageError(f"{where} is {settings['_target_']}, which makes no {what} of Optuna")
    return settings["_target_"], maker
