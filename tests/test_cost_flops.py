"""Operations against closed forms, one kind of layer at a time, and the names of what cannot be counted."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, weight_norm
from torch.utils.flop_counter import flop_registry, register_flop_formula

from locallearn.algorithms import MonoForward, TaskInfo
from locallearn.batch import Batch
from locallearn.cost import counting, measure_update
from locallearn.nets import Blocks

pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse.* support is in beta:UserWarning", "ignore:.*Nested Tensor.*:UserWarning"
)


def _count(work: Callable[[], Any]) -> int:
    with counting() as counter:
        work()
    assert not counter.uncounted
    return counter.total


def _three_products(layer: Callable[[Tensor], Tensor], shape: tuple[int, ...], forward: int) -> None:
    """A forward pass, and as much for the gradient of the weights and for that of the input, where it is asked for."""
    x = torch.randn(shape)
    assert _count(lambda: layer(x).sum().backward()) == 2 * forward
    assert _count(lambda: layer(x.clone().requires_grad_()).sum().backward()) == 3 * forward
    with torch.no_grad():
        assert _count(lambda: layer(x)) == forward
    with torch.inference_mode():  # here operators come whole that are made of others
        assert _count(lambda: layer(x)) == forward


@pytest.mark.parametrize(
    ("layer", "shape", "out"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), (2, 4, 9), (2, 6, 7)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 9), (2, 6, 5, 5)),
        (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 9, 9), (2, 8, 7, 7)),  # depthwise, two outputs each
        (nn.Conv2d(4, 6, (3, 1), groups=2, stride=(2, 1), dilation=(2, 1)), (2, 4, 9, 5), (2, 6, 3, 5)),
        (nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect"), (2, 4, 5, 5), (2, 4, 5, 5)),
        (nn.Conv3d(4, 6, 3, dilation=2), (1, 4, 6, 5, 5), (1, 6, 2, 1, 1)),
        (nn.Conv2d(4, 6, 3, bias=False), (2, 4, 5, 5), (2, 6, 3, 3)),
    ],
)
def test_a_convolution_reads_its_group_for_every_output(
    layer: Any, shape: tuple[int, ...], out: tuple[int, ...]
) -> None:
    _three_products(layer, shape, 2 * prod(out) * prod(layer.kernel_size) * layer.in_channels // layer.groups)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2, output_padding=1), (2, 4, 5, 5)),
        (nn.ConvTranspose1d(4, 6, 3, dilation=2), (2, 4, 5)),
    ],
)
def test_a_transposed_convolution_writes_its_group_for_every_input(layer: Any, shape: tuple[int, ...]) -> None:
    _three_products(layer, shape, 2 * prod(shape) * prod(layer.kernel_size) * layer.out_channels // layer.groups)


def test_grouped_convolutions_under_mono_forward_by_hand() -> None:
    """Three convolutions of 8 channels in 4 groups on 6 x 6 maps, heads of 4 classes on 8 * 36 entries."""
    torch.manual_seed(0)
    conv = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.ReLU()) for _ in range(3)]
    net = Blocks(
        {f"layer{i + 1}": block for i, block in enumerate(conv)}, nn.Sequential(nn.Flatten(), nn.Linear(288, 4))
    )
    batch = Batch(torch.randn(2, 8, 6, 6), torch.arange(2))
    rule = MonoForward()
    rule.attach(net, TaskInfo(batch, 4, F.cross_entropy))
    maps, heads = 2 * 8 * 36 * 9 * 2, 2 * 288 * 4  # forward and for the weights; no block asks for its input's gradient
    assert measure_update(rule, batch).flops == 3 * (2 * maps + 3 * heads)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("ways", [1, 2])
def test_recurrent_layers_multiply_input_and_state_in_every_step(kind: Any, gates: int, ways: int) -> None:
    samples, steps, width, hidden = 3, 4, 5, 6
    layer = kind(width, hidden, num_layers=2, bidirectional=ways == 2, batch_first=True)
    state, again = hidden * hidden, ways * hidden * hidden
    forward = 2 * steps * samples * gates * ways * (width * hidden + state + again + state)
    x = torch.randn(samples, steps, width)
    with torch.no_grad():
        assert _count(lambda: layer(x)) == forward
    with torch.inference_mode():
        assert _count(lambda: layer(x)) == forward
    # The state that a layer starts from is zero and needs no gradient, of which only the fused LSTM makes no use.
    spared = 0 if kind is nn.LSTM else 2 * samples * gates * state * 2 * ways
    trained = _count(lambda: layer(x.clone().requires_grad_())[0].sum().backward())
    assert trained == 3 * forward - spared


def test_bilinear_layers() -> None:
    """x W_o y for every output o: a product with W, and one of what it gives with y."""
    samples, left, right, outputs = 3, 5, 7, 6
    layer, x, y = nn.Bilinear(left, right, outputs), torch.randn(samples, left), torch.randn(samples, right)
    forward = 2 * samples * outputs * right * (left + 1)
    with torch.no_grad():
        assert _count(lambda: layer(x, y)) == forward
    assert _count(lambda: layer(x, y).sum().backward()) > 1.9 * forward


def test_attention() -> None:
    """Scores and what they weigh; backward the fused kernel computes the scores again, the written-out one does not."""
    samples, tokens, width, heads = 2, 3, 8, 2
    pairs = 2 * samples * tokens * tokens * width
    layer = nn.MultiheadAttention(width, heads, batch_first=True)
    x = torch.randn(samples, tokens, width)
    forward = 2 * samples * tokens * 4 * width * width + 2 * pairs
    assert _count(lambda: layer(x, x, x)[0].sum().backward()) == 3 * forward - 2 * samples * tokens * 3 * width * width
    with torch.no_grad():  # one operator for all of it
        assert _count(lambda: layer.eval()(x, x, x)) == forward
    q = torch.randn(samples, heads, tokens, width // heads, requires_grad=True)
    fused = _count(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())
    assert fused in (2 * pairs + 5 * pairs, 2 * pairs + 4 * pairs)
    assert _count(lambda: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5).sum().backward()) == 6 * pairs
    encoder = nn.TransformerEncoderLayer(width, heads, 16, batch_first=True)
    with torch.no_grad():
        assert _count(lambda: encoder.eval()(x)) == forward + 2 * samples * tokens * 2 * width * 16


@pytest.mark.parametrize("precision", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_layers_and_products(precision: torch.dtype) -> None:
    layer = nn.Linear(5, 7).to(precision)
    _three_products(lambda x: layer(x.to(precision)), (3, 4, 5), 2 * 12 * 5 * 7)
    matrix, vector = torch.randn(4, 5, dtype=precision), torch.randn(5, dtype=precision)
    assert _count(lambda: matrix @ vector) == _count(lambda: torch.addmv(matrix[:, 0], matrix, vector)) == 2 * 20
    assert _count(lambda: vector @ vector) == 2 * 5
    pile = torch.randn(2, 4, 5, dtype=precision)
    assert _count(lambda: torch.einsum("bij,bkj->bik", pile, pile)) == 2 * 2 * 4 * 4 * 5
    assert _count(lambda: torch.baddbmm(pile[:, :, :4], pile, pile.mT)) == 2 * 2 * 4 * 4 * 5
    assert _count(lambda: torch.addbmm(pile[0, :, :4], pile, pile.mT)) == 2 * 2 * 4 * 4 * 5


def test_a_sparse_matrix_counts_by_its_entries() -> None:
    dense = torch.zeros(6, 5)
    dense[0, 1] = dense[3, 4] = 1.0
    right = torch.randn(5, 7, requires_grad=True)
    for matrix in (dense.to_sparse(), dense.to_sparse_csr()):
        assert _count(lambda matrix=matrix: matrix @ right) == 2 * 2 * 7
        assert _count(lambda matrix=matrix: (matrix @ right).sum().backward()) == 2 * (2 * 2 * 7)
    pile = torch.stack([dense, dense]).to_sparse()
    assert _count(lambda: torch.bmm(pile, torch.randn(2, 5, 7))) == 2 * 4 * 7


def test_products_by_group() -> None:
    """Rows 0 to 3 meet the first matrix and rows 4 to 15 the second one; and the gradients of both."""
    if not hasattr(torch, "_grouped_mm"):
        pytest.skip("this release has no grouped product")
    rows, width, outputs = 16, 8, 24
    left = torch.randn(rows, width, dtype=torch.bfloat16, requires_grad=True)
    right = torch.randn(2, width, outputs, dtype=torch.bfloat16, requires_grad=True)
    ends = torch.tensor([4, rows], dtype=torch.int32)
    forward = 2 * rows * width * outputs
    with torch.no_grad():
        assert _count(lambda: torch._grouped_mm(left, right, offs=ends)) == forward
    assert _count(lambda: (torch._grouped_mm(left, right, offs=ends) ** 2).sum().backward()) == 3 * forward


def test_convolutions_along_time_first() -> None:
    time, samples, channels, kernel, outputs = 5, 2, 3, 3, 4
    x = torch.randn(time, samples, channels, requires_grad=True)
    weight = torch.randn(kernel, channels, outputs, requires_grad=True)
    forward = 2 * (time - kernel + 1) * samples * outputs * kernel * channels
    assert _count(lambda: torch.conv_tbc(x, weight, torch.zeros(outputs)).sum().backward()) == 3 * forward


def test_what_multiplies_no_matrices_is_left_out_and_not_named() -> None:
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    net = nn.Sequential(
        nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.GELU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Upsample(scale_factor=2),
        nn.Dropout(), nn.Flatten(), nn.LayerNorm(64), nn.Softmax(1), nn.PReLU(), nn.Hardswish(), nn.GLU(),
    )  # fmt: skip
    assert _count(lambda: net(x).sum().backward()) == 0
    index = torch.randint(4, (10,))
    assert _count(lambda: x[:, :, 0, 0].T.index_select(0, index).cumsum(0).sort(0).values.sum().backward()) == 0
    assert (
        _count(
            lambda: (
                torch.zeros(4, 2)
                .index_add(0, index, torch.rand(10, 2))
                .scatter_reduce(0, index[:1, None], x.detach()[0, :1, :1, 0], "mean")
            )
        )
        == 0
    )
    assert _count(lambda: nn.EmbeddingBag(5, 3)(index.clamp(max=4)[None]).sum().backward()) == 0
    assert _count(lambda: weight_norm(nn.Linear(3, 3, bias=False))(torch.rand(2, 3)).sum().backward()) == 2 * 2 * 18


class _Numpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() @ x.detach().numpy().T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.zeros(3, 3)


def test_operators_of_whose_work_nothing_is_known_are_named() -> None:
    @torch.library.custom_op("locallearn_test::squared", mutates_args=())
    def squared(x: Tensor) -> Tensor:
        return x @ x

    x = torch.eye(3, requires_grad=True)
    known: list[tuple[Callable[[], Any], str]] = [
        (lambda: squared(x.detach()), "locallearn_test.squared"),
        (lambda: _Numpy.apply(x).sum().backward(), "Tensor.numpy"),
        (lambda: torch.linalg.inv(x), "aten.linalg_inv_ex"),
        (lambda: torch.fft.fft(x), "aten._fft_c2c"),
        (lambda: torch.cdist(x, x), "aten._cdist_forward"),
        (lambda: orthogonal(nn.Linear(3, 3)), "aten.geqrf"),
    ]
    for work, name in known:
        with counting() as counter:
            work()
        assert any(name in found or found.startswith(name[:9]) for found in counter.uncounted), (
            name,
            counter.uncounted,
        )
    assert "numpy" not in Tensor.__dict__  # the watch is over
    register_flop_formula(torch.ops.locallearn_test.squared)(lambda x, **_: 2 * x[0] ** 3)
    try:
        assert _count(lambda: squared(x.detach())) == 54
    finally:
        del flop_registry[torch.ops.locallearn_test.squared]


def test_a_figure_that_lacks_something_says_so() -> None:
    class Inverse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.linalg.inv(torch.eye(x.shape[1]))

    batch = Batch(torch.rand(4, 5), torch.arange(4))
    rule = MonoForward()
    rule.attach(
        Blocks({"a": nn.Sequential(nn.Linear(5, 5), Inverse())}, nn.Linear(5, 4)), TaskInfo(batch, 4, F.cross_entropy)
    )
    assert measure_update(rule, batch).uncounted == ("aten.linalg_inv_ex",)


def test_shifts_of_integers_are_no_unknown_work() -> None:
    """What counter-based noise is made of: a rule that draws by it has all of its operations counted."""
    from locallearn.cost._flops import FlopCounter

    counter = FlopCounter()
    with counter:
        bits = torch.arange(8)
        bits = (bits << 3) ^ (bits >> 1) & 5 | 2
        bits <<= 1
        bits >>= 1
    assert not counter.uncounted
