"""Tiny subjects and probes in float64, shared by tests: known exactly."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr
from hypothesis import strategies as st
from torch import nn

from workbench.figure import Axis, Figure, Line, Panel, Points
from workbench.fingerprint import digest
from workbench.numerics.sampling import Draw
from workbench.plan import Plan
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Display, Doc, Field, Range, Slow, fields


@dataclass
class ToySubject:
    """A quadratic loss ½ Σ a_i x_i² at ``weights``; everything that a probe, a job or a store asks of a subject."""

    weights: torch.Tensor = field(default_factory=lambda: torch.linspace(-1, 1, 12, dtype=torch.float64))
    label: str = "quadratic"
    plan: Plan = field(default_factory=Plan)
    room: int = 2**30
    fingerprints: int = 0

    kind: ClassVar[str] = "subject"
    dtype: ClassVar[torch.dtype] = torch.float64
    device: ClassVar[torch.device] = torch.device("cpu")

    @property
    def size(self) -> int:
        return self.weights.numel()

    @property
    def curvature(self) -> torch.Tensor:
        return torch.arange(1, self.size + 1, dtype=torch.float64)

    def loss(self) -> float:
        return float((self.curvature * self.weights**2).sum() / 2)

    def fingerprint(self) -> str:
        self.fingerprints += 1
        return digest(self.weights)

    def describe(self) -> dict[str, Any]:
        return {"on": "on 1 of 1 examples", "model": self.label, "dtype": "float64", "device": "cpu"}

    def version(self) -> tuple[int, ...]:
        return (self.weights._version,)

    def with_plan(self, plan: Any) -> ToySubject:
        return replace(self, plan=plan if isinstance(plan, Plan) else Plan(**plan))

    def available_memory(self) -> int:
        return self.room


@dataclass(frozen=True)
class Trace(Probe[ToySubject]):
    """Trace of the toy's Hessian by random vectors, one reading each: ``trace = mean(v · a v)``.

    With Gaussian vectors the standard error shrinks with the square root of their number.
    """

    vectors: Annotated[int, Range(2, 5000), Doc("Random vectors to draw.")] = 5
    pause: Annotated[float, Range(0.0, 10.0), Doc("Seconds to sleep before each reading."), Slow()] = 0.0
    kind: Annotated[
        Literal["normal", "rademacher"],
        Doc("Law of the vectors."),
        Choice({"normal": "Gaussian entries", "rademacher": "plus and minus one"}),
    ] = "normal"
    log: Annotated[bool, Doc("Draw the samples on a log axis."), Display()] = False

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("sample", ("vector",), "one sample of the trace"),
        Variable("trace", (), "mean of the samples", error="trace_error"),
        Variable("trace_error", (), "standard error of the mean"),
    )

    def stream(self, subject: ToySubject, draw: Draw) -> Iterator[Reading]:
        samples = np.full(self.vectors, np.nan)
        for i in range(self.vectors):
            time.sleep(self.pause)
            v = draw(i, kind=self.kind)
            samples[i] = float(v @ (subject.curvature * v))
            yield self.report(samples, i + 1)

    def report(self, samples: np.ndarray, count: int) -> Reading:
        known = samples[:count]
        values = {"sample": samples, "trace": known.mean()}
        if count > 1:
            values["trace_error"] = known.std(ddof=1) / count**0.5
        return self.reading(count / self.vectors, values, converged=count == self.vectors)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        return {"trace": float(data["trace"]), "trace_error": float(data["trace_error"])}

    def figure(self, data: xr.Dataset) -> Figure:
        at = np.arange(data.sizes["vector"])
        marks = (Points(at, data["sample"].values), Line(at, np.full(len(at), float(data["trace"])), role="reference"))
        return Figure((Panel(marks, Axis("vector"), Axis("trace", "log" if self.log else "linear")),))

    def estimate(self, subject: ToySubject) -> Cost:
        return Cost(8 * (subject.size + self.vectors), self.vectors, f"{self.vectors} products")


@dataclass(frozen=True)
class Failing(Trace):
    """Raises after its second reading."""

    def stream(self, subject: ToySubject, draw: Draw) -> Iterator[Reading]:
        for count, reading in enumerate(super().stream(subject, draw)):
            if count == 2:
                raise ArithmeticError("the third vector is cursed")
            yield reading


def fill(store: Any) -> Any:
    """Four readings in a store: two seeds of a small net, one of a large one, and the toy's own."""
    for label, seed in (("small net", 0), ("small net", 1), ("large net", 0)):
        subject = ToySubject(label=label, weights=torch.full((3,), float(ord(label[0])), dtype=torch.float64))
        store.save(Trace(vectors=3).run(subject, seed=seed))
    store.save(Trace(vectors=7).run(ToySubject()))
    return store


# -------------------------------------------- a net with which everything can go wrong, and what is made of it


class Fuse:
    """Sits in every net below, counts its forward passes, looks around during them, and can break them."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Count from zero, look at nothing, break nothing."""
        self.count = 0
        self.blow_at: int | None = None
        self.poison_from: int | None = None
        self.watch: Callable[[], None] | None = None

    def burn(self, x: torch.Tensor) -> torch.Tensor:
        """What a forward pass through the net does."""
        self.count += 1
        if self.watch is not None:
            self.watch()
        if self.count == self.blow_at:
            raise FuseBlown("the forward pass failed half-way")
        if self.poison_from is not None and self.count >= self.poison_from:
            return x * float("nan")
        return x


class FuseBlown(ArithmeticError):
    """Raised in the middle of a forward pass."""


FUSE = Fuse()


