"""Probes and readings: the one loop around every stream, and a reading that keeps what it says."""

from __future__ import annotations

import getpass
import json
import math
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
import torch
import toys
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from workbench.figure import Figure
from workbench.numerics.sampling import Draw
from workbench.plan import Plan
from workbench.probe import ModelChanged, Probe, Reading, TooLarge, Variable, drive
from workbench.schema import Doc, Range


@dataclass(frozen=True)
class Scripted(toys.Trace):
    """Does as a test says at each step: raises what it finds in ``script``, else yields."""

    script: ClassVar[dict[int, Any]] = {}
    closed: ClassVar[list[str]] = []

    def stream(self, subject: Any, draw: Draw) -> Iterator[Reading]:
        try:
            for count, reading in enumerate(super().stream(subject, draw)):
                act = self.script.get(count)
                if callable(act):
                    act = act(subject)
                if isinstance(act, BaseException):
                    raise act
                yield reading
        finally:
            self.closed.append("closed")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    made: dict[int, Any] = {}
    monkeypatch.setattr(Scripted, "script", made)
    Scripted.closed.clear()
    return made


def subject(chunk: int | None = None) -> toys.ToySubject:
    return toys.ToySubject(plan=Plan(chunk=chunk))


# --------------------------------------------------------------------------------- running


def test_run_returns_the_last_reading_and_hands_out_all() -> None:
    seen: list[Reading] = []
    last = toys.Trace(vectors=4).run(subject(), seed=5, on_reading=seen.append)
    assert seen[-1] is last
    assert [r.done for r in seen] == [0.25, 0.5, 0.75, 1.0]
    vectors = [Draw(5, "Trace", 12)(i) for i in range(4)]
    exact = [float((torch.arange(1, 13) * v * v).sum()) for v in vectors]
    assert np.allclose(last.data["sample"], exact, rtol=1e-14)
    assert last.summary["trace"] == pytest.approx(np.mean(exact), rel=1e-14)


def test_a_budget_ends_the_run_at_the_best_by_then() -> None:
    assert toys.Trace(vectors=5).run(subject(), seconds=0).done == 0.2
    cut = toys.Trace(vectors=5000, pause=0.001).run(subject(), seconds=0.02)
    assert 0 < cut.done < 1
    assert not cut.converged
    assert toys.Trace(vectors=3).run(subject(), seconds=60.0).done == 1


def test_what_a_probe_does_not_look_at_is_refused_with_the_way_to_make_it() -> None:
    with pytest.raises(TypeError, match=r"Trace looks at a subject; got a Linear\. Make one with wb\.Subject"):
        toys.Trace().run(torch.nn.Linear(1, 1))
    pair = toys.ToySubject()
    pair.kind = "pair"
    with pytest.raises(TypeError, match="got a pair"):
        toys.Trace().run(pair)


def test_too_large_is_said_before_anything_starts(script: dict[int, Any]) -> None:
    with pytest.raises(TooLarge, match=r"Scripted would need .* GiB \(5 products\) .* use fewer examples"):
        Scripted().run(toys.ToySubject(room=10))
    assert Scripted.closed == []


def test_a_stream_without_readings_is_a_fault_of_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toys.Trace, "stream", lambda *_: iter(()))
    with pytest.raises(RuntimeError, match="Trace yielded no reading"):
        toys.Trace().run(subject())


def test_weights_written_meanwhile_end_the_run(script: dict[int, Any]) -> None:
    script[2] = lambda s: s.weights.mul_(2)
    seen: list[Reading] = []
    with pytest.raises(ModelChanged, match=r"subject\.snapshot\(\)"):
        Scripted().run(subject(), on_reading=seen.append)
    assert [r.done for r in seen] == [0.2, 0.4]
    assert Scripted.closed == ["closed"]


def test_torchs_own_word_for_it_is_translated(script: dict[int, Any]) -> None:
    script[1] = RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation"
    )
    with pytest.raises(ModelChanged, match="snapshot"):
        Scripted().run(subject())


