"""A power integrated over time, in a process of its own: the busy interpreter of a training shall not disturb the samples.

``_power.py`` runs this file, without the package and whatever that would import. It samples until it reads ``end``, or
its standard input ends, which it does when the process at the other end ends, however that ends. Every other line there
asks for the state so far, which is answered as one line of JSON; a first answer is given unasked, once there is a sample.
"""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any


@dataclass
class Integral:
    """The trapezoidal rule over samples of a power, and what its error is estimated from.

    Two neighbouring intervals are taken as one, too: the difference of the two results is three times the error of the
    finer one where the power is smooth (Richardson), and of the size of its error where the power is noise.

    Attributes:
        seconds: from the first sample to the last.
        joules: over these.
        samples: how many there were.
        longest_s: between two samples, since it was last set to 0.
        signed_j: sum of the differences.
        squared_j2: sum of their squares.
        power_w: of the last sample.
    """

    seconds: float = 0.0
    joules: float = 0.0
    samples: int = 0
    longest_s: float = 0.0
    signed_j: float = 0.0
    squared_j2: float = 0.0
    power_w: float = 0.0
    _points: tuple[tuple[float, float], ...] = ()

    def add(self, at_s: float, power_w: float) -> None:
        """Take a sample; one that is not later than the last is left out."""
        if self._points:
            then_s, then_w = self._points[-1]
            if at_s <= then_s:
                return
            self.seconds += at_s - then_s
            self.joules += (at_s - then_s) * (then_w + power_w) / 2
            self.longest_s = max(self.longest_s, at_s - then_s)
        self.samples += 1
        self.power_w = power_w
        self._points = (*self._points, (at_s, power_w))
        if len(self._points) == 3:
            (t0, p0), (t1, p1), (t2, p2) = self._points
            difference_j = ((t2 - t0) * p1 - (t2 - t1) * p0 - (t1 - t0) * p2) / 2
            self.signed_j += difference_j
            self.squared_j2 += difference_j**2
            self._points = self._points[2:]

    def state(self) -> dict[str, Any]:
        """Everything but the points, ready for JSON; the longest interval begins anew."""
        state = {key: value for key, value in asdict(self).items() if not key.startswith("_")}
        self.longest_s = 0.0
        return state


def sampler(settings: dict[str, Any]) -> Callable[[], float]:
    """What gives watts; ``kind`` says of which device, the rest is that function's arguments."""
    kinds: dict[str, Callable[..., Callable[[], float]]] = {
        "nvml": _nvml,
        "amd": _amd,
        "jetson": _jetson,
        "replay": _replay,
    }
    arguments = dict(settings)
    return kinds[arguments.pop("kind")](**arguments)


def _nvml(index: int) -> Callable[[], float]:
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    return lambda: float(pynvml.nvmlDeviceGetPowerUsage(handle)) / 1e3


def _amd(number: int, call: str) -> Callable[[], float]:
    from zeus.device.gpu.amd import AMDGPUs

    boards = AMDGPUs()
    return lambda: float(getattr(boards, call)(number)) / 1e3


def jetson_rails() -> dict[str, Any]:
    """What measures the power of each rail of a Jetson board, by zeus's name of it.

    The public way would start a process of zeus's own, which outlives a parent that is killed, and whose answers are
    late by a sample.
    """
    from zeus.device.soc.jetson import Jetson

    rails: dict[str, Any] = Jetson._discover_available_metrics(object.__new__(Jetson))
    return rails


def _jetson(rail: str) -> Callable[[], float]:
    sensor = jetson_rails()[rail]
    return lambda: float(sensor.measure_power()) / 1e3


def _replay(trace: Sequence[tuple[float, float]]) -> Callable[[], float]:
    """Watts of a trace of ``(seconds, watts)`` points, straight between them, from now on."""
    began_s = time.monotonic()

    def power_w() -> float:
        now_s = time.monotonic() - began_s
        for (t0, p0), (t1, p1) in pairwise(trace):
            if t0 <= now_s <= t1:
                return p0 + (p1 - p0) * (now_s - t0) / (t1 - t0)
        raise ValueError(f"the replayed trace ends after {trace[-1][0]:g} s")

    return power_w


def poll(settings: dict[str, Any], every_s: float, answer: Callable[[str], None]) -> None:
    """Sample until standard input ends."""
    asked: queue.Queue[bool] = queue.Queue()
    threading.Thread(target=_listen, args=(asked,), daemon=True).start()
    parent = os.getppid()
    integral, failure = Integral(), ""
    try:
        power_w = sampler(settings)
    except Exception as error:
        failure = _said(error)
    asking, due_s = True, time.monotonic()
    while os.getppid() == parent:
        if not failure:
            began_s = time.monotonic()
            try:
                watts = power_w()
                if not (math.isfinite(watts) and watts >= 0):
                    raise ValueError(f"the power was {watts} W")
                integral.add((began_s + time.monotonic()) / 2, watts)
            except Exception as error:
                failure = _said(error)
        if asking:
            answer(json.dumps({**integral.state(), "failure": failure}))
        now_s = time.monotonic()
        if now_s >= due_s:
            due_s = max(due_s + every_s, now_s)  # what came too late is not made up for
        try:
            asking = asked.get(timeout=max(0.0, due_s - now_s))
        except queue.Empty:
            asking = False
            continue
        if not asking:
            return


def _listen(asked: queue.Queue[bool]) -> None:
    for line in sys.stdin:
        if line.strip() == "end":
            break
        asked.put(True)
    asked.put(False)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def main() -> None:
    """Serve the process that started this one."""
    # Who is to stop the training does so there; it then ends here, too, after its last question.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # What libraries print goes elsewhere.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(line: str) -> None:
        answers.write(line + "\n")
        answers.flush()

    arguments = json.loads(sys.argv[1])
    try:
        poll(arguments["sampler"], arguments["every_s"], answer)
    except BrokenPipeError:  # nobody is there any more
        os._exit(0)


if __name__ == "__main__":
    main()
