"""ForwardGNN as an algorithm: every variant against dense matrices, and the properties of its spec."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms.base import Locality, TaskInfo
from locallearn.algorithms.forward_gnn import ForwardGNN
from locallearn.audit import audit
from locallearn.batch import Batch
from locallearn.cost import measure_update
from locallearn.functional import forward_gnn as fg
from locallearn.nets import Blocks
from locallearn.nets.graph import GraphBlock, gnn
from locallearn.testing import plain_loop

NODES, FEATURES, CLASSES, WIDTH = 14, 6, 3, 5
DRAW = torch.Generator().manual_seed(0)
_HALF = torch.randint(NODES, (2, 24), generator=DRAW)
_HALF = torch.unique(_HALF[:, _HALF[0] < _HALF[1]], dim=1)
EDGES = torch.cat((_HALF, _HALF.flip(0)), 1)
X = torch.randn(NODES, FEATURES, generator=DRAW, dtype=torch.float64)
Y = torch.arange(NODES) % CLASSES
TRAIN = torch.tensor([0, 1, 2, 4, 5, 9, 12])
PAIRS = torch.cat((_HALF[:, :6], torch.tensor([[0, 1, 2, 3, 4, 5], [7, 9, 13, 10, 8, 12]])), 1)
NODE_BATCH = Batch(X, Y, (EDGES,), rows=TRAIN)
LINK_BATCH = Batch(X, (torch.arange(12) < 6).double(), (EDGES,), rows=PAIRS)
NODE_VARIANTS = ("sf", "ff_la", "ff_vn", "sf_top_to_loss", "sf_top_to_input")
LINK_VARIANTS = ("ce", "ff", "ce_top_to_input")
TOP_DOWN = ("sf_top_to_loss", "sf_top_to_input", "ce_top_to_input")
RATE = 0.1
sgd = partial(torch.optim.SGD, lr=RATE)
adam = partial(torch.optim.Adam, lr=1e-2)


def _batch(variant: str) -> Batch:
    return LINK_BATCH if variant in LINK_VARIANTS else NODE_BATCH


def _attached(
    variant: str = "sf", depth: int = 2, conv: str = "GCNConv", batch: Batch | None = None, **options: Any
) -> ForwardGNN:
    """In double precision, on a network that is always the same."""
    algorithm = ForwardGNN(variant, **options)  # type: ignore[arg-type]
    batch = _batch(variant) if batch is None else batch
    torch.manual_seed(0)
    net = gnn((batch.inputs.shape[1],), CLASSES, conv, (WIDTH,) * depth, readout=None, **algorithm.net_settings)
    algorithm.attach(net.double(), _info(variant, batch))
    return algorithm.double()


def _info(variant: str, batch: Batch) -> TaskInfo:
    if variant in LINK_VARIANTS:
        return TaskInfo(batch, WIDTH, F.binary_cross_entropy_with_logits, classes=False)
    return TaskInfo(batch, CLASSES, F.cross_entropy)


# -- the reference: dense matrices, one graph at a time -----------------------------------------------------------------
def _adjacency(edges: Tensor, nodes: int) -> Tensor:
    a = torch.eye(nodes, dtype=torch.float64)
    for source, target in edges.T.tolist():
        a[target, source] = 1
    degree = a.sum(1)
    return a / (degree[:, None] * degree[None]).sqrt()


def _with_virtual(labels: Sequence[int], nodes: Sequence[int]) -> Tensor:
    """Normalised adjacency of the graph in which these nodes are joined to the virtual nodes of these classes."""
    new = [(n, NODES + c) for n, c in zip(nodes, labels, strict=True)]
    return _adjacency(torch.cat((EDGES, torch.tensor([*new, *[(b, a) for a, b in new]]).T), 1), NODES + CLASSES)


def _unit(x: Tensor) -> Tensor:
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-8)  # type: ignore[no-any-return]


def _gcn(block: Any, x: Tensor, adjacency: Tensor) -> Tensor:
    return F.relu(adjacency @ x @ block.conv.lin.weight.T + block.conv.bias)


def _step(block: nn.Module, loss: Tensor) -> None:
    gradients = torch.autograd.grad(loss, list(block.parameters()))
    with torch.no_grad():
        for p, gradient in zip(block.parameters(), gradients, strict=True):
            p.sub_(gradient, alpha=RATE)


def _single_forward(h: Tensor) -> Tensor:
    return F.cross_entropy(h[TRAIN] @ h[NODES:].T, Y[TRAIN])


def _loud(goods: list[Tensor]) -> Tensor:
    right, *wrong = [g[TRAIN] for g in goods]
    return F.softplus(2 - right).mean() + sum(F.softplus(g - 2).mean() for g in wrong) / len(wrong)


def _columns(labels: Sequence[int], nodes: Sequence[int]) -> Tensor:
    columns = torch.full((NODES, CLASSES), 1 / CLASSES, dtype=torch.float64)
    for node, label in zip(nodes, labels, strict=True):
        columns[node] = torch.eye(CLASSES, dtype=torch.float64)[label]
    return columns


def _shown(algorithm: ForwardGNN) -> list[list[int]]:
    return [Y[TRAIN].tolist(), *algorithm.negatives.tolist()]


def _reference_steps(algorithm: ForwardGNN, steps: int) -> Blocks:
    """The blocks after so many steps of SGD, trained on a copy."""
    variant, blocks = algorithm.variant, copy.deepcopy(algorithm.blocks)
    count = len(blocks)
    virtual = None if variant in (*LINK_VARIANTS, "ff_la") else torch.cat((X, algorithm.virtual))
    links = variant in LINK_VARIANTS
    right = (
        _adjacency(EDGES, NODES) if links or variant == "ff_la" else _with_virtual(Y[TRAIN].tolist(), TRAIN.tolist())
    )
    states = [s.clone() for s in algorithm._states()] if variant in TOP_DOWN else []
    top = (
        [] if links else [_unit(torch.cat((_columns(Y[TRAIN].tolist(), TRAIN.tolist()), torch.eye(CLASSES).double())))]
    )
    for _ in range(steps):
        x = _unit(X if virtual is None else virtual)
        if variant == "sf":
            for block in blocks:
                h = _gcn(block, x, right)
                _step(block, _single_forward(h))
                x = _unit(h.detach())
        elif variant == "ff_la":
            inputs = [_unit(torch.cat((X, _columns(shown, TRAIN.tolist())), 1)) for shown in _shown(algorithm)]
            for block in blocks:
                outputs = [_gcn(block, x, right) for x in inputs]
                _step(block, _loud([h.square().sum(1) for h in outputs]))
                inputs = [_unit(h.detach()) for h in outputs]
        elif variant == "ff_vn":
            for block in blocks:
                outputs = [_gcn(block, x, _with_virtual(shown, TRAIN.tolist())) for shown in _shown(algorithm)]
                _step(block, _loud([h.square().sum(1) for h in outputs]))
                x = _unit(outputs[0].detach())
        elif variant == "sf_top_to_loss":
            fresh = []
            for i, block in enumerate(blocks):
                h = _gcn(block, states[i - 1] if i else x, right)
                _step(block, _single_forward(torch.stack([h, *states[i + 1 :]]).mean(0)))
                fresh.append(_unit(h.detach()))
            states = fresh
        elif variant in ("sf_top_to_input", "ce_top_to_input"):
            for i in [*range(0, count, 2), *range(1, count, 2)]:
                above = [*states, *top][i + 1 : i + 2]
                h = _gcn(blocks[i], torch.cat((states[i - 1] if i else x, *above), 1), right)
                _step(blocks[i], _cross_entropy_of_edges(h) if links else _single_forward(h))
                states[i] = _unit(h.detach())
        else:
            for block in blocks:
                h = _gcn(block, x, right)
                _step(block, _cross_entropy_of_edges(h) if variant == "ce" else _loud_edges(h))
                x = _unit(h.detach())
    return blocks


def _cross_entropy_of_edges(h: Tensor) -> Tensor:
    probability = (h[PAIRS[0]] * h[PAIRS[1]]).sum(1).sigmoid()
    return -torch.cat((probability[:6].log(), (1 - probability[6:]).log())).mean()


def _loud_edges(h: Tensor) -> Tensor:
    loud = (h[PAIRS[0]] * h[PAIRS[1]]).square().sum(1)
    return F.softplus(2 - loud[:6]).mean() + F.softplus(loud[6:] - 2).mean()


@pytest.mark.parametrize("aggregate_once", [True, False])
@pytest.mark.parametrize("variant", [*NODE_VARIANTS, *LINK_VARIANTS])
def test_steps_are_those_of_dense_matrices(variant: str, aggregate_once: bool) -> None:
    """Three layers, three steps of SGD on all of them; for top-down variants the states of the steps before count."""
    algorithm = _attached(variant, depth=3, aggregate_once=aggregate_once)
    expected = _reference_steps(algorithm, 3)
    before = [p.clone() for p in algorithm.blocks.parameters()]
    plain_loop(algorithm, [_batch(variant)] * 3, sgd)
    for got, want, start in zip(algorithm.blocks.parameters(), expected.parameters(), before, strict=True):
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(got, start, atol=1e-5)


@pytest.mark.parametrize("variant", ["sf", "ff_la", "ff_vn"])
@pytest.mark.parametrize("conv", ["SAGEConv", "GATConv"])
def test_views_are_the_graphs_one_at_a_time(variant: str, conv: str) -> None:
    """The shared products of several views give what the convolution gives on every view alone."""
    algorithm = _attached(variant, conv=conv)
    prepared = algorithm.prepare(NODE_BATCH)
    x = prepared.inputs
    for i, block in enumerate(algorithm.blocks):
        with torch.no_grad():
            output = algorithm.run(i, x, prepared)
            for g, shown in enumerate(_shown(algorithm) if variant != "sf" else [Y[TRAIN].tolist()]):
                edges, inputs = EDGES, x[g] if x.ndim == 3 else x
                if variant != "ff_la":
                    edges = fg.join_virtual_nodes(EDGES, TRAIN, torch.tensor(shown), NODES)
                elif i == 0:
                    inputs = _unit(torch.cat((X, _columns(shown, TRAIN.tolist())), 1))
                assert torch.allclose(output[g], block.conv(inputs, edges).relu(), atol=1e-12)  # type: ignore[operator]
        x = algorithm.emit(i, output)


# -- inference ----------------------------------------------------------------------------------------------------------
def _trained(variant: str, **options: Any) -> ForwardGNN:
    algorithm = _attached(variant, **options)
    plain_loop(algorithm, [_batch(variant)] * 5, adam)
    return algorithm.eval()


def test_single_forward_averages_the_probabilities_of_all_layers() -> None:
    algorithm = _trained("sf", depth=3)
    x, right = _unit(torch.cat((X, algorithm.virtual))), _with_virtual(Y[TRAIN].tolist(), TRAIN.tolist())
    total = torch.zeros(NODES, CLASSES, dtype=torch.float64)
    for block in algorithm.blocks:
        h = _gcn(block, x, right)
        total += (h[:NODES] @ h[NODES:].T).softmax(1)
        x = _unit(h)
    assert torch.allclose(algorithm.predict(X, EDGES).exp(), total / 3)


@pytest.mark.parametrize("variant", ["ff_la", "ff_vn"])
@pytest.mark.parametrize("asked", [None, [1, 4, 5]])
@pytest.mark.parametrize("revealed", [False, True])
def test_forward_forward_gives_one_class_after_the_other_to_the_nodes_asked_for(
    variant: str, revealed: bool, asked: list[int] | None
) -> None:
    """As in the authors' code: what is neither known nor asked for shows no class."""
    algorithm = _trained(variant)
    known = {int(n): int(Y[n]) for n in TRAIN}
    if revealed:
        known |= {3: int(Y[3]), 7: int(Y[7])}
    if revealed or asked:
        algorithm.reveal(Y, torch.tensor(list(known)), None if asked is None else torch.tensor(asked))
    shown = [n for n in range(NODES) if asked is None or n in known or n in asked]
    assert (len(shown) < NODES) is (asked is not None)
    scores = algorithm.predict(X, EDGES)
    for k in range(CLASSES):
        labels = [known.get(n, k) for n in shown]
        if variant == "ff_la":
            x, right = _unit(torch.cat((X, _columns(labels, shown)), 1)), _adjacency(EDGES, NODES)
        else:
            x, right = _unit(torch.cat((X, algorithm.virtual))), _with_virtual(labels, shown)
        total = torch.zeros(NODES, dtype=torch.float64)
        for block in algorithm.blocks:
            h = _gcn(block, x, right)
            total += h[:NODES].square().sum(1)
            x = _unit(h)
        assert torch.allclose(scores[:, k], total)


