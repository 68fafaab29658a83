"""Whether a network that was cut is still that network: outputs, statistics and gradients, in both modes, at several inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from locallearn.nets.trace import in_mode, preserved

Values = Mapping[str, Any]
"""Arguments of a network by name, the main one first."""


def check_equal(
    net: nn.Module,
    chain: nn.Module,
    own: Callable[[Values], Tensor],
    cut: Callable[[Values], Tensor],
    example: Values,
    parts: Mapping[str, nn.Module],
) -> None:
    """Compare a network with the chain of its pieces.

    Both run the example and others made from it (scaled, negated, noise, fewer samples), in eval and in training mode, with
    the same draws. Outputs, buffers afterwards and gradients of all parameters must agree within rounding (1e-4 relative to
    the largest entry). Nothing is left of it: buffers, modes, gradients and PyTorch's generators are put back.

    Args:
        net: the network.
        chain: its pieces.
        own: output of the network.
        cut: output of the chain.
        example: what both take.
        parts: pieces by name, for the message.

    Raises:
        ValueError: they differ, the network cannot run the example, or the chain cannot.
    """
    example = some_rows(example)
    for training in (False, True):
        when = "training" if training else "evaluation"
        for label, values in _variants(example, training):
            with in_mode(net, training), in_mode(chain, training):
                try:
                    want, states = _run(net, chain, own, values)
                except Exception as error:
                    if label:
                        continue  # the network does not take this input, so nothing can be compared
                    raise ValueError(
                        f"{type(net).__name__} cannot run the example in {when} mode: {_first_line(error)}"
                    ) from error
                try:
                    got, moved = _run(net, chain, cut, values)
                except Exception as error:
                    raise ValueError(
                        f"{type(net).__name__} cannot be cut here: in {when} mode{label} its pieces fail where its own "
                        f"forward does not ({_first_line(error)})"
                    ) from error
                if not _close(want, got) or not all(_close(a, b) for a, b in zip(states, moved, strict=True)):
                    piece = _culprit(net, chain, own, cut, values, parts)
                    raise ValueError(
                        f"{type(net).__name__} cannot be cut here: in {when} mode{label} its pieces one after another do not "
                        f"give what its own forward gives, from {piece!r} on: something happens outside of {', '.join(parts)}"
                    )
        with in_mode(net, training), in_mode(chain, training):
            name = _other_gradient(net, own, cut, example)
        if name is not None:
            raise ValueError(
                f"{type(net).__name__} cannot be cut here: in {when} mode its pieces give {name!r} another gradient than "
                "its own forward does"
            )


def some_rows(example: Values, most: int = 3) -> Values:
    """A few samples, two at least, where it is samples that the inputs have in common; else all as it is."""
    rows = rows_of(example)
    if rows is None:
        return example
    if rows == 1:
        return {name: _sliced(value, rows, lambda t: torch.cat((t, t))) for name, value in example.items()}
    return {name: _sliced(value, rows, lambda t: t[:most]) for name, value in example.items()}


def rows_of(example: Values) -> int | None:
    """Number of samples, where all tensors have it in common."""
    tensors = [value for value in example.values() if isinstance(value, Tensor)]
    if not tensors or any(t.ndim == 0 or len(t) != len(tensors[0]) for t in tensors) or not len(tensors[0]):
        return None
    return len(tensors[0])


def _sliced(value: Any, rows: int, change: Callable[[Tensor], Tensor]) -> Any:
    return change(value) if isinstance(value, Tensor) and value.ndim and len(value) == rows else value


def _variants(example: Values, training: bool) -> Iterator[tuple[str, Values]]:
    """Inputs with a few words for the message."""
    yield "", example
    name = next(iter(example))
    x = example[name]
    rows = rows_of(example)
    if rows is not None and rows > 2:  # from here on with another number of samples
        example = {key: _sliced(value, rows, lambda t: t[1:]) for key, value in example.items()}
        x, rows = example[name], rows - 1
    if isinstance(x, Tensor) and x.is_floating_point():
        for factor in (-10.0, 0.1, 1000.0):
            yield f" at {factor:g} times the example", {**example, name: x * factor}
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        yield " on noise", {**example, name: noise}
    elif isinstance(x, Tensor) and x.ndim > 1:
        yield " on the example turned round", {**example, name: x.flip(-1)}
    if rows is not None and not training:
        yield " on one sample", {key: _sliced(value, rows, lambda t: t[:1]) for key, value in example.items()}


def _run(
    net: nn.Module, chain: nn.Module, run: Callable[[Values], Tensor], values: Values
) -> tuple[Tensor, list[Tensor]]:
    """The output and the chain's buffers after a pass."""
    with _same_draws(net), torch.no_grad():
        output = run(_copied(values))
        if not isinstance(output, Tensor):
            raise TypeError(f"its output is a {type(output).__name__}, expected a tensor")
        return output.clone(), [buffer.clone() for buffer in chain.buffers()]


