"""Is it a second derivative at all? Repeatable, symmetric, and the derivative it claims to be: tested once a subject.

All of it runs on a copy with at most 16 examples in float64, so it costs a few gradients of 16 examples; how symmetric
the full products are is read off a Lanczos run, which makes them anyway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from workbench.numerics.basis import dot, norm
from workbench.numerics.sampling import Draw
from workbench.operators.curvature import Curvature
from workbench.plan import Plan, fitting
from workbench.subject import Subject

EXAMPLES = 16
ROOM = 2**27
"""Bytes for the graphs of a test; where all its examples would take more, they are taken fewer at a time."""
REPEATABLE, SYMMETRIC, DERIVATIVE, SETTLED, USELESS = 1e-5, 1e-4, 1e-2, 1e-3, 1e-2
"""Largest relative disagreements of two equal products, of u·Av with v·Au, of differences with products, and of two
successive differences that count as settled; and the asymmetry at which products are useless, rounding or not."""
FIRST_STEP, SHRINK, STEPS = 1e-7, 8.0, 4
"""Steps of the differences over the weights' norm: short, to cross few kinks, and shortened while they disagree."""

Leg = Literal["repeatable", "symmetric", "derivative"]


class NotAHessian(ArithmeticError):
    """Products are not those of a fixed, symmetric second derivative; ``leg`` names the test that failed."""

    def __init__(self, leg: Leg, found: str, causes: str) -> None:
        super().__init__(f"self-test, leg '{leg}': {found}. {causes}")
        self.leg: Leg = leg


@dataclass(frozen=True)
class SelfTest:
    """What was found: relative disagreements (nan: not decided), their step, and words for a reading."""

    repeatability: float
    derivative: float
    step: float
    words: str


_known: WeakKeyDictionary[Subject, dict[Any, SelfTest]] = WeakKeyDictionary()


def self_test(curvature: Curvature) -> SelfTest:
    """Test a curvature of a subject, or give what was found before for the same kind, weights and data.

    Two products on graphs built anew must agree to 1e-5, u·Av with v·Au to 1e-4, and central differences of gradients
    (for Gauss-Newton: of outputs) along the same direction with the product (J v) to 1e-2. The difference step begins
    at 1e-7 of the weights' norm, which crosses few kinks, and shrinks until two successive ones agree; where none do,
    that leg is not decided and the words say so. Cost: 4 products and 2 to 8 gradients of 16 examples in float64, and
    13 float64 vectors of the parameters' size.

    Raises:
        NotAHessian: naming the leg, what was measured and what usually causes it.
    """
    found = _known.setdefault(curvature.subject, {})
    key = (type(curvature), curvature.subject.fingerprint())
    if key not in found:
        found.clear()
        found[key] = _test(type(curvature), curvature.subject)
    return found[key]


def at_once(subject: Subject) -> int:
    """How many examples a test takes at once; losses and statistics that couple them have a rule of their own."""
    return fitting(EXAMPLES, _bytes_each(subject), ROOM)


def test_bytes(subject: Subject) -> int:
    """What a self-test takes for a moment: 13 float64 vectors, and the graphs of as many examples as fit together."""
    return int(13 * 8 * subject.size + _bytes_each(subject) * at_once(subject))


def _bytes_each(subject: Subject) -> float:
    """A product's graph of one example in float64: some twenty times the tensors that a forward pass saves."""
    saved = subject.memory() / min(subject.plan.chunk or subject.examples, subject.examples)
    return 20 * saved * 8 / subject.dtype.itemsize


def check_symmetry(asymmetry: float) -> str:
    """What to say of the largest |u·Av - v·Au| over the largest ‖Av‖ in a Lanczos run: nothing up to 1e-4.

    Beyond that, products are rounded: near-zero losses are differences of numbers near 1. Beyond 1e-2 they are useless.

    Raises:
        NotAHessian: beyond 1e-2.
    """
    if asymmetry > USELESS:
        raise _asymmetric(asymmetry)
    if asymmetry > SYMMETRIC:
        return (
            f"products are rounded to about {asymmetry:.0e} of the largest eigenvalue; dtype=torch.float64 is exacter"
        )
    return ""


def _asymmetric(asymmetry: float) -> NotAHessian:
    return NotAHessian(
        "symmetric",
        f"u·Av and v·Au differ by {asymmetry:.1e} of the largest product",
        "A second derivative is symmetric. Where the loss is nearly zero, float32 may round all of it away: pass "
        "dtype=torch.float64 to Subject. Else look for a custom autograd Function with a wrong double backward, or "
        "randomness in the forward pass.",
    )


