"""What PyTorch may compute with inside products of float32 matrices: a setting of the process, changed for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor


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


def effective_precision(device: torch.device | str) -> dict[str, str]:
    """What products of float32 numbers are really computed with on a device under the present settings, by trying it.

    The settings are requests: what ``medium`` does, say, depends on the processor. A number ``1 + 2**-k`` keeps its last bit
    in a product with 1 if factors have at least k bits after the point: 23 in float32, 10 in TF32, 7 in bfloat16.

    Args:
        device: where to try.

    Returns:
        ``matmul_in_effect`` and ``convolution_in_effect``: ``float32``, ``tf32``, ``bfloat16``, or how many bits survived.
    """
    size = 64  # large enough for the kernels that large matrices get
    numbers = 1 + 2.0 ** -torch.arange(1, 24, dtype=torch.float64)
    matrix = numbers.repeat(size, 3)[:, :size].to(device, torch.float32)
    ones = torch.eye(size, device=device)
    maps = matrix.T.reshape(1, size, 8, size // 8).contiguous()
    with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
        product = matrix @ ones
        convolved = F.conv2d(maps, ones.reshape(size, size, 1, 1)).reshape(size, size).T
    return {
        "matmul_in_effect": _named(product, numbers),
        "convolution_in_effect": _named(convolved, numbers),
    }


def _named(product: Tensor, numbers: Tensor) -> str:
    exact = (product[0, : len(numbers)].double().cpu() == numbers).tolist()
    bits = exact.index(False) if False in exact else len(exact)
    return {23: "float32", 10: "tf32", 7: "bfloat16"}.get(bits, f"{bits} bits")
