"""The served page's parts, driven without a browser: the same session behind another toolkit."""

from __future__ import annotations

from pathlib import Path as File
from typing import Any

import pytest
from ui.test_session import until
from ui.toys import Path, Still

from workbench.board import JobState
from workbench.ui.app import Page, runs_in
from workbench.ui.session import Session


def opened(**targets: Any) -> Page:
    page = Page({name: (lambda t=target: Session(t)) for name, target in targets.items()})
    until(lambda: page.session is not None)
    return page


def finish(page: Page) -> None:
    until(lambda: page.session.state.status in ("done", "failed", "cancelled"))


def test_a_page_measures_at_once_and_a_slider_measures_again() -> None:
    page = opened(path=Path())
    finish(page)
    first = page.figure.object.data[0].y[1]
    page.step.value = 10
    finish(page)
    assert page.figure.object.data[0].y[1] == pytest.approx(first * 10 / 50)
    assert page.bar.value == 100
    assert "±" in page.summary.object
    assert "subject(10)" in page.code.object


def test_choose_cancel_and_fail() -> None:
    page = opened(still=Still())
    page.probe.value = "Endless"
    until(lambda: page.session.latest is not None and page.session.latest.probe.name == "Endless")
    page.cancel.clicks += 1
    finish(page)
    assert "cancelled" in page.progress.object
    page.probe.value = "Broken"
    until(lambda: "wb-error" in page.status.object)
    assert "&lt;b&gt;" in page.status.object


def test_another_run_gets_a_session_of_its_own() -> None:
    page = opened(a=Path(1.0), b=Path(3.0))
    finish(page)
    first, before = page.session, page.figure.object.data[0].y[1]
    page.folder.value = "b"
    assert page.session is not first
    finish(page)
    assert page.figure.object.data[0].y[1] == pytest.approx(3 * before)


def test_export_writes_the_file(tmp_path: File) -> None:
    page = opened(still=Still())
    finish(page)
    page.file.value = str(tmp_path / "wave")
    page.format.value = "png"
    page.export.clicks += 1
    until(lambda: "Wrote" in page.status.object, 30)
    assert (tmp_path / "wave.png").read_bytes()[:4] == b"\x89PNG"


def test_an_exception_in_a_callback_is_shown() -> None:
    page = opened(still=Still())
    finish(page)
    row = next(r for r in page.form[0] if "wb-set-offset" in r.css_classes)
    row[0].value = float("inf")
    assert "Wave.offset must be finite" in page.status.object


def test_a_folder_without_runs_says_what_to_do(tmp_path: File) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no recorded runs; record one with wb\.Recorder"):
        runs_in(tmp_path)


def test_what_the_page_shows_itself_is_not_undone_by_what_was_still_on_its_way() -> None:
    page, later = opened(still=Still()), list[Any]()
    finish(page)

    class Document:
        session_context = True
        add_next_tick_callback = staticmethod(later.append)

    page._document = Document()
    page._told(JobState("running", 0.01, remaining=483.0))
    page._guarded(lambda: page._told(JobState("cancelled", 0.01, message="cancelled")))()
    for work in later:
        work()
    assert "cancelled" in page.progress.object
    assert page.cancel.disabled
