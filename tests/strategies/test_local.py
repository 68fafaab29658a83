"""``LocalStrategy`` is the plain loop, bit for bit, with Lightning's conveniences around it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import Tensor, nn

from locallearn.algorithms import (
    Algorithm,
    Backprop,
    DeepSupervision,
    ForwardForward,
    MonoForward,
    ProductFeedbackAlignment,
    Update,
)
from locallearn.batch import Batch
from locallearn.functional import mono_forward
from locallearn.local import localize
from locallearn.nets import Blocks
from locallearn.strategies import Diverged, LocalStrategy
from locallearn.strategies.local import _OF_A_TASK, LocalTask
from locallearn.tasks.classification import Classification
from locallearn.testing import plain_loop

# Most tests here train without validation, on the main process, and on a CPU where a GPU may be.
pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no `val_dataloader`", "ignore:GPU available but not used"
)

Maker = Callable[..., Any]
adam = partial(torch.optim.Adam, lr=1e-2)
RULES: dict[str, Callable[[], Algorithm]] = {
    "backprop": Backprop,
    "deep_supervision": DeepSupervision,
    "mono_forward": MonoForward,
    "forward_forward": partial(ForwardForward, negatives="hard", peer=0.03),
}


class _Thawing(BaseFinetuning):
    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        """Freezes nothing."""

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        """Thaws nothing."""


class _OwnPrecision(Precision):
    """Nobody knows what it does."""


def _weights(algorithm: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in [*algorithm.named_parameters(), *algorithm.named_buffers()]}


def _assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


@pytest.fixture(params=RULES)
def rule(request: pytest.FixtureRequest) -> Callable[[], Algorithm]:
    return RULES[request.param]


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_weights_are_those_of_the_plain_loop(
    rule: Callable[[], Algorithm], interval: str, make_module: Maker, make_trainer: Maker, train: Any
) -> None:
    """With schedulers and clipping, three epochs."""
    every = 1 if interval == "epoch" else len(train)
    strategy = LocalStrategy(
        rule(), adam, partial(torch.optim.lr_scheduler.StepLR, step_size=every, gamma=0.5), interval
    )
    trainer = make_trainer(strategy=strategy, max_epochs=3, gradient_clip_val=0.05)
    trainer.fit(make_module(), train)
    module = make_module()
    module.use(rule())
    plain_loop(
        module.algorithm,
        [*train.batches] * 3,
        adam,
        partial(torch.optim.lr_scheduler.StepLR, step_size=len(train), gamma=0.5),
        clip=0.05,
    )
    _assert_equal(_weights(strategy.algorithm), _weights(module.algorithm))
    assert trainer.global_step == 3 * len(train)


def test_clipping_and_schedulers_matter_in_the_test_above(make_module: Maker, train: Any) -> None:
    ends = []
    for clip, gamma in ((None, 0.5), (0.05, 1.0), (0.05, 0.5)):
        module = make_module()
        module.use(MonoForward())
        scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=len(train), gamma=gamma)
        plain_loop(module.algorithm, [*train.batches] * 2, adam, scheduler, clip)
        ends.append(next(module.parameters()).detach())
    assert not torch.equal(ends[0], ends[2])
    assert not torch.equal(ends[1], ends[2])


def test_the_unchanged_module_under_auto_is_backprop(make_module: Maker, make_trainer: Maker, train: Any) -> None:
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    local, auto = make_module(), make_module(optimizer=adam, scheduler=scheduler)
    make_trainer(strategy=LocalStrategy(Backprop(), adam, scheduler), max_epochs=2).fit(local, train)
    make_trainer(strategy="auto", max_epochs=2).fit(auto, train)
    _assert_equal(_weights(local.net), _weights(auto.net))


def test_max_steps_counts_batches(make_module: Maker, make_trainer: Maker, train: Any) -> None:
    strategy = LocalStrategy(MonoForward(), adam)
    trainer = make_trainer(strategy=strategy, max_steps=5)
    trainer.fit(make_module(), train)
    assert trainer.global_step == 5
    module = make_module()
    module.use(MonoForward())
    plain_loop(module.algorithm, [*train.batches, train.batches[0]], adam)
    _assert_equal(_weights(strategy.algorithm), _weights(module.algorithm))


class _SaveAt(pl.Callback):
    """Leaves a checkpoint after so many steps and lets the training go on."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("steps", [4, 6], ids=["between-epochs", "inside-an-epoch"])
