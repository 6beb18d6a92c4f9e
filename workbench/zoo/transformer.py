"""A small transformer, built from plain JSON arguments."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from workbench.zoo.nets import initialise

Read = Literal["last", "mean", "every"]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); heads of ``head`` entries, ``hidden`` units in the mlp."""

    def __init__(self, width: int, head: int, hidden: int, causal: bool) -> None:
        super().__init__()
        self.head, self.causal = head, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(examples, tokens, width) to the same."""
        h = self.norm1(x)
        heads = (part(h).unflatten(-1, (-1, self.head)).transpose(1, 2) for part in (self.query, self.key, self.value))
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Tokens (examples, length) to outputs: embedding, places, blocks, norm, a linear map; see :func:`transformer`."""

    def __init__(
        self,
        tokens: int,
        outputs: int,
        length: int,
        width: int,
        head: int,
        depth: int,
        causal: bool,
        read: Read,
        hidden: int,
    ) -> None:
        super().__init__()
        self.read: Read = read
        self.embedding = nn.Embedding(tokens, width)
        self.places = nn.Parameter(torch.empty(length, width))
        self.blocks = nn.ModuleList(Block(width, head, hidden, causal) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """(examples, outputs), or (examples, length, outputs) where every token is read."""
        x = self.embedding(tokens) + self.places[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x if self.read == "every" else x[:, -1] if self.read == "last" else x.mean(1))


def transformer(
    tokens: int = 16,
    outputs: int = 16,
    length: int = 8,
    width: int = 32,
    head: int = 8,
    depth: int = 2,
    causal: bool = False,
    read: Read = "last",
    seed: int = 0,
    hidden: int = 0,
    embedding_scale: float = 1.0,
) -> Transformer:
    """A transformer with normalisation before each branch.

    Args:
        tokens: size of the vocabulary.
        outputs: number of outputs.
        length: most tokens in an example.
        width: of the residual stream; a multiple of ``head``.
        head: entries of one attention head, of which there are width / head.
        depth: number of blocks.
        causal: whether tokens see only those before them.
        read: "last" token, "mean" over tokens, or "every" token.
        seed: of the initial weights: linear maps as in :func:`workbench.zoo.nets.dense`, embeddings and places N(0, 1)
            and N(0, 1/4).
        hidden: units of each block's mlp; 0 takes four times the width.
        embedding_scale: over the initial embeddings and places.
    """
    if min(tokens, outputs, length, width, head, depth) < 1 or width % head or hidden < 0:
        raise ValueError(f"transformer: width {width} must be a multiple of head {head}, and all sizes >= 1.")
    if read not in ("last", "mean", "every"):
        raise ValueError(f"transformer: read is 'last', 'mean' or 'every'; got {read!r}.")
    with torch.device("meta"):  # where nothing is drawn from the global random state
        shape = Transformer(tokens, outputs, length, width, head, depth, causal, read, hidden or 4 * width)
    net = initialise(shape.to_empty(device="cpu"), seed)
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    nn.init.normal_(net.embedding.weight, std=embedding_scale, generator=generator)
    nn.init.normal_(net.places, std=embedding_scale * math.sqrt(0.25), generator=generator)
    return net
