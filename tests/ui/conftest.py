"""The catalog of these tests: toys, so that the front ends are tested whatever measures there are."""

from __future__ import annotations

from typing import Any

import pytest
from ui.toys import Broken, Endless, Nested, Wave

from workbench import catalog

TOYS = (Wave, Endless, Broken, Nested)


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Only toys are on offer."""
    known = {cls.__name__: cls for cls in TOYS}
    monkeypatch.setattr(
        catalog,
        "probes",
        lambda looks_at=None: {n: c for n, c in known.items() if looks_at in (None, c.looks_at, *c.looks_also_at)},
    )
    return known