def test_resuming_from_a_checkpoint_is_exact(
    rule: Callable[[], Algorithm], steps: int, make_module: Maker, make_trainer: Maker, train: Any, tmp_path: Path
) -> None:
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.5)

    def strategy() -> LocalStrategy:
        return LocalStrategy(rule(), adam, scheduler, "step")

    whole = make_trainer(strategy=strategy(), max_epochs=3, callbacks=[_SaveAt(steps, tmp_path / "half.ckpt")])
    whole.fit(make_module(), train)

    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    units = list(whole.strategy.algorithm.units())
    assert saved["global_step"] == steps
    assert len(saved["optimizer_states"]) == len(saved["lr_schedulers"]) == len(units)
    assert all(len(state["state"]) > 0 for state in saved["optimizer_states"])

    resumed = make_trainer(strategy=strategy(), max_epochs=3)
    resumed.fit(make_module(), type(train)(train.batches), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert resumed.global_step == whole.global_step
    _assert_equal(_weights(whole.strategy.algorithm), _weights(resumed.strategy.algorithm))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_train(
    rule: Callable[[], Algorithm], precision: str, make_module: Maker, make_trainer: Maker, train: Any
) -> None:
    strategy = LocalStrategy(rule(), adam)
    trainer = make_trainer(strategy=strategy, max_epochs=1, precision=precision)
    if precision == "64-true":
        train.batches = [batch._replace(inputs=batch.inputs.double()) for batch in train.batches]
    trainer.fit(module := make_module(), train)
    first = sum(strategy.mean_losses().values())
    trainer.fit_loop.max_epochs = 12
    trainer.fit(module, train)
    assert sum(strategy.mean_losses().values()) < 0.97 * first
    dtype = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert {p.dtype for p in strategy.algorithm.parameters()} == {dtype}


def test_callbacks_work(make_module: Maker, make_trainer: Maker, train: Any, validation: Any, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", monitor="validation/loss", save_last=True)
    early = EarlyStopping("validation/accuracy", mode="max", patience=1, stopping_threshold=0.0)
    rates = LearningRateMonitor("epoch")
    trainer = make_trainer(
        strategy=LocalStrategy(MonoForward(), adam, partial(torch.optim.lr_scheduler.StepLR, step_size=1)),
        max_epochs=50,
        callbacks=[checkpoint, early, rates],
        logger=CSVLogger(tmp_path),
        enable_checkpointing=True,
        log_every_n_steps=1,
    )
    trainer.fit(make_module(), train, validation)
    assert early.stopped_epoch == 0
    assert trainer.current_epoch == 1  # accuracy is above 0 after one epoch
    assert set(rates.lrs) == {"lr-layer1", "lr-layer2", "lr-layer3"}
    assert rates.lrs["lr-layer1"] == [1e-2]
    saved = torch.load(checkpoint.best_model_path, weights_only=True)
    assert len(saved["optimizer_states"]) == 3
    assert math.isclose(float(checkpoint.best_model_score), float(trainer.callback_metrics["validation/loss"]))


def test_mean_losses_are_those_of_every_unit(make_module: Maker, make_trainer: Maker, train: Any) -> None:
    strategy = LocalStrategy(MonoForward(), partial(torch.optim.SGD, lr=0.0))
    make_trainer(strategy=strategy, max_epochs=1).fit(module := make_module(), train)
    means = strategy.mean_losses()
    assert list(means) == ["layer1", "layer2", "layer3"]
    expected = torch.stack(
        [
            torch.stack([u.loss for u in module.algorithm.updates(batch) if u.loss is not None])
            for batch in train.batches
        ]
    ).mean(0)
    assert torch.allclose(torch.tensor(list(means.values())), expected)
    assert strategy.mean_losses() == {}


def test_the_loss_of_a_batch_is_the_sum_over_units(make_module: Maker, make_trainer: Maker, train: Any) -> None:
    seen: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *_: Any) -> None:
            seen.append(float(outputs["loss"]))

    strategy = LocalStrategy(MonoForward(), partial(torch.optim.SGD, lr=0.0))
    make_trainer(strategy=strategy, max_epochs=1, callbacks=[Watch()]).fit(module := make_module(), train)
    expected = [sum(float(u.loss.detach()) for u in module.algorithm.updates(batch)) for batch in train.batches]
    assert seen == pytest.approx(expected)


# -- refusals -------------------------------------------------------------------------------------------------------
def test_a_search_for_batch_sizes_is_refused(make_trainer: Maker) -> None:
    strategy = LocalStrategy(MonoForward(), adam)
    trainer = make_trainer(strategy=strategy, callbacks=[BatchSizeFinder()])
    with pytest.raises(ValueError, match="BatchSizeFinder trains steps on the way"):
        strategy.check(trainer)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"precision": "16-true"}, "precision is '16-true'"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches is 2"),
        ({"callbacks": [GradientAccumulationScheduler({0: 1, 3: 2})]}, "accumulate_grad_batches is 2"),
        ({"callbacks": [StochasticWeightAveraging(1e-2)]}, "StochasticWeightAveraging works on the one optimizer"),
        ({"callbacks": [LearningRateFinder()]}, "LearningRateFinder works on the one optimizer"),
        ({"callbacks": [_Thawing()]}, "_Thawing adds the weights that it thaws"),
        ({"callbacks": [ModelPruning("l1_unstructured", amount=0.5)]}, "ModelPruning puts other parameters"),
        ({"num_nodes": 2}, "num_nodes=2"),
        ({"plugins": [_OwnPrecision()]}, "_OwnPrecision, which may do"),
    ],
)
def test_what_cannot_work_is_refused(
    options: dict[str, Any], sentence: str, make_module: Maker, make_trainer: Maker, train: Any
) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_trainer(strategy=LocalStrategy(MonoForward(), adam), max_epochs=1, **options).fit(make_module(), train)


