"""A Trajectory: the checkpoints and scalars that a training left behind; any of its steps opens as a Subject."""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from workbench import adopted, record
from workbench.fingerprint import digest
from workbench.optimizers import OptimizerState
from workbench.plan import available_memory
from workbench.rebuild import call, load_into, look_up
from workbench.several import Pair
from workbench.sources import Adopted, Recorded, Source
from workbench.subject import Subject
from workbench.twin import unwrap

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class _Opening:
    """How a step is made into a Subject, where it differs from what the record says; see ``wb.Subject``."""

    model: nn.Module | None = None
    data: Any = None
    loss: Any = None
    held_out: Any = None
    parameters: Any = None
    optimizer: Any = None
    norm: str | None = None
    device: Any = None
    dtype: torch.dtype | None = None
    batch_size: int | None = None
    max_examples: int | None = 2048
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Checkpoints and scalars of one training, as they are on disk when it is opened.

    ``Trajectory.open(folder)`` reads what a ``wb.Recorder`` wrote, ``Trajectory.adopt("ckpts/*.pt")`` plain
    checkpoint files. ``steps`` are those with weights, ``scalars`` the curves, ``subject(step)`` a step to probe. It
    never changes: ``refresh()`` opens it again, to follow a training that is still going on.
    """

    kind: ClassVar[str] = "trajectory"

    source: Source
    trust: bool = False
    opening: _Opening = field(default_factory=_Opening)
    plan: Any = None

    @classmethod
    def open(cls, folder: str | Path, trust: bool = False) -> Trajectory:
        """Open a recorded folder.

        Args:
            folder: what was given to the Recorder.
            trust: permit importing the builder, data or loss that the record names, where they lie outside Workbench.
        """
        return cls(Recorded.open(Path(folder)), trust)

    @classmethod
    def adopt(cls, pattern: str | Path, step: str | None = None) -> Trajectory:
        r"""Take in plain checkpoints: ``Trajectory.adopt("ckpts/*.pt", step=r"step_(\d+)")``.

        State dicts by ``torch.save`` (also nested, as under ``"state_dict"`` or ``"model_state_dict"``), Lightning's
        ``.ckpt``, safetensors, and folders of Hugging Face's trainer (``"out/checkpoint-*"``), whose logged curves
        become ``scalars``. Nothing in a file is executed. Model, data and loss are given to :meth:`using` or
        :meth:`subject`; a prefix that all names share (``net.``) is looked through.

        Args:
            pattern: a glob; ``**`` reaches into folders.
            step: a regular expression whose first group, found in the file's name or else its folder's, is the step;
                None: the number after the word step, else the first number.
        """
        files = adopted.find(pattern, step)
        first = next(iter(files.values())).parent.resolve()
        return cls(Adopted(files, first.name))

    @property
    def label(self) -> str:
        """A short name: that of the folder."""
        return self.source.label

    @property
    def steps(self) -> tuple[int, ...]:
        """The optimizer steps whose weights are kept, ascending; step 0 is the initialisation."""
        return self.source.steps

    @property
    def scalars(self) -> pd.DataFrame:
        """What was recorded at each step; ``wall_time`` and ``recorder_seconds`` (the cost of recording) in seconds."""
        return self._table.copy()

    @cached_property
    def _table(self) -> pd.DataFrame:
        import pandas as pd

        lines = self.source.lines()
        began = lines[0].time if lines else 0.0
        rows = [dict(x.values) | {"wall_time": x.time - began, "recorder_seconds": x.cost} for x in lines]
        index = pd.Index([x.step for x in lines], name="step", dtype="int64")
        frame = pd.DataFrame(rows, index=index, columns=None if rows else ["wall_time", "recorder_seconds"])
        clock = ["wall_time", "recorder_seconds"]
        return frame.reindex(columns=[c for c in frame.columns if c not in clock] + clock).astype("float64")

    @property
    def overhead(self) -> float:
        """What recording cost, as a share of the time that training itself took; nan where that was not measured."""
        last = (self.source.lines() or (None,))[-1]
        return last.cost / last.training if last is not None and last.training else float("nan")

    def weights(self, step: int) -> dict[str, Tensor]:
        """Every recorded weight and buffer of a step, on the CPU; tied names hold one tensor."""
        return self.source.load(self._known(step))

    def optimizer(self, step: int) -> dict[str, Any] | None:
        """The optimizer at a step: class, groups (learning rates, betas ...), parameter names; None if not recorded.

        With ``keep_optimizer=True`` its ``state`` is there too, as ``{parameter index: {name: tensor or number}}``.
        """
        held, path = self._optimizer(self._known(step))
        if held is None:
            return None
        entries = cast("dict[str, Any]", held["state"]) | (record.load_tensors(path) if path else {})
        held["state"] = dict[int, dict[str, Any]]()
        for key, value in entries.items():
            index, _, name = key.partition("/")
            held["state"].setdefault(int(index), {})[name] = value
        return held

    def _optimizer(self, step: int) -> tuple[dict[str, Any] | None, Path | None]:
        """What a step's header says of the optimizer, and the file with its state; None for what was not kept."""
        if not isinstance(self.source, Recorded) or "optimizer" not in (header := self.source.header(step)):
            return None, None
        path = record.optimizer_path(self.source.folder, step)
        return json.loads(header["optimizer"]), path if path.exists() else None

    def _known(self, step: int) -> int:
        if step in self.steps:
            return step
        below, above = [s for s in self.steps if s < step], [s for s in self.steps if s > step]
        near = [str(s) for s in (*below[-1:], *above[:1])]
        raise ValueError(
            f"{self.label} has no checkpoint at step {step}; nearest: {' and '.join(near)}. trajectory.steps lists all "
            f"{len(self.steps)}."
        )

    def refresh(self) -> Trajectory:
        """The trajectory as it is on disk now, opened in the same way."""
        if isinstance(self.source, Recorded):
            return dataclasses.replace(self, source=Recorded.open(self.source.folder))
        return self

    def using(
        self,
        model: nn.Module | None = None,
        data: Any = None,
        loss: Any = None,
        *,
        held_out: Any = None,
        parameters: Any = None,
        optimizer: Any = None,
        norm: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        batch_size: int | None = None,
        max_examples: int | None = 2048,
        seed: int = 0,
    ) -> Trajectory:
        """The same trajectory, whose steps open with these instead of what the record says; each as in ``wb.Subject``.

        ``model`` is copied for each step and given its weights; the one passed here is never changed.
        """
        given = {name: value for name, value in locals().items() if name != "self"}
        plain = _Opening()
        fresh = {name: value for name, value in given.items() if not _same(value, getattr(plain, name))}
        return dataclasses.replace(self, opening=dataclasses.replace(self.opening, **fresh))

    def subject(
        self,
        step: int,
        model: nn.Module | None = None,
        data: Any = None,
        loss: Any = None,
        *,
        held_out: Any = None,
        parameters: Any = None,
        optimizer: Any = None,
        norm: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        batch_size: int | None = None,
        max_examples: int | None = 2048,
        seed: int = 0,
    ) -> Subject:
        """The model at one step, as a Subject. Arguments stand for what the record lacks, or instead of what it has.

        Its ``optimizer`` is the recorded state, with tensors where the record was made with ``keep_optimizer=True``.

        Raises:
            ValueError: no checkpoint at ``step``; its shapes do not fit the model; model, data or loss are missing.
            Untrusted: the record names code from outside Workbench, and it was opened without ``trust=True``.
        """
        using = self.using(
            model, data, loss, held_out=held_out, parameters=parameters, optimizer=optimizer, norm=norm, device=device,
            dtype=dtype, batch_size=batch_size, max_examples=max_examples, seed=seed,
        )  # fmt: skip
        return using._open(step)

    def pair(self, step: int, other: int) -> Pair:
        """Two steps to compare, both opened as the trajectory says; :meth:`using` changes how.

        Raises:
            As :meth:`subject`.
        """
        return Pair(self._open(step), self._open(other))

    def _open(self, step: int) -> Subject:
        chosen, made = self.opening, self._model(self._known(step))
        held, path = self._optimizer(step)
        recorded = None if held is None else OptimizerState.recorded(held, path)
        subject = Subject(
            made, self._examples(), self._loss(), held_out=chosen.held_out, parameters=chosen.parameters,
            optimizer=chosen.optimizer or recorded, norm=self._norm(), device=chosen.device or "auto",
            dtype=chosen.dtype, batch_size=chosen.batch_size, max_examples=chosen.max_examples, seed=chosen.seed,
        )  # fmt: skip
        subject.path = self
        return subject if self.plan is None else subject.with_plan(self.plan)

    def _model(self, step: int) -> nn.Module:
        manifest = self.source.manifest
        if self.opening.model is not None:
            made = copy.deepcopy(unwrap(self.opening.model))
        elif manifest is not None and manifest.build is not None:
            made = call(manifest.build, manifest.build_args, self.trust, self.label)
        else:
            raise ValueError(f"{self.label} does not say how to build its model{_missing('model=')}")
        load_into(made, self.source.load(step), f"step {step} of {self.label}")
        return made

    def _examples(self) -> Any:
        if self.opening.data is not None:
            return self.opening.data
        found = self.source.examples(self.trust) if isinstance(self.source, Recorded) else None
        if found is None:
            raise ValueError(f"{self.label} holds no examples to probe on{_missing('data=')}")
        return found

    def _loss(self) -> Any:
        held = self.source.manifest.loss if self.source.manifest else None
        if self.opening.loss is not None:
            return self.opening.loss
        if held is None:
            raise ValueError(f"{self.label} does not name its loss{_missing('loss=')}")
        return look_up(held, self.trust, self.label) if ":" in held else held

    def _norm(self) -> Any:
        manifest = self.source.manifest
        return self.opening.norm or (manifest.norm if manifest else None)

    def fingerprint(self) -> str:
        """A hash of all checkpoints, the scalars, and the model, data and loss that its steps open with."""
        manifest, opened = self.source.manifest, self.opening
        given = {f.name: getattr(opened, f.name) for f in dataclasses.fields(opened)}
        given |= {"model": (type(opened.model).__qualname__, repr(opened.model)), "optimizer": repr(opened.optimizer)}
        recorded = self._recorded_examples() if opened.data is None else ""
        scalars = [(x.step, sorted(x.values.items())) for x in self.source.lines()]
        said = (manifest.build, manifest.build_args, manifest.loss, manifest.norm) if manifest else ()
        weights = [(step, self.source.digest(step)) for step in self.steps]
        return digest(weights, repr(scalars), said, given, recorded)

    def _recorded_examples(self) -> str:
        held = self.source.manifest.data if self.source.manifest else None
        if held is None or not isinstance(self.source, Recorded):
            return ""
        return str(held["digest"]) if "file" in held else repr(held)

    def describe(self) -> dict[str, Any]:
        """What a reading says about the trajectory it was made of: no path, no name of a machine."""
        manifest = self.source.manifest
        model = type(self.opening.model).__name__ if self.opening.model is not None else None
        loss = self.opening.loss if self.opening.loss is not None else (manifest.loss if manifest else None)
        return {
            "on": f"{len(self.steps)} checkpoints, steps {self.steps[0]} to {self.steps[-1]}",
            "label": self.label,
            "model": model or (manifest.model.rpartition(":")[2] if manifest else "unknown"),
            "loss": loss if isinstance(loss, str) else getattr(loss, "__name__", "unknown"),
            "norm": self._norm() or "eval",
        }

    def version(self) -> tuple[Any, ...]:
        """Changes when a checkpoint is written again or deleted."""
        return self.source.version()

    def with_plan(self, plan: Any) -> Trajectory:
        """The same trajectory whose subjects are evaluated by ``plan``."""
        return dataclasses.replace(self, plan=plan)

    def available_memory(self) -> int:
        """Bytes of memory that are free on the device where steps open."""
        return available_memory(torch.device(self.opening.device or "cpu"))

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        return f"<Trajectory {self.label}: {self.describe()['on']}>"


def _same(value: Any, other: Any) -> bool:
    return value is other or (isinstance(value, int | str) and type(value) is type(other) and value == other)


def _missing(argument: str) -> str:
    return f"; pass {argument} to trajectory.subject(step, ...) or trajectory.using(...), or give it to the Recorder."
