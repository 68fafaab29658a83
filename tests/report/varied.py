"""Records as a year of work leaves them, made without training: sections, sweeps, failures, targets, a search, students."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from locallearn.records import SCHEMA, Record, load_record

RULES = {
    **{"backprop": "global", "mono_forward": "layer-local", "forward_forward": "gradient-isolated, parameter-coupled"},
    **{"cafo": "layer-local", "pepita": "forward-only", "feedback_alignment": "feedback", "local_heads": "layer-local"},
    **{"counter_current": "group-local", "layer_collaboration": "layer-local"},
}


def varied(runs: Path) -> list[Record]:
    """Forty runs in six sections: eight rules at once, a sweep of two settings, a target, a metric to be small, failures."""
    draw = random.Random(0)
    made = []
    # Nine rules beside each other on one seed more than the others have.
    for rule in RULES:
        for seed in range(2 if rule not in ("backprop", "mono_forward") else 3):
            made.append(_write(runs, len(made), draw, rule, seed, "mnist", "mlp"))
    for lr, width in ((1e-3, 64), (3e-3, 64), (1e-2, 64), (1e-3, 256), (3e-3, 256), (1e-2, 256)):
        config = {"optimizer": {"lr": lr}, "net": {"hidden": [width], "width": width}}
        made.append(_write(runs, len(made), draw, "mono_forward", 0, "fashion_mnist", "mlp", config=config))
    for rule, arrived in (("backprop", 3), ("forward_forward", 1)):
        for seed in range(3):
            target = {"accuracy": 0.9, **({"seconds": 20.0 + seed, "samples": 9000} if seed < arrived else {})}
            made.append(_write(runs, len(made), draw, rule, seed, "digits", "mlp", mode="target", target=target))
    mse = {"task": "reconstruction", "metric": {"name": "mse", "maximise": False}}
    made.append(_write(runs, len(made), draw, "backprop", 0, "digits", "autoencoder", **mse))
    made.append(_write(runs, len(made), draw, "local_heads", 0, "digits", "autoencoder", **mse))
    gpu = {"gpus": ["NVIDIA H100 80GB HBM3"], "cpu": "a chip"}
    made.append(
        _write(runs, len(made), draw, "cafo", 0, "cifar10", "a_network_of_an_exceedingly_long_name", hardware=gpu)
    )
    failing = {"status": "failed", "error": "unit 'layer3' diverged: its loss is nan at step 4; try a smaller rate."}
    made.append(_write(runs, len(made), draw, "backprop", 0, "cifar10", "cnn", **failing))
    made.append(_write(runs, len(made), draw, "cafo", 0, "cifar10", "cnn"))
    while len(made) < 40:
        stopped = {"status": "interrupted", "error": "stopped by the user or the system"}
        made.append(_write(runs, len(made), draw, "mono_forward", 10 + len(made), "mnist", "mlp", **stopped))
    search(runs)
    students(made[0])
    return made


def many(runs: Path, n: int = 1000) -> list[Record]:
    """So many runs: ten data sets, nine rules and settings of them, three or more seeds of each, one in fifty failed."""
    draw = random.Random(1)
    made = []
    for i in range(n):
        group, seed = divmod(i, 5)
        rule = list(RULES)[group % len(RULES)]
        variant = None if group < 100 else f"setting={group // 100}"
        failed = {"status": "failed", "error": "diverged"} if i % 50 == 49 else {}
        data = f"data_{group % 10}"
        made.append(_write(runs, i, draw, rule, seed, data, "mlp", variant=variant, **failed))
    return made


def _write(
    runs: Path, number: int, draw: random.Random, rule: str, seed: int, dataset: str, net: str, **values: Any
) -> Record:
    place = list(RULES).index(rule)
    skill = 0.9 + 0.01 * place - 0.002 * place**2 + draw.gauss(0, 0.003)
    seconds = 60.0 * (1 + place / 3) * math.exp(draw.gauss(0, 0.1))
    small = "metric" in values
    name = "mse" if small else "accuracy"
    figure = 0.02 + 0.01 * draw.random() if small else skill
    run = runs / f"20261127-{number:06d}-{rule}-{dataset}-s{seed}-{number:06x}"
    epochs = 12
    joules = {"nvml:0 a card": 30 * seconds, "codecarbon:cpu": 3 * seconds}
    windows = [
        {
            "source": "nvml:0 a card",
            "quality": "measured",
            "joules": joules["nvml:0 a card"],
            "reason": None,
            "flags": [],
        },
        {"source": "codecarbon:cpu", "quality": "modelled", "by": "load x 8 W", "joules": 3 * seconds, "reason": None},
        {"source": "rapl", "quality": "measured", "joules": None, "reason": "no RAPL domains here", "flags": []},
    ]
    data = {
        **{"id": run.name, "schema": SCHEMA, "serial": number, "algorithm": rule, "dataset": dataset, "net": net},
        **{"task": "classification", "seed": seed, "status": "done", "mode": "own", "locality": RULES[rule]},
        "validation": {name: figure, "loss": 0.3},
        "test": {name: figure * 1.001, "loss": 0.3},
        "cost": {
            **{"train_s": seconds, "validation_s": 2.0, "update_flops": 1e7 * (1 + place), "train_flops": 1e12},
            **{"activation_peak_bytes": 3_000_000 // (1 + place), "params": 1_796_010, "samples": 540_000},
            **{"inference_flops": 3.6e6, "energy_j": {**joules, "rapl": None}},
        },
        "energy": windows,
        "epochs": [epochs],
        "blocks": ["layer1", "layer2", "layer3"],
        "config": {"optimizer": {"lr": 1e-3}, "seed": seed, "trainer": {"max_epochs": epochs}},
        "command": f"locallearn train algorithm={rule} dataset={dataset} seed={seed}",
        "versions": {"torch": "2.6.0"},
        "hardware": {"cpu": "a chip", "gpus": [], "threads": 1},
        "started": f"2026-11-27T{number // 3600 % 24:02d}:{number // 60 % 60:02d}:{number % 60:02d}+00:00",
        "finished": "2026-11-27T23:00:00+00:00",
        **values,
    }
    if data["status"] != "done":
        data |= {"test": {}, "validation": {}, "cost": {}, "energy": []}
    run.mkdir(parents=True)
    (run / "record.json").write_text(json.dumps(data), encoding="utf-8")
    (run / "metrics.csv").write_text("\n".join(_lines(name, figure, seconds, epochs)) + "\n", encoding="utf-8")
    return load_record(run)


def _lines(name: str, figure: float, seconds: float, epochs: int) -> Iterator[str]:
    yield "epoch,step,name,value"
    for epoch in range(epochs):
        near = math.exp(-epoch / 3)
        value = figure * (1 + near) if name == "mse" else figure * (1 - 0.5 * near)
        spent = seconds * (epoch + 1) / epochs
        known = {f"validation/{name}": value, "validation/loss": 0.3 + near, "cost/train_s": spent}
        known |= {"cost/energy_j/nvml:0 a card": 30 * spent}
        for i in (1, 2, 3):
            known |= {f"block/layer{i}/loss": near / i, f"block/layer{i}/probe_accuracy": 0.9 - near / 2 + i / 100}
        for key, one in known.items():
            yield f"{epoch},{(epoch + 1) * 100},{key},{one:.6g}"


def search(runs: Path, **values: Any) -> Path:
    """A search of two rules beside the runs, with pruned and failed trials."""
    draw = random.Random(2)

    def study(rule: str) -> Mapping[str, Any]:
        trials = []
        for number in range(30):
            state = "PRUNED" if number % 4 == 3 else "FAIL" if number % 13 == 12 else "COMPLETE"
            lr = 10 ** draw.uniform(-4, -2)
            value = None if state == "FAIL" else 0.95 - 0.02 * (math.log10(lr) + 3) ** 2 + draw.gauss(0, 0.002)
            steps = range(1, 4 if state == "PRUNED" else 1 if value is None else 13)
            validated = {str(step): (value or 0.0) * (1 - 0.5 * math.exp(-step / 3)) for step in steps}
            params = {
                "optimizer.lr": lr,
                "net.hidden": draw.choice(["[64]", "[64,64]"]),
                "net.dropout": draw.random() / 2,
            }
            trials.append(
                {
                    **{
                        "number": number,
                        "state": state,
                        "counts": True,
                        "params": params,
                        "values": [value] if value else None,
                        "intermediate": validated,
                    },
                    **{
                        "seconds": 12.0,
                        "records": [f"trial-{rule}-{number}"],
                        "error": "diverged" if value is None else None,
                    },
                }
            )
        best = max((t for t in trials if t["state"] == "COMPLETE"), key=lambda t: t["values"][0])
        importances = {"accuracy": {"optimizer.lr": 0.8, "net.hidden": 0.15, "net.dropout": 0.05}}
        return {
            **{"study": f"{rule}-mnist", "algorithm": rule, "directions": ["maximize"], "space": {}, "trials": trials},
            **{"seconds": 360.0, "best": [best["number"]], "importances": importances, "experiment": f"{rule}.yaml"},
        }

    data = {
        **{"schema": 1, "search": "mnist-mlp-1a2b", "dataset": "mnist", "net": "mlp", "task": "classification"},
        **{"command": "locallearn tune dataset=mnist tune.trials=30", "finished": True, "seeds": [1000]},
        **{"budget": {"trials": 30, "timeout_s": None}, "sampler": "tpe", "pruner": "median"},
        "objectives": [{"name": "accuracy", "of": "validation", "direction": "maximize"}],
        "studies": [study("backprop"), study("mono_forward")],
        **values,
    }
    path = runs / "tune" / "mnist-mlp-1a2b" / "tune.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def students(record: Record, **values: Any) -> Path:
    """What ``locallearn distill`` leaves of a run."""
    rows = [{"row": 0, "recipe": None, "depth": 0, "params": 1_796_010, "bytes": 7_000_000, "flops": 3.6e6}]
    for i, (method, depth) in enumerate((m, d) for m in ("svd", "snnk") for d in (1, 2)):
        row = {"recipe": {"method": method, "share": 0.25}, "depth": depth, "params": 1_000_000 - 300_000 * depth}
        rows.append({"row": i + 1, **row, "bytes": 3_000_000, "flops": 1.8e6, "latency_ratio": 0.6})
    for row in rows:
        found = 0.98 - 0.01 * row["depth"]
        row |= {"test": {"accuracy": found}, "validation": {"accuracy": found}, "lost": 0.98 - found}
    data = {"format": 1, "run": record.id, "metric": "accuracy", "students": rows, **values}
    path = record.path.parent / "distilled" / record.path.name / "table.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path
