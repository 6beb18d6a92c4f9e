"""A recorder inside Lightning's trainer: ``Trainer(callbacks=[RecorderCallback("runs/mine", data=(x, y), loss=...)])``.

Needs the package ``lightning``: ``pip install workbench[lightning]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from workbench.dynamics.gauges.gauge import Gauge
from workbench.dynamics.recorder import Recorder
from workbench.dynamics.schedules import LogSpaced, Schedule

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as problem:
    raise ImportError("RecorderCallback needs Lightning: pip install 'workbench[lightning]'.") from problem


class RecorderCallback(Callback):
    """Records a ``Trainer.fit`` as ``wb.Recorder`` does: one record for each step of the optimizer.

    Its scalars are the batch's loss (``train_loss``) and whatever the module logged since the step before, under the
    names that it has there. Gradient accumulation, mixed precision and strategies with several processes are
    Lightning's affair and work; the first process writes. A training that Lightning resumes (``ckpt_path=``) continues
    the record in the same folder at its ``global_step``. Not for manual optimization with several optimizers.

    Args:
        folder: as for ``wb.Recorder``, like everything below that is not described.
        part: the attribute of the LightningModule that is recorded, such as ``"net"``; "" records the whole module.
            Name the plain network here, and ``build`` can make it again without Lightning.
        every: which steps keep a checkpoint.
        data: examples to probe on.
        loss: of the recorded part on these examples.
        norm: policy for BatchNorm.
        build: makes the recorded part again.
        build_args: its arguments.
        keep_optimizer: keep the first optimizer's state.
        gauges: what else to read off.
    """

    def __init__(
        self,
        folder: str | Path,
        part: str = "",
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
        self.folder, self.part = Path(folder), part
        self._given: dict[str, Any] = {
            "every": every, "data": data, "loss": loss, "norm": norm, "build": build, "build_args": build_args,
            "keep_optimizer": keep_optimizer, "gauges": gauges,
        }  # fmt: skip
        self.recorder: Recorder | None = None
        """The recorder while training runs."""
        self._at, self._seen = 0, dict[str, Tensor]()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = pl_module.get_submodule(self.part) if self.part else pl_module
        optimizer = next(iter(trainer.optimizers), None)
        self._at, self._seen = trainer.global_step, {}
        resume = trainer.global_step or None
        self.recorder = Recorder(self.folder, model, optimizer, resume=resume, **self._given).__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.recorder is None or trainer.global_step == self._at:
            return  # a micro-batch whose gradients are still being accumulated
        self._at = trainer.global_step
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        scalars = {"train_loss": loss} if isinstance(loss, Tensor) and loss.numel() == 1 else {}
        self.recorder.step(**{**self._fresh(trainer), **scalars})

    def _fresh(self, trainer: Trainer) -> dict[str, Tensor]:
        """What was logged since the step before: Lightning keeps old values, as the same tensors."""
        logged = {name: v for name, v in trainer.callback_metrics.items() if v.numel() == 1}
        fresh = {name: value for name, value in logged.items() if self._seen.get(name) is not value}
        self._seen = logged
        return fresh

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close(None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close(exception)

    def _close(self, problem: BaseException | None) -> None:
        if self.recorder is not None:
            self.recorder.__exit__(type(problem) if problem else None, problem, None)
            self.recorder = None
