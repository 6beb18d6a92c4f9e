"""Representation quality index: do sums of tokens' vectors depend on the sum of the tokens alone?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
import xarray as xr

from workbench.activations import token_vectors
from workbench.figure import Axis, Figure, Panel, Points, Text
from workbench.numerics.modular import grokking_rate, parallelograms, standardised
from workbench.numerics.sampling import Draw
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Doc, Range
from workbench.subject import Subject

MOST = 400
"""Tokens whose parallelograms are counted: some five million of them."""


@dataclass(frozen=True)
class RepresentationQuality(Probe[Subject]):
    """Representation quality index (RQI): the share of parallelograms among tokens that their vectors close.

    What it measures: over all tokens i < j ≤ m < n with i + n = j + m, the share with
    mean_d (E_i + E_n - E_j - E_m)² < ``tolerance``, for vectors E standardised in each dim (mean 0, standard deviation
    1); with ``modular``, over pairs of pairs with equal sums modulo p. ``plane`` holds the tokens on the two strongest
    directions of their vectors. ``grokking_rate`` is the third-smallest eigenvalue of the Hessian of the effective loss
    Σ ‖E_i + E_j - E_m - E_n‖² / (P Σ_k ‖E_k‖²) over the P parallelograms that training pairs (the first two columns of
    the inputs) make, with the vectors as they are.

    How to read it: 1 when vectors lie evenly on a line in the tokens' order, where a net that adds vectors must
    generalise; the effective theory of grokking has it rise as test accuracy does, and 1/``grokking_rate`` be the time
    that this takes, in steps times the learning rate of the vectors. At rate 0 the training pairs leave it open where
    some tokens lie.

    What it costs: O(p³ d) for p tokens, and one pass over the examples for the loss beside it.

    When it misleads: it has no meaning without an order of the tokens. On a circle, where modular addition is learned,
    sums of equal pairs share their direction and not their length, so that few parallelograms close, also with
    ``modular``: look at ``plane``, and at FourierConcentration. The rate is nan there, as it is where inputs are no
    pairs of tokens. It is of a theory in which the decoder follows at once: compare it among trainings of one kind.

    Errors: exact.

    Source: Liu et al. 2022 (arXiv:2205.10343).
    """

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("representation_quality", (), "share of parallelograms that close"),
        Variable("parallelograms", (), "number of parallelograms"),
        Variable("grokking_rate", (), "third-smallest eigenvalue of the effective loss's Hessian"),
        Variable("plane", ("token", "direction"), "tokens on their two strongest directions"),
        Variable("train_loss", (), "loss on the examples"),
    )

    embedding: Annotated[str, Doc("Module whose vectors to read; empty takes the first embedding or linear map.")] = ""
    tokens: Annotated[int, Range(0, MOST, soft=(0, 200)), Doc("Read the first so many tokens; 0 reads all.")] = 0
    tolerance: Annotated[float, Range(1e-6, 10.0, log=True), Doc("Mean square that counts as closed.")] = 0.01
    modular: Annotated[bool, Doc("Compare sums modulo the number of tokens.")] = False

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """The picture at once, then the count and the loss."""
        vectors = token_vectors(subject, self.embedding)
        count = self.tokens or len(vectors)
        if not 3 <= count <= min(len(vectors), MOST):
            raise ValueError(
                f"the embedding has {len(vectors)} tokens; 3 to {MOST} can be compared, not {count}: set tokens."
            )
        rows = standardised(vectors[:count].cpu().numpy())
        coords = {"token": np.arange(count), "direction": np.arange(2)}
        values: dict[str, object] = {"plane": _plane(rows)}
        yield self.reading(0.2, values, coords=coords, notes=subject.notes)
        held, total = parallelograms(rows, self.tolerance, self.modular)
        known = rows.size > 0 and bool(np.isfinite(rows).all())
        values |= {"representation_quality": held / total if known else np.nan, "parallelograms": total}
        unknown = () if known else ("the tokens' vectors are all alike, or not finite: nothing can be compared",)
        used = np.empty((0, 2)) if self.modular else _pairs(subject, count)
        values["grokking_rate"] = grokking_rate(used, vectors[:count].cpu().numpy())
        notes = (*subject.notes, *unknown)
        yield self.reading(0.8, values, coords=coords, notes=notes)
        values["train_loss"] = subject.loss()
        yield self.reading(1.0, values, coords=coords, converged=True, notes=notes)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The index beside the loss."""
        return {n: float(data[n]) for n in ("representation_quality", "grokking_rate", "train_loss")}

    def figure(self, data: xr.Dataset) -> Figure:
        """The tokens on the two strongest directions, some with their number."""
        x, y = data.plane.values.T
        every = max(len(x) // 30, 1)
        words = tuple(Text(float(a), float(b), str(k)) for k, (a, b) in enumerate(zip(x, y, strict=True)))
        panel = Panel((Points(x, y), *words[::every]), Axis("first direction"), Axis("second direction"), square=True)
        return Figure((panel,), title=f"representation quality {float(data.representation_quality):.3f}")

    def estimate(self, subject: Subject) -> Cost:
        """The vectors, and the pairs of one sum at a time."""
        largest = max((p.numel() for p in subject.params.values()), default=1)
        return Cost(8 * (4 * largest + MOST * MOST) + subject.memory(), 1, "one pass over the examples")


def _pairs(subject: Subject, tokens: int) -> np.ndarray:
    """The first two columns of the inputs (n, 2), without rows of other tokens; none where these are no numbers."""
    found = [np.empty((0, 2))]
    for batch in subject.batches():
        inputs = batch.args[0] if batch.args else None
        if isinstance(inputs, torch.Tensor) and inputs.ndim == 2 and inputs.shape[1] > 1:
            found.append(inputs[:, :2].double().cpu().numpy())
    rows = np.concatenate(found)
    whole = bool((rows == np.round(rows)).all())
    return rows[((rows >= 0) & (rows < tokens)).all(1)] if whole else rows[:0]


def _plane(rows: np.ndarray) -> np.ndarray:
    """Coordinates (p, 2) on the two strongest directions, the largest entry of each direction positive."""
    plane = np.full((len(rows), 2), np.nan)
    if rows.size and np.isfinite(rows).all():
        left, sizes, right = torch.linalg.svd(torch.from_numpy(rows), full_matrices=False)
        sign = torch.sign(right[torch.arange(len(right)), right.abs().argmax(1)])
        found = (left * sizes * sign)[:, :2].numpy()
        plane[:, : found.shape[1]] = found
    return plane
