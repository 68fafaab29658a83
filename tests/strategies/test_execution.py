"""Blocks that are compiled, and images with channels last, give the numbers of the plain run."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import locallearn as ll
from locallearn.algorithms import Algorithm, Backprop, FeedbackAlignment, LocalHeads, MonoForward, Pepita, TaskInfo
from locallearn.batch import Batch
from locallearn.cost import FlopCounter, cache_bytes
from locallearn.nets import Blocks, mlp
from locallearn.nets.execution import Execution
from locallearn.strategies import LocalStrategy
from locallearn.tasks.classification import Classification

# Most tests here train without validation, on the main process, and on a CPU where a GPU may be.
pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no `val_dataloader`", "ignore:GPU available but not used"
)

DRAW = torch.Generator().manual_seed(0)
SIZES = (8, 8, 5)  # the last batch of an epoch is smaller
IMAGES = [torch.randn(n, 3, 6, 6, generator=DRAW) for n in SIZES]
LABELS = [torch.randint(4, (n,), generator=DRAW) for n in SIZES]
BATCHES = [Batch(x, y) for x, y in zip(IMAGES, LABELS, strict=True)]
SGD = partial(torch.optim.SGD, lr=0.05)


class Residual(nn.Module):
    """Its residual branch is known by name."""

    residual_branches = ("conv",)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 5, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.conv(x)


def _net(dropout: float = 0.0) -> Blocks:
    """The first layer of the second block works in place, on what belongs to the first one."""
    torch.manual_seed(0)
    first = nn.Sequential(Residual(3), nn.BatchNorm2d(5), nn.Dropout(dropout))
    second = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(5, 6, 3, stride=2, padding=1))
    return Blocks({"first": first, "second": second}, nn.Sequential(nn.Flatten(), nn.Linear(54, 4)))


def _trained(rule: Algorithm, net: Blocks, epochs: int = 2, **execution: Any) -> Classification:
    module = Classification(net, IMAGES[0][:2], 4)
    flags: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        strategy=LocalStrategy(rule, SGD, **execution),
        accelerator="cpu",
        max_epochs=epochs,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        **flags,
    )
    torch.manual_seed(1)
    trainer.fit(module, _Loader(BATCHES), _Loader(BATCHES[1:]))
    return module


class _Loader(list[Batch]):
    """Batches as they are, an epoch after another."""


def _furthest(one: nn.Module, other: nn.Module) -> float:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    tensors = [name for name, value in mine.items() if isinstance(value, Tensor) and value.numel()]
    return max(float((mine[name] - theirs[name]).abs().max()) for name in tensors)


def test_compiled_blocks_learn_what_plain_ones_learn() -> None:
    """With dropout, a layer in place, statistics that move, a smaller last batch and validation."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # type: ignore[no-untyped-call]
    compiled = _trained(MonoForward(), _net(0.3), compile="blocks", compile_backend="eager")
    plain = _trained(MonoForward(), _net(0.3))
    assert _furthest(compiled, plain) < 1e-5
    # Of each block: a size of batches, any size, and both at evaluation, where the first size counts as one of any.
    assert 4 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8
    assert all(block._compiled_call_impl is None for block in compiled.net)  # the Trainer is done


def test_baseline_is_compiled_too_and_draws_the_same() -> None:
    compiled = _trained(Backprop(), _net(0.3), epochs=1, compile="blocks", compile_backend="eager")
    assert _furthest(compiled, _trained(Backprop(), _net(0.3), epochs=1)) < 1e-5


def test_who_counts_or_copies_sees_plain_blocks() -> None:
    net, execution = _net(), Execution(compile="blocks", backend="eager")
    with FlopCounter() as plain:
        expected = net(IMAGES[0])
    execution.prepare(net, net)
    assert torch.allclose(net(IMAGES[0]), expected, atol=1e-6)
    calls = [block._compiled_call_impl for block in net]
    assert all(call.ran for call in calls)  # type: ignore[union-attr]
    with FlopCounter() as counted:
        net(IMAGES[0])
    assert counted.total == plain.total > 0
    assert cache_bytes(net) == 0
    twin = copy.deepcopy(net)
    assert [block._compiled_call_impl for block in twin] == [None, None]
    execution.prepare(twin, twin)
    assert torch.allclose(twin(IMAGES[0]), net(IMAGES[0]), atol=1e-6)
    seen: list[nn.Module] = []
    hook = net[0][0].conv.register_forward_hook(lambda module, given, made: seen.append(module))
    net(IMAGES[0])
    hook.remove()
    net(IMAGES[0])
    assert len(seen) == 1  # a hook inside of a block is called
    execution.undo(net)
    assert [block._compiled_call_impl for block in net] == [None, None]


