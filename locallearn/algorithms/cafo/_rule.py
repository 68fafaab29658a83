"""Cascaded Forward: frozen blocks, or blocks trained by direct feedback, with a predictor of the labels on each."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from locallearn.algorithms.base import Locality, ParamGroup, TaskInfo, Update, refuse_dense
from locallearn.algorithms.cafo._direct import DirectFeedback
from locallearn.algorithms.cafo._predictors import ClosedForm, Stepped
from locallearn.algorithms.cafo._state import GIB, Epoch, FeatureStore, Standard
from locallearn.algorithms.dry_run import feature_sizes
from locallearn.algorithms.layer_local import LayerLocal
from locallearn.batch import Batch
from locallearn.functional import cafo
from locallearn.functional.cafo import check_targets
from locallearn.nets.blocks import fitted
from locallearn.nets.border import Border, main, replaced
from locallearn.nets.layout import channel_axis
from locallearn.nets.units import sample_shapes

Learning = Literal["random", "dfa"]
Predictor = Literal["mse", "ce", "sparsemax"]
Prediction = Literal["sum", "last"]
Scores = Literal["probabilities", "logits"]


class CaFo(LayerLocal):
    """Cascaded Forward (Zhao et al., arXiv 2303.09728).

    Block k has a predictor W_k, shape ``(D_k, C)``, without bias, fitted from the block's flattened output and the labels
    alone. ``blocks="random"``: the blocks stay as they were drawn. ``blocks="dfa"``: they learn first, from the error of a
    head on the last block, which reaches each of them through a fixed random matrix (direct feedback alignment); under a
    sequential schedule they are frozen before the predictors are fitted, as in the paper, under a joint one the predictors
    learn from the outputs of the same pass.

    ``predictor="mse"``: ridge regression in closed form; there is no unit to step, sums are gathered in float64 over one
    epoch, and :meth:`end_epoch` or a prediction solves for the weights. ``"ce"`` and ``"sparsemax"``: W_k is stepped along
    Xᵀ(S − Y)/N, in chunks of rows, from all ones.

    Prediction: the sum over blocks of softmax(X W_k), for ``sparsemax`` of sparsemax(X W_k).

    Deviations: outputs of random blocks are standardised by statistics of the training data that are measured once, on the
    first batch, where the public code normalises every set by its own, the test set included; the error of ``dfa`` is the
    gradient of the mean loss, e/N; the network's own readout is the head, where it has one.

    Args:
        blocks: ``random`` or ``dfa``.
        predictor: ``mse``, ``ce`` or ``sparsemax``.
        prediction: ``sum`` over blocks, or the ``last`` one alone.
        scores: what is summed: ``probabilities``, or ``logits`` X W_k.
        normalise: standardise the outputs of random blocks, by channel, before predictors and next blocks read them.
        ridge: of ``mse``: λ, as a multiple of the mean of XᵀX's diagonal; 0: plain least squares.
        centre: of ``mse``: take the means of X and Y out first, which fits an offset as well.
        cache: keep the outputs of all blocks for the whole training set, looked up by ``Batch.index``.
        rows: samples in a chunk: what one block runs, and one step of the predictors multiplies, at a time.
        memory_gib: most that the sums of ``mse``, or the outputs kept by ``cache``, may take.
        seed: of the feedback weights and the head.

    Raises:
        ValueError: an unknown choice, or a number out of range.
    """

    def __init__(
        self,
        blocks: Learning = "random",
        predictor: Predictor = "ce",
        prediction: Prediction = "sum",
        scores: Scores = "probabilities",
        normalise: bool = True,
        ridge: float = 1e-2,
        centre: bool = False,
        cache: bool = False,
        rows: int = 1024,
        memory_gib: float = 8.0,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        for name, value, known in (
            ("blocks", blocks, Learning),
            ("predictor", predictor, Predictor),
            ("prediction", prediction, Prediction),
            ("scores", scores, Scores),
        ):
            if value not in get_args(known):
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(get_args(known))}")
        if not 0 <= ridge < float("inf"):
            raise ValueError(f"ridge is {ridge}, expected a number of at least 0")
        if rows < 1:
            raise ValueError(f"rows is {rows}, expected at least 1")
        if not memory_gib > 0:
            raise ValueError(f"memory_gib is {memory_gib}, expected more than 0")
        self.learning: Learning = blocks
        self.predictor: Predictor = predictor
        self.prediction: Prediction = prediction
        self.scores: Scores = scores
        self.normalise = normalise
        self.ridge = ridge
        self.centre = centre
        self.rows = rows
        self.memory_gib = memory_gib
        self._store = FeatureStore(memory_gib) if cache else None

    # -- what it is ---------------------------------------------------------------------------------------------------
    @property
    def carries(self) -> bool:
        """Predictors read the main tensors, and what else blocks hand over is carried along."""
        return True

    @property
    def locality(self) -> Locality:
        """Layer-local with random blocks; with ``dfa`` the blocks learn from the network's error."""
        return Locality.LAYER_LOCAL if self.learning == "random" else Locality.FEEDBACK

    @property
    def broadcast(self) -> str:
        """Labels; with ``dfa`` the error as well."""
        error = "the output's error, to every block through fixed random weights"
        return "labels" if self.learning == "random" else error

    @property
    def variant(self) -> str:
        """Blocks and predictor."""
        return f"{self.learning}-{self.predictor}"

    @property
    def closed_form(self) -> bool:
        """Whether weights are solved for, not stepped."""
        return self.predictor == "mse"

    def build(self, task: TaskInfo) -> None:
        """Give every block its predictor, and what learns by direct feedback its matrices."""
        if not task.classes:
            raise ValueError("CaFo fits predictors of class labels to every block, and this task has none")
        refuse_dense(task, "CaFo")
        if task.outputs < 2:
            raise ValueError(f"CaFo tells classes apart, and this task has {task.outputs}: it takes at least 2")
        if task.example.context:
            raise ValueError(
                "CaFo fits a predictor to the output of every sample by itself, and these batches have a context (a graph's "
                "edges, a mask): use mono_forward, or forward_gnn for a graph"
            )
        sizes = feature_sizes(self.blocks, task.example)
        self.predictors: nn.ModuleList
        if self.closed_form:
            self._check_sums(sizes, task.outputs)
            made: Sequence[nn.Module] = [ClosedForm(size, task.outputs, self.ridge, self.centre) for size in sizes]
        else:
            loss: cafo.Loss = "ce" if self.predictor == "ce" else "sparsemax"
            made = [Stepped(size, task.outputs, loss, self.rows) for size in sizes]
        self.predictors = nn.ModuleList(made)
        self.standards = nn.ModuleList()
        if self._standardises:
            shapes, _ = sample_shapes(self.blocks, fitted(self.blocks, task.example.inputs), task.example.context)
            self.standards.extend(Standard(channel_axis(shape)) for shape in shapes)
        self.epoch = Epoch()
        self.feedback: DirectFeedback | None = None
        if self.learning == "dfa":
            clash = set(self.blocks.names) & {self._unit(i) for i in range(len(sizes))}
            if clash:
                raise ValueError(f"a block is named {min(clash)!r}, as CaFo names the predictor of another: rename it")
            self.feedback = DirectFeedback(sizes, task.outputs, self.blocks.readout is None)

    @property
    def _standardises(self) -> bool:
        return self.normalise and self.learning == "random"

    def _check_sums(self, sizes: Sequence[int], classes: int) -> None:
        bytes_ = sum(8 * size * (size + classes) for size in sizes)
        if bytes_ > self.memory_gib * GIB:
            name, size = max(zip(self.blocks.names, sizes, strict=True), key=lambda pair: pair[1])
            raise ValueError(
                f"the closed form needs XᵀX of every block, {bytes_ / GIB:.1f} GiB in float64 for these, and "
                f"algorithm.memory_gib is {self.memory_gib:g} (block {name!r} has {size} outputs per sample): use "
                "predictor=ce, a network that pools more, or raise it"
            )

    @property
    def added_parameters(self) -> int:
        """Predictors and feedback weights, whether parameters or buffers."""
        solved = (
            p.weights.numel() + p.offset.numel() * p._centre for p in self.predictors if isinstance(p, ClosedForm)
        )
        matrices = [] if self.feedback is None else self.feedback.matrices()
        return super().added_parameters + sum(solved) + sum(matrix.numel() for matrix in matrices)

    # -- units and stages ---------------------------------------------------------------------------------------------
    def block_groups(self, index: int) -> list[ParamGroup]:
        """The predictor of block ``index``."""
        return [{"params": list(self.predictors[index].parameters())}]

    def units(self) -> dict[str, list[ParamGroup]]:
        """One per block, if the blocks learn, the last with its head; then one per predictor that is stepped.

        Over frozen blocks a predictor goes by the name of its block, else by that name and ``_predictor``.
        """
        found: dict[str, list[ParamGroup]] = {}
        if self.feedback is not None:
            found = {
                name: [{"params": [*b.parameters()]}] for name, b in zip(self.blocks.names, self.blocks, strict=True)
            }
            head = self.blocks.readout if self.feedback.head is None else self.feedback.head
            assert head is not None
            found[self.blocks.names[-1]][0]["params"] += head.parameters()
        if not self.closed_form:
            found |= {self._unit(i): self.block_groups(i) for i in range(len(self.blocks))}
        return found

    def _unit(self, index: int) -> str:
        """Of the predictor of block ``index``."""
        name = self.blocks.names[index]
        return name if self.learning == "random" else f"{name}_predictor"

    @property
    def stages(self) -> list[list[str]]:
        """Blocks that learn come first, then all predictors together; over frozen blocks one predictor after the other.

        A stage without units is that of the closed form.
        """
        predictors = [] if self.closed_form else [self._unit(i) for i in range(len(self.blocks))]
        if self.feedback is not None:
            return [self.blocks.names, predictors]
        return [[]] if self.closed_form else super().stages

    @property
    def _teaches(self) -> bool:
        """Whether the blocks learn now."""
        return self.feedback is not None and any(self.trains(name) for name in self.blocks.names)

    @property
    def _fits(self) -> bool:
        """Whether predictors are fitted now."""
        if self.closed_form:
            return self._active is None or not self._teaches
        return any(self.trains(self._unit(i)) for i in range(len(self.blocks)))

    @property
    def finished(self) -> bool:
        """A closed form over blocks that stand still is found after one epoch."""
        return self.closed_form and not self._teaches and bool(self.epoch.ended > 0)

    def _asleep(self) -> Container[str]:
        """All blocks but those that learn now."""
        learn = self.feedback is not None
        return {f"blocks.members.{name}" for name in self.blocks.names if not (learn and self.trains(name))}

    # -- learning -----------------------------------------------------------------------------------------------------
    def prepare(self, batch: Batch) -> Batch:
        """The batch as it is, if it has a label for every sample.

        Raises:
            ValueError: a context, or targets that are no class ids.
        """
        if batch.context or batch.rows is not None:
            raise ValueError("CaFo takes batches with one label for every sample, and this one is part of a graph")
        check_targets(batch.targets, len(batch.inputs), self.outputs)
        return batch

    def updates(self, batch: Batch) -> Iterator[Update]:
        """The blocks' update, if they learn, then those of the predictors; the closed form only gathers its sums."""
        batch = self.prepare(batch)
        if self._teaches:
            assert self.feedback is not None
            if self._store is not None and self._fits:
                raise ValueError(
                    "algorithm.cache keeps the outputs of frozen blocks, and under a joint schedule these learn: set "
                    "schedule=sequential, or algorithm.cache=false"
                )
            losses, outputs = self.feedback.losses(self.blocks, batch.inputs, batch.targets)
            value, gradients = losses[-1].detach(), self._gradients(losses)
            del losses
            for i, name in enumerate(self.blocks.names):
                if self.trains(name):
                    yield Update(name, value, gradients.pop(name), again=partial(self._teach_again, i, batch))
            if self._fits:
                yield from self._fit(enumerate(outputs), batch)
        else:
            yield from self._fit(self._outputs(batch), batch)

    def _gradients(self, losses: list[Tensor]) -> dict[str, dict[nn.Parameter, Tensor]]:
        """Of every block that learns, from its own loss; all graphs end here, before a weight moves."""
        found: dict[str, dict[nn.Parameter, Tensor]] = {}
        units = self.units()
        for name, loss in zip(self.blocks.names, losses, strict=True):
            known: list[nn.Parameter] = [p for group in units[name] for p in group["params"] if p.requires_grad]
            if self.trains(name):
                found[name] = {}
                if known and loss.requires_grad:
                    made = torch.autograd.grad(loss, known, allow_unused=True)
                    found[name] = {p: g for p, g in zip(known, made, strict=True) if g is not None}
        return found

    def _teach_again(self, index: int, batch: Batch) -> Tensor:
        assert self.feedback is not None
        return self.feedback.losses(self.blocks, batch.inputs, batch.targets)[0][index]

    def _fit(self, outputs: Iterator[tuple[int, Tensor]], batch: Batch) -> Iterator[Update]:
        if self.closed_form:
            if self.epoch.begins_with(batch.index):
                for predictor in self._closed_forms():
                    predictor.forget()
            with torch.no_grad():
                predictors = self._closed_forms()
                for i, output in outputs:
                    predictors[i].gather(output, batch.targets)
            return
        for i, output in outputs:
            name = self._unit(i)
            if self.trains(name):
                again = partial(self.local_loss, i, output, batch)
                yield Update(name, self.local_loss(i, output, batch), again=again)

    def local_loss(self, index: int, output: Tensor, batch: Batch) -> Tensor:
        """Loss of the predictor of block ``index``."""
        predictor = self.predictors[index]
        assert isinstance(predictor, Stepped)
        return predictor.loss(output, batch.targets)

    def end_epoch(self) -> None:
        """Solve for the weights of the closed form."""
        if self.closed_form and self._fits:
            for predictor in self._closed_forms():
                predictor.finish()
            self.epoch.end()

    @torch.no_grad()
    def _outputs(self, batch: Batch) -> Iterator[tuple[int, Tensor]]:
        """Outputs of the frozen blocks whose predictors are fitted now, from what is kept where all of it is there."""
        wanted = [i for i in range(self.depth) if self.closed_form or self.trains(self._unit(i))]
        known = self._known(wanted, batch.index)
        if known is not None:
            yield from known
            return
        x: Any = batch.inputs
        for i in range(self.depth):
            x = self.hand_over(i, self._run_rows(i, x, batch))
            if self._store is not None:
                assert batch.index is not None
                self._store.put(i, batch.index, main(x))
            if i in wanted:
                yield i, main(x)

    def emit(self, index: int, output: Tensor) -> Tensor:
        """The output, standardised where random blocks' outputs are; the first one is measured."""
        return self._standardised(index, output, learn=True).detach()

    def _known(self, wanted: Sequence[int], index: Tensor | None) -> Iterator[tuple[int, Tensor]] | None:
        if self._store is None:
            return None
        if index is None:
            raise ValueError(
                "the outputs of frozen blocks are looked up by Batch.index, and these batches carry none (an augmented sample "
                "is a new one every time; a loop of one's own hands on none): set algorithm.cache=false, or "
                "dataset.augment=null"
            )
        store = self._store
        if not all(store.holds(i, index) for i in wanted):
            return None
        return ((i, store.get(i, index)) for i in wanted)

    def _run_rows(self, index: int, inputs: Any, batch: Batch) -> Any:
        """Run block ``index``, at most :attr:`rows` samples at a time; all at once where more than one tensor comes or goes."""
        if isinstance(inputs, Border):
            return self.run(index, inputs, batch)
        parts = [inputs[start : start + self.rows] for start in range(0, len(inputs), self.rows)]
        if len(parts) == 1:
            return self.run(index, inputs, batch)
        outputs = [self.run(index, parts[0], batch)]
        if isinstance(outputs[0], Border):
            return self.run(index, inputs, batch)
        outputs += [self.run(index, part, batch) for part in parts[1:]]
        return torch.cat(outputs)

    def _standardised(self, index: int, output: Tensor, learn: bool) -> Tensor:
        if not self._standardises:
            return output
        standard = self.standards[index]
        assert isinstance(standard, Standard)
        if learn and not standard.measured:
            standard.measure(output)
        result: Tensor = standard(output)
        return result

    def cache_frozen(self, keep: bool) -> None:
        """Keep the outputs of all blocks for every training sample seen, or forget them; ``schedule.cache`` asks for it."""
        self._store = FeatureStore(self.memory_gib) if keep else None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # What is kept of the blocks' outputs is not that of other weights; the same ones come back after every stage.
        if self._store is not None:
            frozen = {
                **self.blocks.state_dict(),
                **{f"standards/{k}": v for k, v in self.standards.state_dict().items()},
            }
            for name, held in frozen.items():
                path = f"standards.{name[10:]}" if name.startswith("standards/") else f"blocks.{name}"
                value = state_dict.get(prefix + path)
                if isinstance(value, Tensor) and not (
                    value.shape == held.shape and bool((value.to(held) == held).all())
                ):
                    self._store.clear()
                    break
        super()._load_from_state_dict(state_dict, prefix, *args)

    # -- prediction ---------------------------------------------------------------------------------------------------
    def activations(self, inputs: Tensor, *context: Any) -> Iterator[Tensor]:
        """Outputs of all blocks as their predictors read them."""
        x: Any = inputs
        for i, block in enumerate(self.blocks):
            x = block(x, *context)
            output = self._standardised(i, main(x), learn=False)
            x = replaced(x, output)
            yield output

    def predict(self, inputs: Tensor, *context: Any) -> Tensor:
        """Sum over blocks ``(N, C)``; while the blocks learn, and nothing else, the scores of their head."""
        outputs = enumerate(self.activations(inputs, *context))
        if not self._fits:
            assert self.feedback is not None
            *_, (_, last) = outputs
            return self.feedback.scores(self.blocks, last)
        total: Tensor | None = None
        depth = self.depth
        for i, output in outputs:
            if i < depth and (self.prediction == "sum" or i == depth - 1):
                scores = self._score(self.predictors[i](output))
                total = scores if total is None else total + scores
            if i + 1 == depth:
                break
        assert total is not None
        return total

    def _score(self, scores: Tensor) -> Tensor:
        if self.scores == "logits":
            return scores
        return cafo.probabilities(scores, "sparsemax" if self.predictor == "sparsemax" else "ce")

    def diagnostics(self) -> dict[str, dict[str, float]]:
        """Of the closed form: λ, the residual of its equations, and ``cholesky``, which is 0 where eigenvalues were needed."""
        named = zip(self.blocks.names, self._closed_forms(), strict=self.closed_form)
        return {name: figures for name, predictor in named if (figures := predictor.figures())}

    def _closed_forms(self) -> list[ClosedForm]:
        return [predictor for predictor in self.predictors if isinstance(predictor, ClosedForm)]
