"""Checkpoints of anyone's making, read as a record: state dicts, Lightning's, safetensors, Hugging Face's folders."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import pickle
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from workbench import record

NESTS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params", "ema")
"""Where training scripts commonly put the weights inside a checkpoint, in the order in which they are looked for."""


WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "diffusion_pytorch_model.safetensors",
)
"""Files that hold the weights in a folder that Hugging Face's libraries wrote, in the order in which they are tried."""
CURVES = "trainer_state.json"
_USUAL = (r"step\D{0,2}(\d+)", r"(\d+)")


def find(pattern: str | Path, step: str | None) -> dict[int, Path]:
    """The files or folders that match a glob, by the step that the regular expression reads off their names.

    The file's own name is read first, then its folder's (``checkpoint-500/model.safetensors``). Without an expression
    the number after the word step counts (``epoch=3-step=400.ckpt``), else the first one.

    Raises:
        FileNotFoundError: nothing matches, or a folder holds no weights.
        ValueError: a name without a step, or two with the same one.
    """
    paths = sorted(Path(p) for p in glob.glob(str(pattern), recursive=True))
    if not paths:
        raise FileNotFoundError(f"no file matches {str(pattern)!r}; say where the checkpoints lie, as in 'ckpts/*.pt'.")
    wanted = [re.compile(words) for words in ((step,) if step is not None else _USUAL)]
    told = repr(wanted[-1].pattern)
    found: dict[int, Path] = {}
    for path in map(_weights, paths):
        number = _step(path, wanted)
        if number in found:
            raise ValueError(
                f"{found[number].name} and {path.name} both stand for step {number} under step={told}; write an "
                "expression whose first group is the step alone."
            )
        found[number] = path
    return dict(sorted(found.items()))


def _weights(path: Path) -> Path:
    """The file with the weights: the path itself, or what a folder of Hugging Face's has."""
    if not path.is_dir():
        return path
    held = next((path / name for name in WEIGHTS if (path / name).exists()), None)
    if held is None:
        raise FileNotFoundError(
            f"the folder {path} holds none of {', '.join(WEIGHTS)}; name the weights' files instead."
        )
    return held


def _step(path: Path, wanted: list[re.Pattern[str]]) -> int:
    named = path.name not in WEIGHTS  # their names are the same in every folder
    places = (path.name, path.parent.name) if named else (path.parent.name,)
    match = next((m for text in places for expression in wanted if (m := expression.search(text))), None)
    text = match[1 if match.re.groups else 0] if match else ""
    if not text.isdigit():
        raise ValueError(
            f"step={wanted[-1].pattern!r} reads no number off {path.parent.name}/{path.name}; write an expression "
            r"whose first group is the step, as in r'step_(\d+)', or a narrower pattern of files."
        )
    return int(text)


def load(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's state dict, by name, on the CPU. No code in the file is run."""
    if path.suffix == ".safetensors":
        return record.load_tensors(path)
    if path.name.endswith(".index.json"):
        return _sharded(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        raise ValueError(
            f"{path} holds more than tensors and plain values, and reading that would run code from the file; it was "
            "not read. Where you trust it, load it yourself and save model.state_dict() alone. "
            f"({str(problem).splitlines()[0][:200]})"
        ) from None
    except (RuntimeError, EOFError, ValueError) as problem:
        raise ValueError(f"{path} is damaged or no torch.save file: {str(problem).splitlines()[0]}") from None
    return _state_dict(held, path)


def _sharded(path: Path) -> dict[str, Tensor]:
    """Weights in several files, as an index lists them."""
    try:
        places = cast("dict[str, str]", json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"{path} is no index of weights: {problem!r}.") from None
    files = {name: load(path.parent / Path(name).name) for name in sorted(set(places.values()))}
    return {name: files[place][name] for name, place in places.items()}


def curves(files: Mapping[int, Path]) -> tuple[record.Line, ...]:
    """What Hugging Face's trainer logged, from the last checkpoint that has its state; nothing for other files."""
    for path in reversed(list(files.values())):
        state = path.parent / CURVES
        if state.exists() and path.name in WEIGHTS:
            return _logged(json.loads(state.read_text(encoding="utf-8")).get("log_history", []))
    return ()


def _logged(history: list[dict[str, Any]]) -> tuple[record.Line, ...]:
    steps: dict[int, dict[str, float]] = {}
    for entry in history:
        held = steps.setdefault(int(entry["step"]), {})
        held |= {n: float(v) for n, v in entry.items() if n != "step" and isinstance(v, int | float)}
    return tuple(record.Line(step, math.nan, math.nan, held) for step, held in sorted(steps.items()))


def _state_dict(held: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(held, Mapping):
        raise ValueError(f"{path} holds a {type(held).__name__}, not a state dict; save model.state_dict().")
    outer = cast("Mapping[str, Any]", held)
    for inner in (outer, *(outer[n] for n in NESTS if n in outer)):
        tensors = _tensors(inner)
        if tensors:
            return tensors
    raise ValueError(
        f"{path} holds no state dict: among {', '.join(map(str, outer))} none is a mapping of names to tensors; the "
        f"usual places are {', '.join(NESTS)}."
    )


def _tensors(held: Any) -> dict[str, Tensor]:
    """A mapping's tensors when it is a state dict (names to tensors, beside an odd extra state), else nothing."""
    if not isinstance(held, Mapping):
        return {}
    items = cast("Mapping[Any, Any]", held)
    extra = [k for k, v in items.items() if not isinstance(v, Tensor) and not str(k).endswith("_extra_state")]
    return {} if extra else {str(k): v for k, v in items.items() if isinstance(v, Tensor)}


def digest(path: Path) -> str:
    """A hash of the file's bytes; remembered as long as its size and time stay the same."""
    state = path.stat()
    return _digest(str(path), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)
def _digest(path: str, size: int, time: int) -> str:
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
