"""Features with their class labels, as rows, whatever shape the network gives them in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.activations import Caught, Layer, stream
from workbench.subject import Subject

IGNORED = -100
"""The target that PyTorch's cross-entropy leaves out."""


@dataclass(frozen=True, eq=False)
class LabelledRows:
    """One batch as rows: features (n, d) and logits (n, C) in float64, class numbers (n,), examples they came from.

    For token models n counts the tokens that have a target; ``origins`` (n,) says which of the batch's ``examples``
    each row belongs to.
    """

    features: Tensor
    logits: Tensor
    targets: Tensor
    examples: int
    origins: Tensor

    @property
    def classes(self) -> int:
        """How many classes the network tells apart; a single logit tells two."""
        return max(self.logits.shape[1], 2)


def labelled_rows(subject: Subject, layer: Layer) -> Iterator[LabelledRows]:
    """Stream the features of ``layer`` with their labels, batch by batch.

    Raises:
        ValueError: the subject's targets are not class labels.
    """
    for (rows,) in labelled_layers(subject, (layer,)):
        yield rows


def labelled_layers(subject: Subject, layers: tuple[Layer, ...]) -> Iterator[tuple[LabelledRows, ...]]:
    """Stream the features of several layers with their labels in one pass: for each batch, the rows of each layer.

    Raises:
        ValueError: the subject's targets are not class labels, or a layer's features have no row for each of them.
    """
    for caught in stream(subject, layers):
        targets = _labels(caught)
        kept = targets.flatten() != IGNORED
        origins = torch.arange(targets.numel(), device=targets.device) // max(targets.numel() // len(targets), 1)
        logits, numbers, size = _logits(caught.outputs, targets)[kept], targets.flatten()[kept], caught.batch.size
        yield tuple(
            LabelledRows(_rows(caught, layer, targets)[kept], logits, numbers, size, origins[kept]) for layer in layers
        )


def _rows(caught: Caught, layer: Layer, targets: Tensor) -> Tensor:
    rows = as_rows(caught.features[layer], targets).double()
    if len(rows) == targets.numel():
        return rows
    raise ValueError(
        f"layer {layer.name!r} gives features of shape {tuple(caught.features[layer].shape)}, which are not one row "
        f"for each of the {targets.numel()} labels of a batch; choose another layer."
    )


def predicted(logits: Tensor) -> Tensor:
    """The class a network chooses: the largest logit, or the sign of a single one."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


def as_rows(features: Tensor, targets: Tensor) -> Tensor:
    """Features as one row for each target: tokens flattened, maps averaged over their positions.

    (N, d) stays; (N, S, d) with targets (N, S) becomes (N·S, d); (N, d, h, w) is averaged to (N, d);
    (N, S, d) with one target an example is averaged over S.
    """
    if targets.ndim > 1 and features.ndim > 2 and features.shape[: targets.ndim] == targets.shape:
        return features.reshape(-1, features.shape[-1])
    if features.ndim >= 4:
        return features.flatten(2).mean(2)
    return features.mean(1) if features.ndim == 3 else features.reshape(len(features), -1)


def _labels(caught: Caught) -> Tensor:
    """Class numbers; one-hot rows become their class."""
    targets = caught.batch.targets
    if not isinstance(targets, Tensor):
        raise ValueError("this measure needs class labels as targets; this subject has none that it can read.")
    if targets.is_floating_point():
        return _from_rows(targets, caught.outputs)
    single = targets.ndim > 1 and targets.shape[-1] == 1
    return (targets.squeeze(-1) if single else targets).long()


def _from_rows(targets: Tensor, outputs: Tensor) -> Tensor:
    if outputs.shape[-1] == 1 and bool(((targets == 0) | (targets == 1)).all()):
        return targets.reshape(len(targets)).long()
    if targets.shape != outputs.shape or targets.ndim < 2 or targets.shape[-1] < 2:
        raise ValueError(
            "this measure needs class labels; got real-valued targets that are not one row of classes each."
        )
    return targets.argmax(-1)


def _logits(outputs: Tensor, targets: Tensor) -> Tensor:
    """Logits with one row for each target; token logits may come as (N, S, C) or (N, C, S)."""
    outputs = outputs.double()
    if targets.ndim > 1 and outputs.shape[: targets.ndim] == targets.shape:
        return outputs.reshape(-1, outputs.shape[-1])
    if targets.ndim > 1:
        return outputs.movedim(1, -1).reshape(-1, outputs.shape[1])
    return torch.atleast_2d(outputs.reshape(len(targets), -1))
