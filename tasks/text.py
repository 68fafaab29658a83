"""Text that comes with Python, cut into windows of characters: predict the next one."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from locallearn.tasks._data import SampleData

__all__ = ["CHARACTERS", "PythonTopics", "encode", "python_text"]

CHARACTERS = 97
"""Printable ASCII, the end of a line, and one class for whatever else there is."""

Shift = Literal["none", "upper"]


def python_text() -> str:
    """The help texts of the running Python (``pydoc_data.topics``), by name: half a megabyte of English."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def encode(text: str) -> Tensor:
    """Classes of characters, uint8 ``(len(text),)``: 0 to 94 for space to ``~``, 95 for the end of a line, 96 for others."""
    codes = torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32).long()
    found = torch.where((codes >= 32) & (codes <= 126), codes - 32, 96)
    return torch.where(codes == 10, 95, found).to(torch.uint8)


class PythonTopics(SampleData):
    """Windows of Python's help texts and the characters that follow them.

    The text is cut into contiguous parts: the first eight tenths for training, one for validation, the last for the test; no
    window lies in two of them.

    Args:
        batch_size: windows in a training batch; the last one of an epoch may be smaller.
        eval_batch_size: of validation and test.
        length: characters of a window.
        stride: characters from one window's beginning to the next one's.
        shift: ``upper``: the same text in capitals, a task that a network of the text itself can be tuned to.
        limit_train: keep only the first so many windows of the training part.
        seed: of the order.

    Attributes:
        shape: of one input, ``(length,)``: classes of characters, int32.
        classes: number of characters.

    Raises:
        ValueError: a number that is out of range.
    """

    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int = 1000,
        *,
        length: int = 32,
        stride: int = 3,
        shift: Shift = "none",
        limit_train: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        for name, value in (
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
            ("length", length),
            ("stride", stride),
            ("limit_train", 1 if limit_train is None else limit_train),
        ):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1")
        if shift not in get_args(Shift):
            raise ValueError(f"shift is {shift!r}, expected none or upper")
        self._text = python_text()
        if length + 1 > len(self._text) // 10:
            raise ValueError(f"length is {length}, and a tenth of the text has {len(self._text) // 10} characters")
        self.shape = (length,)
        self.classes = CHARACTERS
        self._stride, self._shift, self._limit = stride, shift, limit_train

    def _make_parts(self) -> dict[str, tuple[Tensor, Tensor]]:
        codes = encode(self._text)
        if self._shift == "upper":  # letter by letter: no character becomes two
            codes = torch.where((codes >= 65) & (codes <= 90), codes - 32, codes)
        tenth = len(codes) // 10
        cuts = {"train": codes[: 8 * tenth], "validation": codes[8 * tenth : 9 * tenth], "test": codes[9 * tenth :]}
        parts = {}
        for name, part in cuts.items():
            windows = part.unfold(0, self.shape[0] + 1, self._stride)
            if name == "train" and self._limit is not None:
                windows = windows[: self._limit]
            parts[name] = windows[:, :-1].int(), windows[:, -1].long()
        return parts

    def example(self) -> Tensor:
        """Two windows of spaces, ``(2, length)``, int32 on the CPU."""
        return super().example().int()
