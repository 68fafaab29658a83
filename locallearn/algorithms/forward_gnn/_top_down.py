"""Kinds in which a layer also sees what the layers above it said one step before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from locallearn.algorithms.base import Locality, ParamGroup, TaskInfo, Update
from locallearn.algorithms.forward_gnn._frame import ForwardGNN
from locallearn.algorithms.forward_gnn._links import Links
from locallearn.algorithms.forward_gnn._nodes import SingleForward
from locallearn.algorithms.forward_gnn._views import View
from locallearn.batch import Batch
from locallearn.functional import forward_gnn as fg
from locallearn.nets.graph import GraphBlock, sum_of

# Inference of the top-to-input variants: so many sweeps, of which those from the second one on are averaged.
_SWEEPS, _SKIPPED = 10, 2


class TopDown(ForwardGNN):
    """States: what every layer said of every node, with rows of length 1. A layer reads the one below it and those above."""

    locality = Locality.COUPLED

    @property
    def broadcast(self) -> str:
        """Labels, and what the layers above said."""
        return f"{super().broadcast}; to every layer the outputs of those above it, one step old"

    @property
    def stages(self) -> list[list[str]]:
        """None: all layers learn at once.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"ForwardGNN's {self.variant} lets every layer read the ones above it, so all layers learn together: use "
            "schedule=joint"
        )

    def build(self, task: TaskInfo) -> None:
        """Make the first states, too."""
        super().build(task)
        inputs, dtype = task.example.inputs, next(self.blocks.parameters()).dtype
        with torch.no_grad():
            states = self._first_states(self._right_view(inputs.to(dtype), *task.example.context))
        for i, state in enumerate(states):
            self.register_buffer(f"state{i + 1}", state)

    def prepare(self, batch: Batch) -> Batch:
        """The whole graph.

        Raises:
            ValueError: it is another graph than the one attached to.
        """
        prepared = super().prepare(batch)
        if not self._kept.holds(prepared.inputs):  # of the whole graph the view is kept
            raise ValueError(
                f"ForwardGNN's {self.variant} keeps what every layer said of every node one step before, and this batch is "
                "not the graph that it was attached to: train on the whole graph, or choose a variant without top-down"
            )
        return prepared

    def updates(self, batch: Batch) -> Iterator[Update]:
        """The layers turn by turn; what those of one turn say is read from the next turn on."""
        prepared = self.prepare(batch)
        view, states, names = View(prepared.inputs, *prepared.context), self._states(), self.blocks.names
        for turn in self._turns():
            fresh: dict[int, Tensor] = {}
            for i in turn:
                trains = self.trains(names[i])
                with torch.set_grad_enabled(trains):
                    output = self._layer_between(i, view, states)
                if trains:
                    yield Update(names[i], self.local_loss(i, self._with_above(output, states[i + 1 :]), prepared))
                fresh[i] = self.emit(i, output)
                del output  # the block's graph ends here
            for i, state in fresh.items():
                states[i].copy_(state)

    def _states(self) -> list[Tensor]:
        return [getattr(self, f"state{i + 1}") for i in range(len(self.blocks))]

    def _turns(self) -> list[range]:
        return [range(len(self.blocks))]

    def _first_states(self, view: View) -> list[Tensor]:
        """Normalised outputs of one pass from below, with zeros where the layers above are read."""
        states: list[Tensor] = []
        for i, above in enumerate(self._beside()):
            x = states[-1] if states else view.inputs
            states.append(self.emit(i, self._layer(i, x, view.graphs, x.new_zeros(len(x), above) if above else None)))
        return states

    def _layer_between(
        self, index: int, view: View, states: list[Tensor], projected: list[Tensor] | None = None
    ) -> Tensor:
        """Output ``(1, N, d)`` of a layer that reads the states around it; ``projected`` is of the first one's input."""
        return self._layer(index, states[index - 1] if index else view.inputs, view.graphs, projected=projected)

    def _with_above(self, output: Tensor, above: list[Tensor]) -> Tensor:
        """What the loss reads."""
        return output


