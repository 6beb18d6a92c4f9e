"""A job beside training, subjects opened late, and what is left when it ends: nothing."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import torch
import toys
from gates import LONG, Gate, Gated, Log
from torch import nn

from workbench.job import Job
from workbench.probe import ModelChanged
from workbench.subject import Subject


@pytest.fixture
def gates() -> Iterator[Callable[..., None]]:
    Gated.gates.clear()
    Gated.gates[0] = Gate()
    Gated.closed.clear()
    yield lambda gate, n=float("inf"): Gated.gates[gate].open(n)
    Gated.gates[0].open(float("inf"))


def test_a_subject_can_be_opened_in_the_worker_once() -> None:
    job = Job(store=False)
    opened: list[str] = []

    def open_checkpoint() -> toys.ToySubject:
        opened.append(threading.current_thread().name)
        return toys.ToySubject(label="step 10")

    for vectors in (3, 4, 3):
        job.submit(toys.Trace(vectors=vectors), subject=open_checkpoint)
        assert job.wait(LONG).provenance["subject"]["model"] == "step 10"
    job.submit(toys.Trace(vectors=6))
    assert job.wait(LONG).provenance["subject"]["model"] == "step 10", "looked at from then on"
    assert opened == ["workbench-job"]
    job.close()


def test_close_ends_the_thread_lets_the_subject_go_and_refuses_more() -> None:
    subject = toys.ToySubject()
    job = Job(subject, store=False)
    job.submit(toys.Failing())
    with pytest.raises(ArithmeticError):
        job.wait(LONG)
    worker = job._worker
    job.close()
    assert not worker.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        job.submit(toys.Trace())
    with pytest.raises(ArithmeticError):
        job.wait(LONG)
    gone = weakref.ref(subject.weights)
    del subject
    gc.collect()
    assert gone() is None, "an exception's frames would keep it"


def test_a_forgotten_job_goes_away_with_its_thread_and_subject() -> None:
    subject, bench = toys.ToySubject(), Log()
    job = bench.job = Job(subject, on_reading=bench.reading, store=False)  # what is called back knows the job
    job.submit(toys.Trace())
    job.wait(LONG)
    worker, gone = job._worker, (weakref.ref(job), weakref.ref(subject.weights))
    del job, subject, bench
    for _ in range(100):
        gc.collect()
        worker.join(0.05)
        if not worker.is_alive():
            break
    assert not worker.is_alive()
    assert [ref() for ref in gone] == [None, None]


def test_closing_during_a_run_stops_it(gates: Callable[..., None]) -> None:
    log = Log()
    with Job(toys.ToySubject(), log.reading, log.state, store=False, interval=0.0) as job:
        job.submit(Gated(gate=0, vectors=5))
        gates(0, 1)
        log.until(lambda: log.readings)
        gates(0, 1)
        gates(0)
        job.cancel()
    assert not job._worker.is_alive()
    assert Gated.closed == [0]
    assert log.states[-1].status in ("cancelled", "done")


def train(model: nn.Module, steps: int, between: Callable[[int], None] = lambda _: None) -> bytes:
    """Plain training with momentum and dropout; the bytes of all weights, buffers and random states at its end."""
    x, y = toys.examples()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    torch.manual_seed(0)
    for step in range(steps):
        between(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    tensors = (*model.state_dict().values(), torch.get_rng_state())
    return b"".join(t.numpy().tobytes() for t in tensors)


@pytest.mark.parametrize("look", ["live", "snapshot"])
def test_training_goes_on_bit_for_bit_beside_a_job(look: str) -> None:
    """The cell trains while the worker probes the same model: training is as without; the probe stops or is whole."""
    from workbench.probes.collapse import NeuralCollapse
    from workbench.probes.spectrum import HessianSpectrum

    undisturbed = train(toys.net(), 40)
    model = toys.net()
    subject = Subject(model, toys.examples(), loss="cross_entropy")
    subject = subject.snapshot() if look == "snapshot" else subject
    alone = HessianSpectrum(top=3).run(subject.snapshot())
    with Job(subject, store=False, interval=0.0, debounce=0.0) as job:
        probes = [HessianSpectrum(top=3), NeuralCollapse()]
        assert train(model, 40, lambda step: job.submit(probes[step % 2])) == undisturbed
        if look == "snapshot":
            job.submit(probes[0])
            assert job.wait(LONG).data.identical(alone.data)
        else:
            with suppress(ModelChanged):
                assert job.wait(LONG).done == 1
            assert job.state.status == "done" or "snapshot" in job.state.message
