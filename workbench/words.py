"""Numbers as people read them: a value with its error, times, sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping

HOW_TO_OPEN = {
    "subject": "Make one with wb.Subject(model, data, loss=...) or trajectory.subject(step).",
    "pair": "Make one with wb.Pair(first, second).",
    "trajectory": "Open one with wb.Trajectory.open(folder).",
    "runs": "Make one with wb.Runs({label: subject or trajectory}).",
    "nothing": "It trains its own nets: run() without arguments.",
}
"""Each kind of thing that a probe can look at, and what gives one."""
MODEL_CHANGED = (
    "the model's weights changed while the probe was running, so its numbers would mix two models; "
    "probe subject.snapshot(), which cannot change, or wait until training pauses."
)


def with_error(value: float, error: float | None) -> str:
    """``1.234 ± 0.005``: the value to the digits that its error supports; nan is said as unknown."""
    if math.isnan(value):
        return "unknown"
    if error is None or math.isnan(error):
        return f"{value:.4g}"
    if error == 0 or not math.isfinite(error) or not math.isfinite(value):
        return f"{value:.6g}" if error == 0 else f"{value:.3g} ± {error:.2g}"
    digits = max(2, math.floor(math.log10(max(abs(value), error))) - math.floor(math.log10(error)) + 2)
    return f"{value:.{min(digits, 10)}g} ± {error:.2g}"


def summary_words(summary: Mapping[str, float | int | str | bool]) -> str:
    """All headline numbers on one line."""
    return ", ".join(f"{name}={text}" for name, text in summary_rows(summary))


def summary_rows(summary: Mapping[str, float | int | str | bool]) -> list[tuple[str, str]]:
    """(name, text) of each headline number, its error joined to it."""
    rows: list[tuple[str, str]] = []
    for name, value in summary.items():
        if name.endswith("_error") and name.removesuffix("_error") in summary:
            continue
        rows.append((name, _text(value, summary.get(f"{name}_error"))))
    return rows


def _text(value: float | int | str | bool, error: float | int | str | bool | None) -> str:
    if isinstance(value, bool | str | int):
        return str(value)
    return with_error(value, float(error) if isinstance(error, int | float) else None)


def duration(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def moment(seconds: float) -> str:
    """``12 ms`` below a second, else as :func:`duration`."""
    return f"{1000 * seconds:.2g} ms" if seconds < 0.0995 else duration(seconds)


def memory(count: float) -> str:
    """``40 MB``, ``1.3 GB``: bytes in powers of a thousand."""
    for unit in ("bytes", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
