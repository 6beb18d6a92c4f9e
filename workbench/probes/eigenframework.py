"""Test risk of kernel regression as the kernel's eigenvalues predict it, beside what regression really does."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from workbench.figure import Axis, Band, Figure, Line, Panel, Points, Rule, fitting
from workbench.numerics.eigenframework import kernel_risk
from workbench.numerics.kernel_ridge import KernelRidge
from workbench.numerics.sampling import Draw
from workbench.numerics.stats import error_of_mean, jackknife_error
from workbench.operators.tangent_examples import picked, targets
from workbench.operators.tangent_kernel import TangentKernel as Kernel
from workbench.operators.tangent_named import blocks, doubled, named, naming, reported
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Doc, Range
from workbench.subject import Subject

Floats = NDArray[np.float64]
FEWEST = 4
"""Examples of the smallest regression."""
FOLDS = 10
"""Parts of the block that spectrum and coefficients come from, each left out once."""


@dataclass(frozen=True)
class Eigenframework(Probe[Subject]):
    """Learning curve of kernel ridge regression with the tangent kernel: predicted from eigenvalues, and measured.

    What it measures: on two thirds of the examples (N, a block of its own) the eigenvalues λ_i of K/N, K the
    class-trace kernel (1/C) Σ_c J_c J_cᵀ, and the targets' coefficients v_i = u_iᵀ Y / √N. For each number n of
    examples in ``size``: ``predicted`` test risk E‖f - y‖² = n / (n - Σ L_i²) · Σ (1 - L_i)² v_i² with L_i = λ_i / (λ_i
    + κ) and κ from Σ L_i + δ/κ = n; ``measured``: f = K(x, X) (K + δ I)⁻¹ Y on ``trials`` random choices of n from the
    others, tested on the rest of them. δ = ``ridge`` times K's mean diagonal. Targets are one-hot less 1/C for
    classes, ±1 for one yes or no, else the values; ``constant`` is the risk of f = 0. ``learnability`` L_i and
    ``power``, the share of the targets in modes up to i, are those at the largest n.

    How to read it: where both curves agree, the kernel's spectrum explains what it generalises to, and L_i says which
    modes n examples teach it: the sum of L_i is at most n, which all modes compete for. Feature learning moves the
    targets' power to the first modes, and the curve down.

    What it costs: C backward passes over all examples, their Gram, eleven decompositions of N entries, and one of n for
    each trial and size; float64.

    When it misleads: N examples show N modes, as if the block were all there is: the predicted risk is too small, and
    the more so the nearer n is to N (the largest here is N/4) and the smaller the ridge is. Raise ``examples`` until
    the curve stays. The theory is for many modes and n; for n of a few the measured curve is above it. What no mode can
    learn (label noise) sits in the coefficients of small λ_i. Classes are scored by squared error, not by accuracy.

    Errors: predicted: standard error by the jackknife, each tenth of the block left out; what a finite block misses is
    not in it. Measured: standard error over trials; these share test examples, so that it is too small rather than too
    large.

    Source: Simon et al. 2021 (arXiv 2110.03922); Simon et al. 2024 (arXiv 2311.14646).
    """

    examples: Annotated[
        int, Range(24, 20_000, step=1, log=True, soft=(64, 4096)), Doc("Examples of both parts, balanced by class.")
    ] = 512
    sizes: Annotated[int, Range(2, 30, step=1, soft=(3, 12)), Doc("Numbers of examples on the curve.")] = 7
    trials: Annotated[int, Range(2, 200, step=1, soft=(3, 30)), Doc("Random choices of examples at each size.")] = 7
    ridge: Annotated[
        float, Range(1e-9, 100.0, log=True, soft=(1e-6, 1.0)), Doc("Ridge δ over the mean diagonal of the kernel.")
    ] = 1e-3
    top: Annotated[int, Range(1, 1000, step=1, soft=(10, 200)), Doc("Modes that are shown.")] = 50

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("predicted", ("size",), "test risk predicted from eigenvalues", error="predicted_error"),
        Variable("predicted_error", ("size",), "its standard error over examples of the block"),
        Variable("measured", ("size",), "test risk of kernel ridge regression", error="measured_error"),
        Variable("measured_error", ("size",), "its standard error over trials"),
        Variable("eigenvalue", ("rank",), "eigenvalue of K/N"),
        Variable("learnability", ("rank",), "share of the mode that is learned at the largest size"),
        Variable("power", ("rank",), "share of the targets in modes up to this one"),
        Variable("constant", (), "risk of predicting 0"),
        Variable("delta", (), "ridge δ"),
        Variable("used_examples", (), "examples of both parts"),
        Variable("parameters", (), "parameters that vary"),
        Variable("train_loss", (), "the network's loss on these examples", error="train_loss_error"),
        Variable("train_loss_error", (), "its standard error over examples"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """The kernel, the prediction, its errors, then regressions trial by trial.

        Raises:
            ValueError: fewer than 24 examples, or targets that are not of the outputs' shape.
        """
        yield from _Run(self, doubled(picked(subject, self.examples)), draw).measured()

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Both risks at the largest number of examples."""
        found: dict[str, Value] = {"size": int(data["size"][-1])}
        for name in ("predicted", "measured"):
            found |= {name: float(data[name][-1]), f"{name}_error": float(data[f"{name}_error"][-1])}
        return found | {"constant": float(data.constant)}

    def figure(self, data: xr.Dataset) -> Figure:
        """Both learning curves, and what modes hold and what is learned of them."""
        n, line, error = (data[v].values for v in ("size", "predicted", "predicted_error"))
        error = np.nan_to_num(error)
        curve = (
            Band(n, line - error, line + error),
            Line(n, line, "predicted"),
            Points(n, data.measured.values, data.measured_error.values, "measured", "second"),
            *([Rule(float(data.constant), "y", "f = 0")] if np.isfinite(float(data.constant)) else []),
        )
        rank = data["rank"].values.astype(float)
        modes = (
            Line(rank, data.power.values, "targets up to here"),
            Line(rank, data.learnability.values, "learned", "second"),
        )
        return Figure(
            (
                Panel(curve, Axis("examples", "log"), fitting("test risk ‖f - y‖²", "log", line)),
                Panel(modes, Axis("mode", "log"), Axis("share", limits=(0.0, 1.02))),
            )
        )

    def estimate(self, subject: Subject) -> Cost:
        """The kernel of all examples and a decomposition in float64."""
        kernel = Kernel(doubled(picked(subject, self.examples)))
        n = kernel.examples
        words = f"the class-trace kernel of {n} examples, and {self.sizes * self.trials} regressions"
        return Cost(kernel.expected_bytes("trace") + 5 * 8 * n**2, kernel.outputs, words)


