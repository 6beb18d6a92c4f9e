"""Sums over labelled features from which every measure of neural collapse follows, with all groups but one as well.

Two passes. The first gives counts, means and scatter of each class, in each group of examples, and so of all examples
and of all but any one group (:class:`GroupedMoments`). The second gives the scatter within the span of the final class
means, and who disagrees with the nearest of them (:class:`Scatter`). Memory O(G C d + tile d) for G groups, float64;
no d × d matrix: Tr(Σ_W Σ_B⁺) asks for the scatter along the C - 1 directions of the means only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from workbench.numerics import frames
from workbench.numerics.stats import ClassMoments

TILE = 1024
"""Rows that are taken in at once, at most."""
_ENTRIES = 2**22


class GroupedMoments:
    """Moments by class and by group of examples, added batch by batch."""

    def __init__(self, classes: int, dimension: int, groups: int) -> None:
        self.classes, self.groups = classes, max(groups, 1)
        self.moments = ClassMoments.empty(classes * self.groups, dimension)

    def add(self, features: Tensor, labels: Tensor, groups: Tensor) -> None:
        """Take in features (n, d), class numbers (n,) and group numbers (n,); a tile at a time."""
        joint = groups.to(labels.device) % self.groups * self.classes + labels
        for rows, numbers in zip(features.split(TILE), joint.split(TILE), strict=True):
            self.moments = self.moments.add(rows, numbers)

    def whole(self) -> ClassMoments:
        """The moments of all examples so far."""
        return reduce(ClassMoments.merge, self._parts())

    def folds(self) -> list[ClassMoments]:
        """The moments of all examples, then of all but those of each group; of all alone where there is one group."""
        parts = self._parts()
        if len(parts) == 1:
            return parts
        return [reduce(ClassMoments.merge, parts)] + [
            reduce(ClassMoments.merge, [p for i, p in enumerate(parts) if i != left]) for left in range(len(parts))
        ]

    def _parts(self) -> list[ClassMoments]:
        held = self.moments
        split = (t.split(self.classes) for t in (held.counts, held.means, held.scatter))
        return [ClassMoments(*part) for part in zip(*split, strict=True)]


class Scatter:
    """Second pass, for all folds of :meth:`GroupedMoments.folds` at once: sums (F,) or (F, r).

    ``inside``: Σ (u_rᵀ(h - μ_c))² along each direction u_r of the fold's centred means, ``strengths`` being their
    singular values (infinite where a fold has fewer directions); ``differ``: examples on which the network and the
    nearest class mean disagree; ``astray``: whose nearest class mean is not their class's; ``right``: that the network
    classifies rightly; ``seen``: all. With ``centres`` the nearest mean is looked for among these instead of among the
    fold's own: the training set's means, for examples held out.
    """

    def __init__(self, folds: Sequence[ClassMoments], centres: ClassMoments | None = None) -> None:
        self.folds, self.whole, self.centres = folds, folds[0], centres
        frames_of = [frames.centre(fold.means[fold.counts > 0]) for fold in folds]
        self.rank = len(frames_of[0].strengths)
        most, dimension = max(len(f.strengths) for f in frames_of), self.whole.means.shape[1]
        new = self.whole.means.new_zeros
        self.axes, self.strengths = new(len(folds), most, dimension), new(len(folds), most) + torch.inf
        self.places, self.shifts = (new(len(self.whole.counts), len(folds), most) for _ in range(2))
        for k, (fold, frame) in enumerate(zip(folds, frames_of, strict=True)):
            r = len(frame.strengths)
            self.axes[k, :r], self.strengths[k, :r] = frame.axes, frame.strengths
            self.places[:, k] = (fold.means - frame.mean) @ self.axes[k].T
            self.shifts[:, k] = (fold.means - self.whole.means) @ self.axes[k].T
        absent = torch.stack([fold.counts == 0 for fold in folds])
        self.squares = (self.places**2).sum(2).T.masked_fill(absent, torch.inf)
        self.inside = new(len(folds), most)
        self.differ, self.astray, self.right, self.seen = (new(len(folds)) for _ in range(4))

    def add(self, features: Tensor, labels: Tensor, chosen: Tensor, groups: Tensor) -> None:
        """Take in features (n, d), class numbers, the network's choices and group numbers (n,); a tile at a time."""
        each = self.squares.numel() + self.axes.shape[0] * self.axes.shape[1]
        tile = max(1, min(TILE, _ENTRIES // max(each, 1)))
        parts = (t.split(tile) for t in (features, labels, chosen, groups))
        for part in zip(*parts, strict=True):
            self._add(*part)

    def _add(self, features: Tensor, labels: Tensor, chosen: Tensor, groups: Tensor) -> None:
        features = features.to(self.axes)
        weight = self._weight(groups)
        off = (features - self.whole.means[labels]) @ self.axes.flatten(0, 1).T
        off = off.view(len(features), *self.strengths.shape) - self.shifts[labels]
        self.inside += torch.einsum("nf,nfr->fr", weight, off**2)
        nearest = self._nearest(off, labels) if self.centres is None else self._nearest_centre(features)
        for total, counted in (
            (self.differ, nearest != chosen[:, None]),
            (self.astray, nearest != labels[:, None]),
            (self.right, (chosen == labels)[:, None]),
        ):
            total += (weight * counted).sum(0)
        self.seen += weight.sum(0)

    def _weight(self, groups: Tensor) -> Tensor:
        """(n, F): whether an example belongs to the fold; the first has all."""
        left = torch.arange(len(self.folds) - 1, device=self.axes.device)
        apart = groups.to(self.axes.device)[:, None] % max(len(left), 1) != left
        return torch.cat([torch.ones_like(groups[:, None], dtype=torch.bool).to(apart.device), apart], 1).double()

    def _nearest(self, off: Tensor, labels: Tensor) -> Tensor:
        """(n, F): only what lies in the span of the class means tells which of them is nearest."""
        here = off + self.places[labels]
        return (self.squares - 2 * torch.einsum("nfr,cfr->nfc", here, self.places)).argmin(2)

    def _nearest_centre(self, features: Tensor) -> Tensor:
        assert self.centres is not None
        present = self.centres.counts > 0
        middle = self.centres.means[present].mean(0)
        rows = self.centres.means - middle  # centred, so that a large offset cancels nothing
        squared = (rows**2).sum(1).masked_fill(~present, torch.inf)
        return (squared - 2 * (features - middle) @ rows.T).argmin(1, keepdim=True)

    def within(self) -> list[float]:
        """Tr(Σ_W Σ_B⁺)/C of each fold, over the directions that its class means have; nan where they have none."""
        spans = self.strengths.isfinite().any(1)
        return torch.where(spans, (self.inside / self.strengths**2).sum(1) / self.seen, torch.nan).tolist()

    def shares(self) -> dict[str, list[float]]:
        """Of each fold: disagreement with the nearest class mean, its error rate, and the network's accuracy."""
        found = {"differ": self.differ, "astray": self.astray, "right": self.right}
        return {name: (total / self.seen).tolist() for name, total in found.items()}

    def spread_inside(self) -> list[float]:
        """Tr(P Σ_W)/Tr Σ_B of each fold, P onto the span of its class means; nan where they have none."""
        square = self.strengths.masked_fill(self.strengths.isinf(), 0.0).square().sum(1)
        classes = torch.stack([(fold.counts > 0).sum() for fold in self.folds])
        return (self.inside.sum(1) / self.seen / (square / classes)).tolist()


def of_moments(moments: ClassMoments) -> dict[str, float]:
    """What needs no second pass, of the present classes: variance ratio, CDNV, NC2 and the distance to collapse."""
    kept = moments.counts > 0
    means, counts, scatter = moments.means[kept], moments.counts[kept], moments.scatter[kept]
    rows = means - means.mean(0)
    return {
        "nc1_ratio": float(moments.within() / ((rows**2).sum(1).mean())),
        "cdnv": frames.class_distance_variance(scatter / counts, means),
        "nc2_equinorm": frames.equinorm(rows),
        "nc2_equiangle": frames.equiangle(rows),
        "nc2_simplex": frames.simplex_distance(rows),
        "distance": frames.distance_to_collapse(means, counts, scatter),
    }
