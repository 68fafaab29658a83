"""What becomes of a program whose terminal is lost. Imports nothing that takes time."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NoReturn


def hang_up() -> Callable[..., NoReturn]:
    """What answers the loss of the terminal. What is said from then on goes nowhere: writing to it would be an error."""
    terminals = [number for number in (1, 2) if os.isatty(number)]

    def answer(*_: object) -> NoReturn:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in terminals:
            os.dup2(nowhere, number)
        os.close(nowhere)
        raise KeyboardInterrupt

    return answer