def test_top_to_loss_takes_its_states_from_a_raw_pass_at_inference() -> None:
    """As in the authors' code: unscaled rows go up, and what a layer reads and mixes is scaled."""
    algorithm = _trained("sf_top_to_loss", depth=3)
    x, right = torch.cat((X, algorithm.virtual)), _with_virtual(Y[TRAIN].tolist(), TRAIN.tolist())
    states = [_unit(x)]
    for block in algorithm.blocks:
        x = _gcn(block, x, right)
        states.append(_unit(x))
    mixed = [
        torch.stack([_gcn(block, states[i], right), *states[i + 2 :]]).mean(0)
        for i, block in enumerate(algorithm.blocks)
    ]
    wanted = torch.stack([(e[:NODES] @ e[NODES:].T).softmax(1) for e in mixed]).mean(0)
    assert torch.allclose(algorithm.predict(X, EDGES).exp(), wanted)


@pytest.mark.parametrize("variant", ["sf_top_to_input", "ce_top_to_input"])
def test_top_to_input_averages_the_sweeps_from_the_third_on(variant: str) -> None:
    algorithm = _trained(variant, depth=3)
    links = variant in LINK_VARIANTS
    shown = Y[TRAIN].tolist(), TRAIN.tolist()
    x = _unit(X if links else torch.cat((X, algorithm.virtual)))
    right = _adjacency(EDGES, NODES) if links else _with_virtual(*shown)
    top = [] if links else [_unit(torch.cat((_columns(*shown), torch.eye(CLASSES).double())))]
    states: list[Tensor] = []
    for i, block in enumerate(algorithm.blocks):
        nothing = torch.zeros(len(x), ([WIDTH, WIDTH] + [t.shape[1] for t in top] + [0])[i], dtype=torch.float64)
        states.append(_unit(_gcn(block, torch.cat((states[-1] if i else x, nothing), 1), right)))
    probabilities = []
    for sweep in range(10):
        for i in (0, 2, 1):
            above = [*states, *top][i + 1 : i + 2]
            h = _gcn(algorithm.blocks[i], torch.cat((states[i - 1] if i else x, *above), 1), right)
            states[i] = _unit(h)
            if sweep >= 2 and links:
                probabilities.append((h[PAIRS[0]] * h[PAIRS[1]]).sum(1).sigmoid())
            elif sweep >= 2:
                probabilities.append((h[:NODES] @ h[NODES:].T).softmax(1))
    given = algorithm.score_pairs(X, EDGES, PAIRS).sigmoid() if links else algorithm.predict(X, EDGES).exp()
    assert torch.allclose(given, torch.stack(probabilities).mean(0))


