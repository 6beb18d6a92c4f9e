"""Settings described once: what a schema says, refuses, and brings back."""

from __future__ import annotations

import ast
import json
import math
import sys
import types
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import toys
from hypothesis import given
from hypothesis import strategies as st

from workbench import schema
from workbench.probe import Probe
from workbench.schema import Choice, Display, Doc, Range, Slow


@dataclass(frozen=True)
class Every:
    """One setting of each kind."""

    count: Annotated[int, Range(1, 500, 2), Doc("How many.")] = 10
    radius: Annotated[float, Range(1e-3, 10.0, log=True, soft=(0.01, 1.0)), Doc("How far."), Slow()] = 0.05
    free: Annotated[float, Doc("Any number.")] = 0.0
    on: Annotated[bool, Doc("Whether.")] = True
    law: Annotated[
        Literal["normal", "uniform"], Doc("Which."), Choice({"normal": "Gaussian"}, {"flat": "Say uniform."})
    ] = "normal"
    order: Annotated[Literal[1, 2], Doc("Which order.")] = 1
    parts: Annotated[tuple[Literal["a", "b", "c"], ...], Doc("What to keep.")] = ("a", "b")
    layer: Annotated[str | None, Doc("Name of a layer.")] = None
    limit: Annotated[int | None, Range(0, 9), Doc("At most.")] = None
    scale: Annotated[Literal["log", "linear"], Doc("How it is drawn."), Display()] = "log"
    inner: Annotated[Probe[Any], Doc("Another probe.")] = field(default_factory=toys.Trace)

    def __post_init__(self) -> None:
        schema.check(self)


SETTINGS = st.builds(
    Every,
    count=st.integers(1, 500),
    radius=st.floats(1e-3, 10.0) | st.integers(1, 10) | st.floats(1e-3, 10.0).map(np.float64),
    free=st.floats(allow_nan=False, allow_infinity=False),
    on=st.booleans(),
    law=st.sampled_from(["normal", "uniform"]),
    order=st.sampled_from([1, 2]),
    parts=st.lists(st.sampled_from(["a", "b", "c"]), unique=True).map(tuple),
    layer=st.none() | st.text(),
    limit=st.none() | st.integers(0, 9),
    scale=st.sampled_from(["log", "linear"]),
    inner=st.builds(toys.Trace, vectors=st.integers(2, 99), kind=st.sampled_from(["normal", "rademacher"])),
)


# ----------------------------------------------------------------------------- describing


def test_every_field_is_described_as_it_was_written() -> None:
    found = {f.name: f for f in schema.fields(Every)}
    assert found == {f.name: f for f in schema.fields(Every())}
    assert {n: f.kind for n, f in found.items()} == {
        "count": "int",
        "radius": "float",
        "free": "float",
        "on": "bool",
        "law": "choice",
        "order": "choice",
        "parts": "choices",
        "layer": "text",
        "limit": "int",
        "scale": "choice",
        "inner": "probe",
    }
    assert [n for n, f in found.items() if f.optional] == ["layer", "limit"]
    assert [n for n, f in found.items() if not f.live] == ["radius"]
    assert [n for n, f in found.items() if f.display] == ["scale"]
    assert found["law"].choices == ("normal", "uniform")
    assert found["law"].choice_words == {"normal": "Gaussian"}
    assert found["parts"].choices == ("a", "b", "c")
    assert found["count"].range.offered == (1, 500)
    assert found["radius"].range.offered == (0.01, 1.0)
    assert found["inner"].default == toys.Trace()
    assert (found["count"].doc, found["count"].label, found["count"].default) == ("How many.", "count", 10)


def without(annotation: Any, default: Any = 1) -> type:
    """A settings class with one field that lacks something."""
    body = {"__annotations__": {"x": annotation}, "__module__": __name__} | ({} if default is ... else {"x": default})
    return dataclass(frozen=True)(type("Bad", (), body))


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (without(int), r"Bad\.x has no words: add Doc"),
        (without(Annotated[int, Doc("d")], ...), r"Bad\.x has no default"),
        (without(Annotated[dict, Doc("d")]), r"Bad\.x has type .*dict.* no control; use int, float"),
        (without(Annotated[int | str, Doc("d")]), "no control"),
        (without(Annotated[tuple[int, ...], Doc("d")]), "no control"),
        (str, "str is not a dataclass"),
    ],
)
def test_what_cannot_be_described_is_refused_with_words(cls: type, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        schema.fields(cls)


def test_ranges_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="low < high"):
        Range(1, 1)
    with pytest.raises(ValueError, match="low > 0"):
        Range(0, 1, log=True)


# ------------------------------------------------------------------------------- checking


