"""How a tangent kernel is cut up: which parameters by which formula, and which layers in one sweep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from workbench.operators.tangent_layers import KernelLayer, Pairs, Part, Rows
from workbench.operators.tangent_layout import Course
from workbench.operators.tangent_uses import Lookup, Outer, Role

Item = Pairs | Part


@dataclass(frozen=True)
class Layers:
    """What a kernel consists of: ``sweeps`` of layers, each held at once, and ``loose`` parameters without a formula.

    ``unused`` parameters occur in no call that the outputs depend on: their part is zero.
    """

    sweeps: tuple[tuple[KernelLayer, ...], ...]
    loose: tuple[str, ...]
    unused: tuple[str, ...]

    def bytes(self, examples: int, outputs: int, itemsize: int) -> int:
        """What the largest sweep keeps of one side."""
        each = [sum(layer.numbers(outputs) for layer in sweep) for sweep in self.sweeps]
        return int(max(each, default=0.0) * examples * itemsize)

    @property
    def layers(self) -> tuple[KernelLayer, ...]:
        """All of them."""
        return tuple(layer for sweep in self.sweeps for layer in sweep)


def layers(course: Course, params: Mapping[str, Tensor], outputs: int, together: bool, most: float) -> Layers:
    """Choose for each parameter what is cheapest, and put layers into sweeps of ``most`` numbers an example.

    ``together``: only the sum over outputs is wanted, which then count as one of that many times the width.
    """
    where: dict[str, list[tuple[int, Role]]] = {name: [] for name in params}
    for number, use in enumerate(course.uses):
        for role, name in use.names.items():
            where[name].append((number, role))
    kept = {name: uses for name, uses in where.items() if uses and name not in course.loose}
    found = {name: _item(course, name, params[name], uses, outputs, together) for name, uses in kept.items()}
    large = {name for name in kept if _mixed(course, found[name]) and params[name].numel() * outputs > most}
    items = _joined([item for name, item in found.items() if name not in large])
    loose = tuple(name for name in params if name in course.loose or name in large)
    unused = tuple(name for name in params if not where[name] and name not in course.loose)
    return Layers(tuple(_sweeps(items, outputs, most)), loose, unused)


def positions(plan: Layers, course: Course) -> list[int]:
    """How many positions the calls of a plan have in a course: it depends on the shapes of the inputs."""
    numbers = [number for layer in plan.layers if isinstance(layer, Pairs) for number in layer.uses]
    found = [course.uses[number] for number in numbers]
    return [use.inputs(course.examples).shape[2] for use in found if isinstance(use, Outer)]


def _item(
    course: Course, name: str, param: Tensor, uses: Sequence[tuple[int, Role]], outputs: int, together: bool
) -> Item:
    pairs = _pairs(course, param, name, uses)
    if pairs is not None and _pays(pairs, param.numel(), outputs, together):
        return pairs
    return Part(name, param.numel(), tuple(uses), pairs is None)


def _mixed(course: Course, item: Item) -> bool:
    """Whether a weight is used in ways that do not add up as positions: an embedding that is also the output layer."""
    if isinstance(item, Pairs) or not item.mixed:
        return False
    return any(role == "weight" and isinstance(course.uses[number], Outer) for number, role in item.uses)


def _pairs(course: Course, param: Tensor, name: str, uses: Sequence[tuple[int, Role]]) -> Pairs | None:
    """A weight by inputs and output gradients, where all its uses are of one kind."""
    found = [course.uses[number] for number, role in uses if role == "weight"]
    outer = [use for use in found if isinstance(use, Outer)]
    kinds = {(isinstance(use, Lookup), use.turned, use.groups) for use in outer}
    if len(outer) != len(uses) or len(kinds) != 1:
        return None
    ((table, turned, groups),) = kinds
    shapes = [use.inputs(course.examples).shape for use in outer]
    i = param.shape[0] if turned else param.numel() // param.shape[0]
    o = param.numel() // i // groups
    positions = tuple(shape[2] for shape in shapes)
    return Pairs(name, tuple(number for number, _ in uses), positions, groups, i, o, table=table)


def _pays(pairs: Pairs, numel: int, outputs: int, together: bool) -> bool:
    """Whether to keep inputs and output gradients and not the weight's own gradients."""
    c, o = (1, outputs * pairs.o) if together else (outputs, pairs.o)
    return pairs.by_pairs(c, o) <= pairs.by_gradients(c, o) or numel * outputs > pairs.numbers(outputs)


def _joined(items: Sequence[Item]) -> list[Item]:
    """A bias that is used where a weight is, and nowhere else, goes with it as an input that is always 1."""
    biases = {tuple(n for n, _ in item.uses): item.name for item in items if isinstance(item, Part) and _is_bias(item)}
    joined, gone = list[Item](), set[str]()
    for item in items:
        if isinstance(item, Pairs) and not item.table and (bias := biases.get(item.uses)):
            gone.add(bias)
            item = Pairs(item.name, item.uses, item.positions, item.groups, item.i, item.o, bias)
        joined.append(item)
    return [item for item in joined if item.name not in gone]


def _is_bias(part: Part) -> bool:
    return all(role == "bias" for _, role in part.uses)


def _sweeps(items: Sequence[Item], outputs: int, most: float) -> Iterator[tuple[KernelLayer, ...]]:
    """Those nearest to the outputs first, as backward passes to them are short."""
    held, room = list[Item](), most
    for item in sorted(items, key=_depth, reverse=True):
        size = item.numbers(outputs) if isinstance(item, Pairs) else float(item.size * outputs)
        if held and size > room:
            yield _sweep(held)
            held, room = [], most
        held.append(item)
        room -= size
    if held:
        yield _sweep(held)


def _depth(item: Item) -> int:
    return max(item.uses) if isinstance(item, Pairs) else max(number for number, _ in item.uses)


def _sweep(items: Sequence[Item]) -> tuple[KernelLayer, ...]:
    pairs = [item for item in items if isinstance(item, Pairs)]
    parts = tuple(item for item in items if isinstance(item, Part))
    return (*pairs, Rows(parts)) if parts else tuple(pairs)
