"""Critical periods: a tiny run against plain NumPy and, at depth 1, a geometric sum; verdicts on data written down."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from numpy.typing import NDArray

from workbench.experiments import critical_periods_in_linear_nets as module
from workbench.experiments.critical_periods_in_linear_nets import CriticalPeriodsInLinearNets
from workbench.experiments.experiment import judge
from workbench.zoo.pathways import mapping, pathways

Floats = NDArray[np.float64]
TINY = CriticalPeriodsInLinearNets(deepest=3, short=4, longer=2, late=6, clean=60, rate=0.02, size=5, nets=3)


def start(probe: CriticalPeriodsInLinearNets, seed: int, depth: int, net: int) -> list[list[Floats]]:
    """Both pathways' matrices at the start, first layer first."""
    made = pathways((probe.size,) * (depth + 1), scale=probe.scale, seed=seed + 1_000_003 * (net + 1))
    return [[p.detach().numpy().astype(float) for p in path.parameters()] for path in made.paths]


def chained(matrices: list[Floats]) -> Floats:
    whole = np.eye(len(matrices[0]))
    for matrix in matrices:
        whole = matrix @ whole
    return whole


def learned(
    paths: list[list[Floats]], target: Floats, rate: float, window: tuple[int, int], clean: int
) -> list[Floats]:
    """Both maps after gradient descent, each gradient written as the products on both sides of its matrix."""
    for step in range(window[1] + clean):
        gates = (1.0, 0.0 if window[0] <= step < window[1] else 1.0)
        slope = sum(g * chained(path) for g, path in zip(gates, paths, strict=True)) - target
        moved = []
        for gate, path in zip(gates, paths, strict=True):
            sides = [
                (chained([*path[k + 1 :], np.eye(len(target))]), chained([np.eye(len(target)), *path[:k]]))
                for k in range(len(path))
            ]
            moved.append(
                [w - rate * gate * left.T @ slope @ right.T for w, (left, right) in zip(path, sides, strict=True)]
            )
        paths = moved
    return [chained(path) for path in paths]


def share(maps: list[Floats]) -> float:
    """Of the second map along the four largest modes of both together."""
    left, _, right = np.linalg.svd(maps[0] + maps[1])
    along = [sum(left[:, i] @ one @ right[i] for i in range(4)) for one in maps]
    return float(along[1] / (along[0] + along[1]))


@pytest.fixture(scope="module")
def tiny() -> xr.Dataset:
    return TINY.run(seed=7).data


@pytest.mark.parametrize("deficit", module.DEFICITS)
def test_shares_are_those_of_gradient_descent_written_out(tiny: xr.Dataset, deficit: str) -> None:
    target, window = mapping(size=5, seed=7).numpy(), TINY.windows[deficit]
    assert window == {"none": (0, 0), "short": (0, 4), "long": (0, 8), "late": (6, 14)}[deficit]
    for depth in (1, 3):
        wanted = []
        for net in range(TINY.nets):
            maps = learned(start(TINY, 7, depth, net), target, TINY.rate, window, TINY.clean)
            wanted.append(share(maps))
        found = tiny.sel(depth=depth, deficit=deficit)
        assert found.net_share.values == pytest.approx(wanted, abs=1e-4)
        assert float(found.share) == pytest.approx(np.mean(wanted), abs=1e-4)
        assert float(found.share_error) == pytest.approx(np.std(wanted, ddof=1) / math.sqrt(3), abs=1e-4)
    assert (float(tiny.onset.sel(deficit=deficit)), float(tiny.removal.sel(deficit=deficit))) == window


def test_one_matrix_a_pathway_learns_a_geometric_sum(tiny: xr.Dataset) -> None:
    """R = target - M shrinks by 1 - 2η a step, by 1 - η while one is closed; a pathway gains η R at each open step."""
    target, rate = mapping(size=5, seed=7).numpy(), TINY.rate
    for name, closed, left in (("short", 4, 60), ("long", 8, 60)):
        wanted = []
        for net in range(TINY.nets):
            (a,), (b,) = start(TINY, 7, 1, net)
            alone = a + (1 - (1 - rate) ** closed) * (target - a)
            both = (1 - (1 - 2 * rate) ** left) / 2 * (target - alone - b)
            wanted.append(share([alone + both, b + both]))
        assert tiny.net_share.sel(depth=1, deficit=name).values == pytest.approx(wanted, abs=1e-4)


