"""Gradient noise: how large a batch must be before its gradient is more signal than noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from workbench.figure import AnyMark, Axis, Band, Bars, Figure, Line, Panel, Rule, Text
from workbench.numerics.noise_scale import Noise, NoiseSums
from workbench.numerics.sampling import Draw
from workbench.operators.blocks import Group, groups
from workbench.operators.curvature import Curvature
from workbench.operators.gradients import check_apart, gradients_of_examples
from workbench.operators.preconditioned import Preconditioner, preconditioner
from workbench.operators.table import WORDS, curvature
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Doc, Range
from workbench.selftest import self_test, test_bytes
from workbench.subject import Subject

FEWEST = 3
"""Gradients below which nothing can be said about how sure the numbers are."""
READINGS = 20
_BOTH = (
    ("noise_trace", "trace", "tr Σ, variance of one example's gradient, summed"),
    ("gradient_square", "square", "‖G‖² of the expected gradient, unbiased"),
    ("snr", "snr", "gradient signal-to-noise ratio ‖G‖²/tr Σ"),
)


def _variables() -> Iterator[Variable]:
    for prefix, dims, words in (("", (), ""), ("layer_", ("layer",), ", by layer")):
        for name, _, long in _BOTH:
            yield Variable(f"{prefix}{name}", dims, long + words, error=f"{prefix}{name}_error")
            yield Variable(f"{prefix}{name}_error", dims, "half-width of its 95 % interval")
        yield Variable(f"{prefix}noise_scale", dims, f"noise scale tr Σ/‖G‖²{words}", "examples",
                       f"{prefix}noise_scale_error")  # fmt: skip
        yield Variable(f"{prefix}noise_scale_error", dims, "half the width of its 95 % interval", "examples")
        yield Variable(f"{prefix}noise_scale_low", dims, "lower end of its 95 % interval", "examples")
        yield Variable(f"{prefix}noise_scale_high", dims, "upper end of its 95 % interval", "examples")
        yield Variable(f"{prefix}parameter_snr", dims, f"mean over parameters of E[g]²/Var[g], unbiased{words}")
        yield Variable(f"{prefix}constant", dims, "parameters whose gradient is the same for all examples")


@dataclass(frozen=True)
class GradientNoise(Probe[Subject]):
    """Gradient noise scale, the critical batch size it predicts, signal-to-noise ratios and gradient diversity.

    What it measures, with g_i = ∇ℓ_i of n examples and their mean ḡ: ``noise_trace`` tr Σ = Σ ‖g_i - ḡ‖²/(n - 1);
    ``gradient_square`` ‖G‖² = ‖ḡ‖² - tr Σ/n, unbiased; ``noise_scale`` B = tr Σ/‖G‖², the simple noise scale;
    ``snr`` = 1/B; ``parameter_snr`` the mean over parameters of (ḡ_j² - v_j/n)/v_j with v_j = Var[g_j], without those
    that have no variance (``constant`` counts them); ``diversity`` = Σ‖g_i‖²/‖Σ g_i‖² and ``diversity_bound`` n times
    that, the batch size up to which averaging pays. Each of the first ones by layer too.

    With ``batch`` b > 1 the g_i are gradients of disjoint random batches of b examples, and tr Σ is b times their
    spread: what the two-batch-size estimator gives when all batches of the small size are used at once. It costs n/b
    gradients instead of n and has the same error at equal n; diversity needs examples (nan).

    ``preconditioned`` measures the same of (ηP⁻¹)^(1/2) g_i, with the optimizer's preconditioner P and learning rates
    η: B = tr(ηP⁻¹Σ)/(GᵀηP⁻¹G), the noise scale in the coordinates in which the optimizer's step is gradient descent.
    ``gradient_square`` is then GᵀηP⁻¹G, by which a step along the full gradient lowers the loss to first order.

    ``curvature`` measures B = tr(HΣ)/(GᵀHG) instead, with H the Hessian or Gauss-Newton matrix of the loss on the same
    examples; ``noise_trace`` is then tr(HΣ) and ``gradient_square`` GᵀHG. It is what the theory of large batches asks
    for, of which the simple noise scale is the case H = I: tr(HΣ)/(2 batch) times the squared learning rate is what
    noise adds to the loss in one step. Layers then share both sums, and a layer's ratio means nothing where its part of
    either is negative. Diversity is nan.

    How to read it: below B examples in a batch, doubling the batch nearly halves the steps that are needed; far above
    it nothing is gained. The curve shows by what factor training takes more steps than with the full gradient,
    1 + B/batch. B grows while the loss falls.

    What it costs: one gradient of all examples and n of one example each (n/b of b, twice, with ``batch``). Memory: a
    few vectors of the model's size. With ``curvature`` a product with H of all examples for each gradient: give a
    ``batch`` of n/30 or so, and expect the Hessian's graphs in memory.

    When it misleads: ‖G‖² near zero makes B meaningless. It is then nan ("undefined"), and ``noise_scale_low`` says
    what B exceeds; more examples help, about B/3 of them are needed. The examples are those of the subject; a sequence
    is one example, however many tokens it has. B is for SGD without momentum; Adam's is that of
    ``preconditioned``, with P held as it is now although it was made from gradients of some batch size itself. The
    curvature-weighted one differs where noise lies in sharp directions. Weight decay and clipping are left out.

    Errors: 95 % intervals by the jackknife over gradients, exact formulas of leaving one out; that of B is the interval
    of 1/B turned over, since the ratio is skewed and its inverse is not. ``parameter_snr`` and diversity come without.
    Before all gradients are in, no errors are known. Over 20 laws of known B (64 or 512 gradients, B from 4 to four
    times as many, normal, heavy-tailed and of regression) it held B on 93 to 97 % of 300 draws, and narrowed to 90 % on
    89 to 93 %. The bootstrap, which would need the products of all pairs of gradients, held it on 70 to 89 % at 90 %:
    where a gradient is drawn twice, its square adds tr Σ/n to ‖ḡ‖² once more (``benchmarks/noise_intervals.py``).

    Source: McCandlish, Kaplan, Amodei et al. 2018 (noise scale); Liu et al. 2020 (signal-to-noise ratio); Yin et al.
    2018 (diversity).
    """

    examples: Annotated[
        int, Range(FEWEST, 1_000_000, log=True, soft=(32, 4096)), Doc("At most so many examples, drawn at random.")
    ] = 512
    batch: Annotated[
        int, Range(1, 100_000, log=True, soft=(1, 256)), Doc("Examples in each gradient; 1 is the most informative.")
    ] = 1
    preconditioned: Annotated[
        bool, Doc("Whether to look through the optimizer's preconditioner and learning rate: for Adam and its kind.")
    ] = False
    curvature: Annotated[
        Literal["none", "hessian", "ggn"],
        Choice(
            {
                "none": "none: the simple noise scale",
                "hessian": "the Hessian: what the loss feels; undefined where it bends down",
                "ggn": "the Gauss-Newton matrix: never negative",
            }
        ),
        Doc("What weights directions."),
    ] = "none"

    variables: ClassVar[tuple[Variable, ...]] = (
        *_variables(),
        Variable("diversity", (), "gradient diversity Σ‖g‖²/‖Σg‖²"),
        Variable("diversity_bound", (), "n times the diversity: batch size that still pays", "examples"),
        Variable("gradient_norm", (), "length of the mean gradient"),
        Variable("resolved", (), "whether the interval of ‖G‖² lies above zero", kind="bool"),
        Variable("gradients", (), "gradients taken so far"),
        Variable("measured", (), "examples that were looked at"),
        Variable("train_loss", (), "loss at the point", error="train_loss_error"),
        Variable("train_loss_error", (), "standard error of the loss over examples"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """The mean gradient, then one gradient after another against it."""
        scaling = preconditioner(subject) if self.preconditioned else None
        chosen = self._chosen(subject, draw)
        with ExitStack() as held:
            matrix = None if self.curvature == "none" else held.enter_context(curvature(chosen, self.curvature))
            run = _Run(self, chosen, draw, scaling, matrix)
            for _ in run.steps():
                yield run.report()
            yield run.report(last=True)

    def validate(self) -> None:
        """One weight at a time."""
        if self.preconditioned and self.curvature != "none":
            raise ValueError("preconditioned=True and curvature= weight gradients in two ways; choose one of them.")

    def _chosen(self, subject: Subject, draw: Draw) -> Subject:
        """The examples that are looked at; refused where they say nothing."""
        used = min(self.examples, subject.examples)
        if used // self.batch < FEWEST:
            raise ValueError(
                f"GradientNoise compares at least {FEWEST} gradients; {used} examples make {used // self.batch} of "
                f"{self.batch} each. Give more examples or a smaller batch."
            )
        if self.batch == 1:
            check_apart(subject)
        used -= used % self.batch
        if used == subject.examples and self.batch == 1:
            return subject
        return subject.selected(draw.generator(0).permutation(subject.examples)[:used].tolist())

    def context(self, subject: Subject) -> str:
        """A preconditioned noise scale depends on the optimizer's state."""
        return preconditioner(subject).fingerprint() if self.preconditioned else ""

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The noise scale or that it is undefined, both of its parts, and diversity."""
        names = ("noise_scale", "noise_trace", "gradient_square", "snr", "train_loss")
        found: dict[str, Value] = {n + end: float(data[n + end]) for n in names for end in ("", "_error")}
        low, high = (float(data[f"noise_scale_{end}"]) for end in ("low", "high"))
        return found | {"noise_scale_low": low, "noise_scale_high": high, "diversity": float(data.diversity)}

    def figure(self, data: xr.Dataset) -> Figure:
        """Steps against batch size as the noise scale predicts them, and the noise scale of each layer."""
        return Figure((_tradeoff(data), _layers(data)))

    def estimate(self, subject: Subject) -> Cost:
        """Gradients of single examples (or batches), and sums over them."""
        count = min(self.examples, subject.examples) // self.batch * (1 if self.batch == 1 else 2)
        words = f"{count} gradients of {self.batch} example{'s' * (self.batch > 1)} each"
        vectors = 4 + 2 * self.preconditioned
        most = subject.memory() + subject.size * (16 + vectors * subject.dtype.itemsize)
        if self.curvature == "none":
            return Cost(most, count, words)
        graphs = sum(curvature(subject, self.curvature).expected_bytes())
        most += max(graphs, test_bytes(subject)) + 4 * subject.size * subject.dtype.itemsize
        return Cost(most, 2 * count, f"{words}, and as many products with the curvature of all")


@dataclass
class _Run:
    """What one stream knows so far."""

    probe: GradientNoise
    subject: Subject
    draw: Draw
    scaling: Preconditioner | None = None
    matrix: Curvature | None = None
    done: float = 0.001
    values: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        self.groups = groups(self.subject)
        self.count = self.subject.examples // self.probe.batch
        self.pairs: list[Tensor] = []
        self.roots = self.subject.unflatten(self.scaling.root) if self.scaling is not None else None
        self.tested = () if self.matrix is None else (self_test(self.matrix).words,)
        found = self.subject.evaluate(None, ("loss",))
        self.values |= {"train_loss": found["loss"], "train_loss_error": found["loss_error"]}

    def steps(self) -> Iterator[None]:
        """The mean, and then lengths and products with it."""
        passes = 1 if self.probe.batch == 1 else 2
        every = max(self.count // READINGS, 1)
        self.mean = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in self.subject.params.items()}
        if passes == 1:
            self.mean = {name: g.double() for name, g in self.scaled(self.subject.gradient()).items()}
        for i, gradient in enumerate(self.gradients() if passes == 2 else ()):
            for name, g in gradient.items():
                self.mean[name] += g.double() / self.count
            if (i + 1) % every == 0:
                self.done = (i + 1) / self.count / 2
                yield
        yield from self.compare(passes, every)

    def compare(self, passes: int, every: int) -> Iterator[None]:
        """Each gradient against the mean."""
        self.bent = self.weighted(self.mean)
        self.mean_square = self.lengths(self.mean)[1].cpu().numpy()
        self.length = torch.stack([m.square().sum() for m in self.mean.values()]).sum().item()
        self.scatter = {name: torch.zeros_like(m) for name, m in self.mean.items()}
        for i, gradient in enumerate(self.gradients()):
            for name, g in gradient.items():
                self.scatter[name] += (g.double() - self.mean[name]).square()
            self.pairs.append(self.lengths(gradient))
            if (i + 1) % every == 0 and i + 1 < self.count:
                self.done = (passes - 1 + (i + 1) / self.count) / passes
                yield

    def lengths(self, gradient: Mapping[str, Tensor]) -> Tensor:
        """‖g‖² and g · ḡ of each layer (with curvature gᵀHg and gᵀHḡ), (2, layers), on the device."""
        found: list[Tensor] = []
        weighted = self.weighted(gradient)
        for group in self.groups:
            pairs: list[Tensor] = []
            for part in group.parts:
                g = part.of(gradient[part.name]).double()
                both = part.of(weighted[part.name]), part.of(self.bent[part.name])
                pairs.append(torch.stack([(g * other).sum() for other in both]))
            found.append(torch.stack(pairs).sum(0))
        return torch.stack(found, 1)

    def weighted(self, gradient: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """H g where a curvature weights directions, else g."""
        if self.matrix is None:
            return gradient
        flat = self.subject.flatten({name: g.to(self.subject.dtype) for name, g in gradient.items()})
        return self.subject.unflatten(self.matrix.matvec(flat))

    def scaled(self, gradient: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A gradient in the coordinates in which the optimizer's step is plain gradient descent; as it is without."""
        return gradient if self.roots is None else {name: g * self.roots[name] for name, g in gradient.items()}

    def gradients(self) -> Iterator[Mapping[str, Tensor]]:
        """g_i of every example, or of every batch, scaled so that their mean is ∇L, and preconditioned where asked."""
        return map(self.scaled, self.of_examples() if self.probe.batch == 1 else self.of_batches())

    def of_examples(self) -> Iterator[Mapping[str, Tensor]]:
        """One example after another."""
        share = self.subject.examples / self.subject.total_weight
        for gradient in gradients_of_examples(self.subject):
            yield {name: g * share for name, g in gradient.items()}

    def of_batches(self) -> Iterator[Mapping[str, Tensor]]:
        """Disjoint batches at random, the same ones each time."""
        subject, size = self.subject, self.probe.batch
        order = self.draw.generator(1).permutation(subject.examples).tolist()
        for first in range(0, subject.examples, size):
            one = subject.selected(order[first : first + size])
            share = one.total_weight / size * subject.examples / subject.total_weight
            yield {name: g * share for name, g in one.gradient().items()}

    # --- what it says -----------------------------------------------------------------------------------------------

    def report(self, last: bool = False) -> Reading:
        """The reading of now."""
        self.values |= {"gradients": len(self.pairs), "measured": self.subject.examples}
        if len(self.pairs) > 1:
            self.values |= self.known()
        coords = {"layer": np.array([group.name for group in self.groups])}
        done = 1.0 if last else self.done
        return self.probe.reading(done, self.values, coords=coords, converged=last, notes=self.notes(last))

    def known(self) -> dict[str, Any]:
        """Every number from the gradients so far."""
        pairs = torch.stack(self.pairs).cpu().numpy()
        weighted = self.probe.curvature == "hessian"
        sums = NoiseSums(pairs[:, 0], pairs[:, 1], self.mean_square, self.count, self.probe.batch, weighted)
        total = sums.total().estimate()
        found = {name: value[0] for name, value in _named(total).items()}
        found |= {f"layer_{name}": value for name, value in _named(sums.estimate()).items()}
        found |= {"gradient_norm": math.sqrt(self.length), "resolved": bool(total.resolved[0])}
        if self.probe.batch == 1 and self.length > 0 and self.matrix is None:
            diversity = float(pairs[:, 0].sum(1).mean()) / (self.count * self.length)
            found |= {"diversity": diversity, "diversity_bound": diversity * self.count}
        return found | (self.by_parameter() if sums.whole else {})

    def by_parameter(self) -> dict[str, Any]:
        """The mean ratio of squared mean to variance, and the parameters left out of it."""
        parts = [_ratios(group, self.mean, self.scatter, self.count) for group in self.groups]
        sums = torch.stack(parts, 1).cpu().numpy()  # (ratio, varying, constant) by layer
        with np.errstate(invalid="ignore", divide="ignore"):
            layer, total = sums[0] / sums[1], sums[0].sum() / sums[1].sum()
        snr = {"layer_parameter_snr": layer / self.probe.batch, "parameter_snr": total / self.probe.batch}
        return snr | {"layer_constant": sums[2], "constant": sums[2].sum()}

    def notes(self, last: bool) -> tuple[str, ...]:
        """What a reader must know about these numbers."""
        subject, words = self.subject, []
        if last and not self.values.get("resolved"):
            low = self.values.get("noise_scale_low", math.nan)
            more = f"; it is larger than {low:.3g} (95 %)" if math.isfinite(low) else ""
            words.append(f"the noise scale is undefined: ‖G‖² is not resolved from zero with these examples{more}")
        if self.probe.batch > 1:
            words.append(f"gradients are of batches of {self.probe.batch} examples")
        if self.scaling is not None:
            words += [f"of (ηP⁻¹)^(1/2) g, preconditioned by {self.scaling.words}", *self.scaling.notes]
        if self.matrix is not None:
            words += [f"directions are weighted by {WORDS[self.probe.curvature]}", *self.tested]
        return (*subject.notes, subject.on, *words)


