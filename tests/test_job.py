"""The job: one worker, latest wins, nothing swallowed, nothing kept alive. Gates decide the order."""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import toys
from gates import LONG, Gate, Gated, Log

from workbench.board import JobState
from workbench.job import Job
from workbench.numerics.sampling import Draw
from workbench.probe import ModelChanged, Probe, Reading, TooLarge
from workbench.store import Store


@pytest.fixture
def gates() -> Iterator[Callable[[int, int], None]]:
    """``gates(gate, n)`` lets n more readings through, or all."""
    Gated.gates.clear()
    Gated.gates.update({k: Gate() for k in range(20)})
    Gated.started.clear()
    Gated.closed.clear()
    yield lambda gate, n=float("inf"): Gated.gates[gate].open(n)
    for gate in Gated.gates.values():
        gate.open(float("inf"))


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def job(log: Log, tmp_path: object) -> Iterator[Job]:
    with Job(
        toys.ToySubject(), log.reading, log.state, Store(tmp_path / "readings"), interval=0.0, debounce=0.0
    ) as made:
        yield made


# ---------------------------------------------------------------------------- running


def test_a_job_runs_in_a_thread_of_its_own_and_tells_each_step(job: Job, log: Log) -> None:
    probe = toys.Trace(vectors=4)
    job.submit(probe, seed=7)
    found = job.wait(LONG)
    assert found.data.identical(probe.run(job.subject, seed=7).data)
    assert [r.done for r in log.readings] == [0.25, 0.5, 0.75, 1.0]
    assert job.latest is log.readings[-1] is found
    assert log.threads == {"workbench-job"}
    told = [s.status for s in log.states if s.status != "running"]
    assert told in (["queued", "done"], ["done"])  # a worker that starts at once leaves "queued" out of date
    assert [s.done for s in log.states] == sorted(s.done for s in log.states)
    last = log.states[-1]
    assert (last.done, last.remaining, last.from_store, last.cost, last.message) == (1.0, 0.0, False, "4 products", "")
    assert job.store.get(job.store.key(probe, job.subject, 7)).done == 1


def test_submit_returns_at_once_and_remaining_time_is_estimated(job: Job, log: Log, gates: Callable[..., None]) -> None:
    job.submit(Gated(vectors=4, gate=1))
    assert job.state.busy
    gates(1, 1)
    log.until(lambda: any(s.done == 0.25 for s in log.states))
    state = job.state
    assert state.status == "running"
    assert state.remaining == pytest.approx(state.elapsed * 3)
    with pytest.raises(TimeoutError, match="25% done"):
        job.wait(0.01)
    gates(1)
    assert job.wait(LONG).done == 1


def test_the_state_cannot_be_changed_from_outside(job: Job) -> None:
    assert job.state == JobState("idle")
    with pytest.raises(AttributeError):
        job.state.status = "done"


def test_a_budget_ends_a_run_as_done_with_words_and_keeps_what_was_reached(job: Job) -> None:
    probe = toys.Trace(vectors=5000, pause=0.001)
    job.submit(probe, seconds=0.02)
    found = job.wait(LONG)
    assert 0 < found.done < 1
    assert (job.state.status, job.state.done) == ("done", found.done)
    assert "time budget" in job.state.message
    assert job.store.partial(job.store.key(probe, job.subject)).data.identical(found.data)


# -------------------------------------------------------------------------- the store


