"""Planes as files for ParaView: read back by the standard library's XML parser, and by VTK where it is installed."""

from __future__ import annotations

import base64
import json
import struct
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from surfaces import surface
from torch import Tensor

from workbench.cli import main
from workbench.draw.carry import unload
from workbench.draw.export import load
from workbench.landscape.line import Line
from workbench.landscape.plane import Plane
from workbench.probe import Reading
from workbench.subject import Subject

Array = NDArray[Any]


def steep(w: Tensor) -> Tensor:
    return 2.0 + 50 * w[0] ** 2 + 0.5 * w[1] ** 2


def broken(w: Tensor) -> Tensor:
    """NaN to one side, +Inf to the other."""
    return steep(w) + torch.where(w[0] > 0.4, torch.nan, 0.0) + torch.where(w[1] > 0.6, torch.inf, 0.0)


def measured(function: Any = steep, **settings: Any) -> Reading:
    given: dict[str, Any] = {"points": 6, "directions": "hessian", "sampling": "grid", "ellipse": False} | settings
    return Plane(**given).run(surface(function, 0.0, 0.0))


class Parsed:
    """A file as the standard library reads it: arrays by name in the order of the file, texts, and the grid's sides."""

    def __init__(self, path: Path) -> None:
        root = ElementTree.parse(path).getroot()
        assert root.attrib | {"byte_order": "LittleEndian", "header_type": "UInt64"} == root.attrib
        whole = root.find("StructuredGrid")
        piece = root.find("StructuredGrid/Piece")
        assert whole is not None
        assert piece is not None
        assert piece.attrib["Extent"] == whole.attrib["WholeExtent"]
        ends = [int(word) for word in piece.attrib["Extent"].split()]
        assert ends[::2] == [0, 0, 0]
        self.sides = ends[1] + 1, ends[3] + 1
        self.arrays = {a.attrib["Name"]: self.values(a) for a in piece.iter("DataArray")}
        self.texts = {
            a.attrib["Name"]: self.content(a).rstrip(b"\0").decode()
            for a in root.iter("DataArray")
            if a.attrib["type"] == "String"
        }

    @staticmethod
    def content(array: ElementTree.Element) -> bytes:
        held = base64.b64decode(array.text or "")
        (size,) = struct.unpack("<Q", held[:8])
        assert size == len(held) - 8
        return held[8:]

    def values(self, array: ElementTree.Element) -> Array:
        kind = {"Float64": "<f8", "UInt8": "u1"}[array.attrib["type"]]
        return np.frombuffer(self.content(array), dtype=kind)

    @property
    def points(self) -> Array:
        return self.arrays["Points"].reshape(-1, 3)


def by_vtk(path: Path) -> Parsed:
    """The same as VTK reads it."""
    pytest.importorskip("vtkmodules", reason="VTK is not installed")
    from vtkmodules.util.numpy_support import vtk_to_numpy  # pyright: ignore[reportMissingImports]
    from vtkmodules.vtkIOXML import vtkXMLStructuredGridReader  # pyright: ignore[reportMissingImports]

    reader = vtkXMLStructuredGridReader()
    reader.SetFileName(str(path))
    reader.Update()
    grid, found = reader.GetOutput(), Parsed.__new__(Parsed)
    held, said = grid.GetPointData(), grid.GetFieldData()
    assert held.GetScalars().GetName() == "loss"
    sides = [0, 0, 0]
    grid.GetDimensions(sides)
    found.sides = sides[0], sides[1]
    arrays = [held.GetArray(k) for k in range(held.GetNumberOfArrays())]
    found.arrays = {a.GetName(): vtk_to_numpy(a) for a in arrays}
    found.arrays["Points"] = vtk_to_numpy(grid.GetPoints().GetData()).ravel()
    found.texts = {name: said.GetAbstractArray(name).GetValue(0) for name in ("height", "workbench")}
    hidden = found.arrays.get("vtkGhostType", np.zeros(len(found.points)))
    assert [bool(grid.IsPointVisible(k)) for k in range(len(hidden))] == [not h for h in hidden]
    return found


@pytest.mark.parametrize("parse", [Parsed, by_vtk])
@pytest.mark.parametrize(
    ("scale", "height", "words"),
    [("log", np.log10, "log10 of the loss"), ("linear", np.positive, "loss")],
)
def test_each_point_lies_where_its_loss_says(tmp_path: Path, parse: Any, scale: str, height: Any, words: str) -> None:
    found = parse(measured(scale=scale).export(tmp_path / "plane.vts"))
    x, y, z = found.points.T
    exact = 2 + 50 * x**2 + 0.5 * y**2
    assert found.sides == (6, 6)
    assert len({(a, b) for a, b in zip(x, y, strict=True)}) == 36
    assert np.ptp(x[:6]) > 0 == np.ptp(y[:6])
    np.testing.assert_allclose(found.arrays["loss"], exact, rtol=1e-9)
    np.testing.assert_allclose(z, height(exact), rtol=1e-9)
    assert found.texts["height"] == words
    assert "vtkGhostType" not in found.arrays


