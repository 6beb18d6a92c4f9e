"""Delays between crossings as numbers with errors: of one run, of what other test sets might have shown, over runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from workbench.numerics.crossings import Crossing, between, ratio, sustained

Floats = NDArray[np.float64]
RESAMPLES = 1000
"""Test sets that are drawn."""
COVERED = 0.95
"""Share of them that an interval holds."""
RESAMPLED = ("step_generalise", "delay", "delay_ratio")
"""Numbers that have an interval over resampled test sets."""
PHASES = ("confusion", "memorisation", "grokking", "comprehension")
"""How a training can end, by number: learns nothing, by heart alone, by heart and much later the rest, or at once."""
_BLOCK = 50


@dataclass(frozen=True)
class Retested:
    """Crossings of the resampled test scores of one run, each (RESAMPLES,): infinite where none comes.

    ``grokked`` says of each whether the run would have counted as one that grokked.
    """

    step: Floats
    earliest: Floats
    grokked: NDArray[np.bool_]

    def interval(self, name: str, train: Crossing) -> tuple[float, float]:
        """The ends of the interval of a quantity, its steps known to the evaluations; ``train`` began the delay.

        An end is infinite where more resamples than the interval leaves out never generalise; nan where none of it is
        known.

        Args:
            name: step_generalise, delay or delay_ratio.
            train: the crossing of the training score.
        """
        low, high = self.earliest, self.step
        if name == "delay":
            low, high = low - train.step, high - train.earliest
        elif name == "delay_ratio":
            low, high = (low / train.step, high / max(train.earliest, 1.0)) if train.step > 0 else (low * np.nan,) * 2
        rest = (1 - COVERED) / 2
        ends = np.quantile(low, rest, method="lower"), np.quantile(high, 1 - rest, method="higher")
        return float(ends[0]), float(ends[1])


def resampled(scores: Floats, examples: int, rng: Generator, count: int) -> Floats:
    """Scores (count, n) of test sets drawn with replacement from one with scores (n,), each a share of ``examples``.

    Which examples are right is not recorded, only how many. They are taken to be learnt, and lost, in one order: the
    examples right at one evaluation are among those that are right wherever the score is higher. So an example is
    known by the lowest score at which it is right, and a resample is a draw from these. Cost: count times n.
    """
    levels, where = np.unique(scores, return_inverse=True)
    shares = np.diff(levels, prepend=0.0, append=1.0).clip(0.0)
    drawn = rng.multinomial(examples, shares / shares.sum(), count)
    return np.cumsum(drawn, axis=1)[:, :-1][:, where] / examples


def retested(
    steps: Floats,
    scores: Floats,
    examples: int,
    rng: Generator,
    *,
    threshold: float,
    train: Crossing,
    least_ratio: float,
    chance: float | None = None,
) -> Retested:
    """Every resample of the test scores (n,) at ``steps`` (n,), read as Grokking reads the recorded ones.

    Args:
        steps: of the evaluations, ascending.
        scores: shares of test examples, 0 to 1.
        examples: how many there are.
        rng: of the draws.
        threshold: score that counts as learned.
        train: the crossing of the training score.
        least_ratio: delay ratio from which it is grokking.
        chance: score of guessing; None: the first one.
    """
    found = np.full((2, RESAMPLES), np.inf)
    flags = np.zeros(RESAMPLES, dtype=bool)
    for begin in range(0, RESAMPLES, _BLOCK):
        for i, row in enumerate(resampled(scores, examples, rng, _BLOCK), begin):
            crossing = sustained(steps, row, threshold)
            if np.isfinite(crossing.step):
                found[:, i] = crossing.step, crossing.earliest
            flags[i] = grokked(steps, row, crossing, train, threshold, least_ratio, chance)
    return Retested(found[0], found[1], flags)


def grokked(
    steps: Floats,
    scores: Floats,
    test: Crossing,
    train: Crossing,
    threshold: float,
    least_ratio: float,
    chance: float | None = None,
) -> bool:
    """Whether a delay is grokking: long enough, from a test score still near chance, to one that is there at the end.

    Args:
        steps: of the test evaluations, ascending, (n,).
        scores: at these, (n,).
        test: the crossing of these scores.
        train: the crossing of the training score.
        threshold: score that counts as learned.
        least_ratio: of the two steps.
        chance: score of guessing; None: the first one.
    """
    if not train.step > 0 or not test.step >= least_ratio * train.step:
        return False
    then = scores[max(int(np.searchsorted(steps, train.step, "right")) - 1, 0)]
    guess = scores[0] if chance is None else chance
    return bool(then <= (guess + scores[-1]) / 2 and scores[-1] >= threshold)


def numbers_of(found: Mapping[str, Crossing], tests: Retested | None) -> dict[str, tuple[float, float]]:
    """(value, error) of each headline number of one run.

    Args:
        found: crossings of train, test, train_loss, test_loss and signal.
        tests: those of resampled test scores; None: not known.
    """
    train, test, signal = found["train"], found["test"], found["signal"]
    losses = found["train_loss"], found["test_loss"]
    numbers = {
        "step_memorise": (train.step, train.error),
        "step_generalise": (test.step, test.error),
        "delay": between(train, test),
        "delay_ratio": ratio(train, test),
        "loss_delay": between(*losses),
        "loss_delay_ratio": ratio(*losses),
        "lead_time": (test.step - signal.step, test.error + signal.error),
    }
    for name in RESAMPLED if tests is not None else ():
        (value, error), (low, high) = numbers[name], tests.interval(name, train)  # type: ignore[union-attr]
        numbers[name] = value, max(error, value - low, high - value)
    return numbers


def over_runs(pairs: Floats, never: NDArray[np.bool_]) -> tuple[float, float]:
    """Median of (value, error) over runs, those that never got there as infinite; nan where it is not finite.

    Args:
        pairs: value and error of each run, (runs, 2).
        never: which of them never got there, (runs,).
    """
    if len(pairs) == 1:
        return float(pairs[0, 0]), float(pairs[0, 1])
    values = np.where(never, np.inf, pairs[:, 0])
    there = ~np.isnan(values)
    if not there.any() or not np.isfinite(middle := float(np.median(values[there]))):
        return np.nan, np.nan
    ends = [np.quantile(values[there], (0.25, 0.75), method=side) for side in ("lower", "higher")]
    reach = float(np.diff(sum(ends) / 2)[0]) / 2 if np.isfinite(ends).all() else np.nan  # half between quartiles
    return middle, max(reach, float(np.nanmedian(pairs[:, 1]))) if np.isfinite(reach) else np.nan


def phase(train: Crossing, test: Crossing, soon: float) -> int:
    """The number in :data:`PHASES` of a training: a test score that follows within ``soon`` steps is comprehension."""
    if np.isnan(train.step):
        return 0
    if np.isnan(test.step):
        return 1
    return 2 if test.step - train.step > soon else 3


def phases_in_words(numbers: Floats) -> str:
    """How many runs ended in which phase; the phase alone of one run, and unknown ones left out."""
    counts = [(int((numbers == k).sum()), name) for k, name in enumerate(PHASES)]
    there = [(count, name) for count, name in counts if count]
    return ", ".join(name if len(numbers) == 1 else f"{count} {name}" for count, name in there) or "unknown"
