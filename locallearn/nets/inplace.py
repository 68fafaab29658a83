"""Blocks that work in place, kept from writing into what they are given."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from locallearn.nets.border import detached, main, replaced


class InputGuard:
    """Hands a block copies of those inputs that it writes into, and of no others.

    What a block is given belongs to somebody else: it is a view of the data set, the user's graph, or an output that the
    rule still needs. A layer that works in place (``nn.ReLU(inplace=True)``, ``x.mul_(2)``) at the start of a block would
    overwrite it. Which blocks do so is found by what they do: a block's first pass in each mode (training, evaluation) is
    on copies, and what it changed in them is copied from then on, while all else is handed over as it is. Later passes are
    watched by the tensors' version counters, so that a block that starts to write late is told, not believed.

    Gradients pass through a copy unchanged. Copies of a guarded block share what is known, so a dry run on a copy counts.

    Args:
        name: of the block, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.written: set[int] = set()
        self.tried: set[bool] = set()
        self._open: dict[int, tuple[Any, ...]] = {}  # by thread: what the pass that runs there began with

    def watch(self, block: nn.Module) -> None:
        """Guard this block, unless a guard stands there already."""
        if not any(isinstance(getattr(hook, "__self__", None), InputGuard) for hook in block._forward_hooks.values()):
            block.register_forward_pre_hook(self.before, with_kwargs=True)
            block.register_forward_hook(self.after, with_kwargs=True)

    def before(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Put copies where they are due, and note the state of everything else."""
        if torch.compiler.is_compiling():
            return None
        here = threading.get_ident()
        trying = block.training not in self.tried
        if not trying and not self.written:
            self._open[here] = tuple(map(_version, _tensors(args, kwargs)))
            return None
        leaves, layout = tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        given = {i: leaves[i] for i in places}
        for n, i in enumerate(places):
            if trying or n in self.written:
                leaves[i] = leaves[i].clone()
        if trying:
            self._open[here] = tuple(given.values())
        else:
            self._open[here] = tuple(None if n in self.written else _version(leaves[i]) for n, i in enumerate(places))
        args, kwargs = tree_unflatten(leaves, layout)
        return args, kwargs

    def after(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Learn from a first pass what the block writes into; in later ones refuse what is new.

        Raises:
            ValueError: the block wrote into something that it had left alone before; it is copied from now on.
        """
        began = self._open.pop(threading.get_ident(), None)
        if began is None:
            return
        now = _tensors(args, kwargs)
        if block.training not in self.tried:
            self.tried.add(block.training)
            self.written |= {n for n, (old, new) in enumerate(zip(began, now, strict=True)) if _changed(old, new)}
            return
        late = {
            n for n, (old, new) in enumerate(zip(began, now, strict=True)) if old is not None and old != _version(new)
        }
        if late:
            self.written |= late
            raise ValueError(
                f"block {self.name!r} wrote into {'its input' if 0 in late else 'the context of the batch'}, which it had "
                "left alone before, so the data it was given are spoilt: let its layers make new tensors (inplace=False), "
                "always or never in place"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> InputGuard:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


def try_out(blocks: Mapping[str, nn.Module], inputs: Tensor, context: tuple[Any, ...]) -> None:
    """Run copies of these blocks once in training mode, so that their guards know them before training starts.

    Whatever goes wrong is left to those who run the blocks in earnest and know what to say.
    """
    given: Any = inputs
    try:
        for name, block in blocks.items():
            given = main(given) if name == "readout" else given
            twin = copy.deepcopy(block).train()
            parameter = next(twin.parameters(), None)
            if parameter is not None and main(given).is_floating_point():
                given = replaced(given, main(given).to(parameter.device, parameter.dtype))
            devices = [parameter.device] if parameter is not None and parameter.is_cuda else []
            with torch.random.fork_rng(devices=devices):
                given = detached(twin(given, *context))
    except Exception:
        return


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """All tensors among the arguments of a call, in an order that is always the same."""
    if not kwargs and not any(isinstance(a, tuple | list | dict) for a in args):
        return [a for a in args if isinstance(a, Tensor)]
    return [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]


def _version(tensor: Tensor) -> int:
    """How often it was written into; tensors made in inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _changed(given: Tensor, copied: Tensor) -> bool:
    """Whether a block changed its copy of what was given, even past the version counter (``x.data``)."""
    if _version(copied) or copied.shape != given.shape or copied.requires_grad != given.requires_grad:
        return True
    try:
        return not torch.equal(given.detach(), copied.detach())
    except (RuntimeError, NotImplementedError):  # layouts and transforms that cannot be compared
        return False