@pytest.mark.parametrize("variant", ["ce", "ff"])
def test_an_edge_scores_the_mean_probability_of_all_layers(variant: str) -> None:
    algorithm = _trained(variant)
    x, right, outputs, total = _unit(X), _adjacency(EDGES, NODES), [], torch.zeros(12, dtype=torch.float64)
    for block in algorithm.blocks:
        outputs.append(_gcn(block, x, right))
        products = outputs[-1][PAIRS[0]] * outputs[-1][PAIRS[1]]
        total += (products.sum(1) if variant == "ce" else products.square().sum(1) - 2).sigmoid()
        x = _unit(outputs[-1])
    assert torch.allclose(algorithm.score_pairs(X, EDGES, PAIRS).sigmoid(), total / 2)
    assert torch.allclose(algorithm.predict(X, EDGES), torch.cat(outputs, 1))


def test_while_layers_train_in_turn_inference_stops_at_the_one_that_trains() -> None:
    for variant in ("sf", "ff_la", "ce"):
        deep, shallow = _attached(variant, depth=3), _attached(variant, depth=3)
        torch.manual_seed(9)
        nn.init.normal_(shallow.blocks[2].conv.lin.weight)  # type: ignore[union-attr,arg-type]
        for algorithm in (deep, shallow):
            algorithm.train_only(frozenset(["layer2"]))
        assert torch.equal(deep.predict(X, EDGES), shallow.predict(X, EDGES))


