"""The command line: composes the configuration, makes typed objects of it, and hands them to the library."""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

_HELP = """\
locallearn: train networks without backpropagation through the whole network, and measure what that costs.

  locallearn compare                 train several algorithms on the same data, print a table, write a report
  locallearn train                   train one algorithm once and leave a record
  locallearn tune                    search settings on equal budgets, on validation data only
  locallearn report                  one HTML page from any records
  locallearn audit                   prove or refute what an algorithm claims about locality
  locallearn bench                   alternated speed and memory measurements
  locallearn data                    which data sets are here, and where files are looked for

Settings are GROUP=NAME or KEY=VALUE (Hydra); every command but report takes the same ones:
  algorithm= dataset= net= optimizer= schedule= trainer= meter= logger= task= experiment=
  seed=0 data_dir=DIR runs_dir=runs trainer.max_epochs=60 trainer.accelerator=cpu optimizer.lr=1e-3
  compare.algorithms=[backprop,mono_forward] compare.seeds=[0,1,2] resume=FOLDER (train)

Examples:
  locallearn compare dataset=mnist compare.seeds=[0,1,2,3,4]
  locallearn train algorithm=forward_forward net.hidden=[500,500] seed=1
  locallearn train -m algorithm=backprop,mono_forward optimizer.lr=1e-3,3e-4

Options: --cfg prints the composed settings; -m sweeps (train); --debug shows tracebacks; --version
Completion: eval "$(locallearn -sc install=bash)"   names of a group: locallearn train algorithm=?
"""

_GROUPS = (
    "algorithm",
    "dataset",
    "net",
    "task",
    "optimizer",
    "schedule",
    "trainer",
    "meter",
    "logger",
    "experiment",
)


_ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")


