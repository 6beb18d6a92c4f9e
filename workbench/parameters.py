"""Which tensors of a model are θ: checks of the model, choice by name, and the flat vector."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from workbench.optimizers import Optimizer, state_of
from workbench.shell import Norm

Choice = str | Iterable[str] | Callable[[str, Tensor], bool] | None
HALVES = (torch.bfloat16, torch.float16)


def check_model(module: nn.Module) -> None:
    """Raise before any work for models that cannot be evaluated as one function on one device.

    Raises:
        TypeError: not a module, or parameters that do not exist yet.
        ValueError: split over devices, on the meta device, sharded, complex, or without floating-point parameters.
    """
    if not isinstance(module, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"model must be a torch.nn.Module; got {type(module).__name__}.")
    named = dict(module.named_parameters())
    for name, p in named.items():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise TypeError(
                f"{name} has no shape yet (a lazy module): run the model once on a batch, then make the Subject."
            )
        if hasattr(p, "placements"):
            raise ValueError(f"{name} is sharded over processes; gather the full model on one device first.")
        if p.is_complex():
            raise ValueError(f"{name} is complex ({p.dtype}); curvature is defined here for real parameters only.")
    if not any(p.is_floating_point() for p in named.values()):
        raise ValueError(f"{type(module).__name__} has no floating-point parameters, so there is nothing to look at.")
    _check_place({**named, **dict(module.named_buffers())})


def settle_norm(module: nn.Module, norm: Norm | None, batch_size: int | None) -> Norm:
    """The policy for BatchNorm: as asked, else "eval"; always "batch" for a model without running statistics.

    Raises:
        ValueError: a policy that does not exist, or batches of no examples.
    """
    if norm not in (None, "eval", "batch", "recompute"):
        raise ValueError(f"norm must be 'eval', 'batch' or 'recompute'; got {norm!r}.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    bare = any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None for m in module.modules())  # pyright: ignore[reportPrivateUsage]
    return "batch" if bare else norm or "eval"


def settle_device(own: torch.device, wanted: str | torch.device) -> torch.device:
    """The device to compute on: the model's own for "auto".

    Raises:
        ValueError: a device that is not there.
    """
    device = own if wanted == "auto" else torch.device(wanted)
    if device.type == "meta" or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(
            f"device {str(wanted)!r} is not available here; use device='auto', where the model is ({own})."
        )
    return device


def _check_place(tensors: Mapping[str, Tensor]) -> None:
    places: dict[str, str] = {}
    for name, tensor in tensors.items():
        places.setdefault(str(tensor.device), name)
    if "meta" in places:
        raise ValueError(f"{places['meta']} is on the meta device and has no values; load the weights first.")
    if len(places) > 1:
        where = ", ".join(f"{name} on {place}" for place, name in places.items())
        raise ValueError(f"the model is split over devices ({where}); move it to one with model.to(device).")


def working_dtype(tensors: Iterable[Tensor], wanted: torch.dtype | None) -> tuple[torch.dtype, str | None]:
    """The precision to compute in (float32 for half precision), and the words for a change of it."""
    found = {t.dtype for t in tensors if t.is_floating_point()}
    widest = max(found, key=lambda d: torch.finfo(d).bits)
    names = " and ".join(sorted(_short(d) for d in found))
    if wanted is not None:
        if not wanted.is_floating_point or wanted in HALVES:
            raise ValueError(
                f"dtype must be torch.float32 or torch.float64 (half precision hides curvature); got {wanted}."
            )
        return wanted, None if found == {wanted} else f"computed in a {_short(wanted)} copy of the {names} weights"
    if found & set(HALVES):
        wide = widest if widest not in HALVES else torch.float32
        return (
            wide,
            f"computed in a {_short(wide)} copy of the {names} weights: the {_short(wide)} function at those weights",
        )
    return widest, None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def choose(module: nn.Module, choice: Choice) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the chosen parameters in ``named_parameters`` order (tied ones once), and notes on what was left out.

    ``choice`` is a name, a module's name, a glob, several of these, or a predicate (name, tensor) -> bool. None
    takes those that require gradients.

    Raises:
        ValueError: a name that matches nothing (close matches are listed), or nothing chosen.
    """
    named = {n: p for n, p in module.named_parameters() if p.is_floating_point()}
    if choice is None:
        kept = [n for n, p in named.items() if p.requires_grad]
        if not kept:
            raise ValueError(
                "every parameter is frozen (requires_grad=False); name some with parameters=, or unfreeze them."
            )
    elif callable(choice):
        kept = [n for n, p in named.items() if choice(n, p)]
    else:
        kept = _by_names(module, named, (choice,) if isinstance(choice, str) else tuple(choice))
    if not kept:
        raise ValueError(f"parameters= chose none of the {len(named)} parameters: {', '.join(list(named)[:8])}, ...")
    return tuple(kept), _words(named, kept, choice)


