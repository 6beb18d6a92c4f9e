"""The seven promises that every probe keeps, each as a check that raises ``AssertionError`` where one is broken."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from toys import FUSE, World, world

import workbench
from workbench import schema
from workbench.plan import Plan
from workbench.probe import Probe, Reading, TooLarge, drive
from workbench.store import Store


@dataclasses.dataclass
class Case:
    """A probe with what it looks at, and one whole run of it that several checks share."""

    probe: Probe[Any]
    folder: Path

    def world(self, planted: float | None = None) -> World:
        """A fresh world; the fuse counts from zero."""
        made = world(self.probe.looks_at, self.folder / str(planted), planted)
        FUSE.reset()
        return made

    @cached_property
    def readings(self) -> list[Reading]:
        """Every reading of a run with seed 3; ``copies`` are as they came, ``passes`` counts forward passes."""
        self.copies: list[xr.Dataset] = []
        here = self.world()
        before = belongings(here)
        found = []
        for reading in drive(self.probe, here.subject, seed=3):
            found.append(reading)
            self.copies.append(reading.data.copy(deep=True))
        self.passes = FUSE.count
        unharmed(here, before, "during the first run")
        assert found, f"{self.probe.name} yields nothing"
        return found

    @property
    def last(self) -> Reading:
        return self.readings[-1]

    @property
    def dependents(self) -> set[str]:
        """Names of variables that only hold the error of others."""
        return {v.error for v in self.probe.variables} - {"exact"}


# ------------------------------------------------------------------------- what is the user's


def belongings(here: World) -> dict[str, Any]:
    """Everything of the user's, in a form that can be compared: models, data, random states, switches, defaults."""
    return {
        "models": [model_state(m) for m in here.models],
        "data": [(t.data_ptr(), t._version, t.numpy().tobytes()) for t in here.data],
        **globals_state(),
    }


def model_state(model: nn.Module) -> dict[str, Any]:
    """Bytes, places, versions, flags, gradients, hooks and attributes of a model, down to the last module."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = {k: list(v) for k, v in vars(module).items() if k.endswith("hooks")}
        found[f"{name}:module"] = (id(module), type(module), module.training, hooks, sorted(vars(module)))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[f"{name}:tensor"] = (
            id(tensor),
            tensor._version,
            tensor.requires_grad,
            tensor.is_leaf,
            *tensor_state(tensor),
        )
        found[f"{name}:grad"] = None if tensor.grad is None else (id(tensor.grad), *tensor_state(tensor.grad))
    return found


def tensor_state(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Place, type and bytes."""
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.detach().numpy().tobytes()


