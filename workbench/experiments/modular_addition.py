"""Grokking of modular addition, with weight decay and without."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from workbench.experiments.arms import VARIABLES, Arms, arms_grokking, curves_panel, evaluation_steps
from workbench.experiments.experiment import Experiment, Verdict
from workbench.figure import Axis, Figure, Line, Panel, Role
from workbench.numerics.sampling import Draw
from workbench.pace import Pace
from workbench.probe import Cost, Reading, Value, Variable
from workbench.probes.fourier_concentration import FourierConcentration
from workbench.schema import Choice, Doc, Range, Slow
from workbench.subject import Subject
from workbench.zoo.modular import Examples, added_embeddings, split
from workbench.zoo.transformer import transformer

_ROLES: tuple[Role, ...] = ("main", "second")
HEADS = 4
"""Attention heads of the transformer."""
Kind = Literal["quadratic", "relu", "transformer"]


@dataclass(frozen=True)
class Recipe:
    """What goes with a net: its width and learning rate, and what a delay ratio and a top share must reach."""

    width: int
    rate: float
    least_ratio: float
    least_top_share: float = 0.0


RECIPES: dict[Kind, Recipe] = {
    "quadratic": Recipe(128, 5e-3, 3.0),
    "relu": Recipe(256, 5e-3, 5.0),
    "transformer": Recipe(64, 3e-3, 3.0, 0.6),
}
"""The three nets."""


@dataclass(frozen=True)
class GrokkingModularAddition(Experiment):
    """Grokking of addition modulo p: weight decay makes a net generalise long after it has memorised.

    The recipe (after Power et al. 2022, arXiv:2201.02177, Gromov 2023, arXiv:2301.02679, and Kumar et al. 2024,
    arXiv:2310.06110): a net learns (a + b) mod p from half of all pairs, by AdamW (β = 0.9, 0.98) on the whole training
    set. It is one hidden layer over two added embeddings, with x² (128 units, learning rate 0.005) or relu (256 units,
    0.005), or a transformer of one block that reads its last token (width 64, 4 heads, 128 units in its mlp, 0.003).
    The second arm has no weight decay, is otherwise the same to the last bit, and trains for as many steps as the first
    arm took. Seeds decide the split and the weights.

    How to read it: accuracies on a log axis: training reaches 0.99 early, test much later, with weight decay alone.
    Up to memorising both arms' ``weight_norm`` grows alike; then weight decay holds it while test accuracy rises, and
    without it it grows on. ``gini`` and ``top_share`` are FourierConcentration's of the embedding: hidden layers share
    the task among nearly all frequencies, so that both end a little higher with weight decay and nowhere near one
    frequency; the transformer's embedding ends with few, which five hold nearly all power of.

    The verdict: the delay ratio with weight decay must reach 3, with relu 5; without it the test accuracy must stay
    under 0.2; and five frequencies must hold 0.6 of the transformer's embedding. Of p = 59, seeds 0 to 4, relu reaches
    14 to 16 and the transformer 14 to 18, with 0.77 to 0.95 in five frequencies.

    What it costs: two trainings, some seconds each; of the transformer, half a minute each.

    When it misleads: the delay depends on the share of pairs, on weight decay and on the initial scale, each by orders
    of magnitude; under some 0.3 of the pairs nothing generalises in any time.

    Errors: what the log-spaced evaluations (40 a decade) leave open.
    """

    variables: ClassVar[tuple[Variable, ...]] = (
        *VARIABLES,
        Variable("weight_norm", ("arm", "checkpoint"), "norm of the weights"),
        Variable("gini", ("arm",), "Gini coefficient of the embedding's Fourier powers after training"),
        Variable("top_share", ("arm",), "share of the five strongest frequencies in them"),
    )
    control_at_most: ClassVar[float] = 0.2
    learned: ClassVar[float] = 0.99

    modulus: Annotated[int, Range(3, 499, soft=(23, 113)), Doc("p, the number of tokens and classes."), Slow()] = 47
    share: Annotated[float, Range(0.01, 0.99, step=0.01), Doc("Share of all pairs to train on."), Slow()] = 0.5
    net: Annotated[
        Kind,
        Doc("What learns."),
        Choice(
            {
                "quadratic": "a hidden layer with x²: quick, and its solution is known",
                "relu": "a hidden layer with relu: slower, with a longer delay",
                "transformer": "one block with attention: its embedding ends with few frequencies",
            }
        ),
        Slow(),
    ] = "quadratic"
    width: Annotated[
        int,
        Range(0, 10_000, soft=(0, 512)),
        Doc("Hidden units, or the transformer's width; 0 takes the net's."),
        Slow(),
    ] = 0
    weight_decay: Annotated[float, Range(0.001, 100.0, log=True), Doc("Of the first arm, decoupled."), Slow()] = 1.0
    learning_rate: Annotated[
        float | None, Range(1e-6, 1.0, log=True), Doc("Of AdamW; None takes the net's."), Slow()
    ] = None
    initial_scale: Annotated[float, Range(0.01, 100.0, log=True), Doc("Of the initial weights."), Slow()] = 1.0
    steps: Annotated[int, Range(2, 1_000_000, soft=(100, 50_000)), Doc("Steps at most."), Slow()] = 3000

    def validate(self) -> None:
        """The transformer's heads share its width."""
        if self.net == "transformer" and self.width % HEADS:
            raise ValueError(f"width={self.width} must be a multiple of {HEADS}, the transformer's attention heads.")

    @property
    def recipe(self) -> Recipe:
        """What goes with the net, with the settings that say otherwise."""
        own = RECIPES[self.net]
        return replace(own, width=self.width or own.width, rate=self.learning_rate or own.rate)

    def build(self, seed: int) -> nn.Module:
        """The net with initial weights of a seed."""
        wide, scale = self.recipe.width, self.initial_scale
        if self.net != "transformer":
            return added_embeddings(self.modulus, wide, "relu" if self.net == "relu" else "square", scale, seed)
        p, head = self.modulus, wide // HEADS
        return transformer(p, p, 2, wide, head, 1, seed=seed, hidden=2 * wide, embedding_scale=scale)

    @property
    def decays(self) -> tuple[float, float]:
        """Weight decay of the two arms."""
        return self.weight_decay, 0.0

    def stream(self, subject: Any, draw: Draw) -> Iterator[Reading]:
        """Train with weight decay, then without for as long."""
        train, test = split(self.modulus, self.share, draw.seed)
        arms = Arms(self.decays, evaluation_steps(self.steps), arms_grokking(self.learned))
        kept = evaluation_steps(self.steps, 10)
        norms, pace, last = np.full((2, len(kept)), np.nan), Pace(), self.steps
        own = {"weight_norm": norms, "gini": np.full(2, np.nan), "top_share": np.full(2, np.nan)}
        for arm, decay in enumerate(self.decays):
            net = self.build(draw.seed + 1_000_003)
            optimizer = torch.optim.AdamW(net.parameters(), lr=self.recipe.rate, betas=(0.9, 0.98), weight_decay=decay)
            at = 0
            for at in _train(arms, arm, net, optimizer, (train, test), kept, last):
                if pace.due():
                    yield self._report(arms, own, kept, (arm + (at + 1) / (last + 2)) / 2)
            found, last = arms.finish(arm), at
            norms[:, np.isin(kept, found["checkpoint"])] = _rows(found)
            own["gini"][arm], own["top_share"][arm] = _concentration(net, train)
            yield self._report(arms, own, kept, (arm + 1) / 2)

    def _report(self, arms: Arms, own: dict[str, Any], kept: tuple[int, ...], done: float) -> Reading:
        coords = {"arm": arms.values, "step": arms.steps, "checkpoint": kept}
        return self.reading(done, arms.now() | own, coords=coords, converged=done == 1)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The delay with weight decay, and the test accuracies that both arms ended with."""
        decayed = data.isel(arm=0)
        return {
            "delay_ratio": float(decayed.delay_ratio),
            "delay_ratio_error": float(decayed.delay_ratio_error),
            "step_memorise": float(decayed.step_memorise),
            "step_generalise": float(decayed.step_generalise),
            "test_accuracy": _last(decayed.test_score.values),
            "control_test_accuracy": _last(data.test_score.values[1]),
            "gini": float(decayed.gini),
            "control_gini": float(data.gini[1]),
            "top_share": float(decayed.top_share),
            "control_top_share": float(data.top_share[1]),
        }

    def verdict(self, data: xr.Dataset) -> Verdict:
        """The delay ratio with weight decay, a control without that does not generalise, and few frequencies."""
        ratio, control, recipe = float(data.delay_ratio[0]), _last(data.test_score.values[1]), self.recipe
        words = f"delay ratio with weight decay; test accuracy without it {control:.2f}, at most {self.control_at_most}"
        passed = ratio >= recipe.least_ratio and control < self.control_at_most
        if recipe.least_top_share:
            share = float(data.top_share[0])
            words += f"; five frequencies hold {share:.2f} of the embedding, wanted {recipe.least_top_share:g}"
            passed = passed and share >= recipe.least_top_share
        return Verdict(bool(passed), ratio, recipe.least_ratio, words)

    def figure(self, data: xr.Dataset) -> Figure:
        """Accuracies of both arms on a log axis of steps, and the norm of their weights in the same colours."""
        marks = tuple(
            Line(data["checkpoint"].values[there], norm[there], role=role)
            for norm, role in zip(data.weight_norm.values, _ROLES, strict=True)
            for there in [~np.isnan(norm)]
        )
        norm = Panel(marks, Axis("step", "symlog", threshold=1.0), Axis("weight norm"))
        return Figure((curves_panel(data, "weight decay", "accuracy"), norm), title="addition modulo a prime")

    def estimate(self, subject: Any) -> Cost:
        """All pairs through the net with gradients, and the weights at the checkpoints."""
        pairs, wide, attends = self.modulus**2, self.recipe.width, self.net == "transformer"
        weights = 3 * self.modulus * wide + 8 * wide**2 * attends
        held = (
            4 * pairs * ((48 if attends else 4) * wide + 4 * self.modulus)
            + 4 * weights * len(evaluation_steps(self.steps, 10)) * 2
        )
        return Cost(held, None, f"2 trainings of at most {self.steps} steps")


def _concentration(net: nn.Module, train: Examples) -> tuple[float, float]:
    """How few frequencies the first embedding consists of, in two ways; nan where training has diverged."""
    if not all(bool(torch.isfinite(p).all()) for p in net.parameters()):
        return math.nan, math.nan
    found = FourierConcentration().run(Subject(net, train)).data
    return float(found.gini), float(found.top_share)


def _rows(found: xr.Dataset) -> NDArray[np.float64]:
    """Norms (2, checkpoint) of the arms that are over, the other unknown."""
    rows = np.full((2, found.sizes["checkpoint"]), np.nan)
    rows[: found.sizes["run"]] = found.weight_norm.values
    return rows


def _last(scores: NDArray[np.float64]) -> float:
    there = scores[~np.isnan(scores)]
    return float(there[-1]) if there.size else float("nan")


def _train(
    arms: Arms,
    arm: int,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: tuple[Examples, Examples],
    kept: tuple[int, ...],
    last: int,
) -> Iterator[int]:
    """Train up to step ``last`` with evaluations on the way; yields the step of each, and ends when it generalises."""
    (x, y), (held_x, held_y) = data
    due, keep = set(arms.steps), set(kept)
    for step in range(last + 1):
        logits = net(x)
        loss = functional.cross_entropy(logits, y)
        if step in keep:
            arms.weights[arm][step] = {name: t.detach().clone() for name, t in net.state_dict().items()}
        if step in due:
            with torch.no_grad():
                held = net(held_x)
                scores = {"train_score": _accuracy(logits, y), "test_score": _accuracy(held, held_y)}
                losses = {"train_loss": loss.item(), "test_loss": functional.cross_entropy(held, held_y).item()}
            arms.put(arm, step, scores | losses)
            yield step
            if arms.settled(arm):
                return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _accuracy(logits: Tensor, targets: Tensor) -> float:
    """Share of largest logits at the target; nan where training has diverged."""
    if not bool(torch.isfinite(logits).all()):
        return float("nan")
    return (logits.argmax(1) == targets).double().mean().item()
