"""Every notebook runs from top to bottom in a fresh folder, and keeps pictures for readers without a kernel."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").rglob("*.ipynb"))
NOTEBOOKS = [p for p in NOTEBOOKS if ".ipynb_checkpoints" not in p.parts]


def pictures(cell: nbformat.NotebookNode) -> list[str]:
    """The base64 of every PNG that a cell left behind."""
    return [o["data"]["image/png"] for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs_and_checks_its_own_numbers(path: Path, tmp_path: Path):
    notebook = nbformat.read(path, as_version=4)
    checks = [c for c in notebook.cells if "checks" in c.metadata.get("tags", [])]
    assert checks, "a notebook asserts its numbers in a cell tagged 'checks'"
    assert all("assert" in c.source for c in checks)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=240, resources=where, store_widget_state=False).execute()
    drawing = [c for c in notebook.cells if c.cell_type == "code" and c.get("id") in ("bench", "landscape", "collapse")]
    assert path.stem != "00_tour" or len(drawing) == 3
    for cell in drawing:
        assert pictures(cell), f"cell {cell['id']!r} left no picture for readers without a kernel"
