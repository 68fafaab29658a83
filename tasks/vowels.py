"""Spoken vowels as formant frequencies: a small table, made here or read from a file."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from locallearn.tasks._data import SampleData
from locallearn.tasks.images import stratified_split

SPEAKERS = 37
VOWELS = ("heed", "hid", "had", "hod", "hawed", "who'd", "heard")
# Mean F1, F2, F3 in Hz of women: Hillenbrand, Getty, Clark, Wheeler, J. Acoust. Soc. Am. 97:3099, 1995, Table V.
_MEANS = np.array(
    [
        [437.0, 2761.0, 3372.0],
        [483.0, 2365.0, 3053.0],
        [669.0, 2349.0, 2972.0],
        [936.0, 1551.0, 2815.0],
        [781.0, 1136.0, 2824.0],
        [459.0, 1105.0, 2735.0],
        [523.0, 1588.0, 1929.0],
    ]
)
# Of logarithms; not published, chosen here: a speaker's vocal tract, a spoken vowel's F1, F2, F3, and one moment of it.
_TRACT, _TOKEN, _MOMENT = 0.05, np.array([0.07, 0.05, 0.036]), 0.025
_MOVEMENT = 0.05  # of F1 and F2 from the beginning of a vowel to its end


def made_vowels(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Formants of seven vowels spoken by 37 women: 258 samples of 12 values, drawn around published means.

    Every sample has F1, F2 and F3 in Hz at the steady state and at 20, 50 and 80 % of the vowel. The means are measurements;
    the spread around them (a factor per speaker, per spoken vowel and per moment, all log-normal, and a movement of each vowel)
    is an assumption, and so is everything that depends on it. One sample is missing, as in the table of the authors of PhyLL,
    whose shape this is.

    Args:
        seed: of the draws.

    Returns:
        Values ``(258, 12)``, float64, and class ids ``(258,)``, int64.
    """
    generator = np.random.default_rng([seed, len(VOWELS)])
    tract = _TRACT * generator.standard_normal((SPEAKERS, 1, 1, 1))
    token = _TOKEN * generator.standard_normal((SPEAKERS, len(VOWELS), 1, 3))
    moment = _MOMENT * generator.standard_normal((SPEAKERS, len(VOWELS), 4, 3))
    path = _MOVEMENT * generator.standard_normal((len(VOWELS), 1, 3)) * np.array([1.0, 1.0, 0.0])
    moved = path * np.array([0.0, -1.0, 0.0, 1.0])[:, None]
    values = _MEANS[:, None] * np.exp(tract + token + moment + moved)
    labels = np.tile(np.arange(len(VOWELS)), SPEAKERS)
    return torch.from_numpy(values.reshape(-1, 12)[:-1]), torch.from_numpy(labels[:-1])


