"""Tangent kernels as probes want them: in float64, in one shape, finite, and with words for which kernel it is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Generator
from typing import Any, Literal

import torch
from torch import Tensor

from workbench.fingerprint import digest
from workbench.operators.tangent_kernel import Steps, TangentKernel
from workbench.probe import Reading
from workbench.subject import Subject

Outputs = Literal["full", "trace"]
OUTPUTS = {
    "full": "all outputs: C x C blocks",
    "trace": "the mean over outputs: one number a pair of examples",
}
"""What the two forms are called in settings."""


def blocks(kernel: TangentKernel, outputs: Outputs, other: TangentKernel | None = None) -> Steps:
    """Θ as (n, C, m, C) in float64, C = 1 for the class-trace kernel; yields the share of the work that is done.

    Raises:
        ArithmeticError: it is not finite.
    """
    found = yield from kernel.steps(outputs, other)
    if not bool(found.isfinite().all()):
        raise ArithmeticError(
            "the tangent kernel is not finite: outputs or their gradients are NaN or infinite on these examples. "
            "Look at an earlier checkpoint, or at subject.outputs()."
        )
    return (found[:, None, :, None] if outputs == "trace" else found).double()


def reported(steps: Steps, report: Callable[[float], Reading]) -> Generator[Reading, None, Tensor]:
    """A probe's readings while a kernel is formed: ``report`` of the share that is done, and at last the kernel."""
    while True:
        try:
            share = next(steps)
        except StopIteration as end:
            return end.value
        yield report(share)


def doubled(subject: Subject) -> Subject:
    """The same function in float64: a regression at small strengths magnifies rounding."""
    if subject.dtype == torch.float64:
        return subject
    return subject.excerpt(subject.examples, torch.float64).with_plan(subject.plan)


def rounding(kernel: TangentKernel) -> float:
    """Relative rounding of the kernel's entries."""
    return float(torch.finfo(kernel.dtype).eps)


def named(kernel: TangentKernel, words: str) -> dict[str, Any]:
    """Which kernel it is: parameters, number of outputs, form, and a hash of the examples."""
    return {
        "parameters of the kernel": list(kernel.leaves),
        "number of outputs": kernel.outputs,
        "kernel": words,
        "examples of the kernel": digest(kernel.subject.data_digest),
    }


def naming(reading: Reading, facts: dict[str, Any]) -> Reading:
    """The reading with these facts, which comparisons look at."""
    return dataclasses.replace(reading, data=reading.data.assign_attrs(kernel=json.dumps(facts)))
