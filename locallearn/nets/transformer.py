"""Small transformers of images and of characters, one block per layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.nets.blocks import Blocks
from locallearn.nets.feedforward import Init, check_dropout, choice, image_size, initialise

Pooling = Literal["class", "mean"]


def vit(
    input_shape: Sequence[int],
    outputs: int,
    patch: int = 4,
    width: int = 192,
    depth: int = 6,
    heads: int = 3,
    mlp_ratio: float = 4.0,
    pool: Pooling = "class",
    dropout: float = 0.0,
    init: Init = "xavier_uniform",
) -> Blocks:
    """A vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929), its normalisations before attention and perceptron.

    Patches are embedded by one convolution, a learned position is added to each and, for ``pool="class"``, a class token put in
    front. Every encoder layer is one block, which gives ``(N, tokens, width)``; the embedding belongs to the first. The readout
    normalises, takes the class token or the mean over tokens, and maps it to the classes. With ``patch=16``, ``depth=12`` and
    images of 224x224 these are the 5.7 million weights of ViT-Tiny.

    Args:
        input_shape: ``(C, H, W)`` of one sample.
        outputs: number of classes.
        patch: side of a square patch; divides height and width.
        width: of a token.
        depth: encoder layers.
        heads: of the attention; divides ``width``.
        mlp_ratio: hidden width of the perceptrons over ``width``.
        pool: ``class`` or ``mean``: what the readout reads.
        dropout: probability, of what attention and perceptron add to a token.
        init: of all matrices, see :func:`~locallearn.nets.initialise`; positions and class token are drawn from N(0, .02²).

    Raises:
        ValueError: the input is not an image, a patch or head that does not divide, sizes below 1, no probability.
    """
    channels, height, columns = image_size(input_shape)
    sizes = {"patch": patch, "width": width, "depth": depth, "heads": heads, "mlp_ratio": int(width * mlp_ratio)}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {mlp_ratio if name == 'mlp_ratio' else size}, expected a positive number")
    if height % patch or columns % patch:
        raise ValueError(
            f"patch is {patch}, which does not divide an image of {height}x{columns}: choose a divisor of both sides"
        )
    if width % heads:
        raise ValueError(f"heads is {heads}, which does not divide the width of {width}: choose a divisor")
    choice("pool", pool, {"class": 0, "mean": 1})
    check_dropout(dropout)
    tokens = (height // patch) * (columns // patch)
    blocks: dict[str, nn.Module] = {}
    for i in range(depth):
        layer = EncoderLayer(width, heads, int(width * mlp_ratio), dropout)
        embedding = [PatchEmbedding(channels, patch, width, tokens, pool == "class")] if i == 0 else []
        blocks[f"layer{i + 1}"] = nn.Sequential(*embedding, layer) if embedding else layer
    net = Blocks(blocks, nn.Sequential(nn.LayerNorm(width), TokenPool(pool), nn.Linear(width, outputs)))
    initialise(net, init)
    return net


def char_transformer(
    input_shape: Sequence[int],
    outputs: int,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    mlp_ratio: float = 4.0,
    dropout: float = 0.0,
) -> Blocks:
    """A transformer that reads a window of characters and scores the next one; a character sees those before it only.

    Every layer is one block, normalised before attention and perceptron; the embedding belongs to the first, and the readout
    normalises, takes the last character and maps it to the classes. Matrices and embeddings are drawn from N(0, .02²).

    Args:
        input_shape: ``(length,)``: classes of characters, whole numbers.
        outputs: number of characters.
        width: of a character.
        depth: layers.
        heads: of the attention; divides ``width``.
        mlp_ratio: hidden width of the perceptrons over ``width``.
        dropout: probability, of what attention and perceptron add.

    Raises:
        ValueError: no window of characters, a head that does not divide, sizes below 1, or no probability.
    """
    if len(input_shape) != 1:
        raise ValueError(
            f"char_transformer reads windows of characters, (length,), and the inputs are {tuple(input_shape)}"
        )
    sizes = {"width": width, "depth": depth, "heads": heads, "mlp_ratio": int(width * mlp_ratio)}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {mlp_ratio if name == 'mlp_ratio' else size}, expected a positive number")
    if width % heads:
        raise ValueError(f"heads is {heads}, which does not divide the width of {width}: choose a divisor")
    check_dropout(dropout)
    blocks: dict[str, nn.Module] = {}
    for i in range(depth):
        layer = EncoderLayer(width, heads, int(width * mlp_ratio), dropout, causal=True)
        blocks[f"layer{i + 1}"] = layer if i else nn.Sequential(CharEmbedding(outputs, input_shape[0], width), layer)
    net = Blocks(blocks, nn.Sequential(nn.LayerNorm(width), LastToken(), nn.Linear(width, outputs)))
    for p in net.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.02)
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
    return net


class CharEmbedding(nn.Module):
    """Characters to tokens with learned positions.

    Args:
        characters: number of classes.
        length: of a window.
        width: of a token.
    """

    def __init__(self, characters: int, length: int, width: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Parameter(torch.zeros(1, length, width))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, length)`` to ``(N, length, width)``."""
        found: Tensor = self.characters(x.long())
        return found + self.positions


class LastToken(nn.Module):
    """The last token: ``(N, tokens, width)`` to ``(N, width)``."""

    def forward(self, x: Tensor) -> Tensor:
        """One vector per sample."""
        return x[:, -1]


class PatchEmbedding(nn.Module):
    """Images to tokens with learned positions.

    Args:
        channels: of the image.
        patch: side of a patch.
        width: of a token.
        tokens: patches of an image.
        class_token: put a learned token in front.
    """

    def __init__(self, channels: int, patch: int, width: int, tokens: int, class_token: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, patch, stride=patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width)) if class_token else None
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens + class_token, width))

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, tokens, width)``."""
        x: Tensor = self.conv(images).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat((self.token.expand(len(x), -1, -1), x), 1)
        return x + self.positions


class EncoderLayer(nn.Module):
    """``x + attention(norm(x))``, then ``x + perceptron(norm(x))``.

    Args:
        width: of a token.
        heads: of the attention.
        hidden: width of the perceptron.
        dropout: of what is added.
        causal: whether a token sees those before it only, and itself.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, tokens, width)`` to the same."""
        samples, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(samples, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.dropout(self.proj(mixed.transpose(1, 2).reshape(samples, tokens, width)))
        out: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return out


class TokenPool(nn.Module):
    """The first token, or the mean over tokens: ``(N, tokens, width)`` to ``(N, width)``.

    Args:
        pool: ``class`` or ``mean``.
    """

    def __init__(self, pool: Pooling) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """One vector per sample."""
        return x[:, 0] if self.pool == "class" else x.mean(1)
