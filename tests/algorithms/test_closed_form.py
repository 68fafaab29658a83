"""Forward Projection and ridge: against the authors' numbers, plain NumPy-like formulas, and what a pass may cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn import Batch
from locallearn.algorithms import ForwardProjection, Ridge, TaskInfo
from locallearn.algorithms._closed_form import ClosedFormLayers
from locallearn.algorithms._linear_layers import LinearLayer, find_layers
from locallearn.audit import audit
from locallearn.cost import measure_update
from locallearn.functional import forward_projection, ridge
from locallearn.nets import Blocks, forward_projection_cnn, mlp, vit
from tests.references import reference


def _attached(rule: ClosedFormLayers, net: Blocks, batch: Batch, outputs: int = 3, classes: bool = True) -> Any:
    loss = F.cross_entropy if classes else F.mse_loss
    example = batch._replace(inputs=batch.inputs[:2], targets=batch.targets[:2], index=None)
    rule.attach(net, TaskInfo(example, outputs, loss, classes))
    return rule.train()


def _fit(rule: ClosedFormLayers, batches: Iterable[Batch]) -> None:
    batches = list(batches)
    while not rule.finished:
        for batch in batches:
            assert not list(rule.updates(batch))
        rule.end_epoch()


def _split(batch: Batch, size: int) -> list[Batch]:
    return [
        Batch(
            batch.inputs[i : i + size], batch.targets[i : i + size], index=torch.arange(len(batch.inputs))[i : i + size]
        )
        for i in range(0, len(batch.inputs), size)
    ]


def _classes(samples: int = 60, features: int = 6, noise: float = 0.7) -> Batch:
    labels = torch.arange(samples) % 3
    return Batch(torch.randn(3, features).double()[labels] + noise * torch.randn(samples, features), labels)


# -- the authors' numbers ---------------------------------------------------------------------------------------------------
def _numbers(prefix: str) -> dict[str, Tensor]:
    found = reference("fp_forward_projection")
    return {key.removeprefix(prefix): torch.tensor(value) for key, value in found.items()}


class _Given(ForwardProjection):
    """With the authors' draws."""

    numbers: dict[str, Tensor]

    def draws(self, layer: LinearLayer) -> tuple[Tensor, Tensor]:
        i = self.layers.index(layer)
        return self.numbers[f"Q{i}"], self.numbers[f"U{i}"]


