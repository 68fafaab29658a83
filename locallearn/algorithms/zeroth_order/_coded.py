"""Weights that are whole numbers times a scale, and directions of whole numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from locallearn.algorithms.zeroth_order._way import Setting, Way
from locallearn.functional.counter_noise import numbers
from locallearn.functional.zeroth_order import ExactSum, fire, integer_noise, quantise, within

_AT_ONCE = 2**18  # numbers, of all directions


class Codes(nn.Module):
    """What is kept of a quantised weight; in the checkpoint.

    Args:
        weight: to be quantised.
        bits: of a code.
        uniform: of the first residual, which is between −½ and ½ by chance so that not all codes fire at once.
    """

    codes: Tensor
    scale: Tensor
    residual: Tensor

    def __init__(self, weight: Tensor, bits: int, uniform: Tensor) -> None:
        super().__init__()
        codes, scale = quantise(weight.detach(), bits)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("residual", uniform.to(weight.dtype) - 0.5)

    def weight(self, codes: Tensor | None = None) -> Tensor:
        """The weight with these codes."""
        return (self.codes if codes is None else codes).to(self.scale.dtype) * self.scale


class Coded(Way):
    """QES: perturbations and steps are moves from code to code.

    A gradient is handed over in the weight's own units, so that an optimizer steps as it steps any weight; what it has done is
    then taken as a step in codes, which is accumulated until a code fires.

    Args:
        weights: that learn, by name.
        setting: of the rule; ε is in codes.
        coded: of every weight, by name.
        bits: of a code.
        decay: share of the residual that is kept from step to step.
    """

    def __init__(
        self, weights: dict[str, nn.Parameter], setting: Setting, coded: dict[str, Codes], bits: int, decay: float
    ) -> None:
        super().__init__(weights, setting)
        self._coded, self._decay = coded, decay
        self._low, self._high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def begin(self, step: int) -> None:
        """Forget what was drawn for another step."""
        super().begin(step)
        self._drawn: tuple[int, dict[str, Tensor]] = (-1, {})

    def _noise(self, name: str, members: Tensor) -> Tensor:
        """Whole numbers u of directions, ``(len(members), *shape)``."""
        setting, held = self.setting, self._coded[name]
        count, device = held.codes.numel(), held.codes.device
        z = numbers(setting.seed, self.step, members, setting.words[name], 0, count, setting.noise, device)
        chance = numbers(setting.seed, self.step, members, setting.words[f"{name}/A"], 0, count, "uniform", device)
        return integer_noise(z, chance, setting.eps).view(-1, *held.codes.shape)

    def _moved(self, name: str, u: Tensor) -> Tensor:
        """Codes after moves; those that would leave the range are left out."""
        return within(self._coded[name].codes.float(), u, self._low, self._high)

    def visit(self, member: int, sign: int) -> None:
        """From the codes, which stay where they are."""
        if self._drawn[0] != member:
            self._drawn = (member, {name: self._noise(name, torch.tensor([member]))[0] for name in self.weights})
        for name, p in self.weights.items():
            p.copy_(self._coded[name].weight(self._moved(name, sign * self._drawn[1][name])))

    def home(self) -> None:
        """From the codes."""
        for name, p in self.weights.items():
            p.copy_(self._coded[name].weight())

    def estimates(self, c: Tensor) -> Iterator[dict[nn.Parameter, Tensor]]:
        """Weight by weight: mean_i c_i (u_i⁺ − u_i⁻)/2ε, in units of the weight."""
        for name, p in self.weights.items():
            total = ExactSum(p, c)
            for members in torch.split(torch.arange(self.setting.count), max(1, _AT_ONCE // p.numel())):
                u = self._noise(name, members)
                moved = self._moved(name, u) - self._moved(name, -u)
                for weight, row in zip(c[members].tolist(), moved, strict=True):
                    total.add(row * (weight / 2))
            yield {p: total.value(self.setting.count).to(p.dtype) / self.setting.eps * self._coded[name].scale}

    def settle(self, weights: Sequence[nn.Parameter]) -> None:
        """Take what the optimizer has done as a step in codes."""
        names = {id(p): name for name, p in self.weights.items()}
        for p in weights:
            held = self._coded[names[id(p)]]
            step = (p.detach() - held.weight()) / held.scale
            codes, residual = fire(held.codes.to(step.dtype), step, held.residual, self._decay, self._low, self._high)
            held.codes.copy_(codes)
            held.residual.copy_(residual)
            p.copy_(held.weight())
