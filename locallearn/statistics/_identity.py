"""Which runs are the same experiment: their settings, and what they ran on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from locallearn.records import Record
from locallearn.records._settings import OF_COMMANDS, OF_MEASURING, OF_PLACES, PLACES_WITHIN, SEEDS_APART, number

# Settings that may differ between runs of one group without making them different experiments: places, what is measured
# beside training, and those of other commands (a target is part of the group itself).
_FREE_SETTINGS = frozenset(
    {
        *(*OF_PLACES, *PLACES_WITHIN, *OF_MEASURING, *OF_COMMANDS, "hydra"),
        *("trainer.probe_samples", "trainer.checkpoint_s"),
    }
)
# Settings that came later, and what older records had in their place.
_LATER: dict[str, Any] = {
    **{"algorithm.accumulate": 1, "algorithm.checkpoint": None},
    **{"algorithm.keep": 1, "algorithm.keep_after": None, "algorithm.keep_by": "loss"},
    **{
        "dataset.drop_last": False,
        "dataset.exclude": [],
        "net.batch_norm": False,
        "net.device": None,
        "net.dropout": 0,
    },
    **{"net.skips": True, "init_from": None, "scheduler_interval": "epoch", "task.label_smoothing": 0, "task.views": 1},
    **{"trainer.channels_last": False, "trainer.compile": None, "trainer.compile_backend": "inductor"},
    **{"trainer.check_val_every_n_epoch": 1, "trainer.matmul_precision": "highest"},
}
# The same of one class or function: another one's setting of the same name may have another default.
_LATER_OF: dict[str, dict[str, Any]] = {
    "locallearn.algorithms.DeepSupervision": {
        **{"head": "linear", "width": 1, "depth": 2, "decay": 0.5, "head_limit": None},
        **{"loss": "ce", "smoothing": 0, "beta": 0.99, "similarity_side": None, "contrast": False, "temperature": 0.07},
        **{"reconstruction": [1.0, 0.0], "classification": [0.0, 1.0], "pixels": None, "movement": 0},
    },
    "locallearn.algorithms.ForwardForward": {
        **{"loss": "logistic", "alpha": 4, "competition": "cwc", "blurs": 6, "recurrent": None},
        **{"goodness": "squares", "normalise": "rms"},
    },
    "locallearn.algorithms.ForwardGradient": {
        **{"losses": "global", "groups": None, "mask": None, "guess": None, "target": "global", "simulated": False},
        **{"head": "linear", "head_width": None, "head_norm": True},
    },
    "locallearn.algorithms.ZerothOrder": {
        **{"normalise": None, "beta2": 0.999, "curvature_exponent": None, "losses": "global", "head_limit": None},
    },
    "locallearn.nets.mlp": {"activation": "relu", "bias": True},
    "locallearn.nets.resnet": {"cuts": "units"},
}
# Packages that decide no number of a run.
_IDLE_PACKAGES = frozenset({"hydra-core", "optuna", "plotly"})
_MACHINE = ("cpu", "machine", "usable_cores", "threads", "workers", "gpus")


# ------------------------------------------------------------------------------------------- settings


def settings(record: Record) -> dict[str, str]:
    """The settings of a run that make it the experiment it is, by dotted name."""
    found = dict(_leaves(record.part("config")))
    weights = record.begins_with
    if weights is not None:  # whatever they are called
        found["init_from"] = weights
    return found


def in_words(record: Record, flat: Mapping[str, str]) -> dict[str, str]:
    """The same settings for readers: weights that training began with are named by the run that they are from."""
    return {**flat, **({"init_from": record.begins_with_in_words} if "init_from" in flat else {})}


def differing(flats: Sequence[Mapping[str, str]]) -> list[str]:
    """Names whose values are not the same in all of these settings."""
    names = {name for flat in flats for name in flat}
    return sorted(name for name in names if len({flat.get(name, "") for flat in flats}) > 1)


def apart(group: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """The group, split by the settings in which runs of one seed differ, which are told; ``""`` where nothing differs."""
    flats = [settings(record) for record in group]
    names: set[str] = set()
    for seed in {record.seed for record in group}:
        same = [flat for flat, record in zip(flats, group, strict=True) if record.seed == seed]
        names.update(differing(same))
    told: list[str] = []
    for name in sorted(names, key=lambda name: (not name.endswith("._target_"), name)):
        # Another optimizer has other settings of its own, which need not be told unless two runs differ in them alone.
        implied = f"{name.rpartition('.')[0]}._target_" in told
        if not implied or _kinds(flats, [*told, name]) > _kinds(flats, told):
            told.append(name)
    parts: dict[tuple[str | None, ...], list[Record]] = {}
    for flat, record in zip(flats, group, strict=True):
        parts.setdefault(tuple(flat.get(name) for name in told), []).append(record)
    words = [in_words(record, flat) for flat, record in zip(flats, group, strict=True)]
    written = [_written(name, flats, words) for name in told]
    return [
        (", ".join(text[value] for text, value in zip(written, values, strict=True) if value is not None), part)
        for values, part in parts.items()
    ]


def distance(one: Record, other: Record) -> int:
    """In how many settings two runs of different rules differ, those of the rules left out."""
    return len(beside_the_rule(one, other))


def beside_the_rule(one: Record, other: Record) -> list[str]:
    """Settings in which two runs differ, those of the rules left out."""
    return [name for name in differing([settings(one), settings(other)]) if not name.startswith("algorithm.")]


def spoken(value: str | None) -> str:
    """A setting's value as it would be typed; of a class its last name."""
    if value is None:
        return "not set"
    return {"None": "null", "True": "true", "False": "false"}.get(value, value.strip("'"))