@pytest.mark.parametrize("ending", ["closed", "thrown into", "failed"])
def test_a_stream_is_closed_however_it_ends(ending: str, script: dict[int, Any]) -> None:
    script[3] = ValueError("no") if ending == "failed" else None
    running = drive(Scripted(), subject())
    next(running)
    if ending == "closed":
        running.close()
    elif ending == "thrown into":
        with pytest.raises(KeyboardInterrupt):
            running.throw(KeyboardInterrupt)
    else:
        with pytest.raises(ValueError, match="no"):
            list(running)
    assert Scripted.closed == ["closed"]


# -------------------------------------------------------------------------- out of memory


@pytest.mark.parametrize(
    "problem",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_out_of_memory_halves_the_chunk_says_so_and_goes_on(problem: Exception, script: dict[int, Any]) -> None:
    script[1] = lambda s: problem if s.plan.chunk > 10 else None
    found = Scripted().run(subject(chunk=64))
    assert found.done == 1
    assert found.provenance["plan"]["chunk"] == 8
    assert [n for n in found.notes if "memory ran out" in n][-1].endswith("8 at a time")
    assert found.data.drop_attrs(deep=False).identical(Scripted().run(subject(chunk=8)).data.drop_attrs(deep=False))


@pytest.mark.parametrize("chunk", [1, None])
def test_what_halving_cannot_help_is_raised(chunk: int | None, script: dict[int, Any]) -> None:
    script[0] = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        Scripted().run(subject(chunk=chunk))
    script[0] = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"):
        Scripted().run(subject(chunk=64))
    assert len(Scripted.closed) == 2


# --------------------------------------------------------------------------------- readings


@dataclass(frozen=True)
class Anything(Probe[Any]):
    """Yields what it is given."""

    size: Annotated[int, Range(1, 9), Doc("A setting.")] = 3

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("value", ("x",), "a value", "nats", "value_error"),
        Variable("value_error", ("x",), "its error", "nats"),
        Variable("flag", ("x",), "a flag", kind="bool"),
        Variable("total", (), "a number"),
    )

    def stream(self, subject: Any, draw: Draw) -> Iterator[Reading]:
        raise NotImplementedError

    def summary(self, data: xr.Dataset) -> dict[str, Any]:
        return {"total": float(data.total), "total_error": 0.25}

    def figure(self, data: xr.Dataset) -> Figure:
        return toys.Trace().figure(toys.Trace(vectors=2).run(toys.ToySubject()).data)


def test_what_is_not_given_is_unknown_and_what_is_given_is_copied() -> None:
    mine = np.arange(3.0)
    reading = Anything().reading(0.5, {"value": mine}, coords={"x": [10, 20, 30]})
    mine[:] = -1
    assert reading.data.value.values.tolist() == [0.0, 1.0, 2.0]
    assert np.isnan(reading.data.value_error).all()
    assert not reading.data.flag.any()
    assert reading.data.flag.dtype == bool
    assert math.isnan(reading.data.total)
    assert reading.data.value.attrs == {"long_name": "a value", "units": "nats", "error": "value_error"}
    with pytest.raises(ValueError, match="read-only"):
        reading.data.value.values[0] = 9.0


def test_tensors_on_a_graph_are_taken_and_nothing_is_made_finite() -> None:
    tensor = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float32, requires_grad=True)
    held = Anything().reading(1.0, {"value": tensor, "total": torch.tensor(2.0)})
    assert held.data.value.dtype == np.float64
    assert np.array_equal(held.data.value, [math.nan, math.inf, -math.inf], equal_nan=True)


def test_sizes_stand_for_what_nothing_shows() -> None:
    assert Anything().reading(0.1, {}, sizes={"x": 4}).data.sizes == {"x": 4}
    with pytest.raises(KeyError):
        Anything().reading(0.1, {})


