"""What follows on both front ends when a person goes to another point or part of a map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Moves:
    """A front end whose session looks elsewhere; it brings the session, its form and how it asks for a reading."""

    session: Any
    _show_form: Callable[[], None]
    _submit: Callable[[], None]

    def _go(self) -> None:
        if self.session.places.go():
            self._submit()

    def _back(self) -> None:
        if self.session.places.back():
            self._submit()

    def _resample(self) -> None:
        """The settings say another part of the map."""
        self._show_form()
        self._submit()
