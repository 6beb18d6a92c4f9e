"""The store: whole files or none, one key for one question, and an index that is never more than a convenience."""

from __future__ import annotations

import errno
import os
import stat
import sys
import time
import warnings
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.probe import Reading
from workbench.store import Store, StoreWarning

TESTS = Path(__file__).parent


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "readings")


def same(one: Reading, two: Reading) -> bool:
    """Equal to the last bit, nan where nan: data, dims, attributes, probe, progress and provenance."""
    return one.data.identical(two.data) and (one.probe, one.done, dict(one.provenance)) == (
        two.probe,
        two.done,
        dict(two.provenance),
    )


def names(store: Store) -> set[str]:
    """Everything in the folder but the index."""
    return {p.name for p in store.path.iterdir() if not p.name.startswith("index.")}


# ---------------------------------------------------------------- asking and keeping


def test_a_saved_reading_comes_back_bit_for_bit_in_another_process_of_the_store(store: Store) -> None:
    reading = toys.Trace(vectors=4).run(toys.ToySubject())
    key = store.save(reading)
    assert key == store.key(toys.Trace(vectors=4), toys.ToySubject())
    fresh = Store(store.path)  # remembers nothing
    for found in (fresh.get(key), fresh[key[:6]], fresh.load(key), fresh.find()[0].load(), store.get(key)):
        assert same(found, reading)
    assert key in fresh
    assert list(fresh) == [key]
    assert len(fresh) == 1


def test_what_comes_back_can_be_changed_without_changing_what_is_stored(store: Store) -> None:
    key = store.save(toys.Trace(vectors=4).run(toys.ToySubject()))
    first = store.get(key)
    first.data["trace"] = 0.0
    first.data.attrs["converged"] = 0
    with pytest.raises(ValueError, match="read-only"):
        first.data["sample"].values[0] = 1.0
    again = store.get(key)
    assert float(again.data["trace"]) != 0.0
    assert again.converged


def test_a_second_question_is_not_measured_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = toys.ToySubject()
    first = store.get_or_run(toys.Trace(), subject, seed=3)
    monkeypatch.setattr(toys.Trace, "stream", lambda *_: pytest.fail("measured again"))
    assert same(store.get_or_run(toys.Trace(), subject, seed=3), first)


