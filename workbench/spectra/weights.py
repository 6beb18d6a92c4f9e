"""The weights of a model as matrices: which tensors are, how the others are cut and reshaped, and what is left out."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from workbench.operators.blocks import Part, named, pieces
from workbench.subject import Subject

Convolution = Literal["matrix", "slices", "fourier"]
Attention = Literal["apart", "together"]
Reason = Literal["analysed", "vector", "not floating point", "left out"]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Reshape:
    """How what has more than two dimensions becomes matrices; ``grid`` is the image's side for "fourier"."""

    convolution: Convolution = "matrix"
    grid: int = 8


@dataclass(frozen=True)
class WeightMatrix:
    """A weight as ``blocks`` matrices of ``rows`` x ``columns`` whose singular values are looked at together.

    ``groups`` is that of a convolution, 0 for what is none.
    """

    name: str
    words: str
    part: Part
    groups: int
    reshape: Reshape

    @property
    def shape(self) -> tuple[int, int, int]:
        """(blocks, rows, columns)."""
        sizes = _sizes(self.part)
        if not self.groups:
            rest = [n for n in sizes if n != 1] if len(sizes) > 2 else sizes
            rest = rest if len(rest) > 1 else [1, math.prod(sizes)]
            return math.prod(rest[:-2]), rest[-2], rest[-1]
        rows, columns, kernel = sizes[0] // self.groups, sizes[1], sizes[2:]
        if self.reshape.convolution == "matrix":
            return self.groups, rows, columns * math.prod(kernel)
        fourier = self.reshape.convolution == "fourier"
        places = math.prod(self.side(n) for n in kernel) if fourier else math.prod(kernel)
        return self.groups * places, rows, columns

    @property
    def count(self) -> int:
        """The number of singular values."""
        blocks, rows, columns = self.shape
        return blocks * min(rows, columns)

    @property
    def work(self) -> float:
        """Multiplications of the decomposition, up to a factor."""
        blocks, rows, columns = self.shape
        return float(blocks * rows * columns * min(rows, columns))

    def side(self, kernel: int) -> int:
        """The image's side: at least the kernel's."""
        return max(self.reshape.grid, kernel)

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The matrices (blocks, rows, columns) in float64 (or complex128), cut out of the model's tensors by name."""
        whole = self.part.of(tensors[self.part.name]).detach()
        weight = whole.to(torch.complex128 if whole.is_complex() else torch.float64)
        if self.groups and self.reshape.convolution != "matrix":
            places = tuple(range(2, weight.ndim))
            if self.reshape.convolution == "fourier":
                weight = torch.fft.fftn(weight, s=[self.side(n) for n in weight.shape[2:]], dim=places)
            grouped = weight.reshape(self.groups, -1, weight.shape[1], math.prod(weight.shape[2:]))
            return grouped.permute(0, 3, 1, 2).reshape(self.shape)
        return weight.reshape(self.shape)


def _sizes(part: Part) -> list[int]:
    found = list(part.shape)
    if part.stop is not None:
        found[part.dim] = part.stop - part.start
    return found


@dataclass(frozen=True)
class Covered:
    """One parameter of the model: whether it is analysed, or why not, and whether it is trained."""

    name: str
    size: int
    reason: Reason
    frozen: bool


@dataclass(frozen=True)
class Weights:
    """What a model has of matrices, what becomes of each parameter, and the tensors that the matrices are cut from."""

    matrices: tuple[WeightMatrix, ...]
    covered: tuple[Covered, ...]
    tensors: Mapping[str, Tensor] = field(repr=False)


def weight_matrices(
    subject: Subject, reshape: Reshape, attention: Attention = "apart", layers: Sequence[str] = ()
) -> Weights:
    """Every floating-point parameter of two or more dimensions as matrices, trained or frozen, tied ones once.

    A matrix is taken as it is. A convolution (out, in/groups, k, ...) is what ``reshape`` says, each group for itself.
    "matrix": (out, in · k...); "slices": a matrix (out, in) for each place of the kernel; "fourier": the matrices
    (out, in) of the circular convolution of a ``grid`` x ... image at each frequency, whose singular values are those
    of that convolution. Of other tensors dimensions of length 1 are dropped, and the last two make matrices, of which
    there may be many. Queries, keys and values in one tensor are three matrices if ``attention`` is "apart". What a
    parametrisation computes is taken in place of what it computes it from. ``layers``: names or globs; none for all.

    Raises:
        ValueError: there is no such weight, or ``layers`` names none of them.
    """
    origins, tensors = _computed(subject)
    usable = {name: tensor for name, tensor in tensors.items() if _reason(tensor) == "analysed"}
    every = _named(subject, usable, reshape, attention)
    chosen = tuple(m for m in every if not layers or any(named(m.name, word) for word in layers))
    if not chosen:
        there = ", ".join(m.name for m in every[:12])
        raise ValueError(
            f"layers={', '.join(layers)!r} names none of the {len(every)} weight matrices: {there}."
            if every
            else f"{type(subject.module).__name__} has no floating-point parameter of two or more dimensions."
        )
    inside = {m.part.name for m in chosen}
    covered = list[Covered]()
    for name, p in subject.module.named_parameters():
        source = origins.get(name, name)
        reason = _reason(tensors[source])
        left = reason == "analysed" and source not in inside
        covered.append(Covered(name, p.numel(), "left out" if left else reason, not p.requires_grad))
    return Weights(chosen, tuple(covered), tensors)


