"""Curvature of batches against exact Hessians of the same examples, closed forms and convexity."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from workbench.numerics.sampling import Draw
from workbench.probes.batch_curvature import BatchCurvature
from workbench.subject import Subject


def small(count: int) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    rng = torch.Generator().manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng, dtype=torch.float64))
    x = torch.randn(count, 3, generator=rng, dtype=torch.float64)
    return model, (x, torch.arange(count) % 3)


def exact(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float, float]:
    """λ_1, λ_P and gᵀHg / ‖g‖² by a dense Hessian of the plain loss."""
    shapes = [(name, p.shape) for name, p in model.named_parameters()]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(vector: torch.Tensor) -> torch.Tensor:
        parts = vector.split([shape.numel() for _, shape in shapes])
        params = {name: part.view(shape) for (name, shape), part in zip(shapes, parts, strict=True)}
        return nn.functional.cross_entropy(functional_call(model, params, (x,)), y)

    matrix = torch.autograd.functional.hessian(loss, flat)
    gradient = torch.autograd.functional.jacobian(loss, flat)
    values = torch.linalg.eigvalsh(matrix)
    return float(values[-1]), float(values[0]), float(gradient @ matrix @ gradient / (gradient @ gradient))


def test_batches_of_each_size_have_the_eigenvalues_of_some_subset_of_that_size() -> None:
    model, (x, y) = small(5)
    probe = BatchCurvature(sizes=2, smallest=1, batches=4, tolerance=1e-6)
    reading = probe.run(Subject(model, (x, y)))
    data = reading.data
    assert reading.converged
    assert list(data["batch_size"].values) == [1, 2]
    names = ("eigenvalue", "eigenvalue_min", "gradient_curvature")
    for place, size in enumerate((1, 2)):
        subsets = np.array([exact(model, x[list(c)], y[list(c)]) for c in itertools.combinations(range(5), size)])
        got = np.stack([data[name].values[place] for name in names], axis=1)
        gaps = np.abs(got[:, None] - subsets[None]).max(axis=2).min(axis=1)
        assert gaps.max() < 1e-5
        assert data.mean_gradient_curvature[place] == pytest.approx(got[:, 2].mean())
        assert data.mean_min_error[place] == pytest.approx(got[:, 1].std(ddof=1) / 2)
    whole = exact(model, x, y)
    assert (float(data.full_eigenvalue[0]), float(data.full_eigenvalue_min)) == pytest.approx(whole[:2], rel=1e-6)


def test_two_orthogonal_examples_of_a_linear_regression() -> None:
    """The Hessian of both is half the identity, that of each has eigenvalues 1 and 0; 1/b = 1/2 for each."""
    model = nn.Linear(2, 1, bias=False).double()
    subject = Subject(model, (torch.eye(2, dtype=torch.float64), torch.zeros(2, 1).double()), loss="half_mse")
    data = BatchCurvature(smallest=1, batches=5, top=2).run(subject).data
    assert data.full_eigenvalue.values == pytest.approx([0.5, 0.5])
    assert data.eigenvalue.values == pytest.approx(np.ones((1, 5)))
    assert data.eigenvalue_min.values == pytest.approx(np.zeros((1, 5)), abs=1e-12)
    assert float(data.slope) == pytest.approx(1.0), "(1 - 1/2) / (1/2)"
    assert float(data.noise) == pytest.approx(0.25), "slope · λ_1 / P"
    assert float(data.bulk_radius[0]) == pytest.approx(2 * np.sqrt(0.25 * 2 * 0.5))
    assert float(data.bulk) == pytest.approx(0.25), "d λ / (P/b λ + d) with d = 1/2"


def test_largest_eigenvalues_of_a_partition_are_larger_on_average() -> None:
    """Jensen, with weights n_b / n: the largest eigenvalue is convex, and 13 is no multiple of 5."""
    subject = Subject(*small(13))
    probe = BatchCurvature(smallest=1, sizes=1, batches=2, top=1, tolerance=1e-6)

    def largest(part: Subject) -> float:
        return float(probe.run(part).data.full_eigenvalue[0])

    parts = [range(5), range(5, 10), range(10, 13)]
    mean = sum(largest(subject.selected(part)) * len(part) / 13 for part in parts)
    assert mean > largest(subject) * (1 + 1e-3)


def test_one_batch_of_every_size_comes_before_a_second_one() -> None:
    probe = BatchCurvature(sizes=3, smallest=2, batches=3)
    known = [
        np.isfinite(r.gradient_curvature.values).sum(axis=1)
        for r in (reading.data for reading in probe.stream(Subject(*small(12)), draw()))
    ]
    assert max(counts.max() - counts.min() for counts in known) == 1
    assert known[0].sum() == 0, "all examples come first"
    assert known[-1].tolist() == [3, 3, 3]


def draw() -> Draw:
    return Draw(0, "BatchCurvature", 31, torch.float64)


def test_gauss_newton_batches_have_no_minimum() -> None:
    data = BatchCurvature(operator="ggn", sizes=2, batches=2).run(Subject(*small(12))).data
    assert np.isnan(data.eigenvalue_min).all()
    assert np.isfinite(data.eigenvalue).all()


def test_what_does_not_converge_is_said_and_drawn_grey() -> None:
    found: Any = BatchCurvature(sizes=2, batches=2).run(Subject(*small(12)), seconds=0)
    assert not found.converged
    assert found.done < 1
    data = BatchCurvature(sizes=2, batches=2).run(Subject(*small(12))).data.copy(deep=True)
    data["converged"][:] = False
    (points,) = (m for m in BatchCurvature().figure(data).panels[0].marks if getattr(m, "role", "") == "unconverged")
    assert np.isfinite(points.y).sum() == 4


def test_one_example_is_refused() -> None:
    with pytest.raises(ValueError, match="needs two at least"):
        BatchCurvature().run(Subject(*small(1)))
