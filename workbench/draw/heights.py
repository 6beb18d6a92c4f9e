"""A plane of losses as a surface in space, for ParaView and other programs that read VTK's files."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.draw.rulers import Ruler, ruler
from workbench.draw.vts import HIDDEN, grid
from workbench.figure import fitting
from workbench.landscape.preview import caption
from workbench.landscape.refining import filled
from workbench.probe import Probe, Reading

ALWAYS = ("loss", "loss_error", "error_rate", "evaluated")
"""What every such file holds, known or not; the rest of a plane's variables only where something of it is known."""


def check_plane(probe: Probe[Any]) -> None:
    """Refuse probes that measure no loss over two coordinates, before any work.

    Raises:
        ValueError: it is one of these.
    """
    if not any(v.name == "loss" and v.dims == ("u", "v") for v in probe.variables):
        raise ValueError(
            f"a .vts file holds a surface of losses, as Plane measures it; {probe.name} has none. Export its figure "
            "as .pdf, .svg, .pgf or .png, or its numbers with reading.to_frame()."
        )


def to_vts(reading: Reading) -> bytes:
    """A reading of a plane as the bytes of a ``.vts`` file: x = u, y = v, and the loss on the drawn scale as height.

    Data of the points are the loss itself with its error, error rate, ``evaluated``, and whatever else is known of each
    point, NaN and Inf as they are. Losses interpolated by adaptive sampling are heights too. A point without height
    lies on the floor and is marked as hidden, which readers of VTK's files leave out of the picture.
    """
    check_plane(reading.probe)
    data = reading.data
    loss = filled(data).loss.values
    scale = ruler(fitting("loss", getattr(reading.probe, "scale", "log"), loss), [loss])
    height = scale.forward(loss)
    unknown = ~np.isfinite(height)
    floor = float(height[~unknown].min()) if not unknown.all() else 0.0
    u, v = np.meshgrid(data["u"].values, data["v"].values, indexing="ij")
    places = np.stack([u, v, np.where(unknown, floor, height)], axis=-1)
    hidden = {"vtkGhostType": np.where(unknown, HIDDEN, 0).astype(np.uint8)} if unknown.any() else {}
    return grid(places, _values(data) | hidden, {"height": ", ".join(filter(None, (_words(scale), caption(data))))})


def _values(data: xr.Dataset) -> dict[str, NDArray[Any]]:
    """Everything that is one value a point, the loss first."""
    every = {str(name): a.values for name, a in data.data_vars.items() if a.dims == ("u", "v")}
    found = {name: every.get(name, np.full(every["loss"].shape, np.nan)) for name in ALWAYS}
    found |= {name: a for name, a in every.items() if name not in ALWAYS and _known(a)}
    for kind in ("own_metric", "own_metric_error"):
        for name, a in zip(data["own"].values, data[kind].values, strict=True) if kind in data else ():
            found |= {f"{name}{kind.removeprefix('own_metric')}": a} if _known(a) else {}
    return found


def _known(values: NDArray[Any]) -> bool:
    return bool((~np.isnan(values)).any())


def _words(scale: Ruler) -> str:
    return {
        "linear": "loss",
        "log": "log10 of the loss",
        "symlog": f"symmetric logarithm of the loss, {scale.remark}",
    }[scale.scale]
