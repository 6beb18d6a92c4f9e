"""Record any training in two lines: checkpoints and scalars in a folder that describes itself."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn

from workbench import record
from workbench.dynamics.examples import Examples, pack
from workbench.dynamics.lock import take
from workbench.dynamics.schedule import Every, LogSpaced, Moment, Schedule, log_spaced
from workbench.fingerprint import digest
from workbench.provenance import versions
from workbench.record import Line, Manifest
from workbench.twin import unwrap

__all__ = ["Recorder", "log_spaced"]

_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_TAKEN = ("wall_time", "recorder_seconds")


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

    Entered again on its folder, a record is continued from the checkpoint that the model's weights equal (or from
    ``resume``); what was recorded after it is replaced from the first new step on. Two writers at once are refused.

    Cost: a checkpoint is one copy and one flushed file of the model's size; a step without one appends one line, some
    20 µs. Scalars that are tensors on a GPU wait for it. The time spent here is recorded itself
    (``recorder_seconds`` in ``trajectory.scalars``).

    Args:
        folder: where the record lies or will lie.
        model: the model in training; compiled and data-parallel wrappers are looked through.
        optimizer: its learning rates, betas and the like are noted at each checkpoint.
        every: which steps keep a checkpoint: ``log_spaced(10)``, a number of steps, or any object with ``due(moment)``.
        data: examples to probe on: tensors (x, y), a Dataset, a DataLoader or batches, stored when up to 64 MB; else
            ``"module:callable"``, which gives them again.
        loss: name of the loss, or ``"module:callable"``.
        norm: how BatchNorm shall be treated when the record is probed, as in ``wb.Subject``.
        build: ``"module:callable"`` (or such a function) that builds the model again.
        build_args: its keyword arguments, as JSON allows.
        keep_optimizer: store the optimizer's state too (about twice the model again, for Adam).
        resume: step to continue from, when the weights equal no checkpoint of an existing record.
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
    ) -> None:
        if keep_optimizer and optimizer is None:
            raise ValueError("Recorder(keep_optimizer=True) needs the optimizer: Recorder(folder, model, optimizer).")
        if not isinstance(every, int) and not hasattr(every, "due"):
            raise TypeError(f"Recorder(every=...) takes wb.log_spaced(10) or a whole number of steps; got {every!r}.")
        self.folder = Path(folder)
        self._model, self._optimizer, self._keep_optimizer = unwrap(model), optimizer, keep_optimizer
        self._schedule = Every(every) if isinstance(every, int) else every
        self._data, self._resume = data, resume
        self._loss, self._norm = _named("loss", loss, bare=True), norm
        self._build, self._build_args = _named("build", build), _jsonable(build_args or {})
        self._step, self._saved, self._superseding = 0, -1, False
        self._cost, self._entered = 0.0, time.perf_counter()
        self._lock: weakref.finalize[Any, Any] | None = None
        self._scalars: Any = None

    @property
    def count(self) -> int:
        """Steps recorded so far, those before a resumption included."""
        return self._step

    @property
    def seconds(self) -> float:
        """Wall-clock seconds that recording itself has cost so far."""
        return self._cost

    def __enter__(self) -> Recorder:
        if self._lock is not None:
            raise RuntimeError("this Recorder was entered already; make another one for another training.")
        self._entered = began = time.perf_counter()
        (self.folder / record.CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        self._lock = take(self.folder, self)
        try:
            self._open()
        except BaseException:
            self._close()
            raise
        self._cost += time.perf_counter() - began
        return self

    def _open(self) -> None:
        for half in (*self.folder.glob(".*.tmp"), *(self.folder / record.CHECKPOINTS).glob(".*.tmp")):
            half.unlink()  # a writer that was killed left them; the lock says that nobody is writing them now
        known = record.checkpoint_steps(self.folder) if (self.folder / record.MANIFEST).exists() else ()
        whole = record.read_lines(self.folder / record.SCALARS)[1] if known else 0
        if known:
            self._step = self._saved = self._continue(known)
            self._superseding = True
        self._describe(Manifest.read(self.folder) if known else None)
        self._scalars = (self.folder / record.SCALARS).open("ab", buffering=0)
        self._scalars.truncate(whole)
        if not known:
            self._checkpoint()
            self._write(Line(0, time.time(), self._cost))

    def _describe(self, old: Manifest | None) -> None:
        """Write the manifest and the examples; of an older one, what was not given anew is kept."""
        model = f"{type(self._model).__module__}:{type(self._model).__qualname__}"
        examples = Examples({"callable": _named("data", self._data)}, {}) if isinstance(self._data, str) else None
        examples = pack(self._data) if examples is None and self._data is not None else examples
        given = {
            "build": self._build,
            "build_args": self._build_args if self._build else None,
            "data": examples.words if examples else None,
            "loss": self._loss,
            "norm": self._norm,
            "schedule": repr(self._schedule),
        }
        fresh = Manifest(model, _shapes(self._model), versions=dict(versions()))
        made = replace(old or fresh, **{name: value for name, value in given.items() if value is not None})
        if made != old:
            if examples:
                examples.store(self.folder)
            record.write_text(self.folder / record.MANIFEST, made.to_text())

    def _continue(self, known: tuple[int, ...]) -> int:
        """The step from which an existing record goes on."""
        held, mine = Manifest.read(self.folder).tensors, _shapes(self._model)
        if held != mine:
            name = next(n for n in [*mine, *held] if held.get(n) != mine.get(n))
            raise ValueError(
                f"{self.folder} holds the record of another model: its {name} is {_shape(held.get(name))}, here it is "
                f"{_shape(mine.get(name))}; choose another folder or delete that one."
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

    def step(self, /, **scalars: float | Tensor) -> None:
        """Say that an optimizer step was taken, with any scalars: ``recorder.step(train_loss=loss, accuracy=0.9)``.

        Tensors of one element are read off; NaN and infinities are kept.
        """
        began = time.perf_counter()
        if self._scalars is None:
            raise RuntimeError("the Recorder is not open: write `with wb.Recorder(...) as rec:` around the training.")
        values = {name: _number(name, value) for name, value in scalars.items()}
        if self._superseding:
            self._supersede()
        self._step += 1
        training = began - self._entered - self._cost
        if self._schedule.due(Moment(self._step, values, training, self._cost)):
            self._checkpoint()
        self._write(Line(self._step, time.time(), self._cost, values))
        self._cost += time.perf_counter() - began

    def _supersede(self) -> None:
        """Drop what an earlier attempt recorded after the step that training went on from."""
        self._superseding = False
        for step in record.checkpoint_steps(self.folder):
            if step > self._step:
                record.checkpoint_path(self.folder, step).unlink()
                record.optimizer_path(self.folder, step).unlink(missing_ok=True)
        self._write(Line(self._step, time.time(), self._cost, resumed=True))

    def _write(self, line: Line) -> None:
        """One system call, so that a kill leaves the line whole or cut short at the end of the file."""
        size, content = self._scalars.seek(0, os.SEEK_END), line.to_bytes()
        if self._scalars.write(content) < len(content):
            self._scalars.truncate(size)
            raise record.full(self.folder / record.SCALARS)

    def _checkpoint(self) -> None:
        kept, tied = record.tensors_of(self._model)
        host = {name: t.cpu() for name, t in kept.items()}
        header = {"step": str(self._step), "digest": digest(host), "tied": json.dumps(tied)}
        header["training"] = json.dumps(self._model.training)
        if self._optimizer is not None:
            state, header["optimizer"] = _optimizer(self._model, self._optimizer)
            if self._keep_optimizer:
                record.save_tensors(record.optimizer_path(self.folder, self._step), state, {})
        record.save_tensors(record.checkpoint_path(self.folder, self._step), host, header)
        self._saved = self._step

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._saved != self._step:
                # An error of the training matters more than one of the last checkpoint, and must not be hidden by it.
                with contextlib.suppress(*([OSError] if kind else [])):
                    self._checkpoint()
        finally:
            self._close()

    def _close(self) -> None:
        if self._scalars is not None:
            self._scalars.close()
            self._scalars = None
        if self._lock is not None:
            self._lock()


def _shapes(model: nn.Module) -> dict[str, dict[str, Any]]:
    kept, _ = record.tensors_of(model)
    return {n: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for n, t in kept.items()}


def _shape(held: dict[str, Any] | None) -> str:
    return f"{held['dtype']} of shape {tuple(held['shape'])}" if held else "absent"


def _number(name: str, value: float | Tensor) -> float:
    if name in _TAKEN:
        raise ValueError(f"recorder.step({name}=...): the recorder writes {name} itself; choose another name.")
    try:
        return float(value.detach().item() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise TypeError(f"recorder.step({name}=...) takes one number; got a {type(value).__name__}{shape}.") from None


def _named(what: str, value: Any, bare: bool = False) -> str | None:
    """``"module:callable"`` for a function or such a text; ``bare`` lets a plain name through as well."""
    if value is None or (bare and isinstance(value, str) and ":" not in value):
        return value
    name = value if isinstance(value, str) else f"{value.__module__}:{getattr(value, '__qualname__', '<object>')}"
    if not _REFERENCE.fullmatch(name) or name.startswith("__main__:"):
        raise ValueError(
            f'Recorder({what}=...) must be text such as "mypackage.nets:resnet" or a function at the top of an '
            f"importable module, so that others can find it; got {name!r}."
        )
    return name


def _jsonable(arguments: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(arguments), allow_nan=False))
    except (TypeError, ValueError) as problem:
        raise TypeError(f"Recorder(build_args=...) must be values that JSON can hold; {problem}.") from None


def _optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], str]:
    """(state tensors by ``index/name``, JSON of class, groups, parameter names and state that is plain numbers)."""
    names = {id(p): n for n, p in model.named_parameters()}
    held = optimizer.state_dict()
    order = [names.get(id(p), "") for group in optimizer.param_groups for p in group["params"]]
    state = {f"{i}/{k}": v for i, entry in held["state"].items() for k, v in entry.items()}
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    words = {
        "class": f"{type(optimizer).__module__}:{type(optimizer).__qualname__}",
        "parameters": order,
        "groups": [{k: _plain(v) for k, v in group.items()} for group in held["param_groups"]],
        "state": {key: _plain(value) for key, value in state.items() if key not in tensors},
    }
    return tensors, json.dumps(words)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, tuple | list):
        return [_plain(v) for v in cast("list[Any]", value)]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
