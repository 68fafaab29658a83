"""The algorithms that ``compare``, ``tune`` and ``bench`` set side by side, each with settings of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from locallearn.cli.settings import GROUPS, UsageError, check_words, compose_settings
from locallearn.records._settings import ENDS, OF_MEASURING, SEEDS_APART, makes_the_run, number

CONTROLS = {
    "backprop": "backprop",
    "deep_supervision": "deep_supervision",
    "checkpointed": "backprop(checkpoint=auto)",
    "accumulated": "backprop(accumulate=4)",
}
"""What ``compare.controls`` adds, by its names there."""
# Settings that make a control of backpropagation, and of which kind.
_SAVES = {"algorithm.checkpoint": "checkpointed", "algorithm.accumulate": "accumulated", "algorithm.keep": "partial"}
# What these are without one.
_PLAIN = ("algorithm.checkpoint=null", "algorithm.accumulate=1", "algorithm.keep=1", "algorithm.keep=1.0")


class Arm:
    """One of the algorithms that are compared: ``NAME``, or ``NAME(KEY=VALUE,...)`` with settings of its own.

    A key without a dot is one of the algorithm's.

    Attributes:
        inherits: of a control: the arm whose ``compare.overrides`` are its own, too.
        added: nobody named it.

    Raises:
        UsageError: it cannot be read, or it sets the seed.
    """

    def __init__(self, text: str) -> None:
        found = re.fullmatch(r"(\w+)(?:\((.*)\))?", text.strip())
        if found is None:
            raise UsageError(f"{text!r} is no algorithm to compare: write NAME or NAME(KEY=VALUE,...)")
        self.text = text
        self.inherits: str | None = None
        self.added = False
        self.algorithm: str = found[1]
        parts = re.split(r",(?![^\[{(]*[\]})])", found[2]) if found[2] else []  # commas outside of brackets
        parts = [re.sub(r"\s*=\s*", "=", part.strip(), count=1) for part in parts]
        check_words(parts)
        keys = [part.partition("=")[0] for part in parts]
        if any(key.rpartition(".")[2] == "seed" and key not in SEEDS_APART for key in keys):
            raise UsageError(f"{text!r} sets a seed, but all algorithms run the same ones: set compare.seeds")
        self.settings = [
            part if "." in key or key in (*GROUPS, "scheduler", "scheduler_interval") else f"algorithm.{part}"
            for part, key in zip(parts, keys, strict=True)
        ]

    @property
    def overrides(self) -> list[str]:
        """Words for Hydra."""
        return [f"algorithm={self.algorithm}", *self.settings]

    def beyond(self, variant: str | None, device: str | None = None) -> list[str]:
        """Settings that a rule's name of its variant, and of the device in its network, do not tell already."""
        pairs = [setting.removeprefix("algorithm.") for setting in self.settings]
        told = {variant, *re.split(", |-", variant or "")}
        if device is not None:
            told |= {"net.device=null", "net.differentiable=true", "net.differentiable=false"}
            told |= {f"net.device.{part}" for part in device.split(", ")}
        return [pair for pair in pairs if told.isdisjoint((pair, *pair.split("=")))]


def arms_of(command: str, words: Sequence[str]) -> tuple[Any, dict[str, str], list[Arm], list[str]]:
    """The settings with the choices made in them, the algorithms to compare, and the words that hold for all of those.

    Where none are listed, by a word or by the experiment's file, they are backpropagation and the one that ``algorithm=`` or
    ``experiment=`` names; settings of ``algorithm`` are then that one's own.
    """
    listed = any(word.startswith(f"{command}.algorithms=") for word in words)
    named = [word for word in words if word.startswith("algorithm=")]
    own = [word for word in words if word.startswith("algorithm.")]
    if listed and named:
        raise UsageError(f"{command}.algorithms names the algorithms, so {named[0]} has no place here: take it out")
    base, choices = compose_settings([word for word in words if not (listed and word in own)])  # those are the arms'
    algorithms, shared, baseline = base[command].algorithms, list(words), []
    experiment = any(word.startswith("experiment=") for word in words)
    if experiment and not (listed or named):  # whose file may list them
        listed = algorithms != compose_settings([])[0][command].algorithms
    if not listed and (named or experiment):
        settings = ",".join(word.removeprefix("algorithm.") for word in own)
        text = f"{choices['algorithm']}({settings})" if own else choices["algorithm"]
        baseline = [name for name in _baseline(choices["algorithm"], base.net) if name != text]
        algorithms = [*baseline, text]
        shared = [word for word in words if word not in named and word not in own]
    if not distinct(algorithms, str):
        raise UsageError(
            f"the algorithms to compare are {algorithms}, expected a list with every one once: [backprop,...]"
        )
    arms = [Arm(text) for text in algorithms]
    for arm in arms:
        arm.added = arm.text in baseline
    if command == "compare":
        arms += _without_device(arms, shared)
        if base.tune.seeds is not None:  # an experiment that tune wrote
            refuse_shared(base.tune.seeds, base.compare.seeds)
    return base, choices, arms, shared


def refuse_shared(tuned: Sequence[int], compared: Any) -> None:
    """Settings that were chosen on a seed look better on it than they are.

    Raises:
        UsageError: a seed is in both.
    """
    both = [seed for seed in tuned if isinstance(compared, Sequence) and seed in compared]
    if both:
        raise UsageError(
            f"seed {both[0]} is both tuned on (tune.seeds {list(tuned)}) and compared (compare.seeds {list(compared)}), where "
            "what was tuned looks better than it is: set compare.seeds or tune.seeds to others"
        )