@pytest.mark.parametrize(
    ("wrong", "kind", "words"),
    [
        ({"count": 0}, ValueError, r"^Every\.count must lie in \[1, 500\]; got 0\.$"),
        ({"count": 501}, ValueError, r"got 501"),
        ({"count": 2.0}, TypeError, "must be an integer; got 2.0"),
        ({"count": True}, TypeError, "must be an integer; got True"),
        ({"count": None}, TypeError, "must be an integer; got None"),
        ({"count": np.int64(3)}, TypeError, "must be an integer"),
        ({"radius": "1"}, TypeError, "must be a number; got '1'"),
        ({"radius": math.nan}, ValueError, "must lie in"),
        ({"free": math.inf}, ValueError, r"Every\.free must be finite; got inf"),
        ({"on": 1}, TypeError, "True or False; got 1"),
        ({"law": "cauchy"}, ValueError, r"must be one of 'normal', 'uniform'; got 'cauchy'"),
        ({"law": "flat"}, ValueError, r"must be one of 'normal', 'uniform'; got 'flat'\. Say uniform\.$"),
        ({"order": 3}, ValueError, "must be one of 1, 2; got 3"),
        ({"parts": ["a"]}, TypeError, "must be a tuple out of"),
        ({"parts": ("a", "z")}, ValueError, "got 'z'"),
        ({"layer": 3}, TypeError, "must be text; got 3"),
        ({"limit": 10}, ValueError, "got 10"),
        ({"inner": toys.Trace}, TypeError, "must be a probe such as"),
        ({"inner": "Trace"}, TypeError, "must be a probe such as"),
    ],
)
def test_a_setting_out_of_range_says_what_was_got_and_wanted(
    wrong: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        Every(**wrong)


def test_the_ends_of_a_range_belong_to_it_and_soft_ends_do_not_bind() -> None:
    assert (Every(count=1).count, Every(count=500).count, Every(radius=10).radius) == (1, 500, 10)


# -------------------------------------------------------------------- there and back again


@given(settings=SETTINGS)
def test_json_brings_settings_back(settings: Every) -> None:
    text = json.dumps(schema.to_json(settings), allow_nan=False)
    back = schema.from_json(Every, json.loads(text))
    assert back == settings
    assert json.dumps(schema.to_json(back)) == text, "equal settings have equal JSON, which the store hashes"


@given(settings=SETTINGS)
def test_code_brings_settings_back_and_names_only_what_differs(settings: Every) -> None:
    text = schema.code(settings)
    module = types.SimpleNamespace(Every=Every)
    names = {__name__.partition(".")[0]: module, "toys": toys}
    for part in __name__.split(".")[1:]:
        setattr(module, part, module)
    assert eval(text, names) == settings
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    different = {f.name for f in schema.fields(Every) if getattr(settings, f.name) != f.default}
    assert {k.arg for k in call.keywords} == different


@given(settings=SETTINGS)
def test_command_line_words_make_the_same_settings(settings: Every) -> None:
    held = {n: v for n, v in schema.to_json(settings).items() if n != "inner"}
    words = {n: ",".join(v) if isinstance(v, list) else str(v) for n, v in held.items()}
    if settings.layer is not None and settings.layer.lower() in ("none", "null", ""):
        words.pop("layer")
        settings = replace(settings, layer=None)
    assert schema.parse(Every, words) == replace(settings, inner=toys.Trace())


@pytest.mark.parametrize("one", [1, 1.0, np.float64(1.0), np.float32(1.0) * 1.0])
def test_equal_numbers_are_equal_in_json_and_code(one: Any) -> None:
    made = Every(radius=float(one) if isinstance(one, np.float32) else one)
    assert json.dumps(schema.to_json(made)["radius"]) == "1.0"
    assert schema.code(made).endswith("Every(radius=1.0)")


def test_json_of_older_or_newer_versions() -> None:
    assert schema.from_json(Every, {"count": 3}) == Every(count=3)
    assert schema.from_json(Every, {"radius": 1}).radius == 1.0
    with pytest.raises(ValueError, match=r"Every has no setting 'width'; it has count, radius"):
        schema.from_json(Every, {"width": 3})
    with pytest.raises(ValueError, match="got 0"):
        schema.from_json(Every, {"count": 0})


def test_a_stored_name_imports_nobodys_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "antigravity", raising=False)
    stored = {"inner": {"probe": "antigravity:Fly", "settings": {}}}
    with pytest.raises(ImportError, match="not part of Workbench; import antigravity first"):
        schema.from_json(Every, stored)
    assert "antigravity" not in sys.modules
    with pytest.raises(ImportError, match="is not a probe"):
        schema.from_json(Every, {"inner": {"probe": "workbench.probe:Cost", "settings": {}}})


def test_what_only_changes_the_picture_is_not_measured() -> None:
    assert "scale" not in schema.measured(Every())
    assert schema.measured(Every(scale="linear")) == schema.measured(Every())
    assert schema.measured(Every(count=3)) != schema.measured(Every())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"count": "many"}, r"Every\.count must be an integer; got 'many'"),
        ({"count": "2.5"}, "must be an integer"),
        ({"count": "0"}, r"lie in \[1, 500\]"),
        ({"on": "perhaps"}, r"Every\.on must be"),
        ({"law": "cauchy"}, "must be one of 'normal', 'uniform'"),
        ({"parts": "a,z"}, "got 'z'"),
        ({"width": "3"}, "has no setting 'width'; it has count"),
        ({"inner": "Trace"}, r"Every\.inner must be a probe"),
    ],
)
def test_wrong_words_on_a_command_line_are_explained(words: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schema.parse(Every, words)


@pytest.mark.parametrize(
    ("word", "value"), [("true", True), ("Yes", True), ("1", True), ("FALSE", False), ("no", False), ("0", False)]
)
def test_words_for_yes_and_no(word: str, value: bool) -> None:
    assert schema.parse(Every, {"on": word}).on is value
