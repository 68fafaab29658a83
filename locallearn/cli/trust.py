"""What settings that come with a record may build.

A ``_target_`` is a name of anything that Python can import and call, and a record may come from anybody. So what a record
names is built only if it is one of the parts that runs are made of; everything else wants the user's word for it.
"""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, get_type_hints

from locallearn.cli.settings import UsageError

# Where a class must be defined, and what it must be a kind of; of locallearn's functions those that say they make one.
_KINDS: Mapping[str, tuple[str, ...]] = {
    "locallearn.algorithms": ("locallearn.algorithms.base.Algorithm",),
    "locallearn.nets": ("locallearn.nets.blocks.Blocks", "locallearn.nets.devices.Simulation"),
    "locallearn.local": ("locallearn.nets.blocks.Blocks",),  # not its factory, which imports what it is told
    "locallearn.tasks": (
        "lightning.pytorch.LightningDataModule",
        "lightning.pytorch.LightningModule",
        "locallearn.tasks.images.Augment",
        "locallearn.tasks.graphs.GeneratedGraph",
    ),
    "locallearn.strategies": (
        "locallearn.strategies.schedule.Schedule",
        "torch.optim.Optimizer",
        "torch.optim.lr_scheduler.LRScheduler",
    ),
    "locallearn.energy": ("locallearn.energy.Meter",),
    "torch.optim": ("torch.optim.Optimizer", "torch.optim.lr_scheduler.LRScheduler"),
    "torch.nn": ("torch.nn.Module",),
    "torch_geometric.nn": ("torch_geometric.nn.MessagePassing",),
    # Those that only write files: the others talk to an address that a record may name, with the user's passwords.
    "lightning.pytorch.loggers": (
        "lightning.pytorch.loggers.CSVLogger",
        "lightning.pytorch.loggers.TensorBoardLogger",
    ),
}
# Of these packages only the plain layers: others, such as torch_geometric.nn.Sequential, run code from their arguments.
_LAYERS = {"torch.nn": "torch.nn.modules", "torch_geometric.nn": "torch_geometric.nn.conv"}
# Arguments of locallearn's networks and devices that take the dotted name of something to import, by whatever name these go.
_NAMES = ("device", "map")
_KEYS = ("_target_", "_partial_", "_convert_")


def check_trusted(config: Mapping[str, Any], owner: str, trust: bool) -> None:
    """Refuse settings that would run what a record has no business to name.

    Allowed are subclasses of locallearn's own kinds of parts (algorithms, tasks, data, networks, schedules, meters),
    PyTorch's optimizers, schedulers and layers, convolutions of PyTorch Geometric, and the loggers that write files;
    each defined in the package that its name says, none reached through what a module happens to import. An address
    (``scheme://...``) is nowhere allowed.

    Args:
        config: the settings, as JSON has them.
        owner: whose they are, for the sentence.
        trust: whether the user vouches for them. Interpolations, which could read the environment, are refused all the
            same: records hold settings without any.

    Raises:
        UsageError: names the setting and what it asks for.
    """
    for where, value in _walk(config, ""):
        if isinstance(value, str):
            if "${" in value:
                raise UsageError(
                    f"the settings of {owner} have an interpolation, {where}: {value!r}; records hold settings without any, so "
                    "it is not resolved"
                )
            if "://" in value and not trust:  # a logger's save_dir may be s3://..., opened with the user's keys
                raise UsageError(f"the settings of {owner} have an address, {where}: {value!r}, {_UNTRUSTED}")
            continue
        if trust:
            continue
        odd = [key for key in value if key.startswith("_") and key.endswith("_") and key not in _KEYS]
        if odd:
            raise UsageError(f"the settings of {owner} have {where}.{odd[0]}, {_UNTRUSTED}")
        named = [value.get(key) for key in _NAMES if str(value.get("_target_")).startswith("locallearn.nets")]
        own = next((name for name in named if isinstance(name, str) and "." in name), None)
        if own is not None:
            raise UsageError(f"the settings of {owner} would run {own!r} as the device of {where}, {_UNTRUSTED}")
        if "_target_" in value and not _allowed(value["_target_"]):
            raise UsageError(f"the settings of {owner} would run {value['_target_']!r} as {where}, {_UNTRUSTED}")


_UNTRUSTED = (
    "which is none of the parts that a run is made of; if you know where the record comes from and what that does, "
    "add --trust"
)


def _walk(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Every text and every mapping below ``value``, with its dotted name; keys are texts, too."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        yield where, value
        for key, item in value.items():
            inner = f"{where}.{key}" if where else str(key)
            yield inner, str(key)
            yield from _walk(item, inner)
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from _walk(item, f"{where}[{place}]")


def _allowed(target: Any) -> bool:
    """Whether a ``_target_`` names one of the parts; nothing outside of their packages is imported to find out."""
    if not isinstance(target, str) or not re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", target):
        return False
    package = next((package for package in _KINDS if target.startswith(f"{package}.")), None)
    if package is None:
        return False
    try:
        # A module and one name in it: no way through an attribute to what the module has imported.
        made = _named(target)
        kinds = tuple(_named(kind) for kind in _KINDS[package])
    except (ImportError, AttributeError):
        return False
    defined = str(getattr(made, "__module__", ""))
    if not f"{defined}.".startswith(f"{_LAYERS.get(package, package)}."):
        return False
    if inspect.isfunction(made) and package.startswith("locallearn."):
        made = get_type_hints(made).get("return")
    return isinstance(made, type) and issubclass(made, kinds)


def _named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's packages warn when they are imported
        return getattr(importlib.import_module(module), name)
