"""Boards that tell their power but count no energy: the power is integrated by a process of its own (``_poll.py``)."""

from __future__ import annotations

import json
import math
import queue
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from locallearn.energy._meter import Counter, Quality, Reading, UnreadableError

POLL_S = 0.05
"""Seconds between two samples; a board's own sensor is renewed less often."""

_FILE = Path(__file__).with_name("_poll.py")
# Starting Python and a vendor's library takes a second or two; a sample takes milliseconds.
_START_S, _ANSWER_S, _END_S = 30.0, 10.0, 2.0
# A gap this many times the interval that was asked for is told: something held the samples up.
_LATE = 10


class Poller:
    """The process that samples a power, from the side of the one that is measured.

    It ends when this object is closed, and with this process, however that ends.

    Args:
        sampler: what is sampled, as ``_poll.sampler`` takes it.
        every_s: seconds between two samples.

    Raises:
        UnreadableError: it does not start, or its first sample fails.
    """

    def __init__(self, sampler: dict[str, Any], every_s: float = POLL_S) -> None:
        self.every_s = every_s
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._lost: str | None = None
        # In a session of its own, so that Ctrl-C at the terminal is for the training alone.
        command = [sys.executable, "-P", str(_FILE), json.dumps({"sampler": sampler, "every_s": every_s})]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                start_new_session=True,
            )
        except OSError as error:
            raise UnreadableError(f"the process that samples the power did not start: {error}") from None
        threading.Thread(target=self._receive, args=(self._process.stdout,), daemon=True).start()
        try:
            self._answer(_START_S)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def state(self) -> dict[str, Any]:
        """A sample of now, and the integral up to it (see ``_poll.Integral``).

        Raises:
            UnreadableError: a sample has failed, or the process does not answer.
        """
        assert self._process.stdin is not None
        if self._lost is None:
            try:
                self._process.stdin.write("?\n")
                self._process.stdin.flush()
            except (OSError, ValueError):
                self._lost = "the process that samples the power has ended"
        return self._answer(_ANSWER_S)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):
            # By word: a data loader's forked worker holds the pipe open, so that its end does not come.
            self._process.stdin.write("end\n")
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:  # held up in a driver
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)

    def _answer(self, wait_s: float) -> dict[str, Any]:
        if self._lost is None:
            try:
                line = self._answers.get(timeout=wait_s)
            except queue.Empty:
                # A late answer would be taken for that to the next question.
                self._lost = f"the process that samples the power did not answer for {wait_s:g} s"
            else:
                if line is not None:
                    state: dict[str, Any] = json.loads(line)
                    if not state["failure"]:
                        return state
                self._lost = state["failure"] if line is not None else "the process that samples the power has ended"
        raise UnreadableError(self._lost)

    def _receive(self, answers: IO[str]) -> None:
        with answers, suppress(OSError, ValueError):
            for line in answers:
                self._answers.put(line)
        self._answers.put(None)


@dataclass
class PowerCounter(Counter):
    """A counter made by integrating a power, with an estimate of how wrong that is.

    The estimate takes in how fast the power changed between samples, and at both ends of every counted stretch what the
    sensor's delay moves across the border. It says nothing of the sensor's own accuracy.

    Attributes:
        poller: of this counter alone.
        lag_s: seconds by which the sensor's figure is late, half of the time it averages over.
    """

    poller: Poller = field(kw_only=True)
    lag_s: float = field(default=0.0, kw_only=True)
    _state: dict[str, Any] = field(default_factory=dict)
    _seconds: float = 0.0
    _samples: int = 0
    _longest_s: float = 0.0
    _signed_j: float = 0.0
    _squared_j2: float = 0.0
    _moved_j: float = 0.0
    _began_w: float = 0.0
    _power_w: float = 0.0

    @classmethod
    def of(cls, source: str, sampler: dict[str, Any], *, every_s: float = POLL_S, **others: Any) -> PowerCounter:
        """With a poller of its own.

        Raises:
            UnreadableError: the power cannot be sampled.
        """
        poller = Poller(sampler, every_s)
        return cls(source, lambda: 0.0, poller=poller, **others)

    def __post_init__(self) -> None:
        self.read = self._integral_j

    def begin(self) -> None:
        """See :meth:`Counter.begin`."""
        super().begin()
        self._seconds, self._samples, self._longest_s = 0.0, 0, 0.0
        self._signed_j = self._squared_j2 = self._moved_j = self._began_w = self._power_w = 0.0

    def start(self) -> None:
        """See :meth:`Counter.start`."""
        self._moved_j = self._at_the_ends_j()
        super().start()
        self._began_w = self._power_w = self._state.get("power_w", 0.0)

    def advance(self) -> None:
        """See :meth:`Counter.advance`."""
        before, counting = self._state, self._reason is None and self._last_j is not None
        super().advance()
        after = self._state
        if not counting or after is before or self._reason is not None:
            return
        self._seconds += after["seconds"] - before["seconds"]
        self._samples += after["samples"] - before["samples"]
        self._longest_s = max(self._longest_s, after["longest_s"])
        self._signed_j += after["signed_j"] - before["signed_j"]
        self._squared_j2 += after["squared_j2"] - before["squared_j2"]
        self._power_w = after["power_w"]

    def close(self) -> None:
        """See :meth:`Counter.close`."""
        self.poller.close()

    def reading(self, quality: Quality) -> Reading:
        """See :meth:`Counter.reading`."""
        error_j = max(abs(self._signed_j) / 3, math.sqrt(max(0.0, self._squared_j2))) + self._at_the_ends_j()
        self.detail |= {
            "samples": self._samples,
            "sampling_s": self._seconds / self._samples if self._samples else None,
            "longest_gap_s": self._longest_s,
            "sampling_error_j": error_j,
            "power_w": self._power_w,
        }
        self.by = f"power integrated over samples {self.poller.every_s:g} s apart"
        reading = super().reading(quality)
        if self._longest_s <= _LATE * self.poller.every_s:
            return reading
        late = f"between two samples of the power were up to {self._longest_s:.1f} s"
        return replace(reading, flags=(*reading.flags, late))

    def _at_the_ends_j(self) -> float:
        """What the delay has moved across the borders of the stretches so far."""
        return self._moved_j + self.lag_s * abs(self._power_w - self._began_w)

    def _integral_j(self) -> float:
        self._state = self.poller.state()
        joules: float = self._state["joules"]
        return joules
