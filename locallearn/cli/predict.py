"""``locallearn predict``: what a finished run says of its test set or of other inputs, as figures and as a table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from locallearn.cli.saved import Saved, asked_of, load
from locallearn.cli.settings import UsageError


def predict(words: list[str]) -> int:
    """Let a finished run predict again: the test set, or inputs of one's own."""
    runs, cfg, given = asked_of("predict", words)
    if len(runs) != 1:
        raise UsageError(f"predict takes one run, and got {len(runs)}: locallearn predict RUN [predict.out=FILE]")
    part, source, out = cfg.predict.part, cfg.predict.inputs, cfg.predict.out
    _check_predict(part, source, out, any(word.startswith("predict.part=") for word in words))
    student = cfg.predict.student
    if student is not None and not Path(str(student)).expanduser().is_file():
        raise UsageError(f"there is no file {student} to read a student from")
    saved = load(runs[0], **given)
    if student is not None:
        from locallearn.distillation import load_student

        load_student(saved.net, str(student))
    if source is None:
        found = evaluate(saved, part)
        _say(saved.record, part, found[0])
        batches = found[1]
    else:
        batches = [(None, saved.predict(read_inputs(Path(str(source)).expanduser())).cpu(), None)]
    if out is not None or source is not None:
        _write_predictions(batches, None if out is None else Path(str(out)).expanduser(), saved)
    return 0


def _check_predict(part: Any, source: Any, out: Any, chosen: bool) -> None:
    """Everything that can be known before the run is loaded."""
    if part not in ("test", "validation"):
        raise UsageError(f"predict.part is {part}, expected test or validation")
    if source is not None and chosen:
        raise UsageError("predict.part names data of the run, and predict.inputs other ones: give one of the two")
    if source is not None and not Path(str(source)).expanduser().is_file():
        raise UsageError(f"there is no file {source} to read inputs from")
    if out is not None:
        place = Path(str(out)).expanduser()
        if place.suffix not in (".csv", ".npy"):
            raise UsageError(f"predict.out is {out}, expected a name that ends in .csv or .npy")
        if place.is_dir() or not os.access(place.parent, os.W_OK):
            raise UsageError(f"{place} cannot be written: name a file in a folder that is there and can be written to")


def _say(record: Any, part: str, figures: dict[str, float]) -> None:
    metric = record.metric.name
    known = record.part(part).get(metric)
    beside = "" if known == figures[metric] else f" (the record says {known})"
    print(f"{record.algorithm} on {record.dataset}: {part} {metric} {figures[metric]:.4f}{beside}")


def evaluate(saved: Saved, part: str) -> tuple[dict[str, float], list[tuple[Any, Any, Any]]]:
    """The task's figures on ``validation`` or ``test`` data, and what they come from.

    Returns:
        Figures by name, and for every batch ids of its rows (numbers, nodes, or pairs of nodes ``(2, M)``), outputs and
        targets.
    """
    import lightning.pytorch as pl
    import torch

    from locallearn.precision import multiplying
    from locallearn.study._signals import stoppable
    from locallearn.study.train import quiet

    found: list[tuple[Any, Any, Any]] = []
    latest: list[Any] = []
    asked: list[Any] = []  # of the rule itself, which a task of the user's may ask past its own forward
    judged: list[Any] = []

    class Keep(pl.Callback):
        def on_test_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
            batch = judged.pop() if judged else module.to_batch(batch)
            if not latest and not asked:
                raise UsageError(
                    f"{type(module).__name__} gives no outputs to show: let its test_step call the task itself, self(batch), "
                    "or self.algorithm.predict"
                )
            rows, made, targets = batch.rows, (latest or asked).pop(), batch.targets
            asked.clear()
            if rows is not None and rows.ndim == 1:
                ids = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
                made, targets = made[rows], targets[rows]
            else:
                ids = rows
            found.append((None if ids is None else ids.cpu(), made.cpu(), targets.cpu()))

        def on_validation_batch_end(self, *given: Any) -> None:
            self.on_test_batch_end(*given)

    def judge(batch: Any) -> Any:
        judged.append(batch)  # of links, what the loader gave does not say which part it is
        return type(saved.task).judge(saved.task, batch)

    def predict(*given: Any, **named: Any) -> Any:
        made = type(algorithm).predict(algorithm, *given, **named)
        asked.append(made)
        return made

    algorithm = saved.algorithm
    algorithm.predict = predict
    hook = saved.task.register_forward_hook(lambda module, given, made: latest.append(made))
    saved.task.judge = judge
    saved.trainer.callbacks.append(Keep())
    run = saved.trainer.test if part == "test" else saved.trainer.validate
    try:
        with quiet(), stoppable(), multiplying(saved.plan.matmul_precision):
            figures = run(saved.task, datamodule=saved.data, verbose=False)[0]
    finally:
        hook.remove()
        del saved.task.judge, algorithm.predict
        saved.trainer.callbacks.pop()
    return {name.partition("/")[2]: value for name, value in figures.items()}, found


