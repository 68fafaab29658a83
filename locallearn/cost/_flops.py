"""Floating point operations of matrix products and convolutions, and the names of operators that nobody can count."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

# What reads, moves, draws, compares, sums or scales numbers one by one: left out on purpose, like everything elementwise.
# Names without a trailing underscore and without _backward; pointwise operators and views are told by their tags.
_CHEAP = re.compile(
    "|".join(
        (
            # reductions, order, statistics
            r"sum|mean|prod|amax|amin|aminmax|_aminmax|max|min|any|all|var|std|var_mean|std_mean|argmax|argmin|logsumexp",
            r"nansum|norm|linalg_vector_norm|count_nonzero|trace|equal|allclose|dist|_?(log)?cum\w+|topk|sort|argsort|msort",
            r"kthvalue|(nan)?median|mode|_?unique\w*|bincount|hist\w+|_histogram\w+|searchsorted|bucketize|isin|renorm",
            r"_is_a\w+_true|hash_tensor",
            # pooling, normalisation, softmax, resampling
            r"_?(adaptive_)?(avg|max)_pool\d?d?\w*|max_unpool\d?d?|(quantized|fractional)_max_pool\w+|mkldnn_\w+_pool\w+|upsample\w+|_upsample\w+",
            r"\w*(batch|layer|group|rms|instance)_norm\w*|native_norm|_weight_norm_interface|_?(log_|safe_|masked_)?softmax\w*",
            r"_?grid_sampler\w*|cudnn_grid_sampler|(cudnn_)?affine_grid_generator",
            # losses and activations whose tags say nothing
            r"\w+_loss\w*|_ctc_loss|\w*ctc_loss|binary_cross_entropy\w*|\w*margin_loss\w*|glu\w*|_?prelu\w*|rrelu\w*|\w*sigmoid\w*",
            r"(hard|soft|leaky|e|s|c|g)\w*(lu|shrink|swish|tanh|plus)\w*|mish|threshold|_thnn_fused_\w+_cell\w*|addr|linalg_cross",
            # random numbers, new tensors, copies, layout
            r"bernoulli|normal\w*|uniform|rand\w*|multinomial|poisson|exponential|geometric|cauchy|log_normal|binomial",
            r"\w*dropout\w*|_philox\w+|_standard_gamma\w*|_sample_dirichlet|_dirichlet_grad|_masked_scale",
            r"_?empty\w*|zeros|zero|ones|full|fill|arange|linspace|logspace|eye|range|\w+_like|_?new_\w+|scalar_tensor|complex|polar",
            r"_efficientzerotensor|tri[lu]\w*|\w+_window|fft_r?fftfreq|copy\w*|_copy\w*|clone|lift\w*|_lazy_clone|detach\w*|cat|_?stack",
            r"_chunk_cat|resize\w*|_resize\w*|set|_unsafe_view|_reshape\w*|repeat\w*|roll|flip|rot90|constant_pad_nd|\w+_pad\d?d?",
            r"pixel_\w+|channel_shuffle|block_diag|diag_embed|(diagonal|select|slice|as_strided|unfold|_nested_select)\w*",
            r"im2col|col2im|unsafe_split\w*|split\w*|_pack_padded_sequence|_pin_memory|to_padded_tensor|_padded_dense\w*|_jagged\w*",
            r"_to_copy|_to_dense|_?to_sparse\w*|_?to_mkldnn|_mkldnn_(reshape|transpose)|mkldnn_reorder\w+|_cudnn_rnn_flatten_weight",
            # by index
            r"_?(unsafe_)?(masked_)?index\w*|gather|scatter\w*|\w+_scatter|_?embedding\w*|take|put|masked_\w+|nonzero\w*|where",
            r"_?segment_(?!matmul)\w+",
            # of sparse tensors: what they are made of
            r"_sparse_(csr_)?(log_)?(sum|prod|softmax)|_?sparse_(mask\w*|resize\w*|dim|\w+_tensor\w*)|_?(indices|values|nnz)",
            r"_?coalesced?|dense_dim|_dim[IV]|_(convert|validate)\w*_indices\w*|_spdiags|_nested_\w+",
            # questions, assertions, optimizers, quantised elements
            r"_local_scalar_dense|item|is_\w+|_has_\w+|_?\w*assert\w*|_?sym_\w+|record_stream|_print|_fused_sdp_choice|_?use_\w+ctc_loss",
            r"_foreach_(?!mm)\w+|_fused_(adam|adamw|adagrad|sgd)|_amp_\w+|_?fake_quantize\w*|_?quantize_\w+|dequantize|q_\w+|int_repr",
            r"qscheme|_transform_bias_rescale_qkv|__i?[lr]shift_+|_add_relu|floor_divide|shallow_copy_data|from_file",
            r"_fused_moving_avg\w+|_linalg_check_errors|_embedding_bag\w*|_functional_\w+|_make_\w+_tensor",
        )
    )
)
_NAMESPACES = ("prim", "prims", "profiler", "c10d", "_c10d_functional", "rngprims")  # they multiply no matrices
_GRAPHS = ("pyg", "torch_scatter")  # sums over edges there go by the names above


class FlopCounter(TorchDispatchMode):
    """Counts what runs inside, backward passes included: two operations per multiply-accumulate.

    Counted are matrix products, convolutions, attention and recurrent layers, by the shapes of what they multiply, a
    product with a sparse matrix by its entries. Elementwise work, sums and moves are left out. An operator of whose work
    nothing is known (a custom one, a decomposition of a matrix, a Fourier transform) is named instead; a custom one
    counts after ``torch.utils.flop_counter.register_flop_formula``. So is a floating point tensor that is handed to NumPy
    or through DLPack, as what is done with it there cannot be seen.

    Attributes:
        total: operations so far.
        uncounted: names of operators that ran without a formula; the total is then too small.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self.uncounted: set[str] = set()
        self._leaving: Any = None

    def __enter__(self) -> FlopCounter:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", func)
        formula = _formulas().get(packet) or flop_registry.get(packet)
        if formula is None and hasattr(func, "decompose") and func is not torch.ops.prim.device.default:
            with self:  # in inference mode operators come whole that are made of others
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        made = func(*args, **kwargs)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=made))
        elif not _cheap(func):
            self.uncounted.add(str(packet))
        return made


