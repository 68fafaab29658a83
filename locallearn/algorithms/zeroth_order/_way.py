"""How weights are moved along the directions of a step, brought home, and what is estimated from the losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from locallearn.functional.counter_noise import numbers
from locallearn.functional.zeroth_order import LIMIT, Noise, on_grid


@dataclass(frozen=True)
class Setting:
    """What all ways are told.

    Attributes:
        seed: of the noise.
        count: n, directions of a step.
        eps: ε.
        noise: of the directions.
        exact: weights and moves lie on the grid, and sums do not depend on their order.
        words: of the noise's streams, by name.
    """

    seed: int
    count: int
    eps: float
    noise: Noise
    exact: bool
    words: dict[str, int]


class Way(ABC):
    """Moves weights in place. Between :meth:`begin` and the end of :meth:`estimates` the weights may be away from home.

    Args:
        weights: that learn, by name.
        setting: of the rule.
    """

    def __init__(self, weights: dict[str, nn.Parameter], setting: Setting) -> None:
        self.weights = weights
        self.setting = setting
        self.step = 0

    def begin(self, step: int) -> None:
        """Take up the directions of this step."""
        self.step = step

    @abstractmethod
    def visit(self, member: int, sign: int) -> None:
        """Put the weights at θ + sign · ε z of this direction."""

    @abstractmethod
    def home(self) -> None:
        """Put the weights at θ."""

    def leave(self) -> None:
        """There is nothing more to visit; :meth:`estimates` comes next, and may bring the weights home on its way."""
        self.home()

    @abstractmethod
    def estimates(self, c: Tensor) -> Iterator[dict[nn.Parameter, Tensor]]:
        """mean_i c_i z_i, as many weights at a time as are to be held at once.

        Args:
            c: on the CPU, ``(n,)``, float32.
        """

    def settle(self, weights: Sequence[nn.Parameter]) -> None:
        """Told after it; in exact mode the step is rounded to the grid, up or down by chance."""
        if not self.setting.exact:
            return
        names = {id(p): name for name, p in self.weights.items()}
        for p in weights:
            word = self.setting.words[f"{names[id(p)]}/round"]
            uniform = numbers(self.setting.seed, self.step, 0, word, 0, p.numel(), "uniform", p.device)
            p.copy_(on_grid(p.detach(), uniform.view(p.shape)).clamp_(-LIMIT, LIMIT))


def streams(names: Sequence[str]) -> list[str]:
    """Names of all streams of noise that weights of these names have, whatever the way."""
    return [name + part for part in ("", "/A", "/B", "/round", "/residual") for name in names]