def test_who_transforms_functions_or_listens_to_all_modules_sees_plain_blocks() -> None:
    torch.manual_seed(0)
    net, execution = mlp((3, 6, 6), 4, (5,)), Execution(compile="blocks", backend="aot_eager")

    def each(images: Tensor) -> Tensor:
        scores: Tensor = torch.vmap(lambda image: net(image[None])[0])(images)
        return scores

    plain = each(IMAGES[0])
    execution.prepare(net, net)
    assert torch.equal(each(IMAGES[0]), plain)
    seen: list[nn.Module] = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, given, made: seen.append(module))
    try:
        net(IMAGES[0])
    finally:
        hook.remove()
    assert any(isinstance(module, nn.Linear) for module in seen)


@torch._dynamo.config.patch(cache_size_limit=2)
def test_more_ways_to_run_than_are_compiled_do_not_end_a_training() -> None:
    """Parts rest in turn; another mode of the block stays compiled."""
    net, execution = _net(0.3), Execution(compile="blocks", backend="eager")
    execution.prepare(net, net)
    block = net[0]
    block(IMAGES[0])
    block[1].eval()
    block(IMAGES[0])
    block[2].eval()
    with pytest.warns(UserWarning, match="block 'first' runs in more ways than PyTorch compiles"):
        block(IMAGES[0])
    kept = execution._compiled["first"]._made  # type: ignore[attr-defined]
    assert list(kept) == [(True, True, False)]
    twin = copy.deepcopy(net)
    assert torch.equal(block(IMAGES[0]), twin[0](IMAGES[0]))
    with torch.no_grad():
        block.eval()(IMAGES[0])
    plain, compiled = kept.values()
    assert plain is not compiled
    assert hasattr(compiled, "_torchdynamo_orig_callable")


@pytest.mark.parametrize("rule", [Pepita, FeedbackAlignment])
def test_rules_that_take_blocks_apart_are_refused(rule: Callable[[], Algorithm]) -> None:
    torch.manual_seed(0)
    net = mlp((3, 6, 6), 4, (5,))
    with pytest.raises(ValueError, match=rf"{rule.__name__} never runs block 'layer1' as a whole.* set compile=null"):
        _trained(rule(), net, epochs=1, compile="blocks", compile_backend="eager")


def test_movement_needs_hooks_inside() -> None:
    with pytest.raises(ValueError, match="LocalHeads never runs block 'first' as a whole"):
        _trained(LocalHeads(head="conv1", movement=0.1), _net(), epochs=1, compile="blocks", compile_backend="eager")