@contextmanager
def counting() -> Iterator[FlopCounter]:
    """Count inside the block, with a watch on what leaves PyTorch."""
    with FlopCounter() as counter, _watched_exits(counter.uncounted):
        yield counter


@contextmanager
def _watched_exits(names: set[str]) -> Iterator[None]:
    """Note floating point tensors that are handed over to other libraries."""

    def watched(name: str) -> Callable[..., Any]:
        leave = getattr(Tensor, name)

        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if tensor.is_floating_point() and tensor.numel() > 1:
                names.add(f"Tensor.{name}")
            return leave(tensor, *args, **kwargs)

        return call

    before = {name: Tensor.__dict__.get(name) for name in ("numpy", "__dlpack__")}
    for name in before:
        setattr(Tensor, name, watched(name))
    try:
        yield
    finally:
        for name, method in before.items():
            if method is None:
                delattr(Tensor, name)
            else:
                setattr(Tensor, name, method)


# -- formulas -----------------------------------------------------------------------------------------------------------
def _by_shape(formula: Callable[..., int]) -> Callable[..., int]:
    """A formula of shapes, as one of the tensors themselves."""

    def counted(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        args, kwargs, out = tree_map(lambda v: tuple(v.shape) if isinstance(v, Tensor) else v, (args, kwargs, out_val))
        return formula(*args, out=out, **kwargs)

    return counted


def _entries(matrix: Tensor) -> int:
    """Entries that take part in a product: all, or those that a sparse matrix holds."""
    if matrix.layout == torch.strided:
        return matrix.numel()
    values = matrix._values() if matrix.layout == torch.sparse_coo else matrix.values()
    return values.numel()


def _mm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Matrix by matrix or vector; a sparse one by its entries. Of two sparse ones the second counts as dense."""
    columns = b.shape[1] if b.ndim > 1 else 1
    if a.layout == torch.strided and b.layout != torch.strided:
        return 2 * a.shape[0] * _entries(b)
    return 2 * _entries(a) * columns


def _batched(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * _entries(a) * int(b.shape[2])


def _grouped(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Every row of ``a`` meets the matrix of its group; of two matrices cut along what is summed, every pair of columns."""
    if a.ndim == 3 and b.ndim == 2:
        return 2 * a.shape[1] * int(prod(b.shape))
    return 2 * a.numel() * b.shape[-1]


def _added(_: Tensor, a: Tensor, b: Tensor, *__: Any, **___: Any) -> int:
    return _mm(a, b)


def _dot(a: Any, *_: Any, **__: Any) -> int:
    return 2 * int(prod(a))


def _forward(x: Any, weight: Any, transposed: bool, out: Any) -> int:
    """Every output reads C_in / groups channels through the kernel; transposed, every input writes C_out / groups."""
    return 2 * int(prod(x if transposed else out)) * int(prod(weight[1:]))


def _convolution(
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    *_: Any,
    out: Any,
    **__: Any,
) -> int:
    return _forward(x, weight, transposed, out)


def _plain_convolution(x: Any, weight: Any, *_: Any, out: Any, **__: Any) -> int:
    return _forward(x, weight, False, out)


def _transposed_convolution(x: Any, weight: Any, *_: Any, out: Any, **__: Any) -> int:
    return _forward(x, weight, True, out)


def _convolution_backward(
    grad: Any,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    *rest: Any,
    **_: Any,
) -> int:
    """The gradients of input and weight multiply the same pairs of numbers as the forward pass, each once."""
    mask = rest[2]
    return (bool(mask[0]) + bool(mask[1])) * _forward(x, weight, transposed, grad)


def _trilinear(
    a: Any, b: Any, c: Any, lacks_a: Any, lacks_b: Any, lacks_c: Any, summed: Any, *_: Any, **__: Any
) -> int:
    """``Σ a b c`` over some dimensions, two products: first a and b over what c lacks, then with c."""
    dimensions = len(a) + len(lacks_a)
    sizes = [1] * dimensions
    held: list[set[int]] = []
    for shape, lacks in ((a, lacks_a), (b, lacks_b), (c, lacks_c)):
        own = [d for d in range(dimensions) if d not in lacks]
        for d, size in zip(own, shape, strict=True):
            sizes[d] = max(sizes[d], size)
        held.append(set(own))
    first = held[0] | held[1]
    second = (first - {d for d in summed if d not in held[2]}) | held[2]
    return 2 * sum(prod(sizes[d] for d in dims) for dims in (first, second))


def _rows(x: Any) -> int:
    return int(prod(x[:-1]))


def _mkldnn_rnn(x: Any, w_in: Any, w_hidden: Any, *_: Any, **__: Any) -> int:
    """One direction of one layer: every step multiplies its input and its state by a matrix each."""
    return 2 * _rows(x) * int(prod(w_in) + prod(w_hidden))


def _mkldnn_rnn_backward(x: Any, w_in: Any, w_hidden: Any, *_: Any, **__: Any) -> int:
    return 2 * _mkldnn_rnn(x, w_in, w_hidden)


def _eigh(a: Any, vectors: bool) -> int:
    cubed = int(prod(a)) * int(a[-1])
    return 9 * cubed if vectors else 4 * cubed // 3


def _fused_rnn(x: Any, weights: Any, *_: Any, **__: Any) -> int:
    return 2 * _rows(x) * sum(int(prod(w)) for w in weights if len(w) == 2)


def _fused_rnn_backward(x: Any, weights: Any, *rest: Any, **_: Any) -> int:
    masks = [value for value in rest if isinstance(value, list | tuple) and len(value) == 4 and type(value[0]) is bool]
    return (1 + (bool(masks[-1][3]) if masks else True)) * _fused_rnn(x, weights)


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Scores and what they weigh; a mask saves nothing."""
    return 2 * int(prod(q[:-1])) * int(k[-2]) * int(q[-1] + v[-1])


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Scores once more, their gradient, and those of q, k and v."""
    return 2 * int(prod(q[:-1])) * int(k[-2]) * int(3 * q[-1] + 2 * v[-1])


def _multi_head(
    q: Any, k: Any, v: Any, width: int, heads: int, w_in: Any, b_in: Any, w_out: Any, *_: Any, **__: Any
) -> int:
    pairs = _rows(q) * int(k[-2])
    projections = _rows(q) * int(w_in[0] // 3 + w_out[0]) + (_rows(k) + _rows(v)) * int(w_in[0] // 3)
    return 2 * (projections * width + 2 * pairs * width)


def _encoder_layer(x: Any, width: int, heads: int, w_in: Any, b_in: Any, w_out: Any, *rest: Any, **_: Any) -> int:
    matrices = [value for value in rest if isinstance(value, tuple) and len(value) == 2][:2]  # of the feed-forward part
    feed_forward = sum(int(prod(matrix)) for matrix in matrices)
    return _multi_head(x, x, x, width, heads, w_in, b_in, w_out) + 2 * _rows(x) * feed_forward


@cache
def _formulas() -> dict[Any, Callable[..., Any]]:
    """Own formulas by operator; those of PyTorch's that are not here are right."""
    raw: list[tuple[str, Callable[..., int]]] = [
        ("mm mv _int_mm _sparse_mm_reduce_impl", _mm),
        ("addmm addmm_ addmv addmv_ _addmm_activation _sparse_addmm sspaddmm", _added),
        ("bmm", _batched),
        ("baddbmm baddbmm_ addbmm addbmm_", lambda _, a, b, *__, **___: _batched(a, b)),
        ("_grouped_mm _scaled_grouped_mm", _grouped),
        ("_sparse_mm_reduce_impl_backward", lambda a, grad, *rest, **_: sum(rest[-1]) * _mm(a, grad)),
        ("sparse_sampled_addmm", lambda a, b, c, *_, **__: 2 * _entries(a) * b.shape[-1]),
    ]
    shaped: list[tuple[str, Callable[..., int]]] = [
        ("linear", lambda x, weight, *_, **__: 2 * _rows(x) * int(prod(weight))),
        ("dot vdot", _dot),
        ("convolution _convolution convolution_overrideable", _convolution),
        (
            "cudnn_convolution miopen_convolution mkldnn_convolution _slow_conv2d_forward slow_conv3d_forward "
            "slow_conv_dilated2d slow_conv_dilated3d _conv_depthwise2d conv_depthwise3d miopen_depthwise_convolution "
            "cudnn_convolution_relu cudnn_convolution_add_relu miopen_convolution_relu miopen_convolution_add_relu "
            "_nnpack_spatial_convolution",
            _plain_convolution,
        ),
        (
            "cudnn_convolution_transpose miopen_convolution_transpose slow_conv_transpose2d slow_conv_transpose3d",
            _transposed_convolution,
        ),
        ("conv_tbc", lambda x, weight, *_, out, **__: 2 * int(prod(out)) * int(prod(weight[:2]))),
        ("conv_tbc_backward", lambda grad, x, weight, *_, **__: 4 * int(prod(grad)) * int(prod(weight[:2]))),
        ("convolution_backward convolution_backward_overrideable", _convolution_backward),
        ("_trilinear", _trilinear),
        ("mkldnn_rnn_layer", _mkldnn_rnn),
        ("mkldnn_rnn_layer_backward", _mkldnn_rnn_backward),
        ("_cudnn_rnn miopen_rnn", _fused_rnn),
        ("_cudnn_rnn_backward miopen_rnn_backward", _fused_rnn_backward),
        ("linalg_cholesky_ex linalg_cholesky cholesky", lambda a, *_, **__: int(prod(a)) * a[-1] // 3),
        # values and vectors by the symmetric QR algorithm (Golub and Van Loan, section 8.3); values alone take 4n³/3
        (
            "_linalg_eigh",
            lambda a, *rest, **named: _eigh(a, named.get("compute_v", rest[1] if len(rest) > 1 else True)),
        ),
        ("cholesky_solve", lambda b, a, *_, **__: 2 * int(prod(b)) * a[-1]),
        (
            "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
            "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_fused_attention_overrideable",
            _attention,
        ),
        (
            "_scaled_dot_product_flash_attention_backward _scaled_dot_product_efficient_attention_backward "
            "_scaled_dot_product_cudnn_attention_backward _scaled_dot_product_flash_attention_for_cpu_backward "
            "_scaled_dot_product_fused_attention_overrideable_backward",
            _attention_backward,
        ),
        ("_native_multi_head_attention", _multi_head),
        ("_transformer_encoder_layer_fwd", _encoder_layer),
    ]
    by_name = {name: formula for names, formula in raw for name in names.split()}
    by_name |= {name: _by_shape(formula) for names, formula in shaped for name in names.split()}
    # PyTorch's releases differ by operators.
    return {getattr(torch.ops.aten, name): f for name, f in by_name.items() if hasattr(torch.ops.aten, name)}


@cache
def _cheap(func: Any) -> bool:
    """Whether an operator without a formula is known to multiply no matrices."""
    namespace = getattr(func, "namespace", None)
    if namespace in _NAMESPACES:
        return True
    if namespace not in ("aten", *_GRAPHS):
        return False
    name = func._schema.name.partition("::")[2].removesuffix("_")
    stem = re.sub(r"_backward\w*$", "", name)
    if namespace == "aten" and (_elementwise_or_view(name) or _elementwise_or_view(stem)):
        return True
    return _CHEAP.fullmatch(stem) is not None or _CHEAP.fullmatch(name) is not None


def _elementwise_or_view(name: str) -> bool:
    """Whether PyTorch itself says so of an operator or one of its overloads."""
    packet = getattr(torch.ops.aten, name, None)
    overloads = [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]
    return any(
        any(tag.name in ("pointwise", "reduction", "view_copy", "inplace_view") for tag in overload.tags)
        or any(r.alias_info is not None and not r.alias_info.is_write for r in overload._schema.returns)
        for overload in overloads
    )
