"""Fourier concentration: do the vectors of tokens consist of a few waves?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import xarray as xr

from workbench.activations import token_vectors
from workbench.figure import Axis, Figure, Panel, Stems
from workbench.numerics.modular import frequency_power, gini, holding
from workbench.numerics.sampling import Draw
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Doc, Range
from workbench.subject import Subject


@dataclass(frozen=True)
class FourierConcentration(Probe[Subject]):
    """Fourier concentration of an embedding: how few frequencies hold the power of its tokens' vectors.

    What it measures, for vectors E (p, d) of the tokens 0 .. p-1 and unit waves over tokens: ``power`` of frequency
    k = 1 .. p//2, ‖cos_kᵀ E‖² + ‖sin_kᵀ E‖² (the constant is left out); ``gini``, the Gini coefficient of these powers,
    from 0 (all alike) to 1 - 1/(p//2) (one frequency); ``top_share``, what the five strongest hold;
    ``frequencies_needed``, how few hold ``share`` of all.

    How to read it: a net that has learned modular addition turns on a few frequencies; random vectors spread over all.

    What it costs: one Fourier transform of the embedding, and one pass over the examples for the loss beside it.

    When it misleads: only for cyclic tasks, whose tokens are 0 .. p-1 in this order; other groups have other waves.
    Further tokens (such as "=") must be left out: set ``tokens``. Few tokens have a Gini coefficient by chance.

    Errors: exact.

    Source: Nanda et al. 2023 (arXiv:2301.05217).
    """

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("power", ("frequency",), "power of the frequency over all dims"),
        Variable("gini", (), "Gini coefficient of the powers"),
        Variable("top_share", (), "share of the power in the five strongest frequencies"),
        Variable("frequencies_needed", (), "fewest frequencies that hold the asked share of the power"),
        Variable("train_loss", (), "loss on the examples"),
    )

    embedding: Annotated[str, Doc("Module whose vectors to read; empty takes the first embedding or linear map.")] = ""
    tokens: Annotated[int, Range(0, 100_000, soft=(0, 200)), Doc("Read the first so many tokens; 0 reads all.")] = 0
    share: Annotated[float, Range(0.01, 1.0, step=0.01), Doc("Share that frequencies_needed hold.")] = 0.9

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """The transform at once; then the loss."""
        vectors = token_vectors(subject, self.embedding)
        count = self.tokens or len(vectors)
        if not 2 <= count <= len(vectors):
            raise ValueError(f"the embedding has {len(vectors)} tokens; tokens={count} cannot be read from it.")
        power = frequency_power(vectors[:count].cpu().numpy())
        total, needed = power.sum(), holding(power, self.share)
        values = {
            "power": power,
            "gini": gini(power),
            "top_share": np.sort(power)[-5:].sum() / total if total > 0 else np.nan,
            "frequencies_needed": len(needed) or np.nan,
        }
        coords = {"frequency": np.arange(1, len(power) + 1)}
        yield self.reading(0.5, values, coords=coords, notes=subject.notes)
        values["train_loss"] = subject.loss()
        yield self.reading(1.0, values, coords=coords, converged=True, notes=subject.notes)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Concentration in three ways, beside the loss."""
        return {n: float(data[n]) for n in ("gini", "top_share", "frequencies_needed", "train_loss")}

    def figure(self, data: xr.Dataset) -> Figure:
        """The power of each frequency."""
        stems = Stems(data["frequency"].values, data.power.values)
        title = f"Gini coefficient {float(data.gini):.3f}"
        return Figure((Panel((stems,), Axis("frequency"), Axis("power")),), title=title)

    def estimate(self, subject: Subject) -> Cost:
        """The vectors in float64 and their transform."""
        largest = max((p.numel() for p in subject.params.values()), default=1)
        return Cost(24 * largest + subject.memory(), 1, "one pass over the examples")
