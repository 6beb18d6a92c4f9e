"""Opposing signals: the examples whose losses rise and fall against one another from step to step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from workbench.figure import Axis, Figure, Line, Panel, Rule, Text, fitting
from workbench.numerics.basis import dot, norm
from workbench.numerics.sampling import Draw
from workbench.operators.table import curvature
from workbench.probe import Cost, Look, Probe, Reading, Value, Variable
from workbench.schema import Doc, Range
from workbench.selftest import test_bytes
from workbench.spectra.energy import energies
from workbench.spectra.run import Aim, SpectralRun
from workbench.subject import Subject
from workbench.trajectory import Trajectory

Floats = NDArray[np.float64]
_GROUPS = ("rising", "falling")
_TOLERANCE = 1e-3
"""Residual over eigenvalue that counts as converged: eigenvectors need more than eigenvalues."""


@dataclass(frozen=True)
class OpposingSignals(Probe[Trajectory]):
    """Opposing signals: two groups of examples whose losses move oppositely, and carry most of the loss's movement.

    What it measures: Δℓ_i(t), the change of each example's loss from one checkpoint to the next. The K = ``share`` · n
    examples with the largest rise and the K with the largest fall between ``step`` and the checkpoint after it make the
    groups: ``example`` (their places in the subject), ``change``, ``target`` where it is a number. At all checkpoints:
    ``group_loss``, the groups' mean losses; ``alternation``, the correlation over examples of Δℓ(t) with Δℓ(t - 1);
    ``group_share`` = Σ_groups |Δℓ| / Σ |Δℓ|; ``mean_change`` of the loss and ``typical_change``, the root mean square
    of the examples'. At ``step``: ``cosine`` between the two groups' mean gradients, and ``group_energy``, the share of
    each group's ‖g‖² along the ``directions`` leading eigenvectors of the Hessian of all examples, beside
    ``gradient_energy``, that of the mean gradient of all, and ``sharpness``, the largest eigenvalue.

    How to read it: at the edge of stability ``alternation`` and ``cosine`` are near -1, and examples change by many
    times what their mean does: the loss falls slowly while two groups with opposite signals are swung to and fro, along
    the sharpest direction: ``group_energy`` is far above ``directions`` over the number of parameters.
    Look at the examples: a feature that both have, with different labels, is what Rosenfeld and Risteski found.

    What it costs: one pass over the examples for each checkpoint, two gradients of K examples, and some 10 to 20
    products with the Hessian at ``step`` (none for ``directions`` 0); memory, n numbers for each checkpoint, and that
    of a short Lanczos run.

    When it misleads: checkpoints must be one step apart (record with every=1); with more between, alternation is
    averaged away, and a note says so. Mini-batches hide it: full-batch or large-batch training shows it. Early, the
    groups are those that are learnt first. Groups are picked by their change, not by their loss, so that
    ``group_share`` at ``step`` is selected to be large: look at it at other steps.

    Errors: exact for these examples, but for energies, whose errors bound what unconverged eigenvectors can do (nan
    where no gap after the last of them is resolved), and ``sharpness``, which has its residual. Source: Rosenfeld and
    Risteski 2023.
    """

    share: Annotated[
        float, Range(1e-5, 0.5, log=True, soft=(1e-3, 0.1)), Doc("Part of the examples in each group; at least one.")
    ] = 0.005
    step: Annotated[
        int | None,
        Range(0, 100_000_000),
        Doc("Checkpoint from which changes pick the groups; None: that with the largest changes in the second half."),
    ] = None
    directions: Annotated[
        int, Range(0, 20), Doc("Leading eigenvectors along which the groups' gradients are looked at; 0 for none.")
    ] = 1

    looks_at: ClassVar[Look] = "trajectory"
    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("example", ("group", "rank"), "place of the example in the subject"),
        Variable("change", ("group", "rank"), "change of its loss"),
        Variable("target", ("group", "rank"), "its target"),
        Variable("group_loss", ("step", "group"), "mean loss of the group"),
        Variable("loss", ("step",), "mean loss"),
        Variable("mean_change", ("step",), "change of the mean loss to the next checkpoint"),
        Variable("typical_change", ("step",), "root mean square of the examples' changes"),
        Variable("alternation", ("step",), "correlation of changes with those before"),
        Variable("group_share", ("step",), "part of Σ|Δℓ| in both groups"),
        Variable("cosine", (), "cosine between the groups' mean gradients"),
        Variable("group_energy", ("group",), "share of ‖g‖² in sharp directions", error="group_energy_error"),
        Variable("group_energy_error", ("group",), "bound on its error"),
        Variable("gradient_energy", (), "that share of all examples' mean gradient", error="gradient_energy_error"),
        Variable("gradient_energy_error", (), "bound on its error"),
        Variable("sharpness", (), "largest eigenvalue of the Hessian there", error="sharpness_error"),
        Variable("sharpness_error", (), "its residual"),
        Variable("picked_at", (), "step from which changes picked the groups", "steps"),
    )

    def stream(self, subject: Trajectory, draw: Draw) -> Iterator[Reading]:
        """Checkpoint after checkpoint, then the groups."""
        steps = subject.steps
        if len(steps) < 2 or (self.step is not None and self.step not in steps[:-1]):
            raise ValueError(
                f"OpposingSignals compares checkpoints with the next ones, from step {self.step}; {subject.label} has "
                f"{len(steps)}, the last at {max(steps, default=0)}. Record every step, and "
                "choose one with another after it."
            )
        run = _Run(self, subject)
        for place in range(len(steps)):
            run.add(place)
            yield run.report(0.95 * (place + 1) / len(steps))
        run.pick()
        yield run.report(0.95)
        try:
            for done in run.bend(draw.seed) if self.directions else ():
                yield run.report(0.95 + 0.049 * done)
        except (ValueError, ArithmeticError) as problem:
            run.skip(problem)
        yield run.report(1.0)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Alternation and opposition where the groups were picked, and how much larger examples' changes are."""
        found: dict[str, Value] = {"cosine": float(data.cosine), "picked_at": float(data.picked_at)}
        alternation = data.alternation.values
        known = alternation[np.isfinite(alternation)]
        found["alternation"] = float(np.median(known)) if known.size else math.nan
        for name in ("group_energy", "group_energy_error") if self.directions else ():
            found |= {f"{which}_{name[6:]}": float(v) for which, v in zip(_GROUPS, data[name].values, strict=True)}
        at = data["step"].values == float(data.picked_at)
        return found | {"group_share": float(data.group_share.values[at][0]) if at.any() else math.nan}

    def figure(self, data: xr.Dataset) -> Figure:
        """The groups' losses along the path, and the correlation of changes with those before."""
        steps = data["step"].values
        losses, x = data.group_loss.values, Axis("step")
        lines = [Line(steps, data.loss.values, "all examples", "reference")]
        for column, name, role in ((0, "rising", "main"), (1, "falling", "second")):
            lines.append(Line(steps, losses[:, column], f"{name} where picked", role))  # type: ignore[arg-type]
        picked = float(data.picked_at)
        rules = (Rule(picked, "x", "picked here"),) if math.isfinite(picked) else ()
        first = Panel((*lines, *rules), x, fitting("loss", "log", losses, data.loss.values))
        alternation = data.alternation.values
        none = Text(float(steps[0]), 0.0, "three checkpoints are needed")
        mark = Line(steps, alternation) if np.isfinite(alternation).any() else none
        limits = Axis("correlation with the change before", limits=(-1.05, 1.05))
        return Figure((first, Panel((mark, Rule(0.0)), x, limits)))

    def estimate(self, subject: Trajectory) -> Cost:
        """One subject at a time, and all losses."""
        one, count = subject.subject(subject.steps[0]), len(subject.steps)  # the last may have diverged
        bytes_ = one.memory() + 4 * one.size * one.dtype.itemsize + 24 * count * one.examples
        words = f"one pass over the examples for each of {count} checkpoints"
        if not self.directions:
            return Cost(bytes_, count, words)
        kept, working = curvature(one).expected_bytes()
        basis = self.aim.basis_bytes(one.size, one.dtype.itemsize)
        vectors = (self.directions + 4) * one.size * one.dtype.itemsize
        products = self.aim.products(one.size)
        return Cost(
            bytes_ + kept + max(basis + working, test_bytes(one)) + vectors,
            count + products,
            f"{words}, and a spectrum",
        )

    @property
    def aim(self) -> Aim:
        """The Hessian's pairs that are looked for: one more than directions, which ends the gap."""
        return Aim(self.directions + 1, 0, _TOLERANCE, trace=False, density=False)