def test_curves_end_where_their_arm_ends_and_begin_at_the_initial_weights(tiny: xr.Dataset) -> None:
    target = mapping(size=5, seed=7).numpy()
    for deficit, (onset, removal) in TINY.windows.items():
        one, steps = tiny.sel(deficit=deficit), tiny["checkpoint"].values
        for curve in (one.train_loss.values[0], one.strength.values[0, 1]):
            assert np.isfinite(curve).tolist() == (steps <= removal + TINY.clean).tolist()
        begun = [start(TINY, 7, 2, net) for net in range(TINY.nets)]
        gate = 0 if onset == 0 < removal else 1
        worst = max(((chained(a) + gate * chained(b) - target) ** 2).sum() / 2 for a, b in begun)
        assert one.train_loss.values[1, 0] == pytest.approx(worst, rel=1e-5)
        held = one.strength.sel(pathway="deprived").values[:, (steps >= onset) & (steps <= removal)]
        assert held == pytest.approx(held[:, :1].repeat(held.shape[1], 1), abs=1e-6), "closed: nothing is learned"
    ends = tiny.strength.sel(deficit="none").values[0][:, np.isfinite(tiny.strength.values[0, 0, 0])][:, -1]
    assert ends.sum() == pytest.approx(1, abs=0.1), "both together have learned the map"


GOOD = {"short": (0.3, 0.1, 0.04, 0.02), "long": (0.07, 0.01, 0.0, 0.01), "late": (0.28, 0.32, 0.3, 0.3)}
GOOD["none"] = (0.5, 0.52, 0.45, 0.5)
NAN = math.nan


def written(left: float = 1e-3, error: float = 0.004, **told: tuple[float, ...]) -> xr.Dataset:
    shares = np.array([(GOOD | told)[name] for name in module.DEFICITS]).T
    losses = np.tile([10.0, 10 * left, NAN], (4, 4, 1))
    held = {"share": (("depth", "deficit"), shares), "share_error": (("depth", "deficit"), np.full((4, 4), error))}
    held["train_loss"] = (("depth", "deficit", "checkpoint"), losses)
    return xr.Dataset(held, {"depth": [1, 2, 3, 4], "deficit": list(module.DEFICITS)})


@pytest.mark.parametrize(
    ("told", "passed", "statistic"),
    [
        ({}, True, 3.0),
        ({"short": (0.3, 0.1, 0.04, 0.06)}, False, 0.1 / 0.06),
        ({"short": (0.16, 0.1, 0.04, 0.02)}, False, 1.6),
        ({"short": (0.3, 0.1, 0.115, 0.02)}, False, 3.0),
        ({"short": (0.3, 0.1, 0.105, 0.02)}, True, 3.0),
        ({"short": (0.3, 0.1, 0.04, -0.01)}, True, 3.0),
        ({"short": (0.3, 0.006, 0.002, -0.01)}, False, 1.5),
        ({"short": (0.3, 0.1, 0.04, NAN)}, False, NAN),
        ({"long": (0.07, 0.03, 0.0, 0.0)}, False, 3.0),
        ({"long": (0.3, 0.0, 0.0, 0.0)}, True, 3.0),
        ({"long": (0.07, 0.0, 0.0, NAN)}, False, 3.0),
        ({"late": (0.28, 0.19, 0.3, 0.3)}, False, 3.0),
        ({"late": (NAN, 0.3, 0.3, 0.3)}, False, 3.0),
        ({"none": (0.5, 0.5, 0.34, 0.5)}, False, 3.0),
        ({"none": (0.5, 0.5, 0.66, 0.5)}, False, 3.0),
        ({"none": (0.5, 0.5, NAN, 0.5)}, False, 3.0),
        ({"left": 0.02}, False, 3.0),
        ({"left": math.inf}, False, 3.0),
    ],
)
def test_depth_time_and_an_even_start_must_all_show(told: dict, passed: bool, statistic: float) -> None:
    verdict = TINY.verdict(written(**told))
    assert verdict.passed is passed
    assert verdict.statistic == pytest.approx(statistic, nan_ok=True)


def test_training_that_diverges_or_is_not_over_does_not_pass() -> None:
    seen: list[bool] = []
    TINY.run(seed=0, on_reading=lambda r: seen.append(TINY.verdict(r.data).passed))
    assert not any(seen[:-1])
    data = replace(TINY, rate=1.0).run(seed=0).data
    assert data.share[1:].isnull().all()
    assert not TINY.verdict(data).passed


def test_seeds_are_other_maps_and_other_weights() -> None:
    one, two = (found.reading.data for found in judge(TINY, (0, 1)))
    assert not np.allclose(one.train_loss[:, 0, 0], two.train_loss[:, 0, 0])
    assert len(np.unique(one.net_share.values[1, 1])) == TINY.nets
    assert not set(TINY.calibrated_on) & set(range(50)), "these are what people judge"


def test_the_effect_shows_on_one_seed() -> None:
    (found,) = judge(CriticalPeriodsInLinearNets(), [0])
    assert found.verdict.passed, str(found.verdict)
