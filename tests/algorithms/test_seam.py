"""One rule of every kind that is to come, sketched against the seam: it must carry them without a change."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from locallearn.algorithms import (
    Algorithm,
    Backprop,
    BackpropForwardForward,
    DeepSupervision,
    ForwardForward,
    LayerCollaboration,
    LocalHeads,
    Locality,
    MonoForward,
    ParamGroup,
    TaskInfo,
    Update,
)
from locallearn.audit import audit
from locallearn.batch import Batch
from locallearn.nets import Blocks, mlp
from locallearn.strategies import LocalStrategy
from locallearn.tasks.classification import Classification

WIDTH, CLASSES = 12, 3


def _batch(samples: int = 30) -> Batch:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(samples) % CLASSES
    centres = torch.eye(CLASSES, WIDTH) * 3
    return Batch(centres[labels] + 0.3 * torch.randn(samples, WIDTH, generator=generator), labels)


def _attached(algorithm: Algorithm, hidden: tuple[int, ...] = (16, 16)) -> Classification:
    torch.manual_seed(0)
    task = Classification(mlp((WIDTH,), CLASSES, hidden), _batch().inputs[:2], CLASSES)
    task.use(algorithm)
    return task


def _trained(algorithm: Algorithm, lr: float = 0.2, epochs: int = 200) -> float:
    """Accuracy on the training batch after a Trainer has run the rule."""
    task, batch = _attached(algorithm), _batch()
    trainer = pl.Trainer(
        strategy=LocalStrategy(algorithm, lambda groups: torch.optim.SGD(groups, lr=lr)),
        max_epochs=epochs,
        check_val_every_n_epoch=epochs,
        log_every_n_steps=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(TensorDataset(batch.inputs, batch.targets), batch_size=len(batch.targets))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        trainer.fit(task, loader, loader)
    assert trainer.global_step == epochs
    with torch.no_grad():
        return float((task(batch.inputs).argmax(1) == batch.targets).float().mean())


class ErrorDriven(Algorithm):
    """Forward-only with hand-made gradients, after PEPITA: a second pass on an input that the error has modulated."""

    scale = 0.05

    @property
    def locality(self) -> Locality:
        return Locality.FORWARD_ONLY

    def build(self, task: TaskInfo) -> None:
        width = task.example.inputs[0].numel()
        self.register_buffer("feedback", self.scale * torch.randn(width, task.outputs))

    def _layers(self) -> dict[str, nn.Linear]:
        named = dict(zip([*self.blocks.names, "readout"], [*self.blocks, self.blocks.readout], strict=True))
        return {n: next(m for m in b.modules() if isinstance(m, nn.Linear)) for n, b in named.items() if b is not None}

    def units(self) -> dict[str, list[ParamGroup]]:
        return {name: [{"params": [layer.weight]}] for name, layer in self._layers().items()}

    @torch.no_grad()
    def updates(self, batch: Batch) -> Iterator[Update]:
        first = list(self.blocks.features(batch.inputs))
        assert self.blocks.readout is not None
        scores = self.blocks.readout(first[-1])
        error = scores.softmax(1) - F.one_hot(batch.targets, self.outputs)
        before = batch.inputs - error @ self.feedback.T
        for (name, layer), h, block in zip(self._layers().items(), first, self.blocks, strict=False):
            after = block(before)
            yield Update(name, F.cross_entropy(scores, batch.targets), {layer.weight: (h - after).T @ before / len(h)})
            before = after
        yield Update("readout", gradients={self._layers()["readout"].weight: error.T @ before / len(error)})


class _Feedback(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, feedback: Tensor) -> Tensor:
        ctx.save_for_backward(x, feedback)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, feedback = ctx.saved_tensors
        return gradient @ feedback, gradient.T @ x, gradient.sum(0) if ctx.needs_input_grad[2] else None, None


class FeedbackAlignment(Algorithm):
    """A chain with replaced feedback: one unit over all blocks, the error carried back by fixed matrices."""

    def __init__(self, symmetric: bool = False) -> None:
        super().__init__()
        self.symmetric = symmetric

    @property
    def locality(self) -> Locality:
        return Locality.FEEDBACK

    def build(self, task: TaskInfo) -> None:
        self.loss = task.loss
        for name, module in list(self.blocks.named_modules()):
            if isinstance(module, nn.Linear):
                matrix = module.weight.detach().clone() if self.symmetric else torch.randn_like(module.weight) / 4
                self.register_buffer(name.replace(".", "_"), matrix)
                module.forward = self._carried(module, name.replace(".", "_"))  # type: ignore[method-assign]

    def _carried(self, module: nn.Linear, name: str) -> Any:
        return lambda x: _Feedback.apply(x, module.weight, module.bias, getattr(self, name))

    def units(self) -> dict[str, list[ParamGroup]]:
        return {"network": [{"params": list(self.blocks.parameters())}]}

    def updates(self, batch: Batch) -> Iterator[Update]:
        yield Update("network", self.loss(self.blocks(batch.inputs), batch.targets))


class TwoNetworks(Algorithm):
    """A second network runs from the labels to meet the first one halfway, after counter-current learning."""

    @property
    def locality(self) -> Locality:
        return Locality.LAYER_LOCAL

    def build(self, task: TaskInfo) -> None:
        widths = [x[0].numel() for x in self.blocks.features(task.example.inputs)]
        ahead = [*widths[1:], task.outputs]
        self.back = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in zip(ahead, widths, strict=True))

    @property
    def label_path(self) -> list[nn.Module]:
        return [self.back]

    def units(self) -> dict[str, list[ParamGroup]]:
        blocks = zip(self.blocks.names, self.blocks, self.back, strict=True)
        units: dict[str, list[ParamGroup]] = {
            name: [{"params": [*block.parameters(), *back.parameters()]}] for name, block, back in blocks
        }
        assert self.blocks.readout is not None
        return {**units, "readout": [{"params": list(self.blocks.readout.parameters())}]}

    def updates(self, batch: Batch) -> Iterator[Update]:
        signals, top = [], torch.eye(self.outputs)
        for back in reversed(self.back):
            signals.insert(0, F.elu(back(top)))
            top = signals[0].detach()
        same = F.one_hot(batch.targets, self.outputs).float()
        x = batch.inputs
        for name, block, signal in zip(self.blocks.names, self.blocks, signals, strict=True):
            output = block(x)
            yield Update(name, ((output @ signal.T - same) ** 2).mean())
            x = output.detach()
        assert self.blocks.readout is not None
        yield Update("readout", F.cross_entropy(self.blocks.readout(x), batch.targets))


class ClosedForm(Algorithm):
    """A ridge readout on random features: statistics gathered batch by batch, solved when they are asked for."""

    @property
    def locality(self) -> Locality:
        return Locality.FORWARD_ONLY

    def build(self, task: TaskInfo) -> None:
        width = list(self.blocks.features(task.example.inputs))[-1].shape[1]
        self.register_buffer("gram", torch.eye(width))
        self.register_buffer("cross", torch.zeros(width, task.outputs))

    def units(self) -> dict[str, list[ParamGroup]]:
        return {}

    @torch.no_grad()
    def updates(self, batch: Batch) -> Iterator[Update]:
        h = list(self.blocks.features(batch.inputs))[-1]
        self.gram += h.T @ h
        self.cross += h.T @ F.one_hot(batch.targets, self.outputs).float()
        return iter(())

    def predict(self, inputs: Tensor, *context: Any) -> Tensor:
        return list(self.blocks.features(inputs))[-1] @ torch.linalg.solve(self.gram, self.cross)


@pytest.mark.parametrize("make", [ErrorDriven, FeedbackAlignment, TwoNetworks, ClosedForm])
def test_a_rule_of_this_kind_learns_inside_a_trainer(make: type[Algorithm]) -> None:
    assert _trained(make()) > 0.9


@pytest.mark.parametrize("make", [ErrorDriven, TwoNetworks])
def test_the_audit_confirms_what_it_is(make: type[Algorithm]) -> None:
    algorithm = make()
    _attached(algorithm)
    result = audit(algorithm, _batch())
    assert result.confirmed
    assert result.verdict is algorithm.locality


def test_hand_made_gradients_without_feedback_move_the_readout_only() -> None:
    algorithm = ErrorDriven()
    _attached(algorithm)
    algorithm.feedback.zero_()
    moved = {}
    for update in algorithm.updates(_batch()):
        update.backward()
        moved[update.unit] = any(float(p.grad.abs().max()) > 0 for p in algorithm.parameters() if p.grad is not None)
        algorithm.zero_grad()
    assert moved == {"layer1": False, "layer2": False, "readout": True}


def test_feedback_through_the_forward_weights_is_backprop() -> None:
    gradients = []
    for algorithm in (Backprop(), FeedbackAlignment(symmetric=True)):
        task = _attached(algorithm)
        for update in algorithm.updates(_batch()):
            update.backward()
        gradients.append({name: p.grad for name, p in task.net.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_closed_form_equals_the_normal_equations() -> None:
    algorithm = ClosedForm()
    task, batch = _attached(algorithm), _batch()
    list(algorithm.updates(batch))
    with torch.no_grad():
        h = list(task.net.features(batch.inputs))[-1]
        targets = F.one_hot(batch.targets, CLASSES).float()
        weight = torch.linalg.lstsq(
            torch.cat((h, torch.eye(h.shape[1]))), torch.cat((targets, h.new_zeros(h.shape[1], CLASSES)))
        ).solution
    assert torch.allclose(task(batch.inputs), h @ weight, atol=1e-4)


def test_blocks_cut_from_somebody_elses_network_carry_a_second_network_too() -> None:
    own = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    task = Classification(Blocks.cut(own), _batch().inputs[:2], CLASSES)
    task.use(TwoNetworks())
    before = [p.detach().clone() for p in own.parameters()]
    assert task.algorithm is not None
    optimizers = {unit: torch.optim.SGD(groups, lr=0.1) for unit, groups in task.algorithm.units().items()}
    for update in task.algorithm.updates(_batch()):
        update.backward()
        optimizers[update.unit].step()
    assert all(not torch.equal(a, b) for a, b in zip(before, own.parameters(), strict=True))


def test_a_network_that_is_not_cut_into_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Backprop trains a network as ordered blocks, and this is a Sequential"):
        Backprop().attach(nn.Sequential(nn.Linear(WIDTH, CLASSES)), TaskInfo(_batch(2), CLASSES, F.cross_entropy))  # type: ignore[arg-type]


# -- names of kinds ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rule", "variant"),
    [
        (ForwardForward(), None),
        (
            ForwardForward(peer=0.03, threshold=2.0, inference="last"),
            None,
        ),  # numbers tune a rule, they make no other one
        (ForwardForward("hard"), "negatives=hard"),
        (ForwardForward("hybrid", blurs=3), "negatives=hybrid"),
        (ForwardForward("hybrid", loss="symba"), "negatives=hybrid, loss=symba"),
        (ForwardForward(loss="channelwise"), "loss=channelwise"),
        (ForwardForward(loss="channelwise", competition="pvn"), "loss=channelwise, competition=pvn"),
        (ForwardForward(goodness="norm", minimise=True), "goodness=norm, minimise=true"),
        (ForwardForward(recurrent={"steps": 4}, loss="symba"), "recurrent=4, loss=symba"),
        (LayerCollaboration(gamma="previous"), "gamma=previous"),
        (
            LayerCollaboration(threshold="midpoint", order="gauss_seidel"),
            "gamma=all, threshold=midpoint, order=gauss_seidel",
        ),
        (BackpropForwardForward(), None),
        (BackpropForwardForward("norm"), "goodness=norm"),
        (MonoForward(), None),
        (LocalHeads(head="conv1", width=0.5, loss="predsim"), "head=conv1, loss=predsim"),
        (LocalHeads(loss="infopro", contrast=True, movement=0.1), "loss=infopro, contrast=true, movement=0.1"),
        (DeepSupervision(head="conv1"), "head=conv1"),
    ],
)
def test_kinds_are_told_apart_in_records(rule: Algorithm, variant: str | None) -> None:
    assert rule.variant == variant
