"""What the tangent kernel at these weights would reach by itself, without any feature being learned."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor

from workbench.figure import Axis, Bars, Figure, Line, Panel, Points, Rule
from workbench.numerics.kernel_ridge import KernelRidge
from workbench.numerics.ridge import Scores
from workbench.numerics.sampling import Draw
from workbench.operators.tangent_examples import answers, joint_targets, picked
from workbench.operators.tangent_kernel import TangentKernel as Kernel
from workbench.operators.tangent_named import OUTPUTS, Outputs, blocks, doubled, named, naming, reported
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Doc, Range
from workbench.subject import Subject

WEAKEST, STRONGEST = -10.0, 2.0
"""Ridge strengths, as powers of ten of the mean eigenvalue."""
_UNTOLD = (
    "the loss does not tell above which output the network says yes, so its accuracy is nan; with loss='half_mse' or "
    "'binary_cross_entropy_with_logits' it would"
)
_WORDS = {
    "kernel": "of the kernel",
    "network": "of the network",
}


def _scores() -> Iterator[Variable]:
    for whose, words in _WORDS.items():
        yield Variable(f"{whose}_accuracy", (), f"held-out accuracy {words}", error=f"{whose}_accuracy_error")
        yield Variable(f"{whose}_accuracy_error", (), "its standard error over held-out examples")
        yield Variable(f"{whose}_accuracy_low", (), "lower end of its 95 % interval")
        yield Variable(f"{whose}_accuracy_high", (), "upper end of its 95 % interval")
        yield Variable(f"{whose}_loss", (), f"held-out squared error {words}", error=f"{whose}_loss_error")
        yield Variable(f"{whose}_loss_error", (), "its standard error over held-out examples")


@dataclass(frozen=True)
class KernelRegression(Probe[Subject]):
    """Kernel ridge regression with the tangent kernel at these weights: what a network that stays lazy would reach.

    What it measures: f(x) = K(x, X) (K + δ I)⁻¹ Y on ``examples`` of the subject's examples X, with K the class-trace
    kernel, the same for all outputs, or the full one; targets Y are one-hot less 1/C for classes, ±1 for one yes or no
    (targets of 0 and 1, or -1 and 1, for a single output), else the values. δ is the one, of ``strengths`` on a grid
    from 10⁻¹⁰ to 100 of K's mean eigenvalue, with the least squared error ``left_out (strength)`` of each example
    predicted from all the others, exactly. On the held-out examples: ``kernel_loss`` = mean of ½‖f - y‖² with the y
    above; ``kernel_accuracy`` for classes (the largest f) and for one yes or no (yes for f > 0);
    ``network_accuracy`` and (unless outputs are logits) ``network_loss`` of the network as it stands; ``chance`` is the
    accuracy of the class most frequent among the fitted ones, ``constant_loss`` the loss of the mean target. A network
    says yes above 0 where its output is a logit or learns ±1, above ½ where it learns 0 and 1: then it is taken as
    2f - 1. With ``keep_start``, Y - f₀(X) is fitted and f₀ added again, f₀ the network's own outputs: where gradient
    descent on the linearised network would go from here.

    How to read it: of the initial weights it is the lazy baseline; a trained network that is no better learned no
    features that help. Of trained weights it says what the learned kernel is worth: where it reaches the network's
    accuracy, the kernel holds what was learned.

    What it costs: C backward passes over fitted and held-out examples, both Grams, one decomposition of n (nC) entries;
    all in float64.

    When it misleads: the network saw all its training examples and the kernel only n of them: raise ``examples`` before
    calling the kernel worse. The offset is what the kernel makes of it (biases). Squared error on one-hot targets is
    not what a network with cross-entropy minimises. Held-out examples beyond ``held_out_examples`` are not used; of yes
    and no they are taken as they come, not equally many. Of a loss of your own for 0 and 1 it may not be known where
    the network says yes: its accuracy is nan.

    Errors: standard errors and 95 % intervals (Wilson's for accuracies) over held-out examples, for these fitted
    examples. The strength is chosen without the held-out ones.

    Source: Jacot, Gabriel and Hongler 2018; Craven and Wahba 1978; Geiger et al. 2020.
    """

    examples: Annotated[
        int, Range(4, 20_000, step=1, log=True, soft=(32, 2048)), Doc("Examples that are fitted, balanced by class.")
    ] = 256
    held_out_examples: Annotated[
        int, Range(2, 20_000, step=1, log=True, soft=(32, 2048)), Doc("Held-out examples, balanced by class.")
    ] = 512
    outputs: Annotated[Outputs, Choice(OUTPUTS), Doc("Which kernel.")] = "trace"
    keep_start: Annotated[bool, Doc("Whether the network's own outputs are subtracted before and added after.")] = False
    strengths: Annotated[int, Range(2, 100, step=1, soft=(7, 40)), Doc("Ridge strengths on the grid.")] = 25

    variables: ClassVar[tuple[Variable, ...]] = (
        *_scores(),
        Variable("left_out", ("strength",), "squared error of each example left out", error="left_out_error"),
        Variable("left_out_error", ("strength",), "its standard error over examples"),
        Variable("held_out", ("strength",), "squared error on the held-out examples", error="held_out_error"),
        Variable("held_out_error", ("strength",), "its standard error over held-out examples"),
        Variable("ridge", (), "strength δ that was chosen"),
        Variable("ridge_ratio", (), "that over the mean eigenvalue"),
        Variable("chance", (), "held-out accuracy of the most frequent class"),
        Variable("constant_loss", (), "held-out squared error of the mean target"),
        Variable("used_examples", (), "examples fitted"),
        Variable("tested_examples", (), "held-out examples"),
        Variable("parameters", (), "parameters that vary"),
        Variable("train_loss", (), "the network's loss on the examples fitted", error="train_loss_error"),
        Variable("train_loss_error", (), "its standard error over examples"),
        Variable("held_out_loss", (), "the network's own loss on the held-out ones", error="held_out_loss_error"),
        Variable("held_out_loss_error", (), "its standard error over held-out examples"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """The network's own scores, the kernel of the fitted examples, that with the held-out ones, then all strengths.

        Raises:
            ValueError: no held-out examples, or targets that are not of the outputs' shape.
        """
        yield from _Run(self, *self.both(subject)).measured()

    def both(self, subject: Subject) -> tuple[Subject, Subject]:
        """Fitted and held-out examples, in float64."""
        if subject.held_out is None:
            raise ValueError(
                "KernelRegression is tested on held-out examples, and this subject has none; give held_out=(x, y)."
            )
        fit, test = picked(subject, self.examples), picked(subject.held_out, self.held_out_examples)
        return doubled(fit), doubled(test)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Accuracies for classes and squared errors, of the kernel and of the network."""
        found: dict[str, Value] = {}
        for name in ("kernel_accuracy", "network_accuracy", "kernel_loss", "network_loss"):
            if math.isfinite(float(data[name])) or name == "kernel_loss":
                found |= {name: float(data[name]), f"{name}_error": float(data[f"{name}_error"])}
        return found | {"ridge_ratio": float(data.ridge_ratio), "chance": float(data.chance)}

    def figure(self, data: xr.Dataset) -> Figure:
        """Squared errors over strengths with the one that was chosen, and the scores of kernel and network."""
        at = data["strength"].values
        marks = [
            Line(at, data.left_out.values, "each left out", "main"),
            Line(at, data.held_out.values, "held out", "second"),
            Points(at, data.held_out.values, data.held_out_error.values, "", "second"),
        ]
        chosen = [Rule(float(data.ridge_ratio), "x", "chosen")] if np.isfinite(float(data.ridge_ratio)) else []
        ridge = Panel((*marks, *chosen), Axis("δ over mean eigenvalue", "log"), Axis("½‖f - y‖²"))
        score, words = ("accuracy", "held-out accuracy") if np.isfinite(float(data.chance)) else ("loss", "½‖f - y‖²")
        values, errors = ([float(data[f"{who}_{score}{end}"]) for who in _WORDS] for end in ("", "_error"))
        level = float(data.chance if score == "accuracy" else data.constant_loss)
        rule = [Rule(level, "y", "chance" if score == "accuracy" else "constant")] if np.isfinite(level) else []
        return Figure(
            (ridge, Panel((Bars(range(2), values, errors, names=tuple(_WORDS)), *rule), Axis(""), Axis(words)))
        )

    def estimate(self, subject: Subject) -> Cost:
        """Both kernels and a decomposition in float64, and what the larger keeps of layers."""
        if subject.held_out is None:
            return Cost(subject.memory(), 1, "one pass over the examples")
        fit, test = self.both(subject)
        kernel, other = Kernel(fit), Kernel(test)
        rows, columns = (k.examples * (1 if self.outputs == "trace" else k.outputs) for k in (kernel, other))
        most = max(kernel.expected_bytes(self.outputs), other.expected_bytes(self.outputs, kernel))
        words = f"the {self.outputs} kernels of {kernel.examples} and {other.examples} examples in float64"
        return Cost(most + 8 * (5 * rows**2 + 2 * rows * columns), 2 * kernel.outputs, words)


class _Run:
    """What one stream knows so far."""

    def __init__(self, probe: KernelRegression, fit: Subject, test: Subject) -> None:
        self.probe, self.fit, self.test = probe, fit, test
        self.kernel, self.other = Kernel(fit), Kernel(test)
        y, aim = joint_targets((fit, test), self.kernel.outputs)
        if y is None or aim is None:
            raise ValueError(
                f"the targets are not {self.kernel.outputs} numbers or one class an example, which a regression of "
                f"{self.kernel.outputs} outputs can fit; give class numbers, or values of the outputs' shape."
            )
        self.classes, self.answers = fit.classes is not None, answers((fit, test), self.kernel.outputs)
        shift = 1 / y.shape[1] if self.classes else 0.0
        self.y, self.aim = y - shift, aim - shift
        starts = (s.outputs().detach().double().reshape(len(t), -1) for s, t in ((fit, y), (test, aim)))
        self.starts = [self.answers.centred(f) if self.answers else f for f in starts]
        gap = self.kernel.check()
        self.told = self.answers is None or not math.isnan(self.answers.above)
        self.values: dict[str, Any] = {"used_examples": len(y), "tested_examples": len(aim), "parameters": fit.size}
        self.ratios = np.logspace(WEAKEST, STRONGEST, probe.strengths)
        self.notes = (
            *fit.notes,
            fit.on,
            f"products on a few examples differ from the kernel by {gap:.0e}",
            *([] if self.told else [_UNTOLD]),
        )

    def measured(self) -> Iterator[Reading]:
        """The network, the kernels, the regression."""
        self.network()
        yield self.report(0.05)
        theta = yield from self.formed(self.kernel, None, 0.05)
        across = yield from self.formed(self.other, self.kernel, 0.45)
        offset = self.starts if self.probe.keep_start else [torch.zeros_like(t) for t in self.starts]
        ridge = KernelRidge.of(theta, self.y - offset[0])
        left = [_squared(ridge.residuals(r * ridge.scale)) for r in self.ratios]
        self.put("left_out", left)
        yield self.report(0.9)
        found = [ridge.predicted(across, r * ridge.scale) + offset[1] for r in self.ratios]
        self.put("held_out", [_squared(f - self.aim) for f in found])
        best = int(np.argmin(self.values["left_out"]))
        self.values |= {"ridge_ratio": self.ratios[best], "ridge": self.ratios[best] * ridge.scale}
        self.score("kernel", found[best], self.told or not self.probe.keep_start)
        if best in (0, len(self.ratios) - 1):
            self.notes += (f"the chosen strength is at an end of the grid, {self.ratios[best]:.0e} of the mean",)
        yield self.report(1.0)

    def network(self) -> None:
        """What the network itself has, and what nobody needs to learn."""
        for name, subject in (("train_loss", self.fit), ("held_out_loss", self.test)):
            found = subject.evaluate(None, ("loss",))
            self.values |= {name: found["loss"], f"{name}_error": found["loss_error"]}
        self.score("network", self.starts[1], self.told)
        constant = _squared(self.y.mean(0) - self.aim)
        self.values["constant_loss"] = float(constant.mean())
        if self.classes or self.answers:
            most = _choices(self.y.mean(0, keepdim=True)).argmax()
            self.values["chance"] = float((_choices(self.aim).argmax(1) == most).double().mean())
        if self.classes or (self.answers and not self.answers.on_scale):
            # Logits are on no scale on which one-hot targets, or ±1, would be.
            self.values |= {"network_loss": math.nan, "network_loss_error": math.nan}

    def score(self, whose: str, outputs: Tensor, told: bool = True) -> None:
        """Squared error of outputs on the held-out examples, and accuracy where it is ``told`` what they decide."""
        loss = _squared(outputs - self.aim)
        self.values |= {f"{whose}_loss": float(loss.mean()), f"{whose}_loss_error": _error(loss)}
        if told and (self.classes or self.answers) and bool(outputs.isfinite().all()):
            scores = Scores.empty(1, outputs.device)
            scores.add(0, _choices(outputs), _choices(self.aim), _choices(self.y).mean(0))
            for end, value in zip(("", "_error", "_low", "_high"), scores.accuracy(0), strict=True):
                self.values[f"{whose}_accuracy{end}"] = value

    def put(self, name: str, losses: list[Tensor]) -> None:
        """Means over examples at each strength, with errors."""
        self.values[name] = [float(loss.mean()) for loss in losses]
        self.values[f"{name}_error"] = [_error(loss) for loss in losses]

    def formed(self, kernel: Kernel, other: Kernel | None, begin: float) -> Generator[Reading, None, Tensor]:
        """A kernel, with readings on the way."""
        return reported(blocks(kernel, self.probe.outputs, other), lambda share: self.report(begin + 0.4 * share))

    def report(self, done: float) -> Reading:
        """The reading of now, which names its kernel."""
        known = math.isfinite(float(self.values.get("kernel_loss", math.nan)))
        made = self.probe.reading(
            done, self.values, coords={"strength": self.ratios}, converged=done >= 1 and known, notes=self.notes
        )
        return naming(made, named(self.kernel, self.probe.outputs))


def _choices(outputs: Tensor) -> Tensor:
    """Scores (n, C) whose largest is the choice: a single output beside the 0 that it has to exceed for yes."""
    return F.pad(outputs, (1, 0)) if outputs.shape[1] == 1 else outputs


def _squared(residual: Tensor) -> Tensor:
    """½‖r‖² of each example, (n,)."""
    return residual.square().sum(1) / 2


def _error(losses: Tensor) -> float:
    return float(losses.std() / math.sqrt(len(losses))) if len(losses) > 1 else math.nan
