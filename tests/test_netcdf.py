"""Reading our own files quickly gives what xarray's reader gives; whatever else goes through that reader."""

from __future__ import annotations

import io
from typing import Any

import h5py
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from workbench import netcdf

FLOATS = st.floats(width=64)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=9)


def general(content: bytes) -> xr.Dataset:
    with xr.open_dataset(io.BytesIO(content), engine="h5netcdf", decode_timedelta=False) as opened:
        return opened.load()


@settings(max_examples=40)
@given(
    line=arrays.arrays(np.float64, 3, elements=FLOATS),
    sheet=arrays.arrays(np.float64, (2, 3), elements=FLOATS),
    number=FLOATS,
    flags=arrays.arrays(bool, (2,)),
    names=st.lists(TEXTS, min_size=3, max_size=3, unique=True),
    words=TEXTS,
    count=st.integers(-(2**31), 2**31 - 1),
)
def test_what_we_write_is_read_alike_by_both(
    line: Any, sheet: Any, number: float, flags: Any, names: list[str], words: str, count: int
) -> None:
    made = xr.Dataset(
        {
            "line": ("x", line, {"units": words, "long_name": "ä"}),
            "sheet": (("y", "x"), sheet),
            "turned": (("x", "y"), sheet.T),
            "number": ((), number),
            "flags": ("y", flags),
            "bare": ("nowhere", line),
            "counts": ("y", np.array([count, 0])),
        },
        {"x": names, "y": [0.5, -1.0]},
        {"converged": count, "notes": words, "empty": ""},
    )
    content = bytes(made.to_netcdf(engine="h5netcdf"))
    found = netcdf._ours(content)
    assert found.identical(general(content))
    assert found.identical(made)
    assert found["line"].values.tobytes() == line.tobytes()
    assert [v.dtype.kind for v in found.data_vars.values()] == [v.dtype.kind for v in made.data_vars.values()]
    assert isinstance(found.attrs["converged"], int)


@pytest.mark.parametrize("units", ["seconds", "days", "days since 2000-01-01"])
def test_numbers_in_seconds_stay_numbers(units: str) -> None:
    made = xr.Dataset({"time": ("x", [1.5, 2.5], {"units": units})})
    assert netcdf.read(bytes(made.to_netcdf(engine="h5netcdf"))).identical(made)


@pytest.mark.parametrize(
    "strange",
    [
        xr.Dataset({"x": ("t", [1.0]), "t": np.array(["2020-01-01"], dtype="datetime64[ns]")}),
        xr.Dataset({"x": ("t", [1.0])}, {"extra": ("t", [2.0])}),
        xr.Dataset({"x": ("t", [1.0 + 2.0j])}),
    ],
    ids=["dates", "coordinates beside dims", "complex numbers"],
)
def test_what_we_never_write_goes_the_general_way(strange: xr.Dataset) -> None:
    content = bytes(strange.to_netcdf(engine="h5netcdf", invalid_netcdf=True))
    assert netcdf.read(content).identical(general(content))


def test_scaled_numbers_and_groups_go_the_general_way() -> None:
    made = xr.Dataset({"x": ("t", [1.0, 2.0])})
    content = bytes(
        made.to_netcdf(engine="h5netcdf", encoding={"x": {"dtype": "i2", "scale_factor": 0.5, "_FillValue": -1}})
    )
    assert netcdf.read(content).identical(made)
    held = io.BytesIO(content)
    with h5py.File(held, "r+") as file:
        file.create_group("more")
    with pytest.raises(netcdf._Unfamiliar):
        netcdf._ours(held.getvalue())
    assert netcdf.read(held.getvalue()).identical(made)


@pytest.mark.parametrize("left", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_off_raises(left: float) -> None:
    content = bytes(xr.Dataset({"x": ("t", np.arange(500.0))}).to_netcdf(engine="h5netcdf"))
    with pytest.raises(OSError, match="cut off or damaged"):
        netcdf.read(content[: int(left * len(content))])
