"""Critical learning periods: which pathway learns what along a training, and what a deficit for a while has cost."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from workbench.dynamics.tasks import members_of
from workbench.figure import ROLES, AnyMark, Axis, Figure, Line, Panel, Points, Rule, step_axis
from workbench.numerics.crossings import known
from workbench.numerics.sampling import Draw
from workbench.pace import Pace
from workbench.probe import Cost, Look, Probe, Reading, Value, Variable
from workbench.schema import Doc, Range
from workbench.several import Runs
from workbench.trajectory import Trajectory

Floats = NDArray[np.float64]

_BRANCH = re.compile(r"(?:^|.*\.)paths\.\d+(?=\.)")
_PATHWAY = ("run", "checkpoint", "pathway", "mode")


@dataclass(frozen=True)
class CriticalPeriods(Probe[Any]):
    """How pathways of a network share the modes of what is learned, and how a deficit depends on when it was there.

    What it measures, at each checkpoint of one recorded training or many: the map M_p of each pathway, the product of
    its weight matrices, and its singular values (``singular_value``). With the largest singular modes u_i, v_i of the
    whole Σ_p M_p at the last checkpoint: ``strength`` K_p,i = u_iᵀ M_p v_i and ``share`` K_p,i / Σ_q K_q,i;
    ``final_share``, by pathway, is Σ_i K_p,i / Σ_q,i K_q,i at the last checkpoint. From the record, where ``deficit``
    tells of each step whether it was taken under one (0: no): its ``onset`` and ``removal``, in steps, and ``clean``,
    the steps after it. Over runs: ``sensitivity`` to a deficit of this onset and removal = mean final ``score`` of the
    runs without any - mean final score of the runs with it.

    How to read it: in deep linear nets the modes are learned apart from each other and pathways compete: what another
    has taken, a pathway that was closed never gets back, the less the deeper. For two open, balanced pathways of D
    layers K_a/K_b stays (D = 2), or K_a^(2/D - 1) - K_b^(2/D - 1) (D > 2). A sensitivity that depends on the onset and
    not only on the length of the deficit is a critical period. Gates are not looked at: weights are.

    What it costs: a product of the weight matrices and a few singular value decompositions at each checkpoint.

    When it misleads: with non-linearities between the matrices their product is a linearisation of nothing; without
    names the whole net then counts as one pathway, and only sensitivities say something. The modes are those of the end
    of each run: a training that was stopped early has others. Modes of equal value are only known together, and modes
    of value 0 not at all: nan. Runs with unequal numbers of clean steps, or with a
    learning rate that falls, mix the deficit with the schedule; unequal numbers are said in the notes.

    Errors: strengths are exact up to rounding. Sensitivities: standard errors over runs, of both means; nan where one
    of them has a single run.

    Source: Achille, Rovere and Soatto 2019; Kleinman, Achille and Soatto 2024 (arXiv:2308.12221).
    """

    looks_at: ClassVar[Look] = "trajectory"
    looks_also_at: ClassVar[tuple[Look, ...]] = ("runs",)
    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("singular_value", _PATHWAY, "singular values of the pathway's map, largest first"),
        Variable("strength", _PATHWAY, "u_iᵀ M_p v_i along the modes of the whole at the end"),
        Variable("share", _PATHWAY, "share of the pathway in the mode"),
        Variable("final_share", ("run", "pathway"), "share of the pathway in all modes at the end"),
        Variable("onset", ("run",), "steps before the deficit; 0 without any", "steps"),
        Variable("removal", ("run",), "steps after which the deficit ended; 0 without any", "steps"),
        Variable("clean", ("run",), "steps after the deficit", "steps"),
        Variable("final", ("run",), "last recorded score"),
        Variable("deficit_onset", ("deficit",), "steps before the deficit", "steps"),
        Variable("deficit_removal", ("deficit",), "steps after which the deficit ended", "steps"),
        Variable("sensitivity", ("deficit",), "final score without - with the deficit", error="sensitivity_error"),
        Variable("sensitivity_error", ("deficit",), "its standard error over runs"),
    )

    pathways: Annotated[
        str,
        Doc("Globs of weight names with commas between, one for each pathway; empty: the members of `paths`, or all."),
    ] = ""
    modes: Annotated[int, Range(1, 1000, soft=(1, 16)), Doc("Modes that are followed, largest first.")] = 4
    score: Annotated[str, Doc("Recorded score whose last value counts; larger is better.")] = "test_accuracy"
    deficit: Annotated[str, Doc("Recorded number that is not 0 where a step was taken under the deficit.")] = "deficit"

    def stream(self, subject: Trajectory | Runs, draw: Draw) -> Iterator[Reading]:
        """What deficits have cost, then the pathways, run by run."""
        members, pace = members_of(subject, self.name), Pace()
        found = _Found(self, members)
        yield found.reading(0.0)
        total = sum(len(path.steps) for path in members.values())
        for seen, _ in enumerate(found.follow(), 1):
            if seen < total and pace.due():
                yield found.reading(seen / total)
        yield found.reading(1.0)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The least share of a pathway at the end, and the deficit that cost most."""
        shares, cost = data.final_share.values, data.sensitivity.values
        found: dict[str, Value] = {"least_share": _least(shares), "pathways": data.sizes["pathway"]}
        if np.isfinite(cost).any():
            worst = int(np.nanargmax(cost))
            found |= {n: float(data[n].values[worst]) for n in ("sensitivity", "sensitivity_error")}
            found |= {n: float(data[n].values[worst]) for n in ("deficit_onset", "deficit_removal")}
        return found

    def figure(self, data: xr.Dataset) -> Figure:
        """Strengths along the run of the longest deficit, shares at its end, and all deficits where there are many."""
        longest = data.removal.values - data.onset.values
        run = int(np.nanargmax(longest)) if np.isfinite(longest).any() else 0
        panels = [_strengths(data, run), _shares(data, run)]
        if data.sizes["run"] > 1 and np.isfinite(data.sensitivity).any():
            cost = Points(data.deficit_removal.values, data.sensitivity.values, data.sensitivity_error.values)
            panels.append(Panel((cost, Rule(0.0, label="no deficit")), step_axis("deficit until"), Axis("cost")))
        if data.sizes["run"] > 1 and data.sizes["pathway"] > 1:
            panels.append(_ends(data))
        return Figure(tuple(panels), columns=2)

    def estimate(self, subject: Trajectory | Runs) -> Cost:
        """A checkpoint, and the product of its matrices with its decomposition."""
        members = members_of(subject, self.name)
        path = next(iter(members.values()))
        held = path.weights(path.steps[0])
        size = sum(t.numel() * t.element_size() for t in held.values())
        largest = max((t.numel() for t in held.values() if t.ndim == 2), default=0)
        count = sum(len(m.steps) for m in members.values())
        return Cost(2 * size + 64 * largest, count, f"products of weight matrices at {count} checkpoints")


