"""How often a running probe makes a reading: often enough to watch, seldom enough to cost nothing."""

from __future__ import annotations

import time

PAUSE = 0.05
"""Seconds between two readings: nobody sees more than twenty pictures a second, and each takes milliseconds."""


class Pace:
    """A clock that says when the next reading is due; the first is due at once."""

    def __init__(self) -> None:
        self._last = float("-inf")

    def due(self) -> bool:
        """Whether so much time has passed since this was last true."""
        now = time.monotonic()
        if now - self._last < PAUSE:
            return False
        self._last = now
        return True