class _Asking(nn.Module):
    """What it does depends on numbers, which one graph cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + 1 if x.sum().item() > 0 else x)


def test_what_cannot_be_compiled_is_named() -> None:
    net = Blocks({"plain": nn.Linear(4, 4), "asking": _Asking()})
    Execution(compile="blocks", backend="eager").prepare(net, net)
    with pytest.raises(ValueError, match=r"^block 'asking' cannot be compiled as a whole: .*; set compile=null"):
        net(torch.ones(2, 4))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # a mistake in what is given tells of itself
        net(torch.ones(2, 3))


def test_a_missing_compiler_is_told() -> None:
    def refuse(*given: Any) -> None:
        raise torch._dynamo.exc.TorchDynamoException(
            "InvalidCxxCompiler: No working C++ compiler found in g++\nTORCHDYNAMO_VERBOSE=1"
        )

    net, execution = Blocks({"layer": nn.Linear(4, 4)}), Execution(compile="blocks")
    execution._compiled["layer"] = refuse
    execution.prepare(net, net)
    with pytest.raises(
        ValueError, match=r"^block 'layer' cannot be compiled as a whole: .* found in g\+\+ \(install one: g\+\+.*"
    ):
        net(torch.ones(2, 4))


@pytest.mark.parametrize("rule", [Backprop, MonoForward, partial(FeedbackAlignment, mode="brsf")])
def test_channels_last_is_seen_by_every_block_and_changes_rounding_alone(rule: Callable[[], Algorithm]) -> None:
    plain, seen = _trained(rule(), _net()), list[bool]()
    net = _net()
    for block in net:
        block.register_forward_hook(lambda module, given, made: seen.append(_last(given[0]) and _last(made)))
    last = _trained(rule(), net, channels_last=True)
    assert seen.count(True) >= 20  # training and validation; the rest are dry runs at the start
    assert not any(seen[:2])
    assert all(seen[-20:])
    assert all(_last(p) for p in last.parameters() if p.ndim == 4)
    assert _furthest(last, plain) < 1e-4


def _last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


class _Viewing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1)


def test_where_channels_last_means_nothing_it_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="channels_last is how convolutions work faster, and this network has none"):
        _trained(Backprop(), mlp((3, 6, 6), 4, (5,)), channels_last=True)
    with pytest.raises(ValueError, match=r"this task's inputs have shape \(2, 5\): leave it out"):
        Execution(channels_last=True).check(mlp((5,), 4, (5,)), torch.zeros(2, 5))
    net = _net()
    viewing = Blocks(dict(net.members), nn.Sequential(_Viewing(), nn.Linear(54, 4)))
    with pytest.raises(ValueError, match=r"calls view\(\) on a map.*flatten\(\) or reshape\(\)"):
        _trained(Backprop(), viewing, channels_last=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"channels_last": 1}, "channels_last is 1, expected true or false"),
        ({"compile": "all"}, "compile is 'all', expected 'blocks'"),
        ({"compile": True}, "compile is True, expected 'blocks'"),
        ({"compile": "blocks", "backend": "foo"}, "compile_backend is 'foo', expected one of .*inductor"),
        ({"backend": "eager"}, "compile_backend is 'eager', but nothing is compiled"),
    ],
)
def test_what_is_given_wrongly_is_told(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Execution(**given)


def _localized(**execution: Any) -> ll.Local:
    torch.manual_seed(0)
    layers: Sequence[nn.Module] = [nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(True), nn.Conv2d(5, 4, 3), nn.ReLU(True)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 4))
    return ll.localize(net, ll.MonoForward(), cuts=["1"], example=IMAGES[0], optimizer=SGD, **execution)


def test_localize_takes_both_and_copies_go_on() -> None:
    plain = _localized()
    fast = _localized(channels_last=True, compile="blocks", compile_backend="eager")
    twin = copy.deepcopy(fast)
    for images, labels in zip(IMAGES, LABELS, strict=True):
        plain.step(images, labels)
        fast.step(images, labels)
        twin.step(images, labels)
    assert _furthest(fast.net, plain.net) < 1e-5
    assert _furthest(twin.net, plain.net) < 1e-5
    assert all(block._compiled_call_impl.ran for block in (*fast.blocks, *twin.blocks))  # type: ignore[union-attr]
    assert torch.allclose(fast.predict(IMAGES[0]), plain.net(IMAGES[0]), atol=1e-5)
    read = pickle.loads(pickle.dumps(fast))  # compiled anew where it is read
    for local in (read, plain):
        local.step(IMAGES[0], LABELS[0])
    assert _furthest(read.net, plain.net) < 1e-5
    assert all(block._compiled_call_impl.ran for block in read.blocks)
    watched = _localized(compile="blocks", compile_backend="eager")
    watched.net[0].register_forward_hook(lambda module, given, made: None)  # type: ignore[index]
    with pytest.raises(ValueError, match="MonoForward never runs block '1' as a whole"):
        watched.step(IMAGES[0], LABELS[0])


def test_an_attached_rule_needs_no_more_than_prepare() -> None:
    """In a loop of one's own."""
    plain, rule = MonoForward(), MonoForward()
    for one in (plain, rule):
        one.attach(_net(), TaskInfo(Batch(IMAGES[0][:2], LABELS[0][:2]), 4, F.cross_entropy))
    Execution(compile="blocks", backend="eager").prepare(rule, rule.blocks)
    for one in (plain, rule):
        for update in one.updates(BATCHES[0]):
            update.backward()
    assert all(block._compiled_call_impl.ran for block in rule.blocks)  # type: ignore[union-attr]
    for mine, theirs in zip(rule.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-5)