class _Found:
    """Everything known so far of some runs."""

    def __init__(self, probe: CriticalPeriods, members: Mapping[str, Trajectory]) -> None:
        self.probe, self.members, self.notes = probe, members, dict[str, None]()
        self.steps = np.unique(np.concatenate([np.array(m.steps) for m in members.values()]))
        self.chains = {label: self._chains(label, path) for label, path in members.items()}
        self.pathways = list(dict.fromkeys(name for chains in self.chains.values() for name in chains))
        deficits = [_Deficit.of(path, probe.deficit, probe.score) for path in members.values()]
        self.values = self._costs(deficits)
        self.modes = self._most()
        shape = (len(members), len(self.steps), len(self.pathways), self.modes)
        for name in ("singular_value", "strength", "share"):
            self.values[name] = np.full(shape, np.nan)
        self.values["final_share"] = np.full((len(members), len(self.pathways)), np.nan)
        self.broken = False

    def _chains(self, label: str, path: Trajectory) -> dict[str, list[str]]:
        """The names of each pathway's matrices, in order."""
        weights = path.weights(path.steps[0])
        matrices = {n: t for n, t in weights.items() if t.ndim == 2 and t.is_floating_point()}
        chains = _named(self.probe.pathways, list(matrices), label)
        for name, names in chains.items():
            if (gap := _gap(names, matrices)) is None:
                continue
            if self.probe.pathways:
                raise ValueError(f"{label}: the matrices of {name} are no chain: {gap}. Name one chain with each glob.")
            self.notes[f"{label}: no pathways, as its matrices are no chain: {gap}"] = None
            return {name: []}
        return chains

    def _most(self) -> int:
        """How many modes are followed: no more than the narrowest end has."""
        ends = [self.probe.modes]
        for label, chains in self.chains.items():
            path = self.members[label]
            weights = path.weights(path.steps[0])
            ends += [min(weights[names[0]].shape[1], len(weights[names[-1]])) for names in chains.values() if names]
        return min(ends)

    def _costs(self, deficits: Sequence[_Deficit]) -> dict[str, Any]:
        """All that follows from the recorded scalars."""
        names = ("onset", "removal", "clean", "final")
        values: dict[str, Any] = {n: np.array([getattr(d, n) for d in deficits]) for n in names}
        if np.isnan(values["removal"]).any():
            self.notes[f"deficits are not known: {self.probe.deficit!r} is not recorded in each run"] = None
        if np.isnan(values["final"]).any():
            self.notes[f"final scores are not known: {self.probe.score!r} is not recorded in each run"] = None
        if len({d.clean for d in deficits if d.removal > 0}) > 1:
            self.notes["clean steps after the deficit are not equally many in all runs"] = None
        windows = sorted({(d.onset, d.removal) for d in deficits if d.removal > 0}) or [(math.nan, math.nan)]
        without = values["final"][values["removal"] == 0]
        cost = [_cost(without, [d.final for d in deficits if (d.onset, d.removal) == window]) for window in windows]
        values["deficit_onset"], values["deficit_removal"] = np.array(windows).T
        values["sensitivity"], values["sensitivity_error"] = np.array(cost).T
        return values

    def follow(self) -> Iterator[int]:
        """Read every checkpoint, the last one of each run first; yields its step."""
        for run, (label, path) in enumerate(self.members.items()):
            chains = {name: names for name, names in self.chains[label].items() if names}
            modes: tuple[Tensor, Tensor] | None = None
            for step in reversed(path.steps):
                maps = [_product(path.weights(step), names) for names in chains.values()]
                if maps and all(bool(torch.isfinite(m).all()) for m in maps):
                    if step == path.steps[-1]:
                        modes = _modes(sum(maps[1:], maps[0]), self.modes, _rounding(path.weights(step), chains))
                    self._put(run, step, list(chains), maps, modes)
                elif maps:
                    self.notes[f"{label}: weights at step {step} are not finite"] = None
                    self.broken = True
                yield step
            self._end(run, path.steps[-1])

    def _put(
        self, run: int, step: int, names: list[str], maps: list[Tensor], modes: tuple[Tensor, Tensor] | None
    ) -> None:
        at = int(np.searchsorted(self.steps, step))
        for name, one in zip(names, maps, strict=True):
            place = self.pathways.index(name)
            self.values["singular_value"][run, at, place] = torch.linalg.svdvals(one)[: self.modes].cpu()
            if modes is not None:
                along = ((modes[0].T @ one) * modes[1].T).sum(1)
                self.values["strength"][run, at, place, : len(along)] = along.cpu()
        held = self.values["strength"][run, at]
        whole = np.nansum(held, axis=0)
        self.values["share"][run, at] = np.divide(held, whole, out=np.full_like(held, np.nan), where=whole != 0)

    def _end(self, run: int, step: int) -> None:
        held = self.values["strength"][run, int(np.searchsorted(self.steps, step))]
        there, sums = np.isfinite(held).any(1), np.nansum(held, axis=1)
        if sums.sum():
            self.values["final_share"][run] = np.where(there, sums / sums.sum(), np.nan)

    def reading(self, done: float) -> Reading:
        """The reading so far."""
        coords = {"run": list(self.members), "checkpoint": self.steps, "pathway": self.pathways}
        coords |= {"mode": np.arange(1, self.modes + 1), "deficit": np.arange(len(self.values["sensitivity"]))}
        done = done if done == 1 else min(max(done, 0.001), 0.999)
        settled = done == 1 and not self.broken
        return self.probe.reading(done, self.values, coords=coords, converged=settled, notes=tuple(self.notes))


