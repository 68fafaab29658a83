"""Students in files: what replaces which layer, as tensors and plain values; the rest of the network is the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from locallearn.distillation._fit import Fit, Recipe
from locallearn.distillation._sites import Site, install


def packed(recipe: Recipe, layers: Mapping[Site, nn.Module], fits: Mapping[str, Fit]) -> dict[str, Any]:
    """What :func:`load_student` reads, for ``torch.save``."""
    kept = [
        {
            "name": site.name,
            "behind": list(site.behind),
            "size": fits[site.name].size,
            "state": {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in layer.state_dict().items()},
        }
        for site, layer in layers.items()
    ]
    return {"format": 1, "recipe": asdict(recipe), "layers": kept}


def load_student(net: nn.Module, file: str | Path) -> dict[str, nn.Module]:
    """Put the layers of a student that ``locallearn distill`` has kept into its teacher's network, for good.

    Nobody's code is run.

    Args:
        net: the teacher's network, e.g. ``locallearn.load("runs/ID").net``, on any device.
        file: of the student.

    Returns:
        The new layers, by path.

    Raises:
        ValueError: the file holds no student, or one of another network.
        OSError: it cannot be read.
    """
    path = Path(file).expanduser()
    with path.open("rb") as opened:
        try:
            kept = torch.load(opened, map_location="cpu", weights_only=True)
            recipe, layers = Recipe(**kept["recipe"]), kept["layers"]
        except Exception as error:  # what is no such file can fail in any way
            raise ValueError(
                f"{path} holds no student that locallearn distill has kept ({type(error).__name__})"
            ) from error
    students: dict[Site, nn.Module] = {}
    for one in layers:
        try:
            layer = net.get_submodule(one["name"])
            for behind in one["behind"]:
                net.get_submodule(behind)
            if not isinstance(layer, nn.Linear | nn.Conv2d):
                raise TypeError(f"{one['name']} is a {type(layer).__name__}")
            student = recipe.blank(layer, size=int(one["size"]))
            student.load_state_dict(one["state"])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} is a student of another network: {' '.join(str(error).split())}; load it into the network of the run "
                "that it was distilled from, as it was trained"
            ) from error
        students[Site(one["name"], tuple(one["behind"]))] = student.requires_grad_(False).eval()
    install(net, students)
    return {site.name: student for site, student in students.items()}
