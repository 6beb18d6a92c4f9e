"""The same classifier with its logits brought to one size, so that what only scales the outputs is not sharpness."""

# pyright: reportPrivateUsage=false
# A subject has no public way to exchange its loss for another on the same outputs.

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from workbench.losses import Loss
from workbench.sharpness.found import NotDefined
from workbench.subject import Subject


def normalised(subject: Subject) -> Subject:
    """The subject with each logit vector f divided by its root mean square, f / √(Σ f²/C), before the loss.

    Multiplying the last layer by a factor then changes nothing. Source: Andriushchenko et al. 2023 (arXiv:2302.07011).

    Raises:
        NotDefined: the loss is not one of classes, so there are no logit vectors.
    """
    criterion = subject._criterion
    if criterion.loss is None or criterion.loss.kind != "classes":
        raise NotDefined("normalise_logits needs a loss of classes")
    return subject._with(_criterion=dataclasses.replace(criterion, loss=_of_unit_logits(criterion.loss)))


def _of_unit_logits(loss: Loss) -> Loss:
    dim, each = 1 if loss.class_first else -1, loss.each

    def unit(outputs: Tensor) -> Tensor:
        return outputs / outputs.square().mean(dim, keepdim=True).sqrt()

    def total(outputs: Tensor, targets: Any, size: int) -> Tensor:
        return loss.total(unit(outputs), targets, size)

    def apart(outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        assert each is not None
        return each(unit(outputs), targets)

    return dataclasses.replace(loss, total=total, each=apart if each else None)
