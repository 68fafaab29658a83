"""Random numbers that are looked up instead of drawn: every one has an address, and whoever knows the address has the number.

Philox4x32-10 (J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in
64-bit integers, of NumPy on the CPU and of PyTorch elsewhere. A number's address is (seed, step, member, name of the tensor,
place in it). So it depends neither on what was drawn before, nor on how many are asked for at once, nor on the device:
everything up to the table of normal numbers is integers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

VERSION = "philox4x32-10/normal16/1"
"""Of the generator; numbers of another version are others."""

Kind = Literal["gaussian", "rademacher", "uniform"]
_M = 0xFFFFFFFF
_LANES = {"gaussian": 8, "rademacher": 128, "uniform": 4}  # numbers of a block
_TILE = 16  # blocks
_BLOCKS = 2**13  # computed at once: little enough for a cache
_LEVELS = 2**16


def philox4x32(counter: tuple[Any, ...], key: tuple[int, int], rounds: int = 10) -> tuple[Any, Any, Any, Any]:
    """Philox4x32: 128 random bits for every counter.

    Args:
        counter: four words of 32 bits each, int64, of shapes that fit one another; tensors or arrays.
        key: two words of 32 bits.
        rounds: 10.

    Returns:
        Four words of 32 bits, int64, of the same kind.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64 bits; their sign is one of them
        # c1 and c3 are whole products, of which the lower half counts: one mask does for both
        c0, c1, c2, c3 = ((p1 >> 32) ^ (c1 ^ k0)) & _M, p1, ((p0 >> 32) ^ (c3 ^ k1)) & _M, p0
        k0, k1 = (k0 + 0x9E3779B9) & _M, (k1 + 0xBB67AE85) & _M
    return c0, c1 & _M, c2, c3 & _M


