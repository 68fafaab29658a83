"""Weights that a training begins with, out of an earlier run: to tune a network further, or to fit a readout on its body."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from locallearn.nets.blocks import Blocks
from locallearn.study.plan import MODEL


def begin_with(net: Blocks, run: Path) -> None:
    """Copy the weights and buffers of an earlier run's network into this one.

    A readout whose weights have other shapes keeps those that were drawn: the classes may be other ones. What the earlier
    rule had added (heads, feedback) stays behind.

    Args:
        net: made for this run; written in place.
        run: folder of a finished run, or its ``model.pt``.

    Raises:
        ValueError: there is no such model, or a block's weights do not fit; ``net`` is then as it was.
    """
    file = run / MODEL if run.is_dir() else run
    if not file.is_file():
        raise ValueError(
            f"init_from is {run}, and there is no {file}: name the folder of a finished run that kept its model "
            "(keep_model=true)"
        )
    model = read_tensors(file)
    kept = model.get("state_dict") if isinstance(model, dict) else None
    if not isinstance(kept, dict):
        raise ValueError(f"init_from is {run}, and {file} holds no model that a run of locallearn has kept")
    theirs = {name.removeprefix("net."): value for name, value in kept.items() if name.startswith("net.")}
    ours = net.state_dict()
    if not _readout_fits(net, ours, theirs):
        last = _names_of(net, net.readout)
        theirs = {name: value for name, value in theirs.items() if name not in last}
        ours = {name: value for name, value in ours.items() if name not in last}
    problem = _difference(ours, theirs)
    if problem is not None:
        raise ValueError(
            f"init_from is {run}, whose network is another one: {problem}; give the same net= and its settings"
        )
    net.load_state_dict(theirs, strict=False)


def read_tensors(path: Path) -> Any:
    """What ``torch.save`` wrote, if it is tensors and plain values: nobody's code is run.

    Raises:
        ValueError: it is anything else, or damaged.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # what is no archive can fail in any way; PyTorch's advice is not passed on
            raise ValueError(
                f"{path} cannot be read: it is empty, cut short, or holds something else than tensors, numbers and text "
                f"({type(error).__name__})"
            ) from error


def _names_of(net: Blocks, module: nn.Module | None) -> set[str]:
    """Names in the network's state of what belongs to one of its modules."""
    if module is None:
        return set()
    inside = {id(value) for value in module.state_dict(keep_vars=True).values()}
    return {name for name, value in net.state_dict(keep_vars=True).items() if id(value) in inside}


def _readout_fits(net: Blocks, ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return all(
        name in theirs and isinstance(theirs[name], Tensor) and theirs[name].shape == ours[name].shape
        for name in _names_of(net, net.readout)
        if isinstance(ours[name], Tensor)
    )


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """The first thing in which two states differ, in words."""
    for name, value in ours.items():
        said = name.removeprefix("members.")
        if name not in theirs:
            return f"it has no {said}"
        if isinstance(value, Tensor) and (not isinstance(theirs[name], Tensor) or theirs[name].shape != value.shape):
            there = tuple(theirs[name].shape) if isinstance(theirs[name], Tensor) else type(theirs[name]).__name__
            return f"{said} is {there} there and {tuple(value.shape)} here"
    more = sorted(theirs.keys() - ours.keys())
    return f"it has {more[0].removeprefix('members.')}, too" if more else None
