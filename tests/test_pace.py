"""The clock between readings."""

from __future__ import annotations

import pytest

from workbench import pace


def test_the_first_is_due_at_once_and_the_next_when_time_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(pace, "PAUSE", 0.05)
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    clock, asked = pace.Pace(), []
    for now[0] in (100.0, 100.04, 100.051, 100.09, 100.11):
        asked.append(clock.due())
    assert asked == [True, False, True, False, True]
