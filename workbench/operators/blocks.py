"""Which parameters belong together, and the diagonal blocks of curvature that they make.

Layers are modules with their weights and biases; attention counts as queries, keys, values and output, whether its
projections are stored apart or in one tensor. Blocks are what repeats: the items of lists of modules.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self, cast

import torch
from torch import Tensor, nn

from workbench.numerics.operator import Operator, Restricted
from workbench.operators.curvature import Curvature
from workbench.operators.table import OperatorName, curvature
from workbench.shell import precise
from workbench.subject import Subject

Level = Literal["layer", "block"]
Reason = Literal["analysed", "frozen", "filtered", "left out", "not floating point"]
_WORDS = {"NonDynamicallyQuantizableLinear": "attention, output"}
_THIRDS = (("q", "queries"), ("k", "keys"), ("v", "values"))


@dataclass(frozen=True)
class Part:
    """A parameter tensor by name, or the entries ``start`` to ``stop`` of it along ``dim``."""

    name: str
    shape: tuple[int, ...]
    dim: int = 0
    start: int = 0
    stop: int | None = None

    @property
    def whole(self) -> bool:
        """Whether it is all of the tensor."""
        return self.stop is None

    @property
    def size(self) -> int:
        """The number of scalars."""
        every = math.prod(self.shape)
        return every if self.stop is None else every // self.shape[self.dim] * (self.stop - self.start)

    def of(self, tensor: Tensor) -> Tensor:
        """This part of the parameter, or of a tensor of its shape: a view."""
        return tensor if self.stop is None else tensor.narrow(self.dim, self.start, self.stop - self.start)


@dataclass(frozen=True)
class Group:
    """Parameters that are looked at together: a name, words for what it is, and its parts."""

    name: str
    words: str
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """The number of scalars."""
        return sum(part.size for part in self.parts)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameter tensors that it has a part in, each once."""
        return tuple(dict.fromkeys(part.name for part in self.parts))

    @property
    def whole(self) -> bool:
        """Whether it is made of whole tensors."""
        return all(part.whole for part in self.parts)

    def index(self, params: Mapping[str, Tensor]) -> Tensor:
        """Its places (size,) in the flat vector of ``params``, in their order."""
        found, first = list[Tensor](), 0
        for name, tensor in params.items():
            parts = [part for part in self.parts if part.name == name]
            if parts:
                places = torch.arange(first, first + tensor.numel(), device=tensor.device).view(tensor.shape)
                found += [part.of(places).reshape(-1) for part in parts]
            first += tensor.numel()
        return torch.cat(found)

    def norm(self, params: Mapping[str, Tensor]) -> float:
        """‖W‖, the Euclidean norm of all its entries, summed in float64."""
        squares = [part.of(params[part.name]).double().square().sum() for part in self.parts]
        return math.sqrt(float(torch.stack(squares).sum()))


# ------------------------------------------------------------------------------------------------ who belongs to whom


def groups(subject: Subject, level: Level = "layer") -> list[Group]:
    """The subject's parameters as groups that do not overlap and leave none out, in the order of its parameters.

    "layer": each module with the parameters it holds itself (weight and bias; all of an LSTM); of attention the
    queries, keys and values each, cut out of a common tensor where there is one (``nn.MultiheadAttention``, layers
    called ``qkv`` or ``c_attn``), and the output; a parameter that stands beside modules for itself. "block": the
    outermost items of ``nn.ModuleList`` and ``nn.Sequential`` that hold several layers, such as ``encoder.layers.0``,
    and what lies outside of them by the largest modules without such items. Tied tensors belong to the first of their
    modules.
    """
    found: dict[str, Group] = {}
    for name, words, part in pieces(subject.module, subject.params):
        group = found.get(name, Group(name, words, ()))
        found[name] = replace(group, parts=(*group.parts, part))
    layers = list(found.values())
    return layers if level == "layer" else _blocks(subject, layers)


