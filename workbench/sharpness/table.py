"""The definitions of sharpness by name, in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Definition = Literal[
    "lambda_max",
    "sam",
    "worst_l2",
    "worst_linf",
    "m_sharpness",
    "average",
    "adaptive_lambda_max",
    "adaptive_sam",
    "adaptive_worst_l2",
    "adaptive_worst_linf",
    "adaptive_average",
    "filter_average",
    "module_lambda",
    "module_trace",
    "relative_flatness",
    "neuron_flatness",
    "fisher_rao",
    "fisher_rao_empirical",
    "pac_bayes",
    "pac_bayes_magnitude",
    "keskar",
]
WORDS: Mapping[str, str] = {
    "lambda_max": "largest Hessian eigenvalue",
    "sam": "rise after one SAM step",
    "worst_l2": "largest rise in a Euclidean ball (lower bound)",
    "worst_linf": "largest rise in a box (lower bound)",
    "m_sharpness": "largest rise of blocks of m examples (lower bound)",
    "average": "mean rise under Gaussian noise",
    "adaptive_lambda_max": "largest eigenvalue in units of the weights",
    "adaptive_sam": "rise after one ASAM step",
    "adaptive_worst_l2": "largest rise in an ellipsoid of the weights' sizes (lower bound)",
    "adaptive_worst_linf": "largest rise in a box of the weights' sizes (lower bound)",
    "adaptive_average": "mean rise under noise in proportion to each weight",
    "filter_average": "mean rise under noise in proportion to each filter",
    "module_lambda": "largest λ_1 ‖W‖² of a module",
    "module_trace": "largest tr ‖W‖²/P of a module",
    "relative_flatness": "relative flatness of a linear layer",
    "neuron_flatness": "relative flatness, neuron by neuron",
    "fisher_rao": "Fisher-Rao norm, squared, of the model",
    "fisher_rao_empirical": "the same with the data's labels",
    "pac_bayes": "1/σ² at which noise costs accuracy",
    "pac_bayes_magnitude": "the same for noise in proportion to the weights",
    "keskar": "Keskar's, for replication",
}
"""What each is, for forms and pages."""
LABELS: Mapping[str, str] = {
    "lambda_max": "λ1",
    "sam": "SAM",
    "worst_l2": "worst ℓ2",
    "worst_linf": "worst ℓ∞",
    "m_sharpness": "blocks of m",
    "average": "mean",
    "adaptive_lambda_max": "λ1(THT)",
    "adaptive_sam": "ASAM",
    "adaptive_worst_l2": "worst ℓ2 / T",
    "adaptive_worst_linf": "worst ℓ∞ / T",
    "adaptive_average": "mean / T",
    "filter_average": "mean / filters",
    "module_lambda": "λ1 ‖W‖²",
    "module_trace": "tr ‖W‖² / P",
    "relative_flatness": "relative",
    "neuron_flatness": "neurons",
    "fisher_rao": "Fisher-Rao",
    "fisher_rao_empirical": "with labels",
    "pac_bayes": "1/σ²",
    "pac_bayes_magnitude": "1/σ² / T",
    "keskar": "Keskar",
}
"""Short names for pictures."""
RISES = frozenset(
    {
        *("sam", "worst_l2", "worst_linf", "m_sharpness", "average", "filter_average"),
        *("adaptive_sam", "adaptive_worst_l2", "adaptive_worst_linf", "adaptive_average"),
    }
)
"""Those that are rises of the loss, in its unit; each other one has a unit of its own."""