@lru_cache(maxsize=4096)
def tag(name: str) -> int:
    """The word that stands for a tensor's name: the first 32 bits of its SHA-256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def tags(names: Sequence[str]) -> dict[str, int]:
    """Words of all names, each another one: of two that fall together the later name gets the next that is free."""
    taken: dict[int, str] = {}
    for name in names:
        word = tag(name)
        while word in taken:
            word = (word + 1) & _M
        taken[word] = name
    return {name: word for word, name in taken.items()}


@lru_cache(maxsize=8)
def _normal(device: torch.device) -> Tensor:
    """65 536 equally likely numbers with mean 0 and variance 1: what a normal one is on average in each 65 536th."""
    edges = torch.special.ndtri(torch.arange(1, _LEVELS // 2 + 1, dtype=torch.float64) / _LEVELS)
    density = torch.exp(-0.5 * edges.square()) / (2 * torch.pi) ** 0.5
    lower = -_LEVELS * torch.diff(density, prepend=density.new_zeros(1))  # E[z | bin] = (φ(a) − φ(b)) · 65 536
    made = torch.cat([lower, -lower.flip(0)])
    made = made / made.square().mean().sqrt()
    # Rounded to 20 bits behind the point, so that no libm's last bit matters.
    return ((made * 2**20).round() / 2**20).float().to(device)


def numbers(
    seed: int,
    step: int,
    members: Tensor | int,
    word: int,
    start: int,
    count: int,
    kind: Kind = "gaussian",
    device: torch.device | str = "cpu",
) -> Tensor:
    """Random numbers ``start`` to ``start + count − 1`` of a tensor, for one member or several.

    Args:
        seed: 64 bits.
        step: 32 bits.
        members: number of the member, 32 bits; or several, ``(n,)``.
        word: of the tensor, as :func:`tags` gives it.
        start: place of the first one.
        count: how many.
        kind: ``gaussian``: one of 65 536 equally likely numbers with mean 0 and variance 1 (fourth moment 2.9998,
            largest 4.39); ``rademacher``: ±1; ``uniform``: above 0 and below 1, multiples of 2⁻²⁴.
        device: of the result.

    Returns:
        float32, ``(count,)``, or ``(n, count)`` for several members.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"the kind of numbers is {kind!r}, expected {', '.join(get_args(Kind))}")
    several = isinstance(members, Tensor)
    rows = members.to(device) if isinstance(members, Tensor) else torch.tensor([members], device=device)
    per, most = _TILE * _LANES[kind], _BLOCKS // _TILE  # tiles at once, of all members
    start_tile, end = start // per, -(-(start + count) // per)
    made = torch.empty(len(rows), count, device=device)
    some = min(len(rows), most)
    for low in range(0, len(rows), max(some, 1)):
        part = slice(low, low + some)
        wide = max(1, most // len(rows[part]))
        for first in range(start_tile, end, wide):
            last = min(first + wide, end)
            blocks = torch.arange(first * _TILE, last * _TILE, device=rows.device)
            found = _tiles(seed, step, rows[part], word, blocks, kind)
            if found.shape == made.shape and start == first * per:
                made = found
                continue
            a, b = max(start, first * per), min(start + count, last * per)
            made[part, a - start : b - start] = found[:, a - first * per : b - first * per]
    return made if several else made[0]


def together(
    seed: int,
    step: int,
    members: Tensor,
    spans: Sequence[tuple[int, int]],
    kind: Kind = "gaussian",
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """:func:`numbers` of several tensors from their beginning; small ones are made at once, which is much faster.

    Args:
        seed: as there.
        step: as there.
        members: as there, ``(n,)``.
        spans: of every tensor its word and how many numbers.
        kind: as there.
        device: as there.

    Returns:
        float32, ``(n, count)`` for every tensor.
    """
    tiles = [-(-count // (_TILE * _LANES[kind])) for _, count in spans]
    if len(spans) < 2 or sum(tiles) * len(members) * _TILE > _BLOCKS:
        return [numbers(seed, step, members, word, 0, count, kind, device) for word, count in spans]
    blocks, words = _addresses(tuple(spans), tuple(tiles), torch.device(device))
    found = _tiles(seed, step, members.to(device), words, blocks, kind)
    parts = torch.split(found, [n * _TILE * _LANES[kind] for n in tiles], 1)
    return [part[:, :count] for part, (_, count) in zip(parts, spans, strict=True)]


@lru_cache(maxsize=64)
def _addresses(
    spans: tuple[tuple[int, int], ...], tiles: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    blocks = torch.cat([torch.arange(n * _TILE) for n in tiles])
    words = torch.tensor([word for word, _ in spans]).repeat_interleave(torch.tensor(tiles) * _TILE)
    return blocks.to(device), words.to(device)


def _tiles(seed: int, step: int, members: Tensor, word: Tensor | int, blocks: Tensor, kind: Kind) -> Tensor:
    """Whole tiles; a tile is 16 blocks side by side, and what the first lane has of all of them comes first."""
    device, rows, lanes = members.device, len(members), _LANES[kind]
    counter = (
        blocks[None] & _M,
        members[:, None].long() & _M,
        torch.tensor([[step & _M]], device=device),
        ((blocks >> 32) ^ word)[None],  # the name; of a tensor of more than 2³² blocks another one
    )
    if device.type == "cpu":  # the same integers, and a call costs half as much
        found: Any = philox4x32(tuple(word.numpy() for word in counter), _key(seed))
        made: Any = np.empty
        whole: Any = np.int64
    else:
        found, whole = philox4x32(counter, _key(seed)), torch.int64
        made = partial(torch.empty, device=device)
    shape = (rows, len(blocks) // _TILE, _TILE)
    # Words that know nothing of the block or the member are one for all of them: adding zeros spreads them.
    parts = [(part + 0 * (found[0] if part.shape != found[0].shape else 0)).reshape(shape) for part in found]
    if kind == "rademacher":
        bits = made((*shape[:2], lanes, _TILE), dtype=whole)
        bit = torch.arange(32, device=device)[:, None]
        shifts: Any = bit.numpy() if device.type == "cpu" else bit
        for lane, part in enumerate(parts):
            bits[:, :, 32 * lane : 32 * lane + 32] = (part[:, :, None] >> shifts) & 1
        return torch.as_tensor(bits).view(rows, -1).to(torch.float32).mul_(2).sub_(1)
    places = made((*shape[:2], lanes, _TILE), dtype=whole)
    if kind == "uniform":
        for lane, part in enumerate(parts):
            places[:, :, lane] = part >> 8
        return torch.as_tensor(places).view(rows, -1).to(torch.float32).add_(0.5).mul_(2.0**-24)
    for lane, part in enumerate(parts):
        places[:, :, 2 * lane] = part & (_LEVELS - 1)
        places[:, :, 2 * lane + 1] = part >> 16
    return _normal(device).index_select(0, torch.as_tensor(places).view(-1)).view(rows, -1)


def _key(seed: int) -> tuple[int, int]:
    return seed & _M, (seed >> 32) & _M


def pieces(size: int, kind: Kind = "gaussian") -> Iterator[tuple[int, int]]:
    """Where to cut a tensor so that its numbers are made in little memory: places of first entries, and how many."""
    width = _BLOCKS * min(_LANES[kind], 8)
    for start in range(0, size, width):
        yield start, min(width, size - start)
