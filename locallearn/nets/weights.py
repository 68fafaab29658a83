"""What tells one set of weights from another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and bytes of weights."""
    found = hashlib.sha256()
    for name, weight in weights.items():
        flat = weight.detach().cpu().contiguous()
        found.update(f"{name} {tuple(flat.shape)} {flat.dtype}\n".encode())
        found.update(flat.view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
