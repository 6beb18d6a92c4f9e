"""Several subjects together: two to compare, or many by label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch

from workbench.fingerprint import digest
from workbench.plan import Plan
from workbench.subject import Subject
from workbench.trees import leaves

NAMED = 6
"""Labels of runs that are named where they are shown in words."""


class Pair:
    """Two subjects to compare: two models, or two moments of one.

    Raises:
        TypeError: something that is not a Subject.
    """

    kind: ClassVar[str] = "pair"

    def __init__(self, first: Subject, second: Subject) -> None:
        for one in (first, second):
            if not isinstance(one, Subject):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(
                    f"a Pair holds two Subjects; got {type(one).__name__}. Make them with wb.Subject(model, data)."
                )
        self.first, self.second = first, second

    def fingerprint(self) -> str:
        """A hash of both, in order."""
        return digest("pair", self.first.fingerprint(), self.second.fingerprint())

    def version(self) -> tuple[Any, ...]:
        """Changes when a weight of either is written."""
        return (self.first.version(), self.second.version())

    def snapshot(self) -> Pair:
        """Both at the weights of now."""
        return Pair(self.first.snapshot(), self.second.snapshot())

    @property
    def size(self) -> int:
        """The number of chosen scalars of the first."""
        return self.first.size

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the first."""
        return self.first.dtype

    @property
    def device(self) -> torch.device:
        """Where the first is evaluated."""
        return self.first.device

    @property
    def notes(self) -> tuple[str, ...]:
        """What either has to say, once."""
        return tuple(dict.fromkeys((*self.first.notes, *self.second.notes)))

    @property
    def plan(self) -> Plan:
        """How both are evaluated; the smaller chunk where they differ."""
        return min(self.first.plan, self.second.plan, key=lambda plan: plan.chunk or 0)

    def with_plan(self, plan: Plan) -> Pair:
        """Both evaluated by another plan."""
        return Pair(self.first.with_plan(plan), self.second.with_plan(plan))

    def available_memory(self) -> int:
        """Bytes that are free on the device that has less of them."""
        return min(self.first.available_memory(), self.second.available_memory())

    def describe(self) -> dict[str, Any]:
        """JSON-ready facts about both."""
        first, second = self.first.describe(), self.second.describe()
        place = {"dtype": first["dtype"], "device": first["device"]}
        return {"first": first, "second": second, "on": first["on"], **place}

    def check_parameters(self) -> None:
        """Refuse networks whose parameters do not correspond.

        Raises:
            ValueError: other names or shapes; the message says which.
        """
        one, two = ({name: tuple(p.shape) for name, p in s.params.items()} for s in (self.first, self.second))
        if one != two:
            raise ValueError(f"the two subjects have different parameters: {_difference(one, two)}. {_ALIKE}")

    def check_alike(self) -> None:
        """Refuse to compare what is not the same function at two points: call it before measuring both.

        Cost: one pass over the examples, without the models.

        Raises:
            ValueError: parameters, loss, BatchNorm policy, precision or examples differ; the message says how.
        """
        self.check_parameters()
        facts = [_facts(s) for s in (self.first, self.second)]
        if facts[0] != facts[1]:
            raise ValueError(f"the two subjects are not the same function: {_difference(*facts)}. {_ALIKE}")
        if not _same_examples(self.first, self.second):
            raise ValueError(f"the two subjects are measured on different examples. {_ALIKE}")


_SAME = ("loss", "reduction", "norm", "dtype", "examples")
_ALIKE = (
    "Curvature and sharpness depend on all of these, so make both with the same data, loss, norm, dtype, max_examples "
    "and seed; trajectory.pair(step, other) does."
)


def _facts(subject: Subject) -> dict[str, Any]:
    """What must agree; micro-batches are part of the function where BatchNorm takes their statistics."""
    said = subject.describe()
    return {name: said[name] for name in (*_SAME, *(("batch_size",) if subject.norm != "eval" else ()))}


def _difference(one: Mapping[str, Any], two: Mapping[str, Any]) -> str:
    """The first entry that differs, in words."""
    name = next(n for n in {**one, **two} if n not in one or n not in two or one[n] != two[n])
    if name not in one or name not in two:
        return f"only the {'first' if name in one else 'second'} has {name!r}"
    return f"{name} is {one[name]} in the first and {two[name]} in the second"


def _same_examples(one: Subject, two: Subject) -> bool:
    """Whether all inputs and targets agree bit for bit, in one order."""
    step = one.plan.chunk
    for a, b in zip(one.batches(step), two.batches(step), strict=False):
        ours, theirs = list(leaves(a.raw)), list(leaves(b.raw))
        if len(ours) != len(theirs):
            return False
        if not all(x.shape == y.shape and torch.equal(x.to(y.device), y) for x, y in zip(ours, theirs, strict=True)):
            return False
    return True


class Runs(Mapping[str, Any]):
    """Many subjects or trajectories by label: seeds, widths, learning rates.

    Raises:
        ValueError: no runs.
        TypeError: a label that is not text, or members of different kinds.
    """

    kind: ClassVar[str] = "runs"

    def __init__(self, members: Mapping[str, Any]) -> None:
        if not members:
            raise ValueError("Runs holds at least one subject or trajectory: Runs({'seed 0': subject}).")
        kinds = {type(m).__name__ for m in members.values()}
        if len(kinds) > 1:
            raise TypeError(f"Runs holds members of one kind; got {', '.join(sorted(kinds))}.")
        for label in members:
            if not isinstance(label, str):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"labels of Runs are text; got {label!r}.")
        self._members = dict(members)

    def __getitem__(self, label: str) -> Any:
        return self._members[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __repr__(self) -> str:
        shown = [*self._members][:NAMED]
        more = f", and {len(self) - NAMED} more" if len(self) > NAMED else ""
        return f"<Runs: {len(self)} by label: {', '.join(shown)}{more}>"

    def fingerprint(self) -> str:
        """A hash of all labels and members, in order."""
        return digest("runs", [(label, member.fingerprint()) for label, member in self.items()])

    def version(self) -> tuple[Any, ...]:
        """Changes when a weight of any subject among them is written."""
        return tuple(member.version() if hasattr(member, "version") else () for member in self.values())

    def snapshot(self) -> Runs:
        """All subjects at the weights of now."""
        return Runs({label: m.snapshot() if hasattr(m, "snapshot") else m for label, m in self.items()})

    def describe(self) -> dict[str, Any]:
        """JSON-ready facts about each."""
        return {"runs": {label: member.describe() for label, member in self.items()}, "on": f"{len(self)} runs"}
