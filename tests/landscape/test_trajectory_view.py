"""The plane of a recorded path against gradient descent known exactly, and against recorded weights put back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toys import examples, net, record_training

from workbench.dynamics.recorder import Recorder
from workbench.landscape.trajectory_view import TrajectoryView, evenly
from workbench.trajectory import Trajectory


def descent(folder: Path) -> Trajectory:
    """Fifty steps of gradient descent on ½ (w_1² + 0.1 w_2²) from (1, 1), every one on record."""
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.ones_(model.weight)
    x, y = torch.diag(torch.tensor([2.0, 0.2], dtype=torch.float64).sqrt()), torch.zeros(2, 1, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with Recorder(folder, model, optimizer, every=1) as recorder:
        for _ in range(50):
            optimizer.zero_grad()
            (nn.functional.mse_loss(model(x), y) / 2).backward()
            optimizer.step()
            recorder.step()
    return Trajectory.open(folder).using(model, (x, y), "half_mse")


def test_gradient_descent_on_a_quadratic(tmp_path: Path) -> None:
    data = TrajectoryView(points=5, checkpoints=60).run(descent(tmp_path / "run")).data
    assert data.explained_variance.values == pytest.approx([0.84217299, 0.15782701], abs=1e-8)
    walk = 1 / (1 - np.cos(np.pi * np.arange(1, 51) / 51))
    assert data.random_walk.values == pytest.approx(walk[:2] / walk.sum())
    k = np.arange(51)
    exact = 0.5 * (0.5 ** (2 * k) + 0.1 * 0.95 ** (2 * k))
    assert data["step"].values.tolist() == k.tolist()
    assert data.path_loss.values == pytest.approx(exact, rel=1e-9)
    assert data.gap.values == pytest.approx(np.zeros(51), abs=1e-12), "a plane through all weights misses nothing"
    assert data.path_distance.values == pytest.approx(np.zeros(51), abs=1e-12)
    assert (float(data.path_u[-1]), float(data.path_v[-1])) == pytest.approx((0, 0), abs=1e-12)
    w = np.stack([0.5**k, 0.95**k], 1)
    assert data.path_reach.values == pytest.approx(np.linalg.norm(w - w[-1], axis=1))
    steps = np.linalg.norm(np.diff(w, axis=0), axis=1)
    assert data.path_length.values == pytest.approx(np.r_[0, np.cumsum(steps)])


def test_equal_lengths_of_the_path_take_fewer_late_checkpoints(tmp_path: Path) -> None:
    path = descent(tmp_path / "run")
    even = TrajectoryView(points=3, checkpoints=6).run(path).data["step"].values
    equal = TrajectoryView(points=3, checkpoints=6, spacing="arc_length", origin=3).run(path).data
    assert even.tolist() == [0, 10, 20, 30, 40, 50]
    assert {0, 3, 50} <= set(equal["step"].values)
    w = np.stack([0.5 ** np.arange(51), 0.95 ** np.arange(51)], 1)
    along = np.r_[0, np.cumsum(np.linalg.norm(np.diff(w, axis=0), axis=1))]
    wanted = {int(np.abs(along - share * along[-1]).argmin()) for share in np.linspace(0, 1, 6)}
    assert set(equal["step"].values) == wanted | {3}
    at = equal["step"].values.tolist().index(3)
    assert (float(equal.path_u[at]), float(equal.path_v[at])) == pytest.approx((0, 0), abs=1e-12)


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=40), st.integers(3, 20))
def test_places_are_ascending_and_hold_the_ends(steps: list[float], most: int) -> None:
    along = np.r_[0, np.cumsum(steps)]
    found = evenly(along, most, [1])
    assert found == sorted(set(found))
    assert {0, 1, len(along) - 1} <= set(found)
    assert len(found) <= most + 1
    if most >= 3 and len(along) >= 3:
        gap = along[-1] / (most - 1)
        assert all(min(abs(along[k] - gap * i) for k in found) <= np.diff(along).max() for i in range(most))


def test_losses_are_those_of_recorded_weights_and_of_points_on_the_plane(tmp_path: Path) -> None:
    x, y = examples()
    record_training(tmp_path / "run", 0, (x, y))
    path, model = Trajectory.open(tmp_path / "run").using(net(0), (x, y), "cross_entropy"), net(0).eval()
    found = TrajectoryView(points=5, origin=4, norm="eval").run(path)
    data, held = found.data, {s: path.weights(s) for s in path.steps}
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    rows = np.array([torch.cat([held[s][n].reshape(-1) for n in names]).numpy() for s in path.steps])
    rows -= rows[path.steps.index(4)]
    axes = np.linalg.svd(rows - rows.mean(0))[2][:2]
    at = np.stack([data.path_u.values, data.path_v.values], 1)
    assert np.abs(at) == pytest.approx(np.abs(rows @ axes.T), abs=1e-10)
    assert data.path_distance.values == pytest.approx(
        np.sqrt(np.clip((rows**2).sum(1) - (at**2).sum(1), 0, None)), abs=1e-7
    )
    signs = np.sign((at * (rows @ axes.T)).sum(0))

    def each(weights: dict[str, torch.Tensor]) -> np.ndarray:
        model.load_state_dict(weights)
        return nn.functional.cross_entropy(model(x), y, reduction="none").detach().numpy()

    def placed(u: float, v: float) -> np.ndarray:
        moved, step, start = dict(held[4]), torch.from_numpy((np.array([u, v]) * signs) @ axes), 0
        for n in names:
            moved[n] = held[4][n] + step[start : start + held[4][n].numel()].reshape(held[4][n].shape)
            start += held[4][n].numel()
        return each(moved)

    for k, s in enumerate(path.steps):
        real, shown = each(held[s]), placed(*at[k])
        assert float(data.path_loss[k]) == pytest.approx(real.mean(), rel=1e-10)
        assert float(data.plane_loss[k]) == pytest.approx(shown.mean(), rel=1e-9)
        assert float(data.gap_error[k]) == pytest.approx((shown - real).std(ddof=1) / 30**0.5, abs=1e-10)
    for i, u in enumerate(data["u"].values):
        for j, v in enumerate(data["v"].values):
            assert float(data.loss[i, j]) == pytest.approx(placed(u, v).mean(), rel=1e-9)
    assert float(np.abs(data.gap).max()) > 1e-6, "two components do not hold four checkpoints"
    assert found.summary["gap_max"] == pytest.approx(float(np.abs(data.gap).max()))


def test_a_step_that_was_not_recorded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint at step 51; nearest: 50"):
        TrajectoryView(origin=51).run(descent(tmp_path / "run"))
