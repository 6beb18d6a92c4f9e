"""Second opinions: which rows there are, what is said about differences, and what is refused."""

from __future__ import annotations

import gc
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from interop.test_pyhessian import Weights, exact, quadratic
from toys import examples, net

from workbench.interop import curvlinops
from workbench.interop.opinion import Answer, Opinion, Row
from workbench.plan import Plan
from workbench.probe import Reading
from workbench.probes.collapse import NeuralCollapse
from workbench.probes.spectrum import HessianSpectrum
from workbench.subject import Subject


def asked(subject: Subject, seconds: float = 60.0, **settings: Any) -> tuple[Reading, Opinion]:
    reading = HessianSpectrum(**settings).run(subject)
    return reading, reading.second_opinion(seconds=seconds)


def row(opinion: Opinion, quantity: str) -> Row:
    return next(r for r in opinion.rows if r.quantity == quantity)


def theirs(opinion: Opinion, quantity: str) -> Answer:
    return next(a for a in row(opinion, quantity).answers if a.package == "PyHessian")


def test_where_both_are_exact_they_agree_within_the_error_and_rounding() -> None:
    subject = quadratic(9.0, 1e-4, 1e-5)
    _, opinion = asked(subject, top=1, tolerance=1e-6)
    first = row(opinion, "eigenvalue 1")
    assert first.ours == pytest.approx(9)
    assert abs(first.relative(first.answers[0])) < 2.5e-6
    assert "two millionths" in first.answers[0].words
    # A quadratic has an exact trace for ±1 vectors, and all of its directions are in the Lanczos basis.
    assert row(opinion, "trace").within(theirs(opinion, "trace"))
    assert theirs(opinion, "trace").words == ""


def test_negative_eigenvalues_are_matched_with_the_minimum_and_said() -> None:
    _, opinion = asked(quadratic(5.0, -4.0, 3.0, 1.0, -0.5), top=3, tolerance=1e-3)
    second, third = theirs(opinion, "eigenvalue 2"), theirs(opinion, "eigenvalue 3")
    assert theirs(opinion, "eigenvalue 1").value == pytest.approx(5, rel=1e-2)
    assert second.value == pytest.approx(3, rel=2e-2)
    assert "found as number 3, since power iteration goes by magnitude" in second.words
    assert str(third.value) == "nan"
    assert "not found: 1 of its values is negative" in third.words
    assert theirs(opinion, "eigenvalue_min").value == pytest.approx(-4, rel=2e-2)


def test_its_early_stop_is_named_with_the_residual_that_covers_the_difference() -> None:
    subject = Subject(net(), examples())
    reading, opinion = asked(subject, top=2, tolerance=1e-4)
    wanted = exact(subject)
    first = row(opinion, "eigenvalue 1")
    (answer,) = (a for a in first.answers if a.package == "PyHessian")
    assert first.ours == pytest.approx(wanted[-1], rel=1e-6)
    assert first.within(answer) is False
    assert first.difference(answer) == pytest.approx(answer.value - wanted[-1], rel=1e-5)
    assert first.relative(answer) == pytest.approx(answer.value / wanted[-1] - 1, rel=1e-5)
    assert "stopped after" in answer.words
    assert "two steps differed by less than 0.001" in answer.words
    assert "covers the difference" in answer.words
    assert min(abs(answer.value - wanted)) <= answer.error, "the residual that is printed is a bound"
    again = reading.second_opinion()
    assert theirs(again, "eigenvalue 1").value == answer.value, "the reading's seed decides"


@pytest.mark.parametrize("chunk", [None, 8])
def test_curvlinops_is_a_third_voice_and_agrees(chunk: int | None) -> None:
    subject = Subject(net(), examples()).with_plan(Plan(chunk=chunk))
    before = torch.get_rng_state()
    _, opinion = asked(subject, top=3, trace=False)
    assert torch.equal(torch.get_rng_state(), before)
    wanted = exact(subject)[::-1]
    for rank in range(3):
        found = row(opinion, f"eigenvalue {rank + 1}")
        (answer,) = (a for a in found.answers if a.package == "curvlinops")
        assert answer.value == pytest.approx(wanted[rank], rel=1e-9)
        assert found.within(answer)
    assert any("ARPACK" in note for note in opinion.notes)


