"""A plane whose run was cut short goes on from its points: evaluations are counted, numbers agree to the last bit."""

from __future__ import annotations

import threading
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from workbench.job import Job
from workbench.landscape.plane import Plane
from workbench.landscape.points import PlanePoints
from workbench.probe import drive
from workbench.store import Store
from workbench.subject import Subject

pytestmark = pytest.mark.usefixtures("plainly")
PLANES = (Plane(points=9), Plane(points=33, sampling="adaptive", most=70, tolerance=1e-4))


class Net(nn.Sequential):
    """Counts the forward passes of all nets of its kind, copies too."""

    passes: ClassVar[list[int]] = [0]

    def forward(self, inputs):
        self.passes[0] += 1
        return super().forward(inputs)


class Counted:
    """A subject whose forward passes are counted."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = Net(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        self.data = (torch.randn(20, 4, dtype=torch.float64), torch.randint(0, 3, (20,)))
        self.subject = Subject(self.net, self.data)

    @property
    def passes(self) -> int:
        return Net.passes[0]

    @passes.setter
    def passes(self, count: int) -> None:
        Net.passes[0] = count


def halfway(plane: Plane, subject: Subject, seed: int = 0, points: int = 41):
    """The reading of a run that is closed after so many points."""
    stream = drive(plane, subject, seed=seed)
    found = next(r for r in stream if int(r.data.evaluated.sum()) == points)
    stream.close()
    return found


def same(one, other) -> bool:
    names = [n for n in one.data.data_vars if n not in ("slope", "curvature", "curvature_error")]
    return all(np.array_equal(one.data[n].values, other.data[n].values, equal_nan=True) for n in names)


@pytest.mark.parametrize("plane", PLANES)
def test_it_goes_on_from_its_points_and_ends_as_if_nothing_had_happened(plane):
    counted = Counted()
    before = halfway(plane, counted.subject)
    counted.passes = 0
    whole = plane.run(counted.subject)
    full, counted.passes = counted.passes, 0
    resumed = plane.run(counted.subject, before=before)
    assert full - counted.passes in (40, 41), "the points known before are not evaluated again"
    assert same(resumed, whole)
    assert resumed.done == 1
    assert resumed.converged == whole.converged
    assert "41 points were taken over" in " ".join(resumed.notes)


@pytest.mark.parametrize("plane", PLANES)
def test_the_first_reading_of_a_resumed_run_shows_all_that_was_known(plane):
    counted = Counted()
    before = halfway(plane, counted.subject, points=52)
    first = next(iter(drive(plane, counted.subject, before=before)))
    assert int(first.data.evaluated.sum()) == 52
    assert np.isfinite(first.data.surface.values).any() == (plane.points**2 > plane.most)


def test_points_of_another_model_seed_or_plane_are_not_taken_over():
    plane, counted = PLANES[0], Counted()
    before = halfway(plane, counted.subject)
    other = plane.run(counted.subject, seed=1, before=before)
    assert same(other, plane.run(counted.subject, seed=1))
    with torch.no_grad():
        counted.net[0].weight += 0.1
    assert same(plane.run(counted.subject, before=before), plane.run(counted.subject))
    wider = Plane(points=9, extent=2.0)
    assert same(wider.run(counted.subject, before=before), wider.run(counted.subject))


def test_a_cancelled_job_goes_on_when_the_same_is_asked_again(tmp_path, monkeypatch):
    counted, plane, reached = Counted(), Plane(points=13, sampling="grid"), threading.Event()
    store = Store(tmp_path)

    def look(reading) -> None:
        if int(reading.data.evaluated.sum()) >= 60:
            reached.set()
            threading.Event().wait(0.2)

    job = Job(counted.subject, on_reading=look, store=store, interval=0.0)
    job.submit(plane)
    assert reached.wait(30)
    job.cancel()
    job.wait(30)
    kept = store.partial(store.key(plane, counted.subject))
    assert kept is not None
    known = int(kept.data.evaluated.sum())
    assert 60 <= known < 169
    asked: list[int] = []
    in_turn = PlanePoints.in_turn
    monkeypatch.setattr(
        PlanePoints, "in_turn", lambda self, rows, *a: asked.append(len(rows)) or in_turn(self, rows, *a)
    )
    job.submit(plane)
    reading = job.wait(60)
    job.close()
    assert reading.done == 1
    assert asked == [169 - known]
    assert same(reading, plane.run(counted.subject))
    assert store.get_or_run(plane, counted.subject).done == 1


def test_a_store_takes_up_what_a_time_budget_cut_short(tmp_path):
    counted, plane, store = Counted(), PLANES[0], Store(tmp_path)
    store.save(before := halfway(plane, counted.subject))
    whole = plane.run(counted.subject)
    counted.passes = 0
    found = store.get_or_run(plane, counted.subject)
    assert same(found, whole)
    assert 0 < counted.passes < 81 - int(before.data.evaluated.sum()) + 12
