"""Where a block's channels lie is followed through what runs, not guessed from the number of dimensions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from locallearn.nets import Blocks
from locallearn.nets.layout import ChannelAxes, Signal
from locallearn.nets.units import sample_shapes

Forward = Callable[..., Tensor]
CONV = nn.Conv1d(6, 6, 3, padding=1)  # with six positions, so that sizes tell nothing
SQUARE = nn.Conv2d(6, 6, 3, padding=1)
LINEAR, NORM, TABLE = nn.Linear(6, 6), nn.LayerNorm(6), nn.Embedding(9, 6)


class Flip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return -x

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return -gradients[0]


def turned(layer: nn.Module, x: Tensor) -> Tensor:
    made: Tensor = layer(x.transpose(1, 2))
    return made.transpose(1, 2)


FIRST: dict[str, Forward] = {
    "a convolution": CONV,
    "with functions behind it": lambda x: torch.max_pool1d(CONV(x).relu() * 2, 2),
    "BatchNorm1d": nn.BatchNorm1d(6).eval(),
    "a pooling": nn.AvgPool1d(2),
    "a transposed convolution": nn.ConvTranspose1d(6, 6, 2, stride=2),
    "turned for a linear layer and back": lambda x: turned(LINEAR, turned(NORM, CONV(x))),
    "a residual branch turned and back": lambda x: turned(LINEAR, CONV(x)) + x,
    "concatenated": lambda x: torch.cat((CONV(x), CONV(x)), 1),
    "convolved over embeddings": lambda x: CONV(TABLE(x[:, 0].long()).transpose(1, 2)),
    "a mean over the rows of a map": lambda x: SQUARE(x[:, :, None].expand(-1, -1, 6, -1)).mean(2),
    "flattened from a map": lambda x: SQUARE(x[..., None]).flatten(2),
    "places mixed by einsum": lambda x: torch.einsum("nij,ncj->nci", torch.rand(4, 6, 6).softmax(-1), CONV(x)),
    "worked on in place": lambda x: CONV(x).relu_().add_(1),
    "from a function of one's own": lambda x: Flip.apply(CONV(x)),
}
LAST: dict[str, Forward] = {
    "nothing that knows": lambda x: x * 2,
    "a linear layer": LINEAR,
    "turned at the end": lambda x: CONV(x).transpose(1, 2),
    "permuted": lambda x: CONV(x).permute(0, 2, 1).contiguous(),
    "mT": lambda x: CONV(x).mT * 1,
    "turned by einsum": lambda x: torch.einsum("ncl->nlc", CONV(x)),
    "attention behind patches by einsum": lambda x: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).eval()(
        torch.einsum("ncl->nlc", CONV(x))
    ),
    "patches": lambda x: SQUARE(x[..., None]).flatten(2).transpose(1, 2),
    "patches by reshape": lambda x: SQUARE(x[..., None]).reshape(-1, 6, 6).permute(0, 2, 1),
    "turned in place": lambda x: CONV(x).transpose_(1, 2),
    "tokens mixed": lambda x: turned(LINEAR, NORM(x)) + NORM(x),
    "tokens mixed by a convolution": lambda x: CONV(NORM(x)),
    "attention behind a convolution": lambda x: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).eval()(
        CONV(x).mT
    ),
    "a recurrent layer": lambda x: nn.GRU(6, 6, batch_first=True)(CONV(x).mT)[0],
    "a recurrent layer that was given a map": lambda x: nn.LSTM(6, 6, batch_first=True)(CONV(x))[0],
}


def _shape(forward: Forward) -> tuple[int, ...]:
    with torch.no_grad(), ChannelAxes() as axes:
        return axes.shape(forward(torch.rand(4, 6, 6)))


@pytest.mark.parametrize("name", FIRST)
def test_channels_first(name: str) -> None:
    assert isinstance(_shape(FIRST[name]), Signal)


@pytest.mark.parametrize("name", LAST)
def test_channels_last_or_unknown(name: str) -> None:
    shape = _shape(LAST[name])
    assert len(shape) == 2
    assert not isinstance(shape, Signal)


def test_the_axis_crosses_borders() -> None:
    blocks = Blocks({
        "convolution": CONV,
        "activation": nn.Sequential(nn.PReLU(), nn.Dropout()),
        "pooled": nn.Sequential(nn.PReLU(), nn.AdaptiveAvgPool1d(2)),
        "vector": nn.Sequential(nn.Flatten(), nn.Linear(12, 5)),
    })  # fmt: skip
    shapes, maps = sample_shapes(blocks, torch.rand(4, 6, 6), ())
    assert shapes == [(6, 6), (6, 6), (6, 2), (5,)]
    assert maps == [[], [], [], []]
    assert [isinstance(shape, Signal) for shape in shapes] == [True, True, True, False]


def test_what_is_not_of_three_dimensions_stays_as_it_is() -> None:
    for forward, shape in ((nn.Flatten(), (36,)), (lambda x: SQUARE(x[..., None]), (6, 6, 1))):
        found = _shape(forward)
        assert found == shape
        assert type(found) is tuple
