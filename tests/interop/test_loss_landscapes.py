"""loss-landscapes on our subjects: the same points give the same losses once its rows are put right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from surfaces import surface
from torch import Tensor

from workbench.interop import loss_landscapes, of_line
from workbench.interop.of_plane import compared
from workbench.landscape.line import Line
from workbench.landscape.plane import Plane
from workbench.subject import Subject

E = torch.eye(2, dtype=torch.float64)


def tilted(w: Tensor) -> Tensor:
    """Not symmetric in anything, so that no swap or shift goes unseen."""
    return 3.0 * w[0] + 0.5 * w[1] + 0.1 * w[0] * w[1] ** 2


def bowl() -> Subject:
    return surface(tilted, 1.0, 2.0)


def square(model: torch.nn.Module, _: Tensor) -> Tensor:
    return torch.stack([p**2 for p in model.parameters()]).sum()


def step(i: int, size: float) -> dict[str, Tensor]:
    return {"weight": size * E[i].reshape(1, 2)}


def test_its_array_is_where_we_say_it_is_and_not_where_it_seems_to_be() -> None:
    raw = loss_landscapes.along(bowl(), step(0, 0.1), step(1, 0.2), 6)
    exact = np.array(
        [[float(tilted(torch.tensor([1 + 0.1 * i, 2 + 0.2 * j]))) for j in range(-3, 4)] for i in range(-3, 4)]
    )
    placed = loss_landscapes.put_right(raw)
    seen = np.isfinite(placed)
    assert seen.sum() == 36
    np.testing.assert_allclose(placed[seen], exact[seen], rtol=1e-6)
    assert np.abs(raw - exact[:-1, :-1]).max() > 0.05


@pytest.mark.parametrize("points", [5, 6, 7])
def test_a_plane_has_a_second_opinion_which_agrees_point_by_point(points: int) -> None:
    subject = bowl()
    before, drawn = subject.fingerprint(), torch.random.get_rng_state()
    reading = Plane(points=points, extent=0.5, normalization="none", centre_u=0.25).run(subject)
    rows = {r.quantity: r for r in reading.second_opinion().rows}
    found = compared(reading, subject)
    assert np.isfinite(found.theirs.values).sum() == (points - 1) ** 2
    np.testing.assert_allclose(np.nan_to_num(found.difference.values), 0.0, atol=1e-12)
    for name in ("mean loss, rows put right", "RMS difference, rows put right"):
        assert rows[name].within(rows[name].answers[0]) is True
    raw = rows["RMS difference, as returned"]
    assert raw.within(raw.answers[0]) is False
    assert "one step off" in raw.answers[0].words
    assert np.isfinite(rows["range of losses, its own directions"].answers[0].value)
    assert subject.fingerprint() == before
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(p.requires_grad for p in subject.module.parameters())


def test_without_time_it_says_so_and_one_step_is_refused() -> None:
    subject = bowl()
    reading = Plane(points=5, normalization="none").run(subject)
    assert "time was up" in str(reading.second_opinion(seconds=1e-9))
    with pytest.raises(ValueError, match="at least 2"):
        loss_landscapes.along(subject, step(0, 1.0), step(1, 1.0), 1)


def test_parameters_without_dims_have_no_surface_of_its_own_and_that_is_said() -> None:
    class Number(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.tensor(1.0))

    subject = Subject(Number(), [torch.zeros(1)], objective=square, reduction="mean")
    with pytest.raises(TypeError, match="without dims"):
        loss_landscapes.alone(subject, 4)


def test_its_line_begins_one_step_after_the_start() -> None:
    raw = loss_landscapes.between(bowl(), {"weight": torch.tensor([[2.0, 4.0]], dtype=torch.float64)}, 5)
    exact = [float(tilted(torch.tensor([1 + 0.2 * i, 2 + 0.4 * i]))) for i in range(6)]
    np.testing.assert_allclose(raw, exact[1:], rtol=1e-6)
    assert np.abs(raw - exact[:-1]).min() > 0.5
    with pytest.raises(ValueError, match="at least 1"):
        loss_landscapes.between(bowl(), step(0, 1.0), 0)


@pytest.mark.parametrize("direction", ["random", "gradient", "sharpest"])
@pytest.mark.parametrize("points", [6, 9])
def test_a_line_has_a_second_opinion_which_agrees_point_by_point(direction: Any, points: int) -> None:
    subject = bowl()
    before, drawn = subject.fingerprint(), torch.random.get_rng_state()
    reading = Line(points=points, extent=0.5, direction=direction, normalization="none").run(subject, seed=3)
    rows = {r.quantity: r for r in reading.second_opinion().rows}
    found = of_line.compared(reading, subject)
    assert np.isnan(found.theirs.values).tolist() == [True] + [False] * (points - 1)
    np.testing.assert_allclose(found.difference.values[1:], 0.0, atol=1e-12)
    for name in ("mean loss, put right", "RMS difference, put right"):
        assert rows[name].within(rows[name].answers[0]) is True
    raw = rows["RMS difference, as returned"]
    assert raw.within(raw.answers[0]) is False
    assert "one step after the start" in raw.answers[0].words
    assert subject.fingerprint() == before
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_its_own_line_goes_one_way_and_ten_times_as_far_as_the_weights_are_long() -> None:
    subject, seen = surface(lambda w: w.norm(), 3.0, 4.0), 8
    found = loss_landscapes.alone_along(subject, seen, seed=1)
    # One filter: as long as the weights, all positive, scaled to ten times their length in the end.
    assert (np.diff(found) > 0).all()
    assert 50.0 < found[-1] < 55.0
    reading = Line(points=5).run(subject)
    words = next(r for r in reading.second_opinion().rows if r.quantity.startswith("range")).answers[0].words
    assert "ten times as long as all weights" in words
    assert "time was up" in str(reading.second_opinion(seconds=1e-9))
