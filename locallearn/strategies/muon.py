"""Muon: momentum whose matrix is made orthogonal before the step; one matrix at a time, so it is local by nature."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon(Optimizer):
    """Muon for convolutions, SGD with Nesterov's momentum for all other weights (K. Jordan et al. 2024).

    A convolution's weight ``(out, in, k, k)`` is taken as a matrix ``(out, in k k)``. Its momentum ``m`` is made orthogonal by
    five steps of a Newton-Schulz iteration in bfloat16, so that all its singular values come to about 1, and the step is
    ``lr * sqrt(max(1, out / (in k k)))`` times that; as ``torch.optim.Muon``, which refuses weights of four dimensions. Every
    matrix is stepped from its own gradient alone.

    Each group of parameters becomes two, one of convolutions and one of the rest, so that a learning rate scheduler
    moves both rates in proportion.

    Args:
        params: parameters, or groups of them. A group's own ``lr`` holds for both of its parts.
        lr: of convolutions.
        momentum: of convolutions.
        weight_decay: of convolutions, decoupled: a weight shrinks by ``lr * weight_decay`` with every step.
        sgd_lr: of all other weights.
        sgd_momentum: of all other weights.
        sgd_weight_decay: of all other weights, added to their gradients.
        steps: of the Newton-Schulz iteration.

    Raises:
        ValueError: a rate or decay below 0, a momentum outside of 0 to 1, no steps.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        sgd_lr: float = 0.1,
        sgd_momentum: float = 0.9,
        sgd_weight_decay: float = 0.0,
        steps: int = 5,
    ) -> None:
        given = {"lr": lr, "weight_decay": weight_decay, "sgd_lr": sgd_lr, "sgd_weight_decay": sgd_weight_decay}
        for name, value in given.items():
            if value < 0:
                raise ValueError(f"{name} is {value}, expected a number of at least 0")
        for name, value in {"momentum": momentum, "sgd_momentum": sgd_momentum}.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value}, expected a number from 0 to below 1")
        if steps < 1:
            raise ValueError(f"steps is {steps}, expected a whole number of at least 1")
        self._steps = steps
        groups = []
        listed = list(params)
        for group in listed if listed and isinstance(listed[0], dict) else [{"params": listed}]:
            weights = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
            matrices = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, **group}
            others = {"lr": sgd_lr, "momentum": sgd_momentum, "weight_decay": sgd_weight_decay, **group}
            parts = ([p for p in weights if p.ndim == 4], [p for p in weights if p.ndim != 4])
            for settings, part, is_muon in zip((matrices, others), parts, (True, False), strict=True):
                if part:
                    groups.append({**settings, "params": part, "muon": is_muon})
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: works out the gradients anew and gives the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            move = self._orthogonal if group["muon"] else self._plain
            for p in group["params"]:
                if p.grad is not None:
                    move(p, group, self.state[p])
        return loss

    def _orthogonal(self, p: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        gradient = cast(Tensor, p.grad)
        buffer = state.setdefault("momentum", torch.zeros_like(gradient))
        buffer.lerp_(gradient, 1 - group["momentum"])
        matrix = gradient.lerp(buffer, group["momentum"]).flatten(1)
        rows, columns = matrix.shape
        p.mul_(1 - group["lr"] * group["weight_decay"])
        step = orthogonalised(matrix, self._steps).view_as(p).to(p.dtype)
        p.add_(step, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _plain(self, p: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        gradient = cast(Tensor, p.grad)
        if group["weight_decay"]:
            gradient = gradient.add(p, alpha=group["weight_decay"])
        if group["momentum"]:
            if "momentum" in state:
                state["momentum"].mul_(group["momentum"]).add_(gradient)
            else:
                state["momentum"] = gradient.clone()
            gradient = gradient.add(state["momentum"], alpha=group["momentum"])
        p.add_(gradient, alpha=-group["lr"])


def orthogonalised(matrix: Tensor, steps: int = 5) -> Tensor:
    """``U Vᵀ`` of the singular value decomposition, roughly: singular values between about .7 and 1.2, in bfloat16.

    The quintic Newton-Schulz iteration ``X ← aX + (bA + cA²)X`` with ``A = XXᵀ`` and the coefficients of K. Jordan et al.

    Args:
        matrix: ``(rows, columns)``.
        steps: of the iteration.
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrix.bfloat16()
    if x.shape[0] > x.shape[1]:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)  # singular values of at most 1
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x