class UsageError(Exception):
    """The user asked for something that cannot be done; the message is one sentence."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 when all went well; 1 when a run failed or an audit refuted a claim; 2 for a user's mistake; 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in ("-sc", "--shell-completion", "-sc=install=bash"):
        return _completion(words)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _dispatch(words)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        code, sentence = _explain(error, words)
        print(f"locallearn: {sentence}", file=sys.stderr)
        folder = getattr(error, "run_folder", None)
        if folder is not None:
            print(folder)
        return code


def _dispatch(words: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "compare": _compare,
        "tune": _tune,
        "report": _report,
        "audit": _audit,
        "bench": _bench,
        "data": _data,
    }
    if not words or words[0] in ("-h", "--help", "help"):
        print(_HELP, end="")
        return 0
    if words[0] == "--version":
        from locallearn import __version__

        print(__version__)
        return 0
    name, *rest = words
    if name not in commands:
        raise UsageError(f"there is no command {name!r}; the commands are {', '.join(commands)}")
    if "-h" in rest or "--help" in rest:
        print(_HELP, end="")
        return 0
    if "--cfg" in rest:
        from omegaconf import OmegaConf

        cfg, _ = _compose([word for word in rest if word != "--cfg"])
        print(OmegaConf.to_yaml(cfg), end="")
        return 0
    return commands[name](rest)


# -- configuration -----------------------------------------------------------------------------------------------------


def _compose(overrides: Sequence[str]) -> tuple[Any, dict[str, str]]:
    """The composed configuration, and the name chosen in every group."""
    from hydra import compose, initialize_config_module
    from omegaconf import open_dict

    _check_words(overrides)
    with initialize_config_module("locallearn.conf", version_base="1.3"):
        cfg = compose("config", list(overrides), return_hydra_config=True)
    choices = {group: str(name) for group, name in cfg.hydra.runtime.choices.items() if group in _GROUPS}
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, choices


def _check_words(overrides: Sequence[str]) -> None:
    for word in overrides:
        if word.startswith("-"):
            raise UsageError(f"there is no option {word}; see locallearn --help")
        key, equals, value = word.partition("=")
        if not key or not (equals or word.startswith("~")):
            raise UsageError(f"{word!r} is not a setting: write KEY=VALUE, see locallearn --help")
        if key in _GROUPS and value in ("?", "", "null"):
            raise UsageError(f"{key} is one of {', '.join(_options(key))}")


def _options(group: str) -> list[str]:
    from importlib.resources import files

    folder = files("locallearn.conf").joinpath(group)
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _keys(cfg: Any, prefix: str = "") -> list[str]:
    found: list[str] = []
    for key in cfg:
        found.append(f"{prefix}{key}")
        value = cfg._get_node(key)
        if hasattr(value, "keys") and not value._is_none():
            found += _keys(value, f"{prefix}{key}.")
    return found


def _explain(error: Exception, words: Sequence[str]) -> tuple[int, str]:
    """Exit code and one sentence for whatever went wrong."""
    if isinstance(error, UsageError):
        return 2, str(error)  # at once: what follows takes seconds to import
    from hydra.errors import HydraException, InstantiationException
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from omegaconf.errors import OmegaConfBaseException

    from locallearn.strategies.local import Diverged
    from locallearn.study.train import CHECKPOINT, Interrupted

    text = str(error).strip()
    if isinstance(error, Interrupted):
        folder = getattr(error, "run_folder", None)
        if folder is None or not (folder / CHECKPOINT).is_file():
            return 130, "interrupted before there was anything to go on from"
        return 130, f"interrupted; go on with: locallearn train resume={folder}"
    if isinstance(error, Diverged):
        return 1, text
    if isinstance(error, InstantiationException):
        return 2, _instantiation(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return 2, _configuration(error, words)
    if isinstance(error, OSError) and error.filename is not None:
        return 2, f"{error.filename} cannot be used ({error.strerror}): choose another runs_dir or data_dir"
    if isinstance(error, ValueError | FileNotFoundError | MisconfigurationException):
        return 2, _one_line(text)
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(where.filename).name}:{where.lineno}; --debug shows all"
    return 1, f"{type(error).__name__}: {_one_line(text) or 'no message'} ({place})"


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _instantiation(error: Exception) -> str:
    cause = error.__cause__
    key = re.search(r"full_key: (\S+)", str(error))
    at = f"{key.group(1)}: " if key else ""
    missing = re.search(r"No module named '([^']+)'|Requirement '([\w-]+)", str(cause))
    if missing and at == "logger: ":
        name = missing.group(1) or missing.group(2)
        return f"{at}{name} is not installed; loggers are extras: pip install 'locallearn[tensorboard,wandb,mlflow]'"
    unknown = re.search(r"unexpected keyword argument '([^']+)'", str(cause))
    if unknown:
        return f"{at}there is no setting {unknown.group(1)!r} here"
    return f"{at}{_one_line(str(cause or error))}"


def _configuration(error: Exception, words: Sequence[str]) -> str:
    """Hydra's own message as one sentence that lists the right names."""
    text = str(error)
    missing = re.search(r"Could not find '([^/']+)/([^']*)'", text)
    if missing and missing.group(1) in _GROUPS:
        group, name = missing.groups()
        return f"there is no {group} {name!r}; {group} is one of {', '.join(_options(group))}"
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        return _unknown_key(unknown.group(1), words)
    unread = getattr(error, "override", None)  # what Hydra's parser of overrides stumbled on
    if unread is not None:
        return f"{unread!r} cannot be read as KEY=VALUE: close brackets, and put text with signs in it into quotes"
    return _one_line(text.partition("full_key")[0])


def _unknown_key(key: str, words: Sequence[str]) -> str:
    """What stands beside a key that does not exist, in the groups that were chosen."""
    chosen = [word.partition(",")[0] for word in words if word.partition("=")[0] in _GROUPS]
    keys = [k for k in _keys(_compose(chosen)[0]) if not k.rpartition(".")[2].startswith("_")]
    parent, dot, last = key.rpartition(".")
    siblings = [k for k in keys if k.rpartition(".")[0] == parent] or [k for k in keys if "." not in k]
    near = get_close_matches(last, [k.rpartition(".")[2] for k in siblings], n=2, cutoff=0.7)
    if near:
        return f"there is no setting {key!r}; did you mean {' or '.join(f'{parent}{dot}{name}' for name in near)}?"
    return f"there is no setting {key!r}; there are {', '.join(siblings)}"


