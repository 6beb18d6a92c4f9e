"""Small nets of every kind that a user has, trained a little on digits, and their Hessians in the plainest way."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from workbench.zoo.digits import digits


class Rows(nn.Module):
    """Images as sequences of rows: an embedding, a body, a mean over rows, a classifier."""

    def __init__(self, embed: nn.Module, body: nn.Module, width: int) -> None:
        super().__init__()
        self.embed, self.body, self.head = embed, body, nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        found = self.body(self.embed(x.squeeze(1)))
        return self.head((found if isinstance(found, Tensor) else found[0]).mean(1))


class Tied(nn.Module):
    """A model of the next token whose embedding is also its output layer."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.mix = nn.Linear(width, width)
        self.out = nn.Linear(width, tokens, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.embed(ids))))


def perceptron(width: int, activation: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, width), activation(), nn.Linear(width, 10))


def convolutional(channels: int) -> nn.Module:
    layers = (nn.Conv2d(1, channels, 3), nn.BatchNorm2d(channels), nn.GELU(), nn.AvgPool2d(3), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(4 * channels, 10))


def attending(width: int) -> nn.Module:
    body = nn.TransformerEncoderLayer(width, 2, 2 * width, activation="gelu", batch_first=True)
    return Rows(nn.Linear(8, width), body, width)


def partly_frozen(width: int) -> nn.Module:
    layers = (nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, width), nn.Tanh(), nn.Linear(width, 10))
    made = nn.Sequential(*layers)
    made[1].requires_grad_(False)
    return made


SMALL: dict[str, Callable[[], nn.Module]] = {
    "dense GELU": lambda: perceptron(20, nn.GELU),
    "conv + BatchNorm": lambda: convolutional(8),
    "transformer encoder": lambda: attending(6),
    "LSTM": lambda: Rows(nn.Identity(), nn.LSTM(8, 5, batch_first=True), 5),
    "tied embedding": lambda: Tied(17, 14),
    "partly frozen": lambda: partly_frozen(24),
    "dense ReLU": lambda: perceptron(20, nn.ReLU),
}
"""About 350 to 560 parameters each."""

FULL: dict[str, Callable[[], nn.Module]] = {
    "dense GELU": lambda: perceptron(90, nn.GELU),
    "conv + BatchNorm": lambda: convolutional(40),
    "transformer encoder": lambda: attending(16),
    "LSTM": lambda: Rows(nn.Identity(), nn.LSTM(8, 20, batch_first=True), 20),
    "tied embedding": lambda: Tied(17, 40),
    "partly frozen": lambda: partly_frozen(80),
    "dense ReLU": lambda: perceptron(90, nn.ReLU),
}
"""About 2000 to 3000 parameters each."""


@dataclass(frozen=True)
class Trained:
    """A net after some steps, in eval mode and float64, and the examples it is looked at on."""

    model: nn.Module
    data: tuple[Tensor, Tensor]

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def loss(self, model: nn.Module) -> Tensor:
        """The mean loss in plain PyTorch."""
        with sdpa_kernel(SDPBackend.MATH):
            return F.cross_entropy(model(self.data[0]).reshape(self.data[1].numel(), -1), self.data[1].reshape(-1))

    @functools.cached_property
    def hessian(self) -> Tensor:
        """∇²L row by row, on a deep copy: the gradient of each entry of the gradient."""
        model = copy.deepcopy(self.model)
        params = [p for p in model.parameters() if p.requires_grad]
        first = torch.autograd.grad(self.loss(model), params, create_graph=True)
        entries = torch.cat([g.reshape(-1) for g in first])
        return torch.stack([_flat(torch.autograd.grad(entry, params, retain_graph=True)) for entry in entries])

    @functools.cached_property
    def eigenvalues(self) -> Tensor:
        """All of them, largest first."""
        return torch.linalg.eigvalsh(self.hessian).flip(0)


def _flat(tensors: Any) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def examples(model: nn.Module, count: int) -> tuple[Tensor, Tensor]:
    """Digits; for a model of tokens, brightness along the rows and what comes next."""
    x, y = (t[:count] for t in digits().train)
    if isinstance(model, Tied):
        ids = ((x + 1) * 8).long().reshape(count, 64)[:, 16:33]
        return ids[:, :-1], ids[:, 1:]
    return x.double(), y


def trained(build: Callable[[], nn.Module], steps: int = 150, count: int = 70) -> Trained:
    """Build and train by Adam from seed 0, leaving the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().double()
        data = examples(model, count)
        made = Trained(model, data)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            made.loss(model).backward()
            optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():  # values that float32 holds too, so that its readings are of the same point
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.copy_(tensor.float())
    model.eval()
    return made


@functools.cache
def small(name: str) -> Trained:
    """One of the small nets, trained once a session."""
    return trained(SMALL[name])