def read_inputs(path: Path) -> Any:
    """A tensor from a file of NumPy or PyTorch, without running anybody's code.

    Raises:
        UsageError: it is neither, or holds something else.
    """
    import numpy as np
    import torch

    from locallearn.study.train import read_tensors

    if path.suffix not in (".npy", ".pt"):
        raise UsageError(f"predict.inputs is {path}, expected a file that ends in .npy or .pt")
    if path.suffix == ".pt":
        found = read_tensors(path)
    else:
        try:
            array = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise UsageError(
                f"{path} cannot be read as an array of numbers: it is damaged, or holds objects"
            ) from error
        found = torch.from_numpy(array) if array.dtype.kind in "fiub" else None
    if not isinstance(found, torch.Tensor):
        raise UsageError(f"{path} holds no tensor of numbers, (N, ...)")
    if found.is_floating_point() and found.ndim:
        strange = int((~found.isfinite()).reshape(len(found), prod(found.shape[1:])).any(1).sum())
        if strange:
            raise UsageError(
                f"{strange} of {len(found)} samples in {path} hold NaN or infinity, and nothing follows from those"
            )
    return found


def _write_predictions(batches: Sequence[Any], out: Path | None, saved: Any) -> None:
    """As a file, or as a table on the terminal."""
    import io

    import numpy as np

    from locallearn.records import write_file

    if out is not None and out.suffix == ".npy":
        import torch

        content = io.BytesIO()
        np.save(content, torch.cat([outputs for _, outputs, _ in batches]).float().numpy(), allow_pickle=False)
        write_file(out, content.getvalue())
    else:
        text = table(batches, saved.task.info().classes)
        if out is None:
            print(text, end="")
        else:
            write_file(out, text.encode())
    if out is not None:
        print(out)


def table(batches: Sequence[tuple[Any, Any, Any]], classes: bool) -> str:
    """Predictions as CSV: one row per sample, node or pair of nodes.

    Raises:
        UsageError: the outputs are not one number or one row of numbers per sample.
    """
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    start = 0
    for ids, outputs, targets in batches:
        if outputs.ndim > 2:
            raise UsageError(
                f"an output has shape {tuple(outputs.shape[1:])}, which is no row of a table: write predict.out=FILE.npy"
            )
        scores = outputs[:, None] if outputs.ndim == 1 else outputs
        names = ["source", "target"] if ids is not None and ids.ndim == 2 else ["sample"]
        places = ids.T.tolist() if len(names) == 2 else [[i] for i in range(start, start + len(scores))]
        if ids is not None and ids.ndim == 1:
            places = [[i] for i in ids.tolist()]
        if not start:
            predicted = ["predicted"] if classes and outputs.ndim == 2 else []
            wanted = [] if targets is None else ["label"]
            writer.writerow([*names, *predicted, *wanted, *(f"score_{i}" for i in range(scores.shape[1]))])
        for row, place in enumerate(places):
            best = [int(scores[row].argmax())] if predicted else []
            label = [] if targets is None else [targets[row].item()]
            writer.writerow([*place, *best, *label, *scores[row].tolist()])
        start += len(scores)
    return text.getvalue()