@pytest.mark.parametrize("variant", ["sf", "ff_vn", "sf_top_to_loss", "sf_top_to_input", "ff_la"])
def test_activations_are_of_real_nodes(variant: str) -> None:
    algorithm = _trained(variant, depth=3)
    layers = list(algorithm.activations(X, EDGES))
    assert [layer.shape for layer in layers] == [(NODES, WIDTH)] * 3
    if variant == "ff_la":  # no label of any node is in them
        algorithm.reveal(Y, torch.arange(NODES))
        x = _unit(torch.cat((X, torch.full((NODES, CLASSES), 1 / CLASSES, dtype=torch.float64)), 1))
        assert torch.allclose(layers[0], _gcn(algorithm.blocks[0], x, _adjacency(EDGES, NODES)))


# -- properties of the spec ---------------------------------------------------------------------------------------------
def test_no_other_label_is_looked_at() -> None:
    """Property 3, with every variant that sees labels."""
    for variant in NODE_VARIANTS:
        hidden = torch.full_like(Y, -1)
        hidden[TRAIN] = Y[TRAIN]
        lies = NODE_BATCH._replace(targets=hidden)
        honest, deceived = _attached(variant), _attached(variant, batch=lies)
        plain_loop(honest, [NODE_BATCH] * 3, adam)
        plain_loop(deceived, [lies] * 3, adam)
        assert torch.equal(honest.predict(X, EDGES), deceived.predict(X, EDGES))


@pytest.mark.parametrize("variant", ["sf", "sf_top_to_loss", "sf_top_to_input"])
def test_single_forward_takes_no_label_that_is_revealed_later(variant: str) -> None:
    algorithm = _trained(variant)
    before = algorithm.predict(X, EDGES)
    algorithm.reveal(Y, torch.arange(NODES))
    assert torch.equal(algorithm.predict(X, EDGES), before)


@pytest.mark.parametrize("variant", [*NODE_VARIANTS, *LINK_VARIANTS])
def test_a_step_of_one_layer_leaves_the_others_alone_and_the_claim_is_exact(variant: str) -> None:
    """Property 4: the audit finds no path to other layers, and coupling through values where it is claimed, only there."""
    algorithm = _attached(variant, depth=3)
    before = [[p.clone() for p in block.parameters()] for block in algorithm.blocks]
    algorithm.train_only(frozenset(["layer2"]))
    plain_loop(algorithm, [_batch(variant)], sgd)
    moved = [
        any(not torch.equal(p, old) for p, old in zip(block.parameters(), olds, strict=True))
        for block, olds in zip(algorithm.blocks, before, strict=True)
    ]
    assert moved == [False, True, False]
    algorithm.train_only(None)
    result = audit(algorithm, _batch(variant))
    assert result.confirmed, result.reason
    assert result.verdict is (Locality.COUPLED if variant in TOP_DOWN else Locality.LAYER_LOCAL)
    assert not any(unit.reaches for unit in result.units)


@pytest.mark.parametrize(
    ("variant", "silence"), [("sf", 1.0986), ("ff_la", 2.2539), ("ff_vn", 2.2539), ("ce", 0.6931), ("ff", 2.2539)]
)
def test_losses_of_a_silent_layer(variant: str, silence: float) -> None:
    """Property 5."""
    algorithm = _attached(variant)
    for p in algorithm.blocks.parameters():
        nn.init.zeros_(p)
    for update in algorithm.updates(_batch(variant)):
        assert update.loss is not None
        assert update.loss.item() == pytest.approx(silence, abs=1e-4)


@pytest.mark.parametrize("variant", ["sf", "ff_vn", "sf_top_to_loss", "sf_top_to_input", "ce"])
def test_the_scale_of_features_changes_nothing(variant: str) -> None:
    """Property 6; but the states of top-to-loss at inference come from a pass over raw features."""
    scaled = _batch(variant)._replace(inputs=1000 * X)
    one, other = _attached(variant), _attached(variant, batch=scaled)
    plain_loop(one, [_batch(variant)] * 3, sgd)
    plain_loop(other, [scaled] * 3, sgd)
    same = torch.allclose(one.predict(X, EDGES), other.predict(1000 * X, EDGES), atol=1e-6)
    assert same is (variant != "sf_top_to_loss")
    inputs = one.prepare(_batch(variant)).inputs
    assert torch.allclose(inputs.norm(dim=1), torch.ones(len(inputs), dtype=torch.float64), atol=1e-6)