@contextmanager
def _same_draws(net: nn.Module) -> Iterator[None]:
    """Every module draws the same in every run, whatever ran before it: a head that is not needed may draw, too."""
    devices = {p.get_device() for p in net.parameters() if p.is_cuda}
    counts: dict[int, int] = {}

    def seed(number: int) -> None:
        torch.default_generator.manual_seed(number)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(number)

    def begin(number: int, module: nn.Module, args: Any) -> None:
        counts[number] = counts.get(number, 0) + 1
        seed(1000 * number + counts[number])

    hooks = [m.register_forward_pre_hook(partial(begin, i)) for i, m in enumerate(net.modules()) if m is not net]
    try:
        with preserved(net):
            seed(0)
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _copied(values: Values) -> Values:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in values.items()}


def _close(want: Tensor, got: Tensor) -> bool:
    if want.shape != got.shape or want.dtype is not got.dtype:
        return False
    if not want.is_floating_point() or not want.numel():
        return torch.equal(want, got)
    finite = want[torch.isfinite(want)]
    size = float(finite.abs().max()) if finite.numel() else 1.0
    return torch.allclose(want, got, rtol=1e-4, atol=1e-5 * max(size, 1e-6), equal_nan=True)


def _other_gradient(
    net: nn.Module, own: Callable[[Values], Tensor], cut: Callable[[Values], Tensor], example: Values
) -> str | None:
    """Name of the first parameter whose gradient differs."""
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    found = []
    for run in (own, cut):
        with _same_draws(net), torch.enable_grad():
            output = run(_copied(example))
            if not named or not output.requires_grad:
                return None
            weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
            found.append(torch.autograd.grad((output * weights).sum(), [p for _, p in named], allow_unused=True))
    for (name, _), a, b in zip(named, *found, strict=True):
        if (a is None) is not (b is None) or (a is not None and b is not None and not _close(a.detach(), b.detach())):
            return str(name)
    return None


def _culprit(
    net: nn.Module,
    chain: nn.Module,
    own: Callable[[Values], Tensor],
    cut: Callable[[Values], Tensor],
    values: Values,
    parts: Mapping[str, nn.Module],
) -> str:
    """The first piece in which a module of the network gives something else than in the network's own forward."""
    modules = [module for module in net.modules() if module is not net]
    heard: list[list[tuple[int, Tensor]]] = []
    for run in (own, cut):
        notes: list[tuple[int, Tensor]] = []

        def note(module: nn.Module, args: Any, output: Any, notes: list[tuple[int, Tensor]] = notes) -> None:
            if isinstance(output, Tensor):
                notes.append((id(module), output.detach().clone()))

        hooks = [module.register_forward_hook(note) for module in modules]
        try:
            _run(net, chain, run, values)
        finally:
            for hook in hooks:
                hook.remove()
        heard.append(notes)
    both = {key for key, _ in heard[0]} & {key for key, _ in heard[1]}
    mine, theirs = ([(key, t) for key, t in notes if key in both] for notes in heard)
    owner = {id(module): name for name, part in parts.items() for module in part.modules()}
    for (key, a), (other, b) in zip(mine, theirs, strict=False):
        if key != other or not _close(a, b):
            return owner.get(other, owner.get(key, next(iter(parts))))
    return list(parts)[-1]


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0].rstrip(".") if text else type(error).__name__