def _check_types(node: Any, prefix: str = "") -> None:
    """Every value below ``node`` against the signature of what its ``_target_`` makes."""
    from pkgutil import resolve_name

    for key in node:
        child = node[key]
        if not isinstance(child, dict):
            continue
        where = f"{prefix}{key}"
        target = child.get("_target_")
        if isinstance(target, str):
            try:
                made = resolve_name(target)
            except (ImportError, AttributeError, ValueError):
                continue  # making it says what is wrong with the name
            _check_arguments(made, {k: v for k, v in child.items() if not k.startswith("_")}, where)
        _check_types(child, f"{where}.")


def _check_arguments(made: Any, values: dict[str, Any], where: str) -> None:
    import inspect
    from typing import get_type_hints

    try:
        parameters = inspect.signature(made).parameters
        hints = get_type_hints(vars(made).get("__init__", made) if isinstance(made, type) else made)
    except (NameError, TypeError, ValueError):
        return  # somebody else's signature that cannot be read
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key, value in values.items():
        if key not in parameters and not open_ended:
            names = [name for name in parameters if name not in ("self", "params", "optimizer")]
            raise UsageError(f"there is no setting '{where}.{key}'; {where} has {', '.join(names)}")
        if key in hints and not isinstance(value, dict) and not _fits(value, hints[key]):
            raise UsageError(f"{where}.{key} is {value!r}, expected {_spoken(hints[key]) or hints[key]}")


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML can be what a signature asks for; true where that cannot be told."""
    from collections.abc import Iterable
    from types import UnionType
    from typing import Literal, Union, get_args, get_origin

    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in arguments)
    if origin is Literal:
        return value in arguments
    if isinstance(origin, type) and issubclass(origin, Iterable) and not issubclass(origin, dict):
        return isinstance(value, list) and all(_fits(part, arguments[0]) for part in value)
    if hint is float:
        return type(value) in (int, float)
    if hint in _WORDS:
        return type(value) is hint
    if hint is Path:
        return isinstance(value, str)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _spoken(hint: Any) -> str:
    from typing import Literal, get_args, get_origin

    if hint in _WORDS:
        return _WORDS[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(repr(part) for part in arguments)
    parts = [spoken for spoken in map(_spoken, arguments) if spoken]
    if isinstance(origin, type) and parts and issubclass(origin, Sequence):
        return f"a list, each entry {parts[0]}"
    return " or ".join(dict.fromkeys(parts))


# -- from configuration to objects -------------------------------------------------------------------------------------


def _plan(cfg: Any, choices: dict[str, str], command: str) -> Any:
    """Typed objects for one run."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from locallearn.study.train import Plan

    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    trainer = dict(config["trainer"])
    max_epochs, probe_samples, checkpoint_s = (trainer.pop(k) for k in ("max_epochs", "probe_samples", "checkpoint_s"))
    _check_numbers(cfg, max_epochs, probe_samples, checkpoint_s)
    _check_types(config)
    _check_trainer(trainer)
    for key in ("scheduler", "logger"):
        if config[key] and not isinstance(config[key], dict):
            raise UsageError(f"{key} is {config[key]!r}, expected a mapping with a _target_, or null")
    make = partial(instantiate, _convert_="all")  # library classes get lists and dicts, never OmegaConf's
    data = make(cfg.dataset)
    return Plan(
        names={group: choices[group] for group in ("algorithm", "dataset", "net", "task")},
        seed=cfg.seed,
        data=data,
        make_net=partial(make, cfg.net, input_shape=data.shape, outputs=data.classes),
        make_task=lambda net: make(cfg.task, net=net, example=data.example(), classes=data.classes),
        algorithm=make(cfg.algorithm),
        optimizer=make(cfg.optimizer),
        scheduler=make(cfg.scheduler),
        schedule=make(cfg.schedule),
        meters=list(make(cfg.meter.sources).values()),
        idle_s=cfg.meter.idle_s,
        runs_dir=_folder(cfg, "runs_dir"),
        max_epochs=max_epochs,
        trainer={str(k): v for k, v in trainer.items()},
        logger=make(cfg.logger) if cfg.logger else None,
        config={str(k): v for k, v in config.items()},
        command=command,
        mode=cfg.compare.mode,
        target_accuracy=cfg.compare.target_accuracy if cfg.compare.mode == "target" else None,
        probe_samples=probe_samples,
        checkpoint_s=checkpoint_s,
        resume=None if cfg.resume is None else _folder(cfg, "resume"),
    )


