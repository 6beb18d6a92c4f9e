"""CriticalPeriods: closed forms of two competing pathways, plain NumPy for any weights, arithmetic for deficits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx
from scipy.integrate import solve_ivp
from torch import nn

from workbench.dynamics.critical_periods import CriticalPeriods
from workbench.dynamics.recorder import Recorder
from workbench.record import Line
from workbench.several import Runs
from workbench.sources import Held
from workbench.trajectory import Trajectory
from workbench.zoo.pathways import Gate, Pathways, align, examples_of, mapping, pathways

Window = tuple[int, int]


def descend(net: Pathways, target: torch.Tensor, lr: float, steps: int, window: Window) -> list[float]:
    """Plain gradient descent with the second pathway closed within the window; whether it was, of each step."""
    (x, y), gate = examples_of(target), Gate(net, 1, *window)
    optimizer, closed = torch.optim.SGD(net.parameters(), lr=lr), []
    for _ in range(steps):
        closed.append(float(gate.closed))
        optimizer.zero_grad()
        ((net(x) - y).square().sum(1).mean() / 2).backward()
        optimizer.step()
        gate.after_step()
    return closed


def ended(label: str, net: nn.Module) -> Trajectory:
    return Trajectory(Held(label, (), {0: net.state_dict()}))


# --------------------------------------------------------------------- two competing pathways


def flow(depth: int, value: float, start: float, until: float, end: float) -> np.ndarray:
    """K_a and K_b of one mode at the end, the second closed at first, by an integrator of differential equations."""

    def slope(t: float, k: np.ndarray) -> np.ndarray:
        gates = np.array([1.0, float(t >= until)])
        return gates * depth * np.abs(k) ** (2 - 2 / depth) * (value - gates @ k)

    first = solve_ivp(slope, (0, until), [start, start], rtol=1e-10, atol=1e-14)
    return solve_ivp(slope, (until, end), first.y[:, -1], rtol=1e-10, atol=1e-14).y[:, -1]


def closed_form(value: float, start: float, until: float) -> tuple[float, float]:
    """The same at depth 2 for t → ∞: a logistic curve while one is closed, a constant ratio afterwards."""
    alone = value / (1 + (value / start - 1) * np.exp(-2 * value * until))
    ratio = alone / start
    return value * ratio / (1 + ratio), value / (1 + ratio)


@pytest.mark.parametrize(
    ("depth", "lr", "steps", "until"), [(2, 2e-3, 3000, 250), (3, 2e-3, 3000, 1000)], ids=["two", "three"]
)
def test_a_recorded_deficit_leaves_what_the_equations_of_the_modes_say(
    depth: int, lr: float, steps: int, until: int, tmp_path: Path
) -> None:
    target, widths = mapping((3.0, 1.8), 3), [3] * (depth + 1)
    net = pathways(widths).double()
    align(net, target, (0.001, 0.001))
    (x, y), gate = examples_of(target), Gate(net, 1, 0, until)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    rebuild = {"build": "workbench.zoo.pathways:pathways", "build_args": {"widths": widths}}
    with Recorder(tmp_path / "run", net, optimizer, every=steps // 6, data=(x, y), loss="half_mse", **rebuild) as rec:
        for _ in range(steps):
            closed = gate.closed
            optimizer.zero_grad()
            ((net(x) - y).square().sum(1).mean() / 2).backward()
            optimizer.step()
            gate.after_step()
            rec.step(deficit=float(closed))
    found = CriticalPeriods().run(Trajectory.open(tmp_path / "run")).data
    wanted = np.array([flow(depth, value, 0.001, until * lr, steps * lr) for value in (3.0, 1.8)]).T
    strength = found.strength.values[0, :, :, :2]
    assert strength[-1] == approx(wanted, rel=0.03, abs=2e-5)
    if depth == 2:
        exact = closed_form(3.0, 0.001, 0.5)
        assert exact == approx((2.85686042, 0.14313958), rel=1e-7)
        assert wanted[:, 0] == approx(exact, rel=1e-5)
    else:
        kept = strength[-1] ** (-1 / 3)
        assert wanted[:, 0] == approx((2.99665253, 0.00334747), rel=1e-5)
        assert kept[0, 0] - kept[1, 0] == approx(-5.99127399, rel=0.01)
    assert found.strength.values[0, 0, :, :2] == approx(0.001, abs=1e-12)
    assert np.isnan(found.strength.values[0, :, :, 2]).all(), "directions of value 0 are arbitrary"
    assert (found.onset.item(), found.removal.item(), found.clean.item()) == (0, until, steps - until)
    assert found.final_share.values[0] == approx(wanted.sum(1) / wanted.sum(), rel=0.02)


def test_deeper_nets_mind_a_short_deficit_more_and_all_mind_a_late_one_less() -> None:
    share: dict[tuple[int, Window], float] = {}
    for depth in (1, 2, 4):
        for window in ((0, 0), (0, 50), (150, 200)):
            runs = {}
            for seed in range(3):
                net = pathways([16] * (depth + 1), scale=0.3, seed=seed).double()
                descend(net, mapping(), 0.01, 400, window)
                runs[f"seed {seed}"] = ended(f"seed {seed}", net)
            share[depth, window] = float(CriticalPeriods().run(Runs(runs)).data.final_share[:, 1].mean())
    early = [share[depth, (0, 50)] for depth in (1, 2, 4)]
    assert early[0] > 2.5 * early[1]
    assert early[1] > 1.5 * early[2]
    assert early[2] < 0.06
    for depth in (1, 2, 4):
        assert 0.35 < share[depth, (0, 0)] < 0.65
        assert share[depth, (150, 200)] > max(0.2, 1.2 * share[depth, (0, 50)])


# ---------------------------------------------------------------------------- any weights at all


@settings(max_examples=10, deadline=None)
@given(
    widths=st.lists(st.integers(2, 6), min_size=2, max_size=4),
    paths=st.integers(1, 3),
    modes=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_strengths_are_those_along_the_modes_of_the_end(widths: list[int], paths: int, modes: int, seed: int) -> None:
    first, last = (pathways(widths, paths, seed=seed + k).double() for k in (0, 50))
    for k, net in enumerate((first, last)):
        generator = torch.Generator().manual_seed(seed + k)
        for p in net.parameters():
            nn.init.normal_(p, generator=generator)
    path = Trajectory(Held("any", (), {0: first.state_dict(), 7: last.state_dict()}))
    found = CriticalPeriods(modes=modes).run(path).data
    count = min(modes, widths[0], widths[-1])
    assert found.sizes["mode"] == count
    products = np.array([[_multiplied(branch) for branch in net.paths] for net in (first, last)])
    left, values, right = np.linalg.svd(products[1].sum(0))
    rank = min(count, paths * min(widths))
    assert np.isnan(found.strength.values[..., rank:]).all(), "directions of value 0 are arbitrary"
    for i in range(rank):
        wanted = np.einsum("i,tpij,j->tp", left[:, i], products, right[i])
        assert found.strength.values[0, :, :, i] == approx(wanted, rel=1e-9, abs=1e-9)
    assert found.strength.values[0, 1, :, :rank].sum(0) == approx(values[:rank])
    assert found.singular_value.values[0, 0, 0] == approx(np.linalg.svd(products[0, 0])[1][:count])
    assert found.share.values[0, ..., :rank].sum(1) == approx(1)
    assert found.final_share.values[0].sum() == approx(1)


def _multiplied(branch: nn.Module) -> np.ndarray:
    first, *rest = (p.detach().numpy() for p in branch.parameters())
    for matrix in rest:
        first = matrix @ first
    return first


def test_pathways_go_by_name_and_what_is_no_chain_is_refused_or_left_out() -> None:
    net = nn.ModuleDict({n: nn.Linear(4, 3, bias=False) for n in ("eye", "ear")})
    found = CriticalPeriods(pathways="eye.*, ear.*").run(ended("two", net)).data
    assert list(found["pathway"].values) == ["eye.*", "ear.*"]
    alone = CriticalPeriods(pathways="ear.*").run(ended("two", net)).data
    assert alone.singular_value.values[0, 0, 0] == approx(found.singular_value.values[0, 0, 1])
    reading = CriticalPeriods().run(ended("two", net))
    assert np.isnan(reading.data.strength).all()
    assert any("eye.weight gives 3 values and ear.weight takes 4" in note for note in reading.notes)
    with pytest.raises(ValueError, match="Name one chain with each glob"):
        CriticalPeriods(pathways="*").run(ended("two", net))
    with pytest.raises(ValueError, match=r"no weight matrix called 'nose\.\*'; it has eye\.weight, ear\.weight"):
        CriticalPeriods(pathways="nose.*").run(ended("two", net))
    net["eye"].weight.data[0, 0] = torch.nan
    broken = CriticalPeriods(pathways="eye.*").run(ended("two", net))
    assert not broken.converged
    assert np.isnan(broken.data.singular_value).all()


# ------------------------------------------------------------------------------------- deficits


def scored(score: float, window: Window | None, last: int = 20) -> Trajectory:
    net = pathways((3, 3, 3))
    lines = [Line(0, 0.0)]
    for step in range(1, last + 1):
        under = {} if window is None else {"deficit": float(window[0] < step <= window[1])}
        lines.append(Line(step, 0.0, values={"test_accuracy": score if step == last else 0.1, **under}))
    return Trajectory(Held("run", tuple(lines), {0: net.state_dict()}))


def test_a_deficit_costs_the_difference_of_the_means_without_it_and_with_it() -> None:
    runs = {"clean": scored(0.9, (0, 0)), "clean again": scored(0.8, (0, 0))}
    runs |= {"early": scored(0.5, (0, 8)), "early again": scored(0.3, (0, 8)), "late": scored(0.75, (9, 17))}
    reading = CriticalPeriods().run(Runs(runs))
    data = reading.data
    assert data.onset.values.tolist() == [0, 0, 0, 0, 9]
    assert data.removal.values.tolist() == [0, 0, 8, 8, 17]
    assert data.clean.values.tolist() == [20, 20, 12, 12, 3]
    assert data.deficit_removal.values.tolist() == [8, 17]
    assert data.sensitivity.values == approx([0.45, 0.1])
    assert data.sensitivity_error.values[0] == approx(np.sqrt(0.05**2 + 0.1**2))
    assert np.isnan(data.sensitivity_error.values[1]), "one run has no spread"
    assert any("not equally many" in note for note in reading.notes)
    summary = reading.summary
    assert (summary["deficit_onset"], summary["deficit_removal"]) == (0, 8)
    equal = CriticalPeriods().run(Runs({"a": scored(0.9, (0, 0)), "b": scored(0.5, (0, 5)), "c": scored(0.4, (2, 5))}))
    assert not any("equally" in note for note in equal.notes)
    assert equal.data.sensitivity.values == approx([0.4, 0.5])


def test_what_is_not_recorded_is_not_known() -> None:
    reading = CriticalPeriods(score="elsewhere").run(Runs({"a": scored(0.9, None), "b": scored(0.8, (0, 3))}))
    assert np.isnan(reading.data.sensitivity).all()
    assert np.isnan(reading.data.removal.values[0])
    assert any("'deficit' is not recorded in each run" in note for note in reading.notes)
    assert any("'elsewhere' is not recorded" in note for note in reading.notes)
    assert np.isfinite(reading.data.final_share).all()