def test_accumulation_that_begins_later_is_refused(make_module: Maker, make_trainer: Maker, train: Any) -> None:
    class Later(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            trainer.accumulate_grad_batches = 1 + trainer.current_epoch

    trainer = make_trainer(strategy=LocalStrategy(MonoForward(), adam), max_epochs=3, callbacks=[Later()])
    with pytest.raises(ValueError, match="accumulate_grad_batches is 2"):
        trainer.fit(make_module(), train)
    assert trainer.global_step == len(train)


def _step_oneself(module: pl.LightningModule, *args: Any, **options: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        ({"optimizer_step": _step_oneself}, "Own has an optimizer_step of its own"),
        ({"automatic_optimization": False}, "Own has automatic_optimization=False"),
    ],
    ids=["optimizer_step", "manual"],
)
def test_a_module_that_steps_itself_is_refused(
    own: dict[str, Any], sentence: str, make_net: Maker, make_trainer: Maker, train: Any
) -> None:
    module = type("Own", (Classification,), own)(make_net(), torch.zeros(2, 12), 3)
    with pytest.raises(ValueError, match=sentence):
        make_trainer(strategy=LocalStrategy(MonoForward(), adam), max_epochs=1).fit(module, train)


def test_clipping_by_value_is_refused_where_steps_must_be_linear(
    make_module: Maker, make_trainer: Maker, train: Any
) -> None:
    for how, refused in (("value", True), ("norm", False)):
        strategy = LocalStrategy(ProductFeedbackAlignment(), partial(torch.optim.SGD, lr=0.1))
        trainer = make_trainer(
            strategy=strategy, max_epochs=1, gradient_clip_val=0.1, gradient_clip_algorithm=how, limit_train_batches=1
        )
        with (
            pytest.raises(ValueError, match=r"ProductFeedbackAlignment can be clipped by norm only")
            if refused
            else nullcontext()
        ):
            trainer.fit(make_module(), train)


