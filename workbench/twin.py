"""A private twin of a module: the same tensors, but flags, submodules, hooks and attributes of its own."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

Replace = Callable[[Tensor], Tensor]
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)
_ATOMS = (str, bytes, int, float, complex, bool, type(None), type, types.FunctionType, types.BuiltinFunctionType)


def unwrap(module: nn.Module) -> nn.Module:
    """The user's own module inside ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(module, wrappers):
            module = module.module
        elif isinstance(inner := module.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            module = inner
        else:
            return module


def twin(module: nn.Module, replace: Replace = lambda tensor: tensor) -> nn.Module:
    """A module that computes the same function with the same tensors (or ``replace(tensor)`` of each), in eval mode.

    Submodules, containers, bound methods and partials that lead to the module lead to the twin instead; other
    objects are shared. Hooks are left behind except those of ``torch.nn.utils`` (the old ``weight_norm`` and
    ``spectral_norm`` compute the weight in one). Nothing is copied but dictionaries, so the cost is about 10 µs
    a submodule.

    Raises:
        TypeError: a TorchScript module, whose tensors cannot be exchanged.
    """
    return _Mirror(replace).module(module)


class _Mirror:
    """One pass over a module tree; ``made`` maps the identity of each original to its mirror image."""

    def __init__(self, replace: Replace) -> None:
        self.replace = replace
        self.made: dict[int, Any] = {}
        self.kept: list[Any] = []  # originals stay alive meanwhile, so that no identity is used twice

    def __call__(self, value: Any) -> Any:
        """The mirror image of anything that may sit in a module's attributes."""
        if isinstance(value, _ATOMS) and not isinstance(value, nn.Module):
            return value
        if id(value) in self.made:
            return self.made[id(value)]
        if isinstance(value, Tensor):
            return self._remember(value, self.replace(value))
        if isinstance(value, nn.Module):
            return self.module(value)
        return self._other(value)

    def module(self, module: nn.Module) -> nn.Module:
        """The twin of one module, filled only after it is known, since a child may lead back to its parent."""
        inner = unwrap(module)
        if isinstance(inner, torch.jit.ScriptModule):
            raise TypeError(
                f"{type(inner).__name__} is a TorchScript module, whose tensors cannot be exchanged; "
                "pass the eager nn.Module that it was made from."
            )
        if id(inner) not in self.made:
            made = self._remember(inner, object.__new__(type(inner)))
            made.__dict__.update({name: self._attribute(name, value) for name, value in inner.__dict__.items()})
            _own(made)
        return self._remember(module, self.made[id(inner)])

    def _attribute(self, name: str, value: Any) -> Any:
        if name in _HOOKS:
            return type(value)((key, hook) for key, hook in value.items() if is_torchs(hook))
        if name == "_compiled_call_impl":
            return None
        return self(value)

    def _other(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, dict):
            return self._fill(value, {}, lambda made: made.update((k, self(v)) for k, v in value.items()))
        if kind is list:
            return self._fill(value, [], lambda made: made.extend(map(self, value)))
        if isinstance(value, tuple):
            items = [self(v) for v in cast("tuple[Any, ...]", value)]
            return self._remember(value, kind(*items) if hasattr(value, "_fields") else tuple(items))
        if kind is types.MethodType:
            return self._remember(value, types.MethodType(value.__func__, self(value.__self__)))
        if kind is functools.partial:
            words = {k: self(v) for k, v in value.keywords.items()}
            return self._remember(value, functools.partial(self(value.func), *map(self, value.args), **words))
        return self._object(value)

    def _fill(self, value: Any, plain: Any, fill: Callable[[Any], None]) -> Any:
        try:
            made = self._remember(value, plain if type(value) in (dict, list) else _empty(value))
            fill(made)
        except (
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            NotImplementedError,
        ):  # a container with rules of its own
            return self._remember(value, value)
        return made

    def _object(self, value: Any) -> Any:
        """A helper object is copied only when it leads to modules or tensors; anything else is shared."""
        if isinstance(value, torch.optim.Optimizer) or not _leads_to_tensors(value, 3):
            return self._remember(value, value)
        try:
            made = self._remember(value, object.__new__(type(value)))
            made.__dict__.update({k: self(v) for k, v in vars(value).items()})
        except TypeError:
            return self._remember(value, value)
        return made

    def _remember(self, value: Any, made: Any) -> Any:
        self.made[id(value)] = made
        self.kept.append(value)
        return made


def _empty(value: Any) -> Any:
    made = type(value)()
    if len(made):
        raise TypeError("not empty when new")
    return made


def _own(made: nn.Module) -> None:
    """Flags of the twin's own; and no packing of recurrent weights, which would move the user's storage."""
    made.__dict__["training"] = False
    made.__dict__["train"] = functools.partial(_stay, made)
    if isinstance(made, nn.RNNBase):
        made.__dict__["flatten_parameters"] = _nothing


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stands in for ``train()`` on a twin: the mode is the subject's policy, also when an objective asks otherwise."""
    return module


def _nothing() -> None:
    pass


def is_torchs(hook: Any) -> bool:
    """Whether a hook belongs to ``torch.nn.utils`` and computes a weight, so that the function needs it."""
    maker = hook if isinstance(hook, (types.FunctionType, types.MethodType)) else type(hook)
    return str(getattr(maker, "__module__", "")).startswith("torch.nn.utils")


def _leads_to_tensors(value: Any, depth: int) -> bool:
    if isinstance(value, (Tensor, nn.Module)):
        return True
    if depth == 0 or isinstance(value, _ATOMS):
        return False
    if isinstance(value, dict):
        parts: Any = cast("dict[Any, Any]", value).values()
    elif isinstance(value, (list, tuple)):
        parts = cast("list[Any]", value)
    else:
        parts = getattr(value, "__dict__", {}).values()
    return any(_leads_to_tensors(part, depth - 1) for part in list(parts))
