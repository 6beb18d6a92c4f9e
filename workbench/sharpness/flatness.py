"""Relative flatness of one linear layer: its curvature weighed by how large its weights are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.activations import Classifier, Layer, find_classifier, stream
from workbench.numerics.basis import dot
from workbench.numerics.stats import Moments
from workbench.operators.hessian import Hessian
from workbench.sharpness.found import Found, NotDefined
from workbench.sharpness.point import Point

MOST_OUTPUTS = 512
"""Outputs up to which the closed form is summed exactly; beyond, and for inner layers, random vectors do it."""
MOST_FEATURES, MOST_BYTES = 2048, 2**29
"""Features, and bytes of all of them, up to which eigenvalues neuron by neuron are computed."""
SAMPLES, FIRST, EACH = 60, 40_000, 4
RESOLVED = 0.25
"""Standard error over value at which a random estimate counts as known."""


@dataclass(frozen=True, eq=False)
class _Rows:
    """One batch at the classifier: features (n, d) in float64; outputs (..., C) in n rows, and the loss's slope."""

    features: Tensor
    outputs: Tensor
    slope: Tensor

    def bend(self, direction: Tensor) -> Tensor:
        """H_ℓ u for each row, (n, C) in float64, for one direction u (C,): the loss comes apart by rows."""
        along = direction.to(self.slope).expand_as(self.slope)
        if not self.slope.requires_grad:
            return torch.zeros_like(along).flatten(0, -2).double()
        found = torch.autograd.grad(self.slope, self.outputs, along, retain_graph=True)[0]
        return found.flatten(0, -2).double()


def relative_flatness(point: Point, layer: str | None, standardise: bool) -> Iterator[Found]:
    """κ = Σ_{s,s'} ⟨w_s, w_s'⟩ tr(∂²L/∂w_s ∂w_s') for a linear layer W (rows w_s), without its bias.

    For the classifier, whose input is φ: κ = E[‖φ‖² tr(Wᵀ H_ℓ W)], summed exactly from the C curvatures of the loss at
    the outputs (‖W‖² E‖φ‖² for half_mse). For another layer, and for more than 512 outputs, by Hutchinson's estimator
    with V = (W ε) ηᵀ, ε and η of random signs, whose mean of ⟨V, H V⟩ is κ; error: standard error. Does not change
    under rescalings of layers or neurons that leave the function as it is. ``standardise`` first divides each feature
    by its standard deviation and multiplies the weights by it. Source: Petzka et al. 2021 (arXiv:2001.00939).
    """
    classifier = _classifier(point, layer)
    if classifier is None or classifier.weight is None:
        yield from _inner_layer(point, str(layer), standardise)
    elif classifier.weight.shape[0] <= MOST_OUTPUTS:
        yield _closed(point, classifier, standardise)
    else:
        yield from _many_outputs(point, classifier, standardise)