@dataclass(frozen=True)
class _Deficit:
    """When one run had its deficit, and its last score; nan where it is not recorded."""

    onset: float
    removal: float
    clean: float
    final: float

    @classmethod
    def of(cls, path: Trajectory, deficit: str, score: str) -> _Deficit:
        table = path.scalars
        scores = known(table.index, table[score])[1] if score in table else np.empty(0)
        final = float(scores[-1]) if scores.size else math.nan
        at, under = known(table.index, table[deficit].ffill()) if deficit in table else (np.empty(0), np.empty(0))
        if not at.size:
            return cls(math.nan, math.nan, math.nan, final)
        steps = np.asarray(table.index, dtype=np.float64)
        if not under.any():
            return cls(0.0, 0.0, float(steps[-1]), final)
        first, last = at[under != 0][[0, -1]]
        before = steps[steps < first]
        return cls(float(before[-1] if before.size else first - 1), float(last), float(steps[-1] - last), final)


def _named(globs: str, matrices: list[str], label: str) -> dict[str, list[str]]:
    """Names of matrices by pathway."""
    if not globs:
        found: dict[str, list[str]] = {}
        for name in matrices:
            if branch := _BRANCH.match(name):
                found.setdefault(branch[0], []).append(name)
        return found or {"all": matrices}
    chosen = [glob.strip() for glob in globs.split(",") if glob.strip()]
    found = {glob: [n for n in matrices if fnmatchcase(n, glob)] for glob in chosen}
    if empty := [glob for glob, names in found.items() if not names]:
        raise ValueError(
            f"{label} has no weight matrix called {empty[0]!r}; it has {', '.join(matrices) or 'none'}. Name others."
        )
    return found


