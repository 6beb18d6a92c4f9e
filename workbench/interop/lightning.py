"""A recorder inside Lightning's trainer: ``Trainer(callbacks=[RecorderCallback("runs/mine", data=(x, y), loss=...)])``.

Needs the package ``lightning``: ``pip install workbench[lightning]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from workbench.interop.recording import Recording

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as problem:
    raise ImportError("RecorderCallback needs Lightning: pip install 'workbench[lightning]'.") from problem


@dataclass(eq=False, repr=False)
class RecorderCallback(Recording, Callback):
    """Records a ``Trainer.fit`` as ``wb.Recorder`` does: one record for each step of the optimizer.

    Its scalars are the batch's loss (``train_loss``) and whatever the module logged since the step before, under the
    names that it has there; at step 0 what it logged in a sanity check over all of its validation batches
    (``Trainer(num_sanity_val_steps=-1)``; a check over fewer is no measurement and is not recorded). Gradient
    accumulation, mixed precision and strategies with several processes are Lightning's affair and work; the first
    process writes. A training that Lightning resumes (``ckpt_path=``) continues the record in the same folder at its
    ``global_step``. Not for manual optimization with several optimizers.

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

    part: str = ""
    _at: int = field(default=0, init=False)
    _seen: dict[str, Tensor] = field(default_factory=dict[str, Tensor], init=False)
    _initial: dict[str, Tensor] = field(default_factory=dict[str, Tensor], init=False)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.num_sanity_val_batches == trainer.num_val_batches:
            self._initial = _logged(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = pl_module.get_submodule(self.part) if self.part else pl_module
        self._at, self._seen = trainer.global_step, {}
        self.open(model, next(iter(trainer.optimizers), None), trainer.global_step, self._initial)
        self._initial = {}

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
        logged = _logged(trainer)
        fresh = {name: value for name, value in logged.items() if self._seen.get(name) is not value}
        self._seen = logged
        return fresh

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.close(exception)


def _logged(trainer: Trainer) -> dict[str, Tensor]:
    """The numbers that the module logged last."""
    return {name: value for name, value in trainer.callback_metrics.items() if value.numel() == 1}