def _test(kind: type[Curvature], subject: Subject) -> SelfTest:
    small, why_not = _copy(subject)
    direction = Draw(0, "self-test", small.size, small.dtype, small.device)(0)
    direction = direction / norm(direction).to(direction.dtype)
    fresh = kind(small.with_plan(Plan(at_once(subject), retained=False)))  # graphs of its own for each product
    product = fresh.matvec(direction)
    repeatability = _gap(product, fresh.matvec(direction))
    _check_repeatable(repeatability, small.examples)
    derivative, step = math.nan, math.nan
    if not why_not:
        _check_symmetric(fresh, direction, product)
        derivative, step = _differences(fresh, direction)
    return SelfTest(repeatability, derivative, step, _words(kind, small.examples, derivative, why_not))


def _check_symmetric(curvature: Curvature, direction: Tensor, product: Tensor) -> None:
    """u·Av against v·Au for v along Au, where v·Au is as large as it can be: ‖Au‖."""
    length = float(norm(product))
    if length > 0:
        crossed = curvature.matvec(product / length)
        asymmetry = abs(float(dot(direction, crossed)) - length) / max(length, float(norm(crossed)))
        if asymmetry > SYMMETRIC:
            raise _asymmetric(asymmetry)


def _copy(subject: Subject) -> tuple[Subject, str]:
    """The small copy in float64; in the subject's own precision, and why, where the model has no float64 form."""
    try:
        return subject.excerpt(EXAMPLES, torch.float64), ""
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as problem:
        if isinstance(problem, torch.OutOfMemoryError):
            raise
        return subject.excerpt(EXAMPLES), f"the model does not run in float64 ({str(problem).splitlines()[0][:120]})"


def _check_repeatable(gap: float, examples: int) -> None:
    if not gap <= REPEATABLE:
        raise NotAHessian(
            "repeatable",
            f"the same product on the same {examples} examples came out differently twice, by {gap:.1e} of its norm",
            "The loss is then not one function of the parameters: look for dropout or noise in the forward pass that "
            "uses NumPy, Python or a generator of its own, for state that the model keeps between calls, or for "
            "nondeterministic kernels.",
        )


def _differences(curvature: Curvature, direction: Tensor) -> tuple[float, float]:
    """(disagreement, step) of central differences with the derivative; nan where no two successive ones agree."""
    params = {name: leaf.detach() for name, leaf in curvature.leaves.items()}
    flat = curvature.subject.flatten(params)
    claimed = curvature.field_derivative(direction)
    step, before = FIRST_STEP * (float(norm(flat)) or 1.0), None
    for _ in range(STEPS):
        ahead, behind = (curvature.field(curvature.subject.unflatten(flat + s * direction)) for s in (step, -step))
        found = (ahead - behind) / (2 * step)
        noise = 64 * torch.finfo(flat.dtype).eps * float(norm(ahead)) / step
        if _gap(found, claimed, noise) <= DERIVATIVE:
            return _gap(found, claimed, noise), step
        if before is not None and _gap(found, before, noise) <= SETTLED:
            _fail_derivative(_gap(found, claimed, noise), curvature)
        before, step = found, step / SHRINK
    return math.nan, math.nan


def _fail_derivative(gap: float, curvature: Curvature) -> None:
    raise NotAHessian(
        "derivative",
        f"products with the {curvature.words} and differences of {curvature.rests_on} disagree by {gap:.0%} of their "
        f"norm, on {curvature.subject.examples} examples in float64",
        "PyTorch differentiated something else than the loss: look for a custom autograd Function whose backward uses "
        "detached or precomputed values (save tensors with ctx.save_for_backward and compute with them), for detach(), "
        ".data or no_grad() inside the forward pass, and for straight-through estimators.",
    )


def _gap(first: Tensor, second: Tensor, noise: float = 0.0) -> float:
    """‖a - b‖ beyond ``noise``, over the larger norm; 0 for two zeros, nan where entries are not finite."""
    scale = max(float(norm(first)), float(norm(second)))
    apart = float(norm(first - second)) - noise
    if math.isnan(apart) or math.isinf(scale):
        return math.nan
    return apart / scale if apart > 0 else 0.0


def _words(kind: type[Curvature], examples: int, derivative: float, why_not: str) -> str:
    began, what = f"self-test on {examples} examples: two products agree", f"differences of {kind.rests_on}"
    if why_not:
        return f"{began}; not compared with {what}, since {why_not}"
    if math.isnan(derivative):
        return f"{began}; {what} did not settle, so they neither confirm nor refute the products"
    return f"{began}, {what} confirm them"
