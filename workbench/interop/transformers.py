"""A recorder inside Hugging Face's trainer: ``Trainer(..., callbacks=[RecorderCallback("runs/mine")])``.

Needs ``transformers`` and ``accelerate``: ``pip install workbench[transformers]``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from workbench.interop.recording import Recording

try:
    from transformers.trainer_callback import TrainerCallback
except ImportError as problem:
    raise ImportError("RecorderCallback needs Transformers: pip install 'workbench[transformers]'.") from problem


@dataclass(eq=False, repr=False)
class RecorderCallback(Recording, TrainerCallback):
    """Records a ``Trainer.train`` as ``wb.Recorder`` does: one record for each step of the optimizer.

    Its scalars are what the trainer logs (``logging_steps``) and evaluates at a step, under the names that they have
    there; the record of a step is written when the next one begins, so that they are in it. An evaluation before the
    first step (``eval_on_start=True``) stands at step 0. Gradient accumulation, mixed precision and several processes
    are the trainer's affair and work; the first process writes. A training that the trainer resumes continues the
    record in the same folder at its ``global_step``.

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

    _stepped: bool = field(default=False, init=False)
    _begun: bool = field(default=False, init=False)
    _scalars: dict[str, float] = field(default_factory=dict[str, float], init=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._begun = False
        self.open(given["model"], given.get("optimizer"), state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._begun = True
        self._write()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._stepped = True

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._hear(given.get("logs") or {})

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._hear(given.get("metrics") or {})

    def _hear(self, logs: Mapping[str, Any]) -> None:
        found = {name: _number(value) for name, value in logs.items() if _is_number(value)}
        if self._stepped:
            self._scalars |= found
        elif self.recorder is not None and not self._begun:
            self.recorder.start(**found)

    def _write(self) -> None:
        """The record of the step that was taken, with all that was logged at it."""
        if self.recorder is not None and self._stepped:
            self.recorder.step(**self._scalars)
            self._stepped, self._scalars = False, {}

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.recorder is not None:
            self._write()
            self.close()


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
