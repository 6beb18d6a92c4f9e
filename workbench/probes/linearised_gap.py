"""How far a network is from its own linearisation in the parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from workbench.data import Batch
from workbench.figure import Axis, Bars, Figure, Line, Panel, Points
from workbench.numerics.sampling import Draw
from workbench.numerics.stats import jackknife_error
from workbench.operators.pushes import Graphed
from workbench.probe import Cost, Look, Probe, Reading, Value, Variable
from workbench.schema import Doc, Range
from workbench.several import Pair
from workbench.shell import precise
from workbench.subject import Subject

GROUPS = 20
"""Parts of the examples that are left out one after the other for standard errors."""
_SUMS = ("apart", "moved", "tangent", "linear_loss", "loss", "start_loss", "agree", "weight", "count")
_NAMES = ("gap", "tangent_share", "loss_gap", "train_loss", "linearised_loss", "start_loss", "agreement")
Sums = NDArray[np.float64]


@dataclass(frozen=True)
class LinearisedGap(Probe[Pair]):
    """Gap between a network and its linearisation: f_lin(x) = f(x; θ_0) + J_0(x) (θ - θ_0), at the second's weights θ.

    What it measures, over all examples and outputs, with θ_0 the first subject's weights and J_0 the Jacobian of the
    outputs there: ``gap`` = Σ ‖f_θ - f_lin‖² / Σ ‖f_θ - f_0‖²; ``tangent_share`` = Σ ‖f_lin - f_0‖² / Σ ‖f_θ - f_0‖²;
    ``loss_gap`` = L(f_lin) - L(f_θ); ``agreement``, for classes, the share of examples that both put into one class.
    ``curve``: the gap at θ_0 + t (θ - θ_0) for t up to 1.

    How to read it: 0 for a network that trains as its tangent kernel does (a lazy one), near or above 1 for one that
    left the linear regime. The curve starts at 0 and grows with t² while the next order is all that is missing; where
    it bends is how far the linearisation reaches. ``loss_gap`` > 0: the network does better than the linear model that
    stands at the same weights.

    What it costs: a backward pass twice (J_0 v) for each chunk, and ``points`` + 2 forward passes.

    When it misleads: this is the gap at the weights that the network found; a linear model trained by itself would have
    gone elsewhere. Running statistics of BatchNorm move too: they belong to f_θ and not to the linearisation (a note
    says so; on the curve they are interpolated). Where f_θ - f_0 is small against rounding the ratio is noise.

    Errors: standard errors over examples, by the jackknife over twenty parts of them.

    Source: Chizat, Oyallon and Bach 2019; Lee et al. 2019.
    """

    points: Annotated[
        int, Range(2, 101, step=1, soft=(3, 31)), Doc("Places between the two at which the gap is computed.")
    ] = 9

    looks_at: ClassVar[Look] = "pair"
    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("gap", (), "squared distance of network and linearisation over that moved", error="gap_error"),
        Variable("gap_error", (), "its standard error"),
        Variable(
            "tangent_share", (), "squared motion of the linearisation over the net's", error="tangent_share_error"
        ),
        Variable("tangent_share_error", (), "its standard error"),
        Variable("loss_gap", (), "loss of the linearisation less the network's", error="loss_gap_error"),
        Variable("loss_gap_error", (), "its standard error"),
        Variable("train_loss", (), "loss of the network", error="train_loss_error"),
        Variable("train_loss_error", (), "its standard error"),
        Variable("linearised_loss", (), "loss of the linearisation", error="linearised_loss_error"),
        Variable("linearised_loss_error", (), "its standard error"),
        Variable("start_loss", (), "loss of the first subject", error="start_loss_error"),
        Variable("start_loss_error", (), "its standard error"),
        Variable("agreement", (), "share of examples put into one class by both", error="agreement_error"),
        Variable("agreement_error", (), "its standard error"),
        Variable("curve", ("part",), "gap on the way", error="curve_error"),
        Variable("curve_error", ("part",), "its standard error"),
        Variable("examples", (), "examples used"),
    )

    def stream(self, subject: Pair, draw: Draw) -> Iterator[Reading]:
        """Chunk by chunk; the second look has an error."""
        run = _Run(self, subject)
        size, seen = max(1, -(-subject.first.examples // GROUPS)), 0
        for batch in subject.first.batches(min(size, subject.plan.chunk or size)):
            run.add(batch)
            seen += batch.size
            yield run.report(seen / subject.first.examples)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The gap, both losses, and the agreement of classes where there are some."""
        names = [
            n for n in ("gap", "loss_gap", "train_loss", "agreement") if math.isfinite(float(data[n])) or n == "gap"
        ]
        return {key: float(data[key]) for n in names for key in (n, f"{n}_error")}

    def figure(self, data: xr.Dataset) -> Figure:
        """The gap on the way from one to the other, and the three losses."""
        part, curve, error = data.part.values, data.curve.values, data.curve_error.values
        way = Panel(
            (Line(part, curve, label="gap"), Points(part, curve, error=error)),
            Axis("part of the way"),
            Axis("‖f - f_lin‖² / ‖f - f₀‖²"),
        )
        names = ("start_loss", "linearised_loss", "train_loss")
        values, errors = ([float(data[f"{n}{end}"]) for n in names] for end in ("", "_error"))
        bars = Bars(range(3), values, errors, names=("start", "linearised", "network"))
        losses = Panel((bars,), Axis(""), Axis("loss"))
        return Figure((way, losses))

    def estimate(self, subject: Pair) -> Cost:
        """A twice differentiable graph of one chunk, and the direction."""
        size = subject.size * subject.dtype.itemsize
        words = f"J v once and {self.points + 2} forward passes"
        return Cost(3 * subject.first.memory() + 4 * size, self.points + 6, words)


