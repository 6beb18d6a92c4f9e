"""What a reading says of layers: the variables made of their blocks' numbers, and which parameters they cover."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workbench.operators.blocks import Covered, Group
from workbench.spectra.blocks import BlockNumbers

Floats = NDArray[np.float64]


def layer_values(known: Sequence[BlockNumbers], norms: Floats, chosen: Sequence[Group]) -> dict[str, Any]:
    """The variables of each layer for itself."""
    first, residual = (
        np.array([v[0] for v in vs]) for vs in zip(*((k.eigenvalue, k.residual) for k in known), strict=True)
    )
    return {
        "eigenvalue": np.stack([k.eigenvalue for k in known]),
        "residual": np.stack([k.residual for k in known]),
        "converged": np.stack([k.converged for k in known]),
        "eigenvalue_min": [k.low for k in known],
        "eigenvalue_min_residual": [k.low_residual for k in known],
        "eigenvalue_min_converged": [k.low_converged for k in known],
        "negative_curvature": [k.negative for k in known],
        "trace": [k.sizes.trace for k in known],
        "trace_error": [k.sizes.trace_error for k in known],
        "frobenius_norm": [k.sizes.norm for k in known],
        "frobenius_norm_error": [k.sizes.norm_error for k in known],
        "scaled": first * norms**2,
        "scaled_error": residual * norms**2,
        "weight_norm": norms,
        "parameters": [group.size for group in chosen],
        "complete": [k.met for k in known],
    }


def shares(known: Sequence[BlockNumbers]) -> dict[str, Any]:
    """Shares s of the sum of traces, with var s = ((1 - 2s) e² + s² Σ e²) / (Σ t)² for independent errors e."""
    traces, errors = (np.array(v) for v in zip(*((k.sizes.trace, k.sizes.trace_error) for k in known), strict=True))
    total = float(traces.sum())
    if not math.isfinite(total) or total == 0:
        return {}
    share = traces / total
    spread = np.maximum((1 - 2 * share) * errors**2 + share**2 * float((errors**2).sum()), 0.0)
    return {"trace_share": share, "trace_share_error": np.sqrt(spread) / abs(total)}


def whole_values(known: Sequence[BlockNumbers], everything: BlockNumbers | None) -> dict[str, Any]:
    """The variables of all layers together, and what of its squares lies between them."""
    if everything is None or not math.isfinite(everything.sizes.trace):
        return {}
    alone = len(known) == 1
    held = everything.sizes
    found: dict[str, Any] = {
        "whole_eigenvalue": everything.eigenvalue[0],
        "whole_residual": everything.residual[0],
        "whole_trace": held.trace,
        "whole_trace_error": held.trace_error,
        "whole_norm": held.norm,
        "whole_norm_error": held.norm_error,
    }
    inside = sum(k.sizes.squares for k in known)
    if held.squares > 0 and math.isfinite(held.squares_error + inside):
        share = inside / held.squares
        spread = math.hypot(*(k.sizes.squares_error for k in known), share * held.squares_error) / held.squares
        found |= {"off_diagonal_mass": 1 - share, "off_diagonal_mass_error": 0.0 if alone else spread}
    return found


def agreement(known: Sequence[BlockNumbers], everything: BlockNumbers) -> str:
    """Σ tr(H_ll) = tr(H), as a check of one against the other."""
    total, apart = sum(k.sizes.trace for k in known), everything.sizes.trace
    error = math.hypot(*(k.sizes.trace_error for k in known), everything.sizes.trace_error)
    scale = 1e-5 * sum(abs(k.sizes.trace) for k in known)
    fit = "agree" if abs(total - apart) <= 2 * error + scale else "DISAGREE beyond their errors"
    return f"the layers' traces add up to {total:.4g}, that of all together is {apart:.4g} (± {error:.1g}): they {fit}"


def coverage_values(covered: Sequence[Covered], unused: set[str]) -> dict[str, Any]:
    """Which tensor is analysed, or why not, as variables."""
    reasons = {"analysed": "analysed", "frozen": "frozen", "filtered": "filtered", "left_out": "left out"}
    found = {name: [c.reason == reason for c in covered] for name, reason in reasons.items()}
    return {
        **found,
        "not_floating": [c.reason == "not floating point" for c in covered],
        "unused": [c.reason == "analysed" and c.name in unused for c in covered],
        "entries": [c.size for c in covered],
    }


def coverage_words(covered: Sequence[Covered], unused: set[str]) -> list[str]:
    """The coverage report in words."""
    inside = sum(c.size for c in covered if c.reason == "analysed")
    reasons = dict.fromkeys(c.reason for c in covered if c.reason != "analysed")
    said = [
        f"{inside} of {sum(c.size for c in covered)} scalars of the model are analysed",
        *(f"not analysed, {reason}: {_listed([c.name for c in covered if c.reason == reason])}" for reason in reasons),
    ]
    idle = [c.name for c in covered if c.reason == "analysed" and c.name in unused]
    return said + ([f"the loss does not depend on {_listed(idle)}: zero blocks"] if idle else [])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
