"""The scalars file while it is being written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workbench import record
from workbench.record import Line


class Lines:
    """Appends lines to ``scalars.jsonl``, each in one system call: a kill leaves it whole, or cut short at the end."""

    def __init__(self) -> None:
        self._path, self._file, self._size = Path(), None, 0

    @property
    def open(self) -> bool:
        """Whether lines can be written."""
        return self._file is not None

    def begin(self, path: Path, whole: int) -> None:
        """Go on after the first ``whole`` bytes of a file, or begin it."""
        self._path = path
        self._file: Any = path.open("ab", buffering=0)
        self._file.truncate(whole)
        self._size = whole

    def write(self, line: Line) -> None:
        """Append a line, or nothing of it; ``OSError`` when the disk is full."""
        self.put(line.to_bytes())

    def put(self, content: bytes) -> None:
        """Append the bytes of a line, as ``write`` does."""
        if self._file.write(content) < len(content):
            self._file.truncate(self._size)
            raise record.full(self._path)
        self._size += len(content)

    def close(self) -> None:
        """Write no more."""
        if self._file is not None:
            self._file.close()
            self._file = None
