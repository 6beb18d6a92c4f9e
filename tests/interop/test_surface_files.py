"""Surfaces of the original scripts: written here in their layout, in their order, and opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from workbench.draw.export import load
from workbench.figure import Contour, Line
from workbench.interop.surface_files import read
from workbench.landscape.line import Line as LineProbe
from workbench.landscape.plane import Plane
from workbench.probe import Reading

Array = NDArray[np.float64]
FILTER = "nets/model_300.t7_weights_xignore=biasbn_xnorm=filter_yignore=biasbn_ynorm=filter.h5"


def loss(x: float, y: float) -> float:
    return 0.25 + 3 * x**2 + 0.5 * y**2 + 0.1 * x - 0.2 * y


def accuracy(x: float, y: float) -> float:
    return 90 - 20 * x**2 - 4 * y


def script(path: Path, nx: int, ny: int, computed: int | None = None, splits: tuple[str, ...] = ("train",)) -> Path:
    """A file as the scripts make it: arrays of (x, y) full of -1, then filled place by place in a mesh's order."""
    x, y = np.linspace(-1, 1, nx), np.linspace(-0.5, 1.5, ny)
    with h5py.File(path, "w") as file:
        file["dir_file"], file["xcoordinates"], file["ycoordinates"] = FILTER, x, y
        across, along = np.meshgrid(x, y)
        for k, split in enumerate(splits):
            losses, accuracies = -np.ones((nx, ny)), -np.ones((nx, ny))
            for place in range(nx * ny if computed is None else computed):
                at = float(across.ravel()[place]), float(along.ravel()[place])
                losses.ravel()[place], accuracies.ravel()[place] = loss(*at) + k, accuracy(*at) - k
            file[f"{split}_loss"], file[f"{split}_acc"] = losses, accuracies
    return path


def changed(path: Path, **values: Any) -> Path:
    with h5py.File(path, "a") as file:
        for name, value in values.items():
            if name in file:
                del file[name]
            if value is not None:
                file[name] = value
    return path


@pytest.mark.parametrize(("nx", "ny"), [(9, 9), (6, 6), (11, 5), (4, 7)])
def test_every_value_is_where_the_script_computed_it(tmp_path: Path, nx: int, ny: int) -> None:
    reading = load(script(tmp_path / "s.h5", nx, ny))
    data = reading.data
    assert isinstance(reading.probe, Plane)
    for i, u in enumerate(data["u"].values):
        for j, v in enumerate(data["v"].values):
            assert data.loss.values[i, j] == pytest.approx(loss(u, v), rel=1e-12)
            assert data.error_rate.values[i, j] == pytest.approx(1 - accuracy(u, v) / 100, rel=1e-12)
    assert (data.sizes["u"], data.sizes["v"]) == (nx, ny)
    assert data.evaluated.all()
    assert (reading.done, reading.converged) == (1.0, True)
    drawn = next(m for m in reading.figure().panels[0].marks if isinstance(m, Contour))
    np.testing.assert_array_equal(drawn.z, data.loss.values.T)


def test_an_array_read_as_it_lies_would_be_seen_to_be_turned(tmp_path: Path) -> None:
    reading = read(script(tmp_path / "s.h5", 9, 9))
    with h5py.File(tmp_path / "s.h5") as file:
        as_it_lies = np.asarray(file["train_loss"])
    np.testing.assert_array_equal(reading.data.loss.values, as_it_lies.T)
    assert not np.allclose(reading.data.loss.values, as_it_lies)


@pytest.mark.parametrize("sides", [(9, 9), (8, 5)])
def test_points_not_computed_stay_unknown_and_are_hatched(tmp_path: Path, sides: tuple[int, int]) -> None:
    reading = load(script(tmp_path / "s.h5", *sides, computed=20))
    data, size = reading.data, sides[0] * sides[1]
    assert int(data.evaluated.sum()) == 20
    np.testing.assert_array_equal(np.isfinite(data.loss.values), data.evaluated.values)
    np.testing.assert_array_equal(np.isfinite(data.error_rate.values), data.evaluated.values)
    assert reading.done == pytest.approx(21 / (size + 1))
    assert not reading.converged
    assert f"{size - 20} of {size} points were not computed" in reading.notes
    assert f"{size - 20} of {sides[0]} × {sides[1]} points were not computed" in reading.figure().note
    reading.export(tmp_path / "f.svg")
    assert "<pattern" in (tmp_path / "f.svg").read_text()


def test_a_diverged_point_is_computed_and_not_finite(tmp_path: Path) -> None:
    path = script(tmp_path / "s.h5", 5, 5)
    with h5py.File(path) as file:
        values = np.array(file["train_loss"])
    values[1, 2] = np.nan
    reading = read(changed(path, train_loss=values))
    assert np.isnan(reading.data.loss.values[2, 1])
    assert reading.data.evaluated.values[2, 1]
    assert reading.summary["not_finite"] == 1


