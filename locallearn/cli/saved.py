"""Runs that have been: found again, and what they trained built anew."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from locallearn.cli.plans import make_plan
from locallearn.cli.settings import GROUPS, UsageError, check_words, compose_settings
from locallearn.cli.trust import check_trusted


def reindexed(runs_dir: Path) -> None:
    """Rebuild the index, which is only a cache: that it cannot be written costs nobody a table or a page."""
    from locallearn.records import rebuild_index

    try:
        rebuild_index(runs_dir)
    except OSError as error:
        print(f"locallearn: the index could not be written ({error.strerror}): {error.filename}", file=sys.stderr)


def recovered(runs_dir: Path) -> None:
    """Adopt the folders of killed runs; say which could not be."""
    from locallearn.records import recover

    recover(runs_dir, lambda sentence: print(f"locallearn: {sentence}", file=sys.stderr))


def run_folder(given: str | Path) -> Path:
    """The folder of a run that has ended, named in any way; that of a killed run gets its final name first.

    Raises:
        UsageError: there is no such run, or it is still going on.
    """
    from locallearn.records import CHECKPOINT, recover
    from locallearn.study.plan import MODEL

    folder = Path(given).expanduser()
    if folder.name in ("record.json", CHECKPOINT, MODEL):
        folder = folder.parent
    if folder.name in ("", ".."):
        folder = folder.resolve()
    final = folder.parent / folder.name.removeprefix(".").removesuffix(".part")
    part = final.parent / f".{final.name}.part"
    told: list[str] = []
    recover(final.parent, told.append)
    if final.is_dir():
        return final
    if part.exists():
        why = [sentence for sentence in told if sentence.startswith(f"{part} ")]
        raise UsageError(
            why[0] if why else f"{part} is still going on in another process: wait for it, or stop it first"
        )
    raise UsageError(f"there is no folder {final} with a record.json: name the folder of a run, as train printed it")


def asked_of(command: str, words: Sequence[str]) -> tuple[list[str], Any, dict[str, Any]]:
    """The runs that the words of a command name, the composed settings, and what :func:`load` is to be told.

    Raises:
        UsageError: a word is a setting that a finished run has already.
    """
    runs = [word for word in words if ("=" not in word and not word.startswith("-")) or Path(word).is_dir()]
    places, own, device = [], [], False
    for word in words:
        if word in runs or word == "--trust":
            continue
        check_words([word])
        if word.startswith(PLACES):
            places.append(word)
        elif word.startswith((f"{command}.", "trainer.accelerator=")):
            own.append(word)
            device = device or word.startswith("trainer.")
        else:
            settings = ", ".join(f"{command}.{key}" for key in compose_settings([])[0][command])
            raise UsageError(
                f"{word!r} cannot be changed for {command}: a run has its own settings; only {settings}, data_dir, "
                "dataset.path and trainer.accelerator can be given"
            )
    cfg = compose_settings(own)[0]
    given = {"trust": "--trust" in words, "places": read_places(places)}
    return runs, cfg, {**given, "accelerator": cfg.trainer.accelerator if device else None}


PLACES = ("data_dir=", "dataset.path=")
"""Settings that say where the data of a run are: all that may have changed about them."""


def read_places(words: Sequence[str]) -> dict[str, Any]:
    """Places by setting."""
    from omegaconf import OmegaConf

    cfg = OmegaConf.from_dotlist(list(words))
    found = {key: OmegaConf.select(cfg, key) for key in (word.partition("=")[0] for word in words)}
    return {key: None if place is None else str(place) for key, place in found.items()}


def saved_settings(record: Any, trust: bool, places: Mapping[str, Any]) -> tuple[Any, dict[str, str]]:
    """The settings of a run, found harmless or vouched for, and the name chosen in every group.

    Settings that have come into being since the run have their defaults. A graph's file that was named by a relative path
    is looked for where the run was started, then here.

    Args:
        record: of the run.
        trust: build whatever they name.
        places: ``data_dir``, ``runs_dir`` and ``dataset.path``, as far as they are given anew.

    Raises:
        UsageError: there are none, they ask for something that a record may not, or a file that they name is gone.
    """
    from omegaconf import OmegaConf

    config = record.data.get("config")
    if not isinstance(config, Mapping) or not config:
        raise UsageError(
            f"the record in {record.path} holds no settings (a run made in Python has none): build its task there, and load "
            "the state_dict of model.pt into it"
        )
    check_trusted(config, str(record.path), trust)
    defaults = OmegaConf.to_container(compose_settings([])[0], resolve=True)
    assert isinstance(defaults, dict)
    whole = {**defaults, **config}
    for key in ("trainer", "compare", "meter", "schedule"):
        if not isinstance(whole[key], Mapping):
            raise UsageError(f"the settings of {record.path} have {key}: {whole[key]!r}, expected a mapping")
        if key != "meter":
            whole[key] = {**defaults[key], **whole[key]}
    missing = [key for key in ("algorithm", "dataset", "net", "task", "optimizer") if key not in config]
    if missing:
        raise UsageError(f"the settings of {record.path} lack {', '.join(missing)}: the record is damaged")
    cfg = OmegaConf.create(whole)
    _find_file(cfg, record)
    for key, place in places.items():
        move(cfg, key, place)
    file = _file(cfg)
    ours = str(cfg.dataset.get("_target_")).startswith("locallearn.") if file is not None else False
    if file is not None and ours and not file.exists():  # a path of somebody else's data may be anything
        raise UsageError(
            f"the data of {record.path} come from {str(file)!r}, and there is no such file: say where it is with "
            "dataset.path=FILE (in Python data_path=FILE)"
        )
    return cfg, {group: str(record.data.get(group)) for group in GROUPS}


def _file(cfg: Any) -> Path | None:
    """The file that the data are read from, where the user has named one."""
    named = cfg.dataset.get("path") if hasattr(cfg.dataset, "get") else None
    return None if named is None else Path(str(named)).expanduser()


def _find_file(cfg: Any, record: Any) -> None:
    """Have a relative name lead to the file that lay there where the run was started, wherever this is called."""
    file, start = _file(cfg), _started_in(record, Path(str(cfg.runs_dir)).expanduser())
    if file is None or file.is_absolute() or start is None:
        return
    there = start / file
    if there.exists() and not (file.exists() and file.samefile(there)):
        cfg.dataset.path = os.path.relpath(there)


def _started_in(record: Any, runs_dir: Path) -> Path | None:
    """The folder that a run was started in, which no record holds: as told by where the run lies, if that was relative."""
    folder: Path = record.path.absolute().parent
    if runs_dir.is_absolute() or ".." in runs_dir.parts:
        return None
    for part in reversed(runs_dir.parts):
        if folder.name != part:
            return None
        folder = folder.parent
    return folder


def move(cfg: Any, key: str, place: Any) -> None:
    """Give a place of settings that are resolved already, ``data_dir`` and ``runs_dir`` with what was taken from it.

    Raises:
        UsageError: the data were not read from a file.
    """
    if key == "dataset.path":
        if _file(cfg) is None:
            raise UsageError(
                "dataset.path says where a file of one's own is now, and the data of this run come from none: leave it out, or "
                "give data_dir"
            )
        if place is None:
            raise UsageError("dataset.path is null, expected the file that the data come from")
        cfg.dataset.path = place
        return
    before = cfg[key]
    cfg[key] = place
    for group, name in (("dataset", "data_dir"), ("logger", "save_dir")):
        if cfg.get(group) and name in cfg[group] and cfg[group][name] == before:
            cfg[group][name] = place


class Saved:
    """What a finished run trained, as it was at the end.

    Attributes:
        record: the run's record.
        task: the LightningModule, with its network and the algorithm attached.
        algorithm: the learning rule, whose own inference :meth:`predict` uses.
        net: the network.
        data: the data module of the run.
        plan: everything the run was made of; :func:`locallearn.study.train.run` would train it anew.
    """

    def __init__(self, record: Any, plan: Any, task: Any, trainer: Any) -> None:
        self.record = record
        self.plan = plan
        self.task = task
        self.trainer = trainer
        self.algorithm = plan.algorithm
        self.net = task.net
        self.data = plan.data

    def predict(self, inputs: Any = None, *context: Any) -> Any:
        """Outputs by the rule's own inference, e.g. class scores ``(N, C)``, on the device that the task is on.

        Where pairs of nodes are scored, these are the nodes' embeddings, and ``task(inputs, edges, pairs)`` scores pairs.

        Args:
            inputs: what the network takes, ``(N, *shape)``, a tensor or an array, normalised as the run's data are; ``None``
                with a graph: the run's own, whole.
            context: what every block gets beside them, e.g. the edges of a graph ``(2, E)``; of a graph its own by default.

        Raises:
            ValueError: the inputs have another shape than the run's data.
        """
        import torch

        from locallearn.precision import multiplying

        known = self.task.info().example
        if inputs is None:
            if not known.context:
                raise ValueError("there is nothing to predict: give inputs, or use locallearn predict for the test set")
            inputs = known.inputs
        inputs = torch.as_tensor(inputs)
        if inputs.shape[1:] != known.inputs.shape[1:] or inputs.ndim == 0:
            wanted = ", ".join(map(str, known.inputs.shape[1:]))
            raise ValueError(f"the inputs have shape {tuple(inputs.shape)}, expected (N, {wanted})")
        if known.inputs.is_floating_point() and not inputs.is_floating_point():
            raise ValueError(
                f"the inputs are {inputs.dtype}, expected floating point numbers, normalised as the run's data are"
            )
        infer = getattr(self.task, "infer", self.algorithm.predict)  # a task of one's own may have none
        device = self.task.device
        context = context or known.context
        rows = [inputs] if context else inputs.split(1000)  # of a graph every node needs the others
        plugin = self.trainer.precision_plugin
        self.task.eval()
        with torch.no_grad(), multiplying(self.plan.matmul_precision), plugin.val_step_context():
            moved = [
                plugin.convert_input(part.to(device) if isinstance(part, torch.Tensor) else part) for part in context
            ]
            given = [part.to(device, known.inputs.dtype) for part in rows]
            return torch.cat([infer(plugin.convert_input(part), *moved) for part in given])


def load(
    run: str | Path,
    *,
    trust: bool = False,
    places: Mapping[str, Any] | None = None,
    accelerator: str | None = "cpu",
) -> Saved:
    """What a finished run trained, from the run's folder.

    Args:
        run: the folder, as ``train`` printed it.
        trust: build whatever the record's settings name (:mod:`locallearn.cli.trust` has what is built without).
        places: where the data are here, by setting: ``data_dir``, ``dataset.path``; those left out: where they were.
        accelerator: where predictions are made, as ``trainer.accelerator``; ``None``: where the run was, if that is here.

    Raises:
        UsageError: there is no such run, or its record asks for something that it may not.
        ValueError: the run keeps no model, or the model does not fit its settings.
    """
    from locallearn.records import load_record
    from locallearn.study.plan import MODEL
    from locallearn.study.train import read_tensors

    folder = run_folder(run)
    record = load_record(folder)
    if record.status != "done":
        raise UsageError(f"{folder} is {record.status}, and only a finished run keeps its model")
    if not (folder / MODEL).is_file():
        raise UsageError(
            f"{folder} holds no {MODEL}: the run was made with keep_model=false, or before models were kept"
        )
    model = read_tensors(folder / MODEL)
    if not isinstance(model, dict) or model.get("format") != 1 or not isinstance(model.get("state_dict"), dict):
        raise ValueError(f"{folder / MODEL} holds no model that a run of locallearn has kept")
    plan, task, trainer = build(record, trust, places or {}, accelerator)
    try:
        task.load_state_dict(model["state_dict"])
        plan.algorithm.train_only(None if model["active"] is None else frozenset(model["active"]))
    except Exception as error:
        raise ValueError(
            f"{folder / MODEL} does not fit what the run's settings build: {' '.join(str(error).split())}"
        ) from error
    return Saved(record, plan, task.eval(), trainer)


def build(
    record: Any, trust: bool, places: Mapping[str, Any], accelerator: str | None, begun: bool = False
) -> tuple[Any, Any, Any]:
    """The plan of a run, its task with weights as its seed draws them, and a Trainer, on the device asked for.

    Args:
        record: of the run.
        trust: see :func:`load`.
        places: see :func:`load`.
        accelerator: see :func:`load`.
        begun: have the weights that training began with, out of ``init_from`` where it did not begin with drawn ones.

    Raises:
        UsageError: the model that training began with is not there any more.
    """
    import lightning.pytorch as pl
    import torch

    from locallearn.strategies import LocalStrategy
    from locallearn.study.train import attached_task, quiet

    cfg, choices = saved_settings(record, trust, places)
    # Nothing is logged or metered here, and the machine may be another one.
    cfg.logger, cfg.meter, cfg.resume = None, {"idle_s": 0, "sources": {}}, None
    cfg.init_from = str(_beginning(cfg, record)) if begun and cfg.init_from is not None else None
    asked = accelerator or str(cfg.trainer.accelerator)
    here = asked not in ("gpu", "cuda", "mps") or torch.cuda.is_available() or torch.backends.mps.is_available()
    cfg.trainer.accelerator, cfg.trainer.devices = asked if accelerator or here else "cpu", 1
    with torch.random.fork_rng(devices=[]), quiet():
        plan = make_saved_plan(cfg, choices, record)
        plan.say = None  # the run has said it
        task = attached_task(plan)
        trainer = pl.Trainer(
            strategy=LocalStrategy(plan.algorithm, plan.optimizer),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **plan.trainer,
        )
        task = trainer.precision_plugin.convert_module(task).to(trainer.strategy.root_device)
    return plan, task, trainer


def _beginning(cfg: Any, record: Any) -> Path:
    """The model that a run began with: where it was named, from there or from here, or beside the run under its own id.

    Raises:
        UsageError: it is not there any more, or another one is there in its place.
    """
    from locallearn.study.train import weights_behind

    named, known = Path(str(cfg.init_from)).expanduser(), record.part("beginning")
    start = _started_in(record, Path(str(cfg.runs_dir)).expanduser())
    places = [*([] if start is None else [start / named]), named]
    if isinstance(known.get("run"), str):
        places.append(record.path.parent / Path(known["run"]).name)
    others = 0
    for place in places:
        try:
            weights = weights_behind(place)
        except (ValueError, OSError):
            continue
        if known.get("weights") in (None, weights):  # an older record does not say which they were
            return place
        others += 1
    raise UsageError(
        f"{record.path} began with the weights of {named}, and "
        + ("other weights are there now" if others else "they are not there any more")
        + ": put the folder of that run back where it was, or beside this run under its own name"
    )


def make_saved_plan(cfg: Any, choices: dict[str, str], record: Any) -> Any:
    """The plan of a run's own settings; what is wrong with them is the record's fault."""
    try:
        return make_plan(cfg, choices, record.text("command") or "")
    except (KeyError, AttributeError, TypeError) as error:
        raise UsageError(f"the settings of {record.path} are damaged ({type(error).__name__}: {error})") from error