def test_where_curvlinops_fails_the_rest_of_the_table_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    def largest(*_: Any) -> None:
        raise NotImplementedError("no forward mode")

    monkeypatch.setattr(curvlinops, "largest", largest)
    _, opinion = asked(Subject(net(), examples()), top=1, trace=False)
    assert opinion.packages == ("PyHessian",)
    assert "curvlinops could not: NotImplementedError: no forward mode" in opinion.notes


def test_time_is_kept_and_said() -> None:
    _, opinion = asked(Subject(net(), examples()), top=5, seconds=1e-3)
    assert "not found: time was up" in theirs(opinion, "eigenvalue 5").words
    assert "time was up" in theirs(opinion, "trace").words
    assert any("seconds=" in note for note in opinion.notes)


def test_it_is_asked_about_the_same_layers() -> None:
    subject = Subject(Weights(5.0, 2.0), (torch.ones(4, 1).double(), torch.ones(4, 1).double()), loss=_mean)
    _, opinion = asked(subject, layers="weights", top=2, trace=False, minimum=False)
    assert [r.quantity for r in opinion.rows] == ["eigenvalue 1", "eigenvalue 2"]
    assert theirs(opinion, "eigenvalue 2").value == pytest.approx(2, rel=1e-2)


def _mean(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return out.mean()


def test_tables_and_pages() -> None:
    opinion = Opinion(
        "P<i>",
        "on 3",
        (
            Row("a<b>", 2.0, 0.1, (Answer("X", 2.05), Answer("Y", 2.5, 0.2, "for <this> reason"))),
            Row("zero", 0.0, float("nan"), (Answer("X", 1.0),)),
        ),
        ("note & more",),
    )
    frame = opinion.to_frame()
    assert frame.package.tolist() == ["X", "Y", "X"]
    assert frame.difference.tolist() == pytest.approx([0.05, 0.5, 1.0])
    assert frame.relative.tolist() == pytest.approx([0.025, 0.25, float("nan")], nan_ok=True)
    assert frame.within_error.tolist() == [True, False, None]
    page = opinion._repr_html_()
    assert "<b>" not in page
    assert "for &lt;this&gt; reason" in page
    assert "note &amp; more" in page
    for word in ("2.5 ± 0.2", "+0.5 (+25 %)", "for <this> reason", "note & more"):
        assert word in str(opinion)
    assert opinion.packages == ("X", "Y")


# What is refused ------------------------------------------------------------------------------------------------------


def test_the_subject_is_remembered_weakly_and_travels_nowhere() -> None:
    subject = Subject(net(), examples())
    reading = HessianSpectrum(top=1, trace=False, density=False).run(subject, plan={"chunk": 8})
    assert reading.made_on() is subject, "also where it ran by another plan"
    assert "made_on" not in repr(reading)
    assert replace(reading, done=0.5).made_on() is subject
    for travelled in (pickle.loads(pickle.dumps(reading)), Reading.from_bytes(reading.to_bytes())):
        with pytest.raises(ValueError, match=r"pass it, reading\.second_opinion\(subject\)"):
            travelled.second_opinion()
        assert travelled.second_opinion(subject, seconds=5).rows
    del subject
    gc.collect()
    assert reading.made_on() is None
    with pytest.raises(ValueError, match="not there any more"):
        reading.second_opinion()


def test_another_subject_is_refused_and_so_is_one_trained_since() -> None:
    model = net()
    subject = Subject(model, examples())
    reading = HessianSpectrum(top=1, trace=False, density=False).run(subject)
    with pytest.raises(ValueError, match="not what this reading was made on"):
        reading.second_opinion(Subject(model, examples(), max_examples=20))
    assert reading.second_opinion(subject.snapshot(), seconds=5).rows
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    with pytest.raises(ValueError, match=r"trained since\?"):
        reading.second_opinion()


def test_probes_and_settings_that_nobody_else_knows() -> None:
    subject = Subject(net(), examples())
    with pytest.raises(ValueError, match=r"NeuralCollapse; there are second opinions on .*HessianSpectrum"):
        NeuralCollapse().run(subject).second_opinion()
    reading = HessianSpectrum(operator="ggn", top=1, trace=False, density=False).run(subject)
    with pytest.raises(ValueError, match="operator='hessian' only; this spectrum is of 'ggn'"):
        reading.second_opinion()
    with pytest.raises(ValueError, match="seconds must be a positive number; got 0"):
        HessianSpectrum(top=1, trace=False, density=False).run(subject).second_opinion(seconds=0)