def _check_numbers(cfg: Any, max_epochs: Any, probe_samples: Any, checkpoint_s: Any) -> None:
    if type(max_epochs) is not int or max_epochs < 1:
        raise UsageError(f"trainer.max_epochs is {max_epochs}, expected a whole number of at least 1")
    if type(probe_samples) is not int or probe_samples < 0:
        raise UsageError(f"trainer.probe_samples is {probe_samples}, expected a whole number, 0 for no probes")
    if type(checkpoint_s) not in (int, float) or checkpoint_s <= 0:
        raise UsageError(f"trainer.checkpoint_s is {checkpoint_s}, expected seconds above 0")
    if type(cfg.seed) is not int or not 0 <= cfg.seed < 2**31:
        raise UsageError(f"seed is {cfg.seed}, expected a whole number from 0 to 2147483647")
    if type(cfg.meter.idle_s) not in (int, float) or cfg.meter.idle_s < 0:
        raise UsageError(f"meter.idle_s is {cfg.meter.idle_s}, expected seconds, 0 for no idle measurement")
    mode, target = cfg.compare.mode, cfg.compare.target_accuracy
    if mode not in ("own", "matched", "target"):
        raise UsageError(f"compare.mode is {mode!r}, expected own, matched or target")
    if mode == "target" and not (isinstance(target, float | int) and 0 < target <= 1):
        raise UsageError(f"compare.mode=target needs compare.target_accuracy between 0 and 1, it is {target}")


def _check_trainer(trainer: dict[str, Any]) -> None:
    """What Lightning would take, or would take for something else, but one device stepped unit by unit cannot."""
    import lightning.pytorch as pl
    import torch

    from locallearn.strategies.local import PRECISIONS

    accelerator, devices = trainer.get("accelerator"), trainer.get("devices")
    clip = trainer.get("gradient_clip_val")
    # The precision is checked here too: on a CPU Lightning quietly makes bf16 of fp16, unseen by LocalStrategy.
    for key, allowed in (("accelerator", _ACCELERATORS), ("precision", PRECISIONS)):
        if trainer.get(key) not in (None, *allowed):
            raise UsageError(f"trainer.{key} is {trainer[key]}, expected one of {', '.join(allowed)}")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UsageError(f"trainer.accelerator={accelerator}, but PyTorch sees no CUDA device here: use cpu or auto")
    if devices not in (None, 1, "auto") and not (isinstance(devices, list) and len(devices) == 1):
        raise UsageError(f"trainer.devices is {devices}, expected 1, or [0] for the first of several GPUs")
    if isinstance(clip, int | float) and clip <= 0:
        raise UsageError(f"trainer.gradient_clip_val is {clip}, expected a number above 0, or null for no clipping")
    _check_arguments(pl.Trainer, trainer, "trainer")


def _folder(cfg: Any, key: str) -> Path:
    if cfg[key] is None or not str(cfg[key]):
        raise UsageError(f"{key} is {cfg[key]!r}, expected a folder")
    return Path(str(cfg[key]))  # a name like 2026 arrives as a number


def _command(name: str, words: Sequence[str]) -> str:
    import shlex

    return shlex.join(["locallearn", name, *words])


# -- commands ----------------------------------------------------------------------------------------------------------