def narrowed(module: nn.Module, names: tuple[str, ...], choice: Choice) -> tuple[str, ...]:
    """Those of ``names`` that ``choice`` takes; ValueError where it takes none of them."""
    wanted = choose(module, choice)[0]
    inside = tuple(name for name in names if name in wanted)
    if not inside:
        raise ValueError(f"{choice!r} names none of the subject's parameters: {', '.join(names[:8])}.")
    return inside


def _by_names(module: nn.Module, named: Mapping[str, Tensor], patterns: tuple[str, ...]) -> list[str]:
    names = {id(p): n for n, p in named.items()}
    every = {n: names[id(p)] for n, p in module.named_parameters(remove_duplicate=False) if id(p) in names}
    chosen: set[str] = set()
    for pattern in patterns:
        found = {
            c
            for n, c in every.items()
            if n == pattern or n.startswith(pattern + ".") or fnmatch.fnmatchcase(n, pattern)
        }
        if not found:
            close = difflib.get_close_matches(pattern, every, n=3, cutoff=0.4) or list(every)[:5]
            raise ValueError(f"no parameter is called or matched by {pattern!r}; did you mean {', '.join(close)}?")
        chosen |= found
    return [n for n in named if n in chosen]


def _words(named: Mapping[str, Tensor], kept: list[str], choice: Choice) -> tuple[str, ...]:
    left = [n for n in named if n not in set(kept)]
    if not left:
        return ()
    what = "frozen parameters are excluded" if choice is None else f"only {len(kept)} of {len(named)} parameters vary"
    count = sum(named[n].numel() for n in left)
    listed = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
    return (f"{what}: {listed} ({count} scalars) held fixed",)


def flatten(tensors: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    """The named tensors as one vector, in that order."""
    missing = [n for n in names if n not in tensors]
    if missing:
        raise KeyError(f"no tensor for parameter {missing[0]!r}; flatten() wants every name in subject.params.")
    return torch.cat([tensors[n].reshape(-1) for n in names])


def unflatten(vector: Tensor, like: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The vector cut into views of the shapes of ``like``, in its order, converted where ``dtype`` is another."""
    size = sum(t.numel() for t in like.values())
    if vector.shape != (size,):
        raise ValueError(f"unflatten() wants a vector of {size} entries; got shape {tuple(vector.shape)}.")
    parts = vector.split([t.numel() for t in like.values()])
    return {n: part.reshape(t.shape).to(dtype) for part, (n, t) in zip(parts, like.items(), strict=True)}


def filter_axes(module: nn.Module) -> dict[str, int]:
    """The axis that counts filters, for each weight where it is not the first: transposed convolutions count on axis 1.

    Rows of Linear and Embedding and output channels of convolutions lie on axis 0. In a grouped transposed
    convolution axis 1 counts the filters of one group, and all groups share a scale.
    """
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return {
        f"{name}.weight" if name else "weight": 1 for name, m in module.named_modules() if isinstance(m, transposed)
    }


def optimizer_settings(optimizer: Optimizer) -> tuple[str, list[dict[str, object]]]:
    """An optimizer's class and its groups' settings, without the parameters."""
    held = state_of(optimizer, {})
    return held.kind, [dict(group) for group in held.param_groups]
