"""``locallearn audit``: what is seen of every unit, and whether an algorithm's claim holds."""

from __future__ import annotations

from functools import partial
from typing import Any

from locallearn.cli.plans import command_line, make_plan
from locallearn.cli.settings import compose_settings
from locallearn.cli.terminal import printing


def audit(words: list[str]) -> int:
    """Print what was seen of every unit, and whether the claim holds."""
    import torch
    from rich.table import Table

    from locallearn.audit import audit as audited
    from locallearn.batch import Batch
    from locallearn.precision import multiplying
    from locallearn.strategies.local import make_optimizers
    from locallearn.study.train import attached_task

    cfg, choices = compose_settings(words)
    plan = make_plan(cfg, choices, command_line("audit", words))
    task = attached_task(plan)
    batch = task.info().example
    if not batch.context:  # a graph is there as a whole; of anything else the shape is enough
        generator = torch.Generator().manual_seed(plan.seed)
        labels = torch.randint(plan.data.classes, (64,), generator=generator)
        batch = task.to_batch((torch.rand(64, *plan.data.shape, generator=generator), labels))
    plugin = _precision(str(plan.trainer.get("precision", "32-true")))
    plugin.convert_module(plan.algorithm)
    with multiplying(plan.matmul_precision):
        result = audited(
            plan.algorithm,
            Batch(*plugin.convert_input(tuple(batch))),
            optimizers=partial(make_optimizers, make=plan.optimizer),
            context=plugin.train_step_context,
        )
    title = f"{choices['algorithm']} on {choices['net']}, precision {plugin.precision}"
    table = Table(title=title, title_justify="left")
    for heading in ("unit", "weights", "gradient reaches", "changes with later", "backward calls"):
        table.add_column(heading, justify="right" if heading in ("weights", "backward calls") else "left")
    for unit in result.units:
        table.add_row(
            unit.unit,
            f"{unit.parameters:,}",
            ", ".join(unit.reaches) or "itself only",
            ", ".join(unit.depends_on_later) or "nothing",
            str(unit.backward_calls),
        )
    console = printing()
    console.print(table)
    console.print(f"broadcast to all blocks: {result.broadcast}", highlight=False)
    console.print("not seen: " + "; ".join(result.limits), highlight=False)
    word = "confirmed" if result.confirmed else "REFUTED"
    console.print(f"claim: {result.claim}: {word}; {result.reason}", highlight=False)
    return 0 if result.confirmed else 1


def _precision(name: str) -> Any:
    """Lightning's plugin of this precision on a CPU, where an audit runs."""
    from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision

    if name in ("64-true", "64"):
        return DoublePrecision()
    if name == "bf16-true":
        return HalfPrecision("bf16-true")
    return MixedPrecision("bf16-mixed", "cpu") if name in ("bf16-mixed", "bf16") else Precision()