def test_renaming_classes_renames_predictions() -> None:
    """Property 7."""
    new = torch.tensor([2, 0, 1])
    one = _attached("sf")
    other = _attached("sf", batch=NODE_BATCH._replace(targets=new[Y]))
    with torch.no_grad():
        other.virtual[new] = one.virtual
    plain_loop(one, [NODE_BATCH] * 3, sgd)
    plain_loop(other, [NODE_BATCH._replace(targets=new[Y])] * 3, sgd)
    assert torch.allclose(other.predict(X, EDGES)[:, new], one.predict(X, EDGES), atol=1e-9)


@pytest.mark.parametrize("variant", ["ff_la", "ff_vn"])
def test_the_threshold_does_not_choose_classes(variant: str) -> None:
    """Property 7."""
    one, other = _attached(variant, threshold=2.0), _attached(variant, threshold=0.5)
    assert torch.equal(one.predict(X, EDGES), other.predict(X, EDGES))
    plain_loop(one, [NODE_BATCH], sgd)
    plain_loop(other, [NODE_BATCH], sgd)
    assert not torch.equal(one.predict(X, EDGES), other.predict(X, EDGES))


def test_one_layer_of_top_to_loss_is_one_layer_of_single_forward() -> None:
    """Property 8."""
    one, other = _attached("sf", depth=1), _attached("sf_top_to_loss", depth=1)
    for algorithm in (one, other):
        plain_loop(algorithm, [NODE_BATCH] * 4, adam)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):  # one of them goes without the rows not needed
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    torch.testing.assert_close(one.predict(X, EDGES), other.predict(X, EDGES), rtol=0, atol=1e-12)


def test_flops_are_those_of_the_cost_section() -> None:
    """Of docs/algorithms/forward_gnn.md: a step reads the kept aggregates and the kept prefix, which are made once."""
    nodes, labelled = NODES + CLASSES, len(TRAIN)
    edges = EDGES.shape[1] + 2 * labelled + nodes
    loss = 6 * labelled * CLASSES * WIDTH
    aggregate = 2 * edges * FEATURES
    first = 4 * nodes * FEATURES * WIDTH + loss
    second = 2 * edges * WIDTH + 4 * nodes * WIDTH**2 + loss
    joint = measure_update(_attached("sf", depth=2), NODE_BATCH)
    assert NODES * joint.flops == first + second
    assert joint.once_flops == aggregate
    alone = 4 * (labelled + CLASSES) * FEATURES * WIDTH + loss
    prefix = (
        aggregate + 2 * nodes * FEATURES * WIDTH
    )  # the first layer's aggregate is of the labelled nodes' rows alone
    in_turn = 4 * (labelled + CLASSES) * WIDTH**2 + loss
    cost = measure_update(_attached("sf", depth=2), NODE_BATCH, sequential=True)
    assert [NODES * stage.update_flops for stage in cost.stages] == [alone, in_turn]
    assert cost.once_flops == cost.stages[0].once_flops + cost.stages[1].once_flops
    assert cost.stages[0].once_flops == aggregate
    assert cost.stages[1].once_flops == prefix + 2 * edges * WIDTH
    assert cost.cache_bytes > 0


def test_a_frozen_layer_rests_and_is_run_once_for_all_steps() -> None:
    """Property 9, and the kept prefix: the same weights as if it were computed every time."""
    for variant in ("sf", "ff_la", "ff_vn", "ce"):
        kept, fresh = _attached(variant), _attached(variant)
        calls = 0

        def count(module: nn.Module, args: Any, output: Tensor) -> None:
            nonlocal calls
            calls += 1

        kept.blocks[0].after.register_forward_hook(count)  # type: ignore[union-attr]
        for algorithm in (kept, fresh):
            plain_loop(algorithm, [_batch(variant)], adam)
            algorithm.train_only(frozenset(["layer2"]))
        before = [p.clone() for p in kept.blocks[0].parameters()]
        calls = 0
        plain_loop(kept, [_batch(variant)] * 4, adam)
        assert calls == 1
        optimizers: dict[str, Any] | None = None
        for _ in range(4):  # a new tensor every time is never the one that was kept
            batch = _batch(variant)._replace(inputs=X.clone())
            optimizers = {u: o.state_dict() for u, o in plain_loop(fresh, [batch], adam, states=optimizers).items()}
        assert all(torch.equal(a, b) for a, b in zip(before, kept.blocks[0].parameters(), strict=True))
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(kept.parameters(), fresh.parameters(), strict=True))


def test_weights_put_back_into_a_frozen_layer_are_used() -> None:
    """A schedule restores the best weights of a layer before the next one trains."""
    algorithm = _attached("sf")
    start = copy.deepcopy(algorithm.state_dict())
    algorithm.train_only(frozenset(["layer2"]))
    list(algorithm.updates(NODE_BATCH))
    with torch.no_grad():
        for p in algorithm.blocks[0].parameters():
            p.add_(0.3)
    (changed,) = algorithm.updates(NODE_BATCH)
    algorithm.load_state_dict(start)
    (restored,) = algorithm.updates(NODE_BATCH)
    fresh = _attached("sf")
    fresh.train_only(frozenset(["layer2"]))
    (wanted,) = fresh.updates(NODE_BATCH)
    assert torch.equal(restored.loss, wanted.loss)  # type: ignore[arg-type]
    assert not torch.equal(changed.loss, wanted.loss)  # type: ignore[arg-type]


