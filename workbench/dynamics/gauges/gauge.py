"""What a gauge is: settings that say what to read off a training, and a meter that reads it while training runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from workbench.dynamics.schedules import Schedule
from workbench.subject import Subject

Values = Mapping[str, Tensor | float]
"""Scalars by name; tensors of one element may stay on their device."""


class Meter:
    """A gauge at work on one training. Everything is called in the training's own thread, under ``no_grad``.

    At a step that is due: ``arm`` right after the step before it, ``before`` when the optimizer is about to step
    (weights are still the old ones; the last gradient may be missing, where a closure brings it), ``stepped`` right
    after (gradients are still there), ``read`` when the recorder is told of the step.
    """

    ahead: ClassVar[bool] = False
    """Whether the step must be known before it begins, so that the first three are called."""

    def arm(self) -> None:
        """The next step will be read."""

    def before(self) -> None:
        """The optimizer is about to step."""

    def stepped(self) -> None:
        """The optimizer has stepped."""

    def read(self) -> Values:
        """The scalars of the step that was just taken; nothing where there was nothing to see."""
        raise NotImplementedError

    def disarm(self) -> None:
        """Take away whatever ``arm`` put somewhere; may be called at any time."""


@dataclass(frozen=True)
class Gauge(ABC):
    """Something to read off a training while it runs, given to ``wb.Recorder(..., gauges=[...])``.

    Args:
        every: the steps at which it is read: a number of steps or a schedule (``workbench.dynamics.schedules``).
    """

    cost: ClassVar[str]
    """What a reading costs, in words."""

    every: Schedule | int = 10

    @abstractmethod
    def start(self, training: Training) -> Meter:
        """The meter for a training; ``ValueError`` when it lacks what the gauge needs."""


@dataclass(eq=False)
class Training:
    """What a meter may look at: the user's model and optimizer, and how to make a Subject of them.

    ``start`` gives the weights of step 0 by name.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    start: Callable[[], Mapping[str, Tensor]]
    data: Any = None
    loss: Any = None
    norm: Any = None
    _subjects: dict[int | None, Subject] = field(default_factory=dict[int | None, Subject])
    _named: dict[str, nn.Parameter] | None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that are trained, tied ones once; looked up once between two calls of :meth:`renew`."""
        if self._named is None:
            self._named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return self._named

    def renew(self) -> None:
        """A loop may change what is trained between its steps: look again at the next reading."""
        self._named = None

    def known(self, who: Gauge) -> torch.optim.Optimizer:
        """The optimizer.

        Raises:
            ValueError: the recorder was not given one.
        """
        if self.optimizer is None:
            raise ValueError(f"{type(who).__name__} needs the optimizer: wb.Recorder(folder, model, optimizer, ...).")
        return self.optimizer

    def subject(self, who: Gauge, examples: int | None) -> Subject:
        """The model on at most so many of the recorder's examples, live; one Subject for each number of them.

        Raises:
            ValueError: the recorder was given no data or no loss.
        """
        if self.data is None or self.loss is None:
            raise ValueError(
                f"{type(who).__name__} evaluates the model on examples: give them to the recorder, "
                'wb.Recorder(folder, model, optimizer, data=(x, y), loss="cross_entropy", ...).'
            )
        if examples not in self._subjects:
            self._subjects[examples] = Subject(
                self.model, self.data, self.loss, norm=self.norm, optimizer=self.optimizer, max_examples=examples
            )
        return self._subjects[examples]


_foreach_norm: Callable[[list[Tensor]], list[Tensor]] = vars(torch)["_foreach_norm"]  # one kernel for all tensors
_foreach_sub: Callable[[list[Tensor], list[Tensor]], list[Tensor]] = vars(torch)["_foreach_sub"]


def differences(ends: Sequence[Tensor], starts: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor less its partner, of equal shapes, types and devices; without a graph."""
    with torch.no_grad():
        return _foreach_sub(list(ends), list(starts)) if ends else []


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of each tensor (k,), in float64 on the first one's device.

    Half precision is summed in float32. Stays on the device: the host does not wait.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    plain = [_dense(t) for t in tensors]
    if len({(t.device, t.dtype) for t in plain}) == 1 and plain[0].dtype in (torch.float32, torch.float64):
        return torch.stack(_foreach_norm(plain)).double()
    return torch.stack([_norm(t).to(plain[0].device) for t in plain])


def _norm(tensor: Tensor) -> Tensor:
    wide = torch.float64 if tensor.dtype in (torch.float64, torch.complex128) else torch.float32
    return torch.linalg.vector_norm(tensor.to(wide) if not tensor.is_complex() else tensor).double()


def _dense(tensor: Tensor) -> Tensor:
    """The entries of a gradient: those that an embedding's sparse gradient names, added up."""
    return tensor.coalesce().values() if tensor.is_sparse else tensor.detach()


def chosen(names: Sequence[str], globs: tuple[str, ...]) -> list[int]:
    """The places of those names that a glob matches."""
    return [i for i, name in enumerate(names) if any(fnmatchcase(name, glob) for glob in globs)]
