"""Copies of one net trained side by side: one batched pass where a loop would take as many passes as there are nets."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

TOGETHER = 8
"""Nets whose losses are taken at once: their activations then stay in the processor's cache."""


class Stack:
    """Nets of one architecture, each with weights and a learning rate of its own, trained by plain gradient descent.

    Every net takes the steps that it would take alone (to rounding): ``torch.func.vmap`` over stacked weights only
    saves the overhead of many small passes. Costs the memory of all nets, their gradients and activations together.

    Args:
        nets: ``n`` nets of equal shapes without buffers; the first one's ``forward`` is used for all. They stay as
            they are.
        rates: learning rates, one for each net.

    Raises:
        ValueError: no nets, as many rates as nets not given, or nets with buffers (BatchNorm's statistics would be
            shared).
    """

    def __init__(self, nets: Sequence[nn.Module], rates: Sequence[float]) -> None:
        if not nets or len(nets) != len(rates):
            raise ValueError(f"a Stack wants a learning rate for each net; got {len(nets)} nets, {len(rates)} rates.")
        if any(True for net in nets for _ in net.buffers()):
            raise ValueError("a Stack trains nets without buffers; these have some (BatchNorm?): leave them out.")
        self.first = copy.deepcopy(nets[0])
        held = [dict(net.named_parameters()) for net in nets]
        self.params = {name: torch.stack([one[name].detach() for one in held]) for name in held[0]}
        self.rates = torch.tensor(rates, dtype=torch.float64)
        self._slopes = vmap(grad(self._loss))
        self._losses = vmap(self._loss, in_dims=(0, None, None), chunk_size=TOGETHER)

    def _loss(self, params: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, written out: under vmap PyTorch's own takes twice as long."""
        outputs = functional_call(self.first, dict(params), (inputs,))
        return (outputs.logsumexp(-1) - outputs.gather(-1, targets[:, None])[:, 0]).mean()

    def descend(self, inputs: Tensor, targets: Tensor) -> None:
        """One step of each net down the mean cross-entropy of its own batch: inputs (n, b, ...), targets (n, b)."""
        with torch.no_grad():  # grad() inside takes the derivatives that it needs, and no graph outlives the step
            slopes = self._slopes(self.params, inputs, targets)
            for name, p in self.params.items():
                p -= self.rates.to(p).reshape(-1, *[1] * (p.ndim - 1)) * slopes[name]

    def losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of each net on the same examples, (n,), on the device."""
        with torch.no_grad():
            return self._losses(self.params, inputs, targets)

    def net(self, index: int) -> nn.Module:
        """A copy of one net as it is now."""
        made = copy.deepcopy(self.first)
        with torch.no_grad():
            for name, p in made.named_parameters():
                p.copy_(self.params[name][index])
        return made
