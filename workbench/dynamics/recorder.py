"""Record any training in two lines: checkpoints and scalars in a folder that describes itself."""

from __future__ import annotations

import contextlib
import json
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn

from workbench import record
from workbench.dynamics import described
from workbench.dynamics.clock import Clock, device_of
from workbench.dynamics.described import shape, shapes
from workbench.dynamics.examples import Examples, pack
from workbench.dynamics.gauges.gauge import Gauge, Training
from workbench.dynamics.lines import Lines
from workbench.dynamics.lock import take
from workbench.dynamics.pending import Pending
from workbench.dynamics.schedules import LogSpaced, Schedule, following, log_spaced, schedule
from workbench.dynamics.watch import Past, Turn, Watch
from workbench.fingerprint import digest
from workbench.provenance import versions
from workbench.rebuild import call
from workbench.record import Line, Manifest
from workbench.resolve import resolve
from workbench.twin import unwrap

__all__ = ["Recorder", "log_spaced"]


class Recorder:
    """Keeps checkpoints and scalars of a training while it runs, and never changes it.

    ::

        with wb.Recorder("runs/first", model, optimizer) as recorder:
            for inputs, targets in loader:
                ...
                optimizer.step()
                recorder.step(train_loss=loss)

    Weights and buffers are kept bit for bit on entering (step 0), at the steps that ``every`` chooses, and on leaving,
    also after an error. No random number is drawn, no flag or hook set: the trained weights are those of a training
    without a recorder. Kill the process at any moment and at most the last record is lost.

    What is known before the first step, such as the loss at initialisation, is told by :meth:`start`.

    Entered again on its folder, a record is continued from the checkpoint that the model's weights equal (or from
    ``resume``); what was recorded after it is replaced from the first new step on. Two writers at once are refused.

    Cost: a checkpoint is one copy and one flushed file of the model's size; a step without one appends one line, some
    20 µs. Scalars that are tensors on a GPU are written when it has computed them, without waiting for it; schedules
    that watch them hear of them then. The time spent here is measured and recorded itself (``recorder_seconds`` in
    ``trajectory.scalars``, ``trajectory.overhead``).

    Where several processes train together (``torch.distributed``), the first one writes and the others do nothing.

    Args:
        folder: where the record lies or will lie.
        model: the model in training; compiled and data-parallel wrappers are looked through.
        optimizer: its learning rates, betas and the like are noted at each checkpoint.
        every: which steps keep a checkpoint: ``log_spaced(10)``, a number of steps, a schedule of
            ``wb.dynamics.schedules`` (on events, within a share of the training time, joined by ``|`` and ``&``).
        data: examples to probe on: tensors (x, y), a Dataset, a DataLoader or batches, stored when up to 64 MB; else
            ``"module:callable"``, which gives them again.
        loss: name of the loss, or ``"module:callable"``.
        norm: how BatchNorm shall be treated when the record is probed, as in ``wb.Subject``.
        build: ``"module:callable"`` (or such a function) that builds the model again.
        build_args: its keyword arguments, as JSON allows.
        keep_optimizer: store the optimizer's state too (about twice the model again, for Adam).
        resume: step to continue from, when the weights equal no checkpoint of an existing record; a new record
            begins to count there.
        gauges: what else to read off the training, as ``wb.dynamics.gauges.defaults()``; each has a schedule of its
            own. A gauge that fails is left out with a warning; training goes on.
    """

    def __init__(
        self,
        folder: str | Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        every: Schedule | int = LogSpaced(10),  # noqa: B008
        data: Any = None,
        loss: str | Callable[..., Any] | None = None,
        norm: str | None = None,
        build: str | Callable[..., nn.Module] | None = None,
        build_args: Mapping[str, Any] | None = None,
        keep_optimizer: bool = False,
        resume: int | None = None,
        gauges: Sequence[Gauge] = (),
    ) -> None:
        if keep_optimizer and optimizer is None:
            raise ValueError("Recorder(keep_optimizer=True) needs the optimizer: Recorder(folder, model, optimizer).")
        self.folder = Path(folder)
        self._model, self._optimizer, self._keep_optimizer = unwrap(model), described.inner(optimizer), keep_optimizer
        self._turn = Turn(schedule(every))
        self._data, self._given_loss, self._resume = data, loss, resume
        self._loss, self._norm = described.named("loss", loss, bare=True), norm
        self._build, self._build_args = described.named("build", build), described.jsonable(build_args or {})
        self._step, self._saved, self._superseding, self._silent = 0, -1, False, False
        self._full, self._names = cast("float", 0), set[str]()
        self._opened, self._first = 0, cast("Line | None", None)
        self._clock = Clock()
        self._watch = Watch(gauges, self._clock)
        self._past = Past([self._turn.schedule, *self._watch.schedules])
        self._lines = Lines()
        self._pending = Pending(self._lines.write)
        self._lock: weakref.finalize[Any, Any] | None = None

    @property
    def count(self) -> int:
        """Steps recorded so far, those before a resumption included."""
        return self._step

    @property
    def seconds(self) -> float:
        """Wall-clock seconds that recording itself has cost so far, those before a resumption included."""
        return self._clock.recording

    def __enter__(self) -> Recorder:
        if self._lock is not None:
            raise RuntimeError("this Recorder was entered already; make another one for another training.")
        self._silent = _rank() > 0
        if self._silent:
            return self
        self._clock.restart()
        with self._clock:
            (self.folder / record.CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            self._lock = take(self.folder, self)
            try:
                self._open()
                if self._watch.schedules:
                    self._watch.start(self._training())
                self._watch.prepare(self._step + 1, {}, self._past)
            except BaseException:
                self._close()
                raise
        return self

    def _open(self) -> None:
        for half in (*self.folder.glob(".*.tmp"), *(self.folder / record.CHECKPOINTS).glob(".*.tmp")):
            half.unlink()  # a writer that was killed left them; the lock says that nobody is writing them now
        known = record.checkpoint_steps(self.folder) if (self.folder / record.MANIFEST).exists() else ()
        lines, whole = record.read_lines(self.folder / record.SCALARS) if known else ((), 0)
        if known:
            self._step = self._saved = self._continue(known)
            self._superseding = True
            self._clock.go_on(*_spent(self.folder, self._step))
        else:
            self._step = self._resume or 0
        self._describe(Manifest.read(self.folder) if known else None)
        self._lines.begin(self.folder / record.SCALARS, whole)
        if not known:
            self._keep()
        here = next((line for line in lines if line.step == self._step), None)
        if here is None:  # also where a kill took the line of the last checkpoint
            here = Line(self._step, time.time(), self._clock.now(), training=self._clock.training())
            self._lines.write(here)
        begins = min([*known[:1], *(line.step for line in lines[:1]), self._step])
        self._opened, self._first = self._step, here if self._step == begins else None

    def _training(self) -> Training:
        """What gauges may look at."""
        folder, data, loss = self.folder, self._data, self._given_loss
        return Training(
            self._model,
            self._optimizer,
            lambda: record.load_tensors(record.checkpoint_path(folder, record.checkpoint_steps(folder)[0])),
            call(data, {}, True, "Recorder(data=...)") if isinstance(data, str) else data,
            resolve(loss) if isinstance(loss, str) and ":" in loss else loss,
            self._norm,
        )

    def _describe(self, old: Manifest | None) -> None:
        """Write the manifest and the examples; of an older one, what was not given anew is kept."""
        model = f"{type(self._model).__module__}:{type(self._model).__qualname__}"
        data = self._data
        elsewhere = Examples({"callable": described.named("data", data)}, {}) if isinstance(data, str) else None
        examples = pack(data) if elsewhere is None and data is not None else elsewhere
        given = {
            "build": self._build,
            "build_args": self._build_args if self._build else None,
            "data": examples.words if examples else None,
            "loss": self._loss,
            "norm": self._norm,
            "schedule": repr(self._turn.schedule),
        }
        fresh = Manifest(model, shapes(self._model), versions=dict(versions()))
        made = replace(old or fresh, **{name: value for name, value in given.items() if value is not None})
        if made != old:
            if examples:
                examples.store(self.folder)
            record.write_text(self.folder / record.MANIFEST, made.to_text())

    def _continue(self, known: tuple[int, ...]) -> int:
        """The step from which an existing record goes on."""
        held, mine = Manifest.read(self.folder).tensors, shapes(self._model)
        if held != mine:
            name = next(n for n in [*mine, *held] if held.get(n) != mine.get(n))
            raise ValueError(
                f"{self.folder} holds the record of another model: its {name} is {shape(held.get(name))}, here it is "
                f"{shape(mine.get(name))}; choose another folder or delete that one."
            )
        if self._resume is not None:
            return self._resumable(known)
        here = digest(record.tensors_of(self._model)[0])
        for step in reversed(known):
            if record.load_header(record.checkpoint_path(self.folder, step)).get("digest") == here:
                return step
        raise ValueError(
            f"{self.folder} holds a record up to step {known[-1]}, and the model's weights equal none of its "
            "checkpoints; to continue it, load one of them into the model or say Recorder(..., resume=STEP); to "
            "start anew, choose another folder or delete that one."
        )

    def _resumable(self, known: tuple[int, ...]) -> int:
        lines, _ = record.read_lines(self.folder / record.SCALARS)
        last = max([known[-1], *(line.step for line in lines)])
        if not 0 <= cast("int", self._resume) <= last:
            raise ValueError(f"Recorder(resume={self._resume}) must lie in [0, {last}], what {self.folder} holds.")
        return cast("int", self._resume)

    def start(self, /, **scalars: float | Tensor) -> None:
        """Say what holds before the first step: ``recorder.start(train_loss=loss, test_accuracy=0.1)``.

        They stand at the record's first checkpoint (step 0), and the same names go on with :meth:`step`. Tensors of
        one element are read off. A training that is continued may say it again: a value that is recorded keeps, and
        where training is past its start nothing is written.

        Raises:
            RuntimeError: the Recorder is not open, or a step was recorded before.
            TypeError, ValueError: not numbers, or a name that is the recorder's own.
        """
        if self._silent:
            return
        self._check_open()
        if self._step != self._opened:
            raise RuntimeError(
                "recorder.start(...) tells of the weights before the first step, and one was recorded already; call it "
                "right after entering."
            )
        with self._clock:
            now, later = described.parted(scalars, "start")
            told = now | {name: described.number(name, value, "start") for name, value in later.items()}
            self._begin(told)

    def _begin(self, told: Mapping[str, float]) -> None:
        """Write the line of the first step once more, with what is new: on reading, a step's last line counts."""
        new = {} if self._first is None else {n: v for n, v in told.items() if n not in self._first.values}
        if self._first is not None and new:
            self._first = replace(self._first, values={**self._first.values, **new})
            self._lines.write(self._first)
            self._past.add(new)

    def step(self, /, **scalars: float | Tensor) -> None:
        """Say that an optimizer step was taken, with any scalars: ``recorder.step(train_loss=loss, accuracy=0.9)``.

        Tensors of one element are read off; NaN and infinities are kept.
        """
        if self._step + 1 < self._full and self._jot(scalars):
            return
        if self._silent:
            self._step += 1
            return
        self._check_open()
        with self._clock:
            self._take(scalars)
            self._look_ahead()

    def _jot(self, scalars: Mapping[str, float | Tensor]) -> bool:
        """Take a step at which nothing but its line is due; False, and nothing done, where a scalar is no known number.

        Its code is in one piece for the caches' sake: training has filled them with other things meanwhile.
        """
        for name, value in scalars.items():
            if type(value) is not float or name not in self._names:
                return False
        cost, training = self._clock.begin()
        try:
            self._step += 1
            values = cast("Mapping[str, float]", scalars)
            self._lines.put(record.line_bytes(self._step, time.time(), cost, values, training))
        finally:
            self._clock.end()
        return True

    def _look_ahead(self) -> None:
        """Find the next step that needs more than a line: a checkpoint, a gauge, or one that is to be told before."""
        step = self._step
        if self._past.recent or not self._pending.idle:
            self._full = step + 1
        else:
            self._full = min(following(self._turn.schedule, step), self._watch.next_due(step) - 1)

    def _check_open(self) -> None:
        if not self._lines.open:
            raise RuntimeError("the Recorder is not open: write `with wb.Recorder(...) as rec:` around the training.")

    def _take(self, scalars: Mapping[str, float | Tensor]) -> None:
        now, later = described.parted(scalars)
        if self._superseding:
            self._supersede()
        self._step += 1
        seen = {**self._arrived(), **now}
        read = self._watch.collect(self._step, seen, self._past)
        gauged, gauged_later = described.parted(read, None)
        if self._turn.due(self._step, seen | gauged, self._past, self._clock, self._clock.now()):
            self._clock.settle(device_of(self._model))
            self._keep()
        line = Line(self._step, time.time(), self._clock.now(), now | gauged, training=self._clock.training())
        self._pending.push(line, later | gauged_later)
        self._names.update(now)
        self._past.add(seen | gauged)
        self._watch.prepare(self._step + 1, seen | gauged, self._past)

    def _arrived(self) -> dict[str, float]:
        """What a GPU has computed since the step before."""
        self._pending.drain()
        came, self._pending.arrived = self._pending.arrived, {}
        return came

    def _keep(self) -> None:
        began = time.perf_counter()
        self._checkpoint()
        self._turn.used(self._step, time.perf_counter() - began)

    def _supersede(self) -> None:
        """Drop what an earlier attempt recorded after the step that training went on from."""
        self._superseding = False
        for step in record.checkpoint_steps(self.folder):
            if step > self._step:
                record.checkpoint_path(self.folder, step).unlink()
                record.optimizer_path(self.folder, step).unlink(missing_ok=True)
        self._lines.write(Line(self._step, time.time(), self._clock.now(), resumed=True))

    def _checkpoint(self) -> None:
        kept, tied = record.tensors_of(self._model)
        host = {name: t.cpu() for name, t in kept.items()}
        header = {"step": str(self._step), "digest": digest(host), "tied": json.dumps(tied)}
        header["training"] = json.dumps(self._model.training)
        if self._optimizer is not None:
            state, header["optimizer"] = described.of_optimizer(self._model, self._optimizer)
            if self._keep_optimizer:
                record.save_tensors(record.optimizer_path(self.folder, self._step), state, {})
        record.save_tensors(record.checkpoint_path(self.folder, self._step), host, header)
        self._saved = self._step

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._silent:
            return
        try:
            self._watch.close()
            # An error of the training matters more than one of the last checkpoint, and must not be hidden by it.
            with self._clock, contextlib.suppress(*([OSError, RuntimeError] if kind else [])):
                self._pending.drain(wait=True)
                if self._saved != self._step:
                    self._checkpoint()
        finally:
            self._close()

    def _close(self) -> None:
        self._full = 0
        self._watch.close()
        self._lines.close()
        if self._lock is not None:
            self._lock()


def _spent(folder: Path, step: int) -> tuple[float, float]:
    """Seconds of recording and of training that the record's steps up to ``step`` took."""
    lines, _ = record.read_lines(folder / record.SCALARS)
    held = [line for line in lines if line.step <= step]
    return (held[-1].cost, held[-1].training) if held else (0.0, 0.0)


def _rank() -> int:
    """This process's number among those that train together; 0 where it is alone."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if together else 0