def _backprop_bytes(depth: int) -> int:
    from locallearn.algorithms import Backprop

    algorithm = Backprop()
    torch.manual_seed(0)
    algorithm.attach(gnn((FEATURES,), CLASSES, hidden=(WIDTH,) * depth).double(), _info("sf", NODE_BATCH))
    return measure_update(algorithm, NODE_BATCH).activation_peak_bytes


def test_memory_of_a_step_is_flat_in_depth_where_that_of_backpropagation_grows() -> None:
    """Property 10."""
    for variant in ("sf", "ff_la", "ff_vn", "sf_top_to_loss", "ce"):
        peaks = [measure_update(_attached(variant, depth=d), _batch(variant)).activation_peak_bytes for d in (2, 8)]
        assert 0 < peaks[1] <= 1.02 * peaks[0], variant
    two, eight, fourteen = (_backprop_bytes(depth) for depth in (2, 8, 14))
    assert eight > 2.5 * two
    assert fourteen - eight == pytest.approx(eight - two, rel=0.05)


@pytest.mark.parametrize("conv", ["GCNConv", "SAGEConv"])
@pytest.mark.parametrize("variant", ["sf", "ff_la", "ff_vn", "ce"])
def test_an_aggregate_that_is_kept_gives_the_same_weights(variant: str, conv: str) -> None:
    """Property 11, layer after layer in single precision."""
    batch = _batch(variant)._replace(inputs=X.float())
    weights = []
    for aggregate_once in (True, False):
        algorithm = _attached(variant, conv=conv, batch=batch, aggregate_once=aggregate_once).float()
        for stage in algorithm.stages:
            algorithm.train_only(frozenset(stage))
            plain_loop(algorithm, [batch] * 10, adam)
        weights.append([p.detach() for p in algorithm.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*weights, strict=True))


def test_messages_pass_once_per_layer_when_the_aggregate_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from locallearn.nets import graph

    products: list[Any] = []
    product = graph._product

    def counted(matrix: Any, dense: Tensor) -> Tensor:
        products.append(matrix)
        return product(matrix, dense)

    monkeypatch.setattr(graph, "_product", counted)
    for aggregate_once, wanted in ((True, 1 + 2), (False, 5 + 6)):
        algorithm, products[:] = _attached("sf", aggregate_once=aggregate_once), []
        for stage in algorithm.stages:
            algorithm.train_only(frozenset(stage))
            plain_loop(algorithm, [NODE_BATCH] * 5, adam)
        # One for the frozen layer's output in any case; and one per layer, or one per step.
        assert len(products) == wanted


# -- graphs, batches, checkpoints ---------------------------------------------------------------------------------------
def _sampled(seed: int) -> Batch:
    """A part of the graph with its own numbering, and labels of some of its nodes only."""
    nodes = torch.randperm(NODES, generator=torch.Generator().manual_seed(seed))[: 8 + seed % 3]
    place = torch.full((NODES,), -1).index_copy_(0, nodes, torch.arange(len(nodes)))
    inside = (place[EDGES] >= 0).all(0)
    labels = torch.full((len(nodes),), -1)
    labels[:4] = Y[nodes[:4]]
    return Batch(X[nodes], labels, (place[EDGES[:, inside]],), rows=torch.arange(4))


@pytest.mark.parametrize("variant", ["sf", "ff_la", "ff_vn"])
def test_training_goes_on_sampled_parts_of_the_graph_as_well(variant: str) -> None:
    """Wrong labels are drawn anew from the rule's own generator, whose place a checkpoint holds."""
    batches = [_sampled(seed) for seed in range(6)]
    whole, half, resumed = (_attached(variant) for _ in range(3))
    plain_loop(whole, batches, sgd)
    plain_loop(half, batches[:3], sgd)
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    plain_loop(resumed, batches[3:], sgd)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert torch.equal(whole.predict(X, EDGES), resumed.predict(X, EDGES))
    if variant != "sf":
        draws = [whole.prepare(batches[0]).context for _ in range(8)]
        shown = [columns if variant == "ff_la" else torch.stack(graphs) for graphs, columns in draws]
        assert not all(torch.equal(view, shown[0]) for view in shown)
        assert all(torch.equal(view[0], shown[0][0]) for view in shown)  # the first one shows the right labels


@pytest.mark.parametrize("variant", TOP_DOWN)
def test_top_down_states_are_in_the_checkpoint_and_want_the_whole_graph(variant: str) -> None:
    whole, half, resumed = (_attached(variant, depth=3) for _ in range(3))
    plain_loop(whole, [_batch(variant)] * 4, sgd)
    plain_loop(half, [_batch(variant)] * 2, sgd)
    assert not torch.equal(half.state2, resumed.state2)  # type: ignore[arg-type]
    resumed.load_state_dict(half.state_dict())
    plain_loop(resumed, [_batch(variant)] * 2, sgd)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(ValueError, match=f"{variant} keeps what every layer said of every node"):
        next(iter(whole.updates(_sampled(0))))
    with pytest.raises(ValueError, match=f"{variant}.*use schedule=joint"):
        _ = whole.stages


