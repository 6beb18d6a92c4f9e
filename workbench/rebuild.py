"""From a record back to objects: call a builder that a file names, and put recorded tensors into a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.resolve import resolve


class Untrusted(PermissionError):
    """A file asks to import code from outside Workbench, and nobody has allowed it."""


def call(reference: str, arguments: Mapping[str, Any], trust: bool, source: str) -> Any:
    """The result of ``"module:callable"`` with these arguments, leaving PyTorch's global random state alone.

    Raises:
        Untrusted: the module lies outside Workbench and ``trust`` is False; nothing was imported.
        RuntimeError: the callable failed; the message says how it was called.
    """
    _permit(reference, trust, source)
    function = resolve(reference)
    words = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    try:
        with _OwnRandomness():
            return function(**arguments)
    except Exception as problem:
        raise RuntimeError(
            f"{reference}({words}), which {source} names, failed: {type(problem).__name__}: {problem}. Mend it, or "
            "pass the model and data yourself."
        ) from problem


def look_up(reference: str, trust: bool, source: str) -> Any:
    """The function ``"module:callable"`` itself, under the same rule of trust."""
    _permit(reference, trust, source)
    return resolve(reference)


def _permit(reference: str, trust: bool, source: str) -> None:
    module = reference.partition(":")[0]
    if module == "workbench" or module.startswith("workbench.") or trust:
        return
    raise Untrusted(
        f"{source} asks to import and call {reference}, which is code from outside Workbench. If you trust it, open "
        "the record with trust=True (--trust on the command line); or pass model=, data= and loss= yourself."
    )


class _OwnRandomness(TorchDispatchMode):
    """Hands random operations of this thread a generator of their own.

    Saving and restoring the global state would not do: a training in another thread may be drawing from it meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded in func.tags and given.get("generator") is None:
            chosen = func if _takes_generator(func) else getattr(func.overloadpacket, "generator", None)
            place = self._place(given.get("device"), args)
            if chosen is not None and place.type != "meta":  # tensors without values draw nothing
                given["generator"] = self._generator(place)
                func = chosen
        return func(*args, **given)

    def _place(self, device: Any, args: Sequence[Any]) -> torch.device:
        first = next((a.device for a in args if isinstance(a, Tensor)), torch.device("cpu"))
        return torch.device(device) if device is not None else first

    def _generator(self, place: torch.device) -> torch.Generator:
        if place not in self.generators:
            self.generators[place] = torch.Generator(place).manual_seed(0)
        return self.generators[place]


def _takes_generator(func: Any) -> bool:
    return any(argument.name == "generator" for argument in func._schema.arguments)


def load_into(model: nn.Module, stored: Mapping[str, Tensor], source: str) -> None:
    """Give every parameter and buffer of ``model`` the recorded values, in the recorded precision.

    Tensors keep their identity, so that tied weights stay tied and ``requires_grad`` is kept. ``stored`` may hold a
    tensor under several names (tied when it was recorded); a prefix that all its names share is looked through.

    Raises:
        ValueError: names or shapes differ; the message names them with both shapes.
    """
    own = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    stored = _without_prefix(stored, own)
    names = {id(t): n for n, t in own.items() if n in stored}
    problems = [f"{n} is not in the record" for n, t in own.items() if id(t) not in names]
    problems += [f"{n} is not in the model" for n in stored if n not in own]
    problems += [
        f"{n} has shape {tuple(t.shape)} in the record and {tuple(own[n].shape)} in the model"
        for n, t in stored.items()
        if n in own and t.shape != own[n].shape
    ]
    problems += _torn(stored, own)
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{source} does not fit {type(model).__name__}: {'; '.join(problems[:3])}{more}. Pass a model that is "
            "built as the recorded one was."
        )
    with torch.no_grad():
        _tie(model, stored, own)
        for name, tensor in own.items():
            if name in stored:
                tensor.data = stored[name].to(tensor.device, copy=True)


def _torn(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Places that the model ties together although their recorded values differ."""
    first: dict[int, str] = {}
    found: list[str] = []
    for name in (n for n in own if n in stored):
        other = first.setdefault(id(own[name]), name)
        same = stored[name] is stored[other] or (
            stored[name].shape == stored[other].shape and torch.equal(_bits(stored[name]), _bits(stored[other]))
        )
        if not same:
            found.append(f"{name} and {other} are one tensor in the model and two in the record")
    return found


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _without_prefix(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Names as the model spells them: ``module.``, ``_orig_mod.``, ``model.`` before every name are dropped."""
    if not own or any(name in stored for name in own):
        return stored
    for name in stored:
        for wanted in own:
            prefix = name.removesuffix(wanted)
            if name.endswith("." + wanted) and all(prefix + n in stored for n in own):
                return {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}
    return stored


def _tie(model: nn.Module, stored: Mapping[str, Tensor], own: dict[str, Tensor]) -> None:
    """Where the record holds one tensor under two names and the model two, make the model hold one as well."""
    first: dict[int, str] = {}
    for name, tensor in stored.items():
        other = first.setdefault(id(tensor), name)
        if own[other] is not own[name]:
            place, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(place), leaf, own[other])
            own[name] = own[other]
