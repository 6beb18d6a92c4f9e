"""Several subjects together: two to compare, or many by label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from workbench.fingerprint import digest
from workbench.plan import Plan
from workbench.subject import Subject


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

    def with_plan(self, plan: Plan) -> Pair:
        """Both evaluated by another plan."""
        return Pair(self.first.with_plan(plan), self.second.with_plan(plan))

    def describe(self) -> dict[str, Any]:
        """JSON-ready facts about both."""
        first = self.first.describe()
        return {"first": first, "second": self.second.describe(), "on": first["on"]}


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
