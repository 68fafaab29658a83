"""The same draws for several passes."""

from __future__ import annotations

from typing import Any

import torch


class Draws:
    """PyTorch's global generator as it was, for passes that have to draw the same."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._state: Any = None

    def again(self) -> None:
        """Begin with the same draws as the first time."""
        cuda = self._device.type == "cuda"
        if self._state is None:
            self._state = torch.get_rng_state(), torch.cuda.get_rng_state(self._device) if cuda else None
            return
        torch.set_rng_state(self._state[0])
        if cuda:
            torch.cuda.set_rng_state(self._state[1], self._device)
