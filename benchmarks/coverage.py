"""How often do the stated errors hold? Counted over seeds, for traces and for eigenpairs, against exact values.

``python benchmarks/coverage.py`` prints Markdown tables and writes ``benchmarks/results/coverage.json``; ``--seeds``
says how many random starts each row has (200 unless told). It ends with 1 where a trace's 95 % interval covers the
exact trace for less than 93 % of the seeds, or where a residual bound is violated at all. The bracket of a subset's
sharpness is no interval and is held to nothing: its coverage is that of ``benchmarks/brackets.py``'s results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binom
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from architectures import SMALL, perceptron, trained
from pitfalls.exact import derivatives

from workbench.numerics import trace as traces
from workbench.numerics.density import nuclear_norm
from workbench.numerics.factorisation import Precision
from workbench.numerics.krylov import Krylov, lanczos
from workbench.numerics.operator import Matrix
from workbench.numerics.sampling import Draw
from workbench.numerics.trace import Deflation, TraceEstimate
from workbench.probes.spectrum import HessianSpectrum
from workbench.spectra.run import CANCELLING, DEPTH, NEAR_ZERO
from workbench.subject import Subject

RESULTS = Path(__file__).parent / "results"
LEAST = 0.93
SIZE, LIMIT = 400, 60
"""Of the matrices; and the products after which a Lanczos run is cut short, converged or not."""


# --- matrices and nets -----------------------------------------------------------------------------------------------


def spectra() -> dict[str, np.ndarray]:
    """Kinds of spectra that curvature has: spikes over a bulk, power laws, flat ones, indefinite and low-rank ones."""
    i = np.arange(1, SIZE + 1)
    random = np.random.default_rng(1).standard_normal(SIZE)
    return {
        "ten spikes over a bulk": np.concatenate([np.linspace(20, 4, 10), np.linspace(0, 0.5, SIZE - 10)]),
        "power law 1/i": 10.0 / i,
        "flat": np.linspace(0.5, 1.5, SIZE),
        "indefinite": np.concatenate([[9.0, 7.0, 5.0, -4.0], 0.3 * random[4:]]),
        "rank 12": np.concatenate([np.linspace(5, 1, 12), np.zeros(SIZE - 12)]),
    }


def matrices() -> Iterator[tuple[str, Matrix]]:
    """Those spectra in random bases, and the exact Hessians of trained nets; in coordinates for one heavy diagonal."""
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((SIZE, SIZE)))[0]
    for name, values in spectra().items():
        yield name, Matrix(torch.from_numpy(basis @ np.diag(values) @ basis.T))
    # One large off-diagonal pair among ±1 probes: the samples of a trace have two values, far from a normal law.
    pair = 0.01 * torch.eye(SIZE, dtype=torch.float64)
    pair[0, 1] = pair[1, 0] = 5.0
    yield "one coupled pair", Matrix(pair)
    for name in ("dense GELU", "conv + BatchNorm"):
        net = trained(SMALL[name], steps=100)
        found = derivatives(net.model, *net.data)[2].detach()
        yield f"Hessian of {name}", Matrix((found + found.T) / 2)


# --- the trace -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coverage:
    """One row: the share of seeds whose interval holds the exact value, and the median of half-width over value."""

    what: str
    rule: str
    seeds: int
    covers: float
    low: float
    half_width: float
    products: float
    exact: float

    @property
    def met(self) -> bool:
        return self.covers >= LEAST


def counted(what: str, rule: str, truth: float, found: list[TraceEstimate]) -> Coverage:
    """``low`` is the lower 95 % confidence bound on the share, by the binomial law."""
    values, errors = np.array([f.value for f in found]), np.array([f.error for f in found])
    rounding = 1e-9 * max(abs(truth), 1e-12)
    hits, n = int(np.sum(np.abs(values - truth) <= errors + rounding)), len(found)
    grid = np.linspace(0, 1, 2001)
    low = float(grid[np.searchsorted(binom.sf(hits - 1, n, grid), 0.05)]) if hits else 0.0
    return Coverage(
        what,
        rule,
        n,
        hits / n,
        low,
        float(np.median(errors) / abs(truth)),
        float(np.median([f.products for f in found])),
        float(np.mean([f.exact for f in found])),
    )


def by_rule(matrix: Matrix, seed: int, tolerance: float, known: Krylov | None, limit: int | None) -> TraceEstimate:
    """As HessianSpectrum does: outside a Lanczos basis, until the tolerance or the limit."""
    draw = Draw(seed, "coverage", matrix.size)
    if known is None:
        scale, deflation = 0.0, None
    else:
        scale = max(float(np.abs(known.values).sum()), nuclear_norm(known, matrix.size, tolerance))
        deflation = Deflation(known.span(), known.values)
    *_, last = traces.trace(
        matrix, draw, tolerance=tolerance, scale=scale, deflation=deflation, limit=limit, near_zero=CANCELLING
    )
    return last


def after_lanczos(matrix: Matrix, seed: int, tolerance: float = 0.02) -> Krylov:
    """The run before a trace, with the settings of HessianSpectrum."""
    draw = Draw(seed, "coverage run", matrix.size)
    *_, last = lanczos(matrix, draw(0), tolerance=tolerance, least=DEPTH, near_zero=NEAR_ZERO, basis=32,
        limit=LIMIT,
                       fresh=lambda i: draw(1 + i))  # fmt: skip
    return last


RULES: dict[str, tuple[float, bool, int | None]] = {
    "tolerance 10 %": (0.1, False, None),
    "tolerance 10 %, deflated": (0.1, True, None),
    "tolerance 2 %, deflated": (0.02, True, None),
    "starved: 8 products": (1e-6, False, 8),
    "starved: 12 products, deflated": (1e-6, True, 12),
}


def trace_rows(seeds: int) -> Iterator[Coverage]:
    """Every matrix under every rule."""
    for name, matrix in matrices():
        truth = float(torch.trace(matrix.matrix))
        runs = [after_lanczos(matrix, seed) for seed in range(seeds)]
        for rule, (tolerance, deflated, limit) in RULES.items():
            found = [by_rule(matrix, s, tolerance, runs[s] if deflated else None, limit) for s in range(seeds)]
            yield counted(name, rule, truth, found)
        print(f"{name}: done", file=sys.stderr, flush=True)


# --- eigenpairs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bounds:
    """One row: pairs looked at, and those whose distance to the nearest exact eigenvalue exceeds their residual.

    ``rank_beyond``: distances to the exact eigenvalue of the same rank beyond the residual; ``worst`` is the largest
    distance over residual and allowance.
    """

    what: str
    seeds: int
    pairs: int
    violations: int
    rank_beyond: int
    worst: float
    allowance: float


def bounds(what: str, exact: np.ndarray, runs: list[tuple[np.ndarray, np.ndarray]], unit: float) -> Bounds:
    """Pairs are (values, residuals), the top ones first and then the smallest, over all states of all seeds."""
    allowance = unit * float(np.abs(exact).max())
    pairs = violations = beyond = 0
    worst = 0.0
    for values, residuals in runs:
        known = np.isfinite(values)
        values, residuals = values[known], residuals[known]
        apart = np.abs(values[:, None] - exact).min(1)
        ranked = np.abs(values - np.append(exact[: len(values) - 1], exact[-1]))
        pairs += len(values)
        violations += int(np.sum(apart > residuals + allowance))
        beyond += int(np.sum(ranked > residuals + allowance))
        worst = max(worst, float(np.max(apart / (residuals + allowance), initial=0.0)))
    return Bounds(what, 0, pairs, violations, beyond, worst, allowance)


def bound_rows(seeds: int) -> Iterator[tuple[Bounds, bool]]:
    """Lanczos runs on the matrices (every state on the way, converged or not)."""
    for name, matrix in matrices():
        exact = torch.linalg.eigvalsh(matrix.matrix).flip(0).numpy()
        states, last = [], []
        for seed in range(seeds):
            found = [_pairs(state) for state in _run(matrix, seed)]
            states += found
            last.append(found[-1])
        unit = 4 * Precision.of(torch.float64).noise
        yield _of(bounds(f"{name}, on the way", exact, states, unit), seeds), False
        yield _of(bounds(f"{name}, at the end", exact, last, unit), seeds), True


def _of(row: Bounds, seeds: int) -> Bounds:
    return replace(row, seeds=seeds)


def _run(matrix: Matrix, seed: int) -> Iterator[Krylov]:
    draw = Draw(seed, "coverage run", matrix.size)
    return lanczos(matrix, draw(0), top=5, limit=LIMIT, near_zero=NEAR_ZERO, fresh=lambda i: draw(1 + i))


def _pairs(state: Krylov) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.concatenate([state.top_values, state.bottom_values]),
        np.concatenate([state.top_residuals, state.bottom_residuals]),
    )


@dataclass(frozen=True)
class Estimated:
    """One row: first eigenvalues of runs judged by their estimated error, and the shares that it held in.

    ``within``: the error was at most the estimate; ``asked``: at most the tolerance that was asked for.
    """

    what: str
    seeds: int
    tolerance: float
    products: float
    within: float
    asked: float
    worst: float


def estimate_rows(seeds: int, tolerance: float = 1e-3) -> Iterator[Estimated]:
    """Runs for one eigenvalue on the matrices; estimates are no bounds, so they are held to nothing."""
    for name, matrix in matrices():
        first = float(torch.linalg.eigvalsh(matrix.matrix)[-1])
        found = [_judged(matrix, seed, tolerance) for seed in range(seeds)]
        errors = np.array([first - float(s.top_values[0]) for s in found])
        estimates = np.array([float(s.top_estimates[0]) for s in found])
        yield Estimated(
            name,
            seeds,
            tolerance,
            float(np.median([s.products for s in found])),
            float(np.mean(errors <= estimates + 1e-12 * first)),
            float(np.mean(errors <= tolerance * first)),
            float(errors.max() / first),
        )


def _judged(matrix: Matrix, seed: int, tolerance: float) -> Krylov:
    start = Draw(seed, "coverage run", matrix.size)(0)
    *_, last = lanczos(matrix, start, top=1, bottom=0, tolerance=tolerance, judged="estimate", limit=300)
    return last.released()


# --- whole readings --------------------------------------------------------------------------------------------------


def readings(seeds: int, dtype: torch.dtype, operator: str) -> tuple[Coverage, Bounds]:
    """HessianSpectrum with its default settings on a net of 820 parameters, in a precision."""
    net = trained(lambda: perceptron(30, nn.GELU), steps=80, count=40)
    exact = _exact(net, operator)
    subject = Subject(net.model, net.data, dtype=dtype)
    probe = HessianSpectrum(operator=operator, top=3, depth=20)  # type: ignore[arg-type]
    found, pairs = [], []
    for seed in range(seeds):
        d = probe.run(subject, seed=seed).data
        found.append(TraceEstimate(float(d.trace), float(d.trace_error), 1, int(d.products)))
        low, residual = (float(d[n]) for n in ("eigenvalue_min", "eigenvalue_min_residual"))
        pairs.append((np.append(d.eigenvalue.values, low), np.append(d.residual.values, residual)))
    words = f"HessianSpectrum, {operator}, {subject.size} parameters, {str(dtype).removeprefix('torch.')}"
    print(f"{words}: done", file=sys.stderr, flush=True)
    unit = {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    return counted(words, "defaults", float(exact.sum()), found), _of(bounds(words, exact, pairs, unit), seeds)


def _exact(net: Any, operator: str) -> np.ndarray:
    if operator == "hessian":
        return net.eigenvalues.detach().numpy()
    from crosscheck import Case, exact_gauss_newton

    return exact_gauss_newton(Case("", net.model, [net.data]))


# --- tables ----------------------------------------------------------------------------------------------------------


def trace_table(rows: list[Coverage]) -> str:
    lines = [
        "| operator | rule | seeds | interval covers | not less than | half-width / trace | products | exact |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        share = f"{r.covers:.1%}" if r.met else f"**{r.covers:.1%}**"
        cells = f"{share} | {r.low:.1%} | {r.half_width:.1e} | {r.products:.0f} | {r.exact:.0%}"
        lines.append(f"| {r.what} | {r.rule} | {r.seeds} | {cells} |")
    return "\n".join(lines)


def bound_table(rows: list[Bounds]) -> str:
    lines = [
        "| operator | seeds | pairs | violations of the residual | of it by rank | worst | allowance |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        cells = f"{r.violations} | {r.rank_beyond} | {r.worst:.2f} | {r.allowance:.1e}"
        lines.append(f"| {r.what} | {r.seeds} | {r.pairs} | {cells} |")
    return "\n".join(lines)


def estimate_table(rows: list[Estimated]) -> str:
    lines = [
        "Estimated errors of a first eigenvalue, residual²/gap, are no bounds; runs judged by them, at their end:",
        "",
        "| operator | seeds | tolerance | products | error within the estimate | within the tolerance | worst error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        cells = f"{r.products:.0f} | {r.within:.1%} | {r.asked:.1%} | {r.worst:.1e}"
        lines.append(f"| {r.what} | {r.seeds} | {r.tolerance:g} | {cells} |")
    return "\n".join(lines)


def bracket_table() -> str:
    """What benchmarks/brackets.py counted: no interval, so no promise."""
    place = RESULTS / "brackets.json"
    if not place.exists():
        return "The bracket of a subset's sharpness: run benchmarks/brackets.py first."
    held = json.loads(place.read_text(encoding="utf-8"))
    lines = [
        f"The bracket of a subset's sharpness is no confidence interval; over {held['subsets']} subsets it held λ_1 of",
        "all data in:",
        "",
        "| steps of training | examples | share |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {r['steps']} | {r['examples']} | {r['holds']:.0%} |" for r in held["rows"]]
    return "\n".join(lines)


def main() -> None:
    """Count, print, write; 1 where an interval covers too little or a bound is violated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=200)
    seeds = parser.parse_args().seeds
    intervals = list(trace_rows(seeds))
    bounded = [row for row, _ in bound_rows(seeds)]
    estimated = list(estimate_rows(seeds))
    for dtype, operator in ((torch.float64, "hessian"), (torch.float32, "ggn")):
        covered, held = readings(seeds, dtype, operator)
        intervals.append(covered)
        bounded.append(held)
    print(trace_table(intervals), bound_table(bounded), estimate_table(estimated), bracket_table(), sep="\n\n")
    facts = {"torch": torch.__version__, "seeds": seeds, "least": LEAST}
    found: dict[str, Any] = facts | {
        "intervals": [asdict(r) | {"met": r.met} for r in intervals],
        "bounds": [asdict(r) for r in bounded],
        "estimates": [asdict(r) for r in estimated],
    }
    (RESULTS / "coverage.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    short = [f"{r.what}, {r.rule}: {r.covers:.1%}" for r in intervals if not r.met]
    broken = [f"{r.what}: {r.violations} violations" for r in bounded if r.violations]
    if short or broken:
        print("Not held:", *short, *broken, sep="\n  ", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
