"""Figures on paper: exact widths, embedded fonts, and matplotlib as it was before."""

from __future__ import annotations

import io
import logging
import shutil
import subprocess
import sys
import warnings

import matplotlib as mpl
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from pictures import PICTURES, field, spectrum
from pypdf import PdfReader

from workbench.draw.export import render
from workbench.draw.fonts import choose
from workbench.draw.paper import paper
from workbench.draw.paper_style import styled
from workbench.draw.venues import HOUSE, venue, venues
from workbench.figure import Axis, Contour, Figure, Heat, Line, Panel, Points, Surface

TINY = Figure((Panel((Line([0.0, 1.0], [0.0, 1.0]),), Axis("x"), Axis("y")),))
EVERY = [(name, column) for name, columns in venues().items() for column in columns]


def fonts_of(content):
    """Names and kinds of the fonts of a PDF, and whether the file of each is inside."""
    found = {}
    for page in PdfReader(io.BytesIO(content)).pages:
        for font in page["/Resources"].get("/Font", {}).values():
            inner = font.get_object()
            base = inner["/DescendantFonts"][0].get_object() if "/DescendantFonts" in inner else inner
            described = base.get("/FontDescriptor", {})
            found[str(inner["/BaseFont"])] = (str(base["/Subtype"]), "/FontFile2" in described)
    return found


@pytest.mark.parametrize(
    ("name", "column"), [("icml2024", "half"), ("neurips2024", "full"), ("jmlr2001", "full"), (None, "half")]
)
def test_the_pdf_is_as_wide_as_the_column(name, column):
    where = venue(name, column)
    box = PdfReader(io.BytesIO(render(TINY, ".pdf", where))).pages[0].mediabox
    assert float(box.width) == pytest.approx(where.points, abs=0.1)


@pytest.mark.parametrize(("name", "column"), EVERY)
def test_every_venue_can_be_drawn_at_its_own_width(name, column):
    from tueplots import bundles

    where = venue(name, column)
    make = getattr(bundles, name)
    theirs = make(column=column) if len(venues()[name]) > 1 else make()
    with styled(where):
        page = paper(TINY, where)
    assert page.get_figwidth() == pytest.approx(theirs["figure.figsize"][0], abs=0.1 / 72)
    assert where.size == theirs["font.size"]


def test_widths_known_by_heart():
    known = {
        ("icml2024", "half"): 3.25,
        ("icml2024", "full"): 6.75,
        ("neurips2024", "full"): 5.5,
        ("iclr2024", "full"): 5.5,
    }
    assert {k: venue(*k).width for k in known} == pytest.approx(known)


def test_a_venue_or_column_that_does_not_exist_is_named_with_those_that_do():
    with pytest.raises(ValueError, match=r"no venue 'icml2042'.*'icml2024'.*neurips2024"):
        venue("icml2042")
    with pytest.raises(ValueError, match=r"'neurips2024' has no column 'half'; it has 'full'"):
        venue("neurips2024", "half")
    with pytest.raises(ValueError, match=r"it has 'half' and 'full'"):
        venue("icml2024", "third")
    assert venue("neurips2024").column == "full"
    assert venue("icml2024").column == "half"
    assert venue().name == HOUSE


@pytest.mark.parametrize("picture", PICTURES)
def test_fonts_are_embedded_truetype(picture):
    found = fonts_of(render(PICTURES[picture](), ".pdf", venue("icml2024")))
    assert found
    assert all(kind == "/CIDFontType2" and inside for kind, inside in found.values()), found
    assert any(choose(venue("icml2024")).name.replace(" ", "") in name for name in found)


@pytest.mark.skipif(shutil.which("pdffonts") is None, reason="poppler-utils is not installed")
def test_poppler_agrees_that_fonts_are_embedded(tmp_path):
    file = tmp_path / "figure.pdf"
    file.write_bytes(render(spectrum(), ".pdf", venue("jmlr2001")))
    rows = subprocess.run(["pdffonts", file], capture_output=True, text=True, check=True).stdout.splitlines()[2:]
    assert rows
    assert all("TrueType" in row and " yes yes yes " in row for row in rows), rows


def test_a_font_that_stands_in_for_another_is_said():
    found = choose(venue("icml2024"))
    assert found.name == found.wanted or "in place of" in found.words


