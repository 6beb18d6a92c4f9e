"""Overlap of eigenspaces against dense Hessians; what may be compared; pairs in jobs, stores and benches."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from toys import record_training

import workbench as wb
from workbench.job import Job
from workbench.numerics.sampling import Draw
from workbench.operators.table import curvature
from workbench.probes.eigenspace_overlap import EigenspaceOverlap
from workbench.several import Pair
from workbench.spectra.run import SpectralRun
from workbench.store import Store
from workbench.subject import Subject
from workbench.trajectory import Trajectory
from workbench.ui.session import Session

Data = tuple[torch.Tensor, torch.Tensor]


def net(seed: int, near: nn.Module | None = None, width: int = 4) -> nn.Module:
    rng = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 3)).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.randn(p.shape, generator=rng, dtype=torch.float64))
            if near is not None:
                p.mul_(0.1).add_(list(near.parameters())[i])
    return model


def examples(seed: int = 9, count: int = 13) -> Data:
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, torch.arange(count) % 3


def eigenvectors(model: nn.Module, data: Data) -> np.ndarray:
    """Rows, largest eigenvalue first, of the dense Hessian of the plain loss."""
    shapes = [(name, p.shape) for name, p in model.named_parameters()]

    def loss(vector: torch.Tensor) -> torch.Tensor:
        parts = vector.split([shape.numel() for _, shape in shapes])
        params = {name: part.view(shape) for (name, shape), part in zip(shapes, parts, strict=True)}
        return nn.functional.cross_entropy(functional_call(model, params, (data[0],)), data[1])

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    return np.linalg.eigh(torch.autograd.functional.hessian(loss, flat).numpy())[1].T[::-1]


def pair(one: nn.Module, two: nn.Module, data: Data | None = None, **more: Any) -> Pair:
    return Pair(*(Subject(m, data or examples(), **more) for m in (one, two)))


@pytest.mark.parametrize("tolerance", [1e-6, 0.05])
def test_overlaps_angles_and_single_vectors_are_those_of_dense_hessians_within_their_errors(tolerance: float) -> None:
    first = net(0)
    second = net(1, near=first)
    v, w = (eigenvectors(m, examples())[:4] for m in (first, second))
    reading = EigenspaceOverlap(top=4, tolerance=tolerance).run(pair(first, second))
    data, inner = reading.data, v @ w.T
    assert reading.converged
    exact = np.array([(inner[:k, :k] ** 2).sum() / k for k in range(1, 5)])
    angles = np.arccos(np.clip(np.linalg.svd(inner)[1], 0, 1))
    assert (exact > 3 * data.chance.values).all(), "the points are near each other"
    assert data.determined.all()
    for name, truth in (("overlap", exact), ("angle", angles), ("vector_overlap", inner**2)):
        off = np.abs(data[name].values - truth)
        assert (off <= data[f"{name}_error"].values + 1e-9).all(), name
        assert tolerance > 1e-3 or off.max() < 1e-4, name
    assert np.isfinite(data.vector_overlap_error).all()


def test_a_subject_overlaps_with_itself_wholly() -> None:
    data = EigenspaceOverlap(top=3, tolerance=1e-6).run(pair(net(0), net(0))).data
    assert data.overlap.values == pytest.approx(np.ones(3), abs=1e-6)
    assert (data.angle.values <= float(data.angle_error)).all()
    assert data.vector_overlap.values == pytest.approx(np.eye(3), abs=1e-6)


def test_in_a_cluster_the_span_is_determined_and_its_vectors_are_not() -> None:
    """Eigenvalues 1/3, 1/3 and 1/12 at any weights: k = 1 means nothing, k = 2 and 3 do."""
    inputs = torch.diag(torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64))
    models = [nn.Linear(3, 1, bias=False).double() for _ in range(2)]
    both = pair(*models, data=(inputs, torch.zeros(3, 1).double()), loss="half_mse")
    reading = EigenspaceOverlap(top=3).run(both)
    data = reading.data
    assert data.determined.values.tolist() == [False, True, True]
    assert data.overlap.values[1:] == pytest.approx([1.0, 1.0])
    assert data.overlap_error.values == pytest.approx([np.nan, 0, 0], abs=1e-6, nan_ok=True)
    assert np.isnan(data.vector_error.values[:, :2]).all()
    assert np.isfinite(data.vector_error.values[:, 2]).all()
    assert sum("eigenvectors 1, 2 lie in clusters" in note for note in reading.notes) == 2
    grey = [m for m in reading.figure().panels[0].marks if getattr(m, "role", "") == "unconverged"]
    assert np.isfinite(grey[0].y).tolist() == [True, False, False]  # type: ignore[union-attr]


def test_a_finished_run_lets_go_of_its_basis_before_the_next_begins() -> None:
    """Without the collector of cycles, which may come late: two bases at once would double the memory."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        with curvature(Subject(net(0), examples())) as matrix:
            run = SpectralRun(EigenspaceOverlap(top=2).aim, matrix, matrix, Draw(0, "run", matrix.size, matrix.dtype))
            assert len(list(run.eigenvalues())) == run.curvature.products
            gone = weakref.ref(run)
            del run
            assert gone() is None
    finally:
        if collecting:
            gc.enable()


