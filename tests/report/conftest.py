import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from locallearn.records import Record, RunFolder, load_record

Make = Callable[..., Record]

_COSTS = {
    "backprop": (60.0, 3000.0, 8.1e9, 14_200_000),
    "mono_forward": (45.0, 2300.0, 5.6e9, 4_900_000),
}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes a finished run on disk; keyword arguments replace top-level entries of its record.

    ``curves`` replaces the logged figures: values by epoch and name. ``picture`` becomes its reconstructions.
    """

    def run(
        algorithm: str = "mono_forward",
        seed: int = 0,
        *,
        logged: int = 3,
        status: str = "done",
        curves: Mapping[str, Sequence[float]] | None = None,
        picture: bytes | None = None,
        **values: Any,
    ) -> Record:
        seconds, joules, flops, peak = _COSTS.get(algorithm, _COSTS["mono_forward"])
        factor = 1 + seed / 50
        start = {
            "algorithm": algorithm,
            "dataset": "digits",
            "net": "mlp",
            "seed": seed,
            "mode": "own",
            "blocks": ["a", "b"],
        }
        folder = RunFolder.create(tmp_path / "runs", start | values)
        for name, line in (curves or {}).items():
            for epoch, value in enumerate(line):
                folder.log(epoch, epoch * 10, {name: value})
        for epoch in range(logged if curves is None else 0):
            accuracy = 1 - math.exp(-epoch - 1)
            logged = {"validation/accuracy": accuracy}
            for block in values.get("blocks", ("a", "b")):
                logged |= {f"block/{block}/loss": 1 / (epoch + 1), f"block/{block}/probe_accuracy": accuracy}
            folder.log(epoch, epoch * 10, logged)
        cost = {
            "train_s": seconds * factor,
            "update_flops": flops,
            "activation_peak_bytes": peak,
            "params": 1_796_010,
            "energy_j": {"nvml": joules * factor, "model": joules},
        }
        energy = [
            {"source": "nvml", "quality": "measured", "joules": joules * factor, "reason": None},
            {"source": "model", "quality": "modelled", "joules": joules, "reason": None},
        ]
        if picture is not None:
            (folder.path / "reconstructions.png").write_bytes(picture)
        figures = {"test": {"accuracy": 0.98 + seed / 1000}, "cost": cost, "energy": energy}
        folder.update(figures | values)
        return load_record(
            folder.finish(status, None if status == "done" else values.get("error", "Block a diverged at step 7."))
        )

    return run
