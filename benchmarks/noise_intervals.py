"""How often do intervals of the gradient noise scale hold? The jackknife that the probe uses beside the bootstrap.

``python benchmarks/noise_intervals.py`` prints a Markdown table and writes ``benchmarks/results/noise_intervals.json``.
Gradients g_i are drawn from laws whose 1/B = ‖G‖²/tr Σ is known, ``--seeds`` times for each row. The jackknife is that
of ``workbench.numerics.noise_scale``, at 95 % as it is stated and narrowed to 90 %. The bootstrap, at 90 %, resamples
gradients with replacement and needs the products of all pairs: its percentiles, and the basic interval that turns them
over. It ends with 1 where the jackknife's 95 % covers less than 90 % of the seeds of a row.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from workbench.numerics.noise_scale import LEVEL, NoiseSums

Floats = NDArray[np.float64]
Law = tuple[str, float, Callable[[np.random.Generator, int], Floats]]
"""What gradients are like, their noise scale B, and so many of them (n, d)."""
RESULTS = Path(__file__).parent / "results" / "noise_intervals.json"
SIZES = (64, 512)
RESAMPLES = 400
NARROW = 0.9
LEAST = 0.9
DIMENSION = 50


def laws(count: int) -> Iterator[Law]:
    """Normal and heavy-tailed gradients of noise scales from 4 to four times their count, and those of regression."""
    deviation = np.exp(-np.arange(DIMENSION) / 10)
    for scale in (4.0, count / 4, float(count), 4.0 * count):
        mean = np.zeros(DIMENSION)
        mean[3] = math.sqrt(np.square(deviation).sum() / scale)

        def normal(rng: np.random.Generator, n: int, mean: Floats = mean) -> Floats:
            return mean + deviation * rng.standard_normal((n, DIMENSION))

        def heavy(rng: np.random.Generator, n: int, mean: Floats = mean) -> Floats:
            return mean + deviation * rng.standard_normal((n, DIMENSION)) * np.sqrt(3 / rng.chisquare(5, (n, 1)))

        yield "normal", scale, normal
        yield "t, 5 degrees", scale, heavy
    for noise in (0.0, 5.0):

        def regression(rng: np.random.Generator, n: int, noise: float = noise) -> Floats:
            x = rng.standard_normal((n, 10))
            return (x.sum(1) - noise * rng.standard_normal(n))[:, None] * x

        yield "regression", 11 + noise**2, regression  # ((d + 1) ‖w‖² + d s²) / ‖w‖² with d = ‖w‖² = 10


def jackknife(gradients: Floats) -> tuple[float, float]:
    """1/B and half the width of its 95 % interval, as the probe has them."""
    mean = gradients.mean(0)
    squares, along = np.square(gradients).sum(1)[:, None], (gradients @ mean)[:, None]
    found = NoiseSums(squares, along, np.array([mean @ mean]), len(gradients)).estimate()
    return float(found.snr[0]), float(found.error[2, 0])


def bootstrap(gradients: Floats, rng: np.random.Generator) -> tuple[float, float]:
    """The ends of the percentile interval of 1/B over resampled gradients."""
    n = len(gradients)
    pairs, counts = gradients @ gradients.T, rng.multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(np.float64)
    square = ((counts @ pairs) * counts).sum(1) / n**2
    trace = (counts @ np.diag(pairs) / n - square) * n / (n - 1)
    low, high = np.quantile((square - trace / n) / trace, [(1 - NARROW) / 2, (1 + NARROW) / 2])
    return float(low), float(high)


def covered(law: Law, count: int, seeds: int) -> dict[str, float | int | str]:
    """The share of seeds for which each interval holds 1/B."""
    words, scale, draw = law
    narrower = stats.t.ppf((1 + NARROW) / 2, count - 1) / stats.t.ppf((1 + LEVEL) / 2, count - 1)
    held = dict.fromkeys(("jackknife 95 %", "jackknife 90 %", "percentile 90 %", "basic 90 %"), 0)
    for seed in range(seeds):
        rng = np.random.default_rng([seed, count])
        gradients = draw(rng, count)
        (value, half), (low, high) = jackknife(gradients), bootstrap(gradients, rng)
        ends = ((value - half, value + half), (value - narrower * half, value + narrower * half), (low, high))
        for name, (a, b) in zip(held, (*ends, (2 * value - high, 2 * value - low)), strict=True):
            held[name] += bool(a <= 1 / scale <= b)
    return {"gradients": words, "count": count, "noise_scale": scale} | {n: k / seeds for n, k in held.items()}


def table(rows: list[dict[str, float | int | str]]) -> str:
    """The rows in Markdown; coverages as percentages."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    for words, count, scale, *shares in (row.values() for row in rows):
        lines.append(f"| {words} | {count} | {scale:g} | " + " | ".join(f"{s:.0%}" for s in shares) + " |")
    return "\n".join(lines)


def main() -> None:
    """Count, print, write; 1 where the jackknife covers too little."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=300, help="draws for each row")
    seeds = parser.parse_args().seeds
    rows = [covered(law, count, seeds) for count in SIZES for law in laws(count)]
    print(table(rows))
    facts = {"numpy": np.__version__, "seeds": seeds, "resamples": RESAMPLES, "least": LEAST}
    RESULTS.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    if short := [row for row in rows if float(row["jackknife 95 %"]) < LEAST]:
        print("Not held:", *short, sep="\n  ", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