@pytest.mark.parametrize("suffix", [".pdf", ".svg", ".png", ".pgf"])
def test_matplotlib_is_as_before(suffix, monkeypatch):
    monkeypatch.setitem(mpl.rcParams, "lines.linewidth", 7.5)
    before, filters = dict(mpl.rcParams), list(logging.getLogger("fontTools").filters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = render(spectrum(), suffix)
    assert dict(mpl.rcParams) == before
    assert logging.getLogger("fontTools").filters == filters
    monkeypatch.setitem(mpl.rcParams, "lines.linewidth", 1.0)
    assert render(spectrum(), suffix) == first


def test_matplotlib_is_as_before_after_an_error():
    before = dict(mpl.rcParams)
    solid = field(Surface).panels[0]
    bad = Figure((Panel((*solid.marks, Heat([0.0], [0.0], [[1.0]])), solid.x, solid.y, solid.z),))
    with pytest.raises(ValueError, match="Heat"):
        render(bad, ".pdf")
    assert dict(mpl.rcParams) == before


def test_nothing_that_switches_backends_or_starts_a_browser_is_imported():
    code = """
import sys
sys.path.insert(0, "tests")
from pictures import PICTURES
from workbench.draw.export import render
render(PICTURES["landscape"](), ".pdf")
bad = {"matplotlib.pyplot", "kaleido", "choreographer", "plotly", "ipywidgets"} & set(sys.modules)
assert not bad, bad
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", [Contour, Surface])
def test_fields_of_common_size_are_lines_and_areas_not_images(kind):
    content = render(field(kind, points=21), ".pdf", venue("icml2024"))
    images = [i for p in PdfReader(io.BytesIO(content)).pages for i in p.images]
    assert all(min(i.image.size) <= 64 or max(i.image.size) / min(i.image.size) > 5 for i in images)  # colour bars only


@pytest.mark.parametrize(
    "mark",
    [Line([], []), Points([], []), Heat([0.0], [0.0], [[float("nan")]]), Contour([0.0], [0.0, 1.0], [[1.0], [2.0]])],
)
def test_first_readings_with_hardly_any_data_can_be_drawn(mark):
    figure = Figure((Panel((mark,), Axis("x"), Axis("y"), Axis("z", "log")),))
    assert render(figure, ".png", dpi=50).startswith(b"\x89PNG")


@pytest.mark.skipif(shutil.which("latex") is None, reason="LaTeX is not installed; usetex=True is what needs it")
def test_latex_sets_the_words_when_asked_to():
    """Computer Modern, embedded, and not one of the fonts that matplotlib would have chosen."""
    content = render(field(), ".pdf", venue("jmlr2001"), usetex=True)
    assert b"CMR" in content
    assert choose(venue("jmlr2001")).name.replace(" ", "").encode() not in content


def test_words_for_latex_are_escaped(monkeypatch):
    from workbench.draw.paper_marks import folded, plain

    assert plain("95 % of $5_a") == r"95 % of \$5_a"
    monkeypatch.setitem(mpl.rcParams, "text.usetex", True)
    assert plain("95 % of $5_a") == r"95 \% of \$5\_a"
    assert folded("eigenvalue, linear below 0.01", 1.0, 9.0) == "eigenvalue,\nlinear below\n0.01"


@pytest.mark.parametrize(("column", "panels"), [("half", 2), ("half", 3), ("full", 3)])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_legend_is_no_wider_than_its_panel(column, panels, count):
    words = ("share of all along the direction", "what $5 buy by chance in as many directions", "short", "one", "two")
    names = words[:count]
    first = Panel(tuple(Line([0.0, 1.0], [i, i + 1.0], label=n) for i, n in enumerate(names)), Axis("x"), Axis("y"))
    with styled(venue("icml2024", column)):
        page = paper(Figure((first, *TINY.panels * (panels - 1))), venue("icml2024", column))
        FigureCanvasAgg(page).draw()
        axes = page.axes[0]
        legend, label = axes.get_legend().get_window_extent(), axes.yaxis.label.get_window_extent()
        others = [other.get_window_extent() for other in page.axes]
    assert legend.x0 > label.x1
    assert legend.x1 <= min((o.x0 for o in others[1:] if abs(o.y1 - others[0].y1) < 1), default=page.bbox.x1)
    assert legend.y1 <= page.bbox.y1 + 1
    assert others[0].height > 0.35 * others[0].width
    assert others[0].width > 0.55 * page.bbox.width / min(panels, 3 if column == "full" else 2)
    assert [t.get_text().replace("\n", " ") for t in axes.get_legend().get_texts()] == [
        n.replace("$", r"\$") for n in names
    ]
