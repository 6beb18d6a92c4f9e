"""Pitfall 9: losses that are zero or negative are drawn where they are, on a scale that says so; no loss is shifted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from surfaces import surface
from torch import Tensor

from workbench.draw.rulers import Ruler
from workbench.draw.sheet import known, sheet
from workbench.figure import Axis, Contour, Figure, Line, Panel, Surface, beside
from workbench.landscape.line import Line as LineProbe
from workbench.landscape.plane import Plane
from workbench.probe import Reading

Array = NDArray[np.float64]
PLANE = Plane(points=7, normalization="none", sampling="grid", scale="log", ellipse=False)


def lowered(w: Tensor) -> Tensor:
    """Negative near the model, a plateau of exact zeros to one side, up to 300 at the corners."""
    return torch.where(w[1] > 0.6, 0.0, 50 * w[0] ** 2 + 0.5 * w[1] ** 2 - 0.5)


def positive(w: Tensor) -> Tensor:
    return lowered(w).abs() + 1e-3


def measured(function: Callable[[Tensor], Tensor] = lowered) -> Reading:
    return PLANE.run(surface(function, 0.0, 0.0))


def drawn() -> Panel:
    return measured().figure().panels[0]


def _with(change: Callable[[Array], Array], scale: str = "log") -> Panel:
    panel = drawn()
    mark = next(m for m in panel.marks if isinstance(m, Contour))
    return replace(panel, marks=(replace(mark, z=change(np.array(mark.z))),), z=Axis("loss", scale))  # type: ignore[arg-type]


def shifted() -> Panel:
    """The fault, as published: all values raised until a logarithm exists."""
    return _with(lambda z: z - z.min() + 1e-6)


def floored() -> Panel:
    """Another: a floor that nobody is told."""
    return _with(lambda z: np.maximum(z, 1e-8))


def left_out() -> Panel:
    """Another: what has no logarithm is hatched as if it were not known."""
    return _with(lambda z: z)


def shows_every_loss(panel: Panel) -> None:
    """Every loss keeps its value, has a colour, and the colour bar says where the scale turns linear."""
    z = measured().data.loss.values.T
    page = sheet(panel)
    assert page.field is not None
    np.testing.assert_array_equal(page.field.z, z)
    assert known(page.field, page.height).all()
    np.testing.assert_allclose(page.height.inverse(page.height.forward(z)), z, rtol=1e-12, atol=1e-15)
    assert f"linear below {page.height.threshold:.2g}" in page.height.words()


def test_the_surface_has_what_it_should() -> None:
    z = measured().data.loss.values
    assert (z < 0).any()
    assert (z == 0).any()
    assert (z > 0).any()


@pytest.mark.parametrize("fault", [shifted, floored, left_out])
def test_every_loss_is_drawn_and_a_fault_would_be_seen(fault: Callable[[], Panel]) -> None:
    shows_every_loss(drawn())
    with pytest.raises(AssertionError):
        shows_every_loss(fault())


def test_contours_and_surfaces_are_drawn_alike_and_nothing_is_hatched(tmp_path: Path) -> None:
    reading = measured()
    flat, solid = (sheet(panel) for panel in reading.figure().panels)
    assert isinstance(solid.field, Surface)
    assert (flat.height.scale, flat.height.threshold) == (solid.height.scale, solid.height.threshold)
    reading.export(tmp_path / "f.svg")
    assert "<pattern" not in (tmp_path / "f.svg").read_text()


def test_positive_losses_keep_their_logarithm() -> None:
    assert measured(positive).figure().panels[0].z == Axis("loss", "log")


def test_planes_beside_each_other_share_one_symmetric_logarithm() -> None:
    figures: dict[str, Figure] = {"a": measured(positive).figure(), "b": measured().figure()}
    rulers: list[Ruler] = [sheet(panel).height for panel in beside(figures).panels if not panel.solid]
    assert [(r.scale, r.threshold) for r in rulers] == [("symlog", rulers[0].threshold)] * 2
    np.testing.assert_array_equal(rulers[0].forward([-0.3, 0.0, 7.0]), rulers[1].forward([-0.3, 0.0, 7.0]))


def test_a_line_is_not_broken_at_zero() -> None:
    panel = LineProbe(points=9, normalization="none", scale="log").run(surface(lowered, 0.0, 0.0)).figure().panels[0]
    curve = next(m for m in panel.marks if isinstance(m, Line))
    assert (np.asarray(curve.y) < 0).any()
    assert np.isfinite(sheet(panel).y.forward(curve.y)).all()
