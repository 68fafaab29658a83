"""Graph networks: sparse products give what PyTorch Geometric gives, and nothing stale is ever taken out of store."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from locallearn.nets.graph import GraphBlock, check_edges, gnn, kept

DRAW = torch.Generator().manual_seed(0)
NODES = 30
# Directed, with self-loops and repeated edges; nothing leads to the last five nodes.
EDGES = torch.randint(NODES - 5, (2, 80), generator=DRAW)
EDGES[0, :10] = NODES - 1
DENSE = torch.randn(NODES, 12, generator=DRAW)
MOSTLY_ZERO = (torch.rand(NODES, 90, generator=DRAW) < 0.03).float()


def _net(features: int, conv: str = "GCNConv", hidden: tuple[int, ...] = (16, 8), **options: Any) -> Any:
    torch.manual_seed(0)
    return gnn((features,), 3, conv, hidden, **options)


def _by_geometric(net: Any, x: Tensor, edges: Tensor) -> Tensor:
    """The convolutions themselves, one after the other."""
    for block in (*net, *([] if net.readout is None else [net.readout])):
        x = block.after(block.conv(x, edges))
    return x


@pytest.mark.parametrize("x", [DENSE, MOSTLY_ZERO], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    ("conv", "options"),
    [
        ("GCNConv", {}),
        ("GCNConv", {"improved": True, "bias": False}),
        ("GCNConv", {"add_self_loops": False}),
        ("SAGEConv", {}),
        ("SAGEConv", {"root_weight": False}),
        ("GCNConv", {"normalize": False}),
        ("SAGEConv", {"normalize": True}),
        ("SAGEConv", {"project": True}),
        ("SAGEConv", {"aggr": "max"}),
        ("SAGEConv", {"flow": "target_to_source"}),
        ("GATConv", {"heads": 4}),
    ],
)
def test_a_network_is_what_torch_geometric_computes(x: Tensor, conv: str, options: dict[str, Any]) -> None:
    """Outputs and gradients in double precision; the first seven come from sparse products, the others do not."""
    net = _net(x.shape[1], conv, readout="conv", conv_options=options).double()
    x = x.double()
    weight = torch.randn(NODES, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mine, theirs = net(x, EDGES), _by_geometric(net, x, EDGES)
    assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad((out * weight).sum(), list(net.parameters())) for out in (mine, theirs)]
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-13) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("conv", "options"), [("GCNConv", {}), ("GATConv", {"heads": 2}), ("SAGEConv", {"aggr": "max"})]
)
def test_mostly_zero_features_are_multiplied_as_a_sparse_matrix(conv: str, options: dict[str, Any]) -> None:
    """Forward and backward, which a dense product would show as FLOPs; the linear layers of other convolutions, too."""
    flops = []
    for x in (MOSTLY_ZERO, MOSTLY_ZERO + 1):
        net = _net(x.shape[1], conv, conv_options=options)
        with FlopCounterMode(display=False) as counter:
            net(x, EDGES).sum().backward()
        flops.append(counter.get_total_flops())
    dense = 2 * 2 * x.numel() * net[0].width
    entries = MOSTLY_ZERO.count_nonzero().item() / x.numel()
    assert flops[1] - flops[0] == pytest.approx((1 - entries) * dense, rel=1e-6)


@pytest.mark.parametrize("conv", ["GCNConv", "SAGEConv"])
@pytest.mark.parametrize("x", [DENSE, MOSTLY_ZERO], ids=["dense", "sparse"])
def test_both_halves_and_a_cut_through_the_columns_give_the_whole(conv: str, x: Tensor) -> None:
    block = _net(x.shape[1], conv)[0].double()
    x, cut = x.double(), x.shape[1] - 5
    left, right = x[:, :cut].contiguous(), x[:, cut:]
    whole = block(x, EDGES)
    edges_first = block.finish(
        block.combine(block.aggregate(left, EDGES)) + block.combine(block.aggregate(right, EDGES), cut)
    )
    projected = [a + b for a, b in zip(block.project(left), block.project(right, cut), strict=True)]
    weights_first = block.finish(block.spread(projected, EDGES))
    views = block.finish(block.combine(block.aggregate(torch.stack((x, 2 * x)), EDGES)))
    assert torch.allclose(edges_first, whole, atol=1e-13)
    assert torch.allclose(weights_first, whole, atol=1e-13)
    assert torch.allclose(views, torch.stack((whole, block(2 * x, EDGES))), atol=1e-13)


def test_gradients_reach_the_inputs_and_run_forward_too() -> None:
    net, x = _net(12, hidden=(16, 5)).double(), DENSE.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda value: net(value, EDGES), (x,))
    direction = torch.randn(NODES, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, the first time
        tangent = torch.func.jvp(lambda value: net(value, EDGES), (x.detach(),), (direction,))[1]
    ahead, behind = net(x + 1e-6 * direction, EDGES), net(x - 1e-6 * direction, EDGES)
    assert torch.allclose(tangent, (ahead - behind) / 2e-6, atol=1e-7)


@pytest.mark.parametrize("conv", ["GCNConv", "SAGEConv"])
def test_half_precision_stays_half(conv: str) -> None:
    net = _net(12, conv)
    wanted = net(DENSE, EDGES)
    given = net.to(torch.bfloat16)(DENSE.bfloat16(), EDGES)
    assert given.dtype is torch.bfloat16
    assert torch.allclose(given.float(), wanted, atol=0.05)


@pytest.mark.parametrize("x", [DENSE, MOSTLY_ZERO], ids=["dense", "sparse"])
@pytest.mark.parametrize("conv", ["GCNConv", "SAGEConv"])
def test_mixed_precision_learns(conv: str, x: Tensor) -> None:
    net = _net(x.shape[1], conv)
    wanted = torch.autograd.grad(net(x, EDGES).sum(), list(net.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        given = net(x, EDGES)
    given.sum().backward()
    for p, gradient in zip(net.parameters(), wanted, strict=True):
        assert p.grad.dtype is torch.float32
        assert (p.grad - gradient).norm() <= 0.03 * gradient.norm() + 1e-6


def test_flops_count_edges_and_entries_not_all_pairs_of_nodes() -> None:
    """A layer: entries x width for the features, (edges + loops) x width for the messages; twice more for gradients."""
    net = _net(90, hidden=(16,), readout=None)
    edges = EDGES[:, EDGES[0] != EDGES[1]]
    with FlopCounterMode(display=False) as count:
        net(MOSTLY_ZERO, edges).sum().backward()
    entries = int(MOSTLY_ZERO.count_nonzero())
    assert count.get_total_flops() == 2 * (2 * entries * 16 + 2 * (edges.shape[1] + NODES) * 16)


def test_nothing_stale_is_used_and_nothing_is_kept_for_longer_than_its_tensor() -> None:
    net, edges, x = _net(90), EDGES.clone(), MOSTLY_ZERO.clone()
    before = net(x, edges)
    edges[:, :40] = edges[:, :40].flip(0)
    changed = net(x, edges)
    assert not torch.allclose(before, changed)
    assert torch.allclose(changed, _by_geometric(net, x, edges), atol=1e-5)
    x[:, :4] += 1
    assert torch.allclose(net(x, edges), _by_geometric(net, x, edges), atol=1e-5)
    made = [torch.zeros(1)]
    reference = weakref.ref(made[0])
    assert kept(x, "mine", made.pop) is kept(x, "mine", lambda: torch.ones(1))
    del x
    gc.collect()
    assert reference() is None


def test_what_validation_made_serves_training() -> None:
    """Lightning validates in inference mode, and before the first step."""
    net, edges, x = _net(90), EDGES.clone(), MOSTLY_ZERO.clone()
    with torch.inference_mode():
        net(x, edges)
        net(x + 1, edges)
        made = kept(x, "mine", lambda: x * 2)
    net(x, edges).sum().backward()
    wanted = torch.autograd.grad(_by_geometric(net, x, edges).sum(), list(net.parameters()))
    assert all(torch.allclose(p.grad, w, atol=1e-4) for p, w in zip(net.parameters(), wanted, strict=True))
    assert not made.is_inference()


# -- the network ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("conv", ["GCNConv", "SAGEConv", "GATConv", "GINConv", "GraphConv", "TAGConv", "ChebConv"])
@pytest.mark.parametrize("readout", ["conv", "linear", None])
def test_any_convolution_makes_blocks_of_the_hidden_widths(conv: str, readout: Any) -> None:
    options = {"GATConv": {"heads": 4}, "ChebConv": {"K": 2}}.get(conv, {})
    net = _net(12, conv, readout=readout, conv_options=options)
    assert net.names == ["layer1", "layer2"]
    assert [x.shape[1] for x in net.features(DENSE, EDGES)] == [16, 8]
    assert net(DENSE, EDGES).shape == (NODES, 8 if readout is None else 3)
    assert all(bool((x >= 0).all()) for x in net.features(DENSE, EDGES))


def test_heads_share_the_width_and_a_last_layer_averages_them() -> None:
    net = _net(12, "GATConv", conv_options={"heads": 4})
    assert [block.conv.out_channels for block in net] == [4, 2]
    assert (net.readout.conv.out_channels, net.readout.conv.concat) == (3, False)


def test_a_rule_gets_the_room_it_asks_for() -> None:
    def widths(**settings: Any) -> list[int]:
        return [block.conv.in_channels for block in _net(12, hidden=(16, 8, 4), readout=None, **settings)]

    assert widths() == [12, 16, 8]
    assert widths(label_inputs=True) == [12 + 3, 16, 8]
    assert widths(top_down="labels") == [12 + 8, 16 + 4, 8 + 3]
    assert widths(top_down="features") == [12 + 8, 16 + 4, 8]
    assert _net(12, top_down="labels").readout is None


def test_dropout_acts_in_training_only() -> None:
    net = _net(12, dropout=0.5)
    assert not torch.equal(net(DENSE, EDGES), net(DENSE, EDGES))
    assert torch.allclose(net.eval()(DENSE, EDGES), _by_geometric(_net(12), DENSE, EDGES), atol=1e-6)


def test_what_cannot_be_made_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"input_shape is \(1, 28, 28\), expected \(features,\)"):
        gnn((1, 28, 28), 3)
    with pytest.raises(ValueError, match=r"hidden is \[\]"):
        gnn((4,), 3, hidden=())
    with pytest.raises(ValueError, match="readout is 'mean', expected"):
        gnn((4,), 3, readout="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="top_down is 'all', expected"):
        gnn((4,), 3, top_down="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"conv is 'sage'.*did you mean SAGEConv"):
        gnn((4,), 3, "sage")
    with pytest.raises(ValueError, match=r"conv is '!!!'.*it has SimpleConv, GCNConv"):
        gnn((4,), 3, "!!!")
    with pytest.raises(ValueError, match=r"GATConv cannot be made with conv_options=\{'head': 2\}"):
        gnn((4,), 3, "GATConv", conv_options={"head": 2})
    with pytest.raises(ValueError, match="width of 128 cannot be shared out among the 3 heads"):
        gnn((4,), 3, "GATConv", conv_options={"heads": 3})
    with pytest.raises(ValueError, match="conv_options has cached"):
        gnn((4,), 3, conv_options={"cached": True})


@pytest.mark.parametrize("conv", ["GCNConv", "SAGEConv"])
def test_inputs_that_do_not_fit_are_refused(conv: str) -> None:
    net = _net(12, conv)
    with pytest.raises(ValueError, match=r"\(30, 11\) does not fit weights for 12 features"):
        net(DENSE[:, :11], EDGES)
    with pytest.raises(ValueError, match="from node 0 to node 30, but the graph's 30 nodes are numbered 0 to 29"):
        net(DENSE, torch.tensor([[0, 30], [1, 2]]))
    with pytest.raises(ValueError, match="from node -1"):
        check_edges(torch.tensor([[-1], [1]]), 5)
    with pytest.raises(ValueError, match=r"int64 of shape \(2, E\)"):
        net(DENSE, EDGES.T)


def test_a_module_of_ones_own_can_be_a_block() -> None:
    class Spread(nn.Module):
        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            return x.index_add(0, edges[1], x[edges[0]])

    block = GraphBlock(Spread(), 12, nn.ReLU())
    assert torch.equal(block(DENSE, EDGES), DENSE.index_add(0, EDGES[1], DENSE[EDGES[0]]).relu())
