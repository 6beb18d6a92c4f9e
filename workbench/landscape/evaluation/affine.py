"""First layers, whose outputs on fixed inputs are affine in the coordinates: A + a·B + b·C.

Dense and convolutional layers are linear in their weights. Where nothing that moves reaches a layer's inputs, its
outputs at θ, and its outputs with each direction in the place of its weights, give its outputs at every point.
"""

# pyright: reportPrivateUsage=false
# A module's registry of parameters has no public name.

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from workbench.data import Batch
from workbench.landscape.evaluation.moving import Direction, combined, combined_at, moved
from workbench.subject import Subject

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that are linear in weight and bias; subclasses may be anything else."""
PROBED = 8
"""Examples on which layers are looked for."""
Score = Callable[[Mapping[str, Tensor], Batch], Tensor]
Product = tuple[Tensor, Tensor | None, Tensor | None]


@contextmanager
def replaced(subject: Subject, forwards: Mapping[nn.Module, Callable[..., Any]]) -> Generator[None]:
    """Other forward functions for some modules of the subject's shell, for one evaluation, then their own again."""
    with subject.lock:
        try:
            for module, forward in forwards.items():
                module.__dict__["forward"] = forward
            yield
        finally:
            for module in forwards:
                module.__dict__.pop("forward", None)


@dataclass(eq=False)
class _Seen:
    """What one layer was called with during a pass."""

    module: nn.Module
    calls: int = 0
    fixed: bool = True
    output: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        found = type(self.module).forward(self.module, *args, **kwargs)
        self.calls += 1
        self.fixed &= len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and not args[0].requires_grad
        self.output = found.detach()
        return found

    def given(self, *_: Any, **__: Any) -> Tensor:
        assert self.output is not None
        return self.output.clone()


@dataclass(eq=False)
class FirstLayers:
    """Products of some layers with both directions, batch by batch, made when a batch is first met."""

    subject: Subject
    layers: Mapping[nn.Module, Mapping[str, str]]
    directions: tuple[Direction, Direction | None]
    products: dict[int, dict[nn.Module, Product]] = field(default_factory=dict[int, dict[nn.Module, Product]])

    @property
    def names(self) -> frozenset[str]:
        """The parameters that need not be moved, since the products hold what they do."""
        return frozenset(name for own in self.layers.values() for name in own.values())

    def ready(self, place: int, batch: Batch, score: Score) -> None:
        """Make the products of batch number ``place``; one forward pass, and two more of these layers."""
        if place in self.products:
            return
        found: dict[nn.Module, Product] = {}

        def keeping(module: nn.Module) -> Callable[[Tensor], Tensor]:
            def forward(inputs: Tensor) -> Tensor:
                found[module] = self._products(module, inputs)
                return found[module][0].clone()

            return forward

        with replaced(self.subject, {m: keeping(m) for m in self.layers}):
            score({}, batch)
        self.products[place] = found

    def _products(self, module: nn.Module, inputs: Tensor) -> Product:
        """The layer at θ, then with each direction in the place of its weights (those that stay count as zero)."""
        apply, own, registry = type(module).forward, self.layers[module], module._parameters
        here, found = dict(registry), [apply(module, inputs)]
        for direction in self.directions:
            parts = {key: None if direction is None else moved(direction[name]) for key, name in own.items()}
            if all(part is None for part in parts.values()):
                found.append(None)
                continue
            for key, tensor in here.items():
                part = parts.get(key)
                registry[key] = part if part is not None or tensor is None else torch.zeros_like(tensor)  # type: ignore[assignment]
            found.append(apply(module, inputs))
        registry.update(here)
        return (found[0], found[1], found[2])

    def at(self, place: int, a: Any, b: Any) -> dict[nn.Module, Callable[..., Any]]:
        """Forward functions that give the layers' outputs at (a, b) on batch number ``place``."""

        def given(product: Product) -> Callable[..., Tensor]:
            return lambda *_, **__: combined(*product, a, b)

        return {module: given(product) for module, product in self.products[place].items()}

    def together(self, place: int, a: Tensor, b: Tensor) -> dict[nn.Module, Tensor]:
        """The layers' outputs on batch number ``place`` at several points, coordinates (k,), as tensors (k, ...)."""
        return {module: combined_at(product, a, b) for module, product in self.products[place].items()}


def first_layers(
    subject: Subject, first: Direction, second: Direction | None, score: Score, room: float
) -> FirstLayers | None:
    """The layers of a subject that are affine in the coordinates; None where there are none.

    A layer counts where it is called once, on one tensor that no gradient of a moving parameter reaches, and where
    its parameters are used nowhere else: shared with no other module, and without a gradient once its output is
    given. What hides from gradients is left to the comparison with the plain way on a real point. Cost: two passes
    over a few examples. Products that would take more than ``room`` bytes are not made.
    """
    batch = _probe(subject)
    point = {name: p.requires_grad_() for name, p in subject.params.items() if bool(_moves(name, first, second))}
    seen = [_Seen(m) for m in _candidates(subject, point)]
    with torch.enable_grad():
        with replaced(subject, {s.module: s.forward for s in seen}):
            score(point, batch)
        kept = [s for s in seen if s.calls == 1 and s.fixed]
        if not kept or sum(3 * s.output.nbytes for s in kept if s.output is not None) / batch.size > room:
            return None
        with replaced(subject, {s.module: s.given for s in kept}):
            total = score(point, batch).sum()
    names = _names(subject)
    layers = {s.module: {k: names[id(p)] for k, p in _own(s.module).items()} for s in kept}
    layers = {m: {k: name for k, name in own.items() if name in point} for m, own in layers.items()}
    free = [m for m, own in layers.items() if not _used(total, [point[name] for name in own.values()])]
    return FirstLayers(subject, {m: layers[m] for m in free}, (first, second)) if free else None


def _probe(subject: Subject) -> Batch:
    return next(iter(subject.batches(PROBED)))


def _moves(name: str, first: Direction, second: Direction | None) -> bool:
    return moved(first[name]) is not None or (second is not None and moved(second[name]) is not None)


def _names(subject: Subject) -> dict[int, str]:
    return {id(p): name for name, p in subject.module.named_parameters()}


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own parameters; one that it goes without, such as a bias, is left out."""
    return dict(module.named_parameters(recurse=False))


def _candidates(subject: Subject, point: Mapping[str, Tensor]) -> list[nn.Module]:
    """Layers of the known kinds whose weight moves and which share no parameter with another module."""
    modules, names = list(subject.module.modules()), _names(subject)
    places = Counter(id(p) for m in modules for p in _own(m).values())
    found: list[nn.Module] = []
    for m in modules:
        own = list(_own(m).values())
        plain = type(m) in LINEAR and "forward" not in m.__dict__ and "weight" in _own(m)
        if plain and all(places[id(p)] == 1 for p in own) and any(names[id(p)] in point for p in own):
            found.append(m)
    return found


def _used(total: Tensor, parameters: list[Tensor]) -> bool:
    """Whether a gradient of ``total`` reaches any of the parameters."""
    if not total.requires_grad:
        return False
    found = torch.autograd.grad(total, parameters, allow_unused=True, retain_graph=True)
    return any(g is not None for g in cast("tuple[Tensor | None, ...]", found))