class Fused(nn.Module):
    """The identity, through the fuse."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return FUSE.burn(x)


def net(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Dense, BatchNorm, dropout, a frozen weight, mixed flags, a gradient and a hook of the user; 73 parameters."""
    rng = torch.Generator().manual_seed(seed)
    layers = OrderedDict(
        first=nn.Linear(4, 7),
        norm=nn.BatchNorm1d(7),
        bend=nn.Tanh(),
        drop=nn.Dropout(0.3),
        fuse=Fused(),
        head=nn.Linear(7, 3),
    )
    made = nn.Sequential(layers).to(dtype)
    with torch.no_grad():
        for p in (*made.parameters(), *(b for b in made.buffers() if b.is_floating_point())):
            p.copy_(0.5 * torch.randn(p.shape, generator=rng, dtype=dtype))
        made.norm.running_var.abs_().add_(0.5)
        made.norm.weight.abs_().add_(0.5)
    made.train()
    made.norm.eval()
    made.first.bias.requires_grad_(False)
    made.first.weight.grad = torch.ones_like(made.first.weight)
    made.head.register_forward_hook(_users_hook)
    return made


def _users_hook(module: nn.Module, inputs: Any, output: Any) -> None:
    """A hook that does nothing, and must still be there afterwards."""


def examples(seed: int = 0, count: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """Three overlapping clouds, ten examples each."""
    rng = torch.Generator().manual_seed(100 + seed)
    y = torch.arange(count) % 3
    centres = torch.randn(3, 4, generator=rng, dtype=torch.float64)
    return centres[y] + 0.5 * torch.randn(count, 4, generator=rng, dtype=torch.float64), y


@dataclass
class World:
    """What a probe looks at, and everything of the user's that must stay as it is."""

    subject: Any
    models: tuple[nn.Module, ...]
    data: tuple[torch.Tensor, ...]


def world(looks_at: str, folder: Path, planted: float | None = None) -> World:
    """A world of the kind that a probe looks at; ``planted`` (nan) is put among weights or recorded scalars."""
    worlds = {"subject": _subject_world, "pair": _pair_world, "trajectory": _path_world, "runs": _runs_world}
    return worlds.get(looks_at, _no_world)(folder, planted)


def _no_world(folder: Path, planted: float | None) -> World:
    from workbench.nothing import Nothing

    return World(Nothing(), (), ())


def _subject_world(folder: Path, planted: float | None) -> World:
    from workbench.subject import Subject

    model, data = net(), examples()
    if planted is not None:
        with torch.no_grad():
            model.head.weight[0, 0] = planted
    return World(Subject(model, data, loss="cross_entropy", held_out=examples(1)), (model,), data)


def _pair_world(folder: Path, planted: float | None) -> World:
    from workbench.several import Pair
    from workbench.subject import Subject

    models, data = (net(0), net(1)), examples()
    return World(Pair(*(Subject(m, data, loss="cross_entropy") for m in models)), models, data)


def _path_world(folder: Path, planted: float | None, seed: int = 0) -> World:
    from workbench.trajectory import Trajectory

    path, data = folder / f"run{seed}", examples()
    if not path.exists():
        record_training(path, seed, data, planted)
    model = net(seed)
    return World(Trajectory.open(path).using(model, data, "cross_entropy"), (model,), data)


def _runs_world(folder: Path, planted: float | None) -> World:
    from workbench.several import Runs

    paths = [_path_world(folder, planted, seed) for seed in (0, 1)]
    runs = Runs({f"seed {k}": path.subject for k, path in enumerate(paths)})
    return World(runs, tuple(m for p in paths for m in p.models), paths[0].data)


def record_training(path: Path, seed: int, data: tuple[torch.Tensor, ...], planted: float | None = None) -> None:
    """Twelve steps on record, with the scalars that probes of paths read: memorised at 4, grokked at 9, two tasks."""
    from workbench.dynamics.recorder import Recorder

    model, (x, y) = net(seed), data
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    model.eval()
    with Recorder(path, model, optimizer, every=4) as recorder:
        for step in range(1, 13):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            accuracy = {"train_accuracy": float(step >= 4), "test_accuracy": float(step >= 9)}
            accuracy |= {
                "task": step // 7,
                "test_accuracy_task0": 1 - 0.5 * (step == 7),
                "test_accuracy_task1": step / 12,
            }
            held = {"train_loss": loss.item(), "test_loss": 2 * loss.item(), **accuracy}
            recorder.step(**{name: value if planted is None else planted for name, value in held.items()})


# ------------------------------------------------------------------------------------- settings


def quick(cls: type[Probe[Any]]) -> Probe[Any]:
    """A probe with its counts turned down, so that a whole run on a toy takes a moment."""
    default = cls()
    few = {f.name: _few(f) for f in fields(cls) if f.kind == "int" and f.range and (f.default or 0) > 7}
    few.pop("most", None)  # a bound is no count: lowered, it would only keep a run from converging
    return replace(default, **few)


def _few(f: Field) -> int:
    assert f.range
    return int(min(f.default, max(7, f.range.low)))


def settings_of(cls: type[Probe[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Any settings that a probe's schema allows, one by one."""
    return st.fixed_dictionaries({}, optional={f.name: _values(f) for f in fields(cls) if f.kind != "probe"})


def _values(f: Field) -> st.SearchStrategy[Any]:
    low, high = (f.range.low, f.range.high) if f.range else (-1e6, 1e6)
    kinds: dict[str, Callable[[], st.SearchStrategy[Any]]] = {
        "int": lambda: st.integers(math.ceil(low), math.floor(high)),
        "float": lambda: st.floats(low, high),
        "bool": st.booleans,
        "text": lambda: st.text(max_size=12),
        "choice": lambda: st.sampled_from(f.choices),
        "choices": lambda: st.lists(st.sampled_from(f.choices), unique=True).map(tuple),
    }
    found = kinds[f.kind]()
    return st.none() | found if f.optional else found
