"""A digital twin: a small network fitted to measurements of a device, and then left alone."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


class Twin:
    """A perceptron with SiLU that was fitted to measured pairs and is frozen.

    The recipe is that of the acoustic twin of PhyLL (20-100-200-100-20): Adam, root mean squared error, batches of 100, of
    every 100 pairs 90 to fit, 3 to choose the epoch by, 7 to judge by. Fitting is digital and comes before any training; the
    twin then stands for the device.

    Args:
        inputs: m.
        outputs: r; ``None``: the columns of the file behind the first m.
        seed: of the fit.
        path: a CSV of numbers, one pair per row, m columns of inputs before r of outputs. A first row of names is left out,
            one of numbers is data.
        hidden: widths of the twin.
        epochs: of the fit.
        lr: of the fit.

    Attributes:
        error: root mean squared error on the pairs it was neither fitted nor chosen by.

    Raises:
        ValueError: no file, rows of different length, values that are no finite numbers, too few columns or rows, no hidden
            width, or no epoch.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int | None = None,
        seed: int = 0,
        path: str | Path = "",
        hidden: Sequence[int] = (100, 200, 100),
        epochs: int = 120,
        lr: float = 1e-3,
    ) -> None:
        if not hidden or min(hidden) < 1 or epochs < 1 or not lr > 0:
            raise ValueError(
                f"hidden is {list(hidden)}, epochs {epochs}, lr {lr}: expected positive widths, epochs and a rate above 0"
            )
        pairs = _read(path)
        count = pairs.shape[1] - inputs
        if count < 1 or outputs not in (None, count):
            raise ValueError(
                f"{path} has {pairs.shape[1]} columns, and a device of {inputs} inputs"
                f"{'' if outputs is None else f' and {outputs} outputs'} has {inputs + (outputs or 1)}"
                f"{'' if outputs else ' at least'}: give the pairs of this device, inputs first"
            )
        if len(pairs) < 20:
            raise ValueError(f"{path} has {len(pairs)} rows, expected at least 20 measured pairs to fit a twin to")
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.default_generator.manual_seed(seed)
            self._fit(torch.from_numpy(pairs).float(), inputs, (inputs, *hidden, count), epochs, lr)

    def _fit(self, pairs: Tensor, inputs: int, widths: Sequence[int], epochs: int, lr: float) -> None:
        pairs = pairs[torch.randperm(len(pairs))]
        judged = max(round(0.07 * len(pairs)), 1)
        chosen = max(round(0.03 * len(pairs)), 1)
        x, y = pairs[:, :inputs], pairs[:, inputs:]
        fitted = len(pairs) - judged - chosen
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(widths)):
            layers += [nn.SiLU()] * (i > 0) + [nn.Linear(before, after)]
        net = nn.Sequential(*layers)
        optimizer = torch.optim.Adam(net.parameters(), lr=lr)
        best, weights = math.inf, {}
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(fitted), 100):
                optimizer.zero_grad()
                (net(x[rows]) - y[rows]).square().mean().sqrt().backward()
                optimizer.step()
            with torch.no_grad():
                loss = _rmse(net(x[fitted : fitted + chosen]), y[fitted : fitted + chosen])
            if loss < best:
                best, weights = loss, {name: value.clone() for name, value in net.state_dict().items()}
        if not weights:
            raise ValueError("the twin's fit diverges: give a smaller lr, or measurements scaled to about 1")
        net.load_state_dict(weights)
        self._net = net.requires_grad_(False)
        with torch.no_grad():
            self.error = _rmse(net(x[fitted + chosen :]), y[fitted + chosen :])

    def respond(self, x: Tensor) -> Tensor:
        """``(B, m)`` to ``(B, r)``."""
        parameter = next(self._net.parameters())
        if parameter.dtype != x.dtype or parameter.device != x.device:
            self._net.to(x.device, x.dtype)
        answer: Tensor = self._net(x)
        return answer


def _rmse(given: Tensor, wanted: Tensor) -> float:
    return float((given - wanted).square().mean().sqrt())


def _read(path: str | Path) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    place = Path(path).expanduser()
    if not str(path) or not place.is_file():
        raise ValueError(
            f"the measurements are {str(path)!r}, and there is no such file: give a CSV with one measured pair per row, "
            "options={path: FILE}"
        )
    try:
        with place.open(newline="", encoding="utf-8-sig") as file:  # a spreadsheet may put a mark in front
            rows = [row for row in csv.reader(file) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{place} is no CSV: {error}; save it as text in UTF-8, with commas") from error
    if rows and not any(_numbers([value]) for value in rows[0]):
        rows = rows[1:]  # names; a first row with some numbers is a pair with something missing
    if not rows:
        raise ValueError(f"{place} holds no measurements: give one pair per row")
    for i, row in enumerate(rows):
        if len(row) != len(rows[0]) or not _numbers(row):
            raise ValueError(
                f"measurement {i + 1} of {place} is no row of {len(rows[0])} finite numbers: every row needs all inputs and "
                "all outputs"
            )
    return np.array(rows, dtype=np.float64)


def _numbers(row: Sequence[str]) -> bool:
    try:
        return all(math.isfinite(float(value)) for value in row)
    except ValueError:
        return False