class _Run:
    """What one stream knows so far."""

    def __init__(self, probe: Eigenframework, subject: Subject, draw: Draw) -> None:
        self.probe, self.draw, self.kernel = probe, draw, Kernel(subject)
        y, n = targets(subject, self.kernel.outputs), subject.examples
        if y is None:
            raise ValueError(
                f"the targets are not {self.kernel.outputs} numbers or one class an example, which a regression of "
                f"{self.kernel.outputs} outputs can fit; give class numbers, or values of the outputs' shape."
            )
        if n < 6 * FEWEST:
            raise ValueError(f"a learning curve beside its prediction takes {6 * FEWEST} examples or more; got {n}.")
        self.y = y - (1 / y.shape[1] if subject.classes is not None else 0.0)
        order = torch.from_numpy(draw.generator(0).permutation(n)).to(y.device)
        self.block, self.rest = order[n // 3 :], order[: n // 3]
        self.sizes = np.unique(np.geomspace(FEWEST, max(n // 6, FEWEST + 1), probe.sizes).round().astype(int))
        loss, gap = subject.evaluate(None, ("loss",)), self.kernel.check()
        self.values: dict[str, Any] = {"train_loss": loss["loss"], "train_loss_error": loss["loss_error"]}
        self.values |= {"used_examples": n, "parameters": subject.size, "constant": float(_risk(self.y))}
        self.notes = (
            *subject.notes,
            f"on {n} of {subject.available or 'unknown'} examples, {n - n // 3} of them for the spectrum",
            f"products on a few examples differ from the kernel by {gap:.0e}",
        )

    def measured(self) -> Iterator[Reading]:
        """All there is, in order."""
        theta = yield from self.formed()
        self.delta = self.probe.ridge * float(theta.diagonal().mean())
        self.values["delta"] = self.delta
        self.values["predicted"] = self.predict(theta, self.block, True)
        yield self.report(0.5)
        parts, place = list[Floats](), torch.arange(len(self.block), device=theta.device) % FOLDS
        for fold in range(min(FOLDS, len(self.block))):
            parts.append(self.predict(theta, self.block[place != fold]))
            yield self.report(0.5 + 0.02 * len(parts))
        self.values["predicted_error"] = jackknife_error(np.array(parts))
        yield from self.regressions(theta)

    def formed(self) -> Generator[Reading, None, Tensor]:
        """The kernel (n, n), with readings on the way."""
        theta = yield from reported(blocks(self.kernel, "trace"), lambda share: self.report(0.01 + 0.48 * share))
        return theta[:, 0, :, 0]

    def predict(self, theta: Tensor, block: Tensor, modes: bool = False) -> Floats:
        """The predicted curve from a block's eigenvalues; ``modes``: and what they are."""
        values, vectors = torch.linalg.eigh(theta[block][:, block] / len(block))
        lam = values.flip(0).clamp_min(0).cpu().numpy()
        power = ((vectors.flip(1).T @ self.y[block]).square().sum(1) / len(block)).cpu().numpy()
        if not lam.any():
            return np.full(len(self.sizes), np.nan)
        risks = [kernel_risk(lam, power, int(n), self.delta) for n in self.sizes]
        if modes:
            held = power.cumsum() / power.sum() if power.any() else np.full_like(power, np.nan)
            for name, found in (("eigenvalue", lam), ("learnability", risks[-1].learnability), ("power", held)):
                self.values[name] = np.pad(found, (0, self.probe.top), constant_values=np.nan)[: self.probe.top]
        return np.array([risk.test for risk in risks])

    def regressions(self, theta: Tensor) -> Iterator[Reading]:
        """Regressions on random choices of the other examples."""
        found = list[list[float]]()
        for trial in range(self.probe.trials):
            order = self.rest[
                torch.from_numpy(self.draw.generator(1, trial).permutation(len(self.rest))).to(theta.device)
            ]
            found.append([self.regress(theta, order, int(n)) for n in self.sizes])
            every = np.array(found)
            self.values["measured"], self.values["measured_error"] = every.mean(0), error_of_mean(every)
            yield self.report(0.7 + 0.3 * (trial + 1) / self.probe.trials)

    def regress(self, theta: Tensor, order: Tensor, n: int) -> float:
        """Fit the first n, test on those that no size fits."""
        fit, test = order[:n], order[int(self.sizes[-1]) :]
        ridge = KernelRidge.of(theta[fit][:, None, fit][..., None], self.y[fit])
        across = theta[test][:, fit][:, None, :, None]
        return float(_risk(ridge.predicted(across, self.delta) - self.y[test]))

    def report(self, done: float) -> Reading:
        """The reading of now, which names its kernel."""
        done = 1.0 if done > 1 - 1e-9 else done
        coords = {"size": self.sizes, "rank": np.arange(1, self.probe.top + 1)}
        made = self.probe.reading(done, self.values, coords=coords, converged=done == 1, notes=self.notes)
        return naming(made, named(self.kernel, "trace"))


def _risk(residual: Tensor) -> Tensor:
    """Mean of ‖r‖² over examples."""
    return residual.square().sum(1).mean()
