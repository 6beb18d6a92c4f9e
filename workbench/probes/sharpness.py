"""Sharpness by every definition in use, side by side at one point, each with its error and its protocol."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import xarray as xr

from workbench.figure import AnyMark, Axis, Bars, Figure, Line, Panel, Points, Role
from workbench.numerics.sampling import Draw
from workbench.operators.hessian import Hessian
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Doc, Range
from workbench.selftest import test_bytes
from workbench.sharpness.ascent import worst_case
from workbench.sharpness.average import FEWER, average
from workbench.sharpness.balls import Box, Ellipsoid, Euclidean
from workbench.sharpness.blocks import block_sharpness
from workbench.sharpness.eigen import largest_eigenvalue, module_eigenvalues, module_traces
from workbench.sharpness.first_order import first_order
from workbench.sharpness.fisher_rao import fisher_rao, fisher_rao_empirical
from workbench.sharpness.flatness import neuronwise_flatness, relative_flatness
from workbench.sharpness.found import FRACTIONS, Found, NotDefined
from workbench.sharpness.keskar import EVALUATIONS, SUBSPACES, keskar
from workbench.sharpness.pac_bayes import pac_bayes
from workbench.sharpness.point import Point
from workbench.sharpness.scales import elementwise, filterwise, modules_of_weights
from workbench.sharpness.table import LABELS, RISES, WORDS, Definition
from workbench.subject import Subject

DEFAULT: tuple[Definition, ...] = tuple(name for name in Definition.__args__ if name != "keskar")
Makers = dict[str, Callable[[], Iterator[Found]]]


@dataclass(frozen=True)
class Sharpness(Probe[Subject]):
    """Sharpness by every definition in use, each with its own error, protocol and the training loss beside it.

    What it measures, for the mean loss L at weights θ with gradient g and Hessian H: ``sharpness`` by ``definition``.
    ``lambda_max`` is λ_1(H). ``sam`` is L(θ + ρ g/‖g‖) - L(θ), ``worst_l2`` and ``worst_linf`` the maximum over
    ‖δ‖₂ <= ``radius`` and |δ_i| <= ``box``, ``m_sharpness`` that of ``block`` examples at a time. ``average`` is the
    mean rise under N(0, ``sigma``²) on each parameter, ½ σ² tr H for small σ. Adaptive ones measure steps in units of
    each weight, T = |θ|: ``adaptive_sam``, ``adaptive_worst_l2`` (‖δ ⊘ T‖ <= ``adaptive_radius``),
    ``adaptive_worst_linf``, ``adaptive_average`` and ``adaptive_lambda_max`` = λ_1(T H T). ``filter_average`` moves
    each filter by ``relative_sigma`` of its length. ``module_lambda`` and ``module_trace`` are the largest λ_1 ‖W‖² and
    tr ‖W‖²/P of a module; ``relative_flatness`` is Σ ⟨w_s, w_s'⟩ tr H_ss' of a linear layer, ``neuron_flatness``
    Σ ‖w_s‖² λ_1(H_ss), ``fisher_rao`` θᵀFθ, ``pac_bayes`` 1/σ² at the noise that costs ``accuracy_drop``, ``keskar``
    100 (max L - L)/(1 + L) in a box, of all weights or of random subspaces of ``subspace`` dimensions. ``rise``
    shows how those with a step grow with its size.

    How to read it: large is sharp, but each has units of its own, so compare a definition only with itself. ``sam``,
    ``worst_l2``, ``average`` and λ_1 change under rescalings that leave the function as it is (ReLU networks,
    normalised layers); adaptive, filter-wise and relative ones and λ_1 ‖W‖² do not. ``rise`` falling with the square
    of the step is curvature; in proportion to it, a gradient that has not vanished.

    What it costs: some 500 forward passes, 200 gradients and a few dozen products, most of them for averages, PAC-Bayes
    and worst cases; choose fewer ``definitions`` on large models. Memory: about 40 vectors of the parameters' size.

    When it misleads: sharpness falls with the training loss, so compare models at equal ``train_loss``, on equally
    many examples, with equal settings. Worst cases are lower bounds by a fixed amount of search. Near a minimum the
    gradient's direction is noise, and so is a first-order step. With BatchNorm's running statistics, which are not
    estimated anew for perturbed weights, perturbations do more than in training.

    Errors: ``sharpness_error`` is what the notes say for each: the residual of an eigenvalue, the standard error over
    draws, the gap between two starts of an ascent (which says nothing of what both missed), or rounding. Examples count
    as given: ``train_loss_error`` is the only error over them. nan where a definition does not apply, with the reason.

    Source: Foret et al. 2021; Kwon et al. 2021; Keskar et al. 2017; Andriushchenko et al. 2023; Petzka et al. 2021;
    Liang et al. 2019; Jiang et al. 2020.
    """

    definitions: Annotated[
        tuple[Definition, ...], Choice(WORDS), Doc("Which definitions, in the order in which they are computed.")
    ] = DEFAULT
    radius: Annotated[
        float,
        Range(1e-6, 100.0, log=True, soft=(1e-3, 1.0)),
        Doc("ρ of sam, worst_l2 and m_sharpness: length of a step."),
    ] = 0.05
    adaptive_radius: Annotated[
        float, Range(1e-6, 100.0, log=True, soft=(0.01, 2.0)), Doc("ρ of the adaptive ones, in units of the weights.")
    ] = 0.5
    box: Annotated[
        float, Range(1e-8, 10.0, log=True, soft=(1e-4, 0.1)), Doc("Half-width of the box of worst_linf and keskar.")
    ] = 1e-3
    adaptive_box: Annotated[
        float, Range(1e-8, 10.0, log=True, soft=(1e-3, 0.1)), Doc("The same for adaptive_worst_linf, over each weight.")
    ] = 0.01
    subspace: Annotated[
        int,
        Range(0, 10_000, soft=(0, 200)),
        Doc("Dimension of the random subspaces that keskar's box lies in, 100 in the paper; 0: all weights."),
    ] = 0
    sigma: Annotated[
        float, Range(1e-8, 10.0, log=True, soft=(1e-4, 0.1)), Doc("Standard deviation of the noise of average.")
    ] = 0.01
    relative_sigma: Annotated[
        float,
        Range(1e-6, 10.0, log=True, soft=(0.01, 1.0)),
        Doc("Noise of adaptive_average over each weight, of filter_average over each filter."),
    ] = 0.1
    draws: Annotated[int, Range(2, 10_000, soft=(5, 200)), Doc("Pairs of random steps of each average.")] = 30
    steps: Annotated[int, Range(4, 1000, soft=(10, 100)), Doc("Gradients of each ascent.")] = 20
    block: Annotated[int, Range(1, 1_000_000, log=True, soft=(1, 1024)), Doc("m of m_sharpness.")] = 128
    tolerance: Annotated[
        float, Range(1e-8, 0.5, log=True, soft=(1e-4, 0.2)), Doc("Residual over eigenvalue that counts as converged.")
    ] = 0.02
    asam_compat: Annotated[
        bool, Doc("Adaptive ones as in ASAM's own code: T = |θ| + 0.01 for weights, 1 for the rest; not invariant.")
    ] = False
    normalise_logits: Annotated[
        bool, Doc("Adaptive ones on logits over their root mean square: the size of the outputs does not count.")
    ] = False
    layer: Annotated[str | None, Doc("Linear layer of relative_flatness; empty finds the classifier.")] = None
    standardise: Annotated[
        Literal["none", "std"],
        Choice(
            {"none": "features as they are", "std": "divided by their standard deviation, weights multiplied by it"}
        ),
        Doc("What relative_flatness does to the layer's features first."),
    ] = "none"
    accuracy_drop: Annotated[float, Range(0.001, 0.9, soft=(0.01, 0.5)), Doc("Drop of accuracy of pac_bayes.")] = 0.1
    noise_draws: Annotated[int, Range(2, 10_000, soft=(8, 100)), Doc("Fixed noise vectors of pac_bayes.")] = 16

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("sharpness", ("definition",), "sharpness, each definition in its own unit", error="sharpness_error"),
        Variable("sharpness_error", ("definition",), "error of the sharpness, as its protocol says"),
        Variable("converged", ("definition",), "whether the definition's own rule was met", kind="bool"),
        Variable("lower_bound", ("definition",), "whether the true value may be larger", kind="bool"),
        Variable("radius", ("definition",), "size of the step, in the definition's own norm"),
        Variable("rise", ("definition", "fraction"), "the same at fractions of the radius", error="rise_error"),
        Variable("rise_error", ("definition", "fraction"), "error of the rise"),
        Variable("module_eigenvalue", ("module",), "λ_1 ‖W‖² of the module", error="module_eigenvalue_error"),
        Variable("module_eigenvalue_error", ("module",), "residual, in the same units"),
        Variable("module_trace", ("module",), "tr ‖W‖²/P of the module", error="module_trace_error"),
        Variable("module_trace_error", ("module",), "half-width of its 95 % interval"),
        Variable("average_radius", (), "total length σ√P of the noise of average"),
        Variable("fisher_rao_shortcut", (), "Fisher-Rao norm by the homogeneous short cut, over the exact one"),
        Variable("pac_bayes_sigma", (), "largest noise at which accuracy holds", error="pac_bayes_sigma_error"),
        Variable("pac_bayes_sigma_error", (), "error of that noise"),
        Variable("pac_bayes_bound", (), "‖θ‖²/(4σ²) + ln(n/σ) + 10"),
        Variable("pac_bayes_bound_from_start", (), "the same with the distance from the recorded start"),
        Variable("train_loss", (), "loss at the point", error="train_loss_error"),
        Variable("train_loss_error", (), "standard error of the loss over examples"),
        Variable("gradient_norm", (), "length of the gradient"),
    )

    def validate(self) -> None:
        """At least one definition, each once."""
        if not self.definitions or len(set(self.definitions)) < len(self.definitions):
            raise ValueError(f"Sharpness.definitions must name at least one, each once; got {self.definitions!r}.")

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """One definition after another; a reading every few passes."""
        run = _Run(self, subject, Point(subject, draw))
        try:
            for number, name in enumerate(self.definitions):
                yield from run.follow(number, name)
            yield run.report(1.0)
        finally:
            run.point.close()

    def makers(self, point: Point) -> Makers:
        """What starts each definition at a point."""
        return {**self._plain(point), **self._adaptive(point), **self._structural(point)}

    def _plain(self, point: Point) -> Makers:
        size = point.subject.size
        ball = Euclidean(self.radius)
        box = Box(self.box, point.weights.new_full((), self.box), f"the box |δ_i| <= {self.box:g}")
        noise = f"noise N(0, {self.sigma:g}²) on all {size} parameters, a total length of {self.spread(size):.3g}"
        return {
            "lambda_max": lambda: largest_eigenvalue(point, self.tolerance),
            "sam": lambda: first_order(point, ball),
            "worst_l2": lambda: worst_case(point, ball, self.steps),
            "worst_linf": lambda: worst_case(point, box, self.steps),
            "m_sharpness": lambda: block_sharpness(point, ball, self.steps, self.block),
            "average": lambda: average(point, lambda noise: noise, self.sigma, self.draws, noise),
            "keskar": lambda: keskar(point, self.box, self.subspace),
        }

    def _adaptive(self, point: Point) -> Makers:
        scale = elementwise(point.subject, self.asam_compat)
        rho, box, sigma = self.adaptive_radius, self.adaptive_box, self.relative_sigma
        kind = "|θ| + 0.01 for weights and 1 for the rest" if self.asam_compat else "|θ|, parameters of one dim fixed"
        ellipsoid = Ellipsoid(rho, scale, f"the ellipsoid ‖δ ⊘ T‖₂ <= {rho:g}, T = {kind}")
        cube = Box(box, box * scale, f"the box |δ_i| <= {box:g} T_i, T = {kind}")
        words, unit = f"noise N(0, {sigma:g}² T_i²), T = {kind}", self.normalise_logits

        def here() -> Point:
            return point.normalised if unit else point

        return {
            "adaptive_lambda_max": lambda: largest_eigenvalue(here(), self.tolerance, scale, f"T H T, T = {kind}"),
            "adaptive_sam": lambda: first_order(here(), ellipsoid),
            "adaptive_worst_l2": lambda: worst_case(here(), ellipsoid, self.steps),
            "adaptive_worst_linf": lambda: worst_case(here(), cube, self.steps),
            "adaptive_average": lambda: average(here(), lambda noise: scale * noise, sigma, self.draws, words),
        }

    def _structural(self, point: Point) -> Makers:
        shape, sigma, standard = filterwise(point.subject), self.relative_sigma, self.standardise == "std"
        words = f"steps of {sigma:g} ‖θ_f‖ for each filter f, at random; biases and norm parameters fixed"
        many, drop = self.noise_draws, self.accuracy_drop
        return {
            "filter_average": lambda: average(point, shape, sigma, self.draws, words),
            "module_lambda": lambda: module_eigenvalues(point, self.tolerance),
            "module_trace": lambda: module_traces(point, self.tolerance),
            "relative_flatness": lambda: relative_flatness(point, self.layer, standard),
            "neuron_flatness": lambda: neuronwise_flatness(point, self.layer, standard),
            "fisher_rao": lambda: fisher_rao(point),
            "fisher_rao_empirical": lambda: fisher_rao_empirical(point),
            "pac_bayes": lambda: pac_bayes(point, many, drop, aware=False),
            "pac_bayes_magnitude": lambda: pac_bayes(point, many, drop, aware=True),
        }

    def spread(self, size: int) -> float:
        """ρ = σ√P: the length that noise of ``sigma`` has on ``size`` parameters."""
        return self.sigma * math.sqrt(size)

    @property
    def _keskar_gradients(self) -> int:
        return EVALUATIONS * (SUBSPACES if self.subspace else 1) * ("keskar" in self.definitions)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Each definition with its error, and the loss that it must be read with."""
        found: dict[str, Value] = {}
        for name in data["definition"].values:
            one = data.sel(definition=name)
            found |= {str(name): float(one.sharpness), f"{name}_error": float(one.sharpness_error)}
        return found | {"train_loss": float(data.train_loss), "train_loss_error": float(data.train_loss_error)}

    def figure(self, data: xr.Dataset) -> Figure:
        """Rises of the loss, what has units of its own, and growth with the step, on log axes; lower bounds apart."""
        names = [str(n) for n in data["definition"].values]
        own = [n for n in names if n not in RISES]
        rises = [n for n in names if n in RISES]
        panels = [_values(data, rises, "rise of the loss")] if rises else []
        panels += [_values(data, own, "each in its own unit")] if own else []
        loss = f"training loss {float(data.train_loss):.4g} ± {float(data.train_loss_error):.1g}"
        return Figure((*panels, *_growth(data)), note=loss, columns=1)

    def estimate(self, subject: Subject) -> Cost:
        """Graphs of the Hessian, a Krylov basis and a few steps; passes by definition."""
        kept, working = Hessian(subject).expected_bytes()
        vector = subject.size * subject.dtype.itemsize
        held = 46 + self.subspace * ("keskar" in self.definitions)
        most = kept + max(working + held * vector, test_bytes(subject)) + subject.memory()
        chosen = set(self.definitions)
        averages = (
            2
            * (self.draws + 2 * min(self.draws, FEWER))
            * len(chosen & {"average", "adaptive_average", "filter_average"})
        )
        noise = 8 * self.noise_draws * len(chosen & {"pac_bayes", "pac_bayes_magnitude"})
        searches = {"worst_l2", "worst_linf", "adaptive_worst_l2", "adaptive_worst_linf", "m_sharpness"}
        climbs = 2 * (self.steps + 1) * len(chosen & searches) + self._keskar_gradients
        modules = len(modules_of_weights(subject))
        eigen = 12 * len(chosen & {"lambda_max", "adaptive_lambda_max"})
        eigen += modules * (12 * len(chosen & {"module_lambda"}) + 30 * len(chosen & {"module_trace"}))
        words = f"about {averages + noise} forward passes, {climbs} gradients and {eigen} products"
        return Cost(most, averages + noise + climbs + eigen, words)


