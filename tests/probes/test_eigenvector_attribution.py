"""Parts of an eigenvector by example, class, layer and input, against loops over dense Hessians."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from workbench.numerics.operator import Operator
from workbench.operators.attribution import forms
from workbench.operators.fisher import SampledFisher
from workbench.operators.preconditioned import Preconditioned
from workbench.operators.table import curvature
from workbench.probes.eigenvector_attribution import EigenvectorAttribution
from workbench.subject import Subject

N = 13


class Normed(nn.Module):
    """Dense, LayerNorm, softmax gate: what forward over reverse gets wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(x))
        return self.last(hidden * hidden.softmax(-1))


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.double().parameters():
            p.copy_(torch.randn(p.shape, generator=rng, dtype=torch.float64))
    return model


def dense() -> nn.Module:
    return filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))


def examples(count: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return x, torch.arange(count) % 3


ALL = ["hessian", "ggn", "fisher", "empirical_fisher", "gradient_covariance"]


def hessians(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, operator: str = "hessian", mean: torch.Tensor | None = None
) -> np.ndarray:
    """What each example adds to the curvature, (n, P, P), one dense matrix after another; ``mean`` of the gradients."""
    shapes = [(name, p.shape) for name, p in model.named_parameters()]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def outputs(vector: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
        parts = vector.split([shape.numel() for _, shape in shapes])
        params = {name: part.view(shape) for (name, shape), part in zip(shapes, parts, strict=True)}
        return functional_call(model, params, (one[None],))[0]

    def gradient(one: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return torch.autograd.functional.jacobian(
            lambda v: nn.functional.cross_entropy(outputs(v, one), label), flat
        ).detach()

    if operator in ("empirical_fisher", "gradient_covariance"):
        rows = torch.stack([gradient(one, label) for one, label in zip(x, y, strict=True)])
        centred, scale = operator == "gradient_covariance", len(x) / (len(x) - 1)
        rows = (rows - (rows.mean(0) if mean is None else mean)) * scale**0.5 if centred else rows
        return (rows[:, :, None] * rows[:, None]).numpy()
    found = []
    for one, label in zip(x, y, strict=True):
        if operator == "hessian":
            found.append(
                torch.autograd.functional.hessian(
                    lambda v, one=one, label=label: nn.functional.cross_entropy(outputs(v, one), label), flat
                )
            )
        elif operator == "fisher":  # label by label, each by its probability
            scores = [gradient(one, torch.tensor(c)) for c in range(3)]
            found.append(sum(p * s[:, None] * s for p, s in zip(outputs(flat, one).softmax(0), scores, strict=True)))
        else:
            slope = torch.autograd.functional.jacobian(lambda v, one=one: outputs(v, one), flat)
            p = outputs(flat, one).softmax(0)
            found.append(slope.T @ (torch.diag(p) - p[:, None] * p[None]) @ slope)
    return torch.stack(found).detach().numpy()


def parts(each: np.ndarray, rank: int) -> tuple[float, np.ndarray, np.ndarray]:
    """(λ, v, vᵀH_i v) of the kth eigenvector of the mean."""
    values, vectors = np.linalg.eigh(each.mean(0))
    v = vectors[:, -rank]
    return float(values[-rank]), v, np.einsum("p,npq,q->n", v, each, v)


@pytest.mark.parametrize("operator", ALL)
@pytest.mark.parametrize("make", [dense, lambda: filled(Normed())], ids=["dense", "layernorm"])
@pytest.mark.parametrize("rank", [1, 3])
def test_parts_are_those_of_a_loop_over_examples(operator: Any, make: Callable[[], nn.Module], rank: int) -> None:
    model, (x, y) = make(), examples()
    reading = EigenvectorAttribution(operator=operator, rank=rank, tolerance=1e-6).run(
        Subject(model, (x, y), batch_size=5)
    )
    data = reading.data
    value, v, each = parts(hessians(model, x, y, operator), rank)
    assert reading.converged
    assert float(data.eigenvalue) == pytest.approx(value, rel=1e-6)
    assert data.contribution.values == pytest.approx(each, abs=1e-5 * np.abs(each).max())
    assert float(data.contribution_mean) == pytest.approx(value, rel=1e-6)
    assert float(data.contribution_mean_error) < 1e-9 * value
    assert data.class_contribution.values == pytest.approx([each[y == c].sum() / N for c in range(3)], rel=1e-3)
    assert data.example_at.values.tolist() == np.argsort(-each).tolist()
    assert float(data.effective_examples) == pytest.approx(np.abs(each).sum() ** 2 / (each**2).sum(), rel=1e-4)
    layers = {"0" if make is dense else "first": 16}
    first = next(iter(layers.values()))
    assert data["layer"].values[0] == next(iter(layers))
    assert float(data.layer_share[0]) == pytest.approx((v[:first] ** 2).sum(), abs=1e-5)
    assert float(data.layer_share.sum()) == pytest.approx(1)
    assert data.layer_curvature.values == pytest.approx(value * data.layer_share.values, abs=1e-5 * value)
    assert float(data.layer_curvature.sum()) == pytest.approx(value, rel=1e-6)


def test_what_a_loose_tolerance_leaves_is_within_a_few_errors() -> None:
    """The errors are estimates: nine in ten within three of them, over vectors that are off by different amounts."""
    ratios = []
    for seed in range(6):
        model, (x, y) = filled(dense(), seed), examples()
        data = EigenvectorAttribution(tolerance=0.1).run(Subject(model, (x, y)), seed=seed).data
        _, v, each = parts(hessians(model, x, y), 1)
        assert 1e-9 < float(data.misalignment) < 1
        found = np.abs(data.contribution.values - each) / data.contribution_error.values
        ratios += found.tolist()
        assert abs(float(data.layer_share[0]) - (v[:16] ** 2).sum()) <= float(data.misalignment)
        off = np.abs(data.layer_curvature.values[0] - float(v[:16] @ (hessians(model, x, y).mean(0) @ v)[:16]))
        assert off <= float(data.layer_curvature_error[0])
    assert np.mean(np.array(ratios) < 3) >= 0.9
    assert np.median(ratios) > 0.01, "nor are they absurdly wide"


def test_squares_of_projections_in_a_linear_regression() -> None:
    """H_i = x_i x_iᵀ: an example of length 10 among unit ones carries the direction, and is found in the given data."""
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x / x.norm(dim=1, keepdim=True)
    x[16] = torch.tensor([6.0, 8.0, 0.0])
    model = nn.Linear(3, 1, bias=False).double()
    subject = Subject(model, (x, torch.zeros(40, 1).double()), loss="half_mse", max_examples=30, seed=2)
    assert 16 in subject.places
    reading = EigenvectorAttribution(tolerance=1e-6, inputs=True).run(subject)
    data, kept = reading.data, x[list(subject.places)].numpy()
    value, v = np.linalg.eigh(kept.T @ kept / 30)[0][-1], np.linalg.eigh(kept.T @ kept / 30)[1][:, -1]
    assert data.contribution.values == pytest.approx((kept @ v) ** 2)
    assert int(data.given_at[0]) == 16
    assert subject.places[int(data.example_at[0])] == 16
    assert float(data.effective_examples) < 1.5
    assert float(data.eigenvalue) == pytest.approx(value)
    assert data.saliency.values == pytest.approx(np.abs(2 * (kept @ v)[:, None] * v[None]).mean(0), rel=1e-5)
    assert np.isnan(data.class_contribution).all()
    assert any("in the data given: 16, " in note for note in reading.notes)


@pytest.mark.parametrize("operator", ALL)
def test_saliency_is_the_slope_of_the_contributions(operator: Any) -> None:
    model, (x, y) = filled(Normed()), examples()
    data = EigenvectorAttribution(operator=operator, tolerance=1e-6, inputs=True).run(Subject(model, (x, y))).data
    _, v, _ = parts(hessians(model, x, y, operator), 1)
    step, slopes = 1e-5, np.zeros((N, 3))
    loss = nn.functional.cross_entropy(model(x), y)
    mean = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    for j in range(3):
        ends = []
        for sign in (step, -step):
            moved = x.clone()
            moved[:, j] += sign
            ends.append(np.einsum("p,npq,q->n", v, hessians(model, moved, y, operator, mean), v))
        slopes[:, j] = (ends[0] - ends[1]) / (2 * step)
    assert data.saliency.values == pytest.approx(np.abs(slopes).mean(0), rel=1e-4)
    assert (data.saliency_error.values < 1e-6 * data.saliency.values).all()


class Words(nn.Module):
    """Logits (N, S, C) for words (N, S)."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.table(words)))


def test_slopes_are_taken_in_float64_for_models_in_float32() -> None:
    model, (x, y) = filled(Normed()), examples()
    fine = EigenvectorAttribution(tolerance=1e-6, inputs=True).run(Subject(model, (x, y))).data
    coarse = EigenvectorAttribution(inputs=True).run(Subject(model.float(), (x.float(), y))).data
    assert coarse.saliency.values == pytest.approx(fine.saliency.values, rel=1e-3)
    assert (coarse.saliency_error.values < 1e-4 * coarse.saliency.values).all()


@pytest.mark.parametrize("operator", ALL)
def test_a_layers_own_block_is_told_from_what_is_between_layers(operator: Any) -> None:
    model, (x, y) = dense(), examples()
    data = EigenvectorAttribution(operator=operator, tolerance=1e-3, blocks=True).run(Subject(model, (x, y))).data
    whole = hessians(model, x, y, operator).mean(0)
    v = np.linalg.eigh(whole)[1][:, -1]
    own = np.array([v[part] @ whole[part, part] @ v[part] for part in (slice(0, 16), slice(16, 31))])
    assert (np.abs(data.layer_own.values - own) <= data.layer_own_error.values + 1e-9).all()
    assert data.layer_own_error.values.max() < 0.1 * np.abs(own).max()
    assert abs(own.sum() - float(data.eigenvalue)) > 0.1 * own.max(), "there is something between the layers"


def test_sequences_with_masked_words_are_examples_whose_mean_is_the_eigenvalue() -> None:
    rng = torch.Generator().manual_seed(1)
    words = torch.randint(5, (7, 4), generator=rng)
    targets = torch.randint(5, (7, 4), generator=rng)
    targets[0, :3] = targets[3, 1] = -100
    model = filled(Words())
    reading = EigenvectorAttribution(tolerance=1e-6, inputs=True).run(Subject(model, (words, targets), batch_size=3))
    data = reading.data
    assert float(data.contribution_mean) == pytest.approx(float(data.eigenvalue), rel=1e-9)
    assert np.isnan(data.saliency).all()
    assert any("have no saliency" in note for note in reading.notes)
    shapes = [(name, p.shape) for name, p in model.named_parameters()]

    def total(vector: torch.Tensor, rows: slice) -> torch.Tensor:
        pieces = vector.split([shape.numel() for _, shape in shapes])
        params = {name: part.view(shape) for (name, shape), part in zip(shapes, pieces, strict=True)}
        logits = functional_call(model, params, (words[rows],))
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets[rows].flatten(), reduction="sum")

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    each = [torch.autograd.functional.hessian(lambda v, i=i: total(v, slice(i, i + 1)), flat) for i in range(7)]
    whole = torch.stack(each).sum(0) / 24
    v = torch.linalg.eigh(whole)[1][:, -1]
    exact = np.array([float(v @ h @ v) * 7 / 24 for h in each])
    assert data.contribution.values == pytest.approx(exact, abs=1e-6 * np.abs(exact).max())


def test_examples_that_see_each_other_through_batch_statistics_have_the_parts_of_their_own_losses() -> None:
    model = filled(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))).train()
    x, y = examples(12)
    data = EigenvectorAttribution(tolerance=1e-6).run(Subject(model, (x, y), norm="batch", batch_size=6)).data
    shapes = [(name, p.shape) for name, p in model.named_parameters()]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(vector: torch.Tensor, i: int) -> torch.Tensor:
        pieces = vector.split([shape.numel() for _, shape in shapes])
        params = {name: part.view(shape) for (name, shape), part in zip(shapes, pieces, strict=True)}
        rows = slice(0, 6) if i < 6 else slice(6, 12)
        return nn.functional.cross_entropy(functional_call(model, params, (x[rows],))[i % 6], y[i])

    each = torch.stack([torch.autograd.functional.hessian(lambda v, i=i: loss(v, i), flat) for i in range(12)]).numpy()
    _, _, exact = parts(each, 1)
    assert data.contribution.values == pytest.approx(exact, abs=1e-6 * np.abs(exact).max())


def test_objectives_that_give_one_value_for_each_example_are_attributed() -> None:
    model, (x, y) = dense(), examples()

    def objective(net: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(net(batch[0]), batch[1], reduction="none")

    own = EigenvectorAttribution(inputs=True).run(Subject(model, (x, y), objective=objective)).data
    named = EigenvectorAttribution().run(Subject(model, (x, y))).data
    assert own.contribution.values == pytest.approx(named.contribution.values, rel=1e-6)


def test_losses_that_do_not_come_apart_are_refused_before_any_product() -> None:
    def coupled(net: nn.Module, batch: Any) -> torch.Tensor:
        outputs = net(batch[0])
        return (outputs @ outputs.T).logsumexp(1).mean()

    subject = Subject(dense(), examples(), objective=coupled, reduction="mean")
    with pytest.raises(ValueError, match="not a sum over examples"):
        next(EigenvectorAttribution().stream(subject, None))  # type: ignore[arg-type]


def test_a_rank_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank is 40, but there are 31 parameters"):
        EigenvectorAttribution(rank=40).run(Subject(dense(), examples()))


def test_in_a_cluster_the_parts_are_said_to_be_undetermined() -> None:
    model = nn.Linear(3, 1, bias=False).double()
    x = torch.diag(torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64))
    subject = Subject(model, (x, torch.zeros(3, 1).double()), loss="half_mse")
    loose, single = (EigenvectorAttribution(rank=rank).run(subject) for rank in (1, 3))
    assert np.isnan(loose.data.misalignment)
    assert np.isnan(loose.data.contribution_error).all()
    assert any("one of many" in note for note in loose.notes)
    assert float(single.data.misalignment) < 1e-6
    assert single.data.contribution.values == pytest.approx([0, 0, 0.25])


class Uneven(nn.Module):
    """Words with a loss of class weights, or sequences of which some words do not count: W is not n."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 4)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.norm(self.table(words))))


def uneven(seed: int, sequences: bool, operator: str) -> Subject:
    rng = torch.Generator().manual_seed(seed)
    shape = (9, 3) if sequences else (9,)
    words, labels = torch.randint(5, shape, generator=rng), torch.randint(4, shape, generator=rng)
    if sequences:
        labels[torch.rand(shape, generator=rng) < 0.3] = -100
        labels[0, 0] = 1
    weights = None if operator == "fisher" else torch.tensor([0.3, 1.0, 2.0, 0.7], dtype=torch.float64)
    loss = "cross_entropy" if sequences else nn.CrossEntropyLoss(weight=weights)
    return Subject(filled(Uneven(), seed), (words, labels), loss=loss, batch_size=4)


@pytest.mark.parametrize("operator", ALL)
@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_parts_add_up_along_any_direction(operator: Any, seed: int, sequences: bool) -> None:
    """Σ_i of what examples add is vᵀAv, rᵀAv and Av of the operator's own products, for any v and r."""
    subject, rng = uneven(seed, sequences, operator), torch.Generator().manual_seed(seed + 1)
    v, r = (torch.randn(subject.size, generator=rng, dtype=torch.float64) for _ in range(2))
    with curvature(subject, operator) as matrix:
        product = matrix.matvec(v)
        found = [forms(matrix, batch, matrix.split(v), matrix.split(r)) for batch in subject.batches()]
    weight = subject.total_weight
    each, turned = torch.cat([f.each for f in found]), torch.cat([f.turned for f in found])
    moved = sum(torch.cat([p.flatten() for p in f.product]) for f in found) / weight
    size = float(v.norm() * product.norm())
    assert len(each) == 9
    assert float(each.sum()) / weight == pytest.approx(float(v @ product), abs=1e-10 * size)
    assert float(turned.sum()) / weight == pytest.approx(float(r @ product), abs=1e-10 * size)
    assert moved.numpy() == pytest.approx(product.numpy(), abs=1e-10 * float(product.norm()))
    if operator != "hessian":
        assert float(each.min()) >= 0


def test_fishers_parts_are_of_the_distribution_however_the_model_says_it() -> None:
    """Log-probabilities with nll: the Gauss-Newton matrix of these outputs is zero, and Fisher's is not."""
    model, (x, y) = dense(), examples()
    probe = EigenvectorAttribution(operator="fisher", tolerance=1e-6, inputs=True)
    logits = probe.run(Subject(model, (x, y))).data
    told = probe.run(Subject(nn.Sequential(model, nn.LogSoftmax(-1)), (x, y), loss="nll")).data
    assert told.contribution.values == pytest.approx(logits.contribution.values, rel=1e-4)
    assert told.saliency.values == pytest.approx(logits.saliency.values, rel=1e-4)
    assert logits.saliency.values.min() > 0


def test_a_moment_of_gradients_in_single_precision_on_some_of_the_data() -> None:
    """x_i of length 1 and y = 0: g_i = x_i x_i·w, whose covariance is NumPy's."""
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(3))
    model = nn.Linear(4, 1, bias=False)
    subject = Subject(model, (x, torch.zeros(60, 1)), loss="half_mse", max_examples=40, seed=1)
    data = EigenvectorAttribution(operator="gradient_covariance", inputs=True).run(subject).data
    kept = x[list(subject.places)].double().numpy()
    rows = kept * (kept @ model.weight.detach().double().numpy()[0])[:, None]
    values, vectors = np.linalg.eigh(np.cov(rows.T))
    assert float(data.eigenvalue) == pytest.approx(values[-1], rel=1e-5)
    exact = ((rows - rows.mean(0)) @ vectors[:, -1]) ** 2 * 40 / 39
    assert data.contribution.values == pytest.approx(exact, abs=1e-3 * exact.max())
    assert np.isfinite(data.saliency.values).all()


def test_what_is_no_sum_over_examples_is_refused_with_what_to_do() -> None:
    subject = Subject(dense(), examples())
    batch, v = next(iter(subject.batches())), torch.ones(subject.size, dtype=torch.float64)
    hessian = curvature(subject)
    parts = hessian.split(v)
    with pytest.raises(ValueError, match=r"got 'fisher_mc'.*Labels are drawn.*'fisher'"):
        EigenvectorAttribution(operator="fisher_mc")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"SampledFisher is no sum.*Labels are drawn"):
        forms(SampledFisher(subject), batch, parts, parts)
    with pytest.raises(TypeError, match=r"Preconditioned is no sum.*attribute operator"):
        forms(Preconditioned(hessian, v), batch, parts, parts)
    with pytest.raises(TypeError, match=r"Dense is not known.*Hessian, GaussNewton"):
        forms(Dense(31), batch, parts, parts)
    covariance = EigenvectorAttribution(operator="gradient_covariance")
    with pytest.raises(ValueError, match="norm='eval'"):
        covariance.run(Subject(dense(), examples(), norm="batch"))


class Dense(Operator):
    """A stranger."""

    def __init__(self, size: int) -> None:
        self.size, self.dtype, self.device = size, torch.float64, torch.device("cpu")

    def matvec(self, vector: torch.Tensor) -> torch.Tensor:
        return vector
