"""L(θ) and its parts: what model, frozen examples and criterion make together, at any parameters."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench import parameters as theta
from workbench.criterion import Criterion, Params
from workbench.data import Batch
from workbench.evaluation import Metric, Sums, check_finite
from workbench.feed import Feed
from workbench.plan import Plan
from workbench.shell import Norm, Shell, precise


class LossFunction(ABC):
    """L(θ) = Σ ℓ / Σ weights with its gradient, outputs and batches; a Subject says which model, data and loss."""

    norm: Norm
    device: torch.device
    dtype: torch.dtype
    batch_size: int | None
    total_weight: float
    metrics: Mapping[str, Metric]
    _shell: Shell
    _feed: Feed
    _criterion: Criterion
    _names: tuple[str, ...]
    _statistics: tuple[Any, dict[str, Tensor]]

    @property
    @abstractmethod
    def params(self) -> dict[str, Tensor]:
        """The parameters that vary, detached."""

    @property
    @abstractmethod
    def plan(self) -> Plan:
        """How sums are cut up."""

    @abstractmethod
    def version(self) -> tuple[Any, ...]:
        """Changes when any weight or buffer is written."""

    @property
    def _micro(self) -> int:
        """Examples in a batch whose statistics are taken together."""
        return self._feed.micro(self.batch_size)

    # --- its numbers ------------------------------------------------------------------------------------------------

    def loss(self, params: Params | None = None) -> float:
        """L at ``params`` (None: the model's own point, where it must be finite: else ValueError). One forward pass."""
        return self.evaluate(params, ("loss",))["loss"]

    def losses(self, params: Params | None = None) -> Tensor | None:
        """Per-example losses (n,) in float64, scaled so that their mean is L; None where L does not come apart."""
        sums = self._sums(params, decide=False)
        t, w = torch.cat(sums.totals), torch.cat(sums.weights)
        return t * (len(t) / w.sum()) if sums.apart else None

    def evaluate(
        self, params: Params | None = None, metrics: Sequence[str] = ("loss", "error_rate")
    ) -> dict[str, float]:
        """Loss and share of wrong decisions, each with its standard error over examples (nan where unknown); one pass.

        The user's own ``metrics`` may be named too: means over examples, or one number of the model with error nan.
        A standard error is that of a ratio of means, sqrt(n/(n-1) Σ (t - L w)²) / Σ w with totals t, weights w.
        """
        known = ("loss", "error_rate", *self.metrics)
        if unknown := set(metrics) - set(known):
            raise ValueError(f"there is no metric {sorted(unknown)[0]!r}; there are {', '.join(map(repr, known))}.")
        own = {name: self.metrics[name] for name in metrics if name in self.metrics}
        found = self._sums(params, "error_rate" in metrics, own).result()
        check_finite(found["loss"], params is None)
        found |= self._whole(params, {name: metric for name, metric in own.items() if metric.whole})
        return {name: value for name, value in found.items() if name.removesuffix("_error") in metrics}

    def _whole(self, params: Params | None, own: Mapping[str, Metric]) -> dict[str, float]:
        """Metrics of the model itself."""
        found: dict[str, float] = {}
        buffers = self._statistics_at(params) if own else {}
        for name, metric in own.items():
            with torch.no_grad():
                found[name] = float(self._shell.run(metric.function, params or {}, buffers))
            found[f"{name}_error"] = float("nan")
        return found

    def _sums(self, params: Params | None, decide: bool, own: Mapping[str, Metric] | None = None) -> Sums:
        sums, buffers, loss = Sums(), self._statistics_at(params), self._criterion.loss
        with torch.no_grad(), precise(self.device):
            for batch in self.batches():
                totals, weights, outputs = self._criterion.score(self._shell, params or {}, batch, buffers)
                sums.add(totals, weights)
                if decide and loss is not None and outputs is not None:
                    sums.decide(loss, outputs, batch.targets)
                for name, metric in (own or {}).items():
                    if not metric.whole and outputs is not None:
                        apart = self._shell.apply(metric.of_batch, outputs, batch.targets, batch.size)
                        sums.measure(name, *apart)
        return sums

    def gradient(self, params: Params | None = None) -> dict[str, Tensor]:
        """∇L by name, in the parameters' precision, summed in float64; zero for parameters that L does not use."""
        point = {name: p.detach().requires_grad_() for name, p in (params or self.params).items()}
        sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in point.items()}
        buffers, value = self._statistics_at(params), 0.0
        with precise(self.device), torch.enable_grad():
            for batch in self.batches():
                total = self.batch_loss(point, batch, buffers)
                value += float(total.detach())
                if total.requires_grad:
                    found = torch.autograd.grad(total, list(point.values()), allow_unused=True, materialize_grads=True)
                    for name, g in zip(point, found, strict=True):
                        sums[name] += g
        check_finite(value, params is None)
        return {name: (g / self.total_weight).to(point[name].dtype) for name, g in sums.items()}

    def outputs(self, params: Params | None = None) -> Tensor:
        """The model's outputs for every example (n, ...), in the order of the frozen examples."""
        buffers = self._statistics_at(params)
        with torch.no_grad(), precise(self.device):
            return torch.cat([self.batch_outputs(params or {}, batch, buffers) for batch in self.batches()])

    # --- its parts, for operators and probes ------------------------------------------------------------------------

    def batches(self, chunk: int | None = None) -> Iterator[Batch]:
        """The examples in order, ``chunk`` at a time (None: the plan's), on the device and in the subject's precision.

        Data of unequal shapes keep their own batches; so do micro-batches that are part of what L is (BatchNorm).
        """
        if self.norm == "batch" or self._criterion.coupled:
            return self._feed.batches(self._micro, join=True)
        return self._feed.batches(chunk or self.plan.chunk)

    def batch_outputs(self, params: Params, batch: Batch, buffers: Params | None = None) -> Tensor:
        """The model's outputs for a batch at ``params`` (others: the model's own); differentiable at any order.

        ``buffers`` replaces named buffers; None: as the policy has them at the subject's own point.
        """
        return self._criterion.outputs(self._shell, params, batch, self._fixed(buffers))

    def output_loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """A batch's contribution to the loss, Σ ℓ, as a function of its outputs."""
        return self._criterion.output_loss(self._shell, outputs, batch)

    def batch_loss(self, params: Params, batch: Batch, buffers: Params | None = None) -> Tensor:
        """A batch's scalar contribution: L = Σ_batches batch_loss / total_weight; differentiable at any order."""
        return self._criterion.total(self._shell, params, batch, self._fixed(buffers))

    def batch_losses(self, params: Params, batch: Batch, buffers: Params | None = None) -> Tensor | None:
        """What each example of a batch adds to its :meth:`batch_loss`, (n,), differentiable; None where not known."""
        found = self._criterion.score(self._shell, params, batch, self._fixed(buffers))[0]
        return found if found.ndim else None

    def _fixed(self, buffers: Params | None) -> Params:
        return self._statistics_at(None) if buffers is None else buffers

    def recomputed(self, params: Params | None = None) -> dict[str, Tensor]:
        """Running statistics of every normalisation layer, estimated anew at ``params``, in one pass."""
        statistics = self._shell.running_statistics()
        with torch.no_grad():
            for batch in self._feed.batches(self._micro, join=True) if statistics else ():
                self._criterion.forward(self._shell, params or {}, batch, statistics)
        return statistics

    def _statistics_at(self, params: Params | None) -> dict[str, Tensor]:
        """Running statistics that the policy puts in place of the model's own; kept for the subject's own point."""
        if self.norm != "recompute" or not self._shell.norms:
            return {}
        if params is not None:
            return self.recomputed({name: p.detach() for name, p in params.items()})
        version = self.version()
        if self._statistics[0] != version:
            self._statistics = version, self.recomputed()
        return self._statistics[1]

    def flatten(self, tensors: Params) -> Tensor:
        """Named tensors as one vector of ``size`` entries, in the order of ``params``."""
        return theta.flatten(tensors, self._names)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector of ``size`` entries as named tensors, views of it where the precision agrees."""
        return theta.unflatten(vector, {name: self._shell.parameters[name] for name in self._names}, self.dtype)