def _train(words: list[str]) -> int:
    if "-m" in words or "--multirun" in words:
        return _sweep([word for word in words if word not in ("-m", "--multirun")])
    cfg, choices = _resumed(words) or _compose(words)
    return _train_once(cfg, choices, words)


def _resumed(words: list[str]) -> tuple[Any, dict[str, str]] | None:
    """Configuration of the run to go on with: its own, so that nothing has to be said twice."""
    from omegaconf import OmegaConf

    from locallearn.records import load_record, recover

    named = [word.partition("=")[2] for word in words if word.startswith("resume=")]
    if not named or named[-1] in ("", "null"):
        return None
    folder = Path(named[-1])
    recover(folder.parent)
    record = load_record(folder)
    if record.status not in ("interrupted", "failed"):
        raise UsageError(f"{folder} is {record.status}: only an interrupted or failed run can be resumed")
    cfg = OmegaConf.create(dict(record.data["config"]))
    allowed = (
        "resume=",
        "runs_dir=",
        "data_dir=",
        "trainer.max_epochs=",
        "trainer.accelerator=",
        "trainer.checkpoint_s=",
    )
    for word in words:
        if not word.startswith(allowed):
            raise UsageError(
                f"{word!r} cannot be changed on resume: the run goes on with its own settings; only "
                f"{', '.join(a.rstrip('=') for a in allowed)} can be given"
            )
        cfg.merge_with_dotlist([word])
    return cfg, {group: str(record.data.get(group)) for group in _GROUPS}


def _train_once(cfg: Any, choices: dict[str, str], words: Sequence[str]) -> int:
    from rich.console import Console

    from locallearn.records import load_record
    from locallearn.study.train import run

    plan = _plan(cfg, choices, _command("train", words))
    with _progress() as show:
        plan.progress = partial(show, f"{choices['algorithm']} seed {cfg.seed}")
        folder = run(plan)
    record = load_record(folder)
    accuracy = record.data["test"]["accuracy"]
    Console(stderr=True).print(
        f"{choices['algorithm']} on {choices['dataset']}: test accuracy {accuracy:.4f}, "
        f"{record.data['cost']['train_s']:.1f} s of training"
    )
    print(folder)
    return 0


def _sweep(words: list[str]) -> int:
    """``train -m``: Hydra's own sweeper and launcher call one run per combination."""
    import tempfile

    import hydra
    from omegaconf import OmegaConf

    from locallearn.study.train import Interrupted

    _check_words(words)
    codes: list[int] = []

    @hydra.main(config_path="pkg://locallearn.conf", config_name="config", version_base="1.3")
    def job(cfg: Any) -> None:
        from hydra.core.hydra_config import HydraConfig

        runtime = HydraConfig.get()
        choices = {group: str(name) for group, name in runtime.runtime.choices.items() if group in _GROUPS}
        cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
        try:
            codes.append(_train_once(cfg, choices, list(runtime.overrides.task)))
        except Interrupted as error:
            raise KeyboardInterrupt from error  # anything less Hydra keeps to itself until the sweep is over
        except Exception as error:  # one bad combination must not end the sweep
            code, sentence = _explain(error, runtime.overrides.task)
            print(f"locallearn: {sentence}", file=sys.stderr)
            codes.append(code)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them
    with tempfile.TemporaryDirectory() as aside:  # for a file that the sweeper leaves where it runs
        sys.argv = ["locallearn", "--multirun", f"hydra.sweep.dir={aside}", *words]
        try:
            job()
        except KeyboardInterrupt as stop:
            raise stop.__cause__ or stop from None
    return max(codes, default=0)


