"""Fingerprints: short hashes that are equal when, and only when, what is measured is the same."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn


def digest(*parts: Any) -> str:
    """A 32-digit hex hash (BLAKE2b) of tensors, arrays, functions, modules and plain values, nested as they come.

    Tensors enter with type, shape and bytes; functions with name, code, defaults and closure; modules with
    their printed form and their state. About 1 ns a byte.
    """
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        _add(state, part, 0)
    return state.hexdigest()


def _add(state: Any, part: Any, depth: int) -> None:
    """Feed one part, its kind first, so that no two kinds collide."""
    if depth > 12:
        state.update(f"deep:{type(part).__qualname__};".encode())
    elif isinstance(part, Tensor):
        _tensor(state, part)
    elif isinstance(part, np.ndarray):
        state.update(f"array:{part.dtype}:{part.shape};".encode())
        state.update(np.ascontiguousarray(part).tobytes() if part.dtype != object else repr(part.tolist()).encode())
    elif isinstance(part, nn.Module):
        state.update(f"module:{type(part).__module__}.{type(part).__qualname__}:{part!r};".encode())
        _add_all(state, sorted(_state(part).items()), depth)
    elif isinstance(part, dict):
        state.update(f"dict:{len(part)};".encode())
        _add_all(state, (x for item in cast("dict[Any, Any]", part).items() for x in item), depth)
    elif isinstance(part, (list, tuple)):
        state.update(f"list:{len(part)};".encode())
        _add_all(state, cast("list[Any]", part), depth)
    elif isinstance(part, (set, frozenset)):
        _add(state, sorted(map(repr, cast("set[Any]", part))), depth + 1)
    else:
        _other(state, part, depth)


def _add_all(state: Any, parts: Iterable[Any], depth: int) -> None:
    for part in parts:
        _add(state, part, depth + 1)


def _tensor(state: Any, tensor: Tensor) -> None:
    state.update(f"tensor:{tensor.dtype}:{tuple(tensor.shape)};".encode())
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    if flat.numel():
        state.update(cast("Any", flat.view(torch.uint8).numpy()))


def _state(module: nn.Module) -> dict[str, Any]:
    plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str)) and k != "training"}
    return {**plain, **dict(module.named_parameters()), **dict(module.named_buffers())}


def _other(state: Any, part: Any, depth: int) -> None:
    if isinstance(part, functools.partial):
        _add_all(state, ("partial", part.func, part.args, part.keywords), depth)
    elif isinstance(part, types.MethodType):
        _add_all(state, ("method", part.__func__, part.__self__), depth)
    elif isinstance(part, types.FunctionType):
        state.update(f"function:{part.__module__}.{part.__qualname__};".encode())
        cells = [_content(cell) for cell in part.__closure__ or ()]
        _add_all(state, (part.__code__, part.__defaults__, part.__kwdefaults__, cells), depth)
    elif isinstance(part, types.CodeType):
        state.update(b"code:" + part.co_code)
        _add_all(state, (part.co_consts, part.co_names), depth)
    elif isinstance(part, (type, types.BuiltinFunctionType)):
        state.update(f"name:{part.__module__}.{part.__qualname__};".encode())
    elif isinstance(part, (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, np.generic)):
        state.update(f"{type(part).__name__}:{part!r};".encode())
    else:  # an object: its class and what it holds; never its address
        state.update(f"object:{type(part).__module__}.{type(part).__qualname__};".encode())
        _add(state, dict(getattr(part, "__dict__", {})), depth + 1)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return "empty"


class TensorDigests:
    """Hashes of named tensors, each computed again only when the tensor's version has moved."""

    def __init__(self) -> None:
        self._known: tuple[Any, str] | None = None

    def __call__(self, version: tuple[Any, ...], tensors: dict[str, Tensor]) -> str:
        """The hash of all tensors and their names, remembered for as long as ``version`` stays."""
        if self._known is None or self._known[0] != version:
            self._known = version, digest(dict(sorted(tensors.items())))
        return self._known[1]