def _kinds(flats: Sequence[Mapping[str, str]], names: Sequence[str]) -> int:
    return len({tuple(flat.get(name) for name in names) for flat in flats})


def _written(name: str, flats: Sequence[Mapping[str, str]], words: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """A setting with each of its values, as short as they stay apart: of a class the last name, anything as it is typed."""
    owner, _, key = name.rpartition(".")
    typed = {flat[name]: spoken(own[name]) for flat, own in zip(flats, words, strict=True) if name in flat}
    last = {value: text.rpartition(".")[2] for value, text in typed.items()}
    ways = [*([last] if key == "_target_" else []), typed, {value: value for value in typed}]
    texts = next(way for way in ways if len(set(way.values())) == len(typed))
    return {value: f"{owner if key == '_target_' else name}={text}" for value, text in texts.items()}


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    target = config.get("_target_")
    later = _LATER_OF.get(target, {}) if isinstance(target, str) else {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if (key == "seed" and name not in SEEDS_APART) or name in _FREE_SETTINGS:
            continue
        if (name in _LATER and value == _LATER[name]) or (key in later and value == later[key]):
            continue
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, repr(number(name, value))


def usual(record: Record, name: str) -> Any:
    """What a run had for a setting that its identity leaves out, or that its version did not know yet."""
    *path, key = name.split(".")
    owner: Any = record.part("config")
    for step in path:
        owner = owner.get(step) if isinstance(owner, Mapping) else None
    if not isinstance(owner, Mapping):
        return _LATER.get(name)
    target = owner.get("_target_")
    later = _LATER_OF.get(target, {}) if isinstance(target, str) else {}
    value = owner.get(key, later.get(key, _LATER.get(name)))
    return None if isinstance(value, Mapping) else number(name, value)


# ------------------------------------------------------------------------------------------- the newest of several


def age(record: Record, others: Iterable[Record]) -> tuple[int, str, str, str]:
    """A key that is larger for the run that started later.

    Runs of one folder are numbered when they start, which no clock that was set back can disturb; anything else goes by
    the clock.
    """
    serial = record.data.get("serial")
    counted = type(serial) is int and len({other.path.parent for other in others}) == 1
    return (
        serial if counted else -1,  # type: ignore[return-value]  # counted means that it is a number
        record.text("started") or "",
        record.text("finished") or "",
        record.id,
    )


# ------------------------------------------------------------------------------------------- circumstances


def circumstances(record: Record) -> dict[str, str]:
    """What a run ran on and with, beside its settings: machine, versions, commit, arithmetic; by name, known ones only.

    A run that was resumed elsewhere has several values of a name, joined in order.
    """
    found: dict[str, list[str]] = {}
    for part in [*_parts(record), record.data]:
        for name, value in _circumstances(part):
            if value not in found.setdefault(name, []):
                found[name].append(value)
    return {name: ", then ".join(values) for name, values in found.items()}


def machines(record: Record) -> frozenset[tuple[str, ...]]:
    """The machines that a run ran on: one, unless it was resumed on another."""
    return frozenset(_machine(part) for part in [*_parts(record), record.data])


def _machine(part: Mapping[str, Any]) -> tuple[str, ...]:
    hardware = _mapping(part.get("hardware"))
    return (*(str(hardware.get(name)) for name in _MACHINE), _device(part))


def _device(part: Mapping[str, Any]) -> str:
    """Whether a run used the graphics card or the processor of a machine that has both."""
    wanted = _mapping(_mapping(part.get("config")).get("trainer")).get("accelerator") or "auto"
    has = bool(_mapping(part.get("hardware")).get("gpus"))
    return "cpu" if wanted == "cpu" or not has else "gpu"


def _parts(record: Record) -> list[Mapping[str, Any]]:
    """The earlier parts of a resumed run; their settings are those of the whole."""
    parts = record.data.get("parts")
    config = record.part("config")
    return (
        [{"config": config, **part} for part in parts if isinstance(part, Mapping)] if isinstance(parts, list) else []
    )


def _circumstances(part: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    hardware = _mapping(part.get("hardware"))
    for name in _MACHINE:
        if hardware.get(name) not in (None, []):
            value = hardware[name]
            yield name.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    if hardware:
        yield "device", _device(part)
    for name, value in _mapping(part.get("versions")).items():
        if value is not None and name not in _IDLE_PACKAGES:
            yield str(name), str(value)
    source = _mapping(part.get("source"))
    if source.get("commit"):
        yield "commit", f"{str(source['commit'])[:10]}{' with uncommitted changes' if source.get('dirty') else ''}"
    for name, value in _mapping(part.get("precision")).items():
        if value is not None:
            yield f"precision ({name})".replace("_", " "), str(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
