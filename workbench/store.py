"""The store: finished readings on disk, each in a file of its own under the hash of what produced it.

The files are the truth. The SQLite index beside them only makes ``find`` quick, and is made again from the files
whenever it is missing, damaged or behind them.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import sqlite3
import threading
import time
import uuid
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from workbench import schema
from workbench.index import Entry, Index, opened, stamp
from workbench.probe import Probe, Reading
from workbench.provenance import versions

FINISHED, PARTIAL, DAMAGED, HALF = ".nc", ".partial", ".damaged", ".tmp"
CAP = 2 * 2**30
"""Bytes that a store may take by default."""
_STALE = 3600.0  # seconds after which a temporary file has certainly lost its writer
_RECENT, _SMALL = 64, 2**20  # readings kept in memory, and the bytes that each may have


class StoreWarning(UserWarning):
    """A stored file was damaged, or a reading could not be stored; the work itself goes on."""


def key_of(probe: Probe[Any], facts: Mapping[str, Any]) -> str:
    """The hash (32 hex digits) of everything that decides the numbers of a reading.

    ``facts`` has the shape of a reading's provenance: fingerprint, context, seed, subject (dtype, device), versions.
    Settings that only change the picture are left out.
    """
    subject, made_with = facts.get("subject", {}), facts.get("versions", {})
    parts = {
        "probe": probe.path,
        "settings": schema.measured(probe),
        "fingerprint": facts["fingerprint"],
        "context": facts.get("context", ""),
        "seed": int(facts["seed"]),
        "dtype": str(subject.get("dtype", "")),
        "device": str(subject.get("device", "")).partition(":")[0],
        "versions": [made_with.get("torch"), made_with.get("workbench")],
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


class Store:
    """Readings on disk under the hash of what produced them: same question, same answer, at once.

    Safe to use from several threads and processes together, and after a crash at any moment: a file is whole or
    absent. Costs: one netCDF file a reading (some 20 kB and up); a look-up reads that file alone.

    Args:
        path: folder, made when the first reading is saved. None: ``WORKBENCH_STORE``, else the user's cache folder.
        cap: bytes that the readings may take together; beyond it those unused for longest are removed.

    Raises:
        OSError: (on saving) the disk is full or read-only; older readings stay as they were.
    """

    def __init__(self, path: str | Path | None = None, cap: int = CAP) -> None:
        self.path = Path(path).expanduser() if path is not None else _default_folder()
        self.cap = cap
        self._index = Index(self.path)
        self._recent: OrderedDict[Path, tuple[str, Reading]] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def beside(cls, run_folder: str | Path) -> Store:
        """The store of a recorded run: ``WORKBENCH_STORE`` where that is set, else ``<run>/readings``."""
        return cls(os.environ.get("WORKBENCH_STORE") or Path(run_folder) / "readings")

    def key(self, probe: Probe[Any], subject: Any, seed: int = 0) -> str:
        """The key of what ``probe`` would measure on ``subject`` now; the subject's fingerprint is read again."""
        facts = {
            "fingerprint": subject.fingerprint(),
            "context": probe.context(subject),
            "seed": seed,
            "subject": subject.describe(),
            "versions": versions(),
        }
        return key_of(probe, facts)

    # --- asking and keeping ---------------------------------------------------------------------------------------

    def get(self, key: str) -> Reading | None:
        """The finished reading under ``key``; None without one, or when its file is damaged (said, set aside)."""
        found = self._read(self._file(key, FINISHED))
        return found if found is not None and found.done == 1 else None

    def ask(self, probe: Probe[Any], key: str) -> Reading | None:
        """As ``get``, speaking through ``probe``: settings that only change the picture are the ones asked for."""
        found = self.get(key)
        return found if found is None else dataclasses.replace(found, probe=probe)

    def partial(self, key: str) -> Reading | None:
        """What an unfinished run under ``key`` had reached: to be shown or taken further, never an answer."""
        return self._read(self._file(key, PARTIAL))

    def get_or_run(self, probe: Probe[Any], subject: Any, seed: int = 0, seconds: float | None = None) -> Reading:
        """The stored answer, else measure (on from where a run was cut short) and keep it. Arguments: ``Probe.run``."""
        key = self.key(probe, subject, seed)
        found = self.ask(probe, key)
        if found is not None:
            return found
        last = probe.run(subject, seed=seed, seconds=seconds, before=self.partial(key))
        try:
            self.save(last)  # under the key of what was measured, should the model have moved since it was asked
        except OSError as problem:  # hours of work are not thrown away because a disk is full
            warnings.warn(f"{problem} The reading itself is returned.", StoreWarning, stacklevel=2)
        return last

    def save(self, reading: Reading, key: str | None = None) -> str:
        """Keep a reading: all of it or nothing, whatever happens meanwhile. Returns its key.

        A partial reading is kept apart, under the ending ``.partial``, until a finished one takes its place.

        Args:
            reading: what to keep.
            key: as ``key()`` gives it; None works it out from the reading's provenance.

        Raises:
            OSError: the file cannot be written; whatever was stored before is as it was.
        """
        key = key or _key_inside(reading)
        finished, target = self._file(key, FINISHED), self._file(key, FINISHED if reading.done == 1 else PARTIAL)
        if reading.done < 1 and finished.exists():
            return key
        self._write(target, reading.to_bytes())
        with suppress(sqlite3.Error, OSError):  # the file is safe; the index catches up at the next look
            self._index.note(target, reading)
        self._remember(target, reading)
        if target == finished:
            self._file(key, PARTIAL).unlink(missing_ok=True)
        self._trim(self.cap, keep=target)
        return key

    # --- looking around -------------------------------------------------------------------------------------------

    def find(
        self,
        probe: str | type | None = None,
        subject: str | None = None,
        seed: int | None = None,
        partial: bool = False,
    ) -> list[Entry]:
        """The entries that fit, newest first.

        Args:
            probe: a probe's class, name or ``module:Class``.
            subject: a pattern with ``*`` and ``?`` for the label (model, run) or the fingerprint.
            seed: of the reading.
            partial: list unfinished readings instead of finished ones.
        """
        wanted = [e for e in self._entries() if (e.done < 1) == partial and (seed is None or e.seed == seed)]
        return [e for e in wanted if e.is_by(probe) and e.is_on(subject)]

    def _entries(self) -> list[Entry]:
        return self._index.entries(self._files(), self._set_aside) if self.path.is_dir() else []

    def load(self, key: str) -> Reading:
        """The finished reading under a key or the unambiguous start of one; ``FileNotFoundError`` otherwise."""
        try:
            return self[key]
        except KeyError as problem:
            raise FileNotFoundError(problem.args[0]) from None

    def __getitem__(self, key: str) -> Reading:
        found = self.get(self._only(key))
        if found is None:
            raise KeyError(f"the reading {key!r} was damaged and has been set aside in {self.path}; measure it again.")
        return found

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._file(key, FINISHED).is_file()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(f.name.removesuffix(FINISHED) for f in self._files() if f.name.endswith(FINISHED)))

    def __bool__(self) -> bool:
        return True  # an empty store is a store: ``store or Store()`` must not pass it by

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"<Store {self.path}: {len(self)} readings>"

    def _only(self, prefix: str) -> str:
        fits = [key for key in self if key.startswith(prefix)] if prefix else []
        if len(fits) == 1 or prefix in fits:
            return prefix if prefix in fits else fits[0]
        if fits:
            listed = ", ".join(fits[:4])
            raise KeyError(f"{len(fits)} readings in {self.path} begin with {prefix!r}: {listed}; say more of it.")
        raise KeyError(
            f"no finished reading in {self.path} has a key that begins with {prefix!r}; store.find() lists the "
            f"{len(self)} that are there."
        )

    # --- keeping house --------------------------------------------------------------------------------------------

    def rebuild(self) -> int:
        """Make the index again from the files, setting damaged ones aside. Returns how many are listed."""
        self._index.drop()
        return len(self._entries())

    def prune(self, bytes: int | None = None, older: float | timedelta | None = None) -> int:  # noqa: A002
        """Remove readings, those unused for longest first, and what crashes left behind. Returns how many went.

        Args:
            bytes: what the readings may take together afterwards.
            older: seconds (or a timedelta): everything not used for so long goes.
        """
        limit = older.total_seconds() if isinstance(older, timedelta) else older
        gone = [f for f in self._files() if limit is not None and time.time() - f.stat().st_mtime > limit]
        for file in gone:
            file.unlink(missing_ok=True)
        self._sweep()
        return len(gone) + (self._trim(bytes) if bytes is not None else 0)

    def _trim(self, limit: int, keep: Path | None = None) -> int:
        """Remove the longest unused until ``limit`` bytes are left; ``keep`` was just written and stays."""
        held = sorted(((s.st_mtime, s.st_size, f) for f in self._files() if (s := _stat(f))), key=lambda h: h[:2])
        excess, gone = sum(size for _, size, _ in held) - limit, 0
        for _, size, file in held:
            if excess > 0 and file != keep:
                file.unlink(missing_ok=True)
                excess, gone = excess - size, gone + 1
        return gone

    def _sweep(self) -> None:
        """Remove damaged files, and temporary ones whose writer was killed."""
        for file in self.path.glob(f"*{DAMAGED}"):
            file.unlink(missing_ok=True)
        for file in self.path.glob(f".*{HALF}"):
            found = _stat(file)
            if found and time.time() - found.st_mtime > _STALE:
                file.unlink(missing_ok=True)

    # --- files ----------------------------------------------------------------------------------------------------

    def _file(self, key: str, ending: str) -> Path:
        return self.path / f"{key}{ending}"

    def _files(self) -> list[Path]:
        try:
            with os.scandir(self.path) as found:
                return [Path(f.path) for f in found if f.name.endswith((FINISHED, PARTIAL)) and f.name[0] != "."]
        except FileNotFoundError:
            return []

    def _read(self, file: Path) -> Reading | None:
        try:
            reading = self._opened(file)
        except FileNotFoundError:
            return None
        except ValueError as problem:
            self._set_aside(file, problem)
            return None
        with suppress(OSError):  # a store that may only be read
            os.utime(file)
        return reading

    def _opened(self, file: Path) -> Reading:
        """From memory where the file is still the one read before: opening netCDF costs tens of milliseconds."""
        with self._lock:
            known, reading = self._recent.get(file, ("", None))
        if reading is None or known != stamp(file):
            reading = opened(file)
            self._remember(file, reading)
        return dataclasses.replace(reading, data=reading.data.copy())  # the arrays stay shared; they are read-only

    def _remember(self, file: Path, reading: Reading) -> None:
        with self._lock:
            self._recent.pop(file, None)
            if reading.data.nbytes <= _SMALL:
                self._recent[file] = stamp(file), reading
            while len(self._recent) > _RECENT:
                self._recent.popitem(last=False)

    def _set_aside(self, file: Path, problem: Exception) -> None:
        with suppress(OSError):
            os.replace(file, f"{file}{DAMAGED}")
        warnings.warn(f"{problem} It was set aside and will be measured again.", StoreWarning, stacklevel=2)

    def _write(self, target: Path, content: bytes) -> None:
        """Atomic: a reader sees the old file or the new one; a crash leaves a temporary file that is never read."""
        half = self.path / f".{target.name}.{uuid.uuid4().hex}{HALF}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with half.open("wb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
            os.replace(half, target)
        except OSError as problem:
            with suppress(OSError):
                half.unlink(missing_ok=True)
            raise _no_room(self.path, len(content), problem) from problem


def _default_folder() -> Path:
    if os.environ.get("WORKBENCH_STORE"):
        return Path(os.environ["WORKBENCH_STORE"]).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("workbench", appauthor=False) / "readings"


def _key_inside(reading: Reading) -> str:
    if not {"fingerprint", "seed"} <= reading.provenance.keys():
        raise ValueError("This reading does not say what it was measured on; give key=store.key(probe, subject, seed).")
    return key_of(reading.probe, reading.provenance)


def _no_room(folder: Path, needed: int, problem: OSError) -> OSError:
    said = problem.strerror or str(problem)
    room = ""
    if problem.errno in (errno.ENOSPC, errno.EDQUOT):
        with suppress(OSError):
            room = f" {needed:,} bytes are needed and {shutil.disk_usage(folder).free:,} are free."
    return OSError(
        problem.errno,
        f"The store in {folder} cannot be written: {said}.{room} Free some space, remove old readings by "
        "store.prune(bytes=...), or set WORKBENCH_STORE to a folder elsewhere. What was stored before is unharmed.",
    )


def _stat(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except OSError:
        return None
