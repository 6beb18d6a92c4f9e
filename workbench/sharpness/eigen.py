"""Sharpness from the Hessian itself: λ_1, λ_1 in units of the weights, and both per module times its weights' norm."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from workbench.numerics import trace as traces
from workbench.numerics.basis import norm
from workbench.numerics.krylov import Krylov, lanczos
from workbench.numerics.operator import Operator
from workbench.operators.curvature import Curvature
from workbench.operators.hessian import Hessian
from workbench.selftest import check_symmetry
from workbench.sharpness.found import Found, NotDefined
from workbench.sharpness.point import Point
from workbench.sharpness.scales import modules_of_weights
from workbench.subject import Subject

LIMIT = 300
"""Products that one eigenvalue may take."""
TRACE_TOLERANCE, TRACE_LIMIT = 0.1, 100
"""Relative error at which a module's trace counts as known, and the random vectors that it may take."""
DEFLATED = 16
"""Lanczos steps before a trace, which is exact in what they span: a few large eigenvalues make most of the spread."""


class Scaled(Operator):
    """T A T for a diagonal T, (size,): a matrix in the coordinates δ ⊘ T. Products cost one of A."""

    def __init__(self, operator: Operator, scale: Tensor) -> None:
        self.operator, self.scale = operator, scale
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device

    def matvec(self, vector: Tensor) -> Tensor:
        return self.scale * self.operator.matvec(self.scale * vector)


def largest_eigenvalue(point: Point, tolerance: float, scale: Tensor | None = None, words: str = "") -> Iterator[Found]:
    """λ_1, the algebraically largest eigenvalue of H, or of T H T for a ``scale`` T (size,), by Lanczos.

    Never above the true one but for rounding; error: the residual ‖A v - λ v‖, within which some eigenvalue lies.
    Converged at residual <= tolerance · λ. Cost: 8 to 12 products usually. ½ ρ² λ_1 is the worst second-order rise in
    the ball of radius ρ. Source: Paige 1976; Kwon et al. 2021 for T.
    """
    if scale is not None and not bool((scale > 0).any()):
        raise NotDefined("no parameter has two dims or more, so there is none whose size could be the measure")
    curvature = point.hessian
    operator = curvature if scale is None else Scaled(curvature, scale)
    start = point.draw(0) if scale is None else torch.where(scale > 0, point.draw(0), 0.0)
    for state in _states(operator, start, tolerance):
        low, found = check_symmetry(state.asymmetry), float(state.top_values[0])
        yield Found(
            found,
            float(state.top_residuals[0]),
            converged=bool(state.top_converged[0]),
            done=1.0 if state.done else min(state.products / (state.products + 8), 0.95),
            protocol=(
                f"largest eigenvalue of {words or 'the Hessian over all chosen parameters'}, Lanczos to a residual of "
                f"{tolerance:g} of it, {state.products} products; the error is the residual"
            ),
            notes=(low,) if low else (),
        )


def _states(operator: Operator, start: Tensor, tolerance: float, least: int = 0) -> Iterator[Krylov]:
    with _finite():
        yield from lanczos(
            operator, start, top=1, bottom=0, tolerance=tolerance, limit=LIMIT, confirm=False, least=least
        )


@contextlib.contextmanager
def _finite() -> Generator[None]:
    """Products that are not finite spoil only the definition that needs them."""
    try:
        yield
    except ArithmeticError as problem:
        if type(problem) is not ArithmeticError:  # the self-test's verdicts, and what a user's model raises itself
            raise
        raise NotDefined(f"products with the Hessian are not finite ({problem})") from problem


# --- module by module -----------------------------------------------------------------------------------------------

Part = tuple[float, float, bool]
"""A module's number, its error and whether that is within the tolerance."""


