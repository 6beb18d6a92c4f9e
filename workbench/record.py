"""The files of a record: what a training leaves behind, readable by anyone with JSON and safetensors, never a pickle.

::

    record.json                                 what was trained, and how to build it again
    checkpoints/step-000000012.safetensors      weights and buffers; digest, tied names and learning rates in its header
    checkpoints/step-000000012.optimizer.safetensors    the optimizer's state, when asked for
    data.safetensors                            the probing examples, when small
    scalars.jsonl                               one line a step, only ever appended to

Every file but the last is written beside its place, flushed to disk and renamed, so that it is whole or absent. Of
``scalars.jsonl`` a line that was cut short by a kill is dropped on reading.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from workbench.twin import unwrap

T = TypeVar("T")
FORMAT = "workbench-record"
VERSION = 1
MANIFEST, SCALARS, EXAMPLES, CHECKPOINTS = "record.json", "scalars.jsonl", "data.safetensors", "checkpoints"
_CHECKPOINT = re.compile(r"step-(\d{9,})\.safetensors$")


@dataclass(frozen=True)
class Manifest:
    """``record.json``: how to build the model and its data again, and the names, shapes and dtypes of its tensors.

    ``build`` is ``"module:callable"``, called with ``build_args``. ``data`` is ``{"file": ...}`` or
    ``{"callable": "module:callable"}``; ``loss`` a name or ``"module:callable"``; None where the record lacks them.
    """

    model: str
    tensors: dict[str, dict[str, Any]]
    build: str | None = None
    build_args: dict[str, Any] = field(default_factory=dict[str, Any])
    data: dict[str, Any] | None = None
    loss: str | None = None
    norm: str | None = None
    schedule: str = ""
    versions: dict[str, str] = field(default_factory=dict[str, str])

    def to_text(self) -> str:
        """The file's content."""
        return json.dumps({"format": FORMAT, "version": VERSION} | asdict(self), indent=1)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder; ``FileNotFoundError`` or ``ValueError`` says what is wrong with it."""
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no record: there is no {MANIFEST} in it. Record a training with wb.Recorder, or take "
                'in plain checkpoints with wb.Trajectory.adopt("folder/*.pt").'
            )
        try:
            held = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
        except ValueError as problem:
            raise ValueError(f"{path} is not valid JSON ({problem}); it was edited or damaged.") from None
        if held.pop("format", None) != FORMAT or held.pop("version", 0) > VERSION:
            raise ValueError(f"{path} is no {FORMAT} of version {VERSION} or older; a newer Workbench may read it.")
        return cls(**{name: value for name, value in held.items() if name in cls.__dataclass_fields__})


def tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(the tensors of the state dict, each once; names of further places that share a tensor -> its first name).

    The tensors are the model's own, detached: copy them before they change.
    """
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in unwrap(model).state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            continue
        if is_lazy(tensor):
            raise ValueError(f"{name} has no shape yet: pass one batch through the lazy model before recording it.")
        same = first.setdefault(_identity(name, tensor), name)
        if same == name:
            kept[name] = tensor.detach()
        else:
            tied[name] = same
    return kept, tied


def _identity(name: str, tensor: Tensor) -> Any:
    if not tensor.numel():
        return name
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the weights of a step lie."""
    return folder / CHECKPOINTS / f"step-{step:09d}.safetensors"


def optimizer_path(folder: Path, step: int) -> Path:
    """Where the optimizer's state of a step lies, if it was kept."""
    return folder / CHECKPOINTS / f"step-{step:09d}.optimizer.safetensors"


def checkpoint_steps(folder: Path) -> tuple[int, ...]:
    """The steps that have weights on disk, ascending; half-written and foreign files are not seen."""
    found = (_CHECKPOINT.match(p.name) for p in (folder / CHECKPOINTS).glob("step-*.safetensors"))
    return tuple(sorted(int(m[1]) for m in found if m))


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write tensors and texts as one safetensors file: whole or not at all."""
    from safetensors.torch import save_file

    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        host = tensor.detach().cpu().contiguous()
        place = host.untyped_storage().data_ptr()
        # The format wants each tensor in memory of its own.
        apart[name] = host.clone() if place in seen or host.untyped_storage().nbytes() > host.nbytes else host
        seen.add(place)
    # safetensors 0.8 writes a file that it cannot read where there are neither tensors nor texts but an empty dict.
    _replace(path, lambda beside: save_file(apart, beside, metadata=dict(header) or None))


def write_text(path: Path, words: str) -> None:
    """Write a text file: whole or not at all."""
    _replace(path, lambda beside: beside.write_text(words, encoding="utf-8"))


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.touch()
        mode = beside.stat().st_mode
        write(beside)
        beside.chmod(mode)  # safetensors makes files that only their owner may read
        _flush(beside)
        os.replace(beside, path)
        _flush(path.parent)
    except Exception as problem:
        if "os error 28" in str(problem) or getattr(problem, "errno", None) == errno.ENOSPC:
            raise full(path) from problem
        raise
    finally:
        beside.unlink(missing_ok=True)


def full(path: Path) -> OSError:
    """The error for a disk without room."""
    return OSError(
        errno.ENOSPC,
        f"the disk is full: {path.name} was not written, and what was recorded before is whole. Free some room or "
        "record to another disk; training can be resumed into the same folder",
        str(path.parent),
    )


def _flush(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; ``ValueError`` when it is damaged."""
    from safetensors.torch import load_file

    return _whole(path, lambda: load_file(path))


def load_header(path: Path) -> dict[str, str]:
    """The texts in a safetensors file's header, without reading its tensors."""
    from safetensors import safe_open

    def read() -> dict[str, str]:
        with safe_open(path, framework="pt") as opened:
            return dict(opened.metadata() or {})

    return _whole(path, read)


