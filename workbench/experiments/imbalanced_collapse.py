"""Neural collapse with classes of different sizes: lengths by class size, and rare classes that are given up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn import functional

from workbench.experiments.experiment import Experiment, Verdict
from workbench.figure import ROLES, AnyMark, Axis, Figure, Line, Panel, Points, fitting
from workbench.numerics.orthogonal_frame import OrthogonalFrame, orthogonal_frame
from workbench.numerics.sampling import Draw
from workbench.probe import Cost, Reading, Value, Variable
from workbench.probes.collapse import NeuralCollapse
from workbench.schema import Doc, Range, Slow
from workbench.subject import Subject

CHUNK = 20
"""L-BFGS iterations between two evaluations."""
_MEMORY = 10
_NAMES = ("balanced", "imbalanced", "deep", "rare")


@dataclass(frozen=True)
class Arm:
    """One problem: its name, class sizes, matrices M of the classifier, and decays λ_W, λ_H."""

    name: str
    counts: tuple[int, ...]
    matrices: int
    weight_decay: float
    feature_decay: float

    @property
    def frame(self) -> OrthogonalFrame:
        """The global minimum in closed form."""
        return orthogonal_frame(self.counts, self.weight_decay, self.feature_decay, self.matrices)


@dataclass(frozen=True)
class ImbalancedCollapse(Experiment):
    """Neural collapse from balanced to imbalanced classes: orthogonal means, whose lengths follow from class sizes.

    The recipe (Dang et al. 2023, arXiv:2301.00437): free features H (N, d) under M linear maps without biases minimise
    (1/2N) ‖W_M ... W_1 H - Y‖² + λ_W/2 Σ ‖W_j‖² + λ_H/2 ‖H‖² by L-BFGS in float64, from random values that the seed
    decides. Four arms: ``balanced`` classes and ``imbalanced`` ones with M = 1; ``deep``, the imbalanced ones with
    ``matrices`` maps; ``rare``, M = 1 with a class of ``rarest`` examples and stronger decay, under which that class is
    best given up (minority collapse). NeuralCollapse measures the end of each, and names the lengths to expect.

    How to read it: ``row_norm`` beside ``theory_row_norm`` by class: rows of frequent classes are longer, all alike in
    the balanced arm. ``nc1`` falls to zero in each; ``orthogonality``, the mean |cos| of the uncentred means, too: the
    limit is an orthogonal frame and no simplex. ``loss_gap`` is what lies between the loss and the least one.

    The verdict: the largest relative error of a row's length over classes and arms, as digits of agreement
    (-log10), must reach 3; the class that is best given up must end under a thousandth of the longest row, every loss
    within 1e-6 of the least one, and ``nc1`` under 1e-6 in each arm without a class that is given up.

    What it costs: four minimisations, a second each.

    When it misleads: deep classifiers are stationary at zero, where a class of few examples can stay although the
    minimum is elsewhere: ``loss_gap`` tells such an arm from minority collapse. Features of a network are not free.

    Errors: none but those of rounding and of a minimisation that was ended early, which ``loss_gap`` shows.
    """

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("train_loss", ("arm", "iteration"), "objective with penalties"),
        Variable("loss_gap", ("arm", "iteration"), "objective above the least possible one"),
        Variable("row_norm", ("arm", "class_"), "length of the classifier's row"),
        Variable("theory_row_norm", ("arm", "class_"), "length of the classifier's row at the minimum"),
        Variable("mean_norm", ("arm", "class_"), "length of the class mean, uncentred"),
        Variable("theory_mean_norm", ("arm", "class_"), "length of the class mean at the minimum"),
        Variable("class_count", ("arm", "class_"), "examples in the class"),
        Variable("nc1", ("arm",), "within-class variability, Tr(Σ_W Σ_B⁺)/C"),
        Variable("orthogonality", ("arm",), "mean |cos| of the class means before centring"),
    )
    least_digits: ClassVar[float] = 3.0
    most_gap: ClassVar[float] = 1e-6
    most_nc1: ClassVar[float] = 1e-6

    classes: Annotated[int, Range(2, 20), Doc("Classes."), Slow()] = 4
    dimension: Annotated[int, Range(2, 1000, soft=(8, 64)), Doc("Features d; no fewer than classes."), Slow()] = 32
    largest: Annotated[int, Range(2, 10_000, soft=(20, 500)), Doc("Examples of the largest class."), Slow()] = 100
    imbalance: Annotated[
        float,
        Range(1.0, 1000.0, log=True, soft=(1, 50)),
        Doc("Largest over smallest class, geometric between."),
        Slow(),
    ] = 10.0
    rarest: Annotated[int, Range(1, 1000, soft=(1, 20)), Doc("Examples of the class to be given up."), Slow()] = 2
    matrices: Annotated[int, Range(2, 6), Doc("Linear maps M of the deep arm."), Slow()] = 3
    weight_decay: Annotated[float, Range(1e-6, 1.0, log=True), Doc("λ_W."), Slow()] = 2e-3
    feature_decay: Annotated[float, Range(1e-6, 1.0, log=True), Doc("λ_H."), Slow()] = 2e-4
    strong_decay: Annotated[float, Range(1e-6, 1.0, log=True), Doc("λ_W and λ_H of the rare arm."), Slow()] = 5e-3
    iterations: Annotated[int, Range(CHUNK, 100_000, step=CHUNK), Doc("L-BFGS iterations at most."), Slow()] = 800

    def validate(self) -> None:
        """An orthogonal frame wants room."""
        if self.dimension < self.classes:
            raise ValueError(f"dimension={self.dimension} must not be below classes={self.classes}: no room for them.")

    @property
    def problems(self) -> tuple[Arm, ...]:
        """The four arms."""
        sizes = [max(1, round(self.largest * self.imbalance ** (-k / (self.classes - 1)))) for k in range(self.classes)]
        even, decays = (
            (max(1, round(sum(sizes) / self.classes)),) * self.classes,
            (self.weight_decay, self.feature_decay),
        )
        rare = (*(2 * n for n in sizes[:-1]), self.rarest)
        return (
            Arm("balanced", even, 1, *decays),
            Arm("imbalanced", tuple(sizes), 1, *decays),
            Arm("deep", tuple(sizes), self.matrices, *decays),
            Arm("rare", rare, 1, self.strong_decay, self.strong_decay),
        )

    def stream(self, subject: Any, draw: Draw) -> Iterator[Reading]:
        """Minimise arm after arm; each evaluation is a reading."""
        arms, steps = self.problems, np.arange(0, self.iterations + 1, CHUNK)
        values = {v.name: np.full(self._shape(v.dims, len(steps)), np.nan) for v in self.variables}
        for k, arm in enumerate(arms):
            net = FreeFeatures(arm, self.dimension, draw.seed)
            values["theory_row_norm"][k], values["class_count"][k] = arm.frame.row_norm, arm.counts
            values["theory_mean_norm"][k] = arm.frame.mean_norm
            for column, loss in enumerate(net.minimised(self.iterations // CHUNK)):
                values["train_loss"][k, column], values["loss_gap"][k, column] = loss, loss - arm.frame.minimum
                values["row_norm"][k] = net.row_norm.numpy()
                yield self._report(values, steps, min((k + (column + 1) / len(steps)) / len(arms), 0.999))
            _measure(values, k, arm, net)
        yield self._report(values, steps, 1.0)

    def _shape(self, dims: tuple[str, ...], steps: int) -> tuple[int, ...]:
        sizes = {"arm": len(_NAMES), "iteration": steps, "class_": self.classes}
        return tuple(sizes[d] for d in dims)

    def _report(self, values: dict[str, Any], steps: Any, done: float) -> Reading:
        coords = {"arm": np.array(_NAMES), "iteration": steps, "class_": np.arange(self.classes)}
        notes = ("features are free: no network, no inputs; targets one-hot, half the squared distance",)
        return self.reading(done, values, coords=coords, converged=done == 1, notes=notes)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Digits of agreement, the largest loss gap, and how long the class that is given up remains."""
        return {
            "digits": _digits(data),
            "loss_gap": _largest_gap(data),
            "given_up": _given_up(data),
            "nc1": _largest_nc1(data),
        }

    def verdict(self, data: xr.Dataset) -> Verdict:
        """Digits to which lengths agree with the closed form, at its loss, with classes collapsed and one given up."""
        digits, gap, gone, nc1 = _digits(data), _largest_gap(data), _given_up(data), _largest_nc1(data)
        words = f"digits to which row lengths agree; loss gap {gap:.2g}, NC1 {nc1:.2g}, class given up {gone:.2g}"
        sound = gap <= self.most_gap and nc1 <= self.most_nc1 and gone <= 10**-self.least_digits
        return Verdict(bool(digits >= self.least_digits and sound), digits, self.least_digits, words)

    def figure(self, data: xr.Dataset) -> Figure:
        """Rows' lengths over class sizes beside the closed form, and the loss above its least over iterations."""
        marks: list[AnyMark] = []
        curves: list[AnyMark] = []
        for k, (name, role) in enumerate(zip(_NAMES, ROLES, strict=True)):
            one = data.isel(arm=k)
            marks.append(Line(one.class_.values, one.theory_row_norm.values, f"{name}: minimum", role))
            marks.append(Points(one.class_.values, one.row_norm.values, role=role))
            there = one.loss_gap.values > 0
            curves.append(Line(one.iteration.values[there], one.loss_gap.values[there], name, role))
        first = Panel(tuple(marks), Axis("class, by size"), Axis("length of the classifier's row"))
        gaps = data.loss_gap.values
        second = Panel(tuple(curves), Axis("iteration"), fitting("loss above the least", "log", gaps[gaps > 0]))
        return Figure((first, second), title="lengths follow class sizes")

    def estimate(self, subject: Any) -> Cost:
        """Features, gradients and the memory of L-BFGS in float64, of the largest arm."""
        rows = max(sum(arm.counts) for arm in self.problems)
        held = 8 * (2 * _MEMORY + 8) * self.dimension * (rows + self.matrices * self.dimension)
        return Cost(held, None, f"{len(_NAMES)} minimisations of at most {self.iterations} iterations")