def _baseline(algorithm: str, net: Any) -> list[str]:
    """Backpropagation, through the formula of a simulated device; of a device without one there is no such baseline."""
    device = net.get("device") if algorithm == "physical_ff" else None
    if device is None:
        return ["backprop"]
    simulated = hasattr(device, "get") and device.get("map") in ("scatterer", "optical", "twin")
    rounds = simulated and (device.get("input_bits") or device.get("output_bits"))
    return ["backprop(net.differentiable=true)"] if simulated and not rounds else []


def controls_of(wanted: Any, arms: Sequence[Arm]) -> dict[str, Arm]:
    """The controls to add, by name: of those that are asked for (``true``: all) the ones that no arm is yet.

    Where the list has backpropagation with settings of its own, checkpointing and accumulation are those of that one.

    Raises:
        UsageError: something else is asked for.
    """
    names = list(CONTROLS) if wanted is True else [] if wanted is False or wanted is None else wanted
    if isinstance(names, str) or not isinstance(names, Sequence) or not set(map(str, names)) <= set(CONTROLS):
        raise UsageError(
            f"compare.controls is {wanted}, expected true for all, false for none, or a list of {', '.join(CONTROLS)}"
        )
    plain = next((arm for arm in arms if _control(arm) == "backprop"), Arm("backprop"))
    there = {_control(arm) for arm in arms}
    return {name: _made(name, plain) for name in dict.fromkeys(names) if name not in there}


def _control(arm: Arm) -> str | None:
    """Which of the controls an arm is."""
    if arm.algorithm != "backprop":
        return arm.algorithm if arm.algorithm in CONTROLS else None
    keys = {word.partition("=")[0] for word in arm.settings if word not in _PLAIN}
    found = [name for key, name in _SAVES.items() if key in keys]
    return "backprop" if not found else found[0] if len(found) == 1 else None


def _made(name: str, plain: Arm) -> Arm:
    control = Arm(CONTROLS[name])
    if control.algorithm == "backprop" and name != "backprop":
        if plain.settings:
            kept = [word for word in plain.settings if word not in _PLAIN]
            own = [word.removeprefix("algorithm.") for word in (*kept, *control.settings)]
            control = Arm(f"backprop({','.join(own)})")
        control.inherits = plain.text
    control.added = True
    return control


def _without_device(arms: Sequence[Arm], shared: Sequence[str]) -> list[Arm]:
    """Arms that nobody may leave out: what a physical device adds is only told beside the same network without it."""
    found: dict[str, Arm] = {}
    without = False
    for arm in arms:
        if arm.algorithm != "physical_ff":
            continue
        net = compose_settings([*shared, *arm.overrides])[0].net
        if net.get("device") is None:
            without = True
            continue
        own = [word for word in arm.settings if not word.startswith(("net.device", "net.differentiable"))]
        settings = [*(word.removeprefix("algorithm.") for word in own), "net.device=null"]
        if net.get("differentiable"):  # speaks of a device
            settings.append("net.differentiable=false")
        text = f"physical_ff({','.join(settings)})"
        found[text] = Arm(text)
        found[text].added = True
    return [] if without else list(found.values())


def once(arms: Sequence[Arm], composed: Mapping[str, tuple[Any, Mapping[str, str]]], seeds: Sequence[int]) -> list[Arm]:
    """The arms without those that were added though another one has the same settings.

    Args:
        arms: to run.
        composed: settings, and choices made in them, by arm.
        seeds: that they are run with.

    Raises:
        UsageError: two that were named have the same settings with one of the seeds, and would be trained as two and
            shown as one.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    found: dict[str, str] = {}  # signatures of runs
    kept = set()
    for arm in sorted(arms, key=lambda arm: arm.added):
        cfg, choices = composed[arm.text]
        runs: dict[str, int] = {}
        for seed in seeds:
            try:
                config: Any = OmegaConf.to_container(OmegaConf.merge(cfg, {"seed": seed}), resolve=True)
            except OmegaConfBaseException:  # whoever makes the run says what is wrong, and with which arm
                continue
            runs[signature(*what_runs(config, choices["algorithm"], config["init_from"]))] = seed
        twin = next((run for run in runs if run in found), None)
        if twin is not None and not arm.added:
            when = f" with seed {runs[twin]}" if len(seeds) > 1 and not set(runs) <= set(found) else ""
            raise UsageError(f"{found[twin]!r} and {arm.text!r} have the same settings{when}: take one of them out")
        if twin is None:
            kept.add(arm.text)
            found.update(dict.fromkeys(runs, arm.text))
    return [arm for arm in arms if arm.text in kept]


def what_runs(config: Any, algorithm: str, weights: Any) -> tuple[str, dict[str, Any]]:
    """What has to be the same for a run to stand for another: what makes it, the weights it begins with, what is measured."""
    ends = {key: config.get("compare", {}).get(key) for key in ENDS}
    measured = {key: config.get(key) for key in OF_MEASURING}
    return algorithm, {**makes_the_run(config), **measured, "init_from": weights, "compare": ends}


def signature(algorithm: str, settings: Mapping[str, Any]) -> str:
    """The same for runs that stand for each other; both as :func:`what_runs` gives them."""
    import json

    return json.dumps([algorithm, _plain("", settings)], sort_keys=True, default=str)


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(f"{name}.{key}".lstrip("."), own) for key, own in value.items()}
    return number(name, value)


def distinct(values: Any, kind: type) -> bool:
    """Whether these are several values of one kind, at least one, and none twice."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        return False
    return len(values) == len(set(values)) > 0 and all(type(value) is kind for value in values)