def test_clipping_by_value_that_begins_later_is_refused(make_module: Maker, make_trainer: Maker, train: Any) -> None:
    class Later(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
            if index == 2:
                trainer.gradient_clip_val, trainer.gradient_clip_algorithm = 0.1, "value"

    strategy = LocalStrategy(ProductFeedbackAlignment(), partial(torch.optim.SGD, lr=0.1))
    trainer = make_trainer(strategy=strategy, max_epochs=1, callbacks=[Later()])
    with pytest.raises(ValueError, match="can be clipped by norm only"):
        trainer.fit(make_module(), train)
    assert trainer.global_step == 2


def test_a_gradient_scaler_is_refused() -> None:
    """On a CPU the Trainer itself turns 16-mixed into bf16-mixed, so the strategy is asked directly."""
    strategy = LocalStrategy(MonoForward(), adam)
    strategy.precision_plugin = MixedPrecision("16-mixed", device="cpu")
    with pytest.raises(ValueError, match=r"precision is '16-mixed'.* gradient scaler"):
        strategy.setup(pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False))


def test_several_devices_are_refused(make_trainer: Maker) -> None:
    with pytest.raises(ValueError, match=r"set trainer\.devices=1"):
        make_trainer(strategy=LocalStrategy(MonoForward(), adam), devices=2)


def test_an_unknown_scheduler_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="'epoch' or 'step'"):
        LocalStrategy(MonoForward(), adam, scheduler_interval="batch")


