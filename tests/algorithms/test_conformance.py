"""Every rule that comes along passes the suite that users run on theirs: one line per rule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms import (
    MAN,
    Algorithm,
    Backprop,
    BackpropForwardForward,
    BackpropL1,
    CaFo,
    CounterCurrent,
    DeepSupervision,
    FeedbackAlignment,
    ForwardForward,
    ForwardGNN,
    ForwardGradient,
    ForwardProjection,
    LayerCollaboration,
    LocalHeads,
    MonoForward,
    Pepita,
    PhysicalFF,
    ProductFeedbackAlignment,
    Ridge,
    ScalableForwardForward,
    TaskInfo,
    ZerothOrder,
)
from locallearn.audit import audit
from locallearn.batch import Batch
from locallearn.nets import Blocks, gnn, mlp, physical
from locallearn.nets.devices import Simulation
from locallearn.testing import AlgorithmConformance, plain_loop

ALGORITHMS: dict[str, Callable[[], Algorithm]] = {
    "backprop": Backprop,
    "backprop_l1": partial(BackpropL1, penalty=1e-2),
    "bp_ff": BackpropForwardForward,
    "bp_ff-norm": partial(BackpropForwardForward, goodness="norm", threshold=3.0, normalise="unit", inference="vote"),
    "backprop-accumulate": partial(Backprop, accumulate=3),
    "backprop-checkpoint": partial(Backprop, checkpoint="auto"),
    "backprop-keep": partial(Backprop, keep=0.5),
    "deep_supervision": DeepSupervision,
    "local_heads-keep": partial(LocalHeads, keep=0.5),
    "local_heads-keep-random": partial(LocalHeads, keep=0.5, keep_by="random"),
    "local_heads-sim": partial(LocalHeads, loss="sim"),
    "local_heads-predsim": partial(LocalHeads, loss="predsim", beta=0.9),
    "local_heads-smoothing": partial(LocalHeads, smoothing=0.1),
    "mono_forward": MonoForward,
    "mono_forward-ff": partial(MonoForward, prediction="ff"),
    "forward_forward": ForwardForward,
    "forward_forward-hard": partial(ForwardForward, negatives="hard"),
    "forward_forward-softmax": partial(ForwardForward, inference="softmax"),
    "forward_forward-peer": partial(ForwardForward, peer=0.03),
    "forward_forward-minimise": partial(ForwardForward, minimise=True),
    **{
        f"cafo-{blocks}-{predictor}": partial(CaFo, blocks=blocks, predictor=predictor)
        for blocks in ("random", "dfa")
        for predictor in ("mse", "ce", "sparsemax")
    },
    "forward_forward-symba": partial(ForwardForward, loss="symba", inference="last"),
    "forward_forward-channelwise": partial(ForwardForward, loss="channelwise"),
    "forward_forward-channelwise-softmax": partial(ForwardForward, loss="channelwise", inference="softmax"),
    "forward_forward-norm": partial(ForwardForward, goodness="norm", threshold=3.0, normalise="unit", inference="vote"),
    "forward_forward-recurrent": partial(ForwardForward, recurrent=4),
    "layer_collaboration": LayerCollaboration,
    "layer_collaboration-previous": partial(LayerCollaboration, gamma="previous", threshold="midpoint"),
    "layer_collaboration-gauss_seidel": partial(LayerCollaboration, order="gauss_seidel"),
    "counter_current": CounterCurrent,
    "counter_current-clip": partial(CounterCurrent, clip=1.0, centralise=True, warmup_steps=4),
    "counter_current-frozen": partial(CounterCurrent, feedback_lr=0.0),
    "counter_current-cnn": partial(CounterCurrent, loss="cnn"),
    "counter_current-flooding": partial(CounterCurrent, flooding=0.9, target="identity"),
    "forward_gradient": ForwardGradient,
    "forward_gradient-projection": partial(
        ForwardGradient, noise="rademacher", tangents=3, combine="projection", chunk=2
    ),
    "forward_gradient-activities": partial(ForwardGradient, perturb="activities", tangents=2),
    "forward_projection": ForwardProjection,
    "forward_projection-noisy_label": partial(ForwardProjection, target="noisy_label"),
    "ridge": Ridge,
    "ridge-rows": partial(Ridge, lambda_=1.0, form="rows"),
    "forward_gradient-local": partial(ForwardGradient, losses="local", tangents=2),
    "forward_gradient-local-activities": partial(ForwardGradient, losses="local", perturb="activities", groups=2),
    "forward_gradient-guess-random": partial(ForwardGradient, guess="random", chunk=1),
    "forward_gradient-guess-ntk": partial(ForwardGradient, perturb="activities", guess="ntk", target="next"),
    "pepita": Pepita,
    "pepita-hebbian": partial(Pepita, variant="hebbian", normalise=True),
    "pepita-time_local": partial(Pepita, variant="time_local"),
    "pepita-mirror": partial(Pepita, mirror_steps=2, mirror_every=2),
    "physical_ff": partial(PhysicalFF, inner_steps=1),
    "physical_ff-ffzero": partial(PhysicalFF, protocol="ffzero"),
    **{
        f"feedback_alignment-{mode}": partial(FeedbackAlignment, mode=mode)
        for mode in ("fa", "dfa", "usf", "brsf", "frsf", "weight_mirror", "kolen_pollack")
    },
    "product_feedback_alignment": partial(ProductFeedbackAlignment, expansion=3),
    "product_feedback_alignment-orthogonal": partial(ProductFeedbackAlignment, orthogonal=True),
    "zeroth_order": partial(ZerothOrder, n=2),
    "zeroth_order-mezo": partial(ZerothOrder, variant="mezo"),
    "zeroth_order-eggroll": partial(ZerothOrder, variant="eggroll", n=4, rank=2),
    "zeroth_order-local": partial(ZerothOrder, losses="local", normalise="scalar_ema", curvature_exponent=0.1),
}


class TestConformance(AlgorithmConformance):
    @pytest.fixture(params=ALGORITHMS)
    def make_algorithm(self, request: pytest.FixtureRequest) -> Callable[[], Algorithm]:
        return ALGORITHMS[request.param]


# Rules that read maps.
ON_MAPS: dict[str, Callable[[], Algorithm]] = {
    "deep_supervision-predsim": partial(DeepSupervision, head="conv1", loss="predsim", beta=0.5),
    "local_heads-conv1": partial(LocalHeads, head="conv1", width=0.5, movement=0.1),
    "local_heads-predsim": partial(LocalHeads, head="conv1", loss="predsim", beta=0.5, similarity_side=2),
    "local_heads-dgl": partial(LocalHeads, head="dgl"),
    "local_heads-auglocal": partial(LocalHeads, head="auglocal", depth=1),
    "man": partial(MAN, width=0.125),
    "man-alone": partial(MAN, averaged=False, head="conv1"),
    "scalable_ff": ScalableForwardForward,
    "scalable_ff-last": partial(ScalableForwardForward, kernel_size=3, margin=1.0, temperature=2.0, prediction="last"),
}


class _Residual(nn.Module):
    """Without normalisation, whose statistics move with every pass; a residual unit that has to say so itself."""

    residual_branches = ("conv",)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.conv(x)).relu()


class TestConformanceOnMaps(AlgorithmConformance):
    @pytest.fixture(params=ON_MAPS)
    def make_algorithm(self, request: pytest.FixtureRequest) -> Callable[[], Algorithm]:
        return ON_MAPS[request.param]

    @pytest.fixture
    def make_net(self) -> Callable[[int], Blocks]:
        def make(depth: int) -> Blocks:
            blocks: dict[str, nn.Module] = {f"unit{i}": _Residual() for i in range(depth)}
            return Blocks(blocks, nn.Sequential(nn.Flatten(), nn.Linear(48, 4)))

        return make

    @pytest.fixture
    def batches(self) -> list[Batch]:
        draw = torch.Generator().manual_seed(0)
        centres = torch.randn(4, 3, 4, 4, generator=draw)
        result = []
        for i in range(6):
            labels = torch.arange(16) % 4
            images = centres[labels] + 0.5 * torch.randn(16, 3, 4, 4, generator=draw)
            result.append(Batch(images, labels, index=torch.arange(16) + i * 16))
        return result

    def test_units_are_disjoint_and_all_learn(self, attached: Callable[..., Algorithm], batches: list[Batch]) -> None:
        """But for biases in heads: in front of a BatchNorm, where the official codes have some, they do nothing."""
        algorithm = attached()
        owned = [id(p) for groups in algorithm.units().values() for group in groups for p in group["params"]]
        assert len(owned) == len(set(owned))
        before = {name: p.detach().clone() for name, p in algorithm.named_parameters() if id(p) in owned}
        assert {update.unit for update in algorithm.updates(batches[0])} == set(algorithm.units())
        plain_loop(algorithm, batches, partial(torch.optim.SGD, lr=0.1))
        still = [name for name, p in algorithm.named_parameters() if name in before and torch.equal(p, before[name])]
        assert all(name.startswith("heads.") and name.endswith(".bias") for name in still)


class TestConformanceOfInfoPro(TestConformanceOnMaps):
    @pytest.fixture(params=[False, True], ids=["classes", "contrast"])
    def make_algorithm(self, request: pytest.FixtureRequest) -> Callable[[], Algorithm]:
        ends: dict[str, tuple[float, float]] = {} if request.param else {"classification": (1.0, 1.0)}
        return lambda: LocalHeads(head="1c2f", loss="infopro", contrast=request.param, **ends)


class TestConformanceWithADevice(AlgorithmConformance):
    """A device with everything that changes from call to call, which copies and checkpoints have to know."""

    @pytest.fixture
    def make_algorithm(self) -> Callable[[], Algorithm]:
        return partial(PhysicalFF, inner_steps=2)

    @pytest.fixture
    def make_net(self) -> Callable[[int], Blocks]:
        device = Simulation(noise=0.05, drift=0.02, output_bits=8, dropped=0.1, options={"gain": 4.0})
        return lambda depth: physical((32,), 4, (32,) * depth, device=device)

    def test_audit_confirms_the_claim(self, attached: Callable[..., Algorithm], batches: list[Batch]) -> None:
        result = audit(attached(depth=2), batches[:2], batches=2, warmup=1)
        assert result.confirmed, result.reason

    def test_the_global_generator_is_neither_read_nor_moved(
        self, attached: Callable[..., Algorithm], batches: list[Batch]
    ) -> None:
        """The device has a generator of its own, which a prediction moves on, too."""
        algorithm = attached()
        state = torch.get_rng_state()
        plain_loop(algorithm, batches, partial(torch.optim.SGD, lr=0.1))
        algorithm.predict(batches[0].inputs)
        assert torch.equal(torch.get_rng_state(), state)

    def test_predict_gives_finite_scores_and_changes_nothing(  # type: ignore[override]
        self, attached: Callable[..., Algorithm], batches: list[Batch]
    ) -> None:
        """Weights stay; a device that is asked counts, draws and drifts."""
        algorithm = attached()
        before = copy.deepcopy(list(algorithm.parameters()))
        scores = algorithm.predict(batches[0].inputs)
        assert scores.shape == (24, 4)
        assert scores.isfinite().all()
        assert all(torch.equal(p, old) for p, old in zip(algorithm.parameters(), before, strict=True))


NODES, WIDTH, CLASSES = 40, 32, 4
# Of every rule that runs on graphs: how it is made, and the convolution it is tried with.
ON_GRAPHS: dict[str, tuple[Callable[[], Algorithm], str]] = {
    "mono_forward": (MonoForward, "SAGEConv"),
    "deep_supervision": (DeepSupervision, "GCNConv"),
    **{
        f"forward_gnn-{variant}-{conv}": (partial(ForwardGNN, variant=variant), conv)
        for variant, conv in [
            ("sf", "GCNConv"),
            ("sf", "GATConv"),
            ("sf", "GINConv"),
            ("ff_la", "GCNConv"),
            ("ff_vn", "SAGEConv"),
            ("sf_top_to_loss", "GCNConv"),
            ("sf_top_to_input", "SAGEConv"),
            ("ce", "GCNConv"),
            ("ff", "SAGEConv"),
            ("ce_top_to_input", "GCNConv"),
        ]
    },
}


class TestConformanceOnGraphs(AlgorithmConformance):
    @pytest.fixture(params=ON_GRAPHS)
    def chosen(self, request: pytest.FixtureRequest) -> tuple[Callable[[], Algorithm], str]:
        return ON_GRAPHS[request.param]

    @pytest.fixture
    def make_algorithm(self, chosen: tuple[Callable[[], Algorithm], str]) -> Callable[[], Algorithm]:
        return chosen[0]

    @pytest.fixture
    def links(self, make_algorithm: Callable[[], Algorithm]) -> bool:
        return make_algorithm().variant in ("ce", "ff", "ce_top_to_input")

    @pytest.fixture
    def make_net(self, chosen: tuple[Callable[[], Algorithm], str]) -> Callable[[int], Blocks]:
        make, conv = chosen
        readout = None if isinstance(make(), ForwardGNN) else "conv"
        return lambda depth: gnn((WIDTH,), CLASSES, conv, (WIDTH,) * depth, readout=readout, **make().net_settings)

    @pytest.fixture
    def batches(self, links: bool) -> list[Batch]:
        draw = torch.Generator().manual_seed(0)
        ends = torch.randint(NODES, (2, 90), generator=draw)
        ends = ends[:, ends[0] != ends[1]]
        edges = torch.cat((ends, ends.flip(0)), 1)
        labels = torch.arange(NODES) % CLASSES
        inputs = torch.randn(CLASSES, WIDTH, generator=draw)[labels] + 0.5 * torch.randn(NODES, WIDTH, generator=draw)
        if not links:
            return [Batch(inputs, labels, (edges,), rows=torch.arange(NODES) < 24)] * 6
        pairs = torch.cat((edges[:, :40], torch.randint(NODES, (2, 40), generator=draw)), 1)
        return [Batch(inputs, (torch.arange(80) < 40).float(), (edges,), rows=pairs)] * 6

    @pytest.fixture
    def task(self, batches: list[Batch], links: bool) -> TaskInfo:
        if links:  # inference gives the outputs of all three blocks side by side
            return TaskInfo(batches[0], 3 * WIDTH, F.binary_cross_entropy_with_logits, classes=False)
        return TaskInfo(batches[0], CLASSES, F.cross_entropy)


class TestConformanceOnImages(AlgorithmConformance):
    """Hybrids are mixed from images."""

    @pytest.fixture(params=["logistic", "symba"])
    def make_algorithm(self, request: pytest.FixtureRequest) -> Callable[[], Algorithm]:
        return partial(ForwardForward, negatives="hybrid", loss=request.param)

    @pytest.fixture
    def make_net(self) -> Callable[[int], Blocks]:
        return lambda depth: mlp((2, 4, 4), CLASSES, (WIDTH,) * depth)

    @pytest.fixture
    def batches(self) -> list[Batch]:
        draw = torch.Generator().manual_seed(0)
        images = [torch.rand(24, 2, 4, 4, generator=draw) for _ in range(6)]
        return [Batch(x, torch.arange(24) % CLASSES, index=torch.arange(24) + 24 * i) for i, x in enumerate(images)]


class TestConformanceOfAnAutoencoder(AlgorithmConformance):
    @pytest.fixture
    def make_algorithm(self) -> Callable[[], Algorithm]:
        return CounterCurrent

    @pytest.fixture
    def make_net(self) -> Callable[[int], Blocks]:
        def make(depth: int) -> Blocks:
            blocks = {f"block{i}": nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ELU()) for i in range(depth)}
            return Blocks(blocks, nn.Conv2d(4, 4, 3, padding=1))

        return make

    @pytest.fixture
    def batches(self) -> list[Batch]:
        draw = torch.Generator().manual_seed(0)
        images = [torch.rand(24, 4, 4, 4, generator=draw) for _ in range(6)]
        return [Batch(x, x, index=torch.arange(24) + 24 * i) for i, x in enumerate(images)]

    @pytest.fixture
    def task(self, batches: list[Batch]) -> TaskInfo:
        def loss(output: Tensor, target: Tensor) -> Tensor:
            return F.mse_loss(output, target)

        two = batches[0].inputs[:2]
        return TaskInfo(Batch(two, two), 64, loss, classes=False)
