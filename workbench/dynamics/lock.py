"""One writer a record: a lock file that names its process, taken over by the next one when that is gone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import weakref
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

LOCK = "writer.lock"
_SAME_START = 2.0  # seconds by which one process's start may seem to differ between two looks at it


class InUse(RuntimeError):
    """Another recorder is writing into the folder."""


def take(folder: Path, owner: object) -> weakref.finalize[Any, Any]:
    """Become the only writer of a folder until the result is called, ``owner`` is collected, or the process ends.

    Raises:
        InUse: a living process holds the lock, or one on another machine does, which cannot be looked at from here.
    """
    path, mine = folder / LOCK, _process(os.getpid())
    with _alone(folder):
        held = _read(path)
        if held is not None and _alive(held):
            raise InUse(
                f"{folder} is being written by process {held['pid']}"
                f"{'' if held['host'] == mine['host'] else ' of another machine'}; one record takes one writer. Choose "
                f"another folder or end that training; if you know that it is gone, delete {path}."
            )
        path.write_text(json.dumps(mine), encoding="utf-8")
    return weakref.finalize(owner, _give_up, path, mine)


def is_written(folder: Path) -> bool:
    """Whether a recorder is writing into the folder; true also of one on another machine, which may be gone."""
    held = _read(folder / LOCK)
    return held is not None and _alive(held)


def _process(pid: int) -> dict[str, Any]:
    import psutil

    host = hashlib.blake2b(platform.node().encode(), digest_size=8).hexdigest()
    return {"pid": pid, "started": psutil.Process(pid).create_time(), "host": host}


def _read(path: Path) -> dict[str, Any] | None:
    """What the lock says; None when there is none, or when its writer was killed while writing it."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return cast("dict[str, Any]", held) if {"pid", "started", "host"} <= set(held) else None


def _alive(held: dict[str, Any]) -> bool:
    import psutil

    if held["host"] != _process(os.getpid())["host"]:
        return True
    try:
        # A process number is used again after its process ended; the start time tells the two apart.
        return abs(_process(held["pid"])["started"] - held["started"]) < _SAME_START
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _give_up(path: Path, mine: dict[str, Any]) -> None:
    if os.getpid() == mine["pid"] and _read(path) == mine:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Generator[None]:
    """Keep other processes out while the lock is looked at; the kernel lets go when this process dies."""
    if os.name != "posix":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
