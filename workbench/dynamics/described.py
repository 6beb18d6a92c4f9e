"""A training put into words for its record: functions by name, tensors by shape, an optimizer by its settings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from workbench import record
from workbench.dynamics.pending import late

_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
TAKEN = ("wall_time", "recorder_seconds")
"""Names of scalars that the recorder writes itself."""


def number(name: str, value: float | Tensor, told: str = "step") -> float:
    """A scalar that the recorder's method ``told`` was given, as a number; waits where it is a tensor on a GPU.

    Raises:
        TypeError: not one number.
    """
    try:
        return float(value.detach().item() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise TypeError(f"recorder.{told}({name}=...) takes one number; got a {type(value).__name__}{shape}.") from None


def parted(
    scalars: Mapping[str, float | Tensor], told: str | None = "step"
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """(numbers that are known, tensors of one element that a GPU may still have to compute).

    ``told`` is the method by which a person told them; None: gauges read them.
    """
    now: dict[str, float] = {}
    later: dict[str, Tensor] = {}
    for name, value in scalars.items():
        if told and name in TAKEN:
            raise ValueError(f"recorder.{told}({name}=...): the recorder writes {name} itself; choose another name.")
        if late(value) and cast("Tensor", value).numel() == 1:
            later[name] = cast("Tensor", value)
        else:
            now[name] = number(name, value, told or "step")
    return now, later


def named(what: str, value: Any, bare: bool = False) -> str | None:
    """``"module:callable"`` for a function or such a text; ``bare`` lets a plain name through as well.

    Raises:
        ValueError: nothing that others could import.
    """
    if value is None or (bare and isinstance(value, str) and ":" not in value):
        return value
    name = value if isinstance(value, str) else f"{value.__module__}:{getattr(value, '__qualname__', '<object>')}"
    if not _REFERENCE.fullmatch(name) or name.startswith("__main__:"):
        raise ValueError(
            f'Recorder({what}=...) must be text such as "mypackage.nets:resnet" or a function at the top of an '
            f"importable module, so that others can find it; got {name!r}."
        )
    return name


def jsonable(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A builder's arguments as JSON gives them back; ``TypeError`` for others."""
    try:
        return json.loads(json.dumps(dict(arguments), allow_nan=False))
    except (TypeError, ValueError) as problem:
        raise TypeError(f"Recorder(build_args=...) must be values that JSON can hold; {problem}.") from None


def shapes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Shape and dtype of each tensor of the state dict, tied ones once."""
    kept, _ = record.tensors_of(model)
    return {n: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for n, t in kept.items()}


def shape(held: Mapping[str, Any] | None) -> str:
    """One of them in words."""
    return f"{held['dtype']} of shape {tuple(held['shape'])}" if held else "absent"


def inner(optimizer: torch.optim.Optimizer | None) -> torch.optim.Optimizer | None:
    """The optimizer of PyTorch inside a training library's wrapper."""
    held = getattr(optimizer, "optimizer", None)
    return held if isinstance(held, torch.optim.Optimizer) else optimizer


def of_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], str]:
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
