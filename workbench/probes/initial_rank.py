"""The rank of initial weights, and of what training added to them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from workbench.figure import Axis, Figure, Panel, Points
from workbench.numerics.kernels import effective_rank, stable_rank
from workbench.numerics.sampling import Draw
from workbench.probe import Cost, Look, Probe, Reading, Value, Variable
from workbench.schema import Doc
from workbench.several import Pair
from workbench.spectra.weights import Reshape, Weights, weight_matrices

_RANKS = {"effective_rank": effective_rank, "stable_rank": stable_rank}
_WHOSE = ("initial", "change", "random")


@dataclass(frozen=True)
class InitialRank(Probe[Pair]):
    """Effective rank of the initial weights, and rank and size of the change that training made to them.

    What it measures, for each weight matrix with singular values σ, W_0 of the first subject and ΔW = W - W_0 to the
    second: ``effective_rank`` = exp(entropy of σ / Σσ) and ``stable_rank`` = Σσ² / σ_1² of W_0 (``initial``), of ΔW
    (``change``) and of a matrix of that shape with independent normal entries (``random``); ``relative_change`` =
    ‖ΔW‖_F / ‖W_0‖_F; ``captured`` = the share of ‖ΔW‖_F² in the span of as many leading left singular vectors of W_0 as
    its effective rank says, and ``captured_by_chance`` = that number over the rows, what a random ΔW would have.

    How to read it: initial weights of low rank push a network towards rich learning: a larger and lower-ranked change.
    Weights as usually drawn have the ranks of the random matrix. Pair(subject, subject) reads one moment; the change is
    then zero and its ranks are not known.

    What it costs: three decompositions a matrix, rows · columns · min(rows, columns); no example is looked at.

    When it misleads: rank and scale go together unless the norm is kept (``workbench.zoo.low_rank`` keeps it). The
    effective rank counts the bulk, the stable rank hardly: look at both. Convolutions are read as (out, in · k²).

    Errors: exact; ``random`` ranks are of one drawn matrix.

    Source: Liu et al. 2023 (arXiv 2310.08513); Roy and Vetterli 2007 for the effective rank.
    """

    layers: Annotated[str, Doc("Names or globs of the layers to look at, with commas between; empty for all.")] = ""

    looks_at: ClassVar[Look] = "pair"
    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("effective_rank", ("whose", "layer"), "exp(entropy of σ / Σσ)"),
        Variable("stable_rank", ("whose", "layer"), "Σσ² / σ₁²"),
        Variable("full_rank", ("layer",), "the largest rank that the shape allows"),
        Variable("relative_change", ("layer",), "‖ΔW‖ / ‖W₀‖"),
        Variable("captured", ("layer",), "share of ‖ΔW‖² in the leading left directions of W₀"),
        Variable("captured_by_chance", ("layer",), "the same for a change without any relation"),
    )

    def stream(self, subject: Pair, draw: Draw) -> Iterator[Reading]:
        """Matrix by matrix."""
        subject.check_parameters()
        first, second = (self.weights(subject, number) for number in range(2))
        values, count = _empty(len(first.matrices)), len(first.matrices)
        for i, matrix in enumerate(first.matrices):
            start, end = matrix.of(first.tensors), matrix.of(second.tensors)
            _put(values, i, start, end.to(start.device), draw.generator(i))
            coords = {"whose": np.array(_WHOSE), "layer": np.array([m.name for m in first.matrices])}
            known = i + 1 == count and bool(np.isfinite(values["effective_rank"][0]).all())
            notes = ("weights only: no example was looked at",)
            yield self.reading((i + 1) / count, values, coords=coords, converged=known, notes=notes)

    def weights(self, pair: Pair, number: int) -> Weights:
        """The matrices of one of the two.

        Raises:
            ValueError: ``layers`` names none, or the model has no matrix.
        """
        words = [word.strip() for word in self.layers.split(",") if word.strip()]
        return weight_matrices((pair.first, pair.second)[number], Reshape("matrix"), "apart", words)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Means over layers of the ranks over what the shape allows, and of the change."""
        found: dict[str, Value] = {}
        for name in _RANKS:
            for whose in _WHOSE:
                share = data[name].sel(whose=whose).values / data.full_rank.values
                if np.isfinite(share).any():
                    found[f"{whose}_{name}"] = float(np.nanmean(share))
        change = data.relative_change.values
        return found | ({"relative_change": float(np.nanmean(change))} if np.isfinite(change).any() else {})

    def figure(self, data: xr.Dataset) -> Figure:
        """Both ranks of W₀, ΔW and a random matrix, over what the shape allows."""
        return Figure(tuple(_panel(data, name, words) for name, words in _PANELS))

    def estimate(self, subject: Pair) -> Cost:
        """The largest matrix in float64, with LAPACK's copies."""
        matrices = self.weights(subject, 0).matrices
        largest = max(math.prod(m.shape) for m in matrices)
        return Cost(8 * 8 * largest, 3 * len(matrices), f"three decompositions of each of {len(matrices)} matrices")


_PANELS = (("effective_rank", "effective rank / full rank"), ("stable_rank", "stable rank / full rank"))


def _panel(data: xr.Dataset, name: str, words: str) -> Panel:
    places, full = np.arange(1, data.sizes["layer"] + 1), data.full_rank.values
    shares = [data[name].sel(whose=whose).values / full for whose in _WHOSE]
    marks = (
        Points(places, shares[0], label="W₀"),
        Points(places, shares[1], label="ΔW", role="second"),
        Points(places, shares[2], label="random", role="reference"),
    )
    return Panel(marks, Axis("layer"), Axis(words))


def _empty(count: int) -> dict[str, Any]:
    single = ("full_rank", "relative_change", "captured", "captured_by_chance")
    return {name: np.full((3, count), np.nan) for name in _RANKS} | {name: np.full(count, np.nan) for name in single}


def _put(values: dict[str, Any], i: int, start: Tensor, end: Tensor, generator: np.random.Generator) -> None:
    """One layer's numbers; matrices (blocks, rows, columns) are read block by block and averaged."""
    noise = torch.from_numpy(generator.standard_normal(tuple(start.shape))).to(start.device)
    change = end - start
    for whose, matrix in enumerate((start, change, noise)):
        for name, rank in _RANKS.items():
            values[name][whose, i] = _rank(rank, matrix)
    values["full_rank"][i] = min(start.shape[-2:])
    length = float(start.norm())
    values["relative_change"][i] = float(change.norm()) / length if length else math.nan
    count = values["effective_rank"][0, i]
    if np.isfinite(count):
        values["captured_by_chance"][i] = round(count) / start.shape[-2]
        values["captured"][i] = _captured(start, change, round(count))


def _rank(rank: Any, matrix: Tensor) -> float:
    if not bool(matrix.isfinite().all()):
        return math.nan
    return float(np.mean([rank(values.cpu().numpy()) for values in torch.linalg.svdvals(matrix)]))


def _captured(start: Tensor, change: Tensor, count: int) -> float:
    whole = float(change.square().sum())
    if not whole > 0:
        return math.nan
    left = torch.linalg.svd(start, full_matrices=False)[0][..., :count]
    return float((left.mT @ change).square().sum()) / whole
