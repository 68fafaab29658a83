"""Label smoothing: in the loss that trains, not in the one that judges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from locallearn.batch import Batch
from locallearn.nets import mlp
from locallearn.tasks.classification import Classification


def test_smoothed_labels_train_and_plain_ones_judge() -> None:
    torch.manual_seed(0)
    net, x, y = mlp((5,), 3, (4,)), torch.randn(6, 5), torch.arange(6) % 3
    plain, smooth = Classification(net, x[:2], 3), Classification(net, x[:2], 3, label_smoothing=0.2)
    assert plain.info().loss is F.cross_entropy
    scores = net(x)
    log = scores.log_softmax(1)
    wanted = -(0.8 * log[torch.arange(6), y] + 0.2 * log.mean(1)).mean()
    assert torch.allclose(smooth.info().loss(scores, y), wanted)
    assert torch.equal(smooth.judge(Batch(x, y)), plain.judge(Batch(x, y)))
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"label_smoothing is {share}, expected a share from 0 to below 1"):
            Classification(net, x[:2], 3, label_smoothing=share)
