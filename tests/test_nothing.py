"""Probes that look at several kinds of thing, and at nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import toys

from workbench import catalog
from workbench.job import Job
from workbench.nothing import Nothing
from workbench.numerics.sampling import Draw
from workbench.probe import Reading
from workbench.several import Runs
from workbench.store import Store


@dataclass(frozen=True)
class Several(toys.Trace):
    """Looks at a trajectory, at runs, and at nothing."""

    looks_at: ClassVar[Any] = "trajectory"
    looks_also_at: ClassVar[Any] = ("runs", "nothing")

    def stream(self, subject: Any, draw: Draw) -> Iterator[Reading]:
        yield self.reading(1.0, {"trace": float(draw.seed)}, converged=True, sizes={"vector": 1})

    def estimate(self, subject: Any) -> Any:
        return toys.Cost(1, 1, f"a {subject.kind}")


def test_a_probe_that_looks_at_several_kinds_takes_each_and_no_other(tmp_path) -> None:
    runs = Runs({"one": toys.ToySubject()})
    for target in (Nothing(), runs):
        job = Job(target, store=Store(tmp_path / "readings"))
        job.submit(Several(), seed=7)
        assert job.wait(20).data.trace == 7
        job.submit(Several(), seed=7)
        assert job.wait(20).data.trace == 7
        assert job.state.from_store, "the store knows it by settings and seed"
    with pytest.raises(TypeError, match="looks at a trajectory; got a subject"):
        Several().run(toys.ToySubject())
    with pytest.raises(TypeError, match="looks at a subject; got a nothing"):
        toys.Trace().run(Nothing())  # type: ignore[arg-type]


def test_the_catalog_lists_it_under_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_foreign", lambda: (Several,))
    for kind in ("trajectory", "runs", "nothing"):
        assert "Several" in catalog.probes(kind)
    assert "Several" not in catalog.probes("subject")
    assert "looks at a trajectory or runs or a nothing" in catalog.page(Several)
