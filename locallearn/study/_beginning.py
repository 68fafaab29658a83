"""Weights that a training begins with, out of an earlier run: to tune a network further, or to fit a readout on its body."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from locallearn.nets.blocks import Blocks
from locallearn.nets.weights import digest
from locallearn.study._tensors import read_tensors
from locallearn.study.plan import MODEL


@dataclass(frozen=True)
class Beginning:
    """What a training began with, as its record keeps it.

    Attributes:
        run: id of the run that the weights are from; ``None`` where no record lies beside them.
        weights: SHA-256 of that run's network, names, shapes and bytes: what tells this beginning from others.
        drawn: why the readout was left as it was drawn; ``None`` where it was copied, too.
    """

    run: str | None
    weights: str
    drawn: str | None = None

    @property
    def told(self) -> str | None:
        """What has to be said of it."""
        if self.drawn is None:
            return None
        return f"the readout begins as it is drawn, not with the weights of init_from: {self.drawn}"

    def to_dict(self) -> dict[str, Any]:
        """As a record has it."""
        return {"run": self.run, "weights": self.weights, "drawn": self.drawn}

    @classmethod
    def from_dict(cls, known: Any) -> Beginning | None:
        """Out of a record; ``None`` where it has none."""
        if not isinstance(known, Mapping) or not isinstance(known.get("weights"), str):
            return None
        return cls(known.get("run"), known["weights"], known.get("drawn"))


def begin_with(net: Blocks, run: Path) -> Beginning:
    """Copy the weights and buffers of an earlier run's network into this one.

    A readout whose weights have other shapes keeps those that were drawn: the classes may be other ones. What the earlier
    rule had added (heads, feedback) stays behind.

    Args:
        net: made for this run; written in place.
        run: folder of a finished run, or its ``model.pt``.

    Raises:
        ValueError: there is no such model, or a block's weights do not fit; ``net`` is then as it was.
    """
    file = model_behind(run)
    theirs = _kept(run, file)
    beginning = Beginning(_id_beside(file), digest(_tensors(theirs)))
    ours = net.state_dict()
    last = _names_of(net, net.readout)
    unfit = _difference({name: ours[name] for name in last}, theirs)
    if unfit is not None:
        beginning = Beginning(beginning.run, beginning.weights, unfit)
        theirs = {name: value for name, value in theirs.items() if name not in last}
        ours = {name: value for name, value in ours.items() if name not in last}
    problem = _difference(ours, theirs) or _more(ours, theirs)
    if problem is not None:
        raise ValueError(
            f"init_from is {run}, whose network is another one: {problem}; give the same net= and its settings"
        )
    net.load_state_dict(theirs, strict=False)
    return beginning


def model_behind(run: Path) -> Path:
    """The model that a folder of a run, or a file, stands for.

    Raises:
        ValueError: there is none.
    """
    file = run / MODEL if run.is_dir() else run
    if not file.is_file():
        raise ValueError(
            f"init_from is {run}, and there is no {file}: name the folder of a finished run that kept its model "
            "(keep_model=true)"
        )
    return file


def weights_behind(run: Path) -> str:
    """Digest of the weights that :func:`begin_with` would begin with.

    Raises:
        ValueError: there is no such model.
    """
    file = model_behind(run)
    state = file.stat()
    return _digest_of(run, file.resolve(), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=64)  # a comparison asks for every run
def _digest_of(run: Path, file: Path, size: int, modified: int) -> str:
    return digest(_tensors(_kept(run, file)))


def _kept(run: Path, file: Path) -> dict[str, Any]:
    """The network's state in a kept model."""
    model = read_tensors(file)
    kept = model.get("state_dict") if isinstance(model, dict) else None
    if not isinstance(kept, dict):
        raise ValueError(f"init_from is {run}, and {file} holds no model that a run of locallearn has kept")
    return {name.removeprefix("net."): value for name, value in kept.items() if name.startswith("net.")}


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in sorted(state.items()) if isinstance(value, Tensor)}


def _id_beside(file: Path) -> str | None:
    """The id in the record beside a model, whatever else that holds."""
    try:
        known = json.loads((file.parent / "record.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return None
    found = known.get("id") if isinstance(known, dict) else None
    return found if isinstance(found, str) else None


def _names_of(net: Blocks, module: nn.Module | None) -> list[str]:
    """Names in the network's state of what belongs to one of its modules."""
    places = [f"{name}." for name, part in net.named_modules() if part is module]
    return [name for name in net.state_dict() if name.startswith(tuple(places))]


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The first thing of ours that theirs has not, in words."""
    for name, value in ours.items():
        said = name.removeprefix("members.")
        if name not in theirs:
            return f"it has no {said}"
        if isinstance(value, Tensor) and (not isinstance(theirs[name], Tensor) or theirs[name].shape != value.shape):
            there = tuple(theirs[name].shape) if isinstance(theirs[name], Tensor) else type(theirs[name]).__name__
            return f"{said} is {there} there and {tuple(value.shape)} here"
    return None


def _more(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The first thing of theirs that ours has not, in words."""
    more = sorted(theirs.keys() - ours.keys())
    return f"it has {more[0].removeprefix('members.')}, too" if more else None