@pytest.mark.parametrize("mask", [False, True])
def test_training_nodes_come_as_a_mask_or_as_an_index_in_any_order(mask: bool) -> None:
    rows = torch.zeros(NODES, dtype=torch.bool).index_fill_(0, TRAIN, True) if mask else TRAIN.flip(0)
    batch = NODE_BATCH._replace(rows=rows)
    for variant in NODE_VARIANTS:
        one, other = _attached(variant), _attached(variant, batch=batch)
        plain_loop(one, [NODE_BATCH] * 2, sgd)
        plain_loop(other, [batch] * 2, sgd)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("variant", [*NODE_VARIANTS, *LINK_VARIANTS])
def test_what_validation_made_serves_training(variant: str) -> None:
    """Lightning validates in inference mode, and before the first step."""
    one, other = _attached(variant, conv="SAGEConv"), _attached(variant, conv="SAGEConv")
    with torch.inference_mode():
        one.predict(X, EDGES)
    for algorithm in (one, other):
        plain_loop(algorithm, [_batch(variant)] * 2, sgd)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("variant", ["sf", "ff_la", "ff_vn", "ce"])
def test_inference_runs_frozen_layers_once(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it keeps follows the weights, of which a copy knows nothing."""
    algorithm = _trained(variant, depth=3)
    algorithm.train_only(frozenset(["layer2"]))
    ran: list[int] = []
    layer = ForwardGNN._layer
    monkeypatch.setattr(ForwardGNN, "_layer", lambda self, index, *rest: ran.append(index) or layer(self, index, *rest))  # type: ignore[func-returns-value]
    for _ in range(2):
        algorithm.predict(X, EDGES)
    assert sorted(ran) == [0, 1, 1]
    for _ in range(2):
        plain_loop(algorithm, [_batch(variant)], adam)
        assert torch.equal(algorithm.predict(X, EDGES), copy.deepcopy(algorithm).predict(X, EDGES))
        with torch.no_grad():
            next(algorithm.blocks[0].parameters()).add_(0.1)


@pytest.mark.parametrize("turn", [None, "layer2"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("variant", [*NODE_VARIANTS, *LINK_VARIANTS])
def test_inference_follows_the_steps_of_a_fused_optimizer(
    variant: str, sparse: bool, turn: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which do not count as writing into a weight; a copy has kept nothing."""
    if sparse:
        monkeypatch.setattr("locallearn.nets.graph._SPARSE", 1.0)
    algorithm = _attached(variant)
    if turn is not None and variant not in TOP_DOWN:
        algorithm.train_only(frozenset([turn]))
    fused = partial(torch.optim.Adam, lr=1e-1, fused=True)
    before = algorithm.predict(X, EDGES)
    for _ in range(2):
        plain_loop(algorithm, [_batch(variant)] * 2, fused)
        now = algorithm.predict(X, EDGES)
        assert not torch.equal(now, before)
        assert torch.equal(now, copy.deepcopy(algorithm).predict(X, EDGES))
        before = now


def test_the_sweeps_of_one_inference_multiply_features_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse ones, that is; of others the aggregate is kept."""
    monkeypatch.setattr("locallearn.nets.graph._SPARSE", 0.5)
    batch = NODE_BATCH._replace(inputs=F.one_hot(torch.arange(NODES), 20).double())
    algorithm = _attached("sf_top_to_input", batch=batch)
    inputs = algorithm.prepare(batch).inputs
    multiplied: list[Tensor] = []
    project = GraphBlock.project
    monkeypatch.setattr(GraphBlock, "project", lambda self, x, *rest: multiplied.append(x) or project(self, x, *rest))  # type: ignore[func-returns-value]
    algorithm.predict(batch.inputs, EDGES)
    assert sum(x is inputs for x in multiplied) == 1 + 1  # for the first states, and for all sweeps


def test_revealing_the_same_labels_again_computes_nothing_anew() -> None:
    algorithm = _trained("ff_vn")
    algorithm.predict(X, EDGES)
    versions = algorithm.known_labels._version, algorithm.asked._version
    algorithm.reveal(Y, TRAIN)
    assert (algorithm.known_labels._version, algorithm.asked._version) == versions
    algorithm.reveal(Y, torch.tensor([0]), torch.tensor([1]))
    assert (algorithm.known_labels >= 0).tolist() == [True] + [False] * (NODES - 1)
    assert algorithm.asked.nonzero().tolist() == [[1]]


@pytest.mark.parametrize("variant", NODE_VARIANTS)
def test_the_karate_club_is_told_apart(variant: str) -> None:
    """34 members in four communities, of whom two thirds are labelled; members have no features but their number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of third parties, on import
        from torch_geometric.datasets import KarateClub

        data: Any = KarateClub()[0]
    train = torch.arange(34) % 3 != 0
    batch = Batch(data.x, torch.where(train, data.y, -1), (data.edge_index,), rows=train)
    algorithm = ForwardGNN(variant)  # type: ignore[arg-type]
    torch.manual_seed(0)
    net = gnn((34,), 4, hidden=(32, 32), readout=None, **algorithm.net_settings)
    algorithm.attach(net, TaskInfo(batch, 4, F.cross_entropy))
    for stage in [None] if variant in TOP_DOWN else [frozenset(units) for units in algorithm.stages]:
        algorithm.train_only(stage)
        plain_loop(algorithm, [batch] * 100, adam)
    right = algorithm.predict(data.x, data.edge_index).argmax(1) == data.y
    assert right[~train].float().mean() > 0.8  # the largest community has 13 of the 34


@pytest.mark.parametrize("variant", LINK_VARIANTS)
def test_edges_are_told_from_other_pairs(variant: str) -> None:
    algorithm = _attached(variant)
    plain_loop(algorithm, [LINK_BATCH] * 60, partial(torch.optim.Adam, lr=5e-2))
    scores = algorithm.predict(X, EDGES)
    assert scores.shape == (NODES, 2 * WIDTH)
    scores = algorithm.score_pairs(X, EDGES, PAIRS)
    assert (scores[:6, None] > scores[None, 6:]).float().mean() > 0.8


# -- settings and refusals ----------------------------------------------------------------------------------------------
def test_a_rule_tells_what_network_and_optimizer_it_needs() -> None:
    settings = {v: ForwardGNN(v).net_settings for v in (*NODE_VARIANTS, *LINK_VARIANTS)}  # type: ignore[arg-type]
    assert settings.pop("ff_la") == {"label_inputs": True}
    assert settings.pop("sf_top_to_input") == {"top_down": "labels"}
    assert settings.pop("ce_top_to_input") == {"top_down": "features"}
    assert not any(settings.values())
    assert ForwardGNN("ff_vn").variant == "ff_vn"
    decay = partial(torch.optim.Adam, weight_decay=5e-4)
    groups = {v: decay(_attached(v).units()["layer1"]).param_groups for v in ("sf", "ce", "ce_top_to_input")}
    assert {v: g[0]["weight_decay"] for v, g in groups.items()} == {"sf": 5e-4, "ce": 5e-4, "ce_top_to_input": 0.0}


def test_what_cannot_be_trained_is_refused_by_name() -> None:
    def attach(variant: str = "sf", net: Blocks | None = None, classes: int = CLASSES, **changes: Any) -> None:
        batch = _batch(variant)._replace(**changes)
        algorithm = ForwardGNN(variant)  # type: ignore[arg-type]
        own = gnn((FEATURES,), CLASSES, hidden=(WIDTH, WIDTH), **algorithm.net_settings)
        info = _info(variant, batch)
        algorithm.attach(own if net is None else net, TaskInfo(batch, classes, info.loss, info.classes))

    with pytest.raises(ValueError, match="variant is 'fs', expected one of sf, ff_la"):
        ForwardGNN("fs")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature is 0"):
        ForwardGNN(temperature=0)
    with pytest.raises(ValueError, match=r"learns on graphs.* carry 0 things"):
        attach(context=())
    with pytest.raises(ValueError, match="from node 0 to node 14, but the graph's 14 nodes"):
        attach(context=(torch.tensor([[0], [14]]),))
    with pytest.raises(ValueError, match="features of 2 nodes are not finite, the first is node 3"):
        attach(inputs=X.index_fill(0, torch.tensor([3, 5]), float("nan")))
    with pytest.raises(ValueError, match=r"float64 of shape \(14, 2, 3\)"):
        attach(inputs=X.view(NODES, 2, 3))
    with pytest.raises(ValueError, match="no node of this graph has a training label"):
        attach(rows=torch.zeros(NODES, dtype=torch.bool))
    with pytest.raises(ValueError, match="labels of training nodes go from 0 to 2, expected 0 to 1"):
        attach(classes=2)
    with pytest.raises(ValueError, match="at least 2 classes"):
        attach("ff_vn", gnn((FEATURES,), 1), 1, targets=torch.zeros_like(Y))
    with pytest.raises(ValueError, match="ce predicts edges, and this task has classes"):
        ForwardGNN("ce").attach(gnn((FEATURES,), CLASSES), _info("sf", NODE_BATCH))
    with pytest.raises(ValueError, match="sf classifies nodes, and this task has no classes"):
        ForwardGNN("sf").attach(gnn((FEATURES,), CLASSES), _info("ce", LINK_BATCH))
    with pytest.raises(ValueError, match=r"block 'layer1' does not take the 9 columns .*label_inputs=True"):
        attach("ff_la", gnn((FEATURES,), CLASSES))
    with pytest.raises(ValueError, match=r"block 'layer1' does not take the 134 columns .*top_down=labels"):
        attach("sf_top_to_input", gnn((FEATURES,), CLASSES))
    with pytest.raises(ValueError, match=r"are \[5, 4\] wide: give all blocks the same width"):
        attach("sf_top_to_loss", gnn((FEATURES,), CLASSES, hidden=(5, 4)))
    with pytest.raises(ValueError, match="this network has one layer: use two or more"):
        attach("sf_top_to_input", gnn((FEATURES,), CLASSES, hidden=(WIDTH,), top_down="labels"))
    with pytest.raises(ValueError, match="block 'a' does not say how wide its output is"):
        attach("ce_top_to_input", Blocks({"a": nn.Linear(FEATURES, 4)}))
    algorithm = _attached("sf")
    with pytest.raises(ValueError, match=r"labels of the 14 nodes .* this graph has 8: predict on that graph"):
        algorithm.predict(X[:8], EDGES[:, :0])
    with pytest.raises(ValueError, match="sf classifies nodes; edges are scored by ce"):
        algorithm.score_pairs(X, EDGES, PAIRS)
    with pytest.raises(ValueError, match=r"set schedule.cache=false"):
        algorithm.cache_frozen(True)
    with pytest.raises(ValueError, match="give one per node"):
        _attached("ff_la").reveal(Y[:3], TRAIN[:2])
