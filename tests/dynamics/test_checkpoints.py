"""Which checkpoints are read: what a person writes, against a filter written by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.dynamics.checkpoints import chosen_steps

RECORDED = st.lists(st.integers(0, 200), min_size=1, max_size=30, unique=True).map(sorted)


@st.composite
def questions(draw: st.DrawFn) -> tuple[list[int], str, set[int]]:
    """Recorded steps, words for some of them, and those that are meant: found by looking at every number there is."""
    steps, parts, meant = draw(RECORDED), list[str](), set[int]()
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["step", "last", "between", "from", "to"]))
        low, high = sorted((draw(st.sampled_from(steps)), draw(st.sampled_from(steps))))
        low, high = {"step": (low, low), "last": (max(steps),) * 2, "from": (low, 10**9), "to": (0, high)}.get(
            kind, (max(low - 1, 0), high + 1)
        )
        written = {"step": f"{low}", "last": "last", "from": f"{low}..", "to": f"..{high}"}
        parts.append(written.get(kind, f"{low}..{high}"))
        meant |= {number for number in range(201) if number in steps and low <= number <= high}
    return steps, draw(st.sampled_from([",", " , "])).join(parts), meant


@given(questions())
def test_words_choose_what_they_say(question: tuple[list[int], str, set[int]]) -> None:
    steps, words, meant = question
    assert chosen_steps(steps, words) == tuple(sorted(meant))
    assert chosen_steps(steps, sorted(meant)) == tuple(sorted(meant))
    assert chosen_steps(steps) == tuple(steps)


@given(questions(), st.integers(1, 40))
def test_every_so_many_of_these_keeps_both_ends(question: tuple[list[int], str, set[int]], every: int) -> None:
    steps, words, meant = question
    taken, order = chosen_steps(steps, words, every), sorted(meant)
    assert set(taken) == {step for place, step in enumerate(order) if place % every == 0} | {order[-1]}
    assert list(taken) == sorted(taken)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("7", "run a has no weights at step 7; it has 0, 10, 20, 30, 40 ... 170, 180, 190"),
        ([10, 7], "run a has no weights at step 7;"),
        ("11..19", r"run a has no weights at steps 11\.\.19; it has 0, 10"),
        ("30..10", r"run a has no weights at steps 30\.\.10;"),
        ("10,", r"as in 0,100\.\.500,last; got ''\. run a has 0, 10"),
        ("1.5", r"got '1\.5'"),
        ("-10", "got '-10'"),
        ([], "names no step; run a has 0, 10"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(wanted: str | list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        chosen_steps(range(0, 200, 10), wanted, label="run a")


def test_a_record_without_checkpoints_has_none_to_choose() -> None:
    assert chosen_steps(()) == ()
    with pytest.raises(ValueError, match="run a holds no checkpoints"):
        chosen_steps((), "last", label="run a")
