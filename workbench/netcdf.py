"""A netCDF-4 file of ours in memory, read straight from HDF5: five times as quick as the general way, else the same.

A setting that was measured before should be on screen within a key press, and most of that time was the general reader
asking each variable about calendars, scales and chunks that readings never have. What is not exactly as Workbench
writes it goes the general way.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import xarray as xr

_OF_THE_FORMAT = frozenset(
    {
        "CLASS",
        "NAME",
        "DIMENSION_LIST",
        "REFERENCE_LIST",
        "_Netcdf4Dimid",
        "_Netcdf4Coordinates",
        "_NCProperties",
        "_FillValue",
        "dtype",
    }
)
_OTHERWISE_CODED = frozenset({"coordinates", "scale_factor", "add_offset", "missing_value", "calendar"})
_NO_VARIABLE = "This is a netCDF dimension but not a netCDF variable"


class _Unfamiliar(Exception):
    """The file holds something that Workbench does not write."""


def read(content: bytes) -> xr.Dataset:
    """The dataset in a netCDF-4 file, in memory.

    Raises:
        OSError: the file is cut off or damaged, whatever the reader stumbled over.
    """
    try:
        return _ours(content)
    except _Unfamiliar:
        return _general(content)
    except Exception as problem:  # where bytes were overwritten, HDF5 and h5py raise nearly anything
        raise OSError(f"the content is cut off or damaged: {problem}") from problem


def _general(content: bytes) -> xr.Dataset:
    try:
        with xr.open_dataset(io.BytesIO(content), engine="h5netcdf", decode_timedelta=False) as opened:
            return opened.load()
    except Exception as problem:
        raise OSError(f"the content is cut off or damaged: {problem}") from problem


def _ours(content: bytes) -> xr.Dataset:
    import h5py

    with h5py.File(io.BytesIO(content), "r") as file:
        variables = {name: _variable(name, item, h5py) for name, item in file.items() if not _is_bare_dim(item)}
        attrs = _attrs(file.attrs, h5py)
    coords = {name: v for name, v in variables.items() if v.dims == (name,)}
    return xr.Dataset({n: v for n, v in variables.items() if n not in coords}, coords, attrs)


def _is_bare_dim(item: Any) -> bool:
    name = item.attrs.get("NAME", b"")
    return (name.decode() if isinstance(name, bytes) else str(name)).startswith(_NO_VARIABLE)


def _variable(name: str, item: Any, h5py: Any) -> xr.Variable:
    if not isinstance(item, h5py.Dataset) or _OTHERWISE_CODED & set(item.attrs):
        raise _Unfamiliar(name)
    return xr.Variable(_dims(name, item), _values(item, h5py), _attrs(item.attrs, h5py))


def _dims(name: str, item: Any) -> tuple[str, ...]:
    if item.ndim == 0:
        return ()
    if "DIMENSION_LIST" in item.attrs:
        return tuple(item.file[refs[0]].name.lstrip("/") for refs in item.attrs["DIMENSION_LIST"])
    if item.ndim == 1 and "CLASS" in item.attrs:
        return (name,)
    raise _Unfamiliar(name)


def _values(item: Any, h5py: Any) -> Any:
    if h5py.check_string_dtype(item.dtype) is not None:
        return np.asarray(item.asstr()[()]).astype(str)
    if item.dtype.kind not in "fiub":
        raise _Unfamiliar(item.name)
    fill = item.attrs.get("_FillValue")
    if fill is not None and not np.isnan(fill).all():
        raise _Unfamiliar(item.name)
    kind = item.attrs.get("dtype")
    return item[()] if kind is None else item[()].astype(str(kind))


def _attrs(found: Any, h5py: Any) -> dict[str, Any]:
    return {name: _plain(found[name], h5py) for name in found if name not in _OF_THE_FORMAT}


def _plain(value: Any, h5py: Any) -> Any:
    if isinstance(value, h5py.Empty):
        return ""
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if isinstance(value, np.ndarray | np.generic) and value.size == 1 else value