@pytest.mark.parametrize("activation", ["relu", "mod2", "square"])
@pytest.mark.parametrize("size", [20, 7])
def test_numbers_of_the_authors_code(activation: Any, size: int) -> None:
    rule = _Given()
    rule.numbers = _numbers(f"mlp/{activation}-forward_projection-multi/")
    net = mlp((6,), 3, (8, 5), activation=activation, readout_bias=True).double()
    batch = Batch(rule.numbers["mlp_x"], rule.numbers["mlp_labels"])
    _fit(_attached(rule, net, batch), _split(batch, size))
    for i, layer in enumerate(rule.layers):
        found = torch.cat((layer.module.weight.T, layer.module.bias[None]))
        torch.testing.assert_close(found, rule.numbers[f"W{i}"], rtol=0, atol=1e-12)
    torch.testing.assert_close(rule.predict(rule.numbers["mlp_xtest"]), rule.numbers["test_scores"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("target", ["label", "noisy_label"])
def test_numbers_of_the_controls(target: str) -> None:
    z = _numbers(f"mlp/relu-{target}_projection-multi/")
    for i in range(2):
        noise = torch.zeros_like(z[f"Z{i}"])
        if target == "noisy_label":
            noise = z[f"Z{i}"] - (z["mlp_y"] @ z[f"U{i}"]).sign()  # signs that the authors' code drew
            assert set(noise.flatten().tolist()) == {-1.0, 1.0}
        wanted = forward_projection.target(noise, z["mlp_y"], z[f"U{i}"])
        assert torch.equal(wanted, z[f"Z{i}"])
        fit = ridge.solve_rows(z[f"X{i}"][:, :-1], wanted, float(z[f"reg{i}"]), "penalised")
        torch.testing.assert_close(torch.cat((fit.weights, fit.intercept[None])), z[f"W{i}"], rtol=0, atol=1e-12)


def test_numbers_of_two_classes_in_one_column_and_of_drawn_layers() -> None:
    z = _numbers("mlp/relu-forward_projection-binary/")
    for i in range(2):
        projected = forward_projection.project(z[f"X{i}"][:, :-1], z[f"Q{i}"])
        assert torch.equal(forward_projection.target(projected, z["mlp_y_binary"], z[f"U{i}"]), z[f"Z{i}"])
    drawn = _numbers("mlp/relu-random-multi/")
    ours = forward_projection.random_weights(7, 8, torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.norm(dim=1), torch.ones(7))
    torch.testing.assert_close(drawn["W0"].norm(dim=1), torch.ones(7).double())
    fit = ridge.solve_rows(drawn["X2"][:, :-1], drawn["Z2"], 1.0, "penalised")
    torch.testing.assert_close(torch.cat((fit.weights, fit.intercept[None])), drawn["W2"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("case", "padding", "lambdas"),
    [("conv/valid", 0, (0.01, 1.0)), ("convpad/pad", 1, (0.01, 1.0)), ("convpad/cifar_setting", 1, (1000.0, 100.0))],
)
def test_numbers_of_the_authors_convolutions(case: str, padding: int, lambdas: tuple[float, float]) -> None:
    """Of the CIFAR setting the penalties are those in sum form: there sums are multiplied by .01."""
    rule = _Given(lambda_=lambdas[0], readout_lambda=lambdas[1], rows=50)
    rule.numbers = _numbers(f"{case}/")
    given = _numbers(f"{case.partition('/')[0]}/")
    border: Any = "replicate" if padding else "none"
    net = forward_projection_cnn((2, 8, 8), 3, (4,), border).double()
    batch = Batch(given["x"].permute(0, 3, 1, 2), given["y"].argmax(1))
    _fit(_attached(rule, net, batch), _split(batch, 4))
    assert [layer.name for layer in rule.layers] == ["block1.0", "block1.2", "readout"]
    for i, layer in enumerate(rule.layers):
        found = torch.cat((layer.module.weight.flatten(1).T, layer.module.bias[None]))
        torch.testing.assert_close(found, rule.numbers[f"W{i}"], rtol=0, atol=1e-11)
    scores = rule.predict(given["xtest"].permute(0, 3, 1, 2))
    torch.testing.assert_close(scores, rule.numbers["test_scores"], rtol=0, atol=1e-11)


@pytest.mark.parametrize(("border", "side"), [("replicate", 2), ("zeros", 2), ("none", 1)])
def test_the_readout_fits_the_map_that_is_left(border: Any, side: int) -> None:
    net = forward_projection_cnn((1, 8, 8) if border != "none" else (1, 16, 16), 3, (4, 6), border, average=False)
    assert net(torch.randn(2, 1, *((8, 8) if border != "none" else (16, 16)))).shape == (2, 3)
    assert net.readout[-1].in_features == 6 * side * side  # type: ignore[index, union-attr]
    with pytest.raises(ValueError, match="nothing is left of a 8x8 image in block 2 of 2"):
        forward_projection_cnn((1, 8, 8), 3, (4, 6), "none")
    with pytest.raises(ValueError, match="border is 'copy', expected one of replicate, none, zeros"):
        forward_projection_cnn((1, 8, 8), 3, border="copy")  # type: ignore[arg-type]


def test_numbers_of_maps_that_are_not_averaged() -> None:
    """Their readout has a column of ones for each of 16 places: one column of ones, its penalty divided by 16."""
    z = _numbers("convpad/flatten/")
    x = z["X_readout"].flatten(1)
    fit = ridge.solve_rows(x, z["Z2"].flatten(1), 1.0)
    torch.testing.assert_close(fit.weights, z["W2"], rtol=0, atol=1e-12)


# -- layers -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(3, 4, (3, 2), (2, 1), (1, 2), padding_mode="replicate"),
        nn.Conv2d(3, 4, 3, padding="same", dilation=2, bias=False),
        nn.Conv2d(3, 4, 2, padding=1, padding_mode="reflect"),
        nn.Conv1d(3, 4, 3, 2, 1),
        nn.Conv1d(3, 4, 2, padding="same", padding_mode="circular"),
        nn.Linear(5, 4),
    ],
)
def test_rows_times_weights_are_what_the_layer_gives(layer: Any) -> None:
    x = torch.randn(2, 3, 7) if isinstance(layer, nn.Conv1d) else torch.randn(2, 3, 7, 5)
    made = layer(x)
    seen = LinearLayer("it", layer, 0, 1, made.numel() // 8, ())
    rows = seen.rows(x)
    assert rows.shape == (2 * seen.positions, seen.features)
    found = rows @ layer.weight.flatten(1).T + (0 if layer.bias is None else layer.bias)
    wanted = made.flatten(0, -2) if isinstance(layer, nn.Linear) else made.flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(found, wanted)
    weights, intercept = torch.randn(seen.features, 4), torch.randn(4)
    seen.write(weights, intercept)
    torch.testing.assert_close(layer.weight.flatten(1).T, weights)


class _Twice(nn.Module):
    """The same layer twice, behind one that no pass runs."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(6, 6)
        self.twice = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.twice(self.twice(x).relu()).relu())


def test_layers_are_found_in_the_order_of_the_pass_and_read_every_call() -> None:
    net = Blocks({"first": _Twice(), "second": nn.Sequential(nn.Linear(6, 5), nn.Tanh())}, nn.Linear(5, 3)).double()
    batch = _classes()
    rule = _attached(ForwardProjection(), net, batch)
    assert [(layer.name, layer.calls) for layer in rule.layers] == [("first.twice", 2), ("second", 1), ("readout", 1)]
    before = rule.layers[0].module.weight.clone()
    list(rule.updates(batch))
    assert float(rule.sums.moments.rows[1]) == 120
    _fit(rule, [batch])
    assert not torch.equal(rule.layers[0].module.weight, before)


def test_tokens_are_rows_and_a_class_token_is_read_by_the_readout() -> None:
    net = vit((3, 8, 8), 3, patch=4, width=8, heads=2, depth=1).double()
    batch = Batch(torch.randn(40, 3, 8, 8).double(), torch.arange(40) % 3)
    rule = _attached(ForwardProjection(), net, batch)
    assert [layer.positions for layer in rule.layers] == [4, 5, 5, 5, 5, 1]
    _fit(rule, _split(batch, 16))
    assert bool(rule.predict(batch.inputs).isfinite().all())


# -- properties -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["sums", "rows"])
def test_batches_and_chunks_change_nothing(form: Any) -> None:
    batch, results = _classes(), []
    for size, rows in ((60, 16384), (7, 3)):
        torch.manual_seed(0)
        net = mlp((6,), 3, (9, 8), readout_bias=True).double()
        rule = _attached(ForwardProjection(form=form, rows=rows), net, batch)
        _fit(rule, _split(batch, size))
        results.append(torch.cat([p.flatten() for p in net.parameters()]))
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)


def test_draws_come_back_from_the_seed_and_travel_in_the_state() -> None:
    batch = _classes()
    rule = _attached(ForwardProjection(seed=3), mlp((6,), 3, (9, 8)).double(), batch)
    list(rule.updates(batch))
    q, u = rule.draws(rule.layers[0])
    assert q.shape == (7, 9)
    assert u.shape == (3, 9)
    assert torch.equal(rule.state_dict()["projections.q"], q.double())
    assert torch.equal(rule.state_dict()["projections.u"], u.double())
    other = _attached(ForwardProjection(seed=4), mlp((6,), 3, (9, 8)).double(), batch)
    assert not torch.equal(other.draws(other.layers[0])[0], q)
    assert not torch.equal(rule.draws(rule.layers[1])[1][:, :8], u[:, :8])


def test_labels_alone_give_weights_of_the_rank_of_the_classes() -> None:
    batch = _classes()
    net = mlp((6,), 3, (20,)).double()
    rule = _attached(ForwardProjection(target="label"), net, batch)
    _fit(rule, [batch])
    weight = net[0][1].weight if isinstance(net[0][0], nn.Flatten) else net[0][0].weight  # type: ignore[index]
    assert int(torch.linalg.matrix_rank(weight, rtol=1e-8)) == 3


def test_shuffled_labels_teach_nothing() -> None:
    """Of labels that are thirds of a projection of noise; on held-out data chance is one third."""
    inputs = torch.randn(1200, 6).double()
    labels = ((inputs @ torch.randn(6).double()).argsort().argsort() // 400).long()
    held_out, accuracy = Batch(inputs[600:], labels[600:]), []
    for draw in range(9):
        shuffled = labels[:600] if draw == 0 else labels[:600][torch.randperm(600)]
        batch = Batch(inputs[:600], shuffled)
        rule = _attached(ForwardProjection(), mlp((6,), 3, (30, 30), readout_bias=True).double(), batch)
        _fit(rule, [batch])
        accuracy.append(float((rule.predict(held_out.inputs).argmax(1) == held_out.targets).double().mean()))
    assert accuracy[0] > 0.8
    assert abs(sum(accuracy[1:]) / 8 - 1 / 3) < 0.05


def test_nothing_is_differentiated_and_memory_does_not_grow() -> None:
    """No weight takes gradients, everything runs in inference mode, and what is made grows neither with depth nor with N."""
    largest = []
    for samples, depth in ((64, 2), (256, 2), (64, 6)):
        batch = _classes(samples)
        rule = _attached(ForwardProjection(), mlp((6,), 3, (12,) * depth).double(), batch)
        made = [0]

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                out = func(*args, **(kwargs or {}))
                sizes = [t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
                made[0] = max([*made, *sizes])  # noqa: B023
                return out

        with torch.inference_mode(), Watch():
            _fit(rule, _split(batch, 32))
        assert not any(p.requires_grad for p in rule.parameters())
        largest.append(made[0])
    assert largest[0] == largest[1] == largest[2] == 32 * 13 - 32


def test_some_positions_are_drawn_for_every_sample() -> None:
    net = Blocks({"conv": nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten())}, nn.Linear(64, 3)).double()
    batch = Batch(torch.randn(10, 2, 6, 6).double(), torch.arange(10) % 3)
    for positions, rows in ((5, 50), (16, 160), (99, 160)):
        rule = _attached(ForwardProjection(positions=positions), net.requires_grad_(), batch)
        list(rule.updates(batch))
        assert float(rule.sums.moments.rows[1]) == rows
        all_rows = rule.layers[0].rows(batch.inputs)
        if positions > 5:
            torch.testing.assert_close(rule.sums.moments.sums, all_rows.sum(0))
        else:
            chosen = rule._some(10, 16, torch.device("cpu"))
            assert chosen.unique().numel() == 50
            assert (chosen // 16).tolist() == [i for i in range(10) for _ in range(5)]


def test_frozen_layers_stay_as_they_are() -> None:
    net = mlp((6,), 3, (9, 8)).double()
    net[0].requires_grad_(False)
    before = [p.clone() for p in net[0].parameters()]
    batch = _classes()
    rule = _attached(ForwardProjection(), net, batch)
    assert rule.stages == [[], []]
    _fit(rule, [batch])
    assert all(torch.equal(a, b) for a, b in zip(before, net[0].parameters(), strict=True))


@pytest.mark.parametrize("make", [ForwardProjection, Ridge])
def test_layers_that_are_not_fitted_may_be_what_they_like(make: Any) -> None:
    first = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 4, 1, groups=2)), nn.ReLU())
    net = Blocks({"conv": first}, nn.Sequential(nn.Flatten(), nn.Linear(16, 3)))
    if make is ForwardProjection:
        net[0].requires_grad_(False)
    batch = Batch(torch.randn(30, 2, 2, 2), torch.arange(30) % 3)
    rule = _attached(make(lambda_=1.0) if make is Ridge else make(), net, batch)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    _fit(rule, [batch])
    assert [name for name, value in net.state_dict().items() if not torch.equal(value, before[name])] == [
        name for name in before if name.startswith("readout")
    ]


def test_hidden_layers_of_the_random_control_are_drawn_and_not_fitted() -> None:
    net = mlp((6,), 3, (9, 8), readout_bias=True).double()
    batch = _classes()
    rule = _attached(ForwardProjection(target="random", seed=5), net, batch)
    weights, bias = rule.layers[0].module.weight, rule.layers[0].module.bias
    torch.testing.assert_close(
        torch.cat((weights, bias[:, None]), 1).norm(dim=0), torch.ones(7).double(), rtol=0, atol=1e-6
    )
    before = weights.clone()
    _fit(rule, [batch])
    assert torch.equal(weights, before)
    assert rule.variant == "target=random"


# -- ridge ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["sums", "rows"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("samples", [60, 10])
def test_the_penalty_is_the_one_with_the_least_errors_on_rows_left_out(form: Any, bias: bool, samples: int) -> None:
    batch, grid = _classes(samples), [0.01, 1.0, 100.0]
    net = mlp((6,), 3, (20,), readout_bias=bias).double()
    rule = _attached(Ridge(grid=grid, form=form), net, batch)
    _fit(rule, _split(batch, 16))
    x, y = next(net.features(batch.inputs)), F.one_hot(batch.targets, 3).double()
    errors = []
    for penalty in grid:
        total = 0.0
        for i in range(samples):
            rest = torch.arange(samples) != i
            fit = ridge.solve_rows(x[rest], y[rest], penalty, "free" if bias else "none")
            total += float((y[i] - fit(x[i : i + 1])[0]).square().sum())
        errors.append(total / samples)
    told = rule.diagnostics()["readout"]
    assert told["lambda"] == grid[errors.index(min(errors))]
    assert told["loo_error"] == pytest.approx(min(errors), rel=1e-9)
    fit = ridge.solve_rows(x, y, told["lambda"], "free" if bias else "none")
    torch.testing.assert_close(rule.predict(batch.inputs), fit(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("maps", [False, True])
def test_regressions_are_fitted_as_they_are(maps: bool) -> None:
    if maps:
        last: nn.Module = nn.Conv2d(4, 2, 1)
        net = Blocks({"conv": nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh())}, last).double()
        x = torch.randn(30, 1, 5, 5).double()
    else:
        net, x = mlp((6,), 2, (8,), readout_bias=True).double(), torch.randn(30, 6).double()
    with torch.no_grad():
        y = net(x) + 3
    rule = _attached(Ridge(lambda_=0.0, rows=7), net, Batch(x, y), y[0].numel(), classes=False)
    _fit(rule, _split(Batch(x, y), 11))
    torch.testing.assert_close(rule.predict(x), y, rtol=0, atol=1e-9)


def test_only_the_last_layer_moves() -> None:
    net = mlp((6,), 3, (8, 8)).double()
    before = [p.clone() for block in net for p in block.parameters()]
    batch = _classes()
    _fit(_attached(Ridge(lambda_=1.0), net, batch), [batch])
    assert all(torch.equal(a, b) for a, b in zip(before, (p for block in net for p in block.parameters()), strict=True))


# -- costs and claims ---------------------------------------------------------------------------------------------------------
def test_costs_of_every_pass_are_those_of_the_formulas() -> None:
    batch = _classes(24)
    rule = _attached(ForwardProjection(), mlp((6,), 3, (10, 8)).double(), batch)
    cost = measure_update(rule, batch, True)
    forward = [2 * 6 * 10, 2 * 10 * 8]
    hidden = [2 * ridge.gather_macs(d, w) + 2 * d * w for d, w in ((6, 10), (10, 8))]
    labels = [2 * 3 * w for w in (10, 8)]
    wanted = [
        hidden[0] + labels[0],
        forward[0] + hidden[1] + labels[1],
        sum(forward) + 2 * ridge.gather_macs(8, 3),
    ]
    assert [stage.row_flops for stage in cost.stages] == wanted
    solved = [ridge.solve_flops(7, 10), ridge.solve_flops(11, 8), ridge.solve_flops(8, 3)]
    assert [stage.once_flops for stage in cost.stages] == solved
    assert not cost.uncounted
    sums = [8 * (d * d + d * w + d + w + 2) for d, w in ((6, 10), (10, 8), (8, 3))]
    draws = [8 * ((d + 1) * w + 3 * w) for d, w in ((6, 10), (10, 8))]
    assert [stage.cache_bytes for stage in cost.stages] == [sums[0] + draws[0], sums[1] + draws[1], sums[2]]
    assert cost.activation_peak_bytes == batch.inputs.numel() * 8 + batch.targets.numel() * 8


class _Differentiates(ForwardProjection):
    def _conclude(self, number: int) -> None:
        super()._conclude(number)
        with torch.enable_grad():
            torch.autograd.grad(self.blocks.requires_grad_()(self.example).sum(), next(self.blocks.parameters()))
        self.blocks.requires_grad_(False)


def test_the_audit_sees_what_the_end_of_a_pass_does() -> None:
    batch = _classes(24)._replace(index=torch.arange(24))
    rule = _attached(_Differentiates(), mlp((6,), 3, (8, 8)).double(), batch)
    rule.example = batch.inputs[:2].clone()
    assert not audit(rule, batch, 5, 7).confirmed
    result = audit(_attached(ForwardProjection(), mlp((6,), 3, (8, 8)).double(), batch), batch, 5, 7)
    assert result.confirmed
    assert result.reason == "autograd never ran"


# -- refusals ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ForwardProjection(lambda_=-1.0), "lambda_ is -1.0, expected a number of at least 0"),
        (lambda: ForwardProjection(readout_lambda=float("inf")), "readout_lambda is inf"),
        (lambda: ForwardProjection(target="labels"), "target is 'labels', expected one of projection, label"),  # type: ignore[arg-type]
        (lambda: ForwardProjection(form="gram"), "form is 'gram', expected one of sums, rows"),  # type: ignore[arg-type]
        (lambda: ForwardProjection(positions=0), "positions is 0, expected a whole number"),
        (lambda: ForwardProjection(rows=1.5), "rows is 1.5"),  # type: ignore[arg-type]
        (lambda: ForwardProjection(seed=2**47), "seed is 140737488355328, expected a number of at most 47 bits"),
        (lambda: ForwardProjection(memory_gib=0), "memory_gib is 0"),
        (lambda: Ridge(lambda_=-2), "lambda_ is -2, expected a number of at least 0, or loo"),
        (lambda: Ridge(lambda_="cv"), "lambda_ is 'cv', expected a number of at least 0, or loo"),  # type: ignore[arg-type]
        (lambda: Ridge(grid=[]), "grid is"),
        (lambda: Ridge(grid=[1.0, -1.0]), "a value of grid is -1.0"),
        (lambda: Ridge(lambda_=1.0, grid=[1.0]), "leave one of them out"),
        (lambda: Ridge(intercept="none"), "intercept is 'none', expected free or penalised"),  # type: ignore[arg-type]
    ],
)
def test_settings_out_of_range_are_refused(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def _readout(module: nn.Module | None) -> Blocks:
    return Blocks({"first": nn.Sequential(nn.Linear(6, 4), nn.ReLU())}, module)


def test_an_activation_behind_the_readout_is_refused_although_all_scores_are_positive() -> None:
    for inplace in (False, True):
        linear = nn.Linear(4, 3)
        nn.init.constant_(linear.bias, 9.0)
        net = _readout(nn.Sequential(linear, nn.ReLU(inplace=inplace)))
        with pytest.raises(ValueError, match="changes what its last linear layer"):
            Ridge().attach(net, TaskInfo(Batch(torch.rand(2, 6), torch.arange(2)), 3, F.cross_entropy))


@pytest.mark.parametrize(
    ("net", "says"),
    [
        (_readout(None), "no readout"),
        (_readout(nn.Sequential(nn.Linear(4, 3), nn.ReLU())), "changes what its last linear layer 'readout' gives"),
        (_readout(nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))), "changes what its last linear layer"),
        (_readout(nn.Softmax(1)), "ends in no linear layer"),
        (_readout(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))), "'readout' has a .* makes its weight from"),
    ],
)
@pytest.mark.parametrize("make", [ForwardProjection, Ridge])
def test_a_readout_that_is_not_linear_is_refused(net: Blocks, says: str, make: Any) -> None:
    batch = _classes()
    batch = batch._replace(inputs=batch.inputs.float())
    with pytest.raises(ValueError, match=says):
        _attached(make(), net, batch)
    assert all(p.requires_grad for p in net.parameters())


def test_what_the_rules_cannot_take_is_refused() -> None:
    batch, net = _classes(), mlp((6,), 3, (4,)).double()
    with pytest.raises(ValueError, match=r"projects class labels .* use ridge"):
        _attached(ForwardProjection(), net, batch, classes=False)
    with pytest.raises(ValueError, match="a sample's targets are 2 numbers and the network's output is 3"):
        _attached(Ridge(), net, Batch(batch.inputs, torch.randn(60, 2)), classes=False)
    with pytest.raises(ValueError, match=r"layer 'layer1', which reads 6 numbers: .* algorithm.memory_gib is 1e-07"):
        _attached(ForwardProjection(memory_gib=1e-7), net, batch)
    with pytest.raises(ValueError, match="part of a graph"):
        list(_attached(Ridge(), net, batch).updates(batch._replace(rows=torch.arange(3))))
    grouped = Blocks({"conv": nn.Conv2d(2, 4, 1, groups=2)}, nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
    with pytest.raises(ValueError, match="layer 'conv' is a convolution in 2 groups"):
        find_layers(grouped, Batch(torch.randn(2, 2, 1, 1), torch.arange(2)), "ForwardProjection")
    with pytest.raises(ValueError, match=r"positions is 5, and lambda_ is loo, .* give lambda_ a number"):
        Ridge(positions=5)
    with pytest.raises(ValueError, match="give class ids"):
        list(_attached(Ridge(), mlp((6,), 3, (4,)).double(), batch).updates(batch._replace(targets=torch.rand(60))))


@pytest.mark.parametrize("make", [lambda: ForwardProjection(lambda_=0), lambda: Ridge(grid=[0.0])])
def test_singular_equations_name_the_layer(make: Any) -> None:
    batch = _classes()
    batch.inputs[:, 3] = batch.inputs[:, 2]
    net = Blocks({"only": nn.Linear(6, 6)}, nn.Linear(6, 3)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(6))  # type: ignore[union-attr]
    rule = _attached(make(), net, batch)
    with pytest.raises(ridge.Singular, match=r"layer '(only|readout)' cannot be solved for: (the features of 60|no λ)"):
        _fit(rule, [batch])
