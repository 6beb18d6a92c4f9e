"""Every probe of the catalog keeps every promise; and the checks themselves can fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import broken
import promises
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from promises import Case
from toys import FUSE, quick, settings_of

from workbench import catalog, schema
from workbench.store import Store

PROBES = catalog.probes()
CHECKS: tuple[Callable[..., None], ...] = (
    promises.leaves_everything_alone,
    promises.repeats_itself,
    promises.says_how_sure,
    promises.keeps_its_shape,
    promises.describes_its_settings,
    promises.can_be_drawn,
    promises.knows_its_size,
    promises.can_be_stored,
)
ROUND = [pytest.param(name, check, id=f"{name}-{check.__name__}") for name in PROBES for check in CHECKS]


@pytest.fixture(autouse=True)
def whole_fuse() -> Iterator[None]:
    yield
    FUSE.reset()


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Case]:
    """A probe's case by its class: the whole run is made once for all checks."""
    return cache(lambda cls: Case(quick(cls), tmp_path_factory.mktemp(cls.__name__)))


def examine(check: Callable[..., None], case: Case, store: Path, patch: pytest.MonkeyPatch) -> None:
    """Call a check with what it asks for."""
    more = {promises.knows_its_size: patch, promises.can_be_stored: Store(store)}
    check(case, more[check]) if check in more else check(case)


def test_the_whole_catalog_is_examined_on_every_promise() -> None:
    assert len(PROBES) > 0
    assert {p.values[0] for p in ROUND} == set(catalog.probes())
    assert len(ROUND) == len(catalog.probes()) * len(CHECKS)
    assert not any(p.marks for p in ROUND), "no skips"


@pytest.mark.parametrize(("name", "check"), ROUND)
def test_promise(
    name: str,
    check: Callable[..., None],
    cases: Callable[[Any], Case],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    examine(check, cases(PROBES[name]), tmp_path, monkeypatch)


@pytest.mark.parametrize("name", PROBES)
@settings(max_examples=15)
@given(data=st.data())
def test_any_settings_come_back(name: str, data: st.DataObject) -> None:
    given_settings = data.draw(settings_of(PROBES[name]))
    try:
        probe = PROBES[name](**given_settings)
    except ValueError:
        return  # settings that do not fit together are refused, which is right too
    promises.comes_back(probe)
    assert {f.name for f in schema.fields(probe)} == set(schema.to_json(probe))


# --------------------------------------------------------------------- the checks can fail


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_an_honest_probe_passes(
    check: Callable[..., None], cases: Callable[[Any], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examine(check, cases(broken.Honest), tmp_path, monkeypatch)


CAUGHT: tuple[tuple[Any, Callable[..., None], str], ...] = (
    (broken.WritesWeights, promises.leaves_everything_alone, "models changed|weights changed"),
    (broken.FlipsMode, promises.leaves_everything_alone, "models changed"),
    (broken.LeavesHooks, promises.leaves_everything_alone, "models changed"),
    (broken.ClearsGradients, promises.leaves_everything_alone, "models changed"),
    (broken.Reseeds, promises.leaves_everything_alone, "random torch changed"),
    (broken.DrawsGlobally, promises.leaves_everything_alone, "random python changed"),
    (broken.ChangesDefaults, promises.leaves_everything_alone, "matplotlib changed .*linewidth"),
    (broken.LeaksNoGrad, promises.leaves_everything_alone, "gradients on changed in between"),
    (broken.HurtsWhenItFails, promises.leaves_everything_alone, "during a forward pass|after an error"),
    (broken.TellsTheTime, promises.repeats_itself, "another run differs"),
    (broken.DependsOnChunks, promises.repeats_itself, "chunks of 7 examples give another"),
    (broken.IgnoresThePlan, promises.repeats_itself, "another run differs|its plan gives another"),
    (broken.NamesNoError, promises.says_how_sure, "'sigma', which is no variable"),
    (broken.FillsIn, promises.says_how_sure, "NaN went in and only numbers came out"),
    (broken.Grows, promises.keeps_its_shape, "changes variables, dims or sizes"),
    (broken.Rewrites, promises.keeps_its_shape, "changed later: .*slope"),
    (broken.GoesBack, promises.keeps_its_shape, "progress goes backwards"),
    (broken.NeverEnds, promises.keeps_its_shape, "the last reading says 0.75"),
    (broken.SaysTooMuch, promises.keeps_its_shape, "converged before it was done"),
    (broken.LosesSettings, promises.describes_its_settings, "JSON loses settings|other settings"),
    (broken.ChecksNothing, promises.describes_its_settings, "DID NOT RAISE"),
    (broken.HasNoWords, promises.describes_its_settings, "has no words"),
    (broken.CannotDrawYet, promises.can_be_drawn, "nothing to draw yet"),
    (broken.KnowsNoSize, promises.knows_its_size, "knows nothing of memory"),
    (broken.StartsAnyway, promises.knows_its_size, "started although it cannot fit"),
    (broken.HidesItsContext, promises.can_be_stored, "stored where nobody asks"),
)


@pytest.mark.parametrize(("cls", "check", "words"), CAUGHT, ids=lambda x: getattr(x, "__name__", ""))
def test_a_broken_promise_is_caught(
    cls: Any, check: Callable[..., None], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib as mpl

    monkeypatch.setitem(mpl.rcParams, "lines.linewidth", mpl.rcParams["lines.linewidth"])
    with pytest.raises((Exception, pytest.fail.Exception), match=words):  # type: ignore[arg-type]
        examine(check, Case(cls(), tmp_path), tmp_path / "store", monkeypatch)


def test_every_check_is_seen_to_fail() -> None:
    assert {check for _, check, _ in CAUGHT} == set(CHECKS)
