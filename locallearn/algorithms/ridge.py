"""Ridge regression from frozen features to the network's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from locallearn.algorithms._closed_form import ClosedFormLayers, Form
from locallearn.algorithms._grown import Grown
from locallearn.algorithms._linear_layers import LinearLayer
from locallearn.algorithms.base import TaskInfo
from locallearn.functional import ridge
from locallearn.functional.ridge import Intercept, Path, Singular, check_penalty


class _Choice(Grown):
    """What the second pass needs to tell the penalties apart: one eigendecomposition, and every penalty's errors so far."""

    def __init__(self) -> None:
        super().__init__()
        for name in (*Path._fields, "grid", "errors"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.float64))

    @property
    def path(self) -> Path:
        """All solutions."""
        return Path(*(self.get_buffer(name) for name in Path._fields))

    def begin(self, path: Path, grid: Sequence[float]) -> None:
        """Compare these penalties."""
        for name, value in path._asdict().items():
            setattr(self, name, value)
        self.grid = path.values.new_tensor(list(grid))
        self.errors = torch.zeros_like(self.grid)

    def take(self, rows: Tensor, targets: Tensor, intercept: Intercept) -> None:
        """Add these rows' squared leave-one-out errors; infinity for a penalty too small to make the equations regular."""
        errors, grid = self.get_buffer("errors"), self.get_buffer("grid")
        for i, penalty in enumerate(grid.tolist()):
            try:
                errors[i] += self.path.left_out(rows, targets, penalty, intercept).square().sum()
            except Singular:
                errors[i] = float("inf")

    def forget(self) -> None:
        """Let everything go."""
        for name, held in list(self.named_buffers()):
            setattr(self, name, held.new_zeros(0))


class Ridge(ClosedFormLayers):
    """The network's last layer in closed form; everything before it stays as it is, drawn or trained before.

    W = (XᵀX + λI)⁻¹XᵀY, with X what the last layer reads and Y one-hot labels, or the targets of a regression as they are.
    Sums are gathered in float64 over one pass. With ``lambda_="loo"`` a second pass chooses λ: by the squared errors on rows
    that were left out, one at a time, which follow exactly from one eigendecomposition without a second fit (Allen 1974).
    They are exact where the second pass shows the rows of the first: augmentation shows others.

    Args:
        lambda_: λ, of a sum over rows; ``loo``: chosen among ``grid``.
        grid: values of λ that ``loo`` compares; ``None``: the mean of the diagonal of (centred) XᵀX times 10⁻⁸ … 10².
        intercept: of a last layer with a bias: ``free``, without a penalty, or ``penalised``, the weight of a column of ones.
        form: ``sums``, or ``rows``: keep what the layer reads, for fewer rows than features (the dual form).
        positions: rows that are taken of every sample where the output is a map or a sequence, at random; ``None``: all. Not
            with ``loo``.
        rows: rows that are worked with at a time.
        memory_gib: most that the sums may take.
        seed: of the positions that are taken.

    Raises:
        ValueError: an unknown choice or a number out of range; when attached, a graph, a readout that is not linear, targets
            that are not of the output's size, or sums that take too much memory.
    """

    def __init__(
        self,
        lambda_: float | Literal["loo"] = "loo",
        grid: Sequence[float] | None = None,
        intercept: Literal["free", "penalised"] = "free",
        form: Form = "sums",
        positions: int | None = None,
        rows: int = 16384,
        memory_gib: float = 8.0,
        seed: int = 0,
    ) -> None:
        super().__init__(seed, form, positions, rows, memory_gib)
        if lambda_ != "loo":
            check_penalty(lambda_, "lambda_", ", or loo")
        if intercept not in ("free", "penalised"):
            raise ValueError(f"intercept is {intercept!r}, expected free or penalised")
        if lambda_ == "loo" and positions is not None:
            raise ValueError(
                f"positions is {positions}, and lambda_ is loo, whose second pass would draw other places than those that were "
                "fitted: give lambda_ a number, or leave positions out"
            )
        if grid is not None:
            if lambda_ != "loo":
                raise ValueError(f"grid is what lambda_=loo compares, and lambda_ is {lambda_}: leave one of them out")
            if not isinstance(grid, list | tuple) or not grid:
                raise ValueError(f"grid is {grid!r}, expected a list of at least one number")
            for penalty in grid:
                check_penalty(penalty, "a value of grid")
        self.lambda_ = lambda_
        self.grid = grid
        self.intercept: Intercept = intercept

    def build(self, task: TaskInfo) -> None:
        """Find the last layer, and freeze the network."""
        super().build(task)
        readout = self.layers[-1]
        wanted = self._wanted(task.example._replace(targets=task.example.targets[: len(task.example.inputs)]))
        self._refuse_unlike(wanted, readout.positions)
        if wanted.is_complex():
            raise ValueError("targets are complex numbers, expected real ones")
        self._check_memory([readout])
        self.choice = _Choice()
        self.blocks.requires_grad_(False)

    @property
    def last_alone(self) -> bool:
        """The body may be what it likes."""
        return True

    @property
    def broadcast(self) -> str:
        """Nothing but the last layer learns."""
        return "nothing: the targets go to the last layer alone"

    @property
    def passes(self) -> int:
        """One, and one more to choose λ."""
        return 1 + (self.lambda_ == "loo")

    def _layer(self, number: int) -> LinearLayer:
        return self.layers[-1]

    @property
    def _offset(self) -> Intercept:
        return self.intercept if self.layers[-1].module.bias is not None else "none"

    def _refuse_unlike(self, targets: Tensor, positions: int) -> None:
        outputs = self.layers[-1].width * positions
        if targets.shape[1] != outputs:
            raise ValueError(
                f"a sample's targets are {targets.shape[1]} numbers and the network's output is {outputs}: ridge fits one to "
                "the other, so they have to be as many"
            )

    def _spread(self, targets: Tensor, positions: int) -> Tensor:
        layer = self.layers[-1]
        self._refuse_unlike(targets, positions)
        if isinstance(layer.module, torch.nn.Linear):
            return targets.reshape(-1, layer.width)
        return targets.reshape(len(targets), layer.width, positions).transpose(1, 2).reshape(-1, layer.width)

    def _take(self, number: int, rows: Tensor, targets: Tensor) -> None:
        if number == 0:
            self.sums.gather(rows, targets.to(rows.dtype))
        else:
            self.choice.take(rows, targets.to(rows.dtype), self._offset)

    def _conclude(self, number: int) -> None:
        layer = self.layers[-1]
        if self.lambda_ != "loo":
            self._solve(layer, self.lambda_, self._offset, "lambda_")
            self.sums.forget()
        elif number == 0:
            path = self.sums.path(self._offset)
            self.choice.begin(path, ridge.penalties(path) if self.grid is None else self.grid)
            self.sums.forget()
        else:
            self._choose(layer)
            self.choice.forget()

    def _choose(self, layer: LinearLayer) -> None:
        errors = self.choice.get_buffer("errors")
        errors = errors.where(~errors.isnan(), float("inf"))  # 0/0: a fit of every row has nothing to leave out
        best = int(errors.argmin())
        if not bool(errors[best].isfinite()):
            raise Singular(
                f"layer {layer.name!r} cannot be solved for: no λ of algorithm.grid makes its equations regular, so "
                "give larger ones"
            )
        penalty = float(self.choice.get_buffer("grid")[best])
        fit = self.choice.path.fit(penalty, self._offset)
        left_out = float(errors[best]) / (int(self.seen) * layer.positions)
        self._write(layer, fit, penalty, sum(b.numel() * b.itemsize for b in self.choice.buffers()), left_out)
