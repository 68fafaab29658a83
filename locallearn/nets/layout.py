"""Where a block's channels lie: one-dimensional maps ``(N, C, L)`` and tokens ``(N, T, D)`` have as many dimensions."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

_FIRST = {  # behind the samples
    *(f"{kind}{n}d" for kind in ("conv", "conv_transpose", "max_pool", "avg_pool", "lp_pool") for n in (1, 2, 3)),
    *(f"{kind}{n}d" for kind in ("adaptive_avg_pool", "adaptive_max_pool") for n in (1, 2, 3)),
    *("batch_norm", "instance_norm", "group_norm"),
}
_LAST = {"linear", "bilinear", "embedding", "layer_norm", "rms_norm", "multi_head_attention_forward"}
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
_MOVING = {
    *("transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "adjoint", "mT", "T", "mH", "H"),
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "__getitem__", "select", "unbind"),
    *("mean", "sum", "amax", "amin", "max", "min", "einsum"),
}


class Signal(NamedTuple):
    """Shape of one sample of a one-dimensional map: what ``nn.Conv1d`` gives."""

    channels: int
    length: int


class Tokens(NamedTuple):
    """Shape of one sample of a sequence that has its channels last for certain. A plain ``(T, D)`` is taken for one."""

    positions: int
    width: int


def channel_axis(shape: Sequence[int]) -> int:
    """Where a batch of samples of this shape has its channels: maps behind the samples, vectors and tokens last."""
    return 1 if len(shape) > 2 or isinstance(shape, Signal) else len(shape)


class ChannelAxes(TorchFunctionMode):
    """Follows the axis of the channels through whatever runs inside of it.

    The first layer that knows decides: convolutions, poolings and BatchNorm have channels behind the samples, linear layers,
    LayerNorm, embeddings and attention have them last, recurrent layers in any case. From there on the axis only moves: where
    to, a transposition, a reshape or a mean shows on a tensor that counts the channels. So a residual unit that turns its map
    round for a linear layer and back again is seen as what it is. Channels that are spread over two axes, or stacked beside
    others, are lost from then on.
    """

    def __init__(self) -> None:
        super().__init__()
        self._axes: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()

    def shape(self, output: Tensor) -> tuple[int, ...]:
        """Of one sample: a :class:`Signal` or :class:`Tokens` where three dimensions are known, else the plain shape."""
        shape = tuple(output.shape[1:])
        kind = {1: Signal, 2: Tokens}.get(self._axes.get(output, 0)) if len(shape) == 2 else None
        return shape if kind is None else kind(*shape)

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Run one function, and note where the channels of what it gives lie."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        name = name if name.startswith("__") else name.removesuffix("_")
        known = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t in self._axes]
        given = max(known, key=lambda t: t.ndim, default=None)
        moved: list[int | None] = []
        if given is not None and name in _MOVING:
            moved = _moved(func, args, kwargs, given, self._axes[given])
        before = None if given is None else (self._axes[given], given.ndim)
        result = func(*args, **kwargs)
        for i, output in enumerate(t for t in tree_leaves(result) if isinstance(t, Tensor)):
            axis: int | None = None
            if name in _RECURRENT:
                axis = output.ndim - 1
            elif before is None:
                axis = 1 if name in _FIRST else output.ndim - 1 if name in _LAST else None
            elif name in _MOVING:
                axis = moved[i] if i < len(moved) else None
            elif output.ndim == before[1]:
                axis = before[0]
            if axis is not None:
                self._axes[output] = axis
            else:
                self._axes.pop(output, None)
        return result


def _moved(func: Any, args: Sequence[Any], kwargs: Any, given: Tensor, axis: int) -> list[int | None]:
    """Where a function takes an axis, by tensor that it gives: to the one along which a count of the channels still counts."""
    if given.shape[axis] < 2 or not given.numel():
        return []
    count = torch.arange(given.shape[axis], device=given.device, dtype=torch.float32)
    counted = count.view([-1 if d == axis else 1 for d in range(given.ndim)]).expand(given.shape).contiguous()
    probe = tree_map(lambda leaf: counted if leaf is given else leaf, (tuple(args), dict(kwargs)))
    axes: list[int | None] = []
    for output in tree_leaves(func(*probe[0], **probe[1])):
        if isinstance(output, Tensor):
            spread = [
                d for d, size in enumerate(output.shape) if size > 1 and bool(output.diff(dim=d).abs().gt(0.5).any())
            ]
            axes.append(spread[0] if len(spread) == 1 else None)
    return axes
