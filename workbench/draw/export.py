"""From a reading to a figure file for a paper, and back: exact width, fonts embedded, the reading inside."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

from workbench.draw.anonymous import anonymous
from workbench.draw.carry import FORMATS, SURFACE, Cargo, checked_suffix, load_up, unload
from workbench.draw.files import write_all
from workbench.draw.fonts import choose
from workbench.draw.heights import check_plane, to_vts
from workbench.draw.paper import paper
from workbench.draw.paper_style import styled
from workbench.draw.pgf import to_pgf
from workbench.draw.venues import Column, Venue
from workbench.draw.venues import venue as find_venue
from workbench.figure import Figure
from workbench.probe import Reading
from workbench.resolve import resolve

Provenance = Literal["full", "anonymous", "none"]
FROM_ELSEWHERE: dict[str, str] = dict.fromkeys((".h5", ".hdf5"), "workbench.interop.surface_files:read")
"""Files of other programs that :func:`load` opens, by suffix: who reads them, by name, so that nothing is imported."""


def export(
    reading: Reading,
    path: str | Path,
    *,
    venue: str | None = None,
    column: Column | None = None,
    height: float | None = None,
    provenance: Provenance = "full",
    usetex: bool = False,
    dpi: int = 300,
) -> Path:
    """Write a reading's figure at a venue's true width; the suffix (.pdf, .svg, .pgf, .png) decides the format.

    A plane's losses are also written as a surface in space for ParaView (.vts), where only ``provenance`` matters.

    Args:
        reading: what to draw; it travels inside the file, see :mod:`workbench.draw.carry`.
        path: the file to write; an older one is replaced at once or not at all.
        venue: a name such as ``"icml2024"``; None is a house style of 3.5 and 7 inches.
        column: ``"half"`` or ``"full"``; None is the narrower one that the venue has.
        height: in inches; by default the panels get the venue's ratio.
        provenance: ``"full"``, ``"anonymous"`` (no names, paths or commits), or ``"none"`` (nothing attached).
        usetex: set all words by an installed LaTeX, with the venue's packages.
        dpi: of PNG files, and of very fine grids inside the others.

    Returns:
        The path written.

    Raises:
        ValueError: unknown suffix, venue, column or provenance; a .vts of what is no plane.
        RuntimeError: LaTeX was asked for and is missing.
        OSError: the file cannot be written, and is as it was.
    """
    target = Path(path)
    suffix, where = checked_suffix(target), find_venue(venue, column)
    if provenance not in get_args(Provenance):
        raise ValueError(f"provenance must be 'full', 'anonymous' or 'none'; got {provenance!r}.")
    if suffix == SURFACE:
        check_plane(reading.probe)
    held = anonymous(reading) if provenance == "anonymous" else reading
    if suffix == SURFACE:
        content, style = to_vts(held), dict[str, str]()
    else:
        content = render(held.figure(), suffix, where, height=height, usetex=usetex, dpi=dpi)
        style = {"venue": f"{where.name}, {where.column} column", "font": "by LaTeX" if usetex else choose(where).words}
    write_all(load_up(target, content, Cargo() if provenance == "none" else _cargo(held, style)))
    return target


def render(
    figure: Figure,
    suffix: str,
    where: Venue | None = None,
    *,
    height: float | None = None,
    usetex: bool = False,
    dpi: int = 300,
) -> bytes:
    """A figure as the bytes of a ``.pdf``, ``.svg``, ``.pgf`` or ``.png`` file, without provenance or time stamps."""
    where = where or find_venue()
    usetex = usetex and suffix != ".pgf"  # the paper's own LaTeX sets the words of PGF in any case
    if usetex:
        _need_latex(suffix)
    with styled(where, usetex):
        page = paper(figure, where, height, raster=suffix != ".pgf")
        if suffix == ".pgf":
            return to_pgf(page)
        out = io.BytesIO()
        page.savefig(out, format=suffix[1:], dpi=dpi, metadata=_NO_MARKS[suffix])
    return out.getvalue()


_NO_MARKS: dict[str, dict[str, Any]] = {
    ".pdf": {"Creator": "Workbench", "Producer": None, "CreationDate": None},
    ".svg": {"Creator": None, "Date": None},
    ".png": {"Software": None},
}


def _need_latex(suffix: str) -> None:
    import shutil

    needed = ("latex", "dvipng") if suffix == ".png" else ("latex",)
    missing = [name for name in needed if shutil.which(name) is None]
    if missing:
        raise RuntimeError(
            f"usetex=True needs {' and '.join(missing)}, not found on this machine; leave usetex=False, which needs no "
            "LaTeX, or install it: apt-get install texlive-latex-extra texlive-fonts-recommended cm-super dvipng"
        )


def _cargo(reading: Reading, style: Mapping[str, str]) -> Cargo:
    from workbench import schema

    facts = {
        "tool": "workbench",
        "probe": reading.probe.path,
        "settings": schema.to_json(reading.probe),
        "done": reading.done,
        **style,
        **reading.provenance,
    }
    return Cargo(facts, reading.to_bytes(), reading.figure().title or reading.probe.name)


def load(source: str | Path) -> Reading:
    """A reading from an exported figure, its sidecar, a stored netCDF file, or a key of the default store.

    A surface of the original loss-landscape scripts (.h5) opens too: see :mod:`workbench.interop.surface_files`.

    Raises:
        ValueError: the file carries no reading, or is damaged.
        FileNotFoundError: there is no such file and no such key.
    """
    path = Path(source)
    if path.suffix.lower() in (*FORMATS, SURFACE):
        _exists(path)
        return Reading.from_bytes(cast(bytes, unload(path).reading))
    if path.suffix.lower() in FROM_ELSEWHERE:
        _exists(path)
        return resolve(FROM_ELSEWHERE[path.suffix.lower()])(path)
    if path.suffix.lower() == ".nc" or path.is_file():
        _exists(path)
        return _opened(path)
    from workbench.store import Store

    return Store().load(str(source))


def _exists(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {str(path)!r}. wb.load takes an exported figure, a .nc file or a store's key."
        )


def _opened(path: Path) -> Reading:
    try:
        return Reading.from_bytes(path.read_bytes())
    except (OSError, KeyError) as problem:
        raise ValueError(
            f"{path.name} is not a whole netCDF file ({problem}); it may have been cut off in copying."
        ) from problem