class FreeFeatures(nn.Module):
    """Free features (N, d) under linear maps without biases; an input is an example's number."""

    def __init__(self, arm: Arm, dimension: int, seed: int) -> None:
        super().__init__()
        rng, count = torch.Generator().manual_seed(seed), len(arm.counts)
        self.arm = arm
        self.targets = torch.repeat_interleave(torch.arange(count), torch.tensor(arm.counts))

        def start(rows: int, scale: float) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(rows, dimension, generator=rng, dtype=torch.float64))

        self.features = start(sum(arm.counts), 0.3)
        self.maps = nn.ModuleList()
        for k in range(arm.matrices):
            rows = dimension if k < arm.matrices - 1 else count
            held = nn.utils.skip_init(nn.Linear, dimension, rows, bias=False)
            held.weight = start(rows, dimension**-0.5)
            self.maps.append(held)

    @property
    def examples(self) -> tuple[Tensor, Tensor]:
        """Numbers of the examples, and one-hot targets."""
        labels = functional.one_hot(self.targets, len(self.arm.counts)).double()
        return torch.arange(len(self.targets)), labels

    @property
    def row_norm(self) -> Tensor:
        """Lengths of the last map's rows (C,)."""
        *_, last = self.maps.parameters()
        return torch.linalg.vector_norm(last.detach(), dim=1)

    def forward(self, numbers: Tensor) -> Tensor:
        held = self.features[numbers]
        for one in self.maps:
            held = one(held)
        return held

    def objective(self) -> Tensor:
        """Half the squared distance per example, with both penalties."""
        numbers, labels = self.examples
        weights = torch.stack([p.square().sum() for p in self.maps.parameters()]).sum()
        penalty = self.arm.weight_decay * weights + self.arm.feature_decay * self.features.square().sum()
        return (self(numbers) - labels).square().sum() / (2 * len(labels)) + penalty / 2

    def minimised(self, chunks: int) -> Iterator[float]:
        """The objective before the first and after each chunk of iterations, until it falls no more."""
        optimizer = torch.optim.LBFGS(
            self.parameters(), lr=1.0, max_iter=CHUNK, history_size=_MEMORY, line_search_fn="strong_wolfe",
            tolerance_grad=1e-11, tolerance_change=1e-15,
        )  # fmt: skip

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.objective()
            loss.backward()
            return loss

        last = self.objective().item()
        yield last
        for _ in range(chunks):
            with torch.enable_grad():
                optimizer.step(closure)  # pyright: ignore[reportArgumentType]
            now = self.objective().item()
            yield now
            if not now < last:
                return
            last = now