def pieces(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Part]]:
    """(name of the group, words, part) for each of a module's ``tensors``, by their names in it, or part of one."""
    modules = dict(module.named_modules())
    tied = _ties(module)
    for name, tensor in tensors.items():
        path, attribute = _place(name)
        holder, part = modules[path], Part(name, tuple(tensor.shape))
        also = f", tied with {' and '.join(tied[name])}" if name in tied else ""
        if isinstance(holder, nn.MultiheadAttention):
            yield from _attention(path, attribute, part)
        elif dim := _fused(path, holder, part):
            yield from _cut(path, part, dim - 1)
        elif all(child == "parametrizations" for child, _ in holder.named_children()):
            yield path or "model", _WORDS.get(type(holder).__name__, type(holder).__name__) + also, part
        else:
            yield name, f"parameter of {type(holder).__name__}{also}", part


def named(name: str, word: str) -> bool:
    """Whether a layer has this name, lies under it, or matches it as a glob."""
    return name == word or name.startswith(f"{word}.") or fnmatch.fnmatchcase(name, word)


def _place(name: str) -> tuple[str, str]:
    """(path of the module, attribute); what a parametrisation computes from belongs to the module it computes for."""
    path, _, attribute = name.rpartition(".")
    before, found, rest = f".{path}".partition(".parametrizations")
    return (before.removeprefix("."), rest.removeprefix(".") or attribute) if found else (path, attribute)


