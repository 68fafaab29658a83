"""How a network is run, whatever is learned: kernels and images with channels last, every block compiled by itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_map

from locallearn.nets.blocks import Blocks

_T = TypeVar("_T")
COMPILE = ("blocks",)
"""What ``compile`` may be beside ``None``."""


class Execution:
    """How the blocks of a network are run. Nothing in it changes a number beyond rounding, and state dicts keep their keys.

    A block is compiled together with its backward pass, and no graph spans a border. What a rule adds (heads, losses) and the
    readout run as they are. Compiled code is made for a first size of batches, and once more for all others. A
    block runs uncompiled, with the same result, in a deep copy, while hooks hang inside of it or on all modules, and while
    somebody watches every operation (:class:`~locallearn.cost.FlopCounter`, an audit); and from then on, with a warning, in
    a mode in which it has come to run in more ways than PyTorch compiles of one function (parts of it at rest in turn, say).

    Args:
        channels_last: keep tensors of four axes, weights and inputs, in PyTorch's memory format of that name: images as
            (N, H, W, C), while shapes stay (N, C, H, W). Dropout on maps then draws other masks, as draws follow the memory.
        compile: ``"blocks"``: every block by ``torch.compile``; ``None``: none.
        backend: of ``torch.compile``.

    Raises:
        ValueError: any of these is something else.
    """

    def __init__(self, channels_last: bool = False, compile: str | None = None, backend: str = "inductor") -> None:
        if type(channels_last) is not bool:
            raise ValueError(f"channels_last is {channels_last!r}, expected true or false")
        if compile is not None and compile not in COMPILE:
            raise ValueError(f"compile is {compile!r}, expected 'blocks' (every block by itself), or None")
        if compile is None and backend != "inductor":
            raise ValueError(f"compile_backend is {backend!r}, but nothing is compiled: set compile=blocks, too")
        # The list takes seconds, so it is not asked for without need.
        if compile is not None and backend not in torch.compiler.list_backends(()):
            known = ", ".join(torch.compiler.list_backends())
            raise ValueError(f"compile_backend is {backend!r}, expected one of {known}")
        self.channels_last, self.compile, self.backend = channels_last, compile, backend
        self._compiled: dict[str, Callable[..., Any]] = {}

    def check(self, blocks: Blocks, inputs: Tensor) -> None:
        """Refuse a layout of images where there are none.

        Raises:
            ValueError: the inputs, or all weights of the network, have another number of axes than four.
        """
        if not self.channels_last:
            return
        if inputs.ndim != 4:
            raise ValueError(
                f"channels_last is how images (N, C, H, W) lie in memory, and this task's inputs have shape "
                f"{tuple(inputs.shape)}: leave it out"
            )
        if not any(p.ndim == 4 for p in blocks.parameters()):
            raise ValueError(
                "channels_last is how convolutions work faster, and this network has none in its blocks: leave it out"
            )

    def prepare(self, rule: nn.Module, blocks: Blocks) -> None:
        """Lay out the weights of a rule and have its blocks run compiled; again without effect."""
        self.lay_out(rule)
        self.compile_each(blocks)

    def compile_each(self, blocks: Blocks) -> None:
        """Have every block run compiled, which is done when it is run. Copies of blocks share what has been compiled."""
        if self.compile is None:
            return
        for name, block in blocks.members.items():
            if block._compiled_call_impl is None:  # else somebody has compiled it already
                if name not in self._compiled:
                    self._compiled[name] = _Compiled(name, self.backend)
                block._compiled_call_impl = _CompiledBlock(name, block, self._compiled[name])

    def lay_out(self, module: nn.Module) -> None:
        """Put weights and buffers of four axes into the memory format."""
        if self.channels_last:
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.ndim == 4:
                    tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)

    def given(self, value: _T) -> _T:
        """The same, nested as it is, with tensors of four axes in the memory format."""
        if not self.channels_last:
            return value
        moved: _T = tree_map(_last, value)
        return moved

    def check_ran(self, blocks: Blocks, learned: Callable[[str], bool], owner: str) -> None:
        """Make sure, after a first step, that what was asked for is done.

        Args:
            blocks: the network.
            learned: whether the block of this name has learned from it.
            owner: the rule.

        Raises:
            ValueError: a block has never run compiled.
        """
        for name, block in blocks.members.items():
            call = block._compiled_call_impl
            if isinstance(call, _CompiledBlock) and not call.ran and learned(name):
                raise ValueError(
                    f"compile is 'blocks', but {owner} never runs block {name!r} as a whole: it takes the block apart, or "
                    "watches or replaces what happens inside of it; set compile=null, or use another algorithm"
                )

    def explain(self, error: RuntimeError) -> None:
        """Raise a clearer error where a network cannot have its images with channels last, else nothing.

        Raises:
            ValueError: the network looks at a map with ``view``, which needs channels first.
        """
        if self.channels_last and "view size is not compatible" in str(error):
            raise ValueError(
                "channels_last cannot be used, because this network, or what the rule adds, calls view() on a map, for which "
                "channels must come first in memory: write flatten() or reshape() there, or leave channels_last out"
            ) from error

    @staticmethod
    def undo(blocks: Blocks) -> None:
        """Have the blocks run uncompiled again; the memory format of their weights stays."""
        for block in blocks:
            if isinstance(block._compiled_call_impl, _CompiledBlock):
                block._compiled_call_impl = None


def _last(leaf: Any) -> Any:
    known = isinstance(leaf, Tensor) and leaf.ndim == 4
    return leaf.contiguous(memory_format=torch.channels_last) if known else leaf


class _Compiled:
    """Runs a block's forward compiled, the block given as first argument.

    How often something is compiled anew is limited by function, so there is one for each mode: training, gradients, inference.
    """

    def __init__(self, name: str, backend: str) -> None:
        self._name, self._backend = name, backend
        self._made: dict[tuple[bool, bool, bool], Callable[..., Any]] = {}

    def __call__(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        from torch._dynamo import exc  # takes seconds, so not where nothing is compiled

        limits = tuple(getattr(exc, name) for name in _LIMITS if hasattr(exc, name))
        mode = (block.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if mode not in self._made:
            self._made[mode] = _compiled(self._backend)
        try:
            return self._made[mode](block, *args, **kwargs)
        except limits:
            self._made[mode] = _plain
            warnings.warn(
                f"block {self._name!r} runs in more ways than PyTorch compiles of one function (the limit is "
                "torch._dynamo.config.cache_size_limit), so from here on it runs uncompiled, with the same result",
                stacklevel=2,
            )
            return _plain(block, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Compiled:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _Compiled, (self._name, self._backend)  # compiled anew where it is read


_LIMITS = ("FailOnRecompileLimitHit", "RecompileLimitExceeded")  # the latter in PyTorch 2.6


def _plain(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return block.forward(*args, **kwargs)


def _compiled(backend: str) -> Callable[..., Any]:
    def run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return block.forward(*args, **kwargs)

    # How often something is compiled anew is counted, and limited, by code object: every block has one of its own.
    run.__code__ = run.__code__.replace()
    # Dropout must draw what it draws uncompiled.
    options: dict[str, Any] | None = {"fallback_random": True} if backend == "inductor" else None
    compiled: Callable[..., Any] = torch.compile(run, fullgraph=True, backend=backend, options=options)
    return compiled


class _CompiledBlock:
    """Stands for the call of a block: its own hooks run as ever, around a forward that is compiled.

    Attributes:
        ran: whether it has run compiled.
    """

    def __init__(self, name: str, block: nn.Module, run: Callable[..., Any]) -> None:
        self._name, self._block, self._run = name, block, run
        self._inside = [module for module in block.modules() if module is not block]
        self.ran = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block = self._block
        call: Callable[..., Any] = block._call_impl  # hooks, and forward between them
        if _watched(self._inside):
            return call(*args, **kwargs)
        own = vars(block).get("forward")
        vars(block)["forward"] = self._forward_with(own)
        try:
            return call(*args, **kwargs)
        finally:
            _put_back(block, own)

    def _forward_with(self, own: Any) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            _put_back(self._block, own)  # it is what gets compiled
            from torch._dynamo.exc import TorchDynamoException  # takes seconds, so not where nothing is compiled

            try:
                made = self._run(self._block, *args, **kwargs)
            except TorchDynamoException as error:
                self._block.forward(*args, **kwargs)  # a mistake in what is given tells of itself
                raise ValueError(
                    f"block {self._name!r} cannot be compiled as a whole: {_said(error)}; set compile=null, or change what the "
                    "block does there"
                ) from error
            self.ran = True
            return made

        return forward

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copy runs uncompiled until it is prepared

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def _put_back(block: nn.Module, own: Any) -> None:
    if own is None:
        vars(block).pop("forward", None)
    else:
        vars(block)["forward"] = own


_HOOKS = ("forward", "forward_pre", "backward", "backward_pre")


def _watched(inside: Iterable[nn.Module]) -> bool:
    """Whether somebody wants to see what happens inside of a block, which compiled code does not show."""
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None  # vmap, jvp and the like
        or any(getattr(_module, f"_global_{kind}_hooks") for kind in _HOOKS)
        or any(not isinstance(mode, DeviceContext) for mode in modes)
        or any(getattr(m, f"_{kind}_hooks") for m in inside for kind in _HOOKS)
    )


def _said(error: Exception) -> str:
    """What PyTorch says, without its advice on how to make it say more."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = " ".join(line for line in lines[:2] if "TORCHDYNAMO_VERBOSE" not in line)
    if "C++ compiler" in told or "triton" in told.lower():
        told += " (install one: g++, say, or on a GPU the package triton)"
    return told.rstrip(".")