def test_faults_of_a_probe_are_named() -> None:
    with pytest.raises(KeyError, match=r"yields 'valeu' but does not declare it; add it to Anything\.variables"):
        Anything().reading(1.0, {"valeu": [1.0]})
    for done in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="must lie in"):
            Anything().reading(done, {"value": [1.0]})


def test_settings_are_checked_when_a_probe_is_made() -> None:
    with pytest.raises(ValueError, match=r"Anything\.size must lie in \[1, 9\]; got 0"):
        Anything(size=0)


def test_a_reading_says_how_far_and_how_sure_it_is() -> None:
    probe = toys.Trace(vectors=4)
    stages: list[Reading] = []
    last = probe.run(subject(), on_reading=stages.append)
    assert repr(stages[1]).startswith("<Trace 50%: trace=")
    assert "±" in repr(last)
    assert stages[1].figure().note == "on 1 of 1 examples · partial, 50%"
    assert last.figure().note == "on 1 of 1 examples"
    rough = replace(last, data=last.data.assign_attrs(converged=0))
    assert rough.figure().note == "on 1 of 1 examples · not converged"
    assert last.to_frame().reset_index().shape[0] == 4


def test_provenance_says_what_is_needed_to_repeat_it_and_nothing_of_who_or_where(tmp_path: Path) -> None:
    found = toys.Trace().run(subject(chunk=5), seed=11)
    made = found.provenance
    assert (made["seed"], made["plan"]["chunk"], made["threads"]) == (11, 5, torch.get_num_threads())
    assert made["fingerprint"] == subject().fingerprint()
    assert made["subject"]["on"] == "on 1 of 1 examples"
    assert made["versions"]["torch"] == torch.__version__
    assert made["created"].endswith("+00:00")
    text = json.dumps(dict(made))
    for secret in (socket.gethostname(), str(Path.home()), getpass.getuser()):
        assert len(secret) < 4 or secret not in text
    again = toys.Trace().run(subject(), seed=11, plan=made["plan"])
    assert again.provenance["plan"] == made["plan"]


@settings(max_examples=40)
@given(
    value=arrays.arrays(np.float64, st.integers(1, 5), elements=st.floats(width=64)),
    total=st.floats(),
    done=st.floats(0.001, 1.0),
    notes=st.lists(st.text(), max_size=3).map(tuple),
    converged=st.booleans(),
)
def test_netcdf_keeps_a_reading_bit_for_bit(
    value: np.ndarray, total: float, done: float, notes: tuple[str, ...], converged: bool
) -> None:
    names = [f"part {k} ∂ß" for k in range(len(value))]
    values = {"value": value, "flag": value > 0, "total": total}
    made = Anything(size=2).reading(done, values, coords={"x": names}, converged=converged, notes=notes)
    made = replace(made, provenance={"seed": 3, "list": [1, None, "ü"], "nested": {"on": "x"}})
    back = Reading.from_bytes(made.to_bytes())
    assert back.data.identical(made.data)
    assert back.data.value.values.tobytes() == value.tobytes()
    assert (back.probe, back.done, back.notes, back.converged) == (Anything(size=2), done, notes, converged)
    assert back.provenance == made.provenance
    assert np.array_equal([back.summary["total"]], [total], equal_nan=True)


def test_other_peoples_datasets_are_refused_with_words() -> None:
    with pytest.raises(ValueError, match="lacks the attribute 'workbench_reading'"):
        Reading.from_dataset(xr.Dataset({"x": 1}))


@pytest.mark.parametrize("verb", ["export", "_repr_mimebundle_"])
def test_verbs_are_found_by_name_on_first_use(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def resolved(path: str) -> Any:
        asked.append(path)
        return lambda *_, **__: "done"

    monkeypatch.setattr("workbench.probe.resolve", resolved)
    reading = toys.Trace().run(subject())
    assert getattr(reading, verb)(*(["x.pdf"] if verb == "export" else [])) == "done"
    assert len(asked) == 1
    assert asked[0].startswith("workbench.")
