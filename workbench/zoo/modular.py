"""Modular addition: the task on which grokking was first seen, and two nets small enough to grok in seconds."""

from __future__ import annotations

import math
from typing import Literal, cast

import torch
from torch import Tensor, nn

Examples = tuple[Tensor, Tensor]


def pairs(modulus: int = 59) -> Examples:
    """Every pair of tokens (modulus², 2), a running slowest, and (a + b) mod modulus (modulus²,)."""
    if modulus < 2:
        raise ValueError(f"modular addition needs a modulus of at least 2; got {modulus}.")
    both = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus))
    return both, both.sum(1) % modulus


def split(modulus: int = 59, share: float = 0.5, seed: int = 0) -> tuple[Examples, Examples]:
    """(train, test): ``share`` of all pairs drawn without replacement by ``seed``, and all others."""
    if not 0 < share < 1:
        raise ValueError(f"the share of pairs to train on lies between 0 and 1; got {share}.")
    inputs, targets = pairs(modulus)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    train, test = order[: round(share * len(order))], order[round(share * len(order)) :]
    return (inputs[train], targets[train]), (inputs[test], targets[test])


class AddedEmbeddings(nn.Module):
    """Logits W φ(E₁[a] + E₂[b]) of two tokens: one hidden layer whose first map is an embedding for each place."""

    def __init__(self, modulus: int, width: int, activation: Literal["relu", "square"]) -> None:
        super().__init__()
        self.embedding_a = cast("nn.Embedding", nn.utils.skip_init(nn.Embedding, modulus, width))
        self.embedding_b = cast("nn.Embedding", nn.utils.skip_init(nn.Embedding, modulus, width))
        self.activation = nn.ReLU() if activation == "relu" else Square()
        self.readout = cast("nn.Linear", nn.utils.skip_init(nn.Linear, width, modulus, bias=False))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (n, modulus) of tokens (n, 2)."""
        return self.readout(self.activation(self.embedding_a(tokens[:, 0]) + self.embedding_b(tokens[:, 1])))


class Square(nn.Module):
    """x²: with it a net represents modular addition exactly, by products of waves (Gromov 2023, arXiv:2301.02679)."""

    def forward(self, x: Tensor) -> Tensor:
        """The square of each entry."""
        return x * x


def added_embeddings(
    modulus: int = 59,
    width: int = 128,
    activation: Literal["relu", "square"] = "square",
    scale: float = 1.0,
    seed: int = 0,
) -> AddedEmbeddings:
    """An :class:`AddedEmbeddings` net with weights of its own seed.

    Args:
        modulus: number of tokens and of classes.
        width: of the hidden layer.
        activation: "relu" or "square".
        scale: of the initial weights, over N(0, 1/width) for the embeddings and N(0, 1/width) for the read-out.
        seed: of the initial weights.
    """
    if activation not in ("relu", "square"):
        raise ValueError(f"unknown activation {activation!r}; known: relu, square.")
    net = AddedEmbeddings(modulus, width, activation)
    generator = torch.Generator().manual_seed(seed)
    for tensor in net.parameters():
        nn.init.normal_(tensor, std=scale / math.sqrt(width), generator=generator)
    return net


def waves(modulus: int = 59, frequency: int = 1, amplitude: float = 1.0) -> AddedEmbeddings:
    """The net that solves modular addition with one frequency, written down: its logits are A cos(2πk(a+b-c)/p).

    Hidden units s in {+, -}, t in {cos, sin}: φ(u) = u² makes 2 cos x cos y = ((cos x + cos y)² - (cos x - cos y)²)/2.
    """
    net = AddedEmbeddings(modulus, 8, "square").double()
    turn = 2 * math.pi * frequency * torch.arange(modulus, dtype=torch.float64) / modulus
    c, s = torch.cos(turn), torch.sin(turn)
    # cos(x+y) = cos x cos y - sin x sin y; sin(x+y) = sin x cos y + cos x sin y: each product is two squares.
    first, second = torch.stack([c, c, s, s, s, s, c, c], 1), torch.stack([c, -c, s, -s, c, -c, s, -s], 1)
    sign = torch.tensor([1.0, -1, -1, 1, 1, -1, 1, -1], dtype=torch.float64)
    with torch.no_grad():
        net.embedding_a.weight.copy_(first)
        net.embedding_b.weight.copy_(second)
        cos_part, sin_part = c[:, None] * sign[:4], s[:, None] * sign[4:]
        net.readout.weight.copy_(amplitude * torch.cat([cos_part, sin_part], 1) / 4)
    return net
