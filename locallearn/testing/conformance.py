"""The conformance suite: what every learning rule must show, whoever wrote it.

A rule joins by filling one fixture::

    class TestMyRule(AlgorithmConformance):
        @pytest.fixture
        def make_algorithm(self):
            return lambda: MyRule(seed=0)

The network, the task and the batches are fixtures too, to be overridden by rules that cannot train an MLP on class
labels. Networks must draw nothing at random in their forward pass.
"""

from __future__ import annotations

import copy
import io
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from locallearn.algorithms.base import Algorithm, Locality, TaskInfo
from locallearn.audit import audit
from locallearn.batch import Batch
from locallearn.cost import activation_bytes, to_device
from locallearn.nets.blocks import Blocks
from locallearn.nets.feedforward import mlp
from locallearn.testing.loop import plain_loop

_WIDTH, _CLASSES, _SAMPLES = 32, 4, 24

_adam = partial(torch.optim.Adam, lr=1e-2)
_sgd = partial(torch.optim.SGD, lr=0.1)


class AlgorithmConformance:
    """Tests to inherit; fill ``make_algorithm``, and override the other fixtures where the defaults do not fit."""

    @pytest.fixture
    def make_algorithm(self) -> Callable[[], Algorithm]:
        """Make the rule under test, not attached to a network; every call with the same seed."""
        raise NotImplementedError(f"{type(self).__name__} must fill the fixture make_algorithm")

    @pytest.fixture
    def make_net(self) -> Callable[[int], Blocks]:
        """Make a network of so many equal blocks, as wide as its input."""
        return lambda depth: mlp((_WIDTH,), _CLASSES, (_WIDTH,) * depth)

    @pytest.fixture
    def task(self, batches: list[Batch]) -> TaskInfo:
        """What the algorithm is told of the problem."""
        return TaskInfo(batches[0]._replace(inputs=batches[0].inputs[:2]), _CLASSES, F.cross_entropy)

    @pytest.fixture
    def batches(self) -> list[Batch]:
        """Six training batches on the CPU."""
        draw = torch.Generator().manual_seed(0)
        centres = torch.randn(_CLASSES, _WIDTH, generator=draw)
        result = []
        for i in range(6):
            labels = torch.randint(_CLASSES, (_SAMPLES,), generator=draw)
            inputs = centres[labels] + 0.5 * torch.randn(_SAMPLES, _WIDTH, generator=draw)
            result.append(Batch(inputs, labels, index=torch.arange(_SAMPLES) + i * _SAMPLES))
        return result

    @pytest.fixture
    def attached(
        self, make_algorithm: Callable[[], Algorithm], make_net: Callable[[int], Blocks], task: TaskInfo
    ) -> Callable[..., Algorithm]:
        """Make the rule and attach it to a fresh network: ``attached(depth=3, net_seed=0)``."""

        def make(depth: int = 3, net_seed: int = 0) -> Algorithm:
            with torch.random.fork_rng():
                torch.manual_seed(net_seed)
                net = make_net(depth)
            algorithm = make_algorithm()
            algorithm.attach(net, task)
            return algorithm

        return make

    # -- locality and memory ------------------------------------------------------------------------------------------
    def test_audit_confirms_the_claim(self, attached: Callable[..., Algorithm], batches: list[Batch]) -> None:
        """What the algorithm says about locality is what is seen."""
        result = audit(attached(), batches[:2], batches=5, warmup=7)
        assert result.confirmed, result.reason

    def test_no_graph_is_left_alive(self, attached: Callable[..., Algorithm], batches: list[Batch]) -> None:
        """Saved tensors go with a unit's backward pass, outputs with the next unit; nothing outlives the batch."""
        algorithm = attached()
        layer_local = algorithm.locality in (Locality.LAYER_LOCAL, Locality.COUPLED)
        outputs: list[weakref.ref[Tensor]] = []

        def note(module: torch.nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                outputs.append(weakref.ref(output))

        def none_before(module: torch.nn.Module, args: Any) -> None:
            if layer_local:
                assert not [output for output in outputs if output() is not None], "an output outlives its unit"

        for block in algorithm.blocks:
            block.register_forward_pre_hook(none_before)
            block.register_forward_hook(note)
        with activation_bytes(algorithm) as count:
            for update in algorithm.updates(batches[0]):
                update.backward()
                assert count.current == 0, f"bytes held after the backward pass of {update.unit!r}"
                algorithm.zero_grad(set_to_none=True)
        assert not [output for output in outputs if output() is not None], "block outputs that outlive their batch"

    def test_peak_memory_of_blocks_does_not_grow_with_depth(
        self, attached: Callable[..., Algorithm], batches: list[Batch]
    ) -> None:
        """16 blocks need no more for gradients than 4; units beside the blocks (a readout of all) are left out."""
        if attached().locality not in (Locality.LAYER_LOCAL, Locality.COUPLED):
            pytest.skip("only a layer-local rule promises memory independent of depth")
        if not attached().units():
            pytest.skip("a rule without units (closed form) keeps nothing for gradients")
        peaks = [_peak_of_blocks(attached(depth=depth), batches[0]) for depth in (4, 16)]
        assert 0 < peaks[1] <= 1.05 * peaks[0]

    # -- units --------------------------------------------------------------------------------------------------------
    def test_units_are_disjoint_and_all_learn(self, attached: Callable[..., Algorithm], batches: list[Batch]) -> None:
        """No weight belongs to two units, every unit yields updates under its own name, and its weights move."""
        algorithm = attached()
        owned = [id(p) for unit in algorithm.units() for p in _parameters(algorithm, unit)]
        assert len(owned) == len(set(owned)), "a weight is in two units or twice in one"
        assert set(owned) <= {id(p) for p in algorithm.parameters()}, "a unit trains what checkpoints do not hold"
        before = {id(p): p.detach().clone() for p in algorithm.parameters()}
        named = {update.unit for update in algorithm.updates(batches[0])}
        assert named == set(algorithm.units())
        plain_loop(algorithm, batches, _sgd)
        for unit in algorithm.units():
            still = [p for p in _parameters(algorithm, unit) if torch.equal(p, before[id(p)])]
            assert not still, f"{len(still)} weights of unit {unit!r} did not move in {len(batches)} steps"

    def test_a_step_touches_its_own_unit_only(self, attached: Callable[..., Algorithm], batches: list[Batch]) -> None:
        """After the backward pass of one unit no other weight has a gradient, after its step no other has moved."""
        algorithm = attached()
        optimizers = {unit: _sgd(groups) for unit, groups in algorithm.units().items()}
        for update in algorithm.updates(batches[0]):
            own = {id(p) for p in _parameters(algorithm, update.unit)}
            others = {name: p for name, p in algorithm.named_parameters() if id(p) not in own}
            before = {name: p.detach().clone() for name, p in others.items()}
            update.backward()
            assert not [name for name, p in others.items() if p.grad is not None], f"gradients from {update.unit!r}"
            optimizers[update.unit].step()
            assert not [name for name, p in others.items() if not torch.equal(p, before[name])]
            optimizers[update.unit].zero_grad()

    @pytest.mark.parametrize("part", ["first", "last", "readout"])
    def test_a_frozen_part_stays_and_the_others_learn(
        self, attached: Callable[..., Algorithm], batches: list[Batch], part: str
    ) -> None:
        """``requires_grad_(False)`` on a block or on the readout keeps it as it is; the network's other weights move."""
        algorithm = attached()
        blocks = algorithm.blocks
        frozen = {"first": blocks[0], "last": blocks[len(blocks) - 1], "readout": blocks.readout}[part]
        if frozen is None:
            pytest.skip("this network has no readout")
        frozen.requires_grad_(False)
        before = {id(p): p.detach().clone() for p in blocks.parameters()}
        plain_loop(algorithm, batches, _sgd)
        still = {id(p) for p in frozen.parameters()}
        for unit in algorithm.units():
            for p in _parameters(algorithm, unit):
                if id(p) in before:  # what the rule added to a frozen part may have nothing to learn
                    assert torch.equal(p, before[id(p)]) is (id(p) in still), f"a weight of unit {unit!r}"

    @pytest.mark.parametrize("part", ["first", "last", "readout"])
    def test_a_frozen_part_rests(self, attached: Callable[..., Algorithm], batches: list[Batch], part: str) -> None:
        """Buffers that every training pass would move stay bit-equal in a frozen part, and move again in a thawed one.

        In a block that no unit trains (random features) they stay anyway.
        """
        algorithm = attached()
        blocks = algorithm.blocks
        frozen = {"first": blocks[0], "last": blocks[len(blocks) - 1], "readout": blocks.readout}[part]
        if frozen is None:
            pytest.skip("this network has no readout")
        learns = {id(p) for unit in algorithm.units() for p in _parameters(algorithm, unit)}
        never = part != "readout" and not learns & {id(p) for p in frozen.parameters()}

        def count(module: torch.nn.Module, args: Any) -> None:
            if module.training:
                module.get_buffer("passes").add_(1)

        for module in blocks.modules():  # what normalisations do, in networks that have none, too
            module.register_buffer("passes", torch.zeros((), dtype=torch.int64))
            module.register_forward_pre_hook(count)
        inside = [module for module in frozen.modules() if module is not frozen or not list(frozen.children())]
        algorithm.train()
        plain_loop(algorithm, batches[:1], _sgd)
        seen = [int(module.get_buffer("passes")) for module in inside]
        if never:
            assert not any(seen), "a part that no unit trains is never in training mode"
            return
        for learn, train in ((False, False), (False, True), (True, False)):
            frozen.requires_grad_(learn)  # seen by the next updates, whether or not train() is called
            if train:
                algorithm.train()
            for update in algorithm.updates(batches[1]):
                update.backward()
                algorithm.zero_grad()
            now = [int(module.get_buffer("passes")) for module in inside]
            assert learn or now == seen
        assert any(seen) or part == "readout", "no layer of the part was run"
        assert all(after > before for after, before in zip(now, seen, strict=True) if before)
        assert all(module.training for module in inside)

    def test_stages_cover_the_units(self, attached: Callable[..., Algorithm], batches: list[Batch]) -> None:
        """A sequential schedule reaches every unit once, and a stage trains nothing else."""
        algorithm = attached()
        try:
            stages = algorithm.stages
        except ValueError as refusal:
            pytest.skip(str(refusal))
        assert [unit for stage in stages for unit in stage] == list(algorithm.units())
        for stage in stages:
            algorithm.train_only(frozenset(stage))
            named = [update.unit for update in algorithm.updates(batches[0])]
            assert list(dict.fromkeys(named)) == stage  # a unit may take several steps in a row

    # -- randomness ---------------------------------------------------------------------------------------------------
    def test_the_same_seed_gives_the_same_weights(
        self, attached: Callable[..., Algorithm], batches: list[Batch]
    ) -> None:
        """Two runs agree bit for bit."""
        first, second = attached(), attached()
        for algorithm in (first, second):
            plain_loop(algorithm, batches, _adam)
        assert _equal(first, second)

    def test_the_global_generator_is_neither_read_nor_moved(
        self, attached: Callable[..., Algorithm], batches: list[Batch]
    ) -> None:
        """The data loader's draws change no weight, and the algorithm's draws change no data order."""
        undisturbed, disturbed = attached(), attached()
        state = torch.get_rng_state()
        plain_loop(undisturbed, batches, _sgd)
        undisturbed.predict(batches[0].inputs, *batches[0].context)
        assert torch.equal(torch.get_rng_state(), state), "the algorithm drew from the global generator"
        optimizers: dict[str, Any] | None = None
        for batch in batches:
            torch.rand(7)
            optimizers = {
                unit: o.state_dict() for unit, o in plain_loop(disturbed, [batch], _sgd, states=optimizers).items()
            }
        assert _equal(undisturbed, disturbed)

    def test_attaching_leaves_the_global_generator_alone(
        self, make_algorithm: Callable[[], Algorithm], make_net: Callable[[int], Blocks], task: TaskInfo
    ) -> None:
        """What the rule adds is drawn from its own seed, whatever was drawn before."""
        net = make_net(3)
        other = copy.deepcopy(net)
        first, second = make_algorithm(), make_algorithm()
        state = torch.get_rng_state()
        first.attach(net, task)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(7)
        second.attach(other, task)
        assert _equal(first, second)

    # -- copies and checkpoints ---------------------------------------------------------------------------------------
    def test_resuming_is_exact(self, attached: Callable[..., Algorithm], batches: list[Batch]) -> None:
        """Saved after half of the steps and loaded into another network: the same weights in the end."""
        whole, half, resumed = attached(), attached(), attached(net_seed=1)
        plain_loop(whole, batches, _adam)
        optimizers = plain_loop(half, batches[:3], _adam)
        file = io.BytesIO()
        torch.save(
            {"algorithm": half.state_dict(), "optimizers": {unit: o.state_dict() for unit, o in optimizers.items()}},
            file,
        )
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        resumed.load_state_dict(saved["algorithm"])
        plain_loop(resumed, batches[3:], _adam, states=saved["optimizers"])
        assert _equal(whole, resumed)

    def test_a_deep_copy_goes_on_alone(self, attached: Callable[..., Algorithm], batches: list[Batch]) -> None:
        """A copy learns what the original learns, and neither sees the other."""
        algorithm = attached()
        plain_loop(algorithm, batches[:2], _sgd)
        algorithm.predict(batches[0].inputs, *batches[0].context)  # what prediction leaves behind can be copied, too
        twin = copy.deepcopy(algorithm)
        before = _state(algorithm)
        plain_loop(twin, batches[2:], _sgd)
        after = _state(algorithm)
        assert all(torch.equal(before[name], after[name]) for name in before)
        plain_loop(algorithm, batches[2:], _sgd)
        assert _equal(algorithm, twin)

    # -- dtypes and devices -------------------------------------------------------------------------------------------
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
    def test_learns_in_another_dtype(
        self, attached: Callable[..., Algorithm], batches: list[Batch], dtype: torch.dtype
    ) -> None:
        """``algorithm.to(dtype)`` moves all of it; a step gives finite weights of that dtype."""
        algorithm = attached().to(dtype)
        first = batches[0]
        targets = first.targets.to(dtype) if first.targets.is_floating_point() else first.targets
        batch = first._replace(inputs=first.inputs.to(dtype), targets=targets)
        try:
            plain_loop(algorithm, [batch], _sgd)
        except ValueError as refusal:  # in one sentence, that names what it cannot learn in
            if str(dtype) not in str(refusal):
                raise
            pytest.skip(str(refusal))
        assert all(p.dtype is dtype and bool(p.isfinite().all()) for p in algorithm.parameters())
        assert bool(algorithm.predict(batch.inputs, *batch.context).isfinite().all())

    def test_what_is_added_has_the_dtype_of_the_network(
        self,
        make_algorithm: Callable[[], Algorithm],
        make_net: Callable[[int], Blocks],
        batches: list[Batch],
        task: TaskInfo,
    ) -> None:
        """Attached to a network of float64, a rule trains it as it is: nobody has to convert what was added."""
        algorithm, net, first = make_algorithm(), make_net(3).double(), batches[0]
        algorithm.attach(net, task)
        targets = first.targets.double() if first.targets.is_floating_point() else first.targets
        batch = first._replace(inputs=first.inputs.double(), targets=targets)
        plain_loop(algorithm, [batch], _sgd)
        assert all(p.dtype is torch.float64 and bool(p.isfinite().all()) for p in algorithm.parameters())
        assert algorithm.predict(batch.inputs, *batch.context).dtype is torch.float64

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
    def test_learns_on_the_gpu(self, attached: Callable[..., Algorithm], batches: list[Batch]) -> None:
        """``algorithm.to("cuda")`` moves all of it; a step gives finite weights there."""
        algorithm = attached().to("cuda")
        batch = to_device(batches[0], "cuda")
        plain_loop(algorithm, [batch], _sgd)
        assert all(p.is_cuda and bool(p.isfinite().all()) for p in algorithm.parameters())
        assert algorithm.predict(batch.inputs, *batch.context).is_cuda

    # -- prediction and attachment ------------------------------------------------------------------------------------
    def test_predict_gives_finite_scores_and_changes_nothing(
        self, attached: Callable[..., Algorithm], batches: list[Batch], task: TaskInfo
    ) -> None:
        """Outputs ``(N, outputs)``, or of that many entries; weights, buffers, gradients and modes are as before."""
        algorithm = attached()
        plain_loop(algorithm, batches[:2], _sgd)
        algorithm.eval()
        before = _state(algorithm)
        with torch.no_grad():
            scores = algorithm.predict(batches[0].inputs, *batches[0].context)
        assert scores.flatten(1).shape == (len(batches[0].inputs), task.outputs)
        assert bool(scores.isfinite().all())
        after = _state(algorithm)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert all(p.grad is None for p in algorithm.parameters())
        assert not any(module.training for module in algorithm.modules())

    def test_a_second_network_is_refused(
        self, attached: Callable[..., Algorithm], make_net: Callable[[int], Blocks], task: TaskInfo
    ) -> None:
        """One algorithm, one network."""
        with pytest.raises(ValueError, match="attached"):
            attached().attach(make_net(3), task)


def _parameters(algorithm: Algorithm, unit: str) -> list[torch.nn.Parameter]:
    return [p for group in algorithm.units()[unit] for p in group["params"]]


def _peak_of_blocks(algorithm: Algorithm, batch: Batch) -> int:
    """Peak bytes kept alive for gradients until the last block's backward pass, without extra units."""
    peak = 0
    batch = batch._replace(inputs=batch.inputs.clone())
    with activation_bytes(algorithm) as count:
        for update in algorithm.updates(batch):
            count.look()
            update.backward()
            algorithm.zero_grad(set_to_none=True)
            if update.unit in algorithm.blocks.names:
                peak = count.peak
            count.peak = max(peak, count.current)
    return peak


def _state(algorithm: Algorithm) -> dict[str, Tensor]:
    """Weights, buffers and the states of the algorithm's generators, copied."""
    state: dict[str, Tensor] = {}
    for name, value in algorithm.state_dict().items():
        parts = {name: value} if isinstance(value, Tensor) else {f"{name}/{key}": part for key, part in value.items()}
        state |= {key: part.detach().clone() for key, part in parts.items()}
    return state


def _equal(one: Algorithm, other: Algorithm) -> bool:
    mine, theirs = _state(one), _state(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
