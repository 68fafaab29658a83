"""Train neural networks without backpropagating an error through the whole network, and measure what that costs.

``import locallearn`` brings PyTorch and nothing else: Lightning, Hydra and the meters are imported by the modules that
use them.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locallearn.batch import Batch
from locallearn.nets.blocks import Blocks

if TYPE_CHECKING:
    from locallearn.local import Local, localize, show

__version__ = "0.1.0"

__all__ = ["Batch", "Blocks", "Local", "__version__", "load", "localize", "show"]


def __getattr__(name: str) -> Any:
    """``localize``, ``show``, ``Local`` and every rule by its class name, imported when they are asked for."""
    if name in ("Local", "localize", "show"):
        return getattr(import_module("locallearn.local"), name)
    if name[:1].isupper():
        rules = import_module("locallearn.algorithms")
        if name in rules.__all__:
            return getattr(rules, name)
    raise AttributeError(f"module 'locallearn' has no attribute {name!r}")


def load(
    run: str | Path,
    *,
    trust: bool = False,
    data_dir: str | Path | None = None,
    data_path: str | Path | None = None,
) -> Any:
    """What a finished run trained, from the folder that ``locallearn train`` printed.

    ``predict(inputs)`` of what is returned gives outputs by the rule's own inference, ``(N, ...)``; ``net`` is the
    network, ``algorithm`` the rule with all it has added, ``record`` the run's record (docs/records.md).

    Args:
        run: the run's folder.
        trust: build whatever the record's settings name, instead of nothing but parts of locallearn, PyTorch's optimizers
            and layers, and convolutions of PyTorch Geometric.
        data_dir: where the data are here, for rules that need them (on a graph); ``None``: where they were.
        data_path: where the file of a graph of your own is here, if it has moved since.

    Raises:
        locallearn.cli.UsageError: there is no such run, or its record asks for something that it may not.
        ValueError: its model is damaged, or does not fit its settings.
    """
    # Here, because it needs Lightning and Hydra.
    places = {"data_dir": data_dir, "dataset.path": data_path}
    given = {key: str(place) for key, place in places.items() if place is not None}
    return import_module("locallearn.cli.saved").load(run, trust=trust, places=given)
