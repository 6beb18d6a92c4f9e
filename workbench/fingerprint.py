"""Fingerprints: short hashes that are equal when, and only when, what is measured is the same."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, np.generic)


def digest(*parts: Any) -> str:
    """A 32-digit hex hash (BLAKE2b) of tensors, arrays, functions, modules and plain values, nested as they come.

    Tensors enter with type, shape and bytes; functions with name, code, defaults and closure, but not with the globals
    that they call; modules with their printed form and their state; other objects with their class and attributes.
    About 1 ns a byte.
    """
    hasher = _Hasher()
    return _join("digest", map(hasher, parts)).hex()


def _join(kind: str, parts: Iterable[bytes] = ()) -> bytes:
    """The hash of a kind and the hashes of its parts; the kind keeps equal bytes of different kinds apart."""
    made = hashlib.blake2b(kind.encode(), digest_size=16)
    for part in parts:
        made.update(part)
    return made.digest()


class _Hasher:
    """Hashes by content, each object once; an object inside itself is a mark."""

    def __init__(self) -> None:
        self.known: dict[int, bytes] = {}
        self.kept: list[Any] = []  # alive meanwhile, so that no identity is used twice

    def __call__(self, part: Any) -> bytes:
        """The hash of anything."""
        if isinstance(part, _PLAIN):
            return _join(f"{type(part).__name__}:{part!r}")
        if id(part) not in self.known:
            self.kept.append(part)
            self.known[id(part)] = b"inside itself"
            self.known[id(part)] = self._compound(part)
        return self.known[id(part)]

    def _compound(self, part: Any) -> bytes:
        if isinstance(part, Tensor):
            return _tensor(part)
        if isinstance(part, np.ndarray):
            data = repr(part.tolist()).encode() if part.dtype == object else np.ascontiguousarray(part).tobytes()
            return _join(f"array:{part.dtype}:{part.shape}", [data])
        if isinstance(part, nn.Module):
            return self._all(f"module:{_name(type(part))}:{part!r}", _state(part))
        if isinstance(part, Mapping):
            return self._all("mapping", cast("Mapping[Any, Any]", part))
        if isinstance(part, (list, tuple)):
            return _join("list", map(self, cast("list[Any]", part)))
        if isinstance(part, (set, frozenset)):
            return _join("set", sorted(map(self, cast("set[Any]", part))))
        return self._callable(part)

    def _all(self, kind: str, named: Mapping[Any, Any]) -> bytes:
        return _join(kind, (self(x) for item in named.items() for x in item))

    def _callable(self, part: Any) -> bytes:
        if isinstance(part, functools.partial):
            return _join("partial", map(self, (part.func, part.args, part.keywords)))
        if isinstance(part, types.MethodType):
            return _join("method", map(self, (part.__func__, part.__self__)))
        if isinstance(part, types.FunctionType):
            cells = [_content(cell) for cell in part.__closure__ or ()]
            kept = (part.__code__, part.__defaults__, part.__kwdefaults__, cells)
            return _join(f"function:{_name(part)}", map(self, kept))
        if isinstance(part, types.CodeType):
            return _join("code", map(self, (part.co_code, part.co_consts, part.co_names)))
        if isinstance(part, (type, types.BuiltinFunctionType)):
            return _join(f"name:{_name(part)}")
        return self._all(f"object:{_name(type(part))}", dict(getattr(part, "__dict__", {})))


def _name(part: Any) -> str:
    return f"{part.__module__}.{part.__qualname__}"


def _tensor(tensor: Tensor) -> bytes:
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    data = [cast("Any", flat.view(torch.uint8).numpy())] if flat.numel() else []
    return _join(f"tensor:{tensor.dtype}:{tuple(tensor.shape)}", data)


def _state(module: nn.Module) -> dict[str, Any]:
    """A module's settings, parameters and buffers, in the order of their names."""
    plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str)) and k != "training"}
    return dict(sorted({**plain, **dict(module.named_parameters()), **dict(module.named_buffers())}.items()))


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return "empty"


class TensorDigests:
    """The hash of named tensors, computed again only when their version has moved."""

    def __init__(self) -> None:
        self._known: tuple[Any, str] | None = None

    def __call__(self, version: tuple[Any, ...], tensors: Mapping[str, Tensor]) -> str:
        """The hash of all tensors and their names, remembered for as long as ``version`` stays."""
        if self._known is None or self._known[0] != version:
            self._known = version, digest(dict(sorted(tensors.items())))
        return self._known[1]
