"""Muon against PyTorch's own on the same matrix, and SGD against PyTorch's on everything else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from locallearn.strategies import Muon
from locallearn.strategies.muon import orthogonalised


def _step(optimizer: torch.optim.Optimizer, weight: Tensor, gradients: list[Tensor]) -> None:
    for gradient in gradients:
        weight.grad = gradient.reshape(weight.shape).clone()
        optimizer.step()


@pytest.mark.parametrize("shape", [(4, 2, 3, 3), (40, 2, 3, 3)])
def test_a_convolution_is_stepped_as_pytorchs_muon_steps_its_matrix(shape: tuple[int, ...]) -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon to compare with")
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    theirs = nn.Parameter(ours.detach().flatten(1).clone())
    gradients = [torch.randn(shape) for _ in range(3)]
    _step(Muon([ours], lr=0.1, momentum=0.9, weight_decay=0.2), ours, gradients)
    _step(torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.2), theirs, gradients)
    assert torch.allclose(ours.flatten(1), theirs, atol=1e-3)  # the iteration computes in bfloat16


def test_the_matrix_comes_near_to_an_orthogonal_one() -> None:
    torch.manual_seed(0)
    for shape in ((6, 20), (20, 6)):
        matrix = torch.randn(shape)
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        found = orthogonalised(matrix).float()
        assert found.shape == matrix.shape
        inside = torch.linalg.svdvals(found)
        assert inside.min() > 0.6
        assert inside.max() < 1.3
        assert (found * (left @ right)).sum() / (found.norm() * 6**0.5) > 0.97
    assert torch.equal(orthogonalised(torch.zeros(3, 4)).float(), torch.zeros(3, 4))


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_all_other_weights_are_stepped_by_sgd(momentum: float) -> None:
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(3, 5))
    theirs = nn.Parameter(ours.detach().clone())
    gradients = [torch.randn(3, 5) for _ in range(3)]
    _step(Muon([ours], sgd_lr=0.1, sgd_momentum=momentum, sgd_weight_decay=0.3), ours, gradients)
    sgd = torch.optim.SGD([theirs], 0.1, momentum, nesterov=momentum > 0, weight_decay=0.3)
    _step(sgd, theirs, gradients)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_groups_are_split_and_a_scheduler_moves_both_rates() -> None:
    conv, norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)
    optimizer = Muon(
        [{"params": [*conv.parameters(), *norm.parameters()]}, {"params": [torch.zeros(2)], "lr": 0.5}], lr=0.02
    )
    assert [(len(g["params"]), g["lr"], g["muon"]) for g in optimizer.param_groups] == [
        (1, 0.02, True),
        (3, 0.1, False),
        (1, 0.5, False),
    ]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5)
    assert schedule.get_last_lr() == [0.01, 0.05, 0.25]
    before = conv.weight.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = norm(conv(torch.ones(2, 2, 4, 4)).square()).square().sum() + conv.weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert not torch.equal(before, conv.weight)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"lr": -1.0}, "lr is -1.0"), ({"momentum": 1.0}, "momentum is 1.0"), ({"steps": 0}, "steps is 0")],
)
def test_wrong_settings_are_refused(settings: dict[str, float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Muon([torch.zeros(1)], **settings)  # type: ignore[arg-type]