class VowelData(SampleData):
    """A table of vowels with validation and test part, for a Lightning ``Trainer`` or a plain loop.

    Values are scaled to mean 0 and deviation 1 by column and shifted so that the smallest is 0, all by the training part alone
    (smaller ones elsewhere stay below 0); then slots of zeros are put in front, for rules that write a label there.

    Args:
        path: a CSV with one sample per row, the class (a number or a name) in the last column; ``None``: :func:`made_vowels`. A
            first row of names is left out.
        batch_size: samples in a training batch; ``None``: all of them.
        test: share of every class that is kept for the test.
        validation: share that is kept for validation.
        split_seed: of both parts. With a test set this small a study repeats it, so the setting follows the run's seed.
        data_seed: of the vowels that are made.
        slots: zeros in front.
        seed: of the order.

    Attributes:
        name: ``vowels``.
        shape: of one sample.
        classes: number of classes.

    Raises:
        ValueError: no such file, or one with missing values, or too few samples; fewer slots than classes; a number out of
            range.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        batch_size: int | None = None,
        test: float = 0.2,
        validation: float = 0.1,
        split_seed: int = 0,
        data_seed: int = 0,
        slots: int = 8,
        seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("batch_size", 1 if batch_size is None else batch_size, 1),
            ("split_seed", split_seed, 0),
            ("data_seed", data_seed, 0),
            ("slots", slots, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value} is out of range; give at least {least}.")
        values, labels = made_vowels(data_seed) if path is None else _read(path)
        classes = int(labels.max()) + 1
        if 0 < slots < classes:
            raise ValueError(
                f"slots={slots} are too few to write one of {classes} classes into, values would be overwritten; give at "
                f"least {classes}, or 0 for rules that write none."
            )
        counts = [round(share * len(labels)) for share in (test, validation)]
        train_samples = len(labels) - sum(counts)
        if not (0 < test < 1 and 0 < validation < 1) or min(counts) < 1 or train_samples < classes:
            raise ValueError(
                f"test={test} and validation={validation} are out of range for {len(labels)} samples; give shares between"
                " 0 and 1 that leave some for training."
            )
        super().__init__(train_samples if batch_size is None else batch_size, None, seed)
        self.name = "vowels"
        self.classes = classes
        self.shape = (slots + values.shape[1],)
        self._values, self._labels = values, labels
        self._counts, self._train_samples = counts, train_samples
        self._split_seed, self._slots = split_seed, slots

    def _make_parts(self) -> dict[str, tuple[Tensor, Tensor]]:
        rest, test = stratified_split(self._labels, self._counts[0], self._split_seed)
        train, validation = (
            rest[part] for part in stratified_split(self._labels[rest], self._counts[1], self._split_seed)
        )
        known = self._values[train]
        mean, deviation = known.mean(0), known.std(0)
        scale = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
        lowest = ((known - mean) / scale).min()
        values = torch.nn.functional.pad((self._values - mean) / scale - lowest, (self._slots, 0)).float()
        rows_of = {"train": train, "validation": validation, "test": test}
        return {name: (values[rows], self._labels[rows]) for name, rows in rows_of.items()}

    def _training_samples(self) -> int:
        return self._train_samples


def _read(path: str | Path) -> tuple[Tensor, Tensor]:
    place = Path(path).expanduser()
    if not place.is_file():
        raise ValueError(
            f"there is no file {place}; give a CSV with one sample per row and its class in the last column."
        )
    try:
        with place.open(newline="", encoding="utf-8-sig") as file:  # a spreadsheet may put a mark in front
            rows = [row for row in csv.reader(file) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{place} is no CSV: {error}; save it as text in UTF-8, with commas.") from error
    if rows and not any(_numbers([value]) for value in rows[0]):
        rows = rows[1:]  # names of the columns; a first row with some numbers is a sample with something missing
    if len(rows) < 10 or len(rows[0]) < 2:
        raise ValueError(f"{place} has {len(rows)} samples; give at least 10 rows of numbers with a class at the end.")
    for i, row in enumerate(rows):
        if len(row) != len(rows[0]) or not _numbers(row[:-1]):
            raise ValueError(
                f"sample {i + 1} of {place} is not {len(rows[0]) - 1} finite numbers and a class; fill or remove it."
            )
    named = [row[-1].strip() for row in rows]
    names = sorted(set(named), key=(lambda name: float(name)) if _numbers(named) else None)
    if len(names) < 2:
        raise ValueError(f"{place} has one class, {names[0]!r}; give at least two.")
    rare = next((name for name in names if named.count(name) < 2 or not name), None)
    if rare is not None:
        raise ValueError(
            f"{place} has {named.count(rare)} samples of the class {rare!r} (a value that is missing, or names of columns?); "
            "every sample needs its class in the last column, and every class at least two samples."
        )
    values = torch.tensor([[float(value) for value in row[:-1]] for row in rows], dtype=torch.float64)
    return values, torch.tensor([names.index(name) for name in named])


def _numbers(row: list[str]) -> bool:
    try:
        return all(math.isfinite(float(value)) for value in row)
    except ValueError:
        return False
