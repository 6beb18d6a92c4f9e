"""How many points does a loss surface take? Adaptive sampling against uniform grids, and how honest its error is.

``python benchmarks/adaptive.py`` prints a Markdown table and writes ``benchmarks/results/adaptive.json``. The truth is
the logarithm of the loss on 65 × 65 points; the error is the root mean square difference over its standard deviation.
For each way the row has the number of points from which on the error stays below 1 %; uniform grids are n × n points
of the surface itself with n odd, so that the model in the centre is one of them. The nets are trained on the digits
for 500 steps, where their loss is smooth at the scale of the plane, and for 4000, where it has a sharp minimum.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import RectBivariateSpline, RegularGridInterpolator

from workbench.landscape.directions import mover, random_direction
from workbench.numerics.adaptive import Sampler
from workbench.numerics.sampling import Draw
from workbench.subject import Subject
from workbench.zoo.digits import digits
from workbench.zoo.nets import conv, dense
from workbench.zoo.training import train

Array = NDArray[np.float64]
Function = Callable[[float, float], float]
TICKS = np.linspace(-1, 1, 65)
GOAL = 0.01
SIDES = tuple(range(5, 42, 2))
LIMIT = 300
PLANES = 3


@dataclass(frozen=True)
class Row:
    """Points to 1 %, where the stated error stopped and its true error there, and stated over true error all along."""

    surface: str
    adaptive: int | None
    bilinear: int | None
    bicubic: int | None
    stopped: int | None
    error_then: float
    ratios: list[float]


def bowl(u: float, v: float) -> float:
    return 0.01 + 3 * (u * u + v * v) + 0.02 * (math.sin(9 * u) * math.cos(7 * v)) ** 2


def valley(u: float, v: float) -> float:
    """Curvatures 100 and 1 in axes turned by half a radian."""
    along, across = v * math.cos(0.5) - u * math.sin(0.5), u * math.cos(0.5) + v * math.sin(0.5)
    return 0.02 + 50 * across**2 + 0.5 * along**2


def cliff(u: float, v: float) -> float:
    return math.exp(u * u - v * v + 3 / (1 + math.exp(-40 * (u + 0.4 * v - 0.5))))


def surfaces() -> Iterator[tuple[str, Function]]:
    yield from (("bowl with ripples", bowl), ("valley 100:1", valley), ("saddle with a cliff", cliff))
    for steps in (500, 4000):
        for name, net, rate in (("dense", dense(), 0.1), ("conv", conv(), 0.05)):
            train(net, digits().train, steps, lr=rate)
            subject = Subject(net, digits().train, max_examples=512)
            for seed in range(PLANES):
                yield f"{name}, {steps} steps, plane {seed}", partial(_loss, _moved(subject, seed), subject)


def _moved(subject: Subject, seed: int) -> Callable[[float, float], Any]:
    draw = Draw(seed, "Plane", subject.size)
    return mover(subject, *(random_direction(subject, draw, k, "filter") for k in (0, 1)))


def _loss(at: Callable[[float, float], Any], subject: Subject, u: float, v: float) -> float:
    return float(subject.loss(at(u, v)))


def logs(surface: Function, ticks: Array) -> Array:
    return np.log([[surface(float(u), float(v)) for v in ticks] for u in ticks])


def distance(found: Array, truth: Array) -> float:
    return float(np.sqrt(np.mean((found - truth) ** 2)) / truth.std())


def uniform(surface: Function, truth: Array) -> list[tuple[int, float, float]]:
    """Points, error of bilinear and of bicubic interpolation."""
    grid, found = np.stack(np.meshgrid(TICKS, TICKS, indexing="ij"), axis=-1), []
    for side in SIDES:
        ticks = np.linspace(-1, 1, side)
        z = logs(surface, ticks)
        linear, cubic = RegularGridInterpolator((ticks, ticks), z)(grid), RectBivariateSpline(ticks, ticks, z)
        found.append((side * side, distance(linear, truth), distance(cubic(TICKS, TICKS), truth)))
    return found


def adaptive(truth: Array) -> list[tuple[int, float, float]]:
    """Points, true error and stated error after each batch of two."""
    sampler, found = Sampler(lattice=len(TICKS), limit=LIMIT, tolerance=0.0), []
    while len(sampler) < LIMIT:
        points = sampler.ask(8 if len(sampler) < 40 else 2)
        i, j = np.round((points.T + 1) / 2 * (len(TICKS) - 1)).astype(int)
        sampler.tell(points, np.exp(truth[i, j]))
        if len(sampler) > 8:
            found.append(
                (len(sampler), distance(np.log(sampler.surface(TICKS, TICKS)[0]), truth), float(sampler.error))
            )
    return found


def settled(points: list[int], errors: list[float]) -> int | None:
    """The number of points from which on all errors are below the goal."""
    bad = [k for k, e in enumerate(errors) if e > GOAL]
    after = bad[-1] + 1 if bad else 0
    return points[after] if after < len(points) else None


def measure(name: str, surface: Function) -> Row:
    truth = logs(surface, TICKS)
    grids, run = uniform(surface, truth), adaptive(truth)
    points, true, stated = [list(c) for c in zip(*run, strict=True)]
    stop = next((k for k, (n, e) in enumerate(zip(points, stated, strict=True)) if n >= 49 and e <= GOAL), None)
    counts = [n for n, _, _ in grids]
    return Row(
        surface=name,
        adaptive=settled(points, true),
        bilinear=settled(counts, [e for _, e, _ in grids]),
        bicubic=settled(counts, [e for _, _, e in grids]),
        stopped=None if stop is None else points[stop],
        error_then=math.nan if stop is None else true[stop],
        ratios=[s / t for n, s, t in zip(points, stated, true, strict=True) if math.isfinite(s) and n <= 200],
    )


def table(rows: list[Row]) -> str:
    beyond = f"{SIDES[-1]} × {SIDES[-1]} or {LIMIT} points"
    goal = f"{GOAL:.0%} (RMS over its standard deviation; · means not with {beyond})"
    columns = ["surface", "adaptive", "bilinear", "bicubic", "bilinear : adaptive", "bicubic : adaptive", "stops at"]
    columns += ["true error then", "stated error is enough"]
    lines = [f"Points until log-loss is known to {goal}.", "", f"| {' | '.join(columns)} |", "| --- " * 9 + "|"]
    for r in rows:
        cells = [*(str(n or "·") for n in (r.adaptive, r.bilinear, r.bicubic))]
        cells += [times(r.bilinear, r.adaptive), times(r.bicubic, r.adaptive), str(r.stopped or "·")]
        cells += [f"{r.error_then:.2%}", f"{np.mean(np.array(r.ratios) >= 1):.0%}"]
        lines.append(f"| {r.surface} | {' | '.join(cells)} |")
    ratios = np.concatenate([r.ratios for r in rows])
    low, middle, high = np.quantile(ratios, [0.05, 0.5, 0.95])
    covered = (
        f"at least 1 in {np.mean(ratios >= 1):.0%}, median {middle:.2f}, 5 % below {low:.2f}, 5 % above {high:.2f}"
    )
    return "\n".join([*lines, "", f"Stated over true error, all surfaces, up to 200 points: {covered}."])


def times(uniform: int | None, adaptive: int | None) -> str:
    """How many times the points; at least as many as the largest grid where that was not enough."""
    if adaptive is None:
        return "·"
    return f"{uniform / adaptive:.1f}" if uniform else f"> {SIDES[-1] ** 2 / adaptive:.1f}"


def main() -> None:
    rows: list[Row] = []
    for name, surface in surfaces():
        rows.append(measure(name, surface))
        print(f"{name}: done", file=sys.stderr)
    print(table(rows))
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    held = {"goal": GOAL, "largest_side": SIDES[-1], "rows": [asdict(row) for row in rows]}
    (results / "adaptive.json").write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
