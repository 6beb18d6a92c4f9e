"""Fisher matrices of a subject: over labels as the model draws them, exact or sampled."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from workbench.data import Batch
from workbench.numerics.sampling import Draw
from workbench.operators.gauss_newton import Bend, OutputCurvature, OutputGraph
from workbench.operators.likelihood import Likelihood, check_likelihood, likelihood
from workbench.subject import Subject


class Fisher(OutputCurvature):
    """F = (1/W) Σ E_y[s sᵀ] with y ~ p(y | x) from the model itself and s = ∇_θ ℓ(x, y); (size, size).

    The labels of the data do not enter. The distribution is p ∝ exp(-ℓ): softmax for cross-entropy, Bernoulli for
    binary cross-entropy, Gaussian for squared error, one label for each unmasked token. F equals the Gauss-Newton
    matrix there. A product costs what one with the Gauss-Newton matrix costs. Source: Amari 1998; Martens 2020.

    Raises:
        TypeError: the subject was made with ``objective=``.
        ValueError: a loss that is no negative log-likelihood.
    """

    words = "Fisher matrix"

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        check_likelihood(subject)

    def _bend(self, graph: OutputGraph, batch: Batch) -> Bend:
        return likelihood(self.subject, graph.outputs, batch).expected


class SampledFisher(OutputCurvature):
    """An unbiased estimate of F: (1/W) Σ (1/k) Σ_j s_j s_jᵀ over ``samples`` labels drawn for each example.

    Drawn once, by ``seed``: a fixed matrix, whatever the batches. Entries err by about 1/√(k n) of their size.

    Args:
        subject: what is looked at.
        samples: labels drawn for each example (each token, for token losses).
        seed: of the draws.

    Raises:
        As :class:`Fisher`; ValueError for fewer than one sample.
    """

    words = "sampled Fisher matrix"

    def __init__(self, subject: Subject, samples: int = 1, seed: int | None = None) -> None:
        if samples < 1:
            raise ValueError(f"SampledFisher(samples=...) must be at least 1; got {samples}.")
        super().__init__(subject)
        check_likelihood(subject)
        self.samples = samples
        self.draw = Draw(subject.seed if seed is None else seed, "labels", subject.size)

    def _bend(self, graph: OutputGraph, batch: Batch) -> Bend:
        model = likelihood(self.subject, graph.outputs, batch)
        scores = [self._score(model, j, batch.size) for j in range(self.samples)]

        def bend(moved: Tensor) -> Tensor:
            found = torch.zeros_like(moved)
            for score in scores:
                found += score * model.along(score, moved)
            return found / self.samples

        return bend

    def _score(self, model: Likelihood, number: int, examples: int) -> Tensor:
        """Scores of the chunk's examples; each example's numbers are its own, so that chunks do not matter."""

        def uniform(count: int) -> Tensor:
            each = count // examples
            rows = [self.draw.generator(number, self.start + i).random(each) for i in range(examples)]
            return torch.from_numpy(np.concatenate(rows))

        return model.score(uniform)