def test_different_losses_are_said() -> None:
    far = net(0)
    with torch.no_grad():
        far[2].weight.mul_(3)
    assert any("train losses differ" in note for note in EigenspaceOverlap(top=1).run(pair(net(0), far)).notes)
    assert not any("losses differ" in note for note in EigenspaceOverlap(top=1).run(pair(net(0), net(0))).notes)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: Subject(net(1, width=5), examples()), r"different parameters: 0.weight is \(4, 3\) in the first"),
        (lambda: Subject(net(1), examples(), parameters="2.*"), "only the first has '0.weight'"),
        (lambda: Subject(net(1), examples(), max_examples=5), "examples is 13 in the first and 5 in the second"),
        (lambda: Subject(net(1), examples(seed=8)), "different examples"),
        (lambda: Subject(net(1), examples(), loss="mse"), "loss is cross_entropy in the first and mse"),
        (lambda: Subject(net(1).float(), tuple(t.float() for t in examples()[:1]) + examples()[1:]), "dtype is"),
    ],
)
def test_what_is_not_the_same_function_is_refused_before_any_product(other: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        next(EigenspaceOverlap().stream(Pair(Subject(net(0), examples()), other()), None))  # type: ignore[arg-type]


def test_batchnorm_policies_and_micro_batches_must_agree() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    still = Subject(model, examples(), norm="eval")
    batch = [Subject(model, examples(), norm="batch", batch_size=b) for b in (4, 6)]
    with pytest.raises(ValueError, match="norm is eval in the first and batch in the second"):
        Pair(still, batch[0]).check_alike()
    with pytest.raises(ValueError, match="batch_size is 4 in the first and 6 in the second"):
        Pair(*batch).check_alike()
    Pair(batch[0], batch[0].snapshot()).check_alike()


def test_two_steps_of_a_trajectory_make_a_pair(tmp_path: Path) -> None:
    import toys

    data, model = toys.examples(), toys.net()
    record_training(tmp_path / "run", 0, data)
    path = Trajectory.open(tmp_path / "run").using(model, data, "cross_entropy")
    both = path.pair(4, 12)
    assert both.first.fingerprint() == path.subject(4).fingerprint()
    assert both.second.fingerprint() == path.subject(12).fingerprint()
    data = EigenspaceOverlap(top=2).run(both).data
    assert 0.2 < float(data.overlap[1]) <= 1 + 1e-12
    assert data.chance.values == pytest.approx([1 / both.size, 2 / both.size])
    assert float(data.train_loss[1]) < float(data.train_loss[0])


def test_jobs_stores_and_benches_take_a_pair(tmp_path: Path) -> None:
    both, probe, store = pair(net(0), net(1)), EigenspaceOverlap(top=2), Store(tmp_path)
    with Job(both, store=store) as job:
        job.submit(probe)
        found = job.wait(60)
    assert found.provenance["plan"]["chunk"] == both.plan.chunk
    session = Session(both, store=store)
    assert session.probes["EigenspaceOverlap"] is EigenspaceOverlap
    session.settle(probe)
    session.submit()
    assert session.job.wait(60).data.identical(found.data)
    assert session.job.state.from_store
    assert session.code().endswith("wb.probes.EigenspaceOverlap(top=2).run(pair, seed=0)")
    session.job.close()
    bench = wb.explore(wb.Pair(both.first, both.second), store=False)
    assert bench.session.order.probe.looks_at == "pair"
    assert bench.session.job.wait(60).probe.looks_at == "pair"
    bench.session.job.close()
