"""bfloat16 previews against autocast and full precision by hand: labelled, checked, and never taken for full ones."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import workbench as wb
from workbench.landscape.axes import plane_axes
from workbench.landscape.line import Line, line_direction
from workbench.landscape.models import ModelsPlane
from workbench.landscape.plane import Plane
from workbench.landscape.preview import Checks
from workbench.numerics.sampling import Draw
from workbench.store import Store
from workbench.subject import Subject

pytestmark = pytest.mark.usefixtures("plainly")
PLANE = Plane(points=5, extent=0.7, preview=True)
ADAPTIVE = Plane(points=17, extent=0.7, most=30, preview=True)
LINE = Line(points=9, extent=0.7, preview=True)
PROBES = (PLANE, ADAPTIVE, LINE)


class Net(nn.Module):
    """A perceptron with BatchNorm whose outputs are NaN where the first weight is large."""

    def __init__(self, norm: bool = False, limit: float = math.inf) -> None:
        super().__init__()
        torch.manual_seed(4)
        middle = [nn.BatchNorm1d(32)] if norm else []
        self.layers = nn.Sequential(nn.Linear(12, 32), *middle, nn.ReLU(), nn.Linear(32, 4))
        self.limit = limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.layers(x)
        bad = self.layers[0].weight.norm() > self.limit
        return torch.where(bad, torch.full_like(found, math.nan), found)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(60, 12, generator=g), torch.randint(0, 4, (60,), generator=g)


def subject(**given: object) -> Subject:
    return Subject(Net().eval(), data(), **given)  # type: ignore[arg-type]


def full(probe):
    return dataclasses.replace(probe, preview=False)


def moved(net: nn.Module, *steps: tuple[float, dict[str, torch.Tensor]]) -> nn.Module:
    there = copy.deepcopy(net)
    for name, p in there.named_parameters():
        p.data += sum(a * d[name] for a, d in steps)
    return there


def losses(net: nn.Module) -> tuple[float, float]:
    """In bfloat16 and in float32, by hand."""
    x, y = data()
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(x)
        return float(F.cross_entropy(out.float(), y)), float(F.cross_entropy(net(x), y))


def by_hand(probe: Plane, one: Subject, net: nn.Module) -> np.ndarray:
    """Losses (u, v, precision) of copies moved by hand."""
    draw = Draw(3, "Plane", one.size, one.dtype, one.device)
    axes = plane_axes(one, draw, "random", "filter", probe.extent, probe.points)
    return np.array([[losses(moved(net, (u, axes.first), (v, axes.second))) for v in axes.v] for u in axes.u])


def test_a_plane_is_what_autocast_gives_and_its_error_is_the_largest_difference_on_nine_points() -> None:
    one = subject(batch_size=17)
    found = PLANE.run(one, seed=3)
    rough, exact = np.moveaxis(by_hand(PLANE, one, Net().eval()), -1, 0)
    assert found.data.loss.values == pytest.approx(rough, rel=1e-5)
    assert found.data.loss.values != pytest.approx(exact, rel=1e-5)
    assert found.data.loss.values[2, 2] != pytest.approx(float(found.data.loss_here), rel=1e-6)
    assert float(found.data.loss_here) == pytest.approx(exact[2, 2], rel=1e-6)
    corners = np.abs(rough - exact)[::2, ::2]
    assert float(found.data.loss_preview_error) == pytest.approx(corners.max(), rel=0.05, abs=1e-6)
    assert int(found.data.preview_checks) == 9
    assert np.isnan(found.data.agreement_radius)  # differences near the model are those of rounding
    assert np.isfinite(found.data.curvature).all()


def test_a_line_is_what_autocast_gives_and_its_error_is_the_largest_difference_on_nine_points() -> None:
    one = subject()
    found = LINE.run(one, seed=2)
    along, _ = line_direction(one, Draw(2, "Line", one.size, one.dtype, one.device), "random", "filter")
    both = [losses(moved(Net().eval(), (a, dict(along)))) for a in found.data.alpha.values]
    rough, exact = np.array(both).T
    assert found.data.loss.values == pytest.approx(rough, rel=1e-5)
    assert float(found.data.loss_preview_error) == pytest.approx(np.abs(rough - exact).max(), rel=0.05, abs=1e-6)
    assert math.isnan(found.summary["roughness"])
    assert math.isnan(found.summary["agreement_radius"])
    assert np.isfinite(full(LINE).run(one, seed=2).summary["roughness"])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 3.0), st.sampled_from([3, 5, 9]))
def test_no_checked_point_is_further_off_than_stated(seed: int, extent: float, points: int) -> None:
    probe = dataclasses.replace(PLANE, points=points, extent=extent)
    one = subject()
    rough, exact = (p.run(one, seed=seed).data for p in (probe, full(probe)))
    step = points // 2
    apart = np.abs(rough.loss.values - exact.loss.values)[::step, ::step]
    assert apart.max() == pytest.approx(float(rough.loss_preview_error), rel=0.01, abs=1e-6)
    wrong = np.abs(rough.error_rate.values - exact.error_rate.values)[::step, ::step]
    assert wrong.max() == pytest.approx(float(rough.error_rate_preview_error), abs=1e-9)


@pytest.mark.parametrize("probe", PROBES, ids=lambda p: f"{p.name}{p.points}")
def test_a_preview_says_so_from_the_first_reading_on_and_a_full_reading_says_nothing_of_it(probe) -> None:
    readings: list[wb.Reading] = []
    probe.run(subject(), on_reading=readings.append)
    for one in readings:
        off = float(one.data.loss_preview_error)
        assert 0 < off < 0.05
        assert one.summary["precision"] == "bfloat16 preview"
        assert one.summary["loss_preview_error"] == off
        assert one.figure().note.count(f"bfloat16 preview: losses off by up to {off:.2g} (") == 1
        assert f"a preview in bfloat16: its losses are off by up to {off:.2g} at the" in one.notes[0]
    assert [int(one.data.preview_checks) for one in (readings[0], readings[-1])] == [1, 9]
    again = wb.Reading.from_bytes(readings[-1].to_bytes())
    assert again.figure().note == readings[-1].figure().note
    plain = full(probe).run(subject())
    assert "bfloat16" not in f"{plain.summary} {plain.notes} {plain.figure().note}"
    assert np.isnan(plain.data.loss_preview_error)


@pytest.mark.parametrize("probe", PROBES, ids=lambda p: f"{p.name}{p.points}")
def test_the_store_keeps_previews_and_full_readings_apart_and_no_comparison_mixes_them(probe, tmp_path) -> None:
    one, store = subject(), Store(tmp_path)
    rough = store.get_or_run(probe, one)
    exact = store.get_or_run(full(probe), one)
    assert float(rough.data.loss_here) == float(exact.data.loss_here)
    assert not np.array_equal(rough.data.loss, exact.data.loss, equal_nan=True)
    for held, wanted in ((probe, rough), (full(probe), exact)):
        assert np.array_equal(store.get_or_run(held, one).data.loss, wanted.data.loss, equal_nan=True)
    with pytest.raises(ValueError, match="setting preview is True in 'a' and False in 'b'"):
        wb.compare({"a": rough, "b": exact})
    with pytest.raises(ValueError, match=r"bfloat16 preview is not compared .*preview=False"):
        rough.second_opinion()


@pytest.mark.parametrize("probe", [PLANE, ADAPTIVE])
def test_a_full_plane_does_not_go_on_from_a_preview(probe) -> None:
    one = subject()
    rough, exact = probe.run(one), full(probe).run(one)
    assert np.array_equal(full(probe).run(one, before=rough).data.loss, exact.data.loss, equal_nan=True)
    assert np.array_equal(probe.run(one, before=exact).data.loss, rough.data.loss, equal_nan=True)
    again = probe.run(one, before=rough)  # a preview does, and is checked again
    assert float(again.data.loss_preview_error) == float(rough.data.loss_preview_error)
    assert any("taken over" in note for note in again.notes)


def test_what_the_subject_evaluates_by_itself_is_in_bfloat16_in_every_batch() -> None:
    def mean_square(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return outputs.square().mean(1)

    one = Subject(Net().eval(), data(), metrics={"square": mean_square}, batch_size=20)
    rough, exact = PLANE.run(one).data, full(PLANE).run(one).data
    plain = PLANE.run(subject()).data  # without metrics of its own points go another way
    assert rough.loss.values == pytest.approx(plain.loss.values, rel=1e-5)
    apart = np.abs(rough.own_metric.values - exact.own_metric.values)[0, ::2, ::2]
    assert float(rough.own_metric_preview_error[0]) == pytest.approx(apart.max(), rel=1e-3)
    assert apart.max() > 0
    assert np.isnan(exact.own_metric_preview_error).all()


def test_recomputed_statistics_are_those_of_bfloat16_too() -> None:
    x, y = data()
    one = Subject(Net(norm=True).eval(), (x, y), norm="recompute", batch_size=60)
    found = PLANE.run(one, seed=3).data
    net = Net(norm=True).train()  # in one batch its own statistics are the recomputed ones, but for n / (n - 1)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        rough = float(F.cross_entropy(net(x).float(), y))
    exact = full(PLANE).run(one, seed=3).data
    assert found.loss.values != pytest.approx(exact.loss.values, rel=1e-6)
    assert float(found.loss[2, 2]) == pytest.approx(rough, rel=1e-2)


@pytest.mark.parametrize("probe", [PLANE, LINE])
def test_nan_stays_nan_and_says_nothing_of_the_error(probe) -> None:
    net = Net(limit=Net().layers[0].weight.norm().item() * 1.05).eval()
    one = Subject(net, data())
    rough, exact = probe.run(one), full(probe).run(one)
    assert np.isnan(exact.data.loss.values).any()
    assert np.array_equal(np.isnan(rough.data.loss.values), np.isnan(exact.data.loss.values))
    assert 0 < float(rough.data.loss_preview_error) < 0.05


def test_where_one_alone_is_finite_a_preview_is_off_without_bound() -> None:
    checks = Checks()
    checks.add({"loss": math.nan}, {"loss": math.inf})
    assert math.isnan(checks.values["loss_preview_error"])
    checks.add({"loss": 1.0}, {"loss": 1.25})
    checks.add({"loss": math.nan}, {"loss": math.nan})
    assert checks.values["loss_preview_error"] == 0.25
    checks.add({"loss": 1.0}, {"loss": math.nan})
    checks.add({"loss": 1.0}, {"loss": 1.0})
    assert checks.values["loss_preview_error"] == math.inf
    assert checks.values["preview_checks"] == 5


@pytest.mark.parametrize("probe", [PLANE, LINE])
def test_in_float64_a_preview_is_refused(probe) -> None:
    with pytest.raises(ValueError, match=r"float64, which autocast leaves as it is: use .*float32"):
        probe.run(subject(dtype=torch.float64))


def test_a_plane_through_models_can_be_a_preview_while_the_models_are_not() -> None:
    nets = [Net(norm=True).eval() for _ in range(2)]
    for p in nets[1].parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    nets[1].layers[1].running_mean += 1  # a buffer that differs moves along
    for norm in ("recompute", "batch"):
        runs = wb.Runs({"a": Subject(nets[0], data()), "b": Subject(nets[1], data())})
        probe = ModelsPlane(points=3, norm=norm, preview=True)
        rough, exact = probe.run(runs), full(probe).run(runs)
        assert np.array_equal(rough.data.model_loss, exact.data.model_loss)
        assert not np.array_equal(rough.data.loss, exact.data.loss)
        apart = np.abs(rough.data.loss.values - exact.data.loss.values).max()
        assert float(rough.data.loss_preview_error) >= apart - 1e-6
        assert "bfloat16 preview" in rough.figure().note
