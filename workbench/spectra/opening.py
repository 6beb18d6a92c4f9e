"""An operator of a subject, opened for a while: its curvature, restricted to some layers, preconditioned or not."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from workbench.numerics.operator import Operator
from workbench.operators.curvature import Curvature
from workbench.operators.table import OperatorName, curvature
from workbench.subject import Subject


@dataclass(frozen=True)
class Opening:
    """The ``operator`` whose spectrum is wanted, and the ``curvature`` that it is made of, which owns the graphs."""

    operator: Operator
    curvature: Curvature


Wrap = Callable[[Curvature], Operator]
"""Makes the operator of a curvature: itself, or preconditioned."""
Opened = Callable[[Subject], AbstractContextManager[Opening]]
"""Opens the operator of a subject, or of a part of its examples."""


def itself(found: Curvature) -> Operator:
    """The curvature unchanged."""
    return found


def opener(name: OperatorName, wrap: Wrap = itself) -> Opened:
    """What opens the operator of that name on any subject, and frees its graphs at the end."""

    @contextmanager
    def opened(subject: Subject) -> Generator[Opening, None, None]:
        with curvature(subject, name) as found:
            yield Opening(wrap(found), found)

    return opened


def restricted(subject: Subject, layers: str) -> Subject:
    """The subject as a function of the parameters that the comma-separated names and globs choose; "" for all.

    Raises:
        ValueError: a name that matches nothing.
    """
    names = [word.strip() for word in layers.split(",") if word.strip()]
    return subject.restricted(names) if names else subject