def test_a_setting_seen_before_comes_from_the_store_without_a_run(
    job: Job, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.submit(toys.Trace())
    first = job.wait(LONG)
    monkeypatch.setattr(toys.Trace, "stream", lambda *_: pytest.fail("measured again"))
    job.debounce = LONG  # what is seen is not held back by a slider that moves
    job.submit(toys.Trace())
    job.submit(toys.Trace())
    assert job.wait(LONG / 2).data.identical(first.data)
    assert job.state.from_store
    assert job.state.status == "done"
    assert log.readings[-1].data.identical(first.data)


def test_without_a_store_everything_is_measured() -> None:
    with Job(toys.ToySubject(), store=False) as job:
        for _ in range(2):
            job.submit(toys.Trace())
            assert job.wait(LONG).done == 1
            assert not job.state.from_store


def test_a_full_disk_is_said_and_the_reading_is_there(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left; free some")

    monkeypatch.setattr(Store, "save", full)
    job.submit(toys.Trace())
    assert job.wait(LONG).done == 1
    assert job.state.status == "done"
    assert "Not stored" in job.state.message
    assert "free some" in job.state.message


# --------------------------------------------------------------------------- latest wins


def test_the_first_submit_runs_at_once_and_of_many_more_only_the_last(
    job: Job, log: Log, gates: Callable[..., None]
) -> None:
    job.debounce = 0.3
    job.submit(Gated(gate=0))
    log.until(lambda: Gated.started == [0])
    for k in range(1, 10):
        job.submit(Gated(gate=k))
    for k in range(10):
        gates(k)
    assert job.wait(LONG).probe.gate == 9
    assert Gated.started == Gated.closed == [0, 9]
    assert {r.probe.gate for r in log.readings} <= {9}


def test_a_run_that_was_overtaken_delivers_nothing_more(job: Job, log: Log, gates: Callable[..., None]) -> None:
    job.submit(Gated(gate=0, vectors=5))
    gates(0, 2)
    log.until(lambda: len(log.readings) == 2)
    job.submit(Gated(gate=1, vectors=2))
    assert job.latest is None, "nothing of the old run passes for the new one's"
    gates(1)
    gates(0)
    assert job.wait(LONG).probe.gate == 1
    assert [r.probe.gate for r in log.readings] == [0, 0, 1, 1]
    assert job.store.find(partial=True) == [], "what a slider passed over is not worth the disk"


def test_cancel_stops_at_the_next_reading_and_keeps_the_best(job: Job, log: Log, gates: Callable[..., None]) -> None:
    probe = Gated(gate=0, vectors=5)
    job.submit(probe)
    gates(0, 2)
    log.until(lambda: len(log.readings) == 2)
    job.cancel()
    assert job.state.status == "cancelled", "said at once, though the step is still under way"
    log.until(lambda: log.status("cancelled"))
    gates(0)
    assert job.wait(LONG).done == 0.4
    assert (len(log.readings), Gated.closed) == (2, [0])
    assert job.store.partial(job.store.key(probe, job.subject)).done == pytest.approx(0.6)
    job.cancel()
    assert job.state.status == "cancelled"


def test_what_was_cancelled_before_its_first_reading_has_none(job: Job, gates: Callable[..., None]) -> None:
    with pytest.raises(RuntimeError, match="nothing was submitted"):
        job.wait(LONG)
    job.submit(Gated(gate=0))
    job.cancel()
    gates(0)
    with pytest.raises(RuntimeError, match="cancelled before its first reading"):
        job.wait(LONG)


def test_a_waiting_submit_can_be_cancelled(job: Job) -> None:
    job.debounce = LONG
    job.submit(toys.Trace(vectors=2))
    job.wait(LONG)
    job.submit(toys.Trace(vectors=3))
    assert job.state.status == "queued"
    job.cancel()
    with pytest.raises(RuntimeError, match="cancelled"):
        job.wait(LONG / 4)


def test_submits_from_many_threads_end_with_one_answer(job: Job) -> None:
    def hammer(start: int) -> None:
        for k in range(20):
            job.submit(toys.Trace(vectors=2 + k), seed=start)

    threads = [threading.Thread(target=hammer, args=(s,)) for s in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    job.submit(toys.Trace(vectors=9), seed=77)
    found = job.wait(LONG)
    assert (found.probe.vectors, found.provenance["seed"], found.done) == (9, 77, 1.0)
    assert job.state.status == "done"


# --------------------------------------------------------------------------- back pressure


def test_readings_are_thinned_and_the_last_always_comes(log: Log) -> None:
    with Job(toys.ToySubject(), log.reading, store=False, interval=1000.0) as job:
        job.submit(toys.Trace(vectors=50))
        job.wait(LONG)
    assert [r.done for r in log.readings] == [0.02, 1.0]


def test_a_front_end_that_has_not_drawn_yet_holds_back_all_but_the_last(log: Log) -> None:
    with Job(toys.ToySubject(), log.reading, store=False, interval=0.0, ready=lambda: False) as job:
        job.submit(toys.Trace(vectors=20))
        job.wait(LONG)
    assert [r.done for r in log.readings] == [0.05, 1.0]


def test_a_front_end_that_never_answers_is_not_waited_for_for_ever(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.job.PATIENCE", 0.0)
    with Job(toys.ToySubject(), log.reading, store=False, interval=0.0, ready=lambda: False) as job:
        job.submit(toys.Trace(vectors=20))
        job.wait(LONG)
    assert len(log.readings) == 20


# ------------------------------------------------------------------------------ failures


def test_what_a_probe_raises_is_shown_kept_and_raised_again(job: Job, log: Log) -> None:
    job.submit(toys.Failing())
    for _ in range(2):
        with pytest.raises(ArithmeticError, match="the third vector is cursed"):
            job.wait(LONG)
    assert job.state.status == "failed"
    assert job.state.message == "ArithmeticError: the third vector is cursed"
    assert job.latest.done == 0.4
    assert job.store.find() == job.store.find(partial=True) == []
    job.submit(toys.Trace())
    assert job.wait(LONG).done == 1
    assert job.state.message == ""


class Silent(toys.Trace):
    def stream(self, subject: toys.ToySubject, draw: Draw) -> Iterator[Reading]:
        return iter(())


@pytest.mark.parametrize(
    ("probe", "subject", "kind", "words"),
    [
        (toys.Trace(), toys.ToySubject(room=1), TooLarge, "use fewer examples"),
        (toys.Trace(), "a model", TypeError, "looks at a subject; got a str"),
        (toys.Trace(), lambda: 1 / 0, ZeroDivisionError, "division by zero"),
        (Silent(), toys.ToySubject(), RuntimeError, "yielded no reading"),
    ],
)
def test_what_cannot_start_fails_with_words(
    probe: Probe, subject: object, kind: type[Exception], words: str, job: Job
) -> None:
    job.submit(probe, subject=subject)
    with pytest.raises(kind, match=words):
        job.wait(LONG)
    assert job.state.status == "failed"
    assert words in job.state.message


def test_training_the_same_model_meanwhile_stops_the_run_with_words_and_spares_the_training(
    job: Job, log: Log, gates: Callable[..., None]
) -> None:
    weights = job.subject.weights
    job.submit(Gated(gate=0))
    gates(0, 1)
    log.until(lambda: log.readings)
    weights.mul_(0.5)  # the user's cell takes a step
    gates(0)
    with pytest.raises(ModelChanged, match="snapshot"):
        job.wait(LONG)
    assert job.state.status == "failed"
    assert "weights changed" in job.state.message
    assert torch.equal(weights, torch.linspace(-0.5, 0.5, 12, dtype=torch.float64))
    assert len(log.readings) == 1
    assert job.store.find() == []


def test_a_callback_that_raises_stops_nothing_and_is_told(tmp_path: object) -> None:
    def broken(_: object) -> None:
        raise KeyError("no such widget")

    with Job(toys.ToySubject(), broken, broken, Store(tmp_path), interval=0.0) as job:
        for _ in range(2):
            job.submit(toys.Trace())
            assert job.wait(LONG).done == 1
            assert job.state.status == "done"
            for name in ("on_reading", "on_state"):
                assert job.state.message.count(f"{name} raised KeyError: 'no such widget'") == 1


def test_waiting_inside_a_callback_is_refused_instead_of_hanging(job: Job) -> None:
    job.on_reading = lambda _: job.wait()
    job.submit(toys.Trace())
    job.wait(LONG)
    assert "own worker" in job.state.message


def test_a_callback_may_submit_and_cancel(job: Job, log: Log) -> None:
    def follow_up(reading: Reading) -> None:
        log.reading(reading)
        if reading.probe.vectors == 5:
            job.submit(toys.Trace(vectors=3))

    job.on_reading = follow_up
    job.submit(toys.Trace(vectors=5))
    log.until(lambda: any(r.probe.vectors == 3 and r.done == 1 for r in log.readings))
    assert job.wait(LONG).probe.vectors == 3


def test_an_interrupt_while_waiting_cancels_the_run_and_nothing_else(
    job: Job, log: Log, gates: Callable[..., None]
) -> None:
    before = job.subject.weights.clone()
    job.submit(Gated(gate=0))
    gates(0, 1)
    log.until(lambda: log.readings)
    # A shell that starts this in the background has switched Ctrl-C off; a person at a kernel has it on.
    asked = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.2, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            job.wait(LONG)
    finally:
        signal.signal(signal.SIGINT, asked)
    assert job.state.status == "cancelled"
    gates(0)
    assert job.wait(LONG).done == 0.2
    assert torch.equal(job.subject.weights, before)
    job.submit(toys.Trace())
    assert job.wait(LONG).done == 1