def globals_state() -> dict[str, Any]:
    """Random states of torch, numpy and python; torch's switches; the defaults of matplotlib and Plotly."""
    import matplotlib as mpl
    import plotly.io as pio

    kernels = torch.backends.cuda
    return {
        "random torch": torch.get_rng_state().numpy().tobytes(),
        "random numpy": repr(np.random.get_state()),  # noqa: NPY002
        "random python": random.getstate(),
        "gradients on": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "threads": (torch.get_num_threads(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()),
        "kernels": (kernels.flash_sdp_enabled(), kernels.math_sdp_enabled(), kernels.mem_efficient_sdp_enabled()),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "numpy errors": np.geterr(),
        "matplotlib": {name: repr(dict.__getitem__(mpl.rcParams, name)) for name in mpl.rcParams},
        "plotly": (pio.templates.default, sorted(pio.templates), pio.renderers.default),
    }


def unharmed(here: World, before: dict[str, Any], when: str) -> None:
    """Name what is no longer as it was."""
    after = belongings(here)
    for name in before:
        assert after[name] == before[name], f"{name} changed {when}: {_first_difference(before[name], after[name])}"


def _first_difference(before: Any, after: Any) -> str:
    if isinstance(before, list) and len(before) == len(after):
        return next((_first_difference(b, a) for b, a in zip(before, after, strict=True) if a != b), "")
    if isinstance(before, dict):
        return str([k for k in {*before, *after} if before.get(k) != after.get(k)][:3])
    return f"{str(before)[:80]} became {str(after)[:80]}"


# --------------------------------------------------------------------------------- one to seven


def leaves_everything_alone(case: Case) -> None:
    """1: as before, while it runs, after it, after an error in mid-pass, after an interrupt, after closing early."""
    passes = len(case.readings) and case.passes
    for ending in ("a whole run", "an error in mid-pass", "an interrupt", "closing early"):
        here = case.world()
        before = belongings(here)
        models = [model_state(m) for m in here.models]
        FUSE.watch = lambda m=models, h=here: _assert_same_models(m, h)
        FUSE.blow_at = passes // 2 + 1 if ending == "an error in mid-pass" else None
        with suppress(Exception if FUSE.blow_at else KeyboardInterrupt):
            _end(drive(case.probe, here.subject, seed=3), ending, lambda h=here, b=before: unharmed(h, b, "in between"))
        FUSE.reset()
        unharmed(here, before, f"after {ending}")


def _assert_same_models(models: list[dict[str, Any]], here: World) -> None:
    if FUSE.count < 8 or FUSE.count % 50 == 0:
        assert [model_state(m) for m in here.models] == models, "the model changed during a forward pass"


def _end(stream: Iterator[Reading], ending: str, check: Callable[[], None]) -> None:
    with closing(stream) as readings:  # type: ignore[type-var]
        for count, _ in enumerate(readings):
            if count < 5:
                check()
            if ending == "closing early":
                return
            if ending == "an interrupt":
                readings.throw(KeyboardInterrupt)  # type: ignore[attr-defined]


def repeats_itself(case: Case) -> None:
    """2: bit for bit with the same seed and plan; to rounding with other chunks; a plan in a reading replays it."""
    again = case.probe.run(case.world().subject, seed=3)
    assert again.data.identical(case.last.data), f"another run differs: {differing(again.data, case.last.data)}"
    chunked = case.probe.run(case.world().subject.with_plan(Plan(chunk=7)), seed=3) if _has_plan(case) else again
    assert chunked.converged == case.last.converged
    assert case.last.converged, "choose settings with which the probe converges here"
    apart = not_close(case.last.data, chunked.data, case)
    assert not apart, f"chunks of 7 examples give another {apart}"
    replayed = case.probe.run(case.world().subject, seed=3, plan=chunked.provenance["plan"])
    assert replayed.data.identical(chunked.data), f"its plan gives another {differing(replayed.data, chunked.data)}"


def _has_plan(case: Case) -> bool:
    return hasattr(case.world().subject, "with_plan")


def differing(one: xr.Dataset, two: xr.Dataset) -> list[str]:
    """Names of what is not identical."""
    names = [
        n for n in {*one.variables, *two.variables} if n not in one or n not in two or not one[n].identical(two[n])
    ]
    return names or [k for k in {*one.attrs, *two.attrs} if one.attrs.get(k) != two.attrs.get(k)]


def not_close(one: xr.Dataset, two: xr.Dataset, case: Case) -> list[str]:
    """Variables that differ by more than 1e-6 of their size; an error, by more than 1e-6 of what it is the error of."""
    sizes = {n: float(np.max(np.abs(np.where(np.isfinite(v), v, 0.0)), initial=0)) for n, v in _floats(one)}
    for v in case.probe.variables:
        if v.error in sizes and v.name in sizes:
            sizes[v.error] = max(sizes[v.error], sizes[v.name])
    return [
        n
        for n, values in _floats(one)
        if not np.allclose(values, two[n].values, rtol=1e-6, atol=1e-6 * sizes[n], equal_nan=True)
    ]


def _floats(data: xr.Dataset) -> list[tuple[str, np.ndarray]]:
    return [(str(n), v.values) for n, v in data.data_vars.items() if v.dtype.kind == "f"]


def says_how_sure(case: Case) -> None:
    """3: every variable names its error, the summary has errors beside numbers, and NaN stays NaN."""
    declared = {v.name: v for v in case.probe.variables}
    assert declared, "a probe declares its variables"
    for reading in case.readings[:1] + case.readings[-1:]:
        assert set(reading.data.data_vars) == set(declared)
        for name, values in reading.data.data_vars.items():
            assert {"units", "long_name", "error"} <= values.attrs.keys(), f"{name} lacks attributes"
            assert values.attrs["long_name"].strip(), f"{name} has no words"
            error = values.attrs["error"]
            assert error == "exact" or error in declared, f"{name} has the error {error!r}, which is no variable"
            if error != "exact":
                assert set(declared[error].dims) <= set(declared[str(name)].dims), f"{error} does not fit {name}"
        for name, value in reading.summary.items():
            assert isinstance(value, (bool, int, float, str)), f"summary[{name!r}] is a {type(value).__name__}"
            of = name.removesuffix("_error")
            assert of == name or of in reading.summary or of in declared, f"{name} of what?"
    keeps_nan(case)


def keeps_nan(case: Case) -> None:
    """Whatever reads NaN from the net (or from the record, if it reads no net) says NaN, or refuses with words.

    A probe to which the net's outputs make no difference at all reads its weights: NaN goes in there. An experiment
    reads nothing that NaN could go into; tests/experiments lets its training diverge instead.
    """
    if case.probe.looks_at == "nothing":
        return
    assert case.readings
    here = case.world(planted=None if case.passes else math.nan)
    FUSE.poison_from = max(case.passes // 2, 1) if case.passes else None
    try:
        got = case.probe.run(here.subject, seed=3)
        if case.passes and got.data.identical(case.last.data):
            got = case.probe.run(case.world(planted=math.nan).subject, seed=3)
    except Exception as problem:
        if len(str(problem)) < 20:
            pytest.fail(f"refused without words: {problem!r}")
    else:
        assert unknowns(got.data) > unknowns(case.last.data), "NaN went in and only numbers came out"
    finally:
        FUSE.reset()


def unknowns(data: xr.Dataset) -> int:
    """How many values are not finite."""
    return sum(int((~np.isfinite(values)).sum()) for _, values in _floats(data))


def keeps_its_shape(case: Case) -> None:
    """4: the same variables, dims and sizes in every reading; none changes once yielded; progress ends at 1."""
    first = case.readings[0].data
    for reading, copied in zip(case.readings, case.copies, strict=True):
        assert reading.data.identical(copied), f"a reading changed later: {differing(reading.data, copied)}"
        assert {n: (v.dims, v.shape, v.dtype) for n, v in reading.data.variables.items()} == {
            n: (v.dims, v.shape, v.dtype) for n, v in first.variables.items()
        }, "a stream changes variables, dims or sizes"
        assert not any(v.values.flags.writeable for v in reading.data.data_vars.values())
    done = [r.done for r in case.readings]
    assert done == sorted(done), f"progress goes backwards: {done}"
    assert done[-1] == 1, f"the last reading says {done[-1]}"
    assert done.count(1) == 1, "only the last reading is done"
    assert not any(r.converged for r in case.readings[:-1]), "converged before it was done"
    for stop in {1, len(done) // 2} - {0}:
        with closing(drive(case.probe, case.world().subject, seed=3)) as stream:  # type: ignore[type-var]
            early = [r for r, _ in zip(stream, range(stop), strict=False)][-1]
        assert early.data.identical(case.readings[stop - 1].data)


def describes_its_settings(case: Case) -> None:
    """5: frozen, checked, in words, through JSON, code and pickle and back, with controls in both forms."""
    from workbench.ui import form

    cls = type(case.probe)
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert (cls.__doc__ or "").strip(), "a probe says what it is"
    assert not cls.__doc__.startswith(f"{cls.__name__}("), "a dataclass makes such words up"
    for probe in (cls(), case.probe):
        comes_back(probe)
        for build in (form.widgets, form.panel):
            assert build(cls, probe)[1]() == probe, f"{build.__name__} reads other settings than it was given"
    for f in schema.fields(cls):
        assert f.doc.strip(), f"{f.name} has no words"
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(case.probe, f.name, f.default)
        for wrong in _wrong(f):
            with pytest.raises((ValueError, TypeError), match=f.name):
                dataclasses.replace(cls(), **{f.name: wrong})
    box, column = form.widgets(cls)[0], form.panel(cls)[0]
    assert _named(box, lambda b: b._dom_classes, "children") == [f.name for f in schema.fields(cls)]
    assert _named(column, lambda b: b.css_classes, "objects") == [f.name for f in schema.fields(cls)]


def comes_back(probe: Probe[Any]) -> None:
    """Settings survive JSON, code, pickle and hashing."""
    cls = type(probe)
    assert schema.from_json(cls, json.loads(json.dumps(schema.to_json(probe)))) == probe, "JSON loses settings"
    root = cls.__module__.partition(".")[0]
    names = {"wb": workbench, "nan": math.nan, "inf": math.inf, root: __import__(root)}
    assert eval(schema.code(probe), names) == probe, f"{schema.code(probe)} makes other settings"
    assert pickle.loads(pickle.dumps(probe)) == probe
    assert hash(copy.copy(probe)) == hash(probe)


def _wrong(f: schema.Field) -> list[Any]:
    """Values that a setting must refuse."""
    found: list[Any] = [object()] if f.optional else [object(), None]
    if f.range:
        found += [type(f.default or 0)(x) for x in (f.range.low - 1, f.range.high + 1)]
        found += [math.nan, math.inf]
    return (
        found
        + (["no such choice"] if f.kind == "choice" else [])
        + ([("no such choice",)] if f.kind == "choices" else [])
    )


def _named(box: Any, classes: Callable[[Any], Any], children: str) -> list[str]:
    found = [c.removeprefix("wb-set-") for c in classes(box) or () if c.startswith("wb-set-")]
    return found or [n for child in getattr(box, children, ()) for n in _named(child, classes, children)]


def can_be_drawn(case: Case) -> None:
    """6: the first reading with the settings as they come, and the last, on screen and on paper."""
    from workbench.draw.export import render
    from workbench.draw.screen import screen

    stream = drive(type(case.probe)(), case.world().subject, seed=3)
    with closing(stream) as readings:  # type: ignore[type-var]
        first = next(iter(readings))
    before = globals_state()
    for reading in (first, case.readings[0], case.last):
        figure = reading.figure()
        assert screen(figure).data, "nothing on screen"
        assert render(figure, ".png", dpi=40)[:4] == b"\x89PNG"
        assert any(panel.marks for panel in figure.panels)
        assert repr(reading)
    assert globals_state() == before, "drawing changed the defaults"


def knows_its_size(case: Case, patch: pytest.MonkeyPatch) -> None:
    """7: an estimate before the run, and a refusal in words, before anything was done, where memory is too small."""
    here = case.world()
    cost = case.probe.estimate(here.subject)
    assert cost.bytes > 0, "the estimate knows nothing of memory"
    assert cost.words.strip()
    with patch.context() as small:
        small.setattr(type(here.subject), "available_memory", lambda _: 1, raising=False)
        small.setattr(type(case.probe), "stream", lambda *_: pytest.fail("started although it cannot fit"))
        with pytest.raises(TooLarge, match=r"would need .*; use fewer"):
            next(iter(drive(case.probe, here.subject)))


def can_be_stored(case: Case, store: Store) -> None:
    """Through netCDF and back without loss, under the key that will be asked for."""
    for reading in (case.readings[0], case.last):
        back = Reading.from_bytes(reading.to_bytes())
        assert back.data.identical(reading.data), f"netCDF loses {differing(back.data, reading.data)}"
        assert (back.probe, back.done, dict(back.provenance)) == (reading.probe, reading.done, dict(reading.provenance))
        assert back.summary.keys() == reading.summary.keys()
    here = case.world()
    assert store.save(case.last) == store.key(case.probe, here.subject, seed=3), "stored where nobody asks"
    assert store.ask(case.probe, store.key(case.probe, here.subject, seed=3)).data.identical(case.last.data)