def _gap(names: list[str], matrices: Mapping[str, Tensor]) -> str | None:
    """Where matrices do not follow on each other, in words; None for a chain."""
    if not names:
        return "there is none"
    for one, two in itertools.pairwise(names):
        if len(matrices[one]) != matrices[two].shape[1]:
            return f"{one} gives {len(matrices[one])} values and {two} takes {matrices[two].shape[1]}"
    return None


def _product(weights: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """W_D ... W_1 in float64."""
    first, *rest = (weights[name].double() for name in names)
    for weight in rest:
        first = weight @ first
    return first


def _modes(whole: Tensor, count: int, rounding: float) -> tuple[Tensor, Tensor]:
    """Left and right singular vectors as columns, of values above rounding: others point anywhere."""
    left, values, right = torch.linalg.svd(whole, full_matrices=False)
    count = min(count, int((values > rounding * max(whole.shape) * values[0]).sum()))
    return left[:, :count], right[:count].T


def _rounding(weights: Mapping[str, Tensor], chains: Mapping[str, Sequence[str]]) -> float:
    """The coarsest rounding among the matrices."""
    return max(torch.finfo(weights[name].dtype).eps for names in chains.values() for name in names)


def _cost(without: Floats, scores: Sequence[float]) -> tuple[float, float]:
    """Difference of means and its standard error; nan where there are no runs, or one."""
    groups = [np.asarray(without, dtype=np.float64), np.asarray(scores, dtype=np.float64)]
    if not all(g.size for g in groups):
        return math.nan, math.nan
    spread = [float(g.var(ddof=1)) / g.size if g.size > 1 else math.nan for g in groups]
    return float(groups[0].mean() - groups[1].mean()), math.sqrt(sum(spread))


def _least(shares: Floats) -> float:
    """The least share over pathways, mean over runs."""
    known = shares[np.isfinite(shares).all(1)]
    return float(known.min(1).mean()) if len(known) else math.nan


def _strengths(data: xr.Dataset, run: int) -> Panel:
    """Every mode of every pathway along one run, a role for each pathway, and where the deficit was."""
    marks: list[AnyMark] = []
    for place, name in enumerate(data["pathway"].values):
        for mode in range(data.sizes["mode"]):
            y = data.strength.values[run, :, place, mode]
            label = str(name) if mode == 0 else ""
            marks.append(Line(data["checkpoint"].values, y, label, ROLES[place % len(ROLES)]))
    if data.removal.values[run] > 0:
        ends = (("begins", data.onset.values[run]), ("ends", data.removal.values[run]))
        marks += [Rule(float(at), "x", f"deficit {word}") for word, at in ends]
    return Panel(tuple(marks), step_axis(), Axis("strength along modes"), title=str(data["run"].values[run]))


def _shares(data: xr.Dataset, run: int) -> Panel:
    """Share of each mode at the last checkpoint of one run."""
    there = np.flatnonzero(np.isfinite(data.strength.values[run]).any((1, 2)))
    last = int(there[-1]) if there.size else -1
    marks = tuple(
        Points(data["mode"].values, data.share.values[run, last, place], role=ROLES[place % len(ROLES)])
        for place in range(data.sizes["pathway"])
    )
    return Panel(marks, Axis("mode"), Axis("share at the end"))


def _ends(data: xr.Dataset) -> Panel:
    """Share of each pathway at the end of each run, against the removal of its deficit."""
    removal = data.removal.values
    known = np.isfinite(removal)
    x, axis = (removal, step_axis("deficit until")) if known.all() else (np.arange(removal.size), Axis("run"))
    marks = tuple(
        Points(x, data.final_share.values[:, place], role=ROLES[place % len(ROLES)])
        for place in range(data.sizes["pathway"])
    )
    return Panel(marks, axis, Axis("share at the end"))
