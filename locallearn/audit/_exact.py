"""Exact gradients to hold a rule's steps against: who makes the same steps has differentiated the network, by whatever way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from locallearn.algorithms.base import Algorithm, selected
from locallearn.audit._replay import Randomness, stages
from locallearn.batch import Batch

_FEWEST = 20  # entries of a weight from which likeness tells something
_NEURONS = 4  # rows of it in which they stand
_ALIKE = 0.99
_FAINT = 1e-4  # share of the largest entry below which rounding makes the sign


def exact_gradients(
    twin: Algorithm, batch: Batch, randomness: Randomness, context: Callable[[], AbstractContextManager[Any]], seed: int
) -> list[dict[str, Tensor]]:
    """Gradients of the usual losses of the network's output, and of the rule's own, by path of the weight.

    Args:
        twin: a copy, whose weights are taken as they are.
        batch: to differentiate on.
        randomness: what the rule's own run had, too.
        context: entered for the forward pass.
        seed: of all random numbers.

    Returns:
        One dictionary per loss that takes these outputs and targets; none: the network does not run on the inputs as they are.
    """
    named = {f"{name}.{path}": p for name, stage in stages(twin).items() for path, p in stage.named_parameters()}
    weights = {name: p for name, p in named.items() if p.is_floating_point() and p.ndim > 1}
    for p in weights.values():
        p.requires_grad_()
    found = []
    try:
        with randomness.repeated(seed), torch.enable_grad():
            with context():
                output, targets = selected(batch, twin.train().blocks(batch.inputs, *batch.context))
            for loss in _losses(twin, output, targets):
                gradients = torch.autograd.grad(loss, list(weights.values()), retain_graph=True, allow_unused=True)
                parts = zip(weights, gradients, strict=True)
                found.append({name: g.detach().double().cpu() for name, g in parts if g is not None})
    except (RuntimeError, ValueError, TypeError, IndexError):  # the rule puts something in front of the network
        return []
    return found


def _losses(rule: Algorithm, output: Tensor, targets: Tensor) -> Iterator[Tensor]:
    own = getattr(rule, "_loss", None)
    if callable(own):
        yield own(output, targets).sum()
    if targets.is_floating_point():
        if targets.shape == output.shape:
            yield F.mse_loss(output.float(), targets.float())
            yield F.l1_loss(output.float(), targets.float())
            yield F.binary_cross_entropy_with_logits(output.float(), targets.float())
    elif output.ndim == 2 and targets.ndim == 1:
        wanted = F.one_hot(targets.long(), output.shape[1]).float()
        yield F.cross_entropy(output.float(), targets.long())
        yield F.mse_loss(output.float(), wanted)
        yield F.mse_loss(output.float().softmax(1), wanted)
        yield F.binary_cross_entropy_with_logits(output.float(), wanted)


def alike(step: Tensor, gradient: Tensor, signs: bool) -> bool:
    """Whether a step has a gradient's direction, or the sign of each of its entries.

    Args:
        step: of one weight, of two dimensions or more.
        gradient: of the same weight.
        signs: whether signs are enough.
    """
    loud = gradient.abs() > _FAINT * gradient.abs().max()
    # In a few entries, or in those of a few neurons, anything may look alike.
    if int(loud.sum()) < _FEWEST or int(loud.flatten(1).any(1).sum()) < _NEURONS or not bool(gradient.isfinite().all()):
        return False
    if float(F.cosine_similarity(step.flatten(), gradient.flatten(), dim=0, eps=0.0)) > _ALIKE:
        return True
    return signs and float((step[loud].sign() == gradient[loud].sign()).double().mean()) > _ALIKE