def _measure(values: dict[str, Any], k: int, arm: Arm, net: FreeFeatures) -> None:
    """What NeuralCollapse says of an arm that is over; unknown where it diverged."""
    if not all(bool(torch.isfinite(p).all()) for p in net.parameters()):
        return
    probe = NeuralCollapse(
        layer=f"maps.{arm.matrices - 1}", groups=0, matrices=arm.matrices, weight_decay=arm.weight_decay,
        feature_decay=arm.feature_decay,
    )  # fmt: skip
    found = probe.run(Subject(net, net.examples, "half_mse", max_examples=None)).data
    values["mean_norm"][k] = found.class_mean_length.values
    values["theory_mean_norm"][k] = found.theory_mean_length.values
    values["nc1"][k], values["orthogonality"][k] = float(found.nc1), float(found.orthogonality)


def _digits(data: xr.Dataset) -> float:
    """-log10 of the largest relative error of a row that is not to be given up; nan until all arms are over."""
    if np.isnan(data.nc1.values).any():
        return math.nan
    wanted, found = data.theory_row_norm.values, data.row_norm.values
    kept = wanted > 0
    error = float(np.abs(found[kept] / wanted[kept] - 1).max()) if kept.any() else math.nan
    return -math.log10(max(error, 1e-16))


def _given_up(data: xr.Dataset) -> float:
    """Longest row that is best given up over the longest row of its arm; nan where no class is, or nothing known."""
    wanted, found = data.theory_row_norm.values, data.row_norm.values
    gone = (wanted == 0) & np.isfinite(found)
    return float((found / found.max(1, keepdims=True))[gone].max()) if gone.any() else math.nan


def _largest_gap(data: xr.Dataset) -> float:
    """The largest loss gap over arms, each at its last evaluation; nan until all have one."""
    lasts = [row[~np.isnan(row)][-1:] for row in data.loss_gap.values]
    return float(np.concatenate(lasts).max()) if all(map(len, lasts)) else math.nan


def _largest_nc1(data: xr.Dataset) -> float:
    """The largest nc1 over the arms without a class that is given up; nan until all are over."""
    whole = (data.theory_row_norm.values > 0).all(1)
    return float(data.nc1.values[whole].max()) if whole.any() else math.nan
