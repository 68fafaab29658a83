"""Which layers of a network can be replaced, and how they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from locallearn.nets.blocks import NORMALISATIONS, evaluating
from locallearn.nets.random_features import RandomFeatureLayer, unfit

Predict = Callable[[Tensor], Tensor]
"""How the network is run, ``(N, ...)`` to outputs: its forward pass, or a learning rule's inference that goes through it."""


@dataclass(frozen=True)
class Site:
    """A layer that can be replaced.

    Attributes:
        name: path of the linear layer or convolution.
        behind: paths of normalisation, dropout and activation that stand behind it, in an ``nn.Sequential``.
        activation: name of the activation's class; empty where no activation follows as a module.
        readout: whether it makes the network's output.
        calls: how often one inference calls it.
    """

    name: str
    behind: tuple[str, ...] = ()
    activation: str = ""
    readout: bool = False
    calls: int = 1

    @property
    def last(self) -> str:
        """Path of the module behind which the whole site's output is there."""
        return self.behind[-1] if self.behind else self.name

    @property
    def path(self) -> tuple[str, ...]:
        """Paths of all modules of the site."""
        return (self.name, *self.behind)


def find_sites(net: nn.Module, predict: Predict, example: Tensor) -> tuple[list[Site], dict[str, str]]:
    """Layers that can be replaced, in the order in which inference calls them, and of all others why they cannot.

    A layer is a linear layer or a two-dimensional convolution with zero padding in one group that inference calls as a module.
    What stands behind it in the same ``nn.Sequential``, up to its activation, belongs to it.

    Args:
        net: the network.
        predict: runs it.
        example: inputs, ``(N, ...)``.

    Returns:
        Sites, and reasons by the path of a layer.
    """
    modules = dict(net.named_modules())
    kinds = (nn.Linear, nn.Conv2d)
    called: dict[str, list[Any]] = {}  # outputs by path, in the order of the first call
    named: set[str] = set()  # those that were given their input by its name
    tied = [id(module) for _, module in net.named_modules(remove_duplicate=False) if isinstance(module, kinds)]
    hooks = []

    def note(name: str, given: tuple[Any, ...], made: Any) -> None:
        called.setdefault(name, []).append(made)
        if not given:
            named.add(name)

    for name, module in modules.items():
        if isinstance(module, kinds):
            hooks.append(module.register_forward_hook(lambda _, given, made, name=name: note(name, given, made)))
    try:
        with torch.no_grad(), evaluating(net):
            output = predict(example)
    finally:
        for hook in hooks:
            hook.remove()
    found, left = [], {}
    for name, module in modules.items():
        if not isinstance(module, kinds):
            weights = any(True for _ in module.parameters(recurse=False))
            if weights and not isinstance(module, NORMALISATIONS):
                left[name] = f"a {type(module).__name__} is no linear layer and no convolution of images"
        elif isinstance(module, nn.Conv2d) and unfit(module) is not None:
            left[name] = str(unfit(module))
        elif name not in called:
            left[name] = "inference does not call it as a module"
        elif name in named:
            left[name] = "it is given its input by name, and not as layer(x)"
        elif tied.count(id(module)) > 1:
            left[name] = "it stands at several places of the network"
        else:
            readout = any(made is output for made in called[name]) or "readout" in name.split(".")
            behind, activation = _behind(modules, name)
            found.append(Site(name, behind, activation, readout, len(called[name])))
    order = list(called)
    return sorted(found, key=lambda site: order.index(site.name)), left


def _behind(modules: Mapping[str, nn.Module], name: str) -> tuple[tuple[str, ...], str]:
    """Paths of what stands behind a layer up to its activation, and the activation's name; nothing where there is none."""
    parent, _, own = name.rpartition(".")
    container = modules[parent]
    if not isinstance(container, nn.Sequential):
        return (), ""
    names = list(container._modules)
    behind: list[str] = []
    for follower in names[names.index(own) + 1 :]:
        module = container._modules[follower]
        behind.append(f"{parent}.{follower}" if parent else follower)
        if type(module).__module__ == "torch.nn.modules.activation" and not any(True for _ in module.children()):
            return tuple(behind), type(module).__name__
        if not isinstance(module, (*NORMALISATIONS, nn.modules.dropout._DropoutNd, nn.Identity)):
            break
    return (), ""


@contextmanager
def replaced(net: nn.Module, students: Mapping[Site, nn.Module]) -> Iterator[None]:
    """Have the network run with other layers inside the block, and as it was afterwards.

    A module of random features stands for the whole site, what was behind the layer passes on what it gets; any other module
    stands for the layer alone.
    """
    before = {path: net.get_submodule(path) for site in students for path in site.path}
    try:
        install(net, students)
        yield
    finally:
        for path, module in before.items():
            _put(net, path, module)


def install(net: nn.Module, students: Mapping[Site, nn.Module]) -> None:
    """Put other layers into the network, for good; see :func:`replaced`."""
    for site, module in students.items():
        _put(net, site.name, module)
        if isinstance(module, RandomFeatureLayer):
            for path in site.behind:
                _put(net, path, nn.Identity())


def _put(net: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, own = path.rpartition(".")
    net.get_submodule(parent)._modules[own] = module