@pytest.mark.parametrize("parse", [Parsed, by_vtk])
def test_values_that_are_not_finite_stay_and_are_hidden(tmp_path: Path, parse: Any) -> None:
    reading = measured(broken, directions="random", normalization="none")
    found, loss = parse(reading.export(tmp_path / "f.vts")), reading.data.loss.values
    assert np.isnan(loss).any()
    assert np.isposinf(loss).any()
    np.testing.assert_array_equal(found.arrays["loss"], loss.T.ravel())
    lost = ~np.isfinite(found.arrays["loss"])
    np.testing.assert_array_equal(found.arrays["vtkGhostType"] == 2, lost)
    z = found.points[:, 2]
    assert (z[lost] == z[~lost].min()).all()


def test_point_data_are_those_of_the_reading(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 4).double()
    data = torch.randn(20, 3, dtype=torch.float64), torch.arange(20) % 4
    metrics = {"reward <1>": lambda model: float(model.weight.sum())}
    reading = Plane(points=5, sampling="grid").run(Subject(net, data, metrics=metrics))
    found = Parsed(reading.export(tmp_path / "f.vts"))
    for name in ("loss", "loss_error", "error_rate", "error_rate_error", "evaluated"):
        np.testing.assert_array_equal(found.arrays[name], reading.data[name].values.T.ravel())
    np.testing.assert_array_equal(found.arrays["reward <1>"], reading.data.own_metric.values[0].T.ravel())
    assert "surface" not in found.arrays


def test_unequal_sides_and_losses_below_zero(tmp_path: Path) -> None:
    import h5py

    x, y = np.linspace(-1, 1, 4), np.linspace(-2, 2, 7)
    z = 3 * x[:, None] ** 2 - y[None, :]
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["xcoordinates"], file["ycoordinates"], file["train_loss"] = x, y, z.T.reshape(4, 7)
    assert main(["export", str(tmp_path / "s.h5"), str(tmp_path / "f.vts")]) == 0
    found = Parsed(tmp_path / "f.vts")
    assert found.sides == (4, 7)
    u, v, height = found.points.T
    np.testing.assert_allclose(found.arrays["loss"], 3 * u**2 - v)
    assert found.texts["height"].startswith("symmetric logarithm of the loss, linear below")
    order = np.argsort(found.arrays["loss"], kind="stable")
    assert (np.diff(height[order]) >= 0).all()
    assert (np.sign(height) == np.sign(found.arrays["loss"])).all()
    assert np.isnan(found.arrays["error_rate"]).all()


def test_losses_interpolated_by_adaptive_sampling_are_heights(tmp_path: Path) -> None:
    reading = measured(points=21, sampling="adaptive", most=30)
    found = Parsed(reading.export(tmp_path / "f.vts"))
    np.testing.assert_allclose(10 ** found.points[:, 2], reading.data.surface.values.T.ravel(), rtol=1e-12)
    assert np.isnan(found.arrays["loss"]).sum() == 441 - int(found.arrays["evaluated"].sum())
    np.testing.assert_array_equal(found.arrays["surface_error"], reading.data.surface_error.values.T.ravel())


@pytest.mark.parametrize("parse", [Parsed, by_vtk])
def test_the_file_tells_where_it_comes_from_and_gives_its_reading_back(tmp_path: Path, parse: Any) -> None:
    reading = measured()
    path = reading.export(tmp_path / "f.vts")
    facts = json.loads(parse(path).texts["workbench"])
    assert facts["seed"] == 0
    assert facts["fingerprint"] == reading.provenance["fingerprint"]
    assert facts["settings"]["points"] == 6
    assert facts == unload(path).facts
    again = load(path)
    assert again.data.identical(reading.data)
    assert again.provenance == reading.provenance
    hidden = unload(reading.export(tmp_path / "g.vts", provenance="anonymous")).facts
    assert "created" not in hidden
    assert hidden["seed"] == 0
    with pytest.raises(ValueError, match="carries no reading"):
        load(reading.export(tmp_path / "h.vts", provenance="none"))


def test_the_same_reading_makes_the_same_file(tmp_path: Path) -> None:
    reading = measured()
    one, two = (reading.export(tmp_path / name).read_bytes() for name in ("a.vts", "b.vts"))
    assert one == two


def test_what_is_no_plane_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Line has none"):
        Line(points=3).run(surface(steep, 0.1, 0.0)).export(tmp_path / "f.vts")
    assert not list(tmp_path.iterdir())


def test_the_shell_writes_them_too_and_names_the_endings_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = measured().export(tmp_path / "f.pdf")
    assert main(["export", str(path), str(tmp_path / "f.vts")]) == 0
    assert load(tmp_path / "f.vts").data.identical(load(path).data)
    assert main(["export", str(path), str(tmp_path / "f.vtk")]) == 2
    assert "a plane also as .vts" in capsys.readouterr().err
