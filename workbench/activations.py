"""Features of named layers, streamed over a subject's examples. Hooks sit on the subject's shell, always removed."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from workbench.data import Batch
from workbench.shell import precise
from workbench.subject import Subject

Side = Literal["input", "output"]

AUTOMATIC = 32
"""At most so many layers are chosen by themselves."""
_TRIED = 8


@dataclass(frozen=True)
class Layer:
    """A place in the network: a module's name and which side of it is read."""

    name: str
    side: Side = "output"


@dataclass(frozen=True, eq=False)
class Classifier:
    """The last affine map of a network: logits = ``weight`` · features + ``bias``; ``weight`` is (classes, d).

    ``weight`` and ``bias`` are None where the features of another layer were asked for.
    """

    layer: Layer
    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Caught:
    """What one batch produced: its outputs and the features of each layer asked for."""

    batch: Batch
    outputs: Tensor
    features: Mapping[Layer, Tensor]


def stream(subject: Subject, layers: tuple[Layer, ...], params: Mapping[str, Tensor] | None = None) -> Iterator[Caught]:
    """Run over the examples once, without gradients, and yield each batch with the features of ``layers``.

    A module that runs several times in one forward gives its last call. Memory: one batch of features.

    Raises:
        ValueError: a layer does not exist (the message lists close names) or did not run.
    """
    for layer in layers:
        module_named(subject, layer.name)
    for batch in subject.batches():
        yield catch(subject, layers, batch, params)


def catch(
    subject: Subject, layers: tuple[Layer, ...], batch: Batch, params: Mapping[str, Tensor] | None = None
) -> Caught:
    """One batch with its outputs and the features of ``layers``: also a batch whose inputs were exchanged."""
    kept: dict[Layer, Tensor] = {}
    with subject.lock, torch.no_grad(), precise(subject.device), _hooked(subject, layers, kept):
        outputs = subject.batch_outputs(params or subject.params, batch)
    _all_ran(layers, kept)
    return Caught(batch, outputs, kept)


def _all_ran(layers: tuple[Layer, ...], kept: Mapping[Layer, Tensor]) -> None:
    silent = [layer.name for layer in layers if layer not in kept]
    if silent:
        raise ValueError(f"layer {silent[0]!r} did not run (or gave no tensor) on this data; choose one that does.")


def gradients(subject: Subject, layers: tuple[Layer, ...]) -> Iterator[Caught]:
    """Run over the examples once, forwards and backwards: each example's ∂ℓ/∂(output) for each of ``layers``.

    ``features`` of what is yielded are these gradients, in the shapes of the layers' outputs, and ``outputs`` the
    losses ℓ of the examples. All layers share one backward pass, frozen ones too. Memory: one chunk's graph.

    Raises:
        ValueError: a layer does not exist or did not run, its input is asked for, or examples touch each other
            (``norm="batch"``, or a loss that does not come apart), so that no gradient belongs to one of them.
    """
    for layer in layers:
        module_named(subject, layer.name)
        if layer.side == "input":
            raise ValueError(f"gradients are of layers' outputs; got the input of {layer.name!r}. Name the one before.")
    if subject.norm == "batch":
        raise ValueError("an example has no gradient of its own where BatchNorm mixes a batch; use norm='eval'.")
    for batch in subject.batches():
        yield _differentiate(subject, layers, batch)


def _differentiate(subject: Subject, layers: tuple[Layer, ...], batch: Batch) -> Caught:
    shifts: dict[Layer, Tensor] = {}
    with subject.lock, torch.enable_grad(), precise(subject.device):
        with ExitStack() as stack:
            for layer in layers:
                stack.callback(_shift(module_named(subject, layer.name), layer, shifts).remove)
            losses = subject.batch_losses(subject.params, batch)
        _all_ran(layers, shifts)
        if losses is None:
            raise ValueError("an example has no gradient of its own: the loss couples the examples of a batch.")
        found = torch.autograd.grad(losses.sum(), list(shifts.values()), allow_unused=True, materialize_grads=True)
    return Caught(batch, losses.detach(), dict(zip(shifts, found, strict=True)))


