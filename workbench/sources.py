"""Where a trajectory's checkpoints come from: a folder that a Recorder wrote, or plain files of anyone's making."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor

from workbench import adopted, record
from workbench.fingerprint import digest
from workbench.rebuild import call
from workbench.record import Line, Manifest


class Source(Protocol):
    """Where checkpoints come from: a record folder, or plain files."""

    @property
    def label(self) -> str:
        """A short name."""
        ...

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that have weights, ascending."""
        ...

    @property
    def manifest(self) -> Manifest | None:
        """What was recorded about model, data and loss."""
        ...

    def load(self, step: int) -> dict[str, Tensor]:
        """Every tensor by name; tied names hold one tensor."""
        ...

    def digest(self, step: int) -> str:
        """A hash of the step's tensors."""
        ...

    def version(self) -> tuple[Any, ...]:
        """Changes when a file that was seen is written again or deleted."""
        ...

    def lines(self) -> tuple[Line, ...]:
        """The scalars."""
        ...


@dataclass(frozen=True)
class Recorded:
    """A folder that a Recorder wrote or is writing."""

    folder: Path
    steps: tuple[int, ...]
    manifest: Manifest | None
    kept: dict[str, Any] = field(default_factory=dict[str, Any], repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path) -> Recorded:
        """The folder as it is now; ``FileNotFoundError`` when it holds nothing to open."""
        manifest = Manifest.read(folder)
        steps = record.checkpoint_steps(folder)
        if not steps:
            raise FileNotFoundError(f"{folder} holds a record without any checkpoint; its training never began.")
        return cls(folder, steps, manifest)

    @property
    def label(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    def load(self, step: int) -> dict[str, Tensor]:
        """Every tensor by name; tied names hold one tensor."""
        tensors = record.load_tensors(record.checkpoint_path(self.folder, step))
        tied = cast("dict[str, str]", json.loads(self.header(step).get("tied", "{}")))
        return tensors | {alias: tensors[name] for alias, name in tied.items()}

    def header(self, step: int) -> dict[str, str]:
        """The texts stored with a step: digest, tied names, optimizer."""
        return record.load_header(record.checkpoint_path(self.folder, step))

    def digest(self, step: int) -> str:
        """A hash of the step's tensors, as it was stored with them, or of its file."""
        return self.header(step)["digest"]

    def version(self) -> tuple[Any, ...]:
        """Times and sizes of the files."""
        return tuple(_stamp(record.checkpoint_path(self.folder, step)) for step in self.steps)

    def lines(self) -> tuple[Line, ...]:
        """The scalars, ascending in step."""
        return record.read_lines(self.folder / record.SCALARS)[0]

    def examples(self, trust: bool) -> Any:
        """The examples that were stored or named; None when neither."""
        held = self.manifest.data if self.manifest else None
        if held is None:
            return None
        if "callable" in held:
            if "called" not in self.kept:
                self.kept["called"] = call(held["callable"], held.get("arguments", {}), trust, self.label)
            return self.kept["called"]
        if "stored" not in self.kept:
            path = self.folder / held["file"]
            place = json.loads(record.load_header(path)["place"])
            self.kept["stored"] = record.unpack(record.load_tensors(path), place)
        return self.kept["stored"]


@dataclass(frozen=True)
class Adopted:
    """Files that something else wrote."""

    files: Mapping[int, Path]
    label: str
    manifest: Manifest | None = None

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that have a file, ascending."""
        return tuple(self.files)

    def load(self, step: int) -> dict[str, Tensor]:
        """Every tensor by name."""
        return adopted.load(self.files[step])

    def digest(self, step: int) -> str:
        """A hash of the step's tensors, as it was stored with them, or of its file."""
        return adopted.digest(self.files[step])

    def version(self) -> tuple[Any, ...]:
        """Times and sizes of the files."""
        return tuple(map(_stamp, self.files.values()))

    def lines(self) -> tuple[Line, ...]:
        """What Hugging Face's trainer logged beside its checkpoints; nothing for other files."""
        return adopted.curves(self.files)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        state = path.stat()
    except FileNotFoundError:
        return (0, 0)
    return state.st_mtime_ns, state.st_size


@dataclass(frozen=True)
class Held:
    """A training whose curves (and weights, where wanted) were kept in memory: ``Trajectory(Held("run", lines))``.

    What a short training of an experiment or a notebook needs, that is to be read and not to be kept.
    """

    label: str
    scalars: tuple[Line, ...]
    weights: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict[int, Mapping[str, Tensor]])
    manifest: Manifest | None = None

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps whose weights are held; without any, those of the first and the last scalars."""
        return tuple(sorted(self.weights)) or tuple(dict.fromkeys((self.scalars[0].step, self.scalars[-1].step)))

    def load(self, step: int) -> dict[str, Tensor]:
        """Every tensor by name."""
        return dict(self.weights.get(step, {}))

    def digest(self, step: int) -> str:
        """A hash of the step's tensors."""
        return digest(self.weights.get(step, {}))

    def version(self) -> tuple[Any, ...]:
        """Never changes."""
        return ()

    def lines(self) -> tuple[Line, ...]:
        """The scalars, ascending in step."""
        return self.scalars
