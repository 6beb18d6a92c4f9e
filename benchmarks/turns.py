"""What benchmarks share: contenders that take turns, and nets that more than one of them measures.

Not run by itself; each benchmark is run as a file, so that this folder is where it imports from.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Seconds = dict[str, dict[str, np.ndarray]]
"""By contender and clock ("cpu", "wall"): one entry a round."""


def turns(contenders: dict[str, Callable[[], Any]], rounds: int) -> Seconds:
    """CPU and wall seconds of each contender, one after another in every round; the first round only warms."""
    found: dict[str, Any] = {name: {"cpu": [], "wall": []} for name in contenders}
    for number in range(rounds + 1):
        for name, work in contenders.items():
            gc.collect()
            cpu, wall = time.process_time(), time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                found[name]["cpu"].append(time.process_time() - cpu)
                found[name]["wall"].append(time.perf_counter() - wall)
    return {name: {clock: np.array(seconds) for clock, seconds in each.items()} for name, each in found.items()}


def fitted(net: nn.Module, x: Tensor, y: Tensor, steps: int, rate: float = 1e-3) -> nn.Module:
    """The net after some steps of Adam on its one batch, without gradients."""
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return net


class Residual(nn.Module):
    """Two convolutions with BatchNorm and a way around them."""

    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(ins, outs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outs),
            nn.ReLU(),
            nn.Conv2d(outs, outs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outs),
        )
        same = stride == 1 and ins == outs
        self.around = nn.Identity() if same else nn.Conv2d(ins, outs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.around(x))


class Encoder(nn.Module):
    """Transformer layers over tokens, mean, classifier."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)).mean(1))
