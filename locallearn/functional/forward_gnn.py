"""Equations of ForwardGNN: every layer of a graph network learns from its own output on a graph that shows the labels.

Source: N. Park, X. Wang, A. Simoulin, S. Yang, G. Yang, R. Rossi, P. Trivedi, N. Ahmed, "Forward Learning of Graph Neural
Networks", ICLR 2024, arXiv 2403.11004, Sections 3 and 4, and the authors' code where the text leaves something open.

Symbols: N nodes, E edges, K classes, V_tr the M nodes whose labels train, H `(N, d)` a layer's output with rows h_i,
C `(K, d)` its rows for the virtual nodes, θ threshold, τ temperature, σ the logistic function.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def normalise(x: Tensor) -> Tensor:
    """Scale every row to length 1, x / (‖x‖ + 1e-8); a row of zeros stays zero.

    Every layer reads its input like this, so that no layer can read off how well the one below has learned.

    Args:
        x: shape ``(..., d)``.

    Returns:
        Same shape and dtype; the length is computed in at least single precision.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return (x / (length + 1e-8)).to(x.dtype)


def join_virtual_nodes(edges: Tensor, rows: Tensor, labels: Tensor, nodes: int) -> Tensor:
    """Add an edge in both directions between every labelled node and the virtual node of its class.

    The virtual node of class k is node N + k. A node that is not in ``rows`` gets no such edge.

    Args:
        edges: edge index of the graph, shape ``(2, E)``, int64.
        rows: labelled nodes, shape ``(M,)``, int64.
        labels: their class ids, shape ``(M,)``, int64.
        nodes: N.

    Returns:
        Edge index of N + K nodes, shape ``(2, E + 2M)``.
    """
    virtual = nodes + labels
    return torch.cat((edges, torch.stack((rows, virtual)), torch.stack((virtual, rows))), 1)


def label_columns(rows: Tensor, labels: Tensor, nodes: int, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """One column per class: one-hot for labelled nodes, 1/K everywhere for all others.

    Args:
        rows: labelled nodes, shape ``(M,)``, int64.
        labels: their class ids, shape ``(..., M)``, int64; every leading index is another labelling of the same nodes.
        nodes: N.
        classes: K.
        dtype: of the result.

    Returns:
        Shape ``(..., N, K)``.
    """
    columns = torch.full((*labels.shape[:-1], nodes, classes), 1 / classes, dtype=dtype, device=labels.device)
    columns[..., rows, :] = F.one_hot(labels, classes).to(dtype)
    return columns


def wrong_labels(labels: Tensor, classes: int, generator: Generator) -> Tensor:
    """Put the K − 1 wrong classes of every node into a random order, one for each negative graph.

    Args:
        labels: true class ids, shape ``(M,)``, int64.
        classes: K.
        generator: the only source of randomness; it may live on another device than the labels.

    Returns:
        Shape ``(K − 1, M)``, int64, on the labels' device: every column holds each wrong class once.

    Raises:
        ValueError: fewer than two classes, so that no label is wrong.
    """
    if classes < 2:
        raise ValueError(f"classes={classes} leaves no wrong label: negative graphs need at least 2 classes.")
    draws = torch.rand((classes - 1, len(labels)), generator=generator, device=generator.device)
    order = draws.argsort(0).to(labels.device)
    return order + (order >= labels)


def virtual_logits(h: Tensor, virtual: Tensor, temperature: float = 1.0) -> Tensor:
    """Agreement of nodes with the virtual nodes, z_ik = h_i·c_k / τ, in at least single precision.

    Args:
        h: rows of nodes, shape ``(M, d)``.
        virtual: C, rows of the virtual nodes, shape ``(K, d)``.
        temperature: τ.

    Returns:
        Class logits ``(M, K)``. The loss of a layer is their mean cross entropy with the labels (single forward, SF);
        its gradient goes through h and C both.
    """
    dtype = torch.promote_types(h.dtype, torch.float32)
    return h.to(dtype) @ virtual.to(dtype).T / temperature


def goodness(h: Tensor) -> Tensor:
    """Return g_i = Σ_d h_id², in at least single precision.

    Args:
        h: shape ``(..., d)``.

    Returns:
        Shape ``(...)``.
    """
    return h.to(torch.promote_types(h.dtype, torch.float32)).square().sum(-1)


def forward_forward_loss(positive: Tensor, negative: Tensor, threshold: float = 2.0) -> Tensor:
    """Return mean softplus(θ − g⁺) + mean softplus(g⁻ − θ).

    Args:
        positive: g⁺ of every node, or the score of every true edge, shape ``(M,)``.
        negative: g⁻ of the same nodes on the K − 1 negative graphs, shape ``(K − 1, M)``, or of the false edges.
        threshold: θ.

    Returns:
        A scalar.
    """
    # Not F.softplus: beyond 20 it cuts to the identity, which costs double precision half its digits.
    return -F.logsigmoid(positive - threshold).mean() - F.logsigmoid(threshold - negative).mean()


def edge_products(h: Tensor, pairs: Tensor) -> Tensor:
    """Return the edge vectors h_i ⊙ h_j, in at least single precision.

    Args:
        h: shape ``(N, d)``.
        pairs: ends of the edges, shape ``(2, M)``, int64.

    Returns:
        Shape ``(M, d)``. The logit of an edge is the sum of its vector (CE), or that of its squares minus θ (FF).
    """
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    return wide[pairs[0]] * wide[pairs[1]]


def mean_probability_logit(logits: Tensor) -> Tensor:
    """Logit of the mean of probabilities that are given as logits: with p = mean σ(s), return log p − log(1 − p).

    Args:
        logits: s, shape ``(L, M)``.

    Returns:
        Shape ``(M,)``.
    """
    return torch.logsumexp(F.logsigmoid(logits), 0) - torch.logsumexp(F.logsigmoid(-logits), 0)


def mean_log_softmax(logits: Tensor) -> Tensor:
    """Logarithm of the mean of class probabilities that are given as logits.

    Args:
        logits: shape ``(L, M, K)``.

    Returns:
        Shape ``(M, K)``.
    """
    return torch.logsumexp(logits.log_softmax(-1), 0) - math.log(len(logits))
