"""Optuna's samplers and pruners by name, a sampler for every trial, and what settings matter."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

import numpy as np
import optuna
from optuna import pruners, samplers

MakeSampler: TypeAlias = Callable[..., samplers.BaseSampler]
"""Makes a sampler; ``seed`` is given where it takes one and has none."""
MakePruner: TypeAlias = Callable[[], pruners.BasePruner]
"""Makes a pruner."""

SAMPLERS: Mapping[str, MakeSampler] = {
    "tpe": samplers.TPESampler,
    "random": samplers.RandomSampler,
    "gp": samplers.GPSampler,
    "nsgaii": samplers.NSGAIISampler,
}
PRUNERS: Mapping[str, MakePruner] = {
    "none": pruners.NopPruner,
    "median": pruners.MedianPruner,
    "asha": pruners.SuccessiveHalvingPruner,
    "successive_halving": pruners.SuccessiveHalvingPruner,
    "hyperband": pruners.HyperbandPruner,
}

_ENOUGH = 10
"""Trials with a value below which importances are noise."""


def sampler_for(make: MakeSampler, seed: int, number: int) -> samplers.BaseSampler:
    """A sampler for one trial: a search that goes on later must draw what it would have drawn, not its start again."""
    own = isinstance(make, partial) and "seed" in make.keywords
    if own or "seed" not in inspect.signature(make).parameters:
        return make()
    return make(seed=int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))


def importances(study: optuna.Study, place: int | None) -> dict[str, float] | None:
    """Shares of the settings in how much the values differ, largest first.

    Args:
        study: the study.
        place: of the objective among several; ``None``: there is one.

    Returns:
        ``None`` where fewer than ten trials have a value, or there is nothing to tell apart.
    """
    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len(complete) < _ENOUGH:
        return None
    try:
        target = None if place is None else (lambda trial: float(trial.values[place]))
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "error", "Target and region quantiles"
            )  # then all shares are equal, and say nothing
            found = optuna.importance.get_param_importances(study, target=target)
    except (ValueError, RuntimeError, UserWarning):  # all values are alike, or no setting was drawn in all trials
        return None
    total = sum(found.values())
    return {key: value / total for key, value in found.items()} if len(found) > 1 and total > 0 else None