def module_eigenvalues(point: Point, tolerance: float) -> Iterator[Found]:
    """λ_1(H_gg) ‖θ_g‖² for each module's weights g; the value is the largest of them.

    Unchanged when a layer before a normalisation is scaled: the loss stays, H_gg falls with the square. Error: the
    residual, in the same units. Cost: 8 to 12 products of each module. Source: Lyu, Li, Arora 2022 (arXiv:2206.07085).
    """
    words = "λ_1(H_gg) ‖θ_g‖² with g the weights of one module; the error is the residual"
    yield from _modules(point, functools.partial(_eigenvalue, point, tolerance), "module_eigenvalue", words)


def module_traces(point: Point, tolerance: float) -> Iterator[Found]:
    """tr(H_gg) ‖θ_g‖² / P_g for each module's weights g (P_g entries); the value is the largest of them.

    Half of it times σ² is the average rise when each weight moves by σ times the module's typical weight. Error: half
    of a 95 % interval of Hutchinson's estimate outside 16 Lanczos vectors, 0 for exact sums.
    Source: Tsuzuku et al. 2020 (arXiv:1901.04653).
    """
    words = "tr(H_gg) ‖θ_g‖² / P_g with g the weights of one module; the error is half of a 95 % interval"
    yield from _modules(point, functools.partial(_trace, point, tolerance), "module_trace", words)


def _modules(
    point: Point, measure: Callable[[Subject, Curvature], Iterator[Part]], name: str, words: str
) -> Iterator[Found]:
    groups = modules_of_weights(point.subject)
    if not groups:
        raise NotDefined("no module has weights with two dims or more")
    point.hessian  # noqa: B018 - tested once, before its blocks are taken
    parts: list[Part] = []
    for number, names in enumerate(groups.values()):
        part = math.nan, math.nan, False
        with _block(point.subject, names) as (subject, curvature), _finite():
            for step, part in enumerate(measure(subject, curvature)):
                if step % 4 == 0:
                    yield _largest([*parts, part], groups, name, words, (number + 0.5) / len(groups))
        parts.append(part)
    yield _largest(parts, groups, name, words, 1.0)


@contextlib.contextmanager
def _block(subject: Subject, names: Sequence[str]) -> Generator[tuple[Subject, Curvature]]:
    block = subject.restricted(list(names))
    with Hessian(block) as curvature:
        yield block, curvature


def _largest(parts: Sequence[Part], groups: Mapping[str, tuple[str, ...]], name: str, words: str, done: float) -> Found:
    values, errors = ([part[i] for part in parts] + [math.nan] * (len(groups) - len(parts)) for i in (0, 1))
    top = max(range(len(parts)), key=lambda i: -math.inf if math.isnan(parts[i][0]) else parts[i][0])
    return Found(
        values[top],
        errors[top],
        converged=done == 1 and all(part[2] for part in parts),
        done=done,
        protocol=f"largest over {len(groups)} modules ({list(groups)[top]}) of {words}; no biases, no norm scales",
        extra={name: values, f"{name}_error": errors},
    )


def _eigenvalue(point: Point, tolerance: float, subject: Subject, curvature: Curvature) -> Iterator[Part]:
    square = _square(subject)
    for state in _states(curvature, point.draw(0, size=subject.size), tolerance):
        yield square * float(state.top_values[0]), square * float(state.top_residuals[0]), bool(state.top_converged[0])


def _trace(point: Point, tolerance: float, subject: Subject, curvature: Curvature) -> Iterator[Part]:
    factor = _square(subject) / subject.size
    wanted = max(tolerance, TRACE_TOLERANCE)
    state: Krylov | None = None
    for latest in _states(curvature, point.draw(0, size=subject.size), wanted, DEFLATED):
        state = latest
        yield math.nan, math.nan, False
    assert state is not None
    if state.complete:
        yield factor * math.fsum(state.values), 0.0, True
        return
    inside = traces.Deflation(state.span(), state.values)
    for found in traces.trace(curvature, point.draw, tolerance=wanted, scale=0.0, deflation=inside, limit=TRACE_LIMIT):
        met = found.exact or found.error <= traces.allowed_error(found.value, wanted, 0.0)
        yield factor * found.value, factor * found.error, met


def _square(subject: Subject) -> float:
    return float(norm(subject.flatten(subject.params))) ** 2
