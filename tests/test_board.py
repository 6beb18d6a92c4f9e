"""The board: states in order, from any thread, without waiting for a slow listener."""

from __future__ import annotations

import threading

import pytest

from workbench.board import Board, JobState

LONG = 20.0


def test_states_are_told_in_order_from_any_thread_without_waiting() -> None:
    told: list[float] = []
    inside, go_on = threading.Event(), threading.Event()

    def slow(state: JobState) -> None:
        told.append(state.done)
        inside.set()
        assert go_on.wait(LONG)

    board = Board(threading.Condition(), slow)
    board.put(JobState("running", 0.1))
    teller = threading.Thread(target=board.tell)
    teller.start()
    assert inside.wait(LONG)
    for done in (0.2, 0.3):
        board.put(JobState("running", done))
        board.tell()  # returns, though the listener is busy
    go_on.set()
    teller.join(LONG)
    assert told == [0.1, 0.3]


def test_what_a_listener_raised_stays_in_the_words_until_something_new_begins() -> None:
    board = Board(threading.Condition(), lambda _: 1 / 0)
    board.put(JobState("running", message="half way."))
    board.tell()
    assert board.state.message == "half way. on_state raised ZeroDivisionError: division by zero"
    board.put(JobState("done"))
    board.tell()
    assert board.state.message == "on_state raised ZeroDivisionError: division by zero"
    board.start_over(JobState("queued"))
    assert board.state.message == ""


def test_an_interrupt_in_a_listener_passes_through_and_the_board_goes_on() -> None:
    told: list[JobState] = []

    def interrupted(state: JobState) -> None:
        told.append(state)
        if len(told) == 1:
            raise KeyboardInterrupt

    board = Board(threading.Condition(), interrupted)
    board.put(JobState("queued"))
    with pytest.raises(KeyboardInterrupt):
        board.tell()
    board.put(JobState("running"))
    board.tell()
    assert [s.status for s in told] == ["queued", "running"]
