"""Checks of an initialisation: LSUV, Fixup, and how large the first update is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from workbench.activations import Layer, choose_layers, module_named, stream
from workbench.figure import Axis, Bars, Figure, Panel, Rule, Text
from workbench.numerics.sampling import Draw
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Doc, Range
from workbench.subject import Subject

_AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
SAMPLING = 0.25
"""Relative distance from Fixup's scale that a layer of random weights may have."""
_EPSILON = 1e-8


@dataclass(frozen=True)
class InitCheck(Probe[Subject]):
    """Checks of an initialisation: unit variance (LSUV), orthonormality, Fixup's rules, and the first update's size.

    What it measures, for each dense or convolutional layer with weights W as a matrix of outs x ins: ``output_std`` and
    ``output_mean`` of all its outputs before the activation, and ``lsuv``, whether the former is within 1 +-
    ``tolerance``; ``gain`` = √(ins · mean W²), √2 for He's initialisation and 1 for LeCun's; ``orthogonality`` =
    ‖W Wᵀ - I‖_F / √k over the smaller side k, 0 for orthonormal rows (or columns); ``zero``, whether all weights are 0;
    ``update`` = ‖ΔW‖/‖W‖ of one update by ``rule`` with ``learning_rate``. Of the net: ``output_rms``,
    ``output_change``, the root mean square of f(θ + Δ) - f(θ), and the loss before and after that update.

    With the last layers of residual branches named in ``residual`` also Fixup: those layers and the last of the net
    must be zero, the others of a branch of m layers must have gain √2 L^(-1/(2m - 2)) for L branches (``fixup_scale``),
    as ``fixup`` tells; ``branch_share`` = rms(f - f without them) / rms f, 0 where branches do not count yet.

    How to read it: ``output_std`` that grows or falls from layer to layer is what LSUV removes. One update should
    change the output by about the learning rate, whatever the depth: an ``output_change`` that grows with depth, or an
    ``update`` near 1, asks for warm-up, a smaller rate or a better initialisation.

    What it costs: two passes and a gradient, over ``examples`` of them.

    When it misleads: LSUV is about the data at hand, in evaluation mode. Before the first step only: trained nets fail
    these checks rightly. Layers of a branch are those with the same parent module. The scalar biases and multipliers
    of Fixup are not looked for. Weight decay and momentum are left out of the update; Adam's is its first step.

    Errors: exact for these examples. Source: Mishkin and Matas 2016 (LSUV); Zhang, Dauphin and Ma 2019 (Fixup).
    """

    layers: Annotated[str, Doc('Names and globs of dense and convolutional layers between commas; "auto": all.')] = (
        "auto"
    )
    residual: Annotated[str, Doc("Names and globs of the last layers of residual branches; empty: no Fixup.")] = ""
    examples: Annotated[
        int, Range(1, 1_000_000, log=True, soft=(16, 1024)), Doc("At most so many examples, drawn at random.")
    ] = 256
    tolerance: Annotated[float, Range(1e-3, 1.0), Doc("How far from 1 a standard deviation may be.")] = 0.1
    rule: Annotated[
        Literal["sgd", "adam"],
        Choice({"sgd": "-η g", "adam": "-η g/(|g| + ε), the first step of Adam"}),
        Doc("The first update."),
    ] = "sgd"
    learning_rate: Annotated[
        float, Range(1e-8, 1e3, log=True, soft=(1e-4, 1.0)), Doc("Learning rate η of the first update.")
    ] = 0.1

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("output_std", ("layer",), "standard deviation of all outputs"),
        Variable("output_mean", ("layer",), "mean of all outputs"),
        Variable("lsuv", ("layer",), "whether the standard deviation is 1 within the tolerance", kind="bool"),
        Variable("gain", ("layer",), "√(ins · mean W²)"),
        Variable("orthogonality", ("layer",), "‖W Wᵀ - I‖_F / √k"),
        Variable("zero", ("layer",), "whether all weights are zero", kind="bool"),
        Variable("update", ("layer",), "‖ΔW‖/‖W‖ of the first update"),
        Variable("fixup_scale", ("layer",), "gain that Fixup asks for"),
        Variable("fixup", ("layer",), "whether the layer is as Fixup asks", kind="bool"),
        Variable("output_rms", (), "root mean square of the net's outputs"),
        Variable("output_change", (), "root mean square of their change by the first update"),
        Variable("branch_share", (), "relative change of the outputs without residual branches"),
        Variable("loss_after", (), "loss after the first update"),
        Variable("train_loss", (), "loss at the point", error="train_loss_error"),
        Variable("train_loss_error", (), "standard error of the loss over examples"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """Layers, then the update."""
        used = min(self.examples, subject.examples)
        if used < subject.examples:
            subject = subject.selected(draw.generator(0).permutation(subject.examples)[:used].tolist())
        names = _affine(subject, self.layers)
        values = _outputs(subject, names) | _weights(subject, names)
        values["lsuv"] = np.abs(np.asarray(values["output_std"]) - 1) <= self.tolerance
        words = self._fixup(subject, names, values)
        on = subject.on
        notes, coords = (*subject.notes, on, *words), {"layer": np.array(names)}
        yield self.reading(0.5, values, coords=coords, notes=notes)
        values |= self._update(subject, names)
        yield self.reading(1.0, values, coords=coords, converged=True, notes=notes)

    def _fixup(self, subject: Subject, names: list[str], values: dict[str, Any]) -> tuple[str, ...]:
        """Fixup's scale for each layer, and whether it has it."""
        patterns = [w.strip() for w in self.residual.split(",") if w.strip()]
        last = [name for name in names if any(fnmatchcase(name, p) for p in patterns)]
        if not patterns:
            return ("Fixup was not checked: name the last layers of residual branches in residual=",)
        if not last:
            raise ValueError(f"InitCheck(residual={self.residual!r}) names no layer; there are: {', '.join(names)}.")
        scale = np.full(len(names), np.nan)
        for branch in last:
            inside = [i for i, name in enumerate(names) if _parent(name) == _parent(branch)]
            power = -1 / (2 * len(inside) - 2) if len(inside) > 1 else 0.0
            scale[inside] = math.sqrt(2) * len(last) ** power
        scale[[i for i, name in enumerate(names) if name in last or i == len(names) - 1]] = 0.0
        near = np.abs(values["gain"] - scale) <= SAMPLING * scale
        values |= {"fixup_scale": scale, "fixup": near, "branch_share": _share(subject, last)}
        return ()

    def _update(self, subject: Subject, names: list[str]) -> dict[str, Any]:
        """The first update, and what it does."""
        found = subject.evaluate(None, ("loss",))
        params, gradient = subject.params, subject.gradient()
        steps = {n: g if self.rule == "sgd" else g / (g.abs() + _EPSILON) for n, g in gradient.items()}
        moved = {name: params[name] - self.learning_rate * step for name, step in steps.items()}
        sizes = [_relative(steps.get(f"{n}.weight"), params.get(f"{n}.weight"), self.learning_rate) for n in names]
        values: dict[str, Any] = {"update": sizes, "loss_after": subject.evaluate(moved, ("loss",))["loss"]}
        values |= {"train_loss": found["loss"], "train_loss_error": found["loss_error"]}
        if subject.has_outputs:
            before = subject.outputs()
            change = subject.outputs(moved) - before
            values |= {"output_rms": _rms(before), "output_change": _rms(change)}
        return values

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """How many layers pass, and what the first update does."""
        found: dict[str, Value] = {"layers": data.sizes["layer"], "lsuv": int(data.lsuv.sum())}
        if np.isfinite(data.fixup_scale.values).any():
            checked = np.isfinite(data.fixup_scale.values)
            found |= {"fixup": int(data.fixup.values[checked].sum()), "fixup_of": int(checked.sum())}
        names = ("output_rms", "output_change", "loss_after", "train_loss", "train_loss_error")
        return found | {name: float(data[name]) for name in names}

    def figure(self, data: xr.Dataset) -> Figure:
        """Standard deviations with what LSUV asks for, gains, and first updates of each layer."""
        places, names = np.arange(1, data.sizes["layer"] + 1), tuple(str(n) for n in data["layer"].values)
        low, high = Rule(1 - self.tolerance), Rule(1 + self.tolerance, label="LSUV")
        panels = [
            Panel((Bars(places, data.output_std.values, names=names), low, high), Axis(""), Axis("output std")),
            Panel(
                (Bars(places, data.gain.values, names=names), Rule(math.sqrt(2), label="He")), Axis(""), Axis("gain")
            ),
        ]
        bars = Bars(places, data["update"].values, names=names)
        known = np.isfinite(data["update"].values).any()
        mark = bars if known else Text(1.0, 0.0, "first update: not known")
        return Figure((*panels, Panel((mark,), Axis(""), Axis("‖ΔW‖/‖W‖"))))

    def estimate(self, subject: Subject) -> Cost:
        """Gradient, moved weights and outputs."""
        words = f"four passes and a gradient over {min(self.examples, subject.examples)} examples"
        return Cost(2 * subject.memory() + 5 * subject.size * subject.dtype.itemsize, 5, words)


def _affine(subject: Subject, wanted: str) -> list[str]:
    """Dense and convolutional layers that run, in order; all of them where nothing is said."""
    every = ",".join(n for n, m in subject.module.named_modules() if n and isinstance(m, _AFFINE))
    if not every and isinstance(subject.module, _AFFINE):
        return [""]
    auto = wanted.strip() in ("", "auto")
    if auto and not every:
        raise ValueError("InitCheck looks at dense and convolutional layers; this model has none.")
    ran = {layer.name for layer in choose_layers(subject, "*")} if auto else set[str]()
    words = ",".join(n for n in every.split(",") if n in ran) if auto else wanted
    names = [layer.name for layer in choose_layers(subject, words)]
    return [name for name in names if isinstance(module_named(subject, name), _AFFINE)]


def _outputs(subject: Subject, names: list[str]) -> dict[str, Any]:
    """Mean and standard deviation of all entries of each layer's outputs, in one pass."""
    layers = tuple(Layer(name) for name in names)
    sums: Tensor | float = 0.0
    counts = torch.zeros(len(names), dtype=torch.float64)
    for caught in stream(subject, layers):
        found = [caught.features[layer].double() for layer in layers]
        sums = sums + torch.stack([torch.stack([x.sum(), x.square().sum()]) for x in found])
        counts += torch.tensor([x.numel() for x in found], dtype=torch.float64)
    mean, square = (torch.as_tensor(sums).cpu() / counts[:, None]).T.numpy()
    return {"output_mean": mean, "output_std": np.sqrt(np.maximum(square - mean**2, 0.0))}


def _weights(subject: Subject, names: list[str]) -> dict[str, Any]:
    """Gain, distance from orthonormality and zeros of each layer's weights."""
    tensors, rows = subject.tensors(), list[tuple[float, float, float]]()
    for name in names:
        matrix = tensors[f"{name}.weight" if name else "weight"].double().flatten(1)
        small = matrix if len(matrix) <= matrix.shape[1] else matrix.T
        gram = small @ small.T
        gram.diagonal().sub_(1)
        gain = torch.sqrt(matrix.shape[1] * matrix.square().mean())
        off = torch.linalg.matrix_norm(gram) / math.sqrt(len(small))
        rows.append((float(gain), float(off), float((matrix == 0).all())))
    gain, off, zero = np.array(rows).T
    return {"gain": gain, "orthogonality": off, "zero": zero > 0}


def _share(subject: Subject, last: list[str]) -> float:
    """How much the outputs change when the last layers of branches are zero."""
    if not subject.has_outputs:
        return math.nan
    now = subject.tensors()
    without: Mapping[str, Tensor] = {n: torch.zeros_like(t) for n, t in now.items() if _parent(n) in last}
    before = subject.outputs()
    change, size = _rms(subject.outputs(without) - before), _rms(before)
    return change / size if size > 0 else (0.0 if change == 0 else math.inf)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _relative(step: Tensor | None, weight: Tensor | None, rate: float) -> float:
    """‖η step‖/‖W‖; nan for frozen weights and for those that are zero."""
    if step is None or weight is None:
        return math.nan
    length = float(torch.linalg.vector_norm(weight.double()))
    return rate * float(torch.linalg.vector_norm(step.double())) / length if length > 0 else math.nan
