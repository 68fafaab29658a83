"""What a search found, as experiments that ``train`` and ``compare`` take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from locallearn.cli.arms import Arm
from locallearn.cli.settings import compose_settings
from locallearn.cli.spaces import written
from locallearn.records._settings import ENDS, OF_THE_MACHINE, makes_the_run, without

# Groups in the order in which one decides on the next: a data set of graphs chooses its task and network.
_GROUPS = ("algorithm", "dataset", "task", "net", "optimizer", "schedule", "trainer")


def write_experiments(
    folder: Path, found: Sequence[Any], arms: Mapping[str, Arm], shared: Sequence[str], seeds: Sequence[int]
) -> dict[str, list[Path]]:
    """Write the best settings of every algorithm, each with all of them for ``compare``.

    Args:
        folder: the search's, with its ``tune.json``.
        found: outcomes that have a best trial.
        arms: by algorithm.
        shared: words that hold for all of them, without those of ``tune``.
        seeds: that were tuned on.

    Returns:
        Files by algorithm: of the best trial first, then of others that no trial beats in all objectives.
    """
    from locallearn.study.tune import experiment_name

    history = _history(folder)
    files: dict[str, list[Path]] = {}
    for best in found:
        for place, point in enumerate(best.points):
            file = folder / experiment_name(best.algorithm, None if place == 0 else point.number)
            own = _experiment([*shared, *arms[best.algorithm].overrides, *point.settings])
            heading = _heading(history, best, point)
            file.write_text(_text(heading, own), encoding="utf-8")
            compared = {other.algorithm: point.settings if other is best else other.settings for other in found}
            needed = {
                name: _beside(file, [*shared, *arms[name].overrides, *settings], arms[name])
                for name, settings in compared.items()
            }
            overrides = {name: words for name, words in needed.items() if words}
            listed = {"algorithms": list(compared), **({"overrides": overrides} if overrides else {})}
            own["compare"] = {**own.get("compare", {}), **listed}
            own["tune"] = {"seeds": list(seeds)}
            file.write_text(_text(heading, own), encoding="utf-8")
            files.setdefault(best.algorithm, []).append(file)
    return files


def _experiment(words: Sequence[str]) -> dict[str, Any]:
    """What makes the default settings those of ``words``."""
    cfg, choices = compose_settings(words)
    places = [word for word in words if word.startswith("hydra.searchpath=")]
    groups: list[str] = []
    for group in _GROUPS:
        if compose_settings([*places, *groups])[1][group] != choices[group]:
            groups.append(f"{group}={choices[group]}")
    changed, _ = _differences(_plain(compose_settings([*places, *groups])[0]), _plain(cfg))
    modes = {key: cfg.compare[key] for key in ENDS if cfg.compare[key] not in ("own", None)}
    return {
        **(
            {"defaults": [{f"override /{key}": name} for key, _, name in (g.partition("=") for g in groups)]}
            if groups
            else {}
        ),
        **changed,
        **({"compare": modes} if modes else {}),
    }


def _beside(file: Path, wanted: Sequence[str], arm: Arm) -> list[str]:
    """What ``compare`` has to override in an experiment for one of its algorithms to run with the settings wanted."""
    target, choices = compose_settings(wanted)
    places = [word for word in wanted if word.startswith("hydra.searchpath=")]
    words = [*places, f"experiment={file}", *arm.overrides]
    _, had = compose_settings(words)
    own = [f"{group}={choices[group]}" for group in _GROUPS if had[group] != choices[group]]
    have = _plain(compose_settings([*words, *own])[0])
    changed, gone = _differences(have, _plain(target))
    return [*own, *(f"~{key}" for key in gone), *_words(changed, have)]


def _plain(cfg: Any) -> dict[str, Any]:
    """The settings that make a run what it is, not resolved."""
    from omegaconf import OmegaConf

    settings: Any = OmegaConf.to_container(cfg, resolve=False)
    # Where a run computes is not what was found, and which seeds were tuned on stands beside it.
    return {key: without(value, key, OF_THE_MACHINE) for key, value in makes_the_run(settings).items() if key != "seed"}


def _differences(
    have: Mapping[str, Any], want: Mapping[str, Any], prefix: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """What has to be set in ``have`` for it to be ``want``, and what has to go."""
    changed: dict[str, Any] = {}
    gone = [f"{prefix}{key}" for key in have if key not in want]
    for key, value in want.items():
        if key in have and have[key] == value and type(have[key]) is type(value):
            continue
        if isinstance(value, dict) and isinstance(have.get(key), dict):
            inner, away = _differences(have[key], value, f"{prefix}{key}.")
            gone += away
            if inner:
                changed[key] = inner
        else:
            changed[key] = value
    return changed, gone


def _words(changed: Mapping[str, Any], have: Any, prefix: str = "") -> list[str]:
    """Nested settings as ``KEY=VALUE``; what ``have`` lacks is added."""
    words: list[str] = []
    for key, value in changed.items():
        known = isinstance(have, Mapping) and key in have
        if known and isinstance(value, dict) and isinstance(have[key], dict):
            words += _words(value, have[key], f"{prefix}{key}.")
        else:
            words.append(f"{'' if known else '++'}{prefix}{key}={written(value)}")
    return words


def _history(folder: Path) -> dict[str, Any]:
    import json

    from locallearn.study.tune import HISTORY

    content: dict[str, Any] = json.loads((folder / HISTORY).read_text(encoding="utf-8"))
    return content


def _heading(history: Mapping[str, Any], best: Any, point: Any) -> list[str]:
    """What was tuned, how long and by whom, in sentences."""
    from locallearn import __version__

    study = next(entry for entry in history["studies"] if entry["algorithm"] == best.algorithm)
    objectives = [objective["name"] for objective in history["objectives"]]
    reached = ", ".join(f"{name} {value:.6g}" for name, value in zip(objectives, point.values, strict=True))
    trials = [trial for trial in study["trials"] if trial["counts"]]
    times = sorted(time for trial in trials for time in (trial["started"], trial["ended"]) if time)
    counts = ((best.pruned, "pruned"), (len(best.failures), "failed or diverged"))
    bad = ", ".join(f"{number} {what}" for number, what in counts if number)
    source = history["source"]
    commit = (source["commit"] or "unknown (installed from a package)") + (" with changes" if source["dirty"] else "")
    workers = ", ".join(sorted({trial["worker"] for trial in trials} - {None}))
    chosen = "on the Pareto set " if len(objectives) > 1 else ""
    return [
        f"{best.algorithm} on {history['dataset']}, network {history['net']}: trial {point.number} (Optuna's number, "
        f"from 0) among {best.trials} of locallearn tune{f' ({bad})' if bad else ''}, {chosen}by validation: {reached}; "
        f"seeds tuned on: {', '.join(map(str, history['seeds']))}.",
        f"{best.seconds:.0f} s of trials, from {times[0]} to {times[-1]}{f', by {workers}' if workers else ''}; sampler "
        f"{history['sampler']}, pruner {history['pruner']}; locallearn {__version__}, commit {commit}.",
        f"Searched: {'; '.join(f'{key} {_spoken(part)}' for key, part in study['space'].items())}.",
        f"Study {study['study']} in {history['storage']}; every trial is in tune.json beside this file. "
        f"By: {history['command']}",
    ]


def _spoken(part: Mapping[str, Any]) -> str:
    """A range or choices in words."""
    if "choices" in part:
        text = f"of {', '.join(part['choices'])}"
    else:
        text = f"{part['low']:g} to {part['high']:g}"
        text += " (log)" if part.get("log") else f" in steps of {part['step']:g}" if "step" in part else ""
    return text + "".join(f" when {key} is {' or '.join(values)}" for key, values in part.get("when", {}).items())


def _text(heading: Sequence[str], settings: Mapping[str, Any]) -> str:
    """The file: comments that fit a screen, then the settings."""
    import textwrap

    import yaml

    lines = ["# @package _global_"]
    for sentence in heading:
        lines += textwrap.wrap(
            " ".join(sentence.split()),
            126,
            initial_indent="# ",
            subsequent_indent="#   ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    dumped = ""
    for key, value in settings.items():
        flow = None if isinstance(value, dict | list) and key != "defaults" else False
        dumped += yaml.safe_dump({key: value}, default_flow_style=flow, sort_keys=False, width=120, allow_unicode=True)
    return "\n".join(lines) + "\n" + dumped
