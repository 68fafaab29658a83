"""Buffers that have the size of the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


class Grown(nn.Module):
    """A module whose buffers take the shapes that a checkpoint has, and whose float64 buffers stay float64."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        precise = {name: b for name, b in self._buffers.items() if b is not None and b.dtype is torch.float64}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in precise.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype is not torch.float64:
                self._buffers[name] = before.to(moved.device)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name, held in self._buffers.items():
            value = state_dict.get(prefix + name)
            if held is not None and isinstance(value, Tensor) and value.shape != held.shape:
                self._buffers[name] = held.new_empty(value.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
