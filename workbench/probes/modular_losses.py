"""Restricted and excluded loss of modular addition: what a net still knows with, and without, its key frequencies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.nn import functional

from workbench.activations import token_vectors
from workbench.figure import Axis, Bars, Figure, Panel, Points, Rule
from workbench.numerics.modular import frequency_power, holding
from workbench.numerics.sampling import Draw
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Doc, Range
from workbench.subject import Subject

_LOSSES = ("train_loss", "test_loss", "restricted_loss", "excluded_loss")


@dataclass(frozen=True)
class ModularLosses(Probe[Subject]):
    """Restricted and excluded loss for modular addition: the loss with only, and without, the key frequencies.

    What it measures, for logits Z (n, p) of the inputs (a, b) and the directions cos(2πk(a+b)/p), sin(2πk(a+b)/p) of
    key frequencies k over the inputs: ``restricted_loss``, the cross-entropy on all inputs (the held-out ones too) of
    the part of Z in these directions with the mean logits added; ``excluded_loss``, on the training inputs, of Z less
    that part; ``excluded_each``, the same with one frequency taken out at a time. Key frequencies are the fewest that
    hold 95 % of the power of the tokens' vectors: at a recorded training's last checkpoint, so that curves over its
    steps compare, else at these weights.

    How to read it: as a net turns from memorising to the general solution, restricted loss falls before test loss does,
    and excluded loss rises on the training inputs.

    What it costs: one pass over all inputs; n · p · p/2 for the frequencies one by one.

    When it misleads: it wants all p² inputs, as training examples and ``held_out``, and ``max_examples=None`` to keep
    them; the directions are made orthogonal over those that there are, and the notes say how many. It reads tokens from
    the first two columns of the inputs, and says nothing of other tasks.

    Errors: exact for these inputs; logits are taken in float64, as a loss below 1e-7 needs.

    Source: Nanda et al. 2023 (arXiv:2301.05217); all key frequencies at once.
    """

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("train_loss", (), "loss on the training inputs"),
        Variable("test_loss", (), "loss on the held-out inputs"),
        Variable("restricted_loss", (), "loss on all inputs with the key frequencies alone"),
        Variable("excluded_loss", (), "loss on the training inputs without the key frequencies"),
        Variable("excluded_each", ("frequency",), "loss on the training inputs without this frequency"),
        Variable("key", ("frequency",), "whether it is a key frequency", kind="bool"),
    )

    modulus: Annotated[int, Range(0, 100_000, soft=(0, 200)), Doc("p; 0 takes the number of logits.")] = 0
    frequencies: Annotated[str, Doc("Key frequencies, as 3, 7, 12; empty finds them in the tokens' vectors.")] = ""
    embedding: Annotated[str, Doc("Module whose vectors to read; empty takes the first embedding or linear map.")] = ""

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """One pass over the inputs, then the losses without one frequency after another."""
        inputs = _inputs(subject, self.modulus)
        if subject.held_out is not None:
            inputs = inputs.joined(_inputs(subject.held_out, self.modulus))
        p = inputs.logits.shape[1]
        keys, said = self._keys(subject, p, inputs)
        key = np.isin(np.arange(1, p // 2 + 1), keys)
        inside = inputs.within(keys)
        mean = inputs.logits.mean(0)
        values: dict[str, Any] = {
            "key": key,
            "train_loss": inputs.loss(inputs.logits, "train"),
            "test_loss": inputs.loss(inputs.logits, "test"),
            "restricted_loss": inputs.loss(inside + mean, "all"),
            "excluded_loss": inputs.loss(inputs.logits - inside, "train"),
        }
        each, coords = np.full(p // 2, np.nan), {"frequency": np.arange(1, p // 2 + 1)}
        notes = (*subject.notes, *inputs.words(p), said)
        for k in range(1, p // 2 + 1):
            yield self.reading(k / (p // 2 + 1), values | {"excluded_each": each}, coords=coords, notes=notes)
            each[k - 1] = inputs.loss(inputs.logits - inputs.within((k,)), "train")
        yield self.reading(1.0, values | {"excluded_each": each}, coords=coords, converged=True, notes=notes)

    def _keys(self, subject: Subject, p: int, inputs: _Inputs) -> tuple[tuple[int, ...], str]:
        """The key frequencies, and in words where they come from."""
        if self.frequencies:
            return _parsed(self.frequencies, p), "key frequencies as given"
        last, where = _last_of(subject)
        try:
            vectors = token_vectors(last, self.embedding)[:p]
        except ValueError:
            if self.embedding:
                raise
            vectors = torch.empty(0, 0)
        if len(vectors) == p:
            return holding(frequency_power(vectors.cpu().numpy()), 0.95), f"key frequencies of the vectors {where}"
        power = [float((inputs.within((k,)) ** 2).sum()) for k in range(1, p // 2 + 1)]
        return holding(power, 0.95), "no vectors of p tokens: key frequencies of the logits"

    def context(self, subject: Subject) -> str:
        """The record's last weights, where key frequencies are read from them."""
        return "" if self.frequencies or subject.path is None else str(subject.path.fingerprint())

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The losses, and the key frequencies in words."""
        found: dict[str, Value] = {name: float(data[name]) for name in _LOSSES}
        return found | {"key_frequencies": ", ".join(map(str, data["frequency"].values[data.key.values])) or "none"}

    def figure(self, data: xr.Dataset) -> Figure:
        """The four losses, and the excluded loss for each frequency, key ones in colour."""
        names = ("train", "test", "restricted", "excluded")
        bars = Bars(range(4), [float(data[n]) for n in _LOSSES], names=names)
        k, each, key = data["frequency"].values, data.excluded_each.values, data.key.values
        marks = (
            Rule(float(data.train_loss), label="train loss"),
            Points(k[key], each[key], label="key frequencies"),
            Points(k[~key], each[~key], label="others", role="second"),
        )
        shown = marks if np.isfinite(data.train_loss) else marks[1:]
        each_panel = Panel(shown, Axis("frequency"), Axis("loss without it"))
        return Figure((Panel((bars,), Axis("loss on the inputs"), Axis("cross-entropy")), each_panel))

    def estimate(self, subject: Subject) -> Cost:
        """Logits of all inputs in float64, three times."""
        rows = subject.examples + (subject.held_out.examples if subject.held_out else 0)
        p = self.modulus or subject.classes or 1
        return Cost(4 * 8 * rows * p + subject.memory(), 1, "one pass over all inputs")


@dataclass(frozen=True, eq=False)
class _Inputs:
    """Sums a + b, logits (n, p), classes (n,) and which are training inputs; all in float64 on the subject's device."""

    sums: Tensor
    logits: Tensor
    targets: Tensor
    train: int

    def joined(self, other: _Inputs) -> _Inputs:
        """These inputs and the held-out ones after them."""
        sums, logits = torch.cat([self.sums, other.sums]), torch.cat([self.logits, other.logits])
        return _Inputs(sums, logits, torch.cat([self.targets, other.targets]), self.train)

    def within(self, frequencies: tuple[int, ...]) -> Tensor:
        """The part of the logits in the waves of these frequencies, with their mean over inputs left out."""
        if not frequencies:
            return torch.zeros_like(self.logits)
        turn = 2 * torch.pi / self.logits.shape[1] * self.sums[:, None] * self.sums.new_tensor(frequencies)
        waves = torch.cat([turn.cos(), turn.sin()], 1)
        waves = waves - waves.mean(0)
        left, sizes, _ = torch.linalg.svd(waves, full_matrices=False)
        basis = left[:, sizes > 1e-9 * sizes[0].clamp_min(1e-300)]
        return basis @ (basis.T @ self.logits)

    def loss(self, logits: Tensor, of: str) -> float:
        """Cross-entropy over "train", "test" or "all" inputs; nan over none."""
        rows = {"train": slice(0, self.train), "test": slice(self.train, None), "all": slice(None)}[of]
        return functional.cross_entropy(logits[rows], self.targets[rows]).item()

    def words(self, p: int) -> tuple[str, ...]:
        """What a reader must know when these are not the p² inputs of a modular task."""
        whole = bool((self.sums == self.sums.round()).all())
        said = () if whole else ("the first two inputs are no tokens: this is not a modular task",)
        few = len(self.sums) < p * p
        return (*said, *((f"{len(self.sums)} of {p * p} inputs",) if few else ()))


