"""What PyTorch may compute with inside products of float32 matrices: a setting of the process, changed for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def multiplying(precision: str, convolutions: bool | None = None) -> Iterator[None]:
    """Another precision of products inside the block, and what it was before afterwards.

    Args:
        precision: of products of float32 matrices, as :func:`torch.set_float32_matmul_precision` has it: ``highest``
            (float32), ``high`` (TF32 where the device has it) or ``medium`` (bfloat16 where it has it).
        convolutions: whether cuDNN's convolutions may use TF32, which is PyTorch's default; ``None``: as it is.
    """
    matrices, maps = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = maps if convolutions is None else convolutions
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matrices)
        torch.backends.cudnn.allow_tf32 = maps