def _ties(module: nn.Module) -> dict[str, list[str]]:
    """Other names of tensors that have several, by the first."""
    first: dict[int, str] = {}
    found: dict[str, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        if id(p) in first:
            found.setdefault(first[id(p)], []).append(name)
        first.setdefault(id(p), name)
    return found


def _attention(path: str, attribute: str, part: Part) -> Iterator[tuple[str, str, Part]]:
    """PyTorch's attention: weights and biases of three projections in one tensor, or in three."""
    if attribute.startswith("in_proj"):
        yield from _cut(path, part, 0)
        return
    where = f"{path}." if path else ""
    words = dict(_THIRDS)
    which = attribute.removeprefix("bias_")[0] if attribute.startswith(("bias_", *(f"{k}_proj" for k in words))) else ""
    yield (f"{where}{which}", f"attention, {words[which]}", part) if which else (part.name, "attention", part)


def _fused(path: str, holder: nn.Module, part: Part) -> int:
    """1 + the dimension along which queries, keys and values lie in one tensor; 0 where they do not."""
    weight = getattr(holder, "weight", None)
    last = path.rpartition(".")[2]
    if last not in ("qkv", "c_attn") or not isinstance(weight, Tensor) or weight.ndim != 2:
        return 0
    along = 0 if isinstance(holder, nn.Linear) else 1  # Conv1D of GPT-2 keeps its weight transposed
    fits = weight.shape[along] == 3 * weight.shape[1 - along] and len(part.shape) <= 2
    return (1 + along if len(part.shape) == 2 else 1) if fits else 0


def _cut(path: str, part: Part, dim: int) -> Iterator[tuple[str, str, Part]]:
    width = part.shape[dim] // 3
    for i, (short, words) in enumerate(_THIRDS):
        name = f"{path}.{short}" if path else short
        yield name, f"attention, {words}", replace(part, dim=dim, start=i * width, stop=(i + 1) * width)


def _blocks(subject: Subject, layers: Sequence[Group]) -> list[Group]:
    """Layers put together by what repeats."""
    paths = [_place(layer.names[0])[0] for layer in layers]
    modules = dict(subject.module.named_modules())
    items = [path for path in modules if _repeats(path, modules, paths)]
    found: dict[str, Group] = {}
    for layer, path in zip(layers, paths, strict=True):
        name = _block_of(path, items) or layer.name
        group = found.get(name, Group(name, type(modules[name]).__name__ if name in modules else layer.words, ()))
        found[name] = replace(group, parts=together([group, layer]).parts)
    return list(found.values())


def _repeats(path: str, modules: Mapping[str, nn.Module], layers: Sequence[str]) -> bool:
    """Whether a module is an item of a list, with several layers in it."""
    parent = modules.get(path.rpartition(".")[0]) if path else None
    inside = sum(layer == path or layer.startswith(f"{path}.") for layer in layers)
    return isinstance(parent, nn.ModuleList | nn.Sequential) and inside > 1


def _block_of(path: str, items: Sequence[str]) -> str:
    """The outermost item that a layer lies in, else the largest module without items; empty for the model itself."""
    steps = path.split(".") if path else []
    above = [".".join(steps[: i + 1]) for i in range(len(steps))]
    lists = {item for item in items if item in above}
    if lists:
        return min(lists, key=len)
    return next((p for p in above if not any(item.startswith(f"{p}.") for item in items)), "")


def together(chosen: Sequence[Group]) -> Group:
    """Groups that do not overlap as one; a tensor of which they have all parts is whole again."""
    parts: dict[str, list[Part]] = {}
    for part in (p for group in chosen for p in group.parts):
        parts.setdefault(part.name, []).append(part)
    made = list[Part]()
    for name, some in parts.items():
        every = sum(part.size for part in some) == math.prod(some[0].shape)
        made += [Part(name, some[0].shape)] if every else some
    return Group("all of them", f"{len(chosen)} groups", tuple(made))


# ------------------------------------------------------------------------------------------------ what is covered


@dataclass(frozen=True)
class Covered:
    """One tensor of the model: whether it is analysed or why not, how many scalars, and the groups that it is in."""

    name: str
    size: int
    reason: Reason
    groups: tuple[int, ...] = field(default=())


def coverage(subject: Subject, chosen: Sequence[Group]) -> list[Covered]:
    """Every parameter tensor of the model once: analysed, or why not.

    "frozen": requires no gradient; "filtered": left out by the subject's ``parameters=`` or ``restricted``; "left out":
    in none of the ``chosen`` groups; "not floating point".
    """
    params, found = subject.params, list[Covered]()
    for name, p in subject.module.named_parameters():
        inside = tuple(i for i, group in enumerate(chosen) if name in group.names)
        size = sum(part.size for i in inside for part in chosen[i].parts if part.name == name) or p.numel()
        found.append(Covered(name, size, _reason(name, p, name in params, bool(inside)), inside))
    return found


def _reason(name: str, p: Tensor, varies: bool, chosen: bool) -> Reason:
    if varies:
        return "analysed" if chosen else "left out"
    if not p.is_floating_point():
        return "not floating point"
    return "filtered" if p.requires_grad else "frozen"


def unused(subject: Subject) -> set[str]:
    """Parameters that the loss does not depend on at all: their rows of any curvature are zero.

    Batches are differentiated until every parameter was seen to matter: mostly one gradient of one batch.
    """
    left = list(subject.params)
    point = {name: p.detach().requires_grad_() for name, p in subject.params.items()}
    with precise(subject.device), torch.enable_grad():
        for batch in subject.batches():
            if not left:
                break
            total = subject.batch_loss(point, batch)
            if total.requires_grad:
                found = torch.autograd.grad(total, [point[name] for name in left], allow_unused=True)
                slopes = cast("tuple[Tensor | None, ...]", found)
                left = [name for name, slope in zip(left, slopes, strict=True) if slope is None]
    return set(left)


# ------------------------------------------------------------------------------------------------ the blocks


class Block(Operator):
    """H_ll, the diagonal block of a subject's curvature for one group of its parameters.

    The loss is differentiated by the group's tensors only, which is cheaper than a product with the whole matrix the
    closer the layer lies to the output. A context manager, like the :class:`Curvature` that it rests on.

    Attributes:
        curvature: of the subject restricted to the group's tensors.
    """

    def __init__(self, subject: Subject, group: Group, operator: OperatorName = "hessian") -> None:
        names = set(group.names)
        inner = subject.restricted(lambda name, _: name in names)
        self.group, self.curvature = group, curvature(inner, operator)
        self.inner: Operator = self.curvature if group.whole else Restricted(self.curvature, group.index(inner.params))
        self.size, self.dtype, self.device = self.inner.size, self.inner.dtype, self.inner.device

    def matvec(self, vector: Tensor) -> Tensor:
        return self.inner.matvec(vector)

    def matmat(self, block: Tensor) -> Tensor:
        return self.inner.matmat(block)

    @property
    def products(self) -> int:
        """How many products were computed so far."""
        return self.curvature.products

    def close(self) -> None:
        """Free the kept graphs. Later products work, and build them anew."""
        self.curvature.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def restrict(whole: Curvature | Subject, group: Group, operator: OperatorName = "hessian") -> Restricted | Block:
    """The diagonal block for one group: of a curvature at hand, by its own products; of a subject, by cheaper ones.

    Entries are in the order of the group's tensors in the subject.
    """
    if isinstance(whole, Subject):
        return Block(whole, group, operator)
    return Restricted(whole, group.index(whole.subject.params))