def test_a_setting_of_the_picture_needs_no_new_measurement_and_is_kept(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = toys.ToySubject()
    store.get_or_run(toys.Trace(log=False), subject)
    monkeypatch.setattr(toys.Trace, "stream", lambda *_: pytest.fail("measured again"))
    found = store.get_or_run(toys.Trace(log=True), subject)
    assert found.probe.log
    assert found.figure().panels[0].y.scale == "log"


class Elsewhere(toys.ToySubject):
    def describe(self) -> dict:
        return super().describe() | self.other


@pytest.mark.parametrize("what", ["weights", "settings", "probe", "seed", "dtype", "device", "context", "torch", "own"])
def test_each_part_of_the_question_makes_another_key(what: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    before = store.key(toys.Trace(), toys.ToySubject())
    assert before == store.key(toys.Trace(), toys.ToySubject()), "equal questions have equal keys"
    subject, probe, seed = Elsewhere(), toys.Trace(), 0
    subject.other = {}
    assert before == store.key(probe, subject, seed)
    if what == "weights":
        subject.weights = subject.weights + 1e-16 + torch.eye(1, 12, dtype=torch.float64)[0] * 1e-15
    elif what in ("dtype", "device"):
        subject.other = {what: "other"}
    elif what == "context":
        monkeypatch.setattr(toys.Trace, "context", lambda self, subject: "on held-out data")
    elif what in ("torch", "own"):
        package = {"torch": "torch", "own": "workbench"}[what]
        versions = sys.modules["workbench.provenance"].versions()
        monkeypatch.setattr("workbench.store.versions", lambda: {**versions, package: "9.9"})
    else:
        probe = {"settings": toys.Trace(vectors=6), "probe": toys.Failing()}.get(what, probe)
        seed = int(what == "seed")
    assert store.key(probe, subject, seed) != before


def test_the_device_counts_by_type_and_not_by_number(store: Store) -> None:
    subject = Elsewhere()
    keys = set()
    for device in ("cuda", "cuda:0", "cuda:1"):
        subject.other = {"device": device}
        keys.add(store.key(toys.Trace(), subject))
    assert len(keys) == 1


def test_a_reading_without_provenance_needs_a_key(store: Store) -> None:
    bare = replace(toys.Trace().run(toys.ToySubject()), provenance={})
    with pytest.raises(ValueError, match=r"key=store\.key"):
        store.save(bare)
    assert same(store.get(store.save(bare, "ab" * 16)), bare)


def test_only_a_finished_reading_answers(store: Store) -> None:
    subject, probe = toys.ToySubject(), toys.Trace(vectors=4)
    key = store.key(probe, subject)
    stages: list[Reading] = []
    whole = probe.run(subject, on_reading=stages.append)
    store.save(stages[1])
    assert store.get(key) is None
    assert key not in store
    assert store.find() == []
    assert same(store.partial(key), stages[1])
    assert [e.done for e in store.find(partial=True)] == [0.5]
    store.save(whole)
    assert same(store.get(key), whole)
    assert store.partial(key) is None, "a finished reading takes the place of the unfinished one"
    store.save(stages[2])
    assert names(store) == {f"{key}.nc"}, "and is never put aside for one"


def test_a_run_cut_short_by_its_budget_is_kept_as_unfinished(store: Store) -> None:
    subject, probe = toys.ToySubject(), toys.Trace(vectors=5000, pause=0.001)
    found = store.get_or_run(probe, subject, seconds=0.02)
    assert 0 < found.done < 1
    key = store.key(probe, subject)
    assert (store.get(key), store.partial(key).done) == (None, found.done)


def test_a_model_that_moves_between_question_and_answer_is_not_stored_under_the_question(store: Store) -> None:
    class Moving(toys.ToySubject):
        def fingerprint(self) -> str:
            found = super().fingerprint()
            if self.fingerprints == 1:
                self.weights += 1.0
            return found

    subject = Moving()
    store.get_or_run(toys.Trace(), subject)
    assert store.get(store.key(toys.Trace(), toys.ToySubject())) is None
    assert store.get(store.key(toys.Trace(), subject)) is not None


def test_an_empty_store_is_a_store_and_makes_no_folder(store: Store) -> None:
    assert bool(store)
    assert (len(store), store.find(), list(store), store.get("a" * 32), store.prune(bytes=0)) == (0, [], [], None, 0)
    assert not store.path.exists()


def test_where_a_store_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_STORE", str(tmp_path / "named"))
    assert Store().path == Store.beside(tmp_path / "run").path == tmp_path / "named"
    assert Store(tmp_path / "given").path == tmp_path / "given"
    monkeypatch.delenv("WORKBENCH_STORE")
    assert Store.beside(tmp_path / "run").path == tmp_path / "run" / "readings"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store().path.is_relative_to(tmp_path)


@pytest.fixture
def full(store: Store) -> Store:
    return toys.fill(store)


# --------------------------------------------------------------------- keeping house


def age(file: Path, seconds: float) -> None:
    os.utime(file, (time.time() - seconds, time.time() - seconds))


def test_prune_takes_what_was_not_used_for_longest_and_use_counts(full: Store) -> None:
    entries = sorted(full.find(), key=lambda e: e.key)
    for k, entry in enumerate(entries):
        age(entry.path, 1000 - 100 * k)
    full.get(entries[0].key)  # the oldest is used again
    size = max(e.bytes for e in entries)
    assert full.prune(bytes=2 * size) == 2
    assert set(full) == {entries[0].key, entries[3].key}
    assert {e.key for e in full.find()} == set(full)


def test_prune_by_age_also_clears_what_crashes_left(full: Store) -> None:
    kept, old = full.find()[:2]
    age(old.path, 86400 * 3)
    half, fresh_half = full.path / ".abc.nc.123.tmp", full.path / ".abc.nc.124.tmp"
    for file in (half, fresh_half, full.path / "abc.nc.damaged"):
        file.write_bytes(b"half")
    age(half, 86400)
    assert full.prune(older=timedelta(days=2)) == 1
    assert old.key not in full
    assert kept.key in full
    assert not half.exists()
    assert fresh_half.exists(), "another process may be writing it now"
    assert not list(full.path.glob("*.damaged"))


def test_a_store_keeps_to_its_cap_but_always_holds_what_was_just_saved(tmp_path: Path) -> None:
    readings = [toys.Trace(vectors=v).run(toys.ToySubject()) for v in (3, 4, 5)]
    size = len(readings[0].to_bytes())
    roomy, tight = Store(tmp_path / "a", cap=int(2.5 * size)), Store(tmp_path / "b", cap=10)
    for reading in readings:
        key = roomy.save(reading)
        for file in roomy.path.glob("*.nc"):
            age(file, time.time() - file.stat().st_mtime + 10)
        assert key in roomy
        assert list(tight) == [] or len(tight) == 1
        assert tight.save(reading) in tight
    assert [e.settings["vectors"] for e in roomy.find()] in ([4, 5], [5, 4])


# ------------------------------------------------------------------------ bad weather


@pytest.mark.parametrize("left", [0, 1, 100, 0.5, 0.99])
def test_a_file_cut_off_is_set_aside_said_and_measured_again(left: float, store: Store) -> None:
    subject = toys.ToySubject()
    key = store.save(toys.Trace().run(subject))
    file = store.path / f"{key}.nc"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(left * len(whole)) if 0 < left < 1 else int(left)])
    with pytest.warns(StoreWarning, match="damaged.*measured again"):
        assert store.get(key) is None
    assert names(store) == {f"{key}.nc.damaged"}
    again = store.get_or_run(toys.Trace(), subject)
    assert again.done == 1
    assert same(store.get(key), again)


