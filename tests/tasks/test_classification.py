"""What trains is not always what judges: smoothed labels, several views of an image."""

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


def test_two_views_are_the_mean_over_an_image_and_its_mirror_image() -> None:
    torch.manual_seed(0)
    net, x, y = mlp((2, 3, 4), 3, (4,)), torch.randn(6, 2, 3, 4), torch.arange(6) % 3
    scores = (net(x) + net(torch.from_numpy(x.numpy()[..., ::-1].copy()))) / 2
    samples, hits, loss = Classification(net, x[:2], 3, views=2).judge(Batch(x, y))
    assert (samples, hits) == (6, (scores.argmax(1) == y).sum())
    assert torch.allclose(loss, F.cross_entropy(scores, y, reduction="sum"))
    assert torch.equal(Classification(net, x[:2], 3, views=2).training_step((x, y), 0), F.cross_entropy(net(x), y))
    for views in (0, 3, True):
        with pytest.raises(ValueError, match=f"views is {views}, expected 1, or 2"):
            Classification(net, x[:2], 3, views=views)
    with pytest.raises(ValueError, match=r"have shape \(5,\), expected \(channels, height, width\): set task.views=1"):
        Classification(mlp((5,), 3, (4,)), torch.randn(2, 5), 3, views=2)