class _NoBlocks(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(12, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise NotImplementedError

    def configure_optimizers(self) -> None:
        return None


def test_a_module_without_blocks_is_refused(make_trainer: Maker, train: Any) -> None:
    with pytest.raises(ValueError, match="_NoBlocks has no blocks to train"):
        make_trainer(strategy=LocalStrategy(MonoForward(), adam), max_epochs=1).fit(_NoBlocks(), train)


class _HalfATask(_NoBlocks):
    def __init__(self, net: Blocks) -> None:
        super().__init__()
        self.net = net  # type: ignore[assignment]

    def info(self) -> None:
        return None


def test_everything_that_a_module_lacks_to_be_a_task_is_named_at_once(make_trainer: Maker, train: Any) -> None:
    net = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    made = localize(net, MonoForward(), cuts=2, example=torch.randn(8, 12))
    told = r"_HalfATask has no algorithm, metric, maximise, to_batch, use, .*locallearn\.tasks\.classification\.Classification"
    with pytest.raises(ValueError, match=told):
        make_trainer(strategy=LocalStrategy(made), max_epochs=1).fit(_HalfATask(made.blocks), train)
    blocks = Blocks.cut(copy.deepcopy(net))
    with pytest.raises(ValueError, match=told):
        make_trainer(strategy=LocalStrategy(MonoForward(), adam), max_epochs=1).fit(_HalfATask(blocks), train)


def test_the_protocol_of_a_task_is_what_is_looked_for() -> None:
    asked = {name for name in vars(LocalTask) if not name.startswith("_")} | set(LocalTask.__annotations__)
    assert {"net", *_OF_A_TASK} == asked


def test_a_module_of_another_algorithm_is_refused(make_module: Maker, make_trainer: Maker, train: Any) -> None:
    module = make_module()
    module.use(Backprop())
    with pytest.raises(ValueError, match="trained by Backprop already"):
        make_trainer(strategy=LocalStrategy(MonoForward(), adam), max_epochs=1).fit(module, train)


# -- divergence and hand-made gradients -------------------------------------------------------------------------------
def test_divergence_names_the_unit_and_the_step(make_module: Maker, make_trainer: Maker, train: Any) -> None:
    module = make_module()
    module.check = lambda batch: None  # a module that does not look at its inputs
    train.batches[2] = train.batches[2]._replace(inputs=train.batches[2].inputs * math.nan)
    with pytest.raises(Diverged, match=r"unit 'layer1' diverged: its loss is nan at step 2"):
        make_trainer(strategy=LocalStrategy(MonoForward(), adam), max_epochs=1).fit(module, train)


def test_divergence_of_a_later_unit_is_named(make_module: Maker, make_trainer: Maker, train: Any) -> None:
    module = make_module()
    with torch.no_grad():
        module.net[1][0].weight.fill_(math.inf)
    with pytest.raises(Diverged, match=r"unit 'layer2' diverged: .* at step 0"):
        make_trainer(strategy=LocalStrategy(MonoForward(), adam), max_epochs=1).fit(module, train)


class _ByHand(MonoForward):
    """Mono-Forward with the gradients of its spec instead of autograd's."""

    def updates(self, batch: Batch) -> Iterator[Update]:
        x = batch.inputs
        for i, name in enumerate(self.blocks.names):
            weight, bias, projection = self.units()[name][0]["params"]
            gradients = mono_forward.gradients(x, weight, bias, projection, batch.targets)
            with torch.no_grad():
                x = self.blocks[i](x)
            yield Update(name, gradients=dict(zip((weight, bias, projection), gradients[:3], strict=True)))


def test_hand_made_gradients_are_stepped_and_clipped(make_module: Maker, make_trainer: Maker, train: Any) -> None:
    """The strategy must not care where gradients come from; no loss is reported, none is invented."""
    sgd = partial(torch.optim.SGD, lr=0.5)
    by_hand, by_autograd = LocalStrategy(_ByHand(), sgd), LocalStrategy(MonoForward(), sgd)
    for strategy in (by_hand, by_autograd):
        make_trainer(strategy=strategy, max_epochs=2, gradient_clip_val=0.1).fit(make_module(), train)
    assert by_hand.mean_losses() == {}
    for one, other in zip(by_hand.algorithm.parameters(), by_autograd.algorithm.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_networks_with_own_modules_keep_their_place(make_trainer: Maker, train: Any) -> None:
    """Blocks cut from somebody's module are that module: training them trains it."""
    own = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    before = own[0].weight.detach().clone()
    module = Classification(Blocks.cut(own), torch.zeros(2, 12), 3)
    make_trainer(strategy=LocalStrategy(MonoForward(), adam), max_epochs=1).fit(module, train)
    assert not torch.equal(own[0].weight, before)


class _Listening(pl.Callback):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor) -> None:
        self.heard.append("loss")

    def on_after_backward(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.heard.append("gradients")

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        self.heard.append("step")


@pytest.mark.parametrize("hook", ["on_before_backward", "on_after_backward", "on_before_optimizer_step"])
@pytest.mark.parametrize("where", ["class", "object", "callback"])
def test_hooks_around_a_step_are_called_for_every_unit_whoever_wrote_them(
    hook: str, where: str, make_module: Maker, make_trainer: Maker, train: Any
) -> None:
    """They are left out only where nobody has written one."""
    heard: list[str] = []

    def note(self: Any, *args: Any) -> None:
        heard.append(hook)

    module, callback = make_module(), pl.Callback()
    if where == "class":
        module.__class__ = type("Heard", (type(module),), {hook: note})
    elif where == "object":
        setattr(module, hook, partial(note, module))
    else:
        callback.__class__ = type("Heard", (pl.Callback,), {hook: note})
    trainer = make_trainer(strategy=LocalStrategy(MonoForward(), adam), max_epochs=1, callbacks=[callback])
    trainer.fit(module, train)
    assert len(heard) == len(train) * len(module.net)


def test_with_hooks_and_without_weights_are_the_same(make_module: Maker, make_trainer: Maker, train: Any) -> None:
    weights = []
    for callbacks in ([], [_Listening()]):
        torch.manual_seed(0)
        trainer = make_trainer(strategy=LocalStrategy(MonoForward(), adam), max_epochs=2, callbacks=callbacks)
        trainer.fit(module := make_module(), train)
        weights.append(list(module.parameters()))
    assert callbacks[0].heard[:6] == ["loss", "gradients", "step"] * 2
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
