"""The two passes over a subject that all measures of neural collapse rest on, for some layers at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from workbench.activations import Classifier, Layer
from workbench.features import LabelledRows, labelled_layers, predicted
from workbench.numerics import collapse, frames
from workbench.numerics.stats import ClassMoments, jackknife_error
from workbench.subject import Subject

Floats = NDArray[np.float64]
Values = Mapping[str, float | Floats]


class Passes:
    """Sums over the examples of a subject at each of ``layers``: of all of them, and without each of ``groups``.

    ``moments`` after (and during) the first pass, ``scatters`` after the second, one for each layer. ``centres``: the
    class means of another set, one for each layer, among which the nearest is looked for.
    """

    def __init__(
        self, subject: Subject, layers: Sequence[Layer], groups: int, centres: Sequence[ClassMoments] | None = None
    ) -> None:
        self.subject, self.layers, self.centres = subject, tuple(layers), centres
        self.groups = min(groups, subject.examples) if groups > 1 else 1
        self.moments: list[collapse.GroupedMoments] = []
        self.scatters: list[collapse.Scatter] = []

    def means(self) -> Iterator[float]:
        """First pass; yields the share done."""
        for share, batch, groups in self._batches():
            if not self.moments:
                sizes = [(rows.classes, rows.features.shape[1]) for rows in batch]
                self.moments = [collapse.GroupedMoments(*size, self.groups) for size in sizes]
            for sums, rows in zip(self.moments, batch, strict=True):
                sums.add(rows.features, rows.targets, groups)
            yield share

    def spread(self) -> Iterator[float]:
        """Second pass, around the class means of the first; yields the share done."""
        centres = self.centres or [None] * len(self.layers)
        folds = [sums.folds() for sums in self.moments]
        self.scatters = [collapse.Scatter(found, c) for found, c in zip(folds, centres, strict=True)]
        for share, batch, groups in self._batches():
            for sums, rows in zip(self.scatters, batch, strict=True):
                sums.add(rows.features, rows.targets, predicted(rows.logits), groups)
            yield share

    def _batches(self) -> Iterator[tuple[float, tuple[LabelledRows, ...], torch.Tensor]]:
        """The share done, the rows of each layer, and each row's group: every such-and-such example is in one."""
        seen = 0
        for batch in labelled_layers(self.subject, self.layers):
            groups = (batch[0].origins + seen) % self.groups
            seen += batch[0].examples
            yield min(seen / self.subject.examples, 1.0), batch, groups


def present(moments: ClassMoments) -> list[int]:
    """The classes that have examples."""
    return (moments.counts > 0).nonzero().flatten().tolist()


def with_errors(folds: Sequence[Values]) -> dict[str, float | Floats]:
    """The values of the first (all examples), with ``<name>_error`` from the others, by the jackknife over groups."""
    errors = {
        f"{name}_error": jackknife_error(np.array([fold[name] for fold in folds[1:]], dtype=np.float64))
        if len(folds) > 2
        else np.full(np.shape(value), np.nan)
        for name, value in folds[0].items()
    }
    return {**folds[0], **errors}


def spread(values: torch.Tensor, kept: Sequence[int], classes: int) -> Floats:
    """Values (r, ...) of the classes ``kept`` as an array (C, ...) along each dimension, nan for the others."""
    out = np.full([classes] * values.ndim, np.nan)
    out[np.ix_(*[list(kept)] * values.ndim)] = values.cpu().numpy()
    return out


def of_scatter(scatter: collapse.Scatter, fold: int) -> dict[str, float]:
    """What the second pass adds for one fold; all of it for what it has seen so far."""
    shares = {name: found[fold] for name, found in scatter.shares().items()}
    return {"nc1": scatter.within()[fold], **shares}


def each_fold(
    scatter: collapse.Scatter, of: Callable[[ClassMoments, int], Values], *, errors: bool
) -> dict[str, float | Floats]:
    """Values of all examples; with ``errors``, ``of`` is asked for each fold, and those tell the errors.

    No errors where a fold lacks a class that the whole has: the measures would be about fewer classes.
    """
    kept = present(scatter.whole)
    comparable = errors and all(present(fold) == kept for fold in scatter.folds)
    return with_errors([of(fold, k) for k, fold in enumerate(scatter.folds if comparable else scatter.folds[:1])])


def weight_rows(classifier: Classifier, kept: Sequence[int], means: torch.Tensor) -> torch.Tensor | None:
    """The classifier's rows of the classes ``kept``; None where it is not one of these features or classes."""
    weight = classifier.weight
    if weight is None or weight.shape[1] != means.shape[1] or len(weight) <= max(kept):
        return None
    return weight.to(means)[list(kept)]


def duality(fold: ClassMoments, classifier: Classifier) -> dict[str, float]:
    """NC3 in its variants; nan without a classifier for these features."""
    kept = present(fold)
    rows = frames.centre(fold.means[kept]).rows
    weight = weight_rows(classifier, kept, rows)
    if weight is None:
        return dict.fromkeys(("nc3", "nc3_product", "nc3_cosine"), float("nan"))
    return {
        "nc3": frames.self_duality(weight, rows),
        "nc3_product": frames.product_distance(weight, rows),
        "nc3_cosine": frames.row_cosine(weight, rows),
    }


def of_frame(fold: ClassMoments) -> dict[str, float | Floats]:
    """The uncentred frame of the class means, and lengths and variances by class; nan for absent ones."""
    kept, classes = present(fold), len(fold.counts)
    means = fold.means[kept]
    rows = means - means.mean(0)
    by_class = {
        "class_norm": torch.linalg.vector_norm(rows, dim=1),
        "class_mean_length": torch.linalg.vector_norm(means, dim=1),
        "class_variance": fold.scatter[kept] / fold.counts[kept],
        "cosine": frames.cosines(rows),
    }
    return {
        "uncentred_cosine": frames.mean_cosine(means),
        "orthogonality": frames.mean_cosine(means, absolute=True),
        "mean_share": float((means.mean(0) ** 2).sum() / (means**2).sum(1).mean()),
        "frame_distance": frames.orthogonal_distance(means),
        **{name: spread(value, kept, classes) for name, value in by_class.items()},
    }


def words(moments: ClassMoments, where: str = "") -> list[str]:
    """What has to be said of absent and of merged classes; ``where`` names the layer or the set."""
    absent, kept = (moments.counts == 0).nonzero().flatten().tolist(), present(moments)
    said: list[str] = []
    if absent:
        numbers = ", ".join(map(str, absent))
        said.append(f"no example of class {numbers}{where}: the measures use the {len(kept)} present ones")
    if len(kept) < 2:
        return [*said, f"fewer than two classes are present{where}, so collapse is not defined: nan"]
    frame = frames.centre(moments.means[kept])
    rank, full = len(frame.strengths), len(kept) - 1
    same = [f"{kept[i]} and {kept[j]}" for i, j in frames.merged(moments.means[kept])]
    if same:
        said.append(
            f"the means of classes {'; '.join(same[:6])} are the same{where}: they have merged, cdnv is infinite"
        )
    if rank < full:
        said.append(
            f"the class means span {rank} of {full} directions{where} (merged classes, or too few features): NC1 uses "
            "these"
        )
    return said
