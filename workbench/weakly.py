"""A reference that does not keep its thing alive, and that stays behind when its holder travels."""

from __future__ import annotations

import weakref
from typing import Any


class Weakly:
    """Remembers a thing as long as somebody else holds it: ``Weakly(thing)()`` is the thing, or None.

    Pickled or sent elsewhere it is empty, so that whoever holds one can be stored without what it remembers.
    """

    def __init__(self, thing: Any = None) -> None:
        self._reference = None if thing is None else weakref.ref(thing)

    def __call__(self) -> Any:
        """The thing; None when it is gone or never was."""
        return None if self._reference is None else self._reference()

    def __reduce__(self) -> tuple[type[Weakly], tuple[()]]:
        return Weakly, ()
