"""The index: finds what the files hold, follows them wherever they go, and is never needed."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest
import toys

from workbench.store import Store, StoreWarning


@pytest.fixture
def full(tmp_path: Path) -> Store:
    return toys.fill(Store(tmp_path / "readings"))


def test_find_by_probe_subject_and_seed(full: Store) -> None:
    def found(**asked: object) -> list[tuple[str, int]]:
        return sorted((e.label, e.seed) for e in full.find(**asked))

    assert len(found()) == 4
    assert found(subject="* net") == [("large net", 0), ("small net", 0), ("small net", 1)]
    assert found(subject="small*", seed=1) == [("small net", 1)]
    assert found(subject=f"{toys.ToySubject().fingerprint()[:9]}*") == [("quadratic", 0)]
    for name in (toys.Trace, "Trace", "toys:Trace"):
        assert len(found(probe=name)) == 4
    assert found(probe="Failing") == []
    entry = full.find(subject="quadratic")[0]
    assert (entry.probe, entry.settings["vectors"], entry.done) == ("Trace", 7, 1.0)
    assert entry.bytes == entry.path.stat().st_size
    assert entry.created.startswith("20")


def test_keys_by_their_beginning_and_clear_words_when_that_fails(full: Store) -> None:
    keys = list(full)
    assert full[keys[0]].data.identical(full.get(keys[0]).data)
    with pytest.raises(KeyError, match=r"no finished reading .* begins with 'zz'.* 4 that are there"):
        full["zz"]
    with pytest.raises(KeyError, match="no finished reading"):
        full[""]
    first = keys[0][0]
    full.save(full[keys[0]], first + "0" * 31)
    with pytest.raises(KeyError, match=r"readings in .* begin with"):
        full[first]
    with pytest.raises(FileNotFoundError, match="no finished reading"):
        full.load("zz")


def test_the_index_is_made_again_from_the_files(full: Store) -> None:
    wanted = full.find()
    assert full.rebuild() == 4
    assert full.find() == wanted
    (full.path / "index.sqlite").write_bytes(b"this was a database once" * 400)
    assert Store(full.path).find() == wanted
    for file in full.path.glob("index.sqlite*"):
        file.unlink()
    assert Store(full.path).find() == wanted


def test_the_index_follows_files_that_come_and_go_behind_its_back(full: Store, tmp_path: Path) -> None:
    before = full.find()
    gone = before[0].path
    gone.rename(tmp_path / "elsewhere.nc")
    assert full.find() == before[1:]
    (tmp_path / "elsewhere.nc").rename(gone)
    assert full.find() == before


def test_a_store_that_may_only_be_read_can_be_read(full: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = full.find()
    for file in full.path.glob("index.sqlite*"):
        file.unlink()

    def refuse(place: object, *rest: object, **named: object) -> sqlite3.Connection:
        if place != ":memory:":
            raise sqlite3.OperationalError("unable to open database file")
        return connect(place, *rest, **named)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", refuse)
    monkeypatch.setattr(os, "utime", lambda *_: (_ for _ in ()).throw(PermissionError()))
    assert Store(full.path).find() == wanted
    assert Store(full.path)[wanted[0].key].done == 1


def test_a_damaged_file_does_not_stop_the_others_from_being_found(full: Store) -> None:
    entries = full.find()
    entries[0].path.write_bytes(b"CDF no more")
    with pytest.warns(StoreWarning, match="damaged"):
        assert full.find() == entries[1:]
    assert full.rebuild() == 3
    (full.path / "readme.nc").write_bytes(b"")
    with pytest.warns(StoreWarning, match="damaged"):
        assert full.rebuild() == 3
