"""Forward gradients of local losses, against autograd slice by slice, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from locallearn.algorithms import ForwardGradient, TaskInfo
from locallearn.algorithms.forward_gradient._local import LocalForwardGradient, LocalReadout
from locallearn.audit import audit
from locallearn.batch import Batch
from locallearn.cost import measure_update
from locallearn.functional.forward_gradient import tangents
from locallearn.functional.local_losses import replicated_losses
from locallearn.nets import Blocks, local_mixer, mlp, vit
from locallearn.nets.local_mixer import MixerBlock, Normalised, normalised


def _attached(net: Blocks, batch: Batch, **settings: Any) -> LocalForwardGradient:
    rule = ForwardGradient(losses="local", **{"perturb": "activities", **settings})
    assert isinstance(rule, LocalForwardGradient)
    example = batch._replace(inputs=batch.inputs[:2], targets=batch.targets[:2])
    rule.attach(net, TaskInfo(example, 3, F.cross_entropy))
    return rule


def _mixer(blocks: int = 2, samples: int = 3) -> tuple[Blocks, Batch]:
    net = local_mixer((2, 8, 8), 3, blocks=blocks, patches=2, channels=6, groups=2).double()
    return net, Batch(torch.randn(samples, 2, 8, 8).double(), torch.arange(samples) % 3)


def _perceptron(samples: int = 4) -> tuple[Blocks, Batch]:
    return mlp((7,), 3, (6, 4)).double(), Batch(torch.randn(samples, 7).double(), torch.arange(samples) % 3)


def _convolutions() -> tuple[Blocks, Batch]:
    """Of which the first hands on all places, and the second pools them."""
    first = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True))
    second = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.MaxPool2d(2))
    net = Blocks(
        {"first": first, "second": second}, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    )
    return net.double(), Batch(torch.randn(3, 2, 4, 4).double(), torch.arange(3))


def _as_patches(output: Tensor) -> Tensor:
    return output[:, None] if output.ndim == 2 else output.flatten(2).mT if output.ndim == 4 else output


def _features(head: LocalReadout, output: Tensor) -> Tensor:
    found = _as_patches(output)
    return normalised(found, head.groups) if head.normalises else found


def _pooled(head: LocalReadout, output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(_features(head, output).mean(1), head.weight, head.bias), targets)


def _where(block: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Modules whose outputs are perturbed, and the layers whose weights learn from it, in the order of the calls."""
    if isinstance(block, MixerBlock):
        places = [block.across, block.within, block.grouped] if block.across else [block.within, block.grouped]
        return [(m, m.layer) for m in places if isinstance(m, Normalised)]
    return [(m, m) for m in block.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def _expected(
    rule: LocalForwardGradient, batch: Batch, seed: int, groups: int, slices: Any
) -> dict[nn.Parameter, Tensor]:
    """Block by block with autograd: slopes of replicated losses along what was drawn, and products of layers by themselves.

    ``slices(u, axis)`` is a view of a perturbed output with its patches and groups in front, for the loop over slices.
    """
    draw = torch.Generator().manual_seed(seed)
    made: dict[nn.Parameter, Tensor] = {}
    x = batch.inputs
    for index, (block, head) in enumerate(zip(rule.blocks, rule.heads, strict=True)):
        assert isinstance(head, LocalReadout)
        outputs: list[Tensor] = []
        given: list[tuple[Any, ...]] = []
        relus: list[Tensor] = []

        def keep(m: nn.Module, inputs: Any, output: Tensor, outputs: Any = outputs, given: Any = given) -> Tensor:
            given.append(tuple(None if i is None else i.detach() for i in inputs))
            outputs.append(output)
            return output.clone()

        def relu(m: nn.Module, inputs: Any, output: Tensor, relus: Any = relus) -> None:
            relus.append(output.detach().clone() > 0)

        where = _where(block)
        hooks = [m.register_forward_hook(keep) for m, _ in where]
        hooks += [m.register_forward_hook(relu) for m in block.modules() if isinstance(m, nn.ReLU)]
        output = block(x)
        for hook in hooks:
            hook.remove()
        us = [tangents(out.shape, "gaussian", draw, dtype=torch.float64) for out in outputs]
        losses = replicated_losses(_features(head, output), head.weight, head.bias, batch.targets, groups)
        weighed = [torch.zeros_like(u) for u in us]
        for p in range(losses.shape[1]):
            for g in range(losses.shape[2]):
                # Of one slice's loss along directions that are zero in all other slices.
                along = [u * slices(index, i, u.shape, p, g) for i, u in enumerate(us)]
                grads = torch.autograd.grad(losses[:, p, g].sum(), outputs, retain_graph=True)
                c = sum((grad * u).flatten(1).sum(1) for grad, u in zip(grads, along, strict=True))
                assert isinstance(c, Tensor)
                for w, u in zip(weighed, along, strict=True):
                    w += c.view(-1, *[1] * (u.ndim - 1)) * u
        for (module, layer), inputs, w, on in zip(where, given, weighed, relus, strict=True):
            out = module(*inputs)
            grads = torch.autograd.grad(out, list(layer.parameters()), w * on / len(x))
            made.update(zip(layer.parameters(), grads, strict=True))
        made.update(
            zip(
                head.parameters(),
                torch.autograd.grad(_pooled(head, output, batch.targets), list(head.parameters())),
                strict=True,
            )
        )
        x = output.detach()
    assert rule.blocks.readout is not None
    loss = F.cross_entropy(rule.blocks.readout(x), batch.targets)
    readout = list(rule.blocks.readout.parameters())
    return {**made, **dict(zip(readout, torch.autograd.grad(loss, readout), strict=True))}


def _mixer_slice(block: int, call: int, shape: Any, patch: int, group: int) -> Tensor:
    """The mixing of patches reaches all groups of its patch, the other two maps their own group."""
    mask = torch.zeros(shape).double()
    channels = slice(None) if block == 1 and call == 0 else slice(3 * group, 3 * group + 3)
    mask[:, patch, channels] = 1
    return mask


def _width_slice(block: int, call: int, shape: Any, patch: int, group: int) -> Tensor:
    mask = torch.zeros(shape).double()
    half = shape[1] // 2
    mask[:, half * group : half * (group + 1)] = 1
    return mask


def _map_slice(block: int, call: int, shape: Any, patch: int, group: int) -> Tensor:
    """Channels of one place; where places are pooled, of all places."""
    mask = torch.zeros(shape).double()
    if block == 0:
        mask[:, 2 * group : 2 * group + 2, patch // 4, patch % 4] = 1
    else:
        mask[:, 2 * group : 2 * group + 2] = 1
    return mask


@pytest.mark.parametrize(
    ("make", "slices"), [(_mixer, _mixer_slice), (_perceptron, _width_slice), (_convolutions, _map_slice)]
)
def test_one_pass_gives_what_slices_give_one_by_one(make: Callable[[], tuple[Blocks, Batch]], slices: Any) -> None:
    """All slices perturbed at once, in forward mode, against a loop over them in which nothing else is perturbed."""
    net, batch = make()
    rule = _attached(net, batch, seed=5, groups=2)
    found = {p: g for update in rule.updates(batch) for p, g in (update.gradients or {}).items()}
    wanted = _expected(rule, batch, 5, 2, slices)
    assert found.keys() == wanted.keys() == set(rule.parameters())
    for p, gradient in wanted.items():
        assert torch.allclose(found[p], gradient, atol=1e-10)


@pytest.mark.parametrize("settings", [{}, {"tangents": 2, "noise": "rademacher", "mask": False}])
def test_blocks_learn_the_gradient_of_their_pooled_loss_on_average(settings: Any) -> None:
    net, batch = _mixer()
    rule = _attached(net, batch, **settings)
    wanted, x = [], batch.inputs
    for block, head in zip(net, rule.heads, strict=True):
        assert isinstance(head, LocalReadout)
        output = block(x)
        wanted += torch.autograd.grad(_pooled(head, output, batch.targets), list(block.parameters()))
        x = output.detach()
    learned = [p for block in net for p in block.parameters()]
    draws = []
    for _ in range(40):
        made = {p: g for update in rule.updates(batch) for p, g in (update.gradients or {}).items()}
        draws.append(torch.cat([made[p].flatten() for p in learned]))
    found, g = torch.stack(draws), torch.cat([w.flatten() for w in wanted])
    assert bool(((found.mean(0) - g).abs() <= 5 * found.std(0) / len(found) ** 0.5 + 1e-12).all())


def test_no_noise_where_a_relu_is_off_is_less_noise() -> None:
    net, batch = mlp((7,), 3, (30,)), Batch(torch.randn(4, 7), torch.arange(4) % 3)
    spread = []
    for mask in (None, False):
        rule = _attached(net, batch, mask=mask)
        draws = [update.gradients or {} for _ in range(60) for update in rule.updates(batch) if update.unit == "layer1"]
        weight = net[0].get_parameter("0.weight")
        spread.append(torch.stack([made[weight] for made in draws]).var(0).sum())
    assert spread[0] < 0.8 * spread[1]


@pytest.mark.parametrize("make", [_mixer, _perceptron, _convolutions])
def test_directions_of_weights_are_weighed_by_the_pooled_loss_of_their_block(
    make: Callable[[], tuple[Blocks, Batch]],
) -> None:
    net, batch = make()
    rule = _attached(net, batch, perturb="weights", seed=3)
    draw, x = torch.Generator().manual_seed(3), batch.inputs
    for block, head, update in zip(net, rule.heads, rule.updates(batch), strict=False):
        assert isinstance(head, LocalReadout)
        output = block(x)
        weights = list(block.parameters())
        loss = _pooled(head, output, batch.targets)
        grads = torch.autograd.grad(loss, [*weights, *head.parameters()])
        g = torch.cat([grad.flatten() for grad in grads[: len(weights)]])
        v = tangents((1, len(g)), "gaussian", draw, dtype=torch.float64)[0]
        made = update.gradients or {}
        assert torch.allclose(torch.cat([made[p].flatten() for p in weights]), (g @ v) * v, atol=1e-10)
        for p, wanted in zip(head.parameters(), grads[len(weights) :], strict=True):
            assert torch.allclose(made[p], wanted, atol=1e-12)
        assert update.loss is not None
        assert torch.allclose(update.loss, loss)
        x = output.detach()


@pytest.mark.parametrize("perturb", ["weights", "activities"])
def test_no_tangent_crosses_a_border(perturb: Any) -> None:
    """What later blocks hold changes nothing, and what a block is given has no derivative."""
    made = []
    for other in (False, True):
        torch.manual_seed(0)
        net, batch = _mixer(blocks=3)
        if other:
            with torch.no_grad():
                for p in net[2].parameters():
                    p.mul_(-3)
        rule = _attached(net, batch, perturb=perturb, seed=1)
        seen: list[bool] = []

        def look(block: nn.Module, given: tuple[Tensor, ...], seen: list[bool] = seen) -> None:
            seen.append(forward_ad.unpack_dual(given[0])[1] is None)

        for block in net:
            block.register_forward_pre_hook(look)
        updates = rule.updates(batch)
        made.append([g for _ in range(2) for g in (next(updates).gradients or {}).values()])
        assert seen
        assert all(seen)
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_no_backward_pass() -> None:
    net, batch = _mixer(
        blocks=1
    )  # of several blocks and both kinds of directions the conformance suite audits a perceptron
    result = audit(_attached(net, batch), batch)
    assert result.confirmed
    assert result.verdict == "forward-only"


@pytest.mark.parametrize("perturb", ["weights", "activities"])
def test_every_operation_is_known(perturb: Any) -> None:
    net, batch = _mixer()
    assert measure_update(_attached(net, batch, perturb=perturb), batch).uncounted == ()


def test_one_pass_carries_all_slices() -> None:
    """More groups are no more operations."""
    net, batch = mlp((16,), 3, (8, 8)), Batch(torch.randn(4, 16), torch.arange(4) % 3)
    flops = [measure_update(_attached(net, batch, groups=groups), batch).flops for groups in (1, 2, 8)]
    assert flops[0] == flops[1] >= flops[2]  # of a group of one channel there is nothing to sum


def test_peak_bytes_do_not_grow_with_depth() -> None:
    batch = Batch(torch.randn(8, 16), torch.arange(8) % 3)
    for perturb in ("weights", "activities"):
        peaks = [
            measure_update(_attached(mlp((16,), 3, (16,) * depth), batch, perturb=perturb), batch).activation_peak_bytes
            for depth in (3, 9)
        ]
        assert peaks[0] == peaks[1]


def test_what_tokens_see_of_one_another_is_summed() -> None:
    """Attention mixes tokens, and the perceptron behind it does not: nothing has to be said for it."""
    net = vit((3, 8, 8), 3, patch=4, width=8, heads=2, depth=1)
    for name, p in net.named_parameters():
        p.requires_grad_("qkv" in name or "proj" in name or "mlp" in name or "readout.2" in name)
    rule = _attached(net, Batch(torch.randn(2, 3, 8, 8), torch.arange(2)))
    [part] = rule._parts
    reach = {name.rpartition("layer1.")[2]: tuple(found) for name, found in part._reach.items()}  # type: ignore[union-attr]
    assert reach == {"1.qkv": (False, True), "1.proj": (True, True), "1.mlp.0": (True, True), "1.mlp.2": (True, True)}


class _Leaks(nn.Module):
    """The second half of the channels sees the first, and not the other way round; weights that start at zero hide it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.gate = nn.Linear(2, 2)
        nn.init.zeros_(self.gate.weight)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layer(x).relu().chunk(2, 1)
        return torch.cat((first, second + self.gate(first)), 1)


def test_groups_that_see_one_another_share_their_losses() -> None:
    net = Blocks({"leaks": _Leaks()}, nn.Linear(4, 3))
    rule = _attached(net, Batch(torch.randn(4, 6), torch.arange(4) % 3), groups=2)
    [part] = rule._parts
    assert not part._reach["members.leaks.layer"].group  # type: ignore[union-attr]


class _Reads(nn.Module):
    """A ReLU whose input somebody else reads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        made = self.layer(x)
        out: Tensor = self.relu(made) + made.abs()
        return out


def test_a_mask_that_would_hide_a_part_of_the_gradient_is_refused() -> None:
    batch = Batch(torch.randn(4, 6), torch.arange(4) % 3)
    with pytest.raises(ValueError, match="read by more than the ReLU behind it"):
        _attached(Blocks({"odd": _Reads()}, nn.Linear(4, 3)), batch)
    _attached(Blocks({"odd": _Reads()}, nn.Linear(4, 3)), batch, mask=False)


@pytest.mark.parametrize(
    ("net", "settings", "words"),
    [
        (
            lambda: mlp((6,), 3, (5,)),
            {"groups": 2},
            "groups is 2, which does not divide the 5 channels of block 'layer1'",
        ),
        (lambda: Blocks({"a": nn.Linear(6, 3)}), {}, "this network has no readout"),
        (
            lambda: Blocks({"a": nn.Linear(6, 4)}, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))),
            {},
            "'readout.0.weight' learns",
        ),
        (lambda: Blocks({"a": nn.Linear(6, 3)}, nn.Flatten()), {}, "does not end in a linear layer"),
        (
            lambda: Blocks({"a": nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))}, nn.Linear(4, 3)),
            {},
            "samples see one another",
        ),
    ],
)
def test_networks_that_cannot_learn_so_are_refused(net: Callable[[], Blocks], settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _attached(net(), Batch(torch.randn(4, 6), torch.arange(4) % 3), **settings)


def test_groups_of_a_mixer_keep_two_channels() -> None:
    with pytest.raises(ValueError, match="groups is 6, as many as block 'block1' has channels"):
        _attached(*_mixer(), groups=6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"losses": "block"}, "losses is 'block', expected global, local"),
        ({"groups": 2}, "groups is 2, and only losses=local with perturb=activities"),
        ({"losses": "local", "groups": 2}, "groups is 2, and only losses=local with perturb=activities"),
        (
            {"losses": "local", "perturb": "activities", "groups": 0},
            "groups is 0, expected a whole number of at least 1",
        ),
        ({"mask": True}, "mask is of noise in activities"),
        ({"perturb": "activities", "mask": "on"}, "mask is 'on', expected true, false or null"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ForwardGradient(**settings)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (TaskInfo(Batch(torch.randn(2, 7), torch.randn(2, 3)), 3, F.mse_loss, classes=False), "this task has none"),
        (
            TaskInfo(Batch(torch.randn(2, 7), torch.arange(2)), 3, nn.CrossEntropyLoss(label_smoothing=0.1)),
            "this task's loss is another",
        ),
        (
            TaskInfo(Batch(torch.randn(2, 7), torch.arange(2)), 3, nn.CrossEntropyLoss(torch.tensor([1.0, 1.0, 5.0]))),
            "this task's loss is another",
        ),
    ],
)
def test_losses_without_a_closed_form_are_refused(task: TaskInfo, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ForwardGradient(losses="local").attach(mlp((7,), 3, (6,)), task)


def test_one_global_loss_knows_the_layers_of_a_mixer_and_masks() -> None:
    """FG-A on LocalMixer: unbiased as elsewhere, with less noise under a mask."""
    net, batch = _mixer()
    assert isinstance(net.readout, nn.Sequential)
    nn.init.normal_(net.readout[2].weight)
    g = torch.cat(
        [
            x.flatten()
            for x in torch.autograd.grad(F.cross_entropy(net(batch.inputs), batch.targets), [*net.parameters()])
        ]
    )
    spread = []
    for mask in (None, True):
        rule = ForwardGradient(perturb="activities", mask=mask)
        rule.attach(net, TaskInfo(batch, 3, F.cross_entropy))
        draws = []
        for _ in range(30):
            [update] = list(rule.updates(batch))
            draws.append(torch.cat([(update.gradients or {})[p].flatten() for p in net.parameters()]))
        found = torch.stack(draws)
        assert bool(((found.mean(0) - g).abs() <= 5 * found.std(0) / len(found) ** 0.5 + 1e-12).all())
        spread.append(found.var(0).sum())
    assert spread[1] < spread[0]


def test_it_learns() -> None:
    """Steps of plain SGD on the paper's network, a small one: the loss of every block falls."""
    torch.manual_seed(0)
    net = local_mixer((1, 8, 8), 3, blocks=2, patches=2, channels=16, groups=4)
    targets = torch.arange(60) % 3
    batch = Batch(torch.randn(3, 1, 8, 8)[targets] + 0.3 * torch.randn(60, 1, 8, 8), targets)
    rule = _attached(net, batch)
    optimizers = {name: torch.optim.SGD(groups, lr=0.05) for name, groups in rule.units().items()}
    losses = []
    for _ in range(25):
        losses.append([])
        for update in rule.updates(batch):
            losses[-1].append(float(update.loss or 0))
            update.backward()
            optimizers[update.unit].step()
            optimizers[update.unit].zero_grad()
    assert all(after < 0.5 * before for before, after in zip(losses[0], losses[-1], strict=True))
    assert (rule.predict(batch.inputs).argmax(1) == targets).float().mean() > 0.9
