"""Which examples, layers, classes and inputs carry an eigenvector of the curvature."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from workbench.data import Batch
from workbench.figure import Figure
from workbench.numerics.basis import dot, norm
from workbench.numerics.overlap import vector_sines
from workbench.numerics.sampling import Draw
from workbench.operators.attribution import DRAWN, NOT_APART, AttributedName, Forms, forms, single_input, slopes
from workbench.operators.blocks import Group, groups
from workbench.operators.curvature import Curvature
from workbench.operators.table import WORDS, curvature
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Doc, Range
from workbench.selftest import test_bytes
from workbench.spectra import attributed
from workbench.spectra.run import Aim, SpectralRun
from workbench.subject import Subject

Floats = NDArray[np.float64]
NAMED = 5
"""Examples that the notes name."""


@dataclass(frozen=True)
class EigenvectorAttribution(Probe[Subject]):
    """Which examples, layers, classes and inputs carry the kth eigenvector of a loss's Hessian or another curvature.

    What it measures, for the unit eigenvector v with eigenvalue λ, the kth largest: each example's ``contribution``
    vᵀH_i v, with H_i the Hessian of its loss; their mean is λ. For other matrices H_i is the example's Gauss-Newton or
    Fisher matrix; the contribution is (g_i·v)² for the empirical Fisher matrix, g_i the gradient of its loss, and
    n/(n-1) ((g_i - ḡ)·v)² for the gradient covariance. ``class_contribution``, the part of λ that comes from
    the examples of a class (their sum is λ). ``layer_share``, ‖v_l‖² of the parameters of a layer (their sum is 1), and
    ``layer_curvature``, v_lᵀ(Hv)_l (their sum is λ). With ``blocks`` also ``layer_own``, v_lᵀH_ll v_l, what of that is
    the layer's own block; the rest is between layers. With ``inputs`` also ``saliency``, the mean of |∂(vᵀH_i v)/∂x_i|
    for each entry of the input (with ḡ held: n times the slope of λ). For sequences an example is a whole sequence.
    A Fisher matrix of drawn labels and a preconditioned matrix are no sums over examples, so they are not offered.

    How to read it: ``effective_examples`` = (Σ|c|)²/Σc² tells a direction that all examples share (near n) from one
    that few make; outliers of the spectrum often belong to a class or to mislabelled and hard examples, which
    ``example_at`` and ``given_at`` name, the largest contribution first, by their place among the subject's examples
    and in the data that were given. Negative contributions come from examples that are curved downwards along v.

    What it costs: a Lanczos run for ``rank`` + 1 pairs and one pass of some 9 gradients over the examples (4 where it
    is not the Hessian), whatever their number: weights on the losses, differentiated after two backward passes, give
    all vᵀH_i v at once. One more pass of some 16 gradients with ``inputs``, and a product for each layer with
    ``blocks``.

    When it misleads: in a cluster of close eigenvalues v is one of many vectors that would do as well, and so are all
    parts of it; ``misalignment`` and all errors are then unknown. At an eigenvector v_lᵀ(Hv)_l = λ‖v_l‖²: that a layer
    holds much of v does not mean that its own block of H is as curved, which ``layer_own`` tells. A layer's share grows
    with the scale on which its parameters are written. Saliency depends on the scale of the inputs.

    Errors: ``residual`` bounds the eigenvalue's; ``misalignment`` bounds the sine of the angle between v and the
    eigenvector, residual over gap (Davis and Kahan 1970), and with it the shares'. ``contribution_error`` is a
    first-order estimate, not a bound: the change of each contribution as v turns by that angle along its residual.
    ``saliency_error`` is the change with twice the step of the differences along v by which slopes are computed, in
    float64 (PyTorch's third derivatives are wrong through LayerNorm and BatchNorm); kinks of the model enlarge it.
    ``contribution_mean`` repeats the eigenvalue by another computation, and its error is how far the two are apart.

    Source: Pearlmutter 1994 for products by differentiation; the weights' derivative is our own.
    """

    operator: Annotated[AttributedName, Choice(WORDS, {"fisher_mc": DRAWN}), Doc("Which curvature matrix.")] = "hessian"
    rank: Annotated[
        int, Range(1, 200, step=1, soft=(1, 20)), Doc("Which eigenvector; 1 has the largest eigenvalue.")
    ] = 1
    tolerance: Annotated[
        float,
        Range(1e-6, 0.1, log=True, soft=(1e-4, 0.02)),
        Doc("What counts as converged: a pair's residual over its eigenvalue. Vectors need more than eigenvalues."),
    ] = 1e-3
    blocks: Annotated[bool, Doc("Whether to tell each layer's own block from what is between layers.")] = False
    inputs: Annotated[bool, Doc("Whether to look for the entries of the inputs that matter.")] = False

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("contribution", ("example",), "the example's part, n times what it adds", error="contribution_error"),
        Variable("contribution_error", ("example",), "first-order error by the vector's residual"),
        Variable("loss", ("example",), "the example's loss"),
        Variable("label", ("example",), "the example's class"),
        Variable("example_at", ("position",), "place of the example with the next largest contribution"),
        Variable("given_at", ("position",), "its place in the data that were given"),
        Variable("effective_examples", (), "(Σ|c|)²/Σc²", error="effective_examples_error"),
        Variable("effective_examples_error", (), "first-order error by the vector's residual"),
        Variable("layer_share", ("layer",), "the layer's share of the vector, ‖v_l‖²", error="misalignment"),
        Variable("layer_curvature", ("layer",), "the layer's part of the eigenvalue", error="layer_curvature_error"),
        Variable("layer_curvature_error", ("layer",), "bound by residual and angle"),
        Variable("layer_own", ("layer",), "what of it is the layer's own block", error="layer_own_error"),
        Variable("layer_own_error", ("layer",), "first-order bound by the vector's angle"),
        Variable("layer_parameters", ("layer",), "the layer's share of the parameters"),
        Variable("class_contribution", ("class_",), "the class's part of the eigenvalue",
                 error="class_contribution_error"),
        Variable("class_contribution_error", ("class_",), "first-order error by the vector's residual"),
        Variable("class_count", ("class_",), "examples of the class"),
        Variable("saliency", ("feature",), "mean size of the contribution's slope", error="saliency_error"),
        Variable("saliency_error", ("feature",), "its change with twice the step of the differences"),
        Variable("eigenvalue", (), "the eigenvalue", error="residual"),
        Variable("residual", (), "residual ‖Hv - λv‖"),
        Variable("misalignment", (), "bound on the sine of the vector's angle to the eigenvector"),
        Variable("contribution_mean", (), "mean of the contributions: the eigenvalue", error="contribution_mean_error"),
        Variable("contribution_mean_error", (), "its distance from the eigenvalue"),
        Variable("parameters", (), "number of parameters"),
        Variable("train_loss", (), "loss at the point", error="train_loss_error"),
        Variable("train_loss_error", (), "standard error of the loss over examples"),
        Variable("products", (), "products with the matrix"),
    )  # fmt: skip

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """The spectrum down to the eigenvector, then one pass over the examples, chunk by chunk."""
        losses = subject.losses()
        if losses is None:
            raise ValueError(f"{self.name}: {NOT_APART}")
        if self.rank > subject.size:
            raise ValueError(f"{self.name}.rank is {self.rank}, but there are {subject.size} parameters; ask for less.")
        with curvature(subject, self.operator) as matrix:
            run = _Run(self, subject, matrix, losses)
            for step in (run.spectrum(draw), run.examples(), run.inputs()):
                for _ in step:
                    yield run.report()
        yield run.report(last=True)

    @property
    def aim(self) -> Aim:
        """One pair more than is asked for, which ends the gap."""
        return Aim(self.rank + 1, 0, self.tolerance, trace=False, density=False)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The eigenvalue, on how many examples it rests, who carries most of it, and the loss."""
        found: dict[str, Value] = {"eigenvalue": float(data.eigenvalue), "eigenvalue_error": float(data.residual)}
        found |= {name: float(data[name]) for name in ("effective_examples", "effective_examples_error")}
        if np.isfinite(data.example_at.values[0]):
            found["top_example"] = int(data.example_at.values[0])
        share = data.layer_share.values
        if np.isfinite(share).any():
            found["top_layer"] = str(data["layer"].values[int(np.nanargmax(share))])
        names = ("misalignment", "train_loss", "train_loss_error")
        return found | {name: float(data[name]) for name in names}

    def figure(self, data: xr.Dataset) -> Figure:
        """Contributions sorted and against the loss, and the parts of layers, classes and inputs."""
        return Figure(attributed.panels(data))

    def estimate(self, subject: Subject) -> Cost:
        """The Lanczos run's basis and graph, or one chunk's graph three times differentiated."""
        size, itemsize, aim = subject.size, subject.dtype.itemsize, self.aim
        kept, working = curvature(subject, self.operator).expected_bytes()
        run = kept + max(aim.basis_bytes(size, itemsize) + 6 * size * itemsize + working, test_bytes(subject))
        chunk = 4 * working + 6 * size * itemsize + 100 * subject.examples
        words = (
            f"{min(aim.rows(size, itemsize), size)} basis vectors of {size} parameters, then one pass over the examples"
        )
        more = 16 * self.inputs + len(groups(subject)) * self.blocks
        return Cost(max(run, chunk), aim.products(size) + 7 + more, words)


@dataclass
class _Run:
    """What one stream knows so far."""

    probe: EigenvectorAttribution
    subject: Subject
    matrix: Curvature
    losses: Tensor
    done: float = 0.0
    met: bool = False
    said: tuple[str, ...] = ()
    gap: float = math.nan
    sine: float = math.nan
    vector: Tensor | None = None
    rest: Tensor | None = None
    values: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        subject, n = self.subject, self.subject.examples
        self.layers: list[Group] = groups(subject)
        first = next(iter(subject.batches(1)))
        x = single_input(first) if self.probe.inputs and subject.has_outputs else None
        self.features = 1 if x is None else x.numel()
        self.labelled = subject.classes is not None and _labels(first) is not None
        classes = (subject.classes or 1) if self.labelled else 1
        self.coords = {
            "example": np.arange(n),
            "position": np.arange(n),
            "layer": np.array([group.name for group in self.layers]),
            "class_": np.arange(classes),
            "feature": np.arange(self.features),
        }
        self.turned = np.full(n, np.nan)
        self.values |= {"contribution": np.full(n, np.nan), "label": np.full(n, np.nan)}
        sizes = np.array([group.size for group in self.layers])
        self.values |= {"loss": self.losses.cpu().numpy(), "layer_parameters": sizes / subject.size}

    # --- measuring --------------------------------------------------------------------------------------------------

    def spectrum(self, draw: Draw) -> Iterator[None]:
        """The Lanczos run; then the vector, and its residual by a product of its own."""
        at, size = self.probe.rank - 1, self.subject.size
        run = SpectralRun(self.probe.aim, self.matrix, self.matrix, draw)
        for _ in run.eigenvalues():
            self.take(run)
            yield
        self.take(run)
        self.met, self.said = run.converged, run.notes()
        values, residuals = np.array(run.values["eigenvalue"]), np.array(run.values["residual"])
        values[size:], residuals[size:] = -np.inf, 0.0
        self.sine = self.values["misalignment"] = float(vector_sines(values, residuals)[at])
        self.gap = residuals[at] / self.sine if self.sine > 0 else math.nan
        assert run.state is not None
        self.vector = run.state.vectors([at])[0]
        product = self.matrix.matvec(self.vector)
        self.rest = product - float(values[at]) * self.vector
        if self.probe.blocks:
            yield from self.own()

    def own(self) -> Iterator[None]:
        """v_lᵀ H_ll v_l, layer by layer, by a product with v_l alone."""
        assert self.vector is not None
        own, length, sine = np.full(len(self.layers), np.nan), np.full(len(self.layers), np.nan), 2 * self.sine
        for i, group in enumerate(self.layers):
            places = group.index(self.subject.params)
            inside = torch.zeros_like(self.vector)
            inside[places] = self.vector[places]
            product = self.matrix.matvec(inside)[places]
            own[i], length[i] = float(dot(self.vector[places], product)), float(norm(product))
            self.values |= {"layer_own": own, "layer_own_error": sine * length, "products": self.matrix.products}
            yield

    def take(self, run: SpectralRun) -> None:
        """The eigenvalue so far, and the loss."""
        at = self.probe.rank - 1
        self.values |= {name: run.values[name][at] for name in ("eigenvalue", "residual")}
        for name in ("train_loss", "train_loss_error", "parameters", "products"):
            self.values[name] = run.values.get(name)
        used = self.matrix.products
        self.done = 0.7 * used / (used + run.left)

    def examples(self) -> Iterator[None]:
        """All contributions, chunk by chunk."""
        assert self.vector is not None
        assert self.rest is not None
        self.matrix.close()
        parts, rest = self.matrix.split(self.vector), self.matrix.split(self.rest)
        total, seen = torch.zeros_like(self.vector), 0
        for batch in self.subject.batches():
            found = forms(self.matrix, batch, parts, rest)
            total += torch.cat([p.reshape(-1) for p in found.product])
            self.put(slice(seen, seen + batch.size), batch, found)
            seen += batch.size
            self.done = 0.7 + 0.15 * seen / self.subject.examples
            self.values |= self.sums(total / self.subject.total_weight, seen)
            yield

    def put(self, at: slice, batch: Batch, found: Forms) -> None:
        """One chunk's contributions, scaled so that their mean over all examples is the eigenvalue."""
        scale = self.subject.examples / self.subject.total_weight
        self.values["contribution"][at] = scale * found.each.cpu().numpy()
        self.turned[at] = scale * found.turned.cpu().numpy()
        labels = _labels(batch) if self.labelled else None
        if labels is not None:
            self.values["label"][at] = labels.cpu().numpy()

    def inputs(self) -> Iterator[None]:
        """Slopes by the inputs, and how they change with twice the step; in float64 where the model has such a form."""
        assert self.vector is not None
        if self.features == 1:
            return
        subject, n = fine(self.subject), self.subject.examples
        matrix, direction = curvature(subject, self.probe.operator), self.vector.to(subject.dtype)
        if self.probe.operator == "gradient_covariance":
            _ = matrix.gradient  # one pass, whose graphs are not needed again
            matrix.close()
        step = torch.finfo(subject.dtype).eps ** (1 / 3) * (float(norm(subject.flatten(subject.params))) or 1.0)
        sums, seen = np.zeros((2, self.features)), 0
        for batch in subject.batches():
            one, two = (slopes(matrix, batch, matrix.split(direction), h) for h in (step, 2 * step))
            sizes = torch.stack([t.detach().double().abs().flatten(1).sum(0) for t in (one, two - one)])
            sums += sizes.cpu().numpy() * (n / subject.total_weight)
            seen += batch.size
            self.values["saliency"], self.values["saliency_error"] = sums / seen
            self.done = 0.85 + 0.15 * seen / n
            yield

    # --- what it says -----------------------------------------------------------------------------------------------

    def sums(self, product: Tensor, seen: int) -> dict[str, Any]:
        """Everything that is made of the contributions so far."""
        parts, turn = self.values["contribution"], 2 * self.turned / self.gap
        order = np.argsort(-parts, kind="stable").astype(float)
        order[seen:] = np.nan  # what was not looked at yet is sorted to the end
        known = order[:seen].astype(int)
        found: dict[str, Any] = {"contribution_error": np.abs(turn), "example_at": order}
        found["given_at"] = np.append(np.array(self.subject.places)[known], order[seen:])
        whole, moved = _effective(parts), [_effective(parts + turn), _effective(parts - turn)]
        found |= {"effective_examples": whole, "effective_examples_error": float(np.abs(np.array(moved) - whole).max())}
        if self.labelled:
            found |= self.by_class(turn)
        if seen == self.subject.examples:
            value = float(self.values["eigenvalue"])
            mean = float(parts.mean())
            found |= {"contribution_mean": mean, "contribution_mean_error": abs(mean - value), **self.by_layer(product)}
        return found

    def by_class(self, turn: Floats) -> dict[str, Any]:
        """Sums over the examples of each class, over the number of all examples."""
        known = np.isfinite(self.values["contribution"]) & (self.values["label"] >= 0)
        labels, classes, n = self.values["label"][known].astype(int), self.coords["class_"].size, self.subject.examples
        weights = (self.values["contribution"][known], turn[known])
        part, error = (np.bincount(labels, each, minlength=classes) / n for each in weights)
        count = np.bincount(labels, minlength=classes)
        return {"class_contribution": part, "class_contribution_error": np.abs(error), "class_count": count}

    def by_layer(self, product: Tensor) -> dict[str, Any]:
        """Each layer's share of the vector and its part of vᵀHv; all with one wait for the device."""
        assert self.vector is not None
        subject, rest = self.subject, product - float(self.values["eigenvalue"]) * self.vector
        pairs = ((self.vector, self.vector), (self.vector, product), (self.vector, rest))
        rows = [[_inside(group, subject.unflatten(a), subject.unflatten(b)) for group in self.layers] for a, b in pairs]
        share, part, off = torch.stack([torch.stack(row) for row in rows]).cpu().numpy()
        error = np.abs(off) + abs(float(self.values["eigenvalue"])) * self.sine + float(self.values["residual"])
        return {"layer_share": share, "layer_curvature": part, "layer_curvature_error": error}

    def report(self, last: bool = False) -> Reading:
        """The reading of now."""
        done = 1.0 if last else min(max(self.done, 1e-6), 0.999)
        return self.probe.reading(
            done, self.values, coords=self.coords, converged=last and self.met, notes=self.notes(last)
        )

    def notes(self, last: bool) -> tuple[str, ...]:
        """What a reader must know about these numbers."""
        subject = self.subject
        said = [*subject.notes, *self.said, subject.on]
        if self.probe.inputs and self.features == 1:
            said.append("the inputs are not one tensor of real numbers, so they have no saliency")
        if last and math.isnan(self.values["misalignment"]):
            said.append(
                "the eigenvalue lies in a cluster closer than the errors: this vector is one of many, and so are its "
                "parts; a smaller tolerance may tell them apart"
            )
        if last:
            first, given = (self.values[name][:NAMED].astype(int) for name in ("example_at", "given_at"))
            names, theirs = (", ".join(map(str, places)) for places in (first, given))
            where = "" if names == theirs else f"; in the data given: {theirs}"
            said.append(f"largest contributions: examples {names}{where}")
        return tuple(said)


def fine(subject: Subject) -> Subject:
    """The subject in float64; itself where that is its precision, or the model does not run in it."""
    if subject.dtype == torch.float64:
        return subject
    try:
        found = subject.excerpt(subject.examples, torch.float64).with_plan(subject.plan)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as problem:
        if isinstance(problem, torch.OutOfMemoryError):
            raise
        return subject
    return found if found.examples == subject.examples else subject  # of ragged batches an excerpt is the first


def _labels(batch: Batch) -> Tensor | None:
    """One class for each example, where there is one."""
    found = batch.targets
    if not isinstance(found, Tensor) or found.is_floating_point() or found.numel() != batch.size:
        return None
    return found.reshape(-1)


def _effective(parts: Floats) -> float:
    known = np.abs(parts[np.isfinite(parts)])
    squares = float((known**2).sum())
    return float(known.sum()) ** 2 / squares if squares > 0 else math.nan


def _inside(group: Group, one: dict[str, Tensor], two: dict[str, Tensor]) -> Tensor:
    """The inner product over a group's parameters, in float64."""
    products = [part.of(one[part.name]).double() * part.of(two[part.name]).double() for part in group.parts]
    return torch.stack([p.sum() for p in products]).sum()