@dataclass
class _Run:
    """What one stream knows so far."""

    probe: Sharpness
    subject: Subject
    point: Point
    found: dict[str, Found] = field(default_factory=dict[str, Found])
    absent: dict[str, str] = field(default_factory=dict[str, str])
    done: float = 0.0

    def __post_init__(self) -> None:
        self.makers = self.probe.makers(self.point)

    def follow(self, number: int, name: str) -> Iterator[Reading]:
        """A definition's answers as readings; one that does not apply is noted and spoils no other."""
        try:
            for found in self.makers[name]():
                self.found[name] = found
                yield self.report(min((number + found.done) / len(self.probe.definitions), 0.999))
        except NotDefined as reason:
            self.found.pop(name, None)
            self.absent[name] = str(reason)
            yield self.report(min((number + 1) / len(self.probe.definitions), 0.999))

    def report(self, done: float) -> Reading:
        """The reading of now."""
        self.done = max(self.done, done)
        kept = [self.found[n] for n in self.probe.definitions if n in self.found]
        return self.probe.reading(
            self.done,
            self.values(),
            coords={
                "definition": np.array(self.probe.definitions),
                "fraction": np.array(FRACTIONS),
                "module": np.array(list(modules_of_weights(self.subject)), dtype=str),
            },
            converged=self.done == 1 and all(f.converged for f in kept),
            notes=self.notes(),
        )

    def values(self) -> dict[str, Any]:
        """Every variable that is known."""
        rows = [self.found.get(n, Found()) for n in self.probe.definitions]
        unknown = (math.nan,) * len(FRACTIONS)
        found: dict[str, Any] = {
            "sharpness": [f.value for f in rows],
            "sharpness_error": [f.error for f in rows],
            "converged": [f.converged for f in rows],
            "lower_bound": [f.lower_bound for f in rows],
            "radius": [f.radius for f in rows],
            "rise": [f.rise or unknown for f in rows],
            "rise_error": [f.rise_error or unknown for f in rows],
            "average_radius": self.probe.spread(self.subject.size),
            "train_loss": self.point.loss,
            "train_loss_error": self.point.loss_error,
            "gradient_norm": self.point.gradient_norm,
        }
        for one in rows:
            found |= one.extra
        return found

    def notes(self) -> tuple[str, ...]:
        """How everything was measured, what each definition stands for here, and which do not apply."""
        said = [*self.subject.notes]
        if self.point.tested is not None:
            said += [self.point.tested.words, _KINKS]
        if self.subject.norm == "eval" and any("BatchNorm" in note for note in said):
            said.append("BatchNorm's running statistics are not estimated anew for perturbed weights")
        said.append(self.subject.on)
        said.append("sharpness falls with the training loss: compare models only at equal training loss")
        if self.probe.normalise_logits:
            said.append("adaptive definitions divide each example's logits by their root mean square")
        for name in self.probe.definitions:
            if name in self.absent:
                said.append(f"{name}: nan, {self.absent[name]}")
            elif name in self.found:
                said += [f"{name}: {words}" for words in (self.found[name].protocol, *self.found[name].notes)]
        return tuple(said)