class TopToLoss(TopDown, SingleForward):
    """``sf_top_to_loss``: the mean of a layer's output and of all states above it is what agrees with virtual nodes."""

    variant = "sf_top_to_loss"

    def build(self, task: TaskInfo) -> None:
        """Make sure that outputs can be averaged, too."""
        super().build(task)
        widths = [state.shape[1] for state in self._states()]
        if len(set(widths)) > 1:
            raise ValueError(
                f"ForwardGNN's {self.variant} averages the outputs of all blocks, which are {widths} wide: give all blocks "
                "the same width"
            )

    def _view(self, inputs: Tensor, edges: tuple[Tensor, ...], rows: Tensor, labels: Tensor) -> View:
        return super()._view(inputs, edges, rows, labels)._replace(raw=self._with_virtual(inputs))

    def _first_states(self, view: View) -> list[Tensor]:
        """From raw inputs, and what goes up is raw, as in the authors' code."""
        assert view.raw is not None
        x, states = view.raw, []
        for i in range(len(self.blocks)):
            output = self._layer(i, x, view.graphs)
            states.append(self.emit(i, output))
            x = output[0].detach()
        return states

    def _with_above(self, output: Tensor, above: list[Tensor]) -> Tensor:
        return sum_of((output, *above)) / (1 + len(above))

    def _said(self, view: View, depth: int) -> list[Tensor]:
        states = self._first_states(view)
        own = [self._layer_between(i, view, states)[0] for i in range(len(states))]
        return [self._with_above(h, states[i + 1 :]) for i, h in enumerate(own)]


class TopToInput(TopDown):
    """A layer reads the state above it beside the one below; every second layer learns first, then the others."""

    @property
    def _top(self) -> int:
        """Columns that stand above the last layer."""
        return 0

    def _turns(self) -> list[range]:
        return [range(0, len(self.blocks), 2), range(1, len(self.blocks), 2)]

    def _note(self, task: TaskInfo) -> None:
        super()._note(task)
        for name, block in zip(self.blocks.names, self.blocks, strict=True):
            if not isinstance(block, GraphBlock):
                raise ValueError(
                    f"block {name!r} does not say how wide its output is, which ForwardGNN's {self.variant} has to know "
                    f"of the block above: make the network with locallearn.nets.gnn and {self._settings}"
                )
        if len(self.blocks) < 2:
            raise ValueError(
                f"ForwardGNN's {self.variant} lets a layer read the one above it, and this network has one layer: use two "
                "or more (net.hidden=[128,128])"
            )

    def _beside(self) -> list[int]:
        return [*(block.width for block in list(self.blocks)[1:]), self._top]  # type: ignore[list-item]

    def _layer_between(
        self, index: int, view: View, states: list[Tensor], projected: list[Tensor] | None = None
    ) -> Tensor:
        below, above = [view.inputs, *states], [*states, view.columns]
        return self._layer(index, below[index], view.graphs, above[index + 1], projected=projected)

    def _said(self, view: View, depth: int) -> list[Tensor]:
        """The layers of one sweep after another."""
        states, said = self._first_states(view), []
        block, projected = self.blocks[0], None
        if isinstance(block, GraphBlock) and block.linear(view.inputs) and block.sparse(view.inputs):
            projected = block.project(view.inputs)  # once for all sweeps
        for sweep in range(_SWEEPS):
            outputs = {}
            for i in (i for turn in self._turns() for i in turn):
                outputs[i] = self._layer_between(i, view, states, projected if i == 0 else None)[0]
                states[i] = fg.normalise(outputs[i])
            if sweep >= _SKIPPED:
                said += [outputs[i] for i in sorted(outputs)]
        return said


class SingleForwardTopToInput(TopToInput, SingleForward):
    """``sf_top_to_input``: above the last layer stand the labels, and every virtual node's own class."""

    variant = "sf_top_to_input"

    @property
    def net_settings(self) -> dict[str, Any]:
        """Room for the block above in every block's input."""
        return {"top_down": "labels"}

    @property
    def _top(self) -> int:
        return self.outputs

    def _view(self, inputs: Tensor, edges: tuple[Tensor, ...], rows: Tensor, labels: Tensor) -> View:
        columns = fg.label_columns(rows, labels[0], len(inputs), self.outputs, inputs.dtype)
        own = torch.eye(self.outputs, dtype=inputs.dtype, device=inputs.device)
        return super()._view(inputs, edges, rows, labels)._replace(columns=fg.normalise(torch.cat((columns, own))))


class LinksTopToInput(TopToInput, Links):
    """``ce_top_to_input``: nothing above the last layer, and no weight decay, as in the authors' code."""

    variant = "ce_top_to_input"

    @property
    def net_settings(self) -> dict[str, Any]:
        """Room for the block above in every block's input."""
        return {"top_down": "features"}

    def block_groups(self, index: int) -> list[ParamGroup]:
        """All weights of the block, without weight decay."""
        return [{**group, "weight_decay": 0.0} for group in super().block_groups(index)]
