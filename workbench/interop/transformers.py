"""A recorder inside Hugging Face's trainer: ``Trainer(..., callbacks=[RecorderCallback("runs/mine")])``.

Needs ``transformers`` and ``accelerate``: ``pip install workbench[transformers]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from workbench.dynamics.gauges.gauge import Gauge
from workbench.dynamics.recorder import Recorder
from workbench.dynamics.schedules import LogSpaced, Schedule

try:
    from transformers.trainer_callback import TrainerCallback
except ImportError as problem:
    raise ImportError("RecorderCallback needs Transformers: pip install 'workbench[transformers]'.") from problem


class RecorderCallback(TrainerCallback):
    """Records a ``Trainer.train`` as ``wb.Recorder`` does: one record for each step of the optimizer.

    Its scalars are what the trainer logs (``logging_steps``) and evaluates at a step, under the names that they have
    there; the record of a step is written when the next one begins, so that they are in it. Gradient accumulation,
    mixed precision and several processes are the trainer's affair and work; the first process writes. A training that
    the trainer resumes continues the record in the same folder at its ``global_step``.

    Args:
        folder: as for ``wb.Recorder``, like everything below.
        every: which steps keep a checkpoint.
        data: examples to probe on, such as a list of encodings with labels.
        loss: of the model's outputs on these examples.
        norm: policy for BatchNorm.
        build: makes the model again.
        build_args: its arguments.
        keep_optimizer: keep the optimizer's state.
        gauges: what else to read off.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every: Schedule | int = LogSpaced(10),  # noqa: B008
        data: Any = None,
        loss: str | Callable[..., Any] | None = None,
        norm: str | None = None,
        build: str | Callable[..., nn.Module] | None = None,
        build_args: Mapping[str, Any] | None = None,
        keep_optimizer: bool = False,
        gauges: Sequence[Gauge] = (),
    ) -> None:
        self.folder = Path(folder)
        self._given: dict[str, Any] = {
            "every": every, "data": data, "loss": loss, "norm": norm, "build": build, "build_args": build_args,
            "keep_optimizer": keep_optimizer, "gauges": gauges,
        }  # fmt: skip
        self.recorder: Recorder | None = None
        """The recorder while training runs."""
        self._stepped, self._scalars = False, dict[str, float]()

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        resume = state.global_step or None
        self.recorder = Recorder(self.folder, given["model"], given.get("optimizer"), resume=resume, **self._given)
        self.recorder.__enter__()

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._write()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._stepped = True

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._hear(given.get("logs") or {})

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._hear(given.get("metrics") or {})

    def _hear(self, logs: Mapping[str, Any]) -> None:
        self._scalars |= {name: _number(value) for name, value in logs.items() if _is_number(value)}

    def _write(self) -> None:
        """The record of the step that was taken, with all that was logged at it."""
        if self.recorder is not None and self._stepped:
            self.recorder.step(**self._scalars)
            self._stepped, self._scalars = False, {}

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.recorder is not None:
            self._write()
            self.recorder.__exit__(None, None, None)
            self.recorder = None


def _is_number(value: Any) -> bool:
    try:
        _number(value)
    except (TypeError, ValueError):
        return False
    return True


def _number(value: Any) -> float:
    """A logged value; the trainer writes some of them as text."""
    if isinstance(value, bool) or value is None:
        return math.nan
    return float(value)