_KINKS = "differentiation ignores kinks (ReLU, max): curvature is that of the smooth piece that the weights lie in"


def _values(data: xr.Dataset, names: list[str], label: str) -> Panel:
    part = data.sel(definition=names)
    place, value, error = np.arange(len(names), dtype=float), part.sharpness.values, part.sharpness_error.values
    met, bound = part.converged.values, part.lower_bound.values
    kinds: tuple[tuple[Any, str, Role], ...] = (
        (met & ~bound, "value ± error", "main"),
        (met & bound, "lower bound", "second"),
        (~met, "not converged", "unconverged"),
    )
    # Bars without height carry the names under the points.
    marks: list[AnyMark] = [Bars(place, np.full(place.size, np.nan), names=tuple(LABELS[n] for n in names))]
    marks += [
        Points(place, np.where(which, value, np.nan), np.where(which, error, np.nan), words, role)
        for which, words, role in kinds
        if which.any()
    ]
    return Panel(tuple(marks), Axis(""), _ruler(label, value))


def _growth(data: xr.Dataset) -> tuple[Panel, ...]:
    roles: tuple[Role, ...] = ("main", "second", "third", "fourth", "reference")
    all_curves = [data.sel(definition=n) for n in data["definition"].values]
    curves = [one for one in all_curves if np.isfinite(one.rise.values).any()]
    if not curves:
        return ()
    share = data["fraction"].values
    marks: list[AnyMark] = []
    for one, role in zip(curves, roles, strict=False):
        label = LABELS[str(one["definition"].values)]
        marks.append(Line(share, one.rise.values, role=role))
        marks.append(Points(share, one.rise.values, one.rise_error.values, label, role))
    rises = np.concatenate([one.rise.values for one in curves])
    x, y = Axis("share of the full step", "log"), _ruler("rise of the loss", rises)
    return (Panel(tuple(marks), x, y, title="growth with the step"),)


def _ruler(label: str, values: np.ndarray) -> Axis:
    """Logarithmic; around zero too where a value is not positive."""
    known = np.abs(values[np.isfinite(values) & (values != 0)])
    if np.any(values <= 0) and known.size:
        return Axis(label, "symlog", threshold=float(known.min()))
    return Axis(label, "log")