def _whole(path: Path, read: Callable[[], T]) -> T:
    from safetensors import SafetensorError

    try:
        return read()
    except SafetensorError as problem:
        raise ValueError(f"{path} is damaged or cut short ({problem}); delete it to go on without it.") from None


def pack(value: Any, name: str = "data") -> tuple[dict[str, Tensor], Any]:
    """Nested tuples, lists and dicts of tensors and plain values as (tensors by name, JSON that tells their places)."""
    if isinstance(value, Tensor):
        return {name: value}, {"tensor": name}
    if isinstance(value, Mapping):
        items = cast("Mapping[str, Any]", value).items()
        return _packed("dict", {str(k): pack(v, f"{name}.{k}") for k, v in items})
    if isinstance(value, tuple | list):
        parts = {str(i): pack(v, f"{name}.{i}") for i, v in enumerate(cast("Iterable[Any]", value))}
        return _packed("tuple" if isinstance(value, tuple) else "list", parts)
    if value is None or isinstance(value, bool | int | float | str):
        return {}, {"value": value}
    raise TypeError(f"examples that hold a {type(value).__name__} cannot be stored; give tensors or 'module:callable'.")


def _packed(kind: str, parts: Mapping[str, tuple[dict[str, Tensor], Any]]) -> tuple[dict[str, Tensor], Any]:
    tensors = {name: tensor for held, _ in parts.values() for name, tensor in held.items()}
    return tensors, {kind: {key: place for key, (_, place) in parts.items()}}


def unpack(tensors: Mapping[str, Tensor], place: Any) -> Any:
    """What :func:`pack` took apart."""
    ((kind, held),) = place.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "value":
        return held
    parts = {key: unpack(tensors, inner) for key, inner in held.items()}
    return parts if kind == "dict" else {"tuple": tuple, "list": list}[kind](parts.values())


@dataclass(frozen=True)
class Line:
    """One line of ``scalars.jsonl``: a step with scalars, or (``resumed``) the mark that training went on from there.

    ``time`` is seconds since 1970; ``cost`` what recording has cost so far, ``training`` what all the rest took, in
    seconds.
    """

    step: int
    time: float
    cost: float = 0.0
    values: Mapping[str, float] = field(default_factory=dict[str, float])
    resumed: bool = False
    training: float = 0.0

    def to_bytes(self) -> bytes:
        """The line with its line break; NaN and infinities are kept as words."""
        if not self.resumed:
            return line_bytes(self.step, self.time, self.cost, self.values, self.training)
        training = f', "training": {self.training:.6f}' if self.training else ""
        head = f'{{"step": {self.step}, "time": {self.time:.4f}, "cost": {self.cost:.6f}{training}'
        return (head + ', "resumed": true}\n').encode()

    @classmethod
    def parse(cls, line: bytes) -> Line:
        """The line again."""
        held = json.loads(line)
        values = {name: float(value) for name, value in held.get("values", {}).items()}
        training = held.get("training", 0.0)
        return cls(held["step"], held["time"], held["cost"], values, held.get("resumed", False), training)


_quoted = lru_cache(maxsize=1000)(json.dumps)


def line_bytes(step: int, time: float, cost: float, values: Mapping[str, float], training: float) -> bytes:
    """A line of scalars, whose fields are those of :class:`Line`, without making one.

    Written by hand, as a training waits for it at every step: json.dumps takes three times as long. And in one piece:
    training has pushed this code out of the caches by then, so that each further function costs some microseconds.
    """
    held = f'{{"step": {step}, "time": {time:.4f}, "cost": {cost:.6f}, "training": {training:.6f}, "values": {{'
    if not training:
        held = held.replace(', "training": 0.000000', "", 1)
    comma = ""
    for name, value in values.items():
        held += comma + _quoted(name) + (f": {value!r}" if value - value == 0.0 else f': "{value}"')  # nan for inf, nan
        comma = ", "
    return (held + "}}\n").encode()


def read_lines(path: Path) -> tuple[tuple[Line, ...], int]:
    """(lines that still hold, ascending in step; bytes of the file up to the last line break).

    Where training was resumed from an earlier step, later lines of the first attempt no longer hold. A last line that
    was cut short is left out, and so is one that is no longer readable. About 5 µs a line; remembered while the file
    stays the same.
    """
    try:
        state = path.stat()
    except FileNotFoundError:
        return (), 0
    return _read_lines(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=8)
def _read_lines(path: Path, size: int, time: int) -> tuple[tuple[Line, ...], int]:
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    held: dict[int, Line] = {}
    for line in filter(None, map(_parsed, whole.splitlines())):
        if line.resumed:
            held = {step: old for step, old in held.items() if step <= line.step}
        else:
            held[line.step] = line
    return tuple(held[step] for step in sorted(held)), len(whole)


def _parsed(raw: bytes) -> Line | None:
    try:
        return Line.parse(raw)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def runs_in(folder: str | Path) -> dict[str, Path]:
    """Every recorded run at or below a folder, by its path from there; not those that have no checkpoint yet.

    Raises:
        FileNotFoundError: there is none.
    """
    root = Path(folder)
    begun = [p.parent for p in sorted(root.rglob(MANIFEST)) if checkpoint_steps(p.parent)]
    found = {path.relative_to(root).as_posix(): path for path in begun}
    if not found:
        raise FileNotFoundError(f"{root} holds no recorded runs; record one with wb.Recorder, or name another folder.")
    return {root.name if name == "." else name: path for name, path in found.items()}
