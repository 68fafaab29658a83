"""Windows of characters: where they are cut, and a network that reads them from left to right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from locallearn.algorithms import Algorithm, BackpropForwardForward, ForwardForward, Pepita, TaskInfo
from locallearn.batch import Batch
from locallearn.nets import char_transformer
from locallearn.tasks.text import CHARACTERS, PythonTopics, encode, python_text


def test_characters() -> None:
    assert encode(" ~\né").tolist() == [0, 94, 95, 96]
    assert int(encode(python_text()).max()) < CHARACTERS


def test_parts_are_contiguous_and_apart() -> None:
    data = PythonTopics(length=16, stride=5)
    data.setup()
    codes = encode(python_text())
    tenth = len(codes) // 10
    for part, start, end in (
        ("train", 0, 8 * tenth),
        ("validation", 8 * tenth, 9 * tenth),
        ("test", 9 * tenth, len(codes)),
    ):
        windows, following = data._parts[part]
        assert torch.equal(windows[0], codes[start : start + 16].int())
        assert following[0] == codes[start + 16]
        assert torch.equal(windows[1], codes[start + 5 : start + 21].int())
        assert len(windows) == (end - start - 17) // 5 + 1
    assert len(next(iter(data.train_dataloader())).inputs) == 64
    upper = PythonTopics(length=16, stride=5, shift="upper", limit_train=100)
    upper.setup()
    assert len(upper._parts["train"][0]) == 100
    capitals = encode("".join(c.upper() if c.isascii() else c for c in python_text()))
    assert torch.equal(upper._parts["test"][1][:50], capitals[9 * tenth :][16 : 16 + 250 : 5].long())


@pytest.mark.parametrize("rule", [ForwardForward(), BackpropForwardForward(), Pepita()])
def test_rules_that_write_or_mix_inputs_refuse_codes_of_characters(rule: Algorithm) -> None:
    """However long the windows are: codes are no strengths."""
    data = PythonTopics(length=128, limit_train=8)
    inputs = next(iter(data.train_dataloader())).inputs
    assert inputs.dtype == data.example().dtype == torch.int32
    task = TaskInfo(Batch(inputs, torch.zeros(8, dtype=torch.int64)), CHARACTERS, F.cross_entropy)
    with pytest.raises(ValueError, match=r"int32 \(token ids\?\)"):
        rule.attach(char_transformer((128,), CHARACTERS, width=16, depth=2, heads=2), task)


def test_no_character_sees_a_later_one() -> None:
    torch.manual_seed(0)
    net = char_transformer((8,), CHARACTERS, width=16, depth=2, heads=2)
    x = torch.randint(CHARACTERS, (3, 8)).float()
    other = x.clone()
    other[:, 5:] = 7
    for a, b in zip(net.features(x), net.features(other), strict=True):
        assert torch.allclose(a[:, :5], b[:, :5])
        assert not torch.allclose(a[:, 5:], b[:, 5:])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: PythonTopics(length=0), "length is 0"),
        (lambda: PythonTopics(length=10**6), "a tenth of the text"),
        (lambda: PythonTopics(shift="lower"), "expected none or upper"),  # type: ignore[arg-type]
        (lambda: char_transformer((1, 8, 8), 10), "reads windows of characters"),
        (lambda: char_transformer((8,), 10, width=10, heads=3), "does not divide"),
    ],
)
def test_what_is_refused(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()
