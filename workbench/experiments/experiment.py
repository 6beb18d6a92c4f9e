"""What an experiment is: a probe of a training recipe, whose data a verdict is given on."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import xarray as xr

from workbench.nothing import Nothing
from workbench.probe import Look, Probe, Reading
from workbench.words import with_error


@dataclass(frozen=True)
class Verdict:
    """Whether an effect showed: a ``statistic`` beside the ``threshold`` that it must reach, and both in words.

    A statistic that is nan (nothing was reached, or the run is not over) never passes.
    """

    passed: bool
    statistic: float
    threshold: float
    words: str

    def __str__(self) -> str:
        """``passed: 5.63, wanted at least 2 (...)``."""
        state = "passed" if self.passed else "failed"
        return f"{state}: {with_error(self.statistic, None)}, wanted at least {self.threshold:g} ({self.words})"


@dataclass(frozen=True)
class Experiment(Probe[Nothing]):
    """A paper's effect in the smallest setting that shows it, with the paper's knobs as settings, and a ``verdict``.

    It looks at nothing: ``stream`` builds and trains nets of its own from the settings and ``draw.seed``, and yields
    their curves while they grow, so that it runs in a job, is stored and drawn as any probe. Measures are those of the
    workbench, never copies. Thresholds stand in the class, set on the seeds in ``calibrated_on``, which are not those
    that ``workbench experiment`` judges.
    """

    looks_at: ClassVar[Look] = "nothing"
    calibrated_on: ClassVar[tuple[int, ...]] = (100, 101, 102, 103, 104)

    def run(
        self,
        subject: Nothing | None = None,
        seed: int = 0,
        seconds: float | None = None,
        on_reading: Callable[[Reading], None] | None = None,
        plan: Any = None,
        before: Reading | None = None,
    ) -> Reading:
        """As ``Probe.run``; there is nothing to look at, so that ``experiment.run(seed=1)`` will do."""
        return super().run(subject or Nothing(), seed, seconds, on_reading, plan, before)

    @property
    def threshold_words(self) -> str:
        """Where the threshold comes from."""
        first, last = self.calibrated_on[0], self.calibrated_on[-1]
        return f"thresholds were set with default settings on seeds {first} to {last}"

    @abstractmethod
    def verdict(self, data: xr.Dataset) -> Verdict:
        """Whether the effect shows in the data of a reading."""


@dataclass(frozen=True)
class Judged:
    """One seed of an experiment: its reading, the verdict, and the seconds that it took."""

    seed: int
    verdict: Verdict
    seconds: float
    reading: Reading


def judge(
    experiment: Experiment, seeds: Iterable[int], on_reading: Callable[[Reading], None] | None = None
) -> Iterator[Judged]:
    """Run seed after seed, each as far as its end, and yield its verdict."""
    for seed in seeds:
        began = time.perf_counter()
        reading = experiment.run(seed=seed, on_reading=on_reading)
        yield Judged(seed, experiment.verdict(reading.data), time.perf_counter() - began, reading)
