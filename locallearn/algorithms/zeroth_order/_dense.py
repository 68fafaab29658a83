"""Directions in which every weight moves by a number of its own; drawn again whenever they are needed, or kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from locallearn.algorithms.zeroth_order._way import Setting, Way
from locallearn.functional.counter_noise import numbers, pieces, together
from locallearn.functional.zeroth_order import ExactSum, on_grid

_SMALL = 2**12  # entries of a weight up to which it is drawn together with others
_AT_ONCE = 2**18  # numbers, of all directions


@dataclass(frozen=True)
class _Part:
    """Entries ``start`` to ``start + count − 1`` of a weight."""

    name: str
    weight: nn.Parameter
    start: int
    count: int

    def of(self, tensor: Tensor) -> Tensor:
        """These entries, to be written into; what is not laid out in order is taken whole."""
        return tensor.view(-1)[self.start : self.start + self.count] if tensor.is_contiguous() else tensor


_Segment = list[_Part]  # what is drawn in one call


class Dense(Way):
    """z of the shape of all weights.

    Args:
        weights: that learn, by name.
        setting: of the rule.
        stored: the directions of a step are drawn once and kept, and the weights are put at θ from a copy. Otherwise directions
            are drawn anew for every move, a piece at a time, and the weights are moved back and forth: beside them there is
            never more than one group of gradients, whose size is that of the largest weight.
    """

    def __init__(self, weights: dict[str, nn.Parameter], setting: Setting, stored: bool) -> None:
        super().__init__(weights, setting)
        self._stored = stored
        self._kept: dict[str, Tensor] = {}
        self._drawn: dict[tuple[int, int], list[Tensor]] = {}
        self._at: tuple[int, int] | None = None  # direction and sign
        self._groups = self._grouped()

    def _grouped(self) -> list[list[_Segment]]:
        """Weights whose gradients are held at once; of every group what is drawn at once."""
        largest = max((p.numel() for p in self.weights.values()), default=0)
        if self._stored:
            largest = sum(p.numel() for p in self.weights.values())
        groups: list[list[_Segment]] = []
        room = 0
        for name, p in self.weights.items():
            if p.numel() > room:
                groups.append([])
                room = largest
            room -= p.numel()
            group, small = groups[-1], p.numel() <= _SMALL
            if small and group and group[-1][0].weight.numel() <= _SMALL and _size(group[-1]) <= _AT_ONCE:
                group[-1].append(_Part(name, p, 0, p.numel()))
            elif p.is_contiguous():
                group.extend([_Part(name, p, *cut)] for cut in pieces(p.numel(), self.setting.noise))
            else:
                group.append([_Part(name, p, 0, p.numel())])
        return groups

    def begin(self, step: int) -> None:
        """Keep a copy of the weights, if directions are kept."""
        super().begin(step)
        self._drawn = {}
        if self._stored:
            self._kept = {name: p.detach().clone() for name, p in self.weights.items()}

    def _draw(self, group: int, place: int, members: Tensor) -> list[Tensor]:
        """The noise of a segment, ``(len(members), count)`` for each of its parts."""
        setting, segment = self.setting, self._groups[group][place]
        if self._stored:
            if (group, place) not in self._drawn:
                self._drawn[group, place] = self._made(segment, torch.arange(setting.count))
            return [z[members[0] : members[-1] + 1] for z in self._drawn[group, place]]
        return self._made(segment, members)

    def _made(self, segment: _Segment, members: Tensor) -> list[Tensor]:
        setting, device = self.setting, segment[0].weight.device
        first = segment[0]
        if len(segment) == 1:
            word = setting.words[first.name]
            return [
                numbers(setting.seed, self.step, members, word, first.start, first.count, setting.noise, device),
            ]
        spans = [(setting.words[part.name], part.count) for part in segment]
        return together(setting.seed, self.step, members, spans, setting.noise, device)

    def visit(self, member: int, sign: int) -> None:
        """From home or from the other side of the same direction in one move, otherwise by way of home."""
        if self._at is not None and self._at[0] != member:
            self.home()
        come = 0 if self._at is None else self._at[1]
        for group, segments in enumerate(self._groups):
            for place, segment in enumerate(segments):
                for part, z in zip(segment, self._draw(group, place, torch.tensor([member])), strict=True):
                    target = part.of(part.weight)
                    if self._stored:
                        target.copy_(part.of(self._kept[part.name]))
                    self._move(target, z[0], sign if self._stored else sign - come)
        self._at = (member, sign)

    def _move(self, target: Tensor, z: Tensor, times: int) -> None:
        """Move entries by ``times`` · ε z."""
        z = z.to(target.dtype).view(target.shape)
        if self.setting.exact:
            target.add_(on_grid(z * self.setting.eps), alpha=times)
        else:
            target.add_(z, alpha=times * self.setting.eps)

    def home(self) -> None:
        """Bring the weights back from where they are."""
        if self._at is None:
            return
        if self._stored:
            for name, p in self.weights.items():
                p.copy_(self._kept[name])
        else:
            member, sign = self._at
            for group in range(len(self._groups)):
                self._back(group, member, sign)
        self._at = None

    def _back(self, group: int, member: int, sign: int) -> None:
        for place, segment in enumerate(self._groups[group]):
            for part, z in zip(segment, self._draw(group, place, torch.tensor([member])), strict=True):
                self._move(part.of(part.weight), z[0], -sign)

    def leave(self) -> None:
        """Weights that were not copied stay where they are: the last move is made with the noise of the gradients."""
        if self._stored:
            self.home()

    def estimates(self, c: Tensor) -> Iterator[dict[nn.Parameter, Tensor]]:
        """Group by group; a group is home before it is handed over."""
        away, self._at = self._at, None
        done = 0
        try:
            for group, segments in enumerate(self._groups):
                made = {part.weight: torch.empty_like(part.weight) for segment in segments for part in segment}
                for place, segment in enumerate(segments):
                    self._estimate(made, segment, group, place, c, away)
                done = group + 1
                yield made
                del made
        finally:
            if away is not None:  # whoever asked does not go on, and may be anywhere
                with torch.no_grad():
                    for group in range(done, len(self._groups)):
                        self._back(group, *away)
            self._drawn, self._kept = {}, {}

    def _estimate(
        self,
        made: dict[nn.Parameter, Tensor],
        segment: _Segment,
        group: int,
        place: int,
        c: Tensor,
        away: tuple[int, int] | None,
    ) -> None:
        """Σ c_i z_i / n of a segment, and the way home with the same noise."""
        n = self.setting.count
        sums: list[ExactSum | Tensor | None] = [None] * len(segment)
        for members in torch.split(torch.arange(n), max(1, _AT_ONCE // _size(segment))):
            drawn = self._draw(group, place, members)
            for i, (part, z) in enumerate(zip(segment, drawn, strict=True)):
                if away is not None and members[0] <= away[0] <= members[-1]:
                    self._move(part.of(part.weight), z[away[0] - int(members[0])], -away[1])
                sums[i] = self._add(sums[i], z, c[members], c)
        for part, total in zip(segment, sums, strict=True):
            value = total.value(n) if isinstance(total, ExactSum) else total
            assert value is not None
            target = part.of(made[part.weight])
            target.copy_(value.view(target.shape))

    def _add(self, total: ExactSum | Tensor | None, z: Tensor, c: Tensor, all_c: Tensor) -> ExactSum | Tensor:
        if self.setting.exact:
            exact = total if isinstance(total, ExactSum) else ExactSum(z[0], all_c)
            for weight, row in zip(c.tolist(), z, strict=True):
                exact.add(row * weight)
            return exact
        scaled = (c / self.setting.count).to(z.device)
        with torch.autocast(z.device.type, enabled=False):
            more = z[0] * scaled[0] if len(z) == 1 else scaled @ z
        return more if total is None else total + more  # type: ignore[operator]


def _size(segment: _Segment) -> int:
    return max(1, sum(part.count for part in segment))