class _Run:
    """What one stream knows so far."""

    def __init__(self, probe: LinearisedGap, pair: Pair) -> None:
        pair.check_alike()
        if not pair.first.has_outputs:
            raise TypeError("LinearisedGap needs outputs; make the subjects with loss=, not objective=.")
        self.probe, self.pair = probe, pair
        self.start, self.end = _point(pair.first), _point(pair.second)
        self.leaves = {n: p.detach().requires_grad_() for n, p in pair.first.params.items()}
        self.parts = np.linspace(0, 1, probe.points + 1)[1:]
        self.sums: list[Sums] = []
        self.curve: list[Sums] = []
        moving = [n for n, t in self.start.items() if n not in self.leaves and not torch.equal(t, self.end[n])]
        self.notes = [*pair.notes, pair.first.on]
        if moving:
            self.notes.append(
                f"{', '.join(moving[:4])}{' and others' if len(moving) > 4 else ''}: not chosen or running statistics, "
                "so they move with the network and not with its linearisation"
            )

    def add(self, batch: Batch) -> None:
        """One chunk's sums."""
        first, second = self.pair.first, self.pair.second
        with precise(first.device):
            start, push = self.push(batch)
            with torch.no_grad():
                end, tangent = second.batch_outputs({}, batch), start + push
                losses = [s.output_loss(z, batch) for s, z in ((first, tangent), (second, end), (first, start))]
                agree = self.agreement(tangent, end)
                found = [_square(end - tangent), _square(end - start), _square(push), *losses, agree]
                self.sums.append(
                    np.array([*torch.stack([f.double() for f in found]).tolist(), batch.weight, batch.size])
                )
                self.curve.append(np.array([self.on_the_way(float(t), batch, start, push, end) for t in self.parts]))

    def push(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """f_0 and J_0 (θ - θ_0) of a chunk, by differentiating twice in reverse, which is right for all layers."""
        outputs = self.pair.first.batch_outputs(self.leaves, batch)
        if not outputs.requires_grad:
            return outputs.detach(), torch.zeros_like(outputs)
        step = [(self.end[name] - p).detach() for name, p in self.leaves.items()]
        return outputs.detach(), Graphed(outputs, list(self.leaves.values()))(step).detach()

    def on_the_way(self, part: float, batch: Batch, start: Tensor, push: Tensor, end: Tensor) -> list[float]:
        """‖f - f_lin‖² and ‖f - f_0‖² at a part of the way."""
        here = end if part == 1 else self.pair.first.batch_outputs(self.between(part), batch)
        return torch.stack([_square(here - start - part * push), _square(here - start)]).tolist()

    def between(self, part: float) -> dict[str, Tensor]:
        """Weights and statistics at a part of the way."""
        floating = {name: t for name, t in self.start.items() if t.is_floating_point()}
        return {name: torch.lerp(t, self.end[name].to(t.device), part) for name, t in floating.items()}

    def agreement(self, one: Tensor, two: Tensor) -> Tensor:
        """How many examples both put into one class; nan without classes."""
        if self.pair.first.classes is None or one.ndim != 2:
            return torch.tensor(math.nan, device=one.device)
        return (one.argmax(1) == two.argmax(1)).sum()

    def report(self, done: float) -> Reading:
        """The reading of now."""
        sums, curve = np.array(self.sums), np.array(self.curve)
        whole, ways = _measures(sums.sum(0)), _ratio(*np.moveaxis(curve.sum(0), -1, 0))
        values: dict[str, Any] = dict(zip(_NAMES, whole, strict=True))
        errors = jackknife_error(_measures(sums.sum(0) - sums))
        values |= {f"{name}_error": e for name, e in zip(_NAMES, errors.reshape(-1), strict=True)}
        without = curve.sum(0) - curve
        values |= {"curve": ways, "curve_error": jackknife_error(_ratio(without[..., 0], without[..., 1]))}
        values["examples"] = sums[:, -1].sum()
        known = done >= 1 and bool(np.isfinite(values["gap"]))
        coords = {"part": self.parts}
        return self.probe.reading(min(done, 1.0), values, coords=coords, converged=known, notes=tuple(self.notes))


def _point(subject: Subject) -> Mapping[str, Tensor]:
    """All tensors of the function: weights, and buffers as its policy has them."""
    statistics = subject.recomputed() if subject.norm == "recompute" else {}
    return {**subject.tensors(), **statistics}


def _square(values: Tensor) -> Tensor:
    return values.double().square().sum()


def _ratio(top: Sums, bottom: Sums) -> Sums:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), np.nan)


def _measures(sums: Sums) -> Sums:
    """From sums (..., 9) to (..., 7): gap, share, loss gap, losses, agreement; nan where there is nothing."""
    apart, moved, tangent, linear, loss, start, agree, weight, count = np.moveaxis(sums, -1, 0)
    each = (
        _ratio(apart, moved),
        _ratio(tangent, moved),
        *(_ratio(s, weight) for s in (linear - loss, loss, linear, start)),
    )
    return np.stack([*each, _ratio(agree, count)], axis=-1)