def _compare(words: list[str]) -> int:
    from rich.console import Console

    from locallearn.records import load_record, rebuild_index, recover
    from locallearn.report import terminal_table, write_report
    from locallearn.study.compare import compare
    from locallearn.study.train import check

    base, _ = _compose(words)
    algorithms, seeds, overrides = base.compare.algorithms, base.compare.seeds, base.compare.overrides or {}
    _check_compare(algorithms, seeds, overrides)
    if base.resume is not None:
        raise UsageError("resume goes with train: locallearn train resume=FOLDER")
    runs_dir = _folder(base, "runs_dir")
    recover(runs_dir)
    plans = []
    for seed in seeds:  # A B A B: heat and neighbours weigh on all algorithms alike
        for name in algorithms:
            own = list(overrides.get(name, []))
            matched = ["schedule.patience=null"] if base.compare.mode == "matched" else []
            cfg, choices = _compose([*words, f"algorithm={name}", f"seed={seed}", *matched, *own])
            plans.append((f"{name} seed {seed}", partial(_plan, cfg, choices, _command("compare", words))))
    for _, make in plans[: len(algorithms)]:
        check(make())  # a mistake in the settings is told before anything is trained
    with _progress() as show:
        folders, problems = compare(plans, show)
    records = [load_record(folder) for folder in folders]
    rebuild_index(runs_dir)
    Console().print(terminal_table(records))
    report = Path(base.compare.report or runs_dir / "report.html")
    write_report(records, report, title="locallearn compare")
    for problem in problems:
        print(f"locallearn: {problem}", file=sys.stderr)
    print(report)
    return 1 if problems else 0


def _tune(words: list[str]) -> int:
    from rich.console import Console
    from rich.table import Table

    from locallearn.study.train import Interrupted, check
    from locallearn.study.tune import study_name, tune

    base, chosen = _compose(words)
    algorithms = base.tune.algorithms
    _check_compare(algorithms, [0], {})
    if type(base.tune.trials) is not int or base.tune.trials < 1:
        raise UsageError(f"tune.trials is {base.tune.trials}, expected a whole number of at least 1")
    if base.resume is not None:
        raise UsageError("resume goes with train; an interrupted search goes on when tune is called again")
    space = _space(base.tune.space)
    fixed = [
        word for word in words if not word.startswith(("tune.trials=", "tune.algorithms=", "runs_dir=", "data_dir="))
    ]
    runs_dir = _folder(base, "runs_dir")

    def make(algorithm: str, settings: Sequence[str]) -> Any:
        cfg, choices = _compose([*words, f"algorithm={algorithm}", *settings])
        # Trials have a folder of their own: a report on runs_dir must not mix them with what they were searched for.
        cfg.runs_dir = str(runs_dir / "tune")
        return _plan(cfg, choices, _command("tune", words))

    for name in algorithms:  # a mistake in the settings is told before anything is trained
        check(make(name, [f"{key}={wanted.low!r}" for key, wanted in space.items()]))
    try:
        with _progress() as show:
            found = tune(
                list(algorithms),
                make,
                space,
                base.tune.trials,
                runs_dir / "tune.sqlite",
                study_name(chosen["dataset"], chosen["net"], fixed),
                show=show,
            )
    except Interrupted:
        print("locallearn: interrupted; the same command goes on where the search stopped", file=sys.stderr)
        return 130
    table = Table(title=f"best of {base.tune.trials} trials each, by validation accuracy", title_justify="left")
    for heading in ("algorithm", "trials", "validation accuracy", "settings"):
        table.add_column(heading, overflow="fold")
    for best in found:
        table.add_row(best.algorithm, str(best.trials), f"{best.accuracy:.4f}", " ".join(best.settings))
    Console().print(table)
    kept = ",".join(best.algorithm + ":[" + ",".join(f'"{s}"' for s in best.settings) + "]" for best in found)
    print(f"to compare them: locallearn compare ... 'compare.overrides={{{kept}}}'")
    return 0