def _reason(tensor: Tensor) -> Reason:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return "not floating point"
    return "analysed" if tensor.ndim > 1 and tensor.numel() else "vector"


def _named(
    subject: Subject, tensors: Mapping[str, Tensor], reshape: Reshape, attention: Attention
) -> list[WeightMatrix]:
    """A matrix for each piece, under the name of its layer, with the tensor's own where a layer has several."""
    modules = dict(subject.module.named_modules())
    found = list[tuple[str, str, Part]]()
    for name, words, part in pieces(subject.module, tensors):
        cut = part.stop is not None
        if cut and attention == "together":
            whole = (part.name, "attention, queries, keys and values", Part(part.name, part.shape))
            found += [] if whole in found else [whole]
        else:
            found.append((name, words, part))
    often = Counter(name for name, _, _ in found)
    made = list[WeightMatrix]()
    for name, words, part in found:
        holder = modules[part.name.rpartition(".")[0]]
        groups = holder.groups if isinstance(holder, _CONVOLUTIONS) else 0
        own = f"{name}.{part.name.rpartition('.')[2]}" if often[name] > 1 else name
        made.append(WeightMatrix(own, words, part, groups, reshape))
    return made


def _computed(subject: Subject) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(what each parameter under a parametrisation goes into, every parameter as the layers use it)."""
    now, chains, origins = subject.tensors(), dict[str, Any](), dict[str, str]()
    with subject.lock:
        for path, module in subject.module.named_modules():
            if is_parametrized(module):
                for attribute, chain in module.parametrizations.items():  # type: ignore[union-attr, operator]
                    where = f"{path}." if path else ""
                    chains[f"{where}parametrizations.{attribute}."] = (f"{where}{attribute}", copy.deepcopy(chain))
    tensors = dict[str, Tensor]()
    for name, _ in subject.module.named_parameters():
        prefix = next((p for p in chains if name.startswith(p)), None)
        if prefix is None:
            tensors[name] = now[name]
        else:
            target, chain = chains[prefix]
            origins[name] = target
            if target not in tensors:
                tensors[target] = _evaluated(chain, prefix, now)
    return origins, tensors


def _evaluated(chain: ParametrizationList, prefix: str, now: Mapping[str, Tensor]) -> Tensor:
    """The weight that a (copied) chain of parametrisations makes of the tensors under its name."""
    held = {name.removeprefix(prefix): tensor for name, tensor in now.items() if name.startswith(prefix)}
    with torch.no_grad():
        return functional_call(chain.eval(), held, ())


# ------------------------------------------------------------------------------------------------ the coverage report


def coverage_values(covered: Sequence[Covered]) -> dict[str, Any]:
    """Which parameter is analysed, or why not, as variables."""
    reasons = {
        "analysed": "analysed",
        "vector": "vector",
        "left_out": "left out",
        "not_floating": "not floating point",
    }
    found: dict[str, Any] = {name: [c.reason == reason for c in covered] for name, reason in reasons.items()}
    return {**found, "frozen": [c.frozen for c in covered], "entries": [c.size for c in covered]}


def coverage_words(covered: Sequence[Covered]) -> list[str]:
    """The coverage report in words."""
    inside = [c for c in covered if c.reason == "analysed"]
    frozen = [c.name for c in inside if c.frozen]
    why = {
        "vector": "fewer than two dimensions",
        "left out": "left out by the setting layers",
        "not floating point": "not floating point",
    }
    said = [f"{sum(c.size for c in inside)} of {sum(c.size for c in covered)} scalars of the model are analysed"]
    said += [
        f"not analysed, {words}: {listed(names)}"
        for reason, words in why.items()
        if (names := [c.name for c in covered if c.reason == reason])
    ]
    return said + ([f"analysed though frozen: {listed(frozen)}"] if frozen else [])


def listed(names: Sequence[str], most: int = 6) -> str:
    """Names with commas between, the first few of many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
