"""A notebook run without a browser keeps a picture of what its bench measured."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

CELLS = (
    """import torch
import workbench as wb
from workbench.zoo.digits import digits
from workbench.zoo.nets import dense
images, classes = digits().test
subject = wb.Subject(dense([64, 8, 10]), (images[:64], classes[:64]))""",
    "bench = wb.explore(subject)\nbench",
    "bench.session.job.wait(20).probe.name",
)


@pytest.mark.notebook
def test_a_picture_is_in_the_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in CELLS])
    NotebookClient(book, timeout=120, kernel_name="python3", store_widget_state=False).execute(cwd=str(tmp_path))
    view, still = book.cells[1].outputs
    assert "application/vnd.jupyter.widget-view+json" in view.data
    assert still.data["image/png"].startswith("iVBOR")
    assert "application/vnd.plotly.v1+json" in still.data
    assert still.data["text/plain"].startswith(book.cells[2].outputs[0].data["text/plain"].strip("'"))
    assert len(nbformat.writes(book)) < 400_000
