"""Vowels: what is made, what is read, and that only the training part says how values are scaled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from locallearn.tasks.vowels import VowelData, made_vowels


def test_what_is_made_has_the_shape_of_the_table_and_the_published_means() -> None:
    values, labels = made_vowels()
    assert values.shape == (258, 12)
    assert torch.bincount(labels).tolist() == [37] * 6 + [36]
    assert torch.equal(made_vowels()[0], values)
    assert not torch.equal(made_vowels(1)[0], values)
    heed, heard = (values[labels == label][:, :3].mean(0) for label in (0, 6))
    torch.testing.assert_close(heed, torch.tensor([437.0, 2761.0, 3372.0]).double(), rtol=0.05, atol=0)
    torch.testing.assert_close(heard, torch.tensor([523.0, 1588.0, 1929.0]).double(), rtol=0.05, atol=0)


def test_only_the_training_part_says_how_values_are_scaled() -> None:
    data = VowelData()
    [batch] = list(data.train_dataloader())
    assert (data.shape, data.classes, data.batch_sizes(), data.example().shape) == ((20,), 7, {180}, (2, 20))
    assert batch.inputs.shape == (180, 20)
    assert batch.inputs.dtype == torch.float32
    assert not batch.inputs[:, :8].any()
    values = batch.inputs[:, 8:]
    assert float(values.min()) == 0.0
    torch.testing.assert_close(values.std(0), torch.ones(12), rtol=1e-4, atol=0)
    torch.testing.assert_close(values.mean(0), values.mean().expand(12), rtol=1e-4, atol=0)
    sizes = [len(batch.inputs) for loader in (data.val_dataloader(), data.test_dataloader()) for batch in loader]
    assert sizes == [26, 52]
    other = VowelData(split_seed=1)
    assert not torch.equal(next(iter(other.test_dataloader())).targets, next(iter(data.test_dataloader())).targets)


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    place = tmp_path / "own.csv"
    rows = [f"{i % 5},{i * 2.5},{('low', 'high')[i % 2]}" for i in range(40)]
    place.write_text("\n".join(["first,second,vowel", *rows]), encoding="utf-8")
    data = VowelData(place, slots=2, batch_size=10)
    assert (data.shape, data.classes, data.batch_sizes()) == ((4,), 2, {10, 8})
    assert sum(len(batch.inputs) for batch in data.train_dataloader()) == 28
    place.write_text("\n".join(f"{i},{10 * (i % 3)}" for i in range(30)), encoding="utf-8")
    assert VowelData(place).classes == 3  # numbers that are classes, in their order
    place.write_text("\n".join(f"{i},{10 * (i % 3)}" for i in range(30)), encoding="utf-8-sig")
    assert VowelData(place).batch_sizes() == {30 - 6 - 3}  # the mark of a spreadsheet costs no sample
    place.write_bytes("1,2,hä\n".encode("utf-16") * 20)
    with pytest.raises(ValueError, match="is no CSV"):
        VowelData(place)


@pytest.mark.parametrize(
    ("text", "settings", "words"),
    [
        (None, {}, "there is no file"),
        ("1,2,0\n" * 3, {}, "3 samples"),
        ("1,2,0\n" * 12 + "1,nan,1\n", {}, "sample 13 of"),
        ("1,2,0\n" * 12 + "1,1\n", {}, "sample 13 of"),
        ("1,2,0\n" * 12, {}, "one class"),
        ("1,,0\n" + "1,2,0\n2,3,1\n" * 12, {}, "sample 1 of"),  # no row of names
        ("1,2,\n" + "1,2,0\n2,3,1\n" * 12, {}, "1 samples of the class ''"),
        ("0,1,vowel\n" + "1,2,0\n2,3,1\n" * 12, {}, "1 samples of the class 'vowel'"),
        ("".join(f"1,2,{i}\n" * 3 for i in range(9)), {}, "slots=8 are too few to write one of 9 classes"),
        ("1,2,0\n2,3,1\n" * 12, {"test": 0.0}, "test=0.0"),
        ("1,2,0\n2,3,1\n" * 12, {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_tables_that_cannot_be_learned_are_refused(
    tmp_path: Path, text: str | None, settings: dict[str, Any], words: str
) -> None:
    place = tmp_path / "bad.csv"
    if text is not None:
        place.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        VowelData(place, **settings)