def _shift(module: nn.Module, layer: Layer, shifts: dict[Layer, Tensor]) -> Any:
    """Add zeros to a module's output, with respect to which the loss is then differentiated."""

    def add(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        found = first_tensor(output)
        if found is None or not found.is_floating_point():
            return None
        shifts[layer] = torch.zeros_like(found, requires_grad=True)
        return _with_first(output, found + shifts[layer])

    return module.register_forward_hook(add)


def _with_first(value: Any, new: Tensor) -> Any:
    """The same output with another tensor where :func:`first_tensor` finds it."""
    if isinstance(value, Tensor):
        return new
    if isinstance(value, Mapping):
        held = cast("dict[str, Any]", copy.copy(cast("Any", value)))
        name = "logits" if "logits" in held else next(iter(held))
        held[name] = _with_first(held[name], new)
        return held
    first, *rest = cast("tuple[Any, ...]", value)
    parts = (_with_first(first, new), *rest)
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


@contextmanager
def _hooked(subject: Subject, layers: tuple[Layer, ...], kept: dict[Layer, Tensor]) -> Generator[None]:
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(_hook(module_named(subject, layer.name), layer, kept).remove)
        yield


def _hook(module: nn.Module, layer: Layer, kept: dict[Layer, Tensor]) -> Any:
    def keep(_module: nn.Module, inputs: Any, output: Any) -> None:
        found = first_tensor(inputs if layer.side == "input" else output)
        if found is not None:  # a copy, since what comes next may write in place (ReLU(inplace=True), x += y)
            kept[layer] = found.detach().clone()

    return module.register_forward_hook(keep)


def first_tensor(value: Any) -> Tensor | None:
    """The tensor in an output: itself, the first of a tuple, ``logits`` or the first entry of a mapping."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        held = cast("Mapping[str, Any]", value)
        return first_tensor(held["logits"] if "logits" in held else next(iter(held.values()), None))
    if isinstance(value, tuple | list):
        held_list = cast("tuple[Any, ...]", value)
        return first_tensor(held_list[0]) if held_list else None
    return None


def module_named(subject: Subject, name: str) -> nn.Module:
    """The module of that name in the subject's shell; an unknown name lists those that look alike."""
    from difflib import get_close_matches

    known = dict(subject.module.named_modules())
    if name in known:
        return known[name]
    near = get_close_matches(name, known, n=5, cutoff=0.3) or [n for n in known if n][:8]
    raise ValueError(f"the model has no layer {name!r}; it has, among others: {', '.join(near)}.")


def choose_layers(subject: Subject, wanted: str = "auto") -> tuple[Layer, ...]:
    """Layers whose outputs to read, in the order in which they run: by name, by glob, or automatically.

    Names and globs stand between commas (``"conv1, layer*.0, head"``). ``"auto"`` takes modules without children, or
    whole blocks where those would be more than :data:`AUTOMATIC`, leaving out what repeats the features before it
    (dropout in evaluation, identities). Cost: one forward pass of a few examples; hooks are removed, also on errors.

    Raises:
        ValueError: a name or glob that fits no layer, or a layer that gives no features of the examples.
    """
    ran = _features_of_all(subject)
    if wanted.strip() in ("", "auto"):
        return tuple(Layer(name) for name in _automatic(subject, ran))
    chosen: dict[str, None] = {}
    for pattern in filter(None, (word.strip() for word in wanted.split(","))):
        chosen |= dict.fromkeys(_fitting(subject, ran, pattern))
    if not chosen:
        raise ValueError(f"layers={wanted!r} names none; write 'auto', or names and globs between commas.")
    return tuple(Layer(name) for name in ran if name in chosen)


def _features_of_all(subject: Subject) -> dict[str, Tensor]:
    """What each module gave for a few examples, by name, in the order in which they finished."""
    kept: dict[Layer, Tensor] = {}
    batch = next(iter(subject.batches(_TRIED)))
    every = tuple(Layer(name) for name, _ in subject.module.named_modules())
    with subject.lock, torch.no_grad(), _hooked(subject, every, kept):
        subject.batch_outputs(subject.params, batch)
    return {layer.name: found for layer, found in kept.items() if _of_examples(found, batch.size)}


def _of_examples(found: Tensor, examples: int) -> bool:
    return found.is_floating_point() and found.ndim >= 2 and examples in found.shape[:2] and found.numel() > 0


def _fitting(subject: Subject, ran: Mapping[str, Tensor], pattern: str) -> list[str]:
    if not any(c in pattern for c in "*?["):
        module_named(subject, pattern)
        if pattern not in ran:
            raise ValueError(f"layer {pattern!r} did not run, or gave no features of the examples; choose another.")
        return [pattern]
    found = [name for name in ran if name and fnmatchcase(name, pattern)]
    if not found:
        near = ", ".join([name for name in ran if name][:8])
        raise ValueError(f"no layer fits {pattern!r}; those that ran are, among others: {near}.")
    return found


def _automatic(subject: Subject, ran: Mapping[str, Tensor]) -> list[str]:
    """The deepest level of modules that gives few enough layers; the model itself where it has no parts."""
    childless = {name for name, module in subject.module.named_modules() if not any(module.children())}
    depths = {name: name.count(".") + 1 for name in ran if name}
    found: list[str] = []
    for level in range(max(depths.values(), default=0), 0, -1):
        at = [n for n, depth in depths.items() if depth == level or (depth < level and n in childless)]
        found = _without_repeats(ran, at)
        if len(found) <= AUTOMATIC:
            break
    return found or [""]


def _without_repeats(ran: Mapping[str, Tensor], names: list[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        if not found or not _same(ran[found[-1]], ran[name]):
            found.append(name)
    return found


def token_vectors(subject: Subject, name: str = "") -> Tensor:
    """The vector of each token, (tokens, d) in float64: an embedding's rows, or the columns of a linear map's weight.

    A linear map of one-hot inputs is an embedding too. Without a name: the first embedding in the model, else its first
    linear map.

    Raises:
        ValueError: the named module has no such weight, or the model has neither.
    """
    modules = dict(subject.module.named_modules())
    if name:
        module_named(subject, name)
    kinds = (nn.Embedding, nn.Linear)
    chosen = [n for kind in kinds for n, m in modules.items() if isinstance(m, kind) and name in ("", n)]
    if not chosen:
        raise ValueError(f"{name or 'the model'} holds no embedding and no linear map, so tokens have no vectors.")
    weight = subject.tensors()[f"{chosen[0]}.weight"].detach().double()
    return weight.T if isinstance(modules[chosen[0]], nn.Linear) else weight


def find_classifier(subject: Subject, layer: str | None = None) -> Classifier:
    """The classifier of a network, found by running one batch: the affine module whose output is the network's output.

    With ``layer`` given: that module if it is affine with one row for each class; else the features are its outputs.

    Raises:
        ValueError: no module's output equals the network's, which then needs ``layer``.
    """
    if layer is not None:
        return _as_classifier(subject, layer) or Classifier(Layer(layer, "output"))
    affine = tuple(Layer(n) for n, m in subject.module.named_modules() if _affine(m) is not None)
    batch = next(iter(subject.batches()))
    for place in reversed(affine):
        found = _runs(subject, place, batch)
        if found is not None and _same(found.features[place], found.outputs):
            return cast("Classifier", _as_classifier(subject, place.name))
    near = ", ".join(repr(p.name) for p in affine[-3:]) or "a module"
    raise ValueError(
        "no linear layer of this model gives its output directly, so the features before the classifier cannot be "
        f"found; name a layer: layer='...' (for instance {near})."
    )


def _runs(subject: Subject, place: Layer, batch: Batch) -> Caught | None:
    try:
        return catch(subject, (place,), batch, None)
    except ValueError:
        return None


def _same(feature: Tensor, outputs: Tensor) -> bool:
    if feature.numel() != outputs.numel():
        return False
    return bool(torch.equal(feature.reshape(-1), outputs.detach().reshape(-1)))


def _as_classifier(subject: Subject, name: str) -> Classifier | None:
    parts = _affine(module_named(subject, name))
    if parts is None or (subject.classes is not None and parts[0].shape[0] != subject.classes):
        return None
    return Classifier(Layer(name, "input"), *parts)


def _affine(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """(weight as a matrix, bias) of a Linear or of a convolution that sees one position at a time."""
    pointwise = (
        isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and module.weight[0, 0].numel() == 1
        and module.groups == 1
    )
    if not (isinstance(module, nn.Linear) or pointwise):
        return None
    weight, bias = cast("Tensor", module.weight), cast("Tensor | None", module.bias)
    return weight.detach().flatten(1), None if bias is None else bias.detach()