class _Run:
    """Losses of every example at the checkpoints so far."""

    def __init__(self, probe: OpposingSignals, subject: Trajectory) -> None:
        self.probe, self.subject, self.steps = probe, subject, np.array(subject.steps)
        self.losses: Floats | None = None
        self.values: dict[str, Any] = {}
        self.notes: tuple[str, ...] = ()
        self.met = True

    def add(self, place: int) -> None:
        """One more checkpoint."""
        here = self._opened(place)
        found = here.losses()
        if found is None:
            raise ValueError(
                "OpposingSignals follows each example's own loss; this one couples the examples of a batch. Use "
                "norm='eval', or a loss with one number an example."
            )
        if not bool(torch.isfinite(found).all()):
            raise ValueError(f"some losses at step {self.steps[place]} are not finite; leave later checkpoints out.")
        if self.losses is None:
            self.losses = np.full((len(self.steps), len(found)), np.nan)
            self.count = max(1, min(math.ceil(self.probe.share * len(found)), len(found) // 2))
            on = here.on
            self.notes = (*here.notes, on)
            if (np.diff(self.steps) > 1).any():
                self.notes += ("checkpoints are more than one step apart: alternation between them is not seen",)
        self.losses[place] = found.cpu().numpy()

    def _opened(self, place: int) -> Subject:
        """The subject at a checkpoint; a training that diverged has some that cannot be opened."""
        step = int(self.steps[place])
        try:
            return self.subject.subject(step)
        except ValueError as problem:
            if not place:
                raise
            raise ValueError(
                f"step {step} has no changes to follow: {problem} Leave later checkpoints out."
            ) from problem

    def pick(self) -> None:
        """The groups, and what follows from them."""
        assert self.losses is not None
        changes = np.diff(self.losses, axis=0)
        place = self.place(changes)
        order = np.argsort(changes[place], kind="stable")
        groups = np.stack([order[::-1][: self.count], order[: self.count]])
        here = self.subject.subject(int(self.steps[place]))
        both = np.abs(changes[:, groups.ravel()]).sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            part = np.append(both / np.abs(changes).sum(1), np.nan)
        self.values = {"example": groups, "change": changes[place][groups], "target": _targets(here, groups)}
        self.values |= {"group_loss": self.losses[:, groups].mean(2), "group_share": part}
        self.here, self.means = here, [here.flatten(here.selected(g.tolist()).gradient()) for g in groups]
        self.values |= {"cosine": _cosine(*self.means), "picked_at": float(self.steps[place])}

    def bend(self, seed: int) -> Iterator[float]:
        """The groups' gradients along the sharpest directions where they were picked; yields how far it is."""
        count = min(self.probe.directions, self.here.size)
        with curvature(self.here) as matrix:
            draw = Draw(seed, f"{self.probe.name}/sharpest", matrix.size, matrix.dtype, matrix.device)
            run = SpectralRun(self.probe.aim, matrix, matrix, draw)
            for _ in run.eigenvalues():
                yield matrix.products / (matrix.products + run.left)
            assert run.state is not None
            pairs = [np.array(run.values[name], dtype=np.float64) for name in ("eigenvalue", "residual")]
            vectors = run.state.vectors(range(count))
            found = [energies(vectors, mean, *pairs) for mean in (*self.means, matrix.gradient)]
        share, error = (np.array([getattr(one, name)[-1] for one in found]) for name in ("share", "share_error"))
        self.values |= {"group_energy": share[:2], "group_energy_error": error[:2]}
        self.values |= {"gradient_energy": share[2], "gradient_energy_error": error[2]}
        self.values |= {"sharpness": pairs[0][0], "sharpness_error": pairs[1][0]}
        self.met = run.converged
        self.notes += tuple(n for n in run.notes() if n not in self.notes)

    def skip(self, problem: Exception) -> None:
        """Leave the energies unknown, and say why: all else stands."""
        self.met = False
        self.notes += (f"energies could not be measured: {problem} Without them: directions=0.",)

    def place(self, changes: Floats) -> int:
        """Where the groups are picked: early changes, when everything is learnt at once, say little."""
        if self.probe.step is not None:
            return self.subject.steps.index(self.probe.step)
        half = len(changes) // 2
        return half + int(np.argmax(np.abs(changes[half:]).sum(1)))

    def report(self, done: float) -> Reading:
        """The reading of now."""
        assert self.losses is not None
        changes = np.diff(self.losses, axis=0)
        nothing = np.full(1, np.nan)
        values = {"loss": self.losses.mean(1), "mean_change": np.append(changes.mean(1), nothing)}
        values["typical_change"] = np.append(np.sqrt((changes**2).mean(1)), nothing)
        pairs = [_correlation(one, two) for one, two in itertools.pairwise(changes)]
        values["alternation"] = np.array([np.nan, *pairs, np.nan])[: len(self.steps)]
        coords = {"step": self.steps, "group": np.array(_GROUPS), "rank": np.arange(1, self.count + 1)}
        found = values | self.values
        return self.probe.reading(done, found, coords=coords, converged=done == 1 and self.met, notes=self.notes)


def _correlation(one: Floats, two: Floats) -> float:
    """Pearson's, over examples; nan where either does not vary or is not known."""
    a, b = one - one.mean(), two - two.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale > 0 else math.nan


def _targets(subject: Subject, groups: NDArray[np.int64]) -> Floats:
    """The groups' targets where each is one number; nan else."""
    found = np.full(groups.shape, np.nan)
    wanted = np.unique(groups)
    parts: list[Tensor] = []
    for batch in subject.selected(wanted.tolist()).batches():
        if not isinstance(batch.targets, Tensor) or batch.targets.numel() != batch.size:
            return found
        parts.append(batch.targets.reshape(-1).double())
    targets = torch.cat(parts).cpu().numpy()
    return targets[np.searchsorted(wanted, groups)]


def _cosine(one: Tensor, two: Tensor) -> float:
    scale = float(norm(one)) * float(norm(two))
    return float(dot(one, two)) / scale if scale > 0 else math.nan