class Full:
    """A file that takes half of what it is given before its disk is full."""

    def __init__(self, file: object, code: int) -> None:
        self.file, self.code = file, code

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, content: bytes) -> int:
        self.file.write(content[: len(content) // 2])
        raise OSError(self.code, os.strerror(self.code))


def full_disk(code: int) -> object:
    plain = Path.open

    def opened(path: Path, mode: str = "r", *rest: object) -> object:
        return Full(plain(path, mode, *rest), code) if "w" in mode else plain(path, mode, *rest)

    return opened


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_leaves_everything_as_it_was(code: int, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = toys.ToySubject()
    old = toys.Trace().run(subject)
    key = store.save(old)
    there, content = names(store), (store.path / f"{key}.nc").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full_disk(code))
        with pytest.raises(OSError, match=r"cannot be written.*store\.prune.*WORKBENCH_STORE.*unharmed") as caught:
            store.save(old)
        assert caught.value.errno == code
        assert ("bytes are needed" in str(caught.value)) == (code != errno.EIO)
        with pytest.warns(StoreWarning, match="reading itself is returned"):
            assert store.get_or_run(toys.Trace(vectors=9), subject).done == 1
    assert names(store) == there
    assert (store.path / f"{key}.nc").read_bytes() == content
    assert same(Store(store.path).get(key), old)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot be written"):
        Store(tmp_path / "file" / "readings").save(toys.Trace().run(toys.ToySubject()))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # h5netcdf's, on files it gave up
@settings(max_examples=25)
@given(content=st.binary(max_size=300), at=st.floats(0, 1))
def test_overwritten_bytes_never_crash_a_look_up(content: bytes, at: float, tmp_path_factory: object) -> None:
    folder = tmp_path_factory.mktemp("scribbled")
    store = Store(folder)
    key = store.save(toys.Trace(vectors=2).run(toys.ToySubject()))
    file = folder / f"{key}.nc"
    whole = bytearray(file.read_bytes())
    start = int(at * len(whole))
    whole[start : start + len(content)] = content
    file.write_bytes(bytes(whole))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoreWarning)
        fresh = Store(folder)
        found = fresh.get(key)
        assert found is None or isinstance(found, Reading)
        fresh.find()


def test_stored_files_hold_no_pickle_and_are_plain_files(full: Store) -> None:
    for entry in full.find():
        content = entry.path.read_bytes()
        assert content[:4] == b"\x89HDF"
        assert b"pickle" not in content
        assert stat.S_ISREG(entry.path.stat().st_mode)