def _inputs(subject: Subject, modulus: int) -> _Inputs:
    """One pass.

    Raises:
        ValueError: inputs without two columns, outputs that are no logits of one class, or targets that are no classes.
    """
    sums, logits, targets = list[Tensor](), list[Tensor](), list[Tensor]()
    with torch.no_grad():
        for batch in subject.batches():
            outputs = subject.batch_outputs(subject.params, batch)
            tokens = batch.args[0].flatten(1) if batch.args and isinstance(batch.args[0], Tensor) else outputs[:, :0]
            if tokens.shape[1] < 2 or outputs.ndim != 2 or subject.classes is None:
                raise ValueError(
                    "ModularLosses reads tokens a, b from the first two columns of the inputs, and one row of logits "
                    f"for each; got inputs {tuple(tokens.shape)} and outputs {tuple(outputs.shape)}."
                )
            sums.append(tokens[:, :2].double().sum(1))
            logits.append(outputs.double()[:, : modulus or None])
            targets.append(torch.as_tensor(batch.targets).reshape(-1).long())
    found = _Inputs(torch.cat(sums), torch.cat(logits), torch.cat(targets), sum(map(len, sums)))
    if found.logits.shape[1] < 2 or bool((found.targets >= found.logits.shape[1]).any()):
        raise ValueError(f"the targets do not lie in 0 .. {found.logits.shape[1] - 1}: choose another modulus.")
    return found


def _last_of(subject: Subject) -> tuple[Subject, str]:
    """The subject at its record's last step, else itself."""
    path = subject.path
    if path is None:
        return subject, "at these weights"
    last = path.steps[-1]
    return path.subject(last), f"at step {last}"


def _parsed(text: str, p: int) -> tuple[int, ...]:
    words = [w.strip() for w in text.split(",") if w.strip()]
    if not all(w.isdigit() and 1 <= int(w) <= p // 2 for w in words):
        raise ValueError(f"frequencies={text!r}: whole numbers from 1 to {p // 2} between commas are wanted.")
    return tuple(dict.fromkeys(map(int, words)))