def _named(noise: Noise) -> dict[str, Any]:
    found: dict[str, Any] = {name: getattr(noise, attribute) for name, attribute, _ in _BOTH}
    found |= {f"{name}_error": noise.error[i] for i, (name, _, _) in enumerate(_BOTH)}
    value, low, high = noise.scale()
    ends = {"noise_scale_low": low, "noise_scale_high": high, "noise_scale_error": (high - low) / 2}
    return found | {"noise_scale": value} | ends


def _ratios(group: Group, mean: Mapping[str, Tensor], scatter: Mapping[str, Tensor], count: int) -> Tensor:
    """Σ over parameters of the unbiased ratio, how many vary, how many do not, (3,)."""
    sums: list[Tensor] = []
    for part in group.parts:
        square, variance = part.of(mean[part.name]).square(), part.of(scatter[part.name]) / (count - 1)
        still = variance == 0
        ratio = torch.where(still, 0.0, square / torch.where(still, 1.0, variance) - 1 / count)
        sums.append(torch.stack([ratio.sum(), (~still).sum().double(), still.sum().double()]))
    return torch.stack(sums).sum(0)


def _tradeoff(data: xr.Dataset) -> Panel:
    value, low, high = (float(data[f"noise_scale{end}"]) for end in ("", "_low", "_high"))
    x, y = Axis("batch size", "log", "examples"), Axis("steps over fewest possible", "log")
    if not math.isfinite(value):
        known = f"larger than {low:.3g}" if math.isfinite(low) else "not known yet"
        return Panel((Text(1.0, 1.0, f"noise scale undefined, {known}"), Rule(1.0)), x, y, title="noise scale")
    sizes = np.geomspace(min(1.0, value / 10), value * 100, 100)
    marks: list[AnyMark] = [Line(sizes, 1 + value / sizes, "1 + B/batch"), Rule(value, "x", f"B = {value:.3g}")]
    if math.isfinite(high):
        marks.insert(0, Band(sizes, 1 + low / sizes, 1 + high / sizes))
    return Panel(tuple(marks), x, y, title="noise scale")


def _layers(data: xr.Dataset) -> Panel:
    places, names = np.arange(1, data.sizes["layer"] + 1), tuple(str(n) for n in data["layer"].values)
    bars = Bars(places, data.layer_snr.values, data.layer_snr_error.values, names=names)
    return Panel((bars, Rule(float(data.snr), label="all layers")), Axis(""), Axis("‖G‖²/tr Σ"), title="by layer")
