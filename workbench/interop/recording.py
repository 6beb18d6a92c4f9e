"""What a recorder inside another package's trainer is given, and how it is opened and closed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench.dynamics.gauges.gauge import Gauge
from workbench.dynamics.recorder import Recorder
from workbench.dynamics.schedules import LogSpaced, Schedule


@dataclass(eq=False, repr=False)
class Recording:
    """The settings of a ``wb.Recorder`` until its trainer brings the model, and the recorder while training runs.

    Args:
        folder: as for ``wb.Recorder``, like everything below.
        every: which steps keep a checkpoint.
        data: examples to probe on.
        loss: of the recorded model's outputs on these examples.
        norm: policy for BatchNorm.
        build: makes the recorded model again.
        build_args: its arguments.
        keep_optimizer: keep the optimizer's state.
        gauges: what else to read off.
    """

    folder: str | Path
    _: KW_ONLY
    every: Schedule | int = LogSpaced(10)  # noqa: RUF009
    data: Any = None
    loss: str | Callable[..., Any] | None = None
    norm: str | None = None
    build: str | Callable[..., nn.Module] | None = None
    build_args: Mapping[str, Any] | None = None
    keep_optimizer: bool = False
    gauges: Sequence[Gauge] = ()
    recorder: Recorder | None = field(default=None, init=False)
    """The recorder while training runs."""

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)

    def open(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        step: int,
        initial: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Start the recorder; one that goes on after ``step``, where the trainer has already taken steps.

        ``initial`` are the scalars that are known before the first of them.
        """
        recorder = Recorder(
            self.folder, model, optimizer, resume=step or None, every=self.every, data=self.data, loss=self.loss,
            norm=self.norm, build=self.build, build_args=self.build_args, keep_optimizer=self.keep_optimizer,
            gauges=self.gauges,
        )  # fmt: skip
        self.recorder = recorder.__enter__()
        recorder.start(**initial or {})

    def close(self, problem: BaseException | None = None) -> None:
        """End the recorder, if it runs; ``problem`` is what ended the training."""
        if self.recorder is not None:
            self.recorder.__exit__(type(problem) if problem else None, problem, None)
            self.recorder = None
