"""``locallearn replay``: the weights of a zeroth-order run, rebuilt from one number per direction and step."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from locallearn.cli.saved import asked_of, build, run_folder
from locallearn.cli.settings import UsageError


def replay(words: list[str]) -> int:
    """Rebuild what a run trained from its trajectory, without any data, and compare."""
    import torch

    from locallearn.algorithms.zeroth_order import ZerothOrder
    from locallearn.algorithms.zeroth_order import trajectory as kept
    from locallearn.nets.weights import digest
    from locallearn.precision import multiplying
    from locallearn.records import load_record, write_file
    from locallearn.strategies.making import make_optimizers
    from locallearn.study.plan import MODEL
    from locallearn.study.train import read_tensors

    names, cfg, given = asked_of("replay", words)
    if len(names) != 1:
        raise UsageError(
            f"replay takes one run or trajectory, and got {len(names)}: locallearn replay RUN [replay.out=FILE]"
        )
    file, folder = _places(names[0], cfg.replay.run)
    out = _out(cfg.replay.out)
    trajectory = kept.read(file)
    record = load_record(folder)
    plan, _, _ = build(record, given["trust"], given["places"], given["accelerator"] or "cpu", begun=True)
    rule = plan.algorithm
    if not isinstance(rule, ZerothOrder):
        raise UsageError(f"{folder} was trained by {record.algorithm}, and only a run of zeroth_order has a trajectory")
    model = read_tensors(folder / MODEL)["state_dict"] if (folder / MODEL).is_file() else None
    found = kept.weights_of(rule)
    final = None if model is None else {name: model[f"net.{name}"] for name in found}
    wanted = None if final is None else bytes.fromhex(digest(final))[:8]
    at = max((n for n, known in trajectory.weights.items() if known == wanted), default=len(trajectory.steps))
    chosen = {name: weight.clone() for name, weight in found.items()}
    equal = 0
    with multiplying(plan.matmul_precision):
        for number in kept.replay(rule, make_optimizers(rule, plan.optimizer), trajectory):
            if number in trajectory.weights:
                equal += bytes.fromhex(digest(found))[:8] == trajectory.weights[number]
            if number == at:
                chosen = {name: weight.detach().cpu().clone() for name, weight in found.items()}
    unchecked = len(trajectory.steps) - trajectory.checks[-1][0]
    weights = sum(weight.numel() * weight.element_size() for weight in found.values())
    numbers = len(trajectory.steps) * rule.numbers
    print(f"{len(trajectory.steps)} steps replayed, {numbers} numbers, without data" + _last(unchecked))
    print(
        f"the trajectory has {trajectory.size} bytes ({trajectory.size / max(numbers, 1):.2f} per number), the weights have "
        f"{weights} ({trajectory.size / weights:.3g} of them)"
    )
    print(f"after {equal} of {len(trajectory.weights)} epochs the weights are bit-equal to those of the training")
    buffers = [name for name, _ in rule.blocks.named_buffers()]
    if buffers:
        print(f"not rebuilt, because they come from data: {len(buffers)} buffers ({', '.join(buffers[:3])})")
    code = 0
    if final is not None:
        code = _compare(chosen, final, at, rule.exact)
    if out is not None:
        content = io.BytesIO()
        torch.save(chosen, content)
        write_file(out, content.getvalue())
        print(out)
    return code


def _last(unchecked: int) -> str:
    return f" (the last {unchecked} are not covered by a checksum: the training was killed)" if unchecked else ""


def _compare(chosen: dict[str, Any], final: dict[str, Any], at: int, exact: bool) -> int:
    """Say how far the rebuilt weights are from the kept ones; 1 where they are another training's."""
    worst = max(
        (float((chosen[name] - weight).abs().max()) for name, weight in final.items() if weight.numel()), default=0
    )
    if worst == 0:
        print(f"model.pt: bit-equal (step {at})")
        return 0
    print(f"model.pt: the largest difference is {worst:.3g} (step {at})")
    return 1 if exact or not worst < 1e-2 else 0


def _places(given: str, run: Any) -> tuple[Path, Path]:
    """The file, and the folder of its run."""
    from locallearn.study.plan import TRAJECTORY

    place = Path(given).expanduser()
    if place.is_file() and run is None and not (place.parent / "record.json").is_file():
        raise UsageError(f"{place} does not lie in the folder of its run: name that with replay.run=FOLDER")
    folder = run_folder(run if run is not None else place.parent if place.is_file() else place)
    file = place if place.is_file() else folder / TRAJECTORY
    if not file.is_file():
        raise UsageError(
            f"{folder} has no {TRAJECTORY}: it was trained without algorithm.trajectory=run; where the trajectory lies "
            f"elsewhere, locallearn replay FILE replay.run={folder}"
        )
    return file, folder


def _out(given: Any) -> Path | None:
    if given is None:
        return None
    place = Path(str(given)).expanduser()
    if place.suffix != ".pt":
        raise UsageError(f"replay.out is {given}, expected a name that ends in .pt")
    if place.is_dir() or not os.access(place.parent, os.W_OK):
        raise UsageError(f"{place} cannot be written: name a file in a folder that is there and can be written to")
    return place
