"""Networks as ordered, named blocks, and how to cut somebody's own network into them."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from locallearn.nets.border import Border, main
from locallearn.nets.equal import check_equal
from locallearn.nets.inplace import InputGuard, try_out

# A layer of these kinds belongs to the layer before it: it normalises that layer's output.
NORMALISATIONS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
# Containers that have no forward of their own cannot be run as a block.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class Blocks(nn.Module):
    """A network as an ordered sequence of named blocks and, where it has one, its output layer.

    A gradient may live inside a block; a layer-local algorithm never lets it cross the border to the next. The readout
    is kept apart because rules differ in what they do with it: backpropagation and Mono-Forward train it with the last
    block, Forward-Forward has no use for it.

    ``forward(x, *context)`` runs all blocks in order and then the readout: plain inference and plain backpropagation.
    ``context`` is handed unchanged to every block and to the readout (a graph's edge index, say). A block that works in
    place gets copies of what it writes into, whoever runs it (:class:`~locallearn.nets.inplace.InputGuard`). A block that
    hands over more than one tensor returns a :class:`~locallearn.nets.border.Border`, which the next block is given as its
    input; the readout gets the main one.

    Args:
        blocks: the blocks by name, in the order of the forward pass. At least one, each with parameters of its own.
        readout: maps the last block's output to the network's output; ``None`` if the network is features only.

    Raises:
        ValueError: no block, a name with a dot, a block named ``readout``, a container without a forward, or a parameter
            in two blocks.
    """

    def __init__(self, blocks: Mapping[str, nn.Module], readout: nn.Module | None = None) -> None:
        super().__init__()
        if not blocks:
            raise ValueError("a network needs at least one block, none was given")
        for name, block in blocks.items():
            if "." in name or not name:
                raise ValueError(f"block name {name!r} is not usable: give a non-empty name without a dot")
            if name == "readout":
                raise ValueError(
                    "a block is named 'readout', which is the output layer's name: rename it, or give it as readout="
                )
            if isinstance(block, _CONTAINERS):
                raise ValueError(
                    f"block {name!r} is a {type(block).__name__}, which has no forward of its own: "
                    "name its members instead, or wrap them in nn.Sequential"
                )
        _refuse_sharing({**blocks, **({"readout": readout} if readout is not None else {})})
        self.members = nn.ModuleDict(blocks)
        self.readout = readout
        for name, block in self._runnable.items():
            InputGuard(name).watch(block)

    @property
    def _runnable(self) -> dict[str, nn.Module]:
        return {**self.members, **({} if self.readout is None else {"readout": self.readout})}

    @property
    def names(self) -> list[str]:
        """Names of the blocks in the order of the forward pass."""
        return list(self.members.keys())

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.members.values())

    def __getitem__(self, index: int) -> nn.Module:
        return self.members[self.names[index]]

    def features(self, inputs: Tensor, *context: Any) -> Iterator[Tensor]:
        """Yield the main output of every block in turn, undetached, without the readout."""
        for block in self:
            inputs = block(inputs, *context)
            yield main(inputs)

    def forward(self, inputs: Tensor, *context: Any) -> Tensor:
        """Run every block and the readout."""
        for block in self:
            inputs = block(inputs, *context)
        output: Tensor = main(inputs)
        return output if self.readout is None else self.readout(output, *context)

    def carrier(self, inputs: Tensor, context: tuple[Any, ...]) -> str | None:
        """Name of the first block that hands over more than one tensor, found out by a pass; ``None``: there is none."""
        x: Any = inputs
        with torch.no_grad():
            for name, block in self.members.items():
                x = block(x, *context)
                if isinstance(x, Border):
                    return name
        return None

    def try_out(self, inputs: Tensor, context: tuple[Any, ...]) -> None:
        """Find out on copies, in training mode, which blocks write into what they are given, before training starts.

        Graphs of more than 16 million entries are not run for this; there the first step of training finds it out.
        """
        if not context or inputs.numel() <= 2**24:
            try_out(self._runnable, inputs, context)

    @classmethod
    def cut(
        cls,
        module: nn.Module,
        blocks: Sequence[str | Sequence[str]] | None = None,
        *,
        readout: str | None = None,
        example: Tensor | None = None,
    ) -> Blocks:
        """Cut a network into blocks. Its modules are used as they are, so training the blocks trains ``module``.

        An ``nn.Sequential`` needs no names: every layer with parameters starts a block, layers without parameters
        (activations, pooling, dropout) and normalisations stay with the block before them, and a last piece that is
        a bare linear layer becomes the readout. Any other module is cut by the names of its submodules, dotted paths
        included; a tuple of names makes one block of several submodules run in that order.

        Args:
            module: the network.
            blocks: names in the order of the forward pass, e.g. ``[("conv1", "bn1"), "layer1", "layer2"]``.
            readout: name of the submodule that maps the last block's output to the network's output.
            example: an input, shape ``(N, ...)``. Blocks run in a chain must give what the module's own forward gives, outputs
                and gradients, in training and evaluation mode, on this and on scaled, negated and noisy inputs. Needed
                wherever names are given, because nothing else shows what the forward does between them.

        Raises:
            ValueError: names the module that is missing, left out, shared, or that cannot be run in a chain.
        """
        if blocks is None:
            if not isinstance(module, nn.Sequential):
                raise ValueError(
                    f"{type(module).__name__} is not an nn.Sequential: name its submodules in the order of the forward "
                    f"pass; it has {_children(module)}"
                )
            result = cls(*_group_sequential(module))
        else:
            pieces = {_block_name(names): _piece(module, names) for names in blocks}
            if len(pieces) != len(blocks):
                raise ValueError(f"a submodule is named twice in {list(blocks)}")
            head = None if readout is None else _submodule(module, readout)
            if example is None:
                raise ValueError(
                    f"pass an example input: only by running it can the blocks of {type(module).__name__} be checked "
                    "against its own forward"
                )
            result = cls(pieces, head)
        _refuse_leftovers(module, result)
        if example is not None:
            _check_chain(module, result, example)
        return result


def width_of(output: Tensor) -> int:
    """How many outputs a network gives per sample: classes of ``(N, C, ...)``, and one of ``(N,)``."""
    return int(output.shape[1]) if output.ndim > 1 else 1


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode and every part back into its own mode afterwards: a dry run must move no statistics."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def fitted(module: nn.Module, x: Tensor) -> Tensor:
    """An example on the device of a module's first weight and, if it holds floats, in that weight's dtype."""
    weight = next(module.parameters())
    return x.to(weight.device, weight.dtype if x.is_floating_point() else x.dtype)


def refuse_half(blocks: Blocks) -> None:
    """Refuse blocks that would learn in float16.

    Raises:
        ValueError: names the block and the weight.
    """
    for block, module in blocks._runnable.items():
        for name, p in module.named_parameters():
            if p.dtype is torch.float16 and p.requires_grad:
                raise ValueError(
                    f"weight {name!r} of block {block!r} is float16, in which small steps are rounded away and Adam divides by "
                    "0: use float32 (net.float()) or bfloat16 (net.bfloat16()), or freeze it with requires_grad_(False)"
                )


def rest(root: nn.Module, resting: frozenset[str], asleep: Container[str], held: Container[int]) -> frozenset[str]:
    """Put the parts of a network into eval mode that do not learn, and those back into training mode that do again.

    ``requires_grad_(False)`` stops gradients and nothing else: normalisation statistics would go on moving, and dropout
    drawing. A part rests if it has parameters and none of them learns; what is inside of it (layers without parameters,
    too) rests with it, even where ``train()`` was called on the network since. Whatever else was put into eval mode by hand
    stays so.

    Args:
        root: in training mode; its parts are looked at, not ``root`` itself.
        resting: what the last call returned; empty where ``root.train()`` was called since.
        asleep: paths of parts that rest whether frozen or not.
        held: ids of parameters that do not count, frozen or not.

    Returns:
        Paths of the parts that rest, the uppermost ones.
    """
    found: dict[str, nn.Module] = {}

    def learns(module: nn.Module, path: str) -> bool | None:
        own = [p.requires_grad for p in module._parameters.values() if p is not None and id(p) not in held]
        for name, child in module._modules.items():
            if child is None:
                continue
            inner = f"{path}.{name}" if path else name
            if inner in asleep:
                found[inner] = child
                continue
            state = learns(child, inner)
            if state is False:
                for nested in [known for known in found if known.startswith(f"{inner}.")]:
                    del found[nested]
                found[inner] = child
            if state is not None:
                own.append(state)
        return any(own) if own else None

    learns(root, "")
    for path in resting - found.keys():
        root.get_submodule(path).train()
    for part in found.values():
        if part.training:  # new here, or woken by somebody's train() on the network alone
            part.eval()
    return frozenset(found)


def _children(module: nn.Module) -> str:
    return ", ".join(name for name, _ in module.named_children()) or "no submodules"


def _submodule(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{type(module).__name__} has no submodule {name!r}; it has {_children(module)}") from None


def _block_name(names: str | Sequence[str]) -> str:
    return (names if isinstance(names, str) else names[0]).replace(".", "_")


def _piece(module: nn.Module, names: str | Sequence[str]) -> nn.Module:
    if isinstance(names, str):
        return _submodule(module, names)
    return nn.Sequential(*(_submodule(module, name) for name in names))


def _group_sequential(module: nn.Sequential) -> tuple[dict[str, nn.Module], nn.Module | None]:
    groups: list[list[nn.Module]] = []
    started = False
    for child in module:
        own = any(True for _ in child.parameters())
        starts = own and not isinstance(child, NORMALISATIONS)
        if not groups or (starts and started):
            groups.append([])
        groups[-1].append(child)
        started = started or starts
    if not started:
        raise ValueError("the nn.Sequential has no layer with parameters, so there is nothing to train")
    readout: nn.Module | None = None
    if len(groups) > 1 and isinstance(groups[-1][0], nn.Linear) and len(groups[-1]) == 1:
        readout = groups.pop()[0]
        if isinstance(groups[-1][-1], nn.Flatten):
            # Flattening in front of the readout belongs to it: the block keeps the shape of its feature map.
            readout = nn.Sequential(groups[-1].pop(), readout)
    return {f"block{i}": nn.Sequential(*group) for i, group in enumerate(groups)}, readout


def _refuse_sharing(blocks: Mapping[str, nn.Module]) -> None:
    owner: dict[int, str] = {}
    for name, block in blocks.items():
        for path, parameter in block.named_parameters():
            other = owner.setdefault(id(parameter), name)
            if other != name:
                raise ValueError(
                    f"parameter {path!r} of block {name!r} is shared with block {other!r}: a weight can be trained by one "
                    "block only; put both into one block"
                )


def _refuse_leftovers(module: nn.Module, blocks: Blocks) -> None:
    inside = {id(p) for p in blocks.parameters()}
    left = [name for name, parameter in module.named_parameters() if id(parameter) not in inside]
    if left:
        raise ValueError(
            f"{type(module).__name__} has parameters that no block holds: {', '.join(left[:5])}"
            f"{' ...' if len(left) > 5 else ''}; name their submodules too"
        )


def _check_chain(module: nn.Module, blocks: Blocks, example: Tensor) -> None:
    """Run the blocks in a chain, and compare with the module's own forward, in both modes and at other inputs, too."""
    with evaluating(module), torch.no_grad():
        x: Any = example.clone()  # the first layer may work in place
        at = "the input"
        for name, block in [*blocks.members.items(), ("readout", blocks.readout)]:
            if block is None:
                continue
            try:
                x = block(main(x) if name == "readout" else x)
            except Exception as error:
                raise ValueError(
                    f"{type(module).__name__} cannot be cut before {name!r}: what comes from {at} "
                    f"does not fit it ({error}); its forward does something in between, so put that into a module"
                ) from error
            at = name
    check_equal(
        module,
        blocks,
        lambda values: module(values["input"]),
        lambda values: blocks(values["input"]),
        {"input": example},
        blocks._runnable,
    )


def through(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Run these modules one after another."""
    for module in modules:
        x = module(x)
    return x


def in_order(block: nn.Module) -> Iterator[nn.Module]:
    """Modules that a block runs one after another: those of plain containers within it, too, and nothing that does nothing."""
    if type(block) is nn.Sequential:
        for child in block:
            yield from in_order(child)
    elif not isinstance(block, nn.Identity):
        yield block