def neuronwise_flatness(point: Point, layer: str | None, standardise: bool) -> Iterator[Found]:
    """Σ_s ‖w_s‖² λ_1(H_ss) over the classifier's rows, H_ss = E[(H_ℓ)_ss φ φᵀ]: exact, by dense eigenvalues.

    Up to 512 outputs and 2048 features. Source: Petzka et al. 2021.
    """
    classifier = _classifier(point, layer)
    weight = None if classifier is None else classifier.weight
    if classifier is None or weight is None:
        raise NotDefined("neuron by neuron it is known only for the classifier")
    if weight.shape[0] > MOST_OUTPUTS or weight.shape[1] > MOST_FEATURES:
        raise NotDefined(f"the classifier is {weight.shape[0]} x {weight.shape[1]}, too large to go neuron by neuron")
    scale = _spread(point, classifier, standardise)
    squares = ((weight.double() * scale) ** 2).sum(1)
    grams = torch.zeros(weight.shape[0], weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    if grams.numel() * 8 > MOST_BYTES:
        raise NotDefined(f"the classifier is {weight.shape[0]} x {weight.shape[1]}, too large to go neuron by neuron")
    for rows in _rows(point, classifier):
        features = rows.features / scale
        for s, unit in enumerate(torch.eye(weight.shape[0], dtype=torch.float64, device=weight.device)):
            grams[s] += features.T @ (rows.bend(unit)[:, s, None] * features)
    top = torch.stack([torch.linalg.eigvalsh(gram)[-1] for gram in grams]) / point.subject.total_weight
    value = float((squares * top).sum())
    yield _exact(point, value, f"Σ ‖w_s‖² λ_1(H_ss) over the rows of {classifier.layer.name}{_words(standardise)}")


def _classifier(point: Point, layer: str | None) -> Classifier | None:
    """The classifier; None where another layer was asked for."""
    if not point.subject.has_outputs or not point.comes_apart:
        if layer is None:
            raise NotDefined("it needs outputs and a loss that sums over them; or name a linear layer, layer='...'")
        return None
    try:
        found = find_classifier(point.subject)
    except ValueError as problem:
        if layer is None:
            raise NotDefined(str(problem)) from problem
        return None
    return found if layer in (None, found.layer.name) else None


def _rows(point: Point, classifier: Classifier) -> Iterator[_Rows]:
    """Features and outputs of each batch as rows that belong together.

    Raises:
        NotDefined: they do not, as for outputs averaged over positions.
    """
    subject, layer = point.subject, classifier.layer
    for caught in stream(subject, (layer,)):
        features, outputs = caught.features[layer], caught.outputs.detach().requires_grad_()
        if outputs.ndim < 2 or features.shape[:-1] != outputs.shape[:-1]:
            raise NotDefined(f"features {tuple(features.shape)} and outputs {tuple(outputs.shape)} are not row by row")
        with torch.enable_grad():
            loss = subject.output_loss(outputs, caught.batch)
            slope = torch.autograd.grad(loss, outputs, create_graph=True)[0]
        yield _Rows(features.reshape(-1, features.shape[-1]).double(), outputs, slope)


def _spread(point: Point, classifier: Classifier, standardise: bool) -> Tensor:
    """Each feature's standard deviation (1 for constant features), or 1."""
    weight = classifier.weight
    assert weight is not None
    if not standardise:
        return torch.ones(weight.shape[1], dtype=torch.float64, device=weight.device)
    moments: Moments | None = None
    for caught in stream(point.subject, (classifier.layer,)):
        features = caught.features[classifier.layer]
        rows = features.reshape(-1, features.shape[-1]).double().cpu().numpy()
        moments = Moments.of(rows) if moments is None else moments.add(rows)
    assert moments is not None
    found = torch.from_numpy(moments.variance(ddof=0)).sqrt().to(weight.device)
    return torch.where(found > 0, found, 1.0)


def _form(rows: _Rows, direction: Tensor, squares: Tensor) -> Tensor:
    """Σ_rows ‖φ‖² uᵀ H_ℓ u for one direction u (C,)."""
    bent = rows.bend(direction)
    return (squares * (bent @ direction.to(bent))).sum()


def _closed(point: Point, classifier: Classifier, standardise: bool) -> Found:
    assert classifier.weight is not None
    scale = _spread(point, classifier, standardise)
    left, values, _ = torch.linalg.svd(classifier.weight.double() * scale, full_matrices=False)
    total = torch.zeros((), dtype=torch.float64, device=scale.device)
    for rows in _rows(point, classifier):
        squares = ((rows.features / scale) ** 2).sum(1)
        for direction in (left * values).T:
            total += _form(rows, direction, squares)
    words = f"closed form at the classifier {classifier.layer.name}, without its bias{_words(standardise)}"
    return _exact(point, float(total) / point.subject.total_weight, words)


def _exact(point: Point, value: float, words: str) -> Found:
    rounding = 8 * torch.finfo(point.subject.dtype).eps * abs(value)
    return Found(value, rounding, converged=True, protocol=f"{words}; the error is rounding")


def _many_outputs(point: Point, classifier: Classifier, standardise: bool) -> Iterator[Found]:
    """The same with random signs: u = W ε."""
    assert classifier.weight is not None
    scale = _spread(point, classifier, standardise)
    weight = classifier.weight.double() * scale
    signs = torch.stack([point.draw(FIRST + i, size=len(scale), kind="rademacher").double() for i in range(SAMPLES)])
    sums = torch.zeros(SAMPLES, dtype=torch.float64, device=scale.device)
    for rows in _rows(point, classifier):
        squares = ((rows.features / scale) ** 2).sum(1)
        for i, direction in enumerate(signs @ weight.T):
            sums[i] += _form(rows, direction, squares)
    samples = (sums / point.subject.total_weight).tolist()
    yield _sampled(samples, f"random directions at the classifier {classifier.layer.name}{_words(standardise)}")


def _inner_layer(point: Point, layer: str, standardise: bool) -> Iterator[Found]:
    name = f"{layer}.weight"
    weight = point.subject.params.get(name)
    if weight is None or weight.ndim < 2:
        raise NotDefined(f"{layer!r} is no layer with a chosen weight of two dims or more")
    scale = _spread_of(point, layer, weight, standardise)
    matrix = weight.flatten(1).double() * scale
    samples: list[float] = []
    with Hessian(point.subject.restricted(name)) as hessian:
        for i in range(SAMPLES):
            signs = point.draw(FIRST + i, size=2 * matrix.shape[1], kind="rademacher").double()
            mixed, across = matrix @ signs[: len(signs) // 2], signs[len(signs) // 2 :] / scale
            probe = mixed.outer(across).reshape(-1).to(hessian.dtype)
            samples.append(float(dot(probe, hessian.matvec(probe))))
            if i % EACH == EACH - 1:
                yield _sampled(samples, f"random directions at layer {layer}{_words(standardise)}")


def _spread_of(point: Point, layer: str, weight: Tensor, standardise: bool) -> Tensor:
    flat = weight.flatten(1)
    if not standardise:
        return torch.ones(flat.shape[1], dtype=torch.float64, device=flat.device)
    if weight.ndim != 2 or not point.subject.has_outputs:
        raise NotDefined("features are standardised only for linear layers of subjects with outputs")
    return _spread(point, Classifier(Layer(layer, "input"), weight), standardise)


def _sampled(samples: list[float], words: str) -> Found:
    moments = Moments.of(samples)
    value, error, done = float(moments.mean), float(moments.standard_error), len(samples) / SAMPLES
    said = f"{words}, {len(samples)} products; the error is the standard error over them"
    known = done == 1 and math.isfinite(error) and error <= RESOLVED * abs(value)
    return Found(value, error, known, done, said)


def _words(standardise: bool) -> str:
    return ", features divided by their standard deviation" if standardise else ""
