"""The button that asks other packages: when it is offered, that it never blocks, and what it shows."""

from __future__ import annotations

import sys
import threading
from types import ModuleType
from typing import Any

import pytest
from ui.test_session import until
from ui.toys import Still, Wave

from workbench.interop import opinion
from workbench.interop.opinion import Answer, Opinion, Row
from workbench.ui.app import Page
from workbench.ui.bench import Bench
from workbench.ui.session import Session


class Others(ModuleType):
    """Another package about waves, which answers when it is let."""

    def __init__(self) -> None:
        super().__init__("others")
        self.let, self.asked = threading.Event(), list[Any]()
        self.problem: Exception | None = None

    def why_not(self, probe: Wave) -> str:
        return "square waves are beyond them" if probe.shape == "square" else ""

    def ask(self, reading: Any, subject: Any, seconds: float) -> Opinion:
        self.asked.append((reading, subject, threading.current_thread().name))
        assert self.let.wait(10)
        if self.problem:
            raise self.problem
        return Opinion("Wave", "at a height", (Row("top", 1.0, 0.1, (Answer("Other<i>", 1.5),)),))


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Others:
    module = Others()
    monkeypatch.setitem(sys.modules, "others", module)
    monkeypatch.setitem(opinion.OFFERED, "Wave", "others")
    return module


class OnBench:
    """The bench in JupyterLab as these tests use it."""

    def __init__(self, target: Any) -> None:
        self.made = Bench(Session(target))
        self.made._submit()

    @property
    def session(self) -> Session:
        return self.made.session

    def press(self) -> None:
        self.made.ask.value = True

    @property
    def shown(self) -> str:
        return self.made.opinion.value

    @property
    def said(self) -> str:
        return self.made.status.value


class OnPage(OnBench):
    """The served page."""

    def __init__(self, target: Any) -> None:
        self.made = Page({"": lambda: Session(target)})
        self.made._open()

    def press(self) -> None:
        self.made.ask.clicks += 1

    @property
    def shown(self) -> str:
        return self.made.opinion.object

    @property
    def said(self) -> str:
        return self.made.status.object


@pytest.fixture(params=[OnBench, OnPage])
def front(request: pytest.FixtureRequest, others: Others) -> Any:
    made = request.param(Still())
    until(lambda: not made.made.ask.disabled)
    return made


def test_it_answers_in_the_background_and_shows_the_table(front: Any, others: Others) -> None:
    front.press()
    until(lambda: others.asked)
    assert front.made.ask.disabled
    assert "Asking other packages" in front.said
    front.made.seed.value = front.made.seed.value  # callbacks go on meanwhile
    assert front.shown == ""
    others.let.set()
    until(lambda: "Other&lt;i&gt;" in front.shown)
    until(lambda: not front.made.ask.disabled)
    assert "+0.5 (+50 %)" in front.shown
    assert front.said == ""
    ((reading, subject, thread),) = others.asked
    assert reading is front.session.latest
    assert subject is front.session.target
    assert thread == "workbench-opinion"


def test_what_fails_is_said_in_the_status_line(front: Any, others: Others) -> None:
    others.problem = ArithmeticError("they <b>failed</b>")
    others.let.set()
    front.press()
    until(lambda: "ArithmeticError: they &lt;b&gt;failed" in front.said)
    assert "wb-error" in front.said
    until(lambda: not front.made.ask.disabled)
    assert front.shown == ""


def test_an_answer_about_an_earlier_reading_is_not_shown(front: Any, others: Others) -> None:
    front.press()
    until(lambda: others.asked)
    first = front.session.latest
    front.made.seed.value = 5
    until(lambda: front.session.latest.data is not first.data and front.session.latest.done == 1)
    others.let.set()
    until(lambda: not front.made.ask.disabled)
    assert front.shown == ""


def test_a_new_reading_takes_the_old_answer_away(front: Any, others: Others) -> None:
    others.let.set()
    front.press()
    until(lambda: "Other" in front.shown)
    front.made.seed.value = 7
    until(lambda: front.shown == "")


def test_it_is_offered_for_finished_readings_that_have_one(others: Others) -> None:
    session = Session(Still(), store=False)
    assert not session.offers_opinion
    heard: list[Any] = []
    session.ask_others(heard.append)
    until(lambda: not session._asking)
    assert heard == [None], "there is nothing on screen to speak about"
    session.settle(Wave(shape="square"))
    session.submit()
    session.job.wait(10)
    assert not session.offers_opinion
    session.settle(Wave())
    session.submit()
    session.job.wait(10)
    assert session.offers_opinion
