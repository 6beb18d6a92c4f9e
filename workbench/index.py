"""The index of a folder of stored readings: a table that only repeats what the files say, to find them quickly."""

from __future__ import annotations

import fnmatch
import json
import os
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from workbench.probe import Reading

T = TypeVar("T")
_NAME = "index.sqlite"
_COLUMNS = ("name", "stamp", "key", "probe", "settings", "done", "created", "bytes", "seed", "fingerprint", "label")


@dataclass(frozen=True)
class Entry:
    """One line of a store's index: which probe with which settings on what, how far, when, how large, and where."""

    key: str
    probe: str
    settings: Mapping[str, Any]
    done: float
    created: str
    bytes: int
    path: Path
    seed: int = 0
    fingerprint: str = ""
    label: str = ""

    def load(self) -> Reading:
        """The reading itself. ``FileNotFoundError`` when it was pruned meanwhile, ``ValueError`` when it is damaged."""
        return opened(self.path)

    def is_by(self, probe: str | type | None) -> bool:
        """Whether this probe (a class, a name, ``module:Class``; None: any) made the reading."""
        name = probe.__name__ if isinstance(probe, type) else probe
        return name is None or self.probe == name.rpartition(":")[2]

    def is_on(self, pattern: str | None) -> bool:
        """Whether the subject's label or fingerprint fits a pattern with ``*`` and ``?`` (None: any)."""
        return pattern is None or any(fnmatch.fnmatchcase(text, pattern) for text in (self.label, self.fingerprint))


def opened(file: Path) -> Reading:
    """The reading in a stored file.

    Raises:
        ValueError: the file is damaged. ImportError: its probe belongs to a package that was not imported.
    """
    content = file.read_bytes()
    try:
        return Reading.from_bytes(content)
    except ImportError:
        raise
    except Exception as problem:  # overwritten bytes can raise anything
        raise ValueError(f"The stored reading {file.name} is damaged ({problem}).") from problem


def stamp(file: Path) -> str:
    """Changes when a file is replaced or cut off, stays when it is only used; empty when there is none."""
    try:
        found = file.stat()
    except OSError:
        return ""
    return f"{found.st_ino}:{found.st_size}"


class Index:
    """The table of one folder. Every call opens a connection of its own, so that threads and processes may share it.

    A damaged table is made anew; in a folder that cannot be written, one in memory takes its place.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def note(self, file: Path, reading: Reading) -> None:
        """List a file that was just written."""
        held = json.loads(reading.to_dataset().attrs["workbench_reading"])
        self._with(lambda db: _insert(db, file, held))

    def entries(self, files: list[Path], damaged: Callable[[Path, Exception], None]) -> list[Entry]:
        """All entries, newest first, after the table was brought up to date with ``files``.

        ``damaged`` is called with each file that is not a reading, and why.
        """
        rows = self._with(lambda db: _synchronised(db, {f.name: f for f in files}, damaged))
        return [_entry(self._folder, row) for row in rows]

    def drop(self) -> None:
        """Forget the table; the next look makes it again from the files."""
        for ending in ("", "-wal", "-shm"):
            (self._folder / f"{_NAME}{ending}").unlink(missing_ok=True)

    def _with(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return _transaction(self._folder / _NAME, work)
        except sqlite3.OperationalError:  # read-only, locked for very long, on a file system without locks
            return _transaction(":memory:", work)
        except sqlite3.DatabaseError:
            self.drop()
            return _transaction(self._folder / _NAME, work)


def _transaction(place: str | Path, work: Callable[[sqlite3.Connection], T]) -> T:
    with closing(sqlite3.connect(place, timeout=30.0)) as db:
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'readings'").fetchone():
            db.execute("PRAGMA journal_mode = WAL")
            db.execute(f"CREATE TABLE IF NOT EXISTS readings ({', '.join(_COLUMNS)}, PRIMARY KEY (name))")
        with db:
            return work(db)


def _synchronised(
    db: sqlite3.Connection, there: Mapping[str, Path], damaged: Callable[[Path, Exception], None]
) -> list[tuple[Any, ...]]:
    """All rows, after those of vanished files went and new files were listed."""
    known = dict(db.execute("SELECT name, stamp FROM readings"))
    for name, file in there.items():
        if known.get(name) != stamp(file):
            _list(db, file, damaged)
    db.executemany("DELETE FROM readings WHERE name = ?", [(n,) for n in known.keys() - there.keys()])
    return list(db.execute(f"SELECT {', '.join(_COLUMNS)} FROM readings ORDER BY created DESC, name"))


def _list(db: sqlite3.Connection, file: Path, damaged: Callable[[Path, Exception], None]) -> None:
    try:
        _insert(db, file, _held(file))
    except FileNotFoundError:  # removed by another process meanwhile
        return
    except Exception as problem:  # noqa: BLE001 - overwritten bytes can raise anything
        db.execute("DELETE FROM readings WHERE name = ?", (file.name,))
        damaged(file, ValueError(f"The stored reading {file.name} is damaged ({problem})."))


def _held(file: Path) -> dict[str, Any]:
    """What a file says about its reading, without its arrays and without importing its probe."""
    import h5py

    with file.open("rb") as content, h5py.File(content, "r") as found:  # no lock on the file, no handle left behind
        return json.loads(str(found.attrs["workbench_reading"]))


def _insert(db: sqlite3.Connection, file: Path, held: Mapping[str, Any]) -> None:
    made = held["provenance"]
    on = made.get("subject", {})
    row = {
        "name": file.name,
        "stamp": stamp(file),
        "key": file.name.partition(".")[0],
        "probe": held["probe"].rpartition(":")[2],
        "settings": json.dumps(held["settings"]),
        "done": held["done"],
        "created": made.get("created", ""),
        "bytes": os.stat(file).st_size,
        "seed": made.get("seed", 0),
        "fingerprint": made.get("fingerprint", ""),
        "label": str(on.get("label") or on.get("model") or ""),
    }
    marks = ", ".join("?" for _ in _COLUMNS)
    db.execute(f"INSERT OR REPLACE INTO readings VALUES ({marks})", [row[c] for c in _COLUMNS])


def _entry(folder: Path, row: tuple[Any, ...]) -> Entry:
    found = dict(zip(_COLUMNS, row, strict=True))
    del found["stamp"]
    return Entry(path=folder / found.pop("name"), settings=json.loads(found.pop("settings")), **found)
