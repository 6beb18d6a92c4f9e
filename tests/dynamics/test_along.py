"""Along: a point probe's numbers at every checkpoint, equal to those read one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import workbench as wb
from workbench import catalog, schema
from workbench.dynamics.along import Along, _order
from workbench.dynamics.opposing import OpposingSignals
from workbench.figure import Axis, Band, Figure, Line, Panel, Points
from workbench.numerics.sampling import Draw
from workbench.probe import Probe, Reading, Variable
from workbench.probes.dormant_units import DormantUnits
from workbench.schema import Doc, Range
from workbench.zoo import digits, nets, training

WIDTHS = (64, 4, 10)
FEW = tuple(t[:30].double() if t.is_floating_point() else t[:30] for t in digits.digits().train)


@dataclass(frozen=True)
class Norms(Probe[wb.Subject]):
    """A probe with every kind of output: numbers, arrays, a moving coordinate, flags, noise, two readings a run."""

    values: Annotated[int, Range(1, 9), Doc("How many values to list.")] = 3

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("norm", (), "length of the weights", "m", "norm_error"),
        Variable("norm_error", (), "its error", "m", "norm_error"),
        Variable("found", ("rank",), "whether a value was found", kind="bool"),
        Variable("density", ("value",), "at places that depend on the weights"),
    )

    def stream(self, subject: wb.Subject, draw: Draw) -> Iterator[Reading]:
        flat = subject.flatten(subject.params)
        value = float(flat.norm())
        if not np.isfinite(subject.loss()):
            raise ValueError("the loss is not finite")
        coords = {"rank": np.arange(self.values), "value": flat[: self.values].double().numpy()}
        yield self.reading(0.5, {"norm": value + float(draw(0)[0])}, coords=coords)
        values = {"norm": value, "norm_error": 0.1, "found": coords["value"] > 0, "density": coords["value"] ** 2}
        yield self.reading(1.0, values, coords=coords, converged=value < 1e9, notes=("a fact",))

    def summary(self, data: xr.Dataset) -> dict:
        return {"norm": float(data.norm), "norm_error": float(data.norm_error), "values": self.values}

    def figure(self, data: xr.Dataset) -> Figure:
        return Figure((Panel((Line([0], [float(data.norm)]),), Axis(""), Axis("")),))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made, model = tmp_path_factory.mktemp("runs") / "first", nets.dense(WIDTHS).double()
    with wb.Recorder(made, model, every=2, loss="cross_entropy", data=FEW) as rec:
        training.train(model, FEW, steps=9, recorder=rec, evaluate_every=4)
    return made


@pytest.fixture
def trajectory(folder: Path) -> wb.Trajectory:
    return wb.Trajectory.open(folder).using(nets.dense(WIDTHS))


@pytest.mark.parametrize("probe", [Norms(), wb.probes.NeuralCollapse()], ids=lambda p: p.name)
def test_each_checkpoint_holds_what_the_probe_reads_there(trajectory: wb.Trajectory, probe: Probe) -> None:
    along = Along(probe).run(trajectory, seed=5)
    assert along.data["step"].values.tolist() == [0, 2, 4, 6, 8, 9]
    for step in trajectory.steps:
        alone, here = probe.run(trajectory.subject(step), seed=5), along.data.sel(step=step)
        for variable in probe.variables:
            np.testing.assert_array_equal(here[variable.name].values, alone.data[variable.name].values)
            assert along.data[variable.name].dims == ("step", *variable.dims)
            assert along.data[variable.name].attrs["error"] == variable.error
        for name, value in alone.summary.items():
            if name in along.data["number"].values:
                assert float(here.headline.sel(number=name)) == value or np.isnan(value)
    assert along.done == 1


def test_moving_coordinates_headlines_and_training_curves_are_kept(trajectory: wb.Trajectory) -> None:
    reading = Along(Norms()).run(trajectory)
    data = reading.data
    first = trajectory.subject(0)
    np.testing.assert_array_equal(data["value_at"].sel(step=0), first.flatten(first.params)[:3].numpy())
    assert data["number"].values.tolist() == ["norm"]
    assert (data.headline_error.sel(number="norm") == 0.1).all()
    scalars = trajectory.scalars
    assert np.isnan(data.training.sel(step=0)).all()
    assert float(data.training.sel(step=6, scalar="train_loss")) == scalars["train_loss"].loc[6]
    assert float(data.training.sel(step=6, scalar="train_accuracy")) == scalars["train_accuracy"].loc[4]
    assert reading.summary["norm_last"] == float(data.norm.sel(step=9))
    assert reading.summary["norm_first_error"] == 0.1
    assert reading.converged
    assert reading.notes == ("a fact",)
    assert reading.provenance["subject"]["on"] == "6 checkpoints, steps 0 to 9"


def test_every_reading_has_the_same_form_and_the_ends_come_first(trajectory: wb.Trajectory) -> None:
    seen: list[Reading] = []
    Along(Norms()).run(trajectory, on_reading=seen.append)
    assert len(seen) == 12
    done = [r.done for r in seen]
    assert done == sorted(done)
    assert done[-1] == 1
    assert len({str({k: (v.dims, v.shape, v.dtype) for k, v in r.data.variables.items()}) for r in seen}) == 1
    order = [int(np.flatnonzero(np.diff(r.data.checkpoint_done.values == 1, prepend=False))[0]) for r in seen[1:2]]
    assert order == [0]
    read = [set(np.flatnonzero(r.data.checkpoint_done.values == 1)) for r in seen[1::2]]
    assert read[2] in ({0, 2, 5}, {0, 3, 5})
    for reading in seen:
        assert reading.figure().panels
        assert not reading.converged or reading.done == 1
        assert reading.summary["checkpoints"] >= 1


@given(st.integers(1, 300))
def test_every_checkpoint_is_read_once(count: int) -> None:
    order = list(_order(count))
    assert sorted(order) == list(range(count))
    assert set(order[:3]) >= {0, count - 1} or count == 1


def test_a_training_that_diverged_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    model = nets.dense(WIDTHS).double()
    with wb.Recorder(tmp_path, model, every=1) as rec:
        for value in (1.0, float("nan")):
            model.linear1.weight.data.mul_(value)
            rec.step()
    trajectory = wb.Trajectory.open(tmp_path).using(model, FEW, "cross_entropy")
    reading = Along(DormantUnits()).run(trajectory)
    assert np.isfinite(reading.data.total_active_fraction.values).tolist() == [True, True, False]
    assert any(note.startswith("step 2 could not be measured") for note in reading.notes)
    with pytest.raises(ValueError, match=r"step 2 has no changes to follow.*nan.*Leave later"):
        OpposingSignals().run(trajectory)


@pytest.mark.parametrize("cls", [c for c in catalog.probes().values() if c.looks_at == "subject"])
def test_every_probe_of_a_point_can_be_read_along_a_training(cls: type[Probe[Any]]) -> None:
    """None of its variables or dims is called as Along calls its own."""
    assert Along(cls()).variables[0].dims[0] == "step"


def test_every_skips_but_keeps_the_ends(trajectory: wb.Trajectory) -> None:
    data = Along(Norms(), every=4).run(trajectory).data
    assert data["step"].values.tolist() == [0, 8, 9]


def test_a_budget_stops_at_a_usable_curve(trajectory: wb.Trajectory) -> None:
    reading = Along(Norms()).run(trajectory, seconds=1e-9)
    assert reading.done < 1
    assert not reading.converged
    assert np.isnan(reading.data.norm.values).sum() == 5
    assert "partial" in reading.figure().note


def test_a_diverged_checkpoint_is_unknown_and_said(tmp_path: Path) -> None:
    model = nets.dense(WIDTHS).double()
    with wb.Recorder(tmp_path, model, every=1) as rec:
        for value in (1.0, float("nan"), 2.0):
            model.linear1.weight.data.fill_(value)
            rec.step()
    reading = Along(Norms()).run(wb.Trajectory.open(tmp_path), model=model, data=FEW, loss="cross_entropy")
    assert np.isnan(reading.data.norm.values).tolist() == [False, False, True, False]
    assert not reading.converged
    assert any(note.startswith("step 2 could not be measured") for note in reading.notes)
    assert reading.data.training.shape == (4, 0)
    with pytest.raises(ValueError, match="data="):
        Along(Norms()).run(wb.Trajectory.open(tmp_path), model=model)


def test_the_figure_shows_headlines_with_bands_and_marks_what_has_not_converged(trajectory: wb.Trajectory) -> None:
    reading = Along(Norms()).run(trajectory)
    norm, recorded = reading.figure().panels
    assert [type(m) for m in norm.marks] == [Band, Line, Points]
    assert norm.x.scale == "symlog"
    assert (norm.y.label, norm.y.unit) == ("norm", "m")
    np.testing.assert_allclose(norm.marks[0].high - norm.marks[1].y, 0.1)
    assert [m.label for m in recorded.marks] == ["train loss", "train accuracy"]
    rough = dataclasses.replace(reading, data=reading.data.assign(checkpoint_converged=("step", [True] * 5 + [False])))
    marks = rough.figure().panels[0].marks
    assert marks[-1].role == "unconverged"
    assert marks[-1].x.tolist() == [9]


def test_a_reading_is_stored_without_loss(trajectory: wb.Trajectory) -> None:
    reading = Along(wb.probes.NeuralCollapse(), every=3).run(trajectory)
    again = Reading.from_bytes(reading.to_bytes())
    assert again.data.identical(reading.data)
    assert again.probe == reading.probe
    assert again.summary == pytest.approx(reading.summary, nan_ok=True)


def test_settings_round_trip_and_only_point_probes_are_taken() -> None:
    along = Along(wb.probes.NeuralCollapse(layer="linear1"), every=2)
    assert schema.from_json(Along, schema.to_json(along)) == along
    assert [v.name for v in along.variables][:2] == ["nc1", "nc1_ratio"]
    assert schema.code(along) == "wb.dynamics.Along(probe=wb.probes.NeuralCollapse(layer='linear1'), every=2)"
    with pytest.raises(ValueError, match="look at a point; Along looks at trajectory"):
        Along(along)
    with pytest.raises(TypeError, match="must be a probe"):
        Along("HessianSpectrum")  # type: ignore[arg-type]


def test_nothing_global_moves(trajectory: wb.Trajectory) -> None:
    state = torch.get_rng_state()
    Along(wb.probes.NeuralCollapse(), every=5).run(trajectory)
    assert torch.equal(state, torch.get_rng_state())