def _space(given: Any) -> dict[str, Any]:
    """Ranges to search, by setting."""
    from collections.abc import Mapping

    from locallearn.study.tune import Range

    space = {"optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}} if given is None else given
    if not isinstance(space, Mapping) or not space:
        raise UsageError(f"tune.space is {space}, expected ranges by setting: {{optimizer.lr:{{low:1e-4,high:1e-2}}}}")
    for key, ends in space.items():
        if not isinstance(ends, Mapping) or not {"low", "high"} <= set(ends) <= {"low", "high", "log"}:
            raise UsageError(f"tune.space.{key} is {ends}, expected {{low:NUMBER,high:NUMBER,log:true}}")
        _check_arguments(Range, dict(ends), f"tune.space.{key}")
    return {str(key): Range(**ends) for key, ends in space.items()}


def _check_compare(algorithms: Any, seeds: Any, overrides: Any) -> None:
    from collections.abc import Mapping

    known = _options("algorithm")
    if not _distinct(algorithms, str):
        raise UsageError(
            f"the algorithms to compare are {algorithms}, expected a list with every one once: [backprop,...]"
        )
    for name in algorithms:
        if name not in known:
            raise UsageError(f"there is no algorithm {name!r}; algorithm is one of {', '.join(known)}")
    if not _distinct(seeds, int):
        raise UsageError(f"compare.seeds is {seeds}, expected different whole numbers: a repeated seed is no spread")
    if not isinstance(overrides, Mapping) or any(isinstance(own, str) for own in overrides.values()):
        raise UsageError(
            f'compare.overrides is {overrides}, expected lists by algorithm: {{backprop: ["optimizer.lr=1e-3"]}}'
        )
    for name in overrides:
        if name not in algorithms:
            raise UsageError(f"compare.overrides names {name!r}, which is not in compare.algorithms")


def _distinct(values: Any, kind: type) -> bool:
    if not isinstance(values, Sequence) or isinstance(values, str):
        return False
    return len(values) == len(set(values)) > 0 and all(type(value) is kind for value in values)


def _report(words: list[str]) -> int:
    from locallearn.records import rebuild_index, recover, scan
    from locallearn.report import write_report

    folders = [word for word in words if "=" not in word and not word.startswith("-")]
    cfg, _ = _compose([word for word in words if word not in folders])
    roots = [Path(str(f)) for f in folders or cfg.report.records or [_folder(cfg, "runs_dir")]]
    for root in roots:
        if not root.is_dir():
            raise UsageError(f"there is no folder {root} to read records from")
        if os.access(root, os.W_OK):
            recover(root)
    found = scan(roots)
    if not found.records:
        raise UsageError("; ".join([f"there are no records in {', '.join(map(str, roots))}", *found.problems[:1]]))
    if os.access(roots[0], os.W_OK) and not folders and not cfg.report.records:
        rebuild_index(roots[0])
    out = Path(cfg.report.out or roots[0] / "report.html")
    print(write_report(found.records, out, title=cfg.report.title, problems=found.problems))
    return 0


def _audit(words: list[str]) -> int:
    import torch
    from rich.console import Console
    from rich.table import Table

    from locallearn.audit import audit
    from locallearn.batch import Batch

    cfg, choices = _compose(words)
    plan = _plan(cfg, choices, _command("audit", words))
    torch.manual_seed(plan.seed)
    task = plan.make_task(plan.make_net())
    task.use(plan.algorithm)
    generator = torch.Generator().manual_seed(plan.seed)
    inputs = torch.rand(64, *plan.data.shape, generator=generator)
    labels = torch.randint(plan.data.classes, (64,), generator=generator)
    batch = Batch(inputs, labels)
    # A fresh network may be where a loss is so sure that its gradient underflows, which would hide what it depends on.
    optimizers = {unit: plan.optimizer(groups) for unit, groups in plan.algorithm.units().items()}
    for _ in range(50):
        for update in plan.algorithm.updates(batch):  # graphs are kept, since a rule that lies walks them twice
            update.backward(partial(torch.autograd.backward, retain_graph=True))
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
    result = audit(plan.algorithm, batch)
    table = Table(title=f"{choices['algorithm']} on {choices['net']}", title_justify="left")
    for heading in ("unit", "weights", "gradient reaches", "changes with later", "backward calls"):
        table.add_column(heading, justify="right" if heading in ("weights", "backward calls") else "left")
    for unit in result.units:
        table.add_row(
            unit.unit,
            f"{unit.parameters:,}",
            ", ".join(unit.reaches) or "itself only",
            ", ".join(unit.depends_on_later) or "nothing",
            str(unit.backward_calls),
        )
    console = Console()
    console.print(table)
    console.print(f"broadcast to all blocks: {result.broadcast}", highlight=False)
    word = "confirmed" if result.confirmed else "REFUTED"
    console.print(f"claim: {result.claim}: {word}; {result.reason}", highlight=False)
    return 0 if result.confirmed else 1


def _bench(words: list[str]) -> int:
    from rich.console import Console

    from locallearn.study.bench import bench

    cfg, _ = _compose(words)
    what, algorithms, depths = str(cfg.bench.what), cfg.bench.algorithms, cfg.bench.depths
    _check_compare(algorithms, [0], {})
    if isinstance(depths, str) or not isinstance(depths, Sequence):
        raise UsageError(f"bench.depths is {depths}, expected a list of numbers of blocks: [4,32]")

    def make(name: str, *more: str) -> Any:
        composed, choices = _compose([*words, f"algorithm={name}", "meter=none", *more])
        return _plan(composed, choices, _command("bench", words))

    table, folder = bench(what, list(algorithms), make, cfg.bench.rounds, cfg.bench.steps, list(depths))
    Console().print(table)
    print(folder)
    return 0


def _data(words: list[str]) -> int:
    from rich.console import Console
    from rich.table import Table

    from locallearn.tasks.images import data_status, default_data_dir

    cfg, _ = _compose(words)
    folder = default_data_dir() if cfg.data_dir is None else _folder(cfg, "data_dir").expanduser()
    table = Table(title=f"data sets in {folder}", title_justify="left")
    for heading in ("dataset", "here", "files", "in"):
        table.add_column(heading, overflow="fold")
    for row in data_status(folder):
        place = "" if row.path is None else str(row.path.relative_to(folder))
        table.add_row(row.name, "yes" if row.present else "no", ", ".join(row.files) or "come with scikit-learn", place)
    Console().print(table)
    return 0


# -- terminal ----------------------------------------------------------------------------------------------------------


class _progress:  # noqa: N801 - used like a function
    """One line per run that moves with its epochs; plain and silent where there is no terminal."""

    def __enter__(self) -> Callable[[str, int, int, dict[str, float]], None]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        self._plain = not console.is_terminal
        self._last = ("", 0.0)
        self._bars: dict[str, Any] = {}
        self._progress = Progress(
            TextColumn("{task.description:<32}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[accuracy]}"),
            TimeElapsedColumn(),
            console=console,
            disable=self._plain,
        )
        self._progress.start()
        return self._show

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _show(self, name: str, epoch: int, epochs: int, metrics: dict[str, float]) -> None:
        accuracy = f"validation {metrics.get('validation/accuracy', float('nan')):.4f}"
        if self._plain:
            if name == self._last[0] and time.monotonic() - self._last[1] < 2:
                return  # a log file wants signs of life, not every epoch of a quick run
            self._last = (name, time.monotonic())
            print(f"{name}: epoch {epoch} of at most {epochs}, {accuracy}", file=sys.stderr, flush=True)
            return
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name, total=epochs, accuracy="")
        self._progress.update(self._bars[name], completed=epoch, total=epochs, accuracy=accuracy)


def _completion(words: list[str]) -> int:
    """Hand shell completion to Hydra, without the subcommand, which Hydra does not know."""
    import hydra

    line = os.environ.get("COMP_LINE", "")
    parts = line.split(" ")
    commands = ("train", "compare", "tune", "report", "audit", "bench", "data")
    if any("query" in word for word in words):
        if len(parts) <= 2:
            print(" ".join(c for c in commands if c.startswith(parts[-1] if len(parts) == 2 else "")))
            return 0
        os.environ["COMP_LINE"] = " ".join([parts[0], *parts[2:]])

    @hydra.main(config_path="pkg://locallearn.conf", config_name="config", version_base="1.3")
    def job(cfg: Any) -> None:
        """Never called: completion ends before."""

    sys.argv = ["locallearn", *words]
    job()
    return 0


if __name__ == "__main__":
    sys.exit(main())