def test_both_splits_and_what_is_told_of_the_directions(tmp_path: Path) -> None:
    path = script(tmp_path / "s.h5", 5, 5, splits=("train", "test"))
    train, test = read(path), read(path, "test")
    assert isinstance(train.probe, Plane)
    assert (train.probe.normalization, train.probe.one_dim) == ("filter", "zero")
    np.testing.assert_allclose(test.data.loss, train.data.loss + 1)
    assert list(train.data["own"].values) == ["test loss", "test error rate"]
    np.testing.assert_array_equal(train.data.own_metric.values[0], test.data.loss.values)
    np.testing.assert_array_equal(train.data.own_metric.values[1], test.data.error_rate.values)
    assert any("settings of this reading that the file does not tell are defaults" in n for n in train.notes)
    assert any("xnorm=filter" in n and "weights" in n for n in train.notes)
    assert train.figure().panels[0].x.label == "x (xnorm=filter)"
    unnamed = read(changed(path, dir_file="mine.h5"))
    assert unnamed.figure().panels[0].y.label == "y (direction not known)"
    assert unnamed.probe == replace(train.probe, normalization=Plane().normalization, one_dim=Plane().one_dim)


def test_a_plane_goes_the_whole_way_through_figures_and_back(tmp_path: Path) -> None:
    reading = load(script(tmp_path / "s.h5", 7, 5))
    again = load(reading.export(tmp_path / "f.pdf"))
    assert again.data.identical(reading.data)
    assert again.provenance == reading.provenance
    assert again.provenance["source"]["file"] == "s.h5"
    assert again.figure().panels[0].x == reading.figure().panels[0].x
    hidden = load(reading.export(tmp_path / "g.pdf", provenance="anonymous"))
    assert "source" not in hidden.provenance
    with pytest.raises(ValueError, match="subject is not there"):
        reading.second_opinion()


def line(path: Path, count: int = 21, **more: Any) -> Reading:
    x = np.linspace(-1, 1, count)
    values = {"xcoordinates": x, "train_loss": 0.3 + x**2, "train_acc": 80 - 10 * x, "test_loss": 0.4 + x**2}
    return load(changed(path, **(values | more)))


def test_a_file_without_ycoordinates_is_a_line(tmp_path: Path) -> None:
    reading = line(tmp_path / "l.h5")
    data, x = reading.data, np.linspace(-1, 1, 21)
    assert isinstance(reading.probe, LineProbe)
    np.testing.assert_allclose(data["alpha"], x)
    np.testing.assert_allclose(data.loss, 0.3 + x**2)
    np.testing.assert_allclose(data.error_rate, 0.2 + 0.1 * x)
    assert (float(data.loss_here), float(data.roughness), float(data.minima)) == (pytest.approx(0.3), 0.0, 1.0)
    assert any("surface_files.read(path, 'test')" in n for n in reading.notes)
    panel = reading.figure().panels[0]
    assert [m.label for m in panel.marks if isinstance(m, Line)] == ["loss"]
    assert panel.x.label == "x (direction not known)"
    assert load(reading.export(tmp_path / "f.png")).data.identical(data)


def test_more_points_than_the_bench_offers_still_open(tmp_path: Path) -> None:
    assert line(tmp_path / "l.h5", 1500).data.sizes["alpha"] == 1500


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda p: changed(p, train_loss=None), "neither train_loss nor test_loss"),
        (lambda p: changed(p, xcoordinates=None), "there is no xcoordinates in it, but dir_file"),
        (lambda p: changed(p, xcoordinates=None, xdirection=[1.0]), "holds directions, not a surface"),
        (
            lambda p: changed(p, train_loss=np.ones((5, 6))),
            r"train_loss .* shape of its coordinates, \(5, 5\); got \(5",
        ),
        (lambda p: changed(p, train_acc=np.ones(25)), r"train_acc .* \(5, 5\); got \(25,\)"),
        (lambda p: changed(p, train_acc=np.full((5, 5), 130.0)), "percentages from 0 to 100"),
        (lambda p: changed(p, ycoordinates=np.ones((5, 1))), r"ycoordinates .* numbers that rise; got .* \(5, 1\)"),
        (lambda p: changed(p, xcoordinates=np.array([0.0, 1, 1, 2, 3])), "xcoordinates .* that rise"),
        (lambda p: changed(p, train_loss=-np.ones((5, 5))), r"no point of train_loss .* was computed"),
        (lambda p: changed(p, train_loss="many"), "train_loss .* does not hold numbers"),
        (lambda p: p.write_bytes(p.read_bytes()[:900]), "not a whole HDF5 file"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, break_it: Callable[[Path], Any], words: str) -> None:
    path = script(tmp_path / "s.h5", 5, 5)
    break_it(path)
    with pytest.raises(ValueError, match=words):
        load(path)


def test_a_split_that_is_not_there_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no test_loss; it has train_loss"):
        read(script(tmp_path / "s.h5", 5, 5), "test")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "no.h5")
