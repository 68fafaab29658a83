"""Noise that is looked up: integers against the published vectors, numbers that depend on their address alone."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from locallearn.functional.counter_noise import Kind, numbers, philox4x32, tags, together
from locallearn.functional.counter_noise import _normal as normal_table

KINDS: tuple[Kind, ...] = ("gaussian", "rademacher", "uniform")

# Known answers of Philox4x32-10, as its authors publish them with Random123: counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]) -> None:
    for words in ([torch.tensor([c]) for c in counter], [np.array([c]) for c in counter]):
        assert tuple(int(word[0]) for word in philox4x32(tuple(words), key)) == answer


def test_the_numbers_are_those_of_the_generator() -> None:
    """The first number of a tensor is the normal one of the lower half of the first word of its first block."""
    words = philox4x32(tuple(torch.tensor([c]) for c in (0, 5, 7, 99)), (3, 1))
    table = normal_table(torch.device("cpu"))
    found = numbers(3 + 2**32, 7, 5, 99, 0, 33)
    assert found[0] == table[int(words[0]) & 0xFFFF]
    assert found[16] == table[int(words[0]) >> 16]  # a lane of 16 blocks comes after the other
    assert float(numbers(3 + 2**32, 7, 5, 99, 0, 1, "rademacher")) == 2 * (int(words[0]) & 1) - 1


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_address_counts(kind: Kind) -> None:
    whole = numbers(1, 2, 3, 4, 0, 70_000, kind)
    for start, count in ((0, 1), (17, 5000), (69_990, 10), (4096, 0)):
        assert torch.equal(numbers(1, 2, 3, 4, start, count, kind), whole[start : start + count])
    several = numbers(1, 2, torch.tensor([9, 3]), 4, 100, 300, kind)
    assert torch.equal(several[1], whole[100:400])
    at_once = together(1, 2, torch.tensor([3, 9]), [(4, 50), (5, 3), (6, 0)], kind)
    assert torch.equal(at_once[0][0], whole[:50])
    assert torch.equal(at_once[1][1], numbers(1, 2, 9, 5, 0, 3, kind))
    assert at_once[2].shape == (2, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_on_another_device_they_are_the_same(kind: Kind) -> None:
    """PyTorch's integers, which a GPU has, give what NumPy's give."""
    if torch.cuda.is_available():
        found = numbers(1, 2, torch.arange(3), 4, 5, 1000, kind, "cuda").cpu()
        assert torch.equal(found, numbers(1, 2, torch.arange(3), 4, 5, 1000, kind))
    counter = (torch.arange(1000)[None], torch.arange(3)[:, None], torch.tensor([[2]]), torch.tensor([[4]]))
    ours, arrays = philox4x32(counter, (1, 0)), philox4x32(tuple(c.numpy() for c in counter), (1, 0))
    assert all(np.array_equal(a.numpy(), b) for a, b in zip(ours, arrays, strict=True))


def test_moments() -> None:
    table = normal_table(torch.device("cpu")).double()
    assert abs(float(table.mean())) < 1e-12
    assert float(table.square().mean()) == pytest.approx(1, abs=1e-6)
    assert float(table.pow(4).mean()) == pytest.approx(3, abs=1e-3)
    uniform = numbers(0, 0, 0, 0, 0, 20_000, "uniform")
    assert 0 < float(uniform.min()) < float(uniform.max()) < 1
    assert float(uniform.mean()) == pytest.approx(0.5, abs=4 / 12**0.5 / 20_000**0.5)
    assert set(numbers(0, 0, 0, 0, 0, 1000, "rademacher").tolist()) == {-1.0, 1.0}


def test_nothing_is_correlated() -> None:
    """Tensors, members, steps and seeds have noise of their own: |ρ| < 4.5/√k for all pairs."""
    k = 20_000
    z = torch.stack([numbers(s, t, m, w, 0, k) for s, t, m, w in product((0, 1), (0, 1), (0, 1), (10, 11))])
    rho = torch.corrcoef(z) - torch.eye(len(z))
    assert float(rho.abs().max()) < 4.5 / k**0.5
    shifted = z[0] - z[0].mean()
    assert abs(float((shifted[1:] * shifted[:-1]).mean())) < 4.5 / k**0.5  # nor do neighbours


def test_every_name_has_a_word_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tags([f"layer{i}.weight" for i in range(1000)])
    assert len(set(found.values())) == 1000
    monkeypatch.setattr("locallearn.functional.counter_noise.tag", lambda name: 0xFFFFFFFF)
    assert tags(["a", "b", "c"]) == {"a": 0xFFFFFFFF, "b": 0, "c": 1}


def test_no_such_kind() -> None:
    with pytest.raises(ValueError, match="expected gaussian, rademacher, uniform"):
        numbers(0, 0, 0, 0, 0, 1, "cauchy")  # type: ignore[arg-type]
