"""Writing files whole or not at all: a temporary file beside the target, then one rename."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def write_all(contents: Mapping[Path, bytes]) -> None:
    """Write several files so that old ones stay as they were unless all new ones are complete.

    Raises:
        OSError: a folder is missing or not writable, or the disk is full; nothing has changed then.
    """
    ready: dict[Path, str] = {}
    try:
        for path, content in contents.items():
            ready[path] = _beside(path, content)
        for path, temporary in list(ready.items()):
            os.replace(temporary, path)
            del ready[path]
    except OSError as problem:
        raise _explained(problem, list(contents)) from problem
    finally:
        for temporary in ready.values():
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _beside(path: Path, content: bytes) -> str:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return temporary


def _umask() -> int:
    """The process's mask for new files, read without changing it where the system allows."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1], 8) for line in status if line.startswith("Umask:"))
    except (OSError, StopIteration):
        return 0o022


def _explained(problem: OSError, paths: list[Path]) -> OSError:
    names = " and ".join(p.name for p in paths)
    folder = paths[0].parent
    if problem.errno in (errno.ENOSPC, errno.EDQUOT):
        words = (
            f"cannot write {names}: the disk that holds {folder} is full; any older file is as it was. Free some space"
        )
    elif problem.errno == errno.ENOENT:
        words = f"cannot write {names}: the folder {folder} does not exist. Make it first"
    else:
        words = (
            f"cannot write {names} in {folder}: {problem.strerror}; any older file is as it was. Check its permissions"
        )
    return OSError(problem.errno, f"{words}, or choose another folder.")
