"""Plasticity: least squares for the re-fit, arithmetic for the norms and tasks, and other probes for the rest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx
from torch import nn

from workbench.dynamics.plasticity import Plasticity
from workbench.dynamics.refit import Refit
from workbench.dynamics.tasks import by_task
from workbench.probes.dormant_units import DormantUnits
from workbench.probes.feature_rank import FeatureRank
from workbench.record import Line
from workbench.several import Runs
from workbench.sources import Held
from workbench.subject import Subject
from workbench.trajectory import Trajectory

QUICK = Plasticity(refits=0)


def held(label: str, rows: list[dict[str, float]], model: nn.Module | None = None) -> Trajectory:
    """Scalars as written down, with the weights of one model at the first step and the last."""
    model = model or net()
    lines = tuple(Line(step, 0.0, values=row) for step, row in enumerate(rows))
    weights = {0: model.state_dict(), len(rows): {n: t.clone() for n, t in model.state_dict().items()}}
    x, y = toys.examples()
    return Trajectory(Held(label, lines, weights)).using(model, (x, y), "cross_entropy")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()


# ------------------------------------------------------------------------------ the re-fit


def run_all(refit: Refit, subject: Subject, target: torch.Tensor) -> float:
    training = refit.run(subject, target, 0)
    while True:
        try:
            next(training)
        except StopIteration as end:
            return float(end.value)


def test_frozen_features_of_rank_r_leave_what_least_squares_leaves() -> None:
    """With r columns (a constant among them) and n examples, E floor = (n - r) / (n - 1) over the best constant's."""
    n, found, exact = 20, [], []
    x = torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 1).double())
    subject = Subject(model, (x, torch.zeros(n, 1, dtype=torch.float64)), "mse").restricted("1.*")
    columns = np.column_stack([x.numpy(), np.ones(n)])
    for k in range(30):
        target = Refit().target(subject, 0, k)
        y = target.numpy()
        rest = y - columns @ np.linalg.lstsq(columns, y, rcond=None)[0]
        exact.append(float((rest**2).sum() / ((y - y.mean()) ** 2).sum()))
        if k < 4:
            found.append(run_all(Refit(steps=400, lr=0.05), subject, target))
    assert found == approx(exact[:4], rel=1e-3)
    assert np.mean(exact) == approx((n - 5) / (n - 1), abs=0.05)


def test_more_steps_of_the_whole_net_fit_more_and_nothing_of_the_users_changes() -> None:
    model, data = net(), toys.examples()
    before = toys_state(model)
    subject = Subject(model, data)
    target = Refit().target(subject, 3, 0)
    losses = [run_all(Refit(steps=s, lr=0.01, batch=7), subject, target) for s in (1, 100, 600)]
    assert 1 < losses[0] * 1.5
    assert losses[1] < 0.9 * losses[0]
    assert losses[2] < 0.8 * losses[1]
    assert losses[2] == run_all(Refit(steps=600, lr=0.01, batch=7), subject, target), "bit for bit again"
    assert toys_state(model) == before


def toys_state(model: nn.Module) -> list[object]:
    return [(p.data_ptr(), p._version, p.detach().numpy().tobytes(), p.grad) for p in model.parameters()]


def test_targets_do_not_depend_on_the_weights_and_differ_by_number() -> None:
    data = toys.examples()
    one, two = (Subject(toys.net(seed), data) for seed in (0, 1))
    for kind in ("noise", "waves"):
        refit = Refit(kind=kind)
        assert torch.equal(refit.target(one, 0, 0), refit.target(two, 0, 0))
        assert not torch.equal(refit.target(one, 0, 0), refit.target(one, 0, 1))
        assert not torch.equal(refit.target(one, 0, 0), refit.target(one, 1, 0))
    waves = Refit(kind="waves").target(one, 0, 0)
    assert waves.abs().max() <= 1
    assert waves.std() > 0.3
    tokens = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)).double()
    words = Subject(tokens, (torch.randint(5, (8, 2)), torch.arange(8) % 2))
    with pytest.raises(ValueError, match="Use 'noise'"):
        Refit(kind="waves").target(words, 0, 0)


def test_a_net_whose_units_died_learns_less_than_it_did_at_first() -> None:
    alive, dead = net(), net()
    with torch.no_grad():
        dead[0].bias.fill_(-100.0)
    weights = {0: alive.state_dict(), 5: alive.state_dict(), 9: dead.state_dict()}
    path = Trajectory(Held("dying", (), weights)).using(alive, toys.examples(), "cross_entropy")
    reading = Plasticity(refits=3, targets=3, steps=200, lr=0.02).run(path)
    loss, gap = reading.data.refit_loss.values[0], reading.data.refit_gap.values[0]
    assert loss[2] == approx(1, abs=0.01), "only a constant is left"
    assert gap.tolist() == approx([0, 0, loss[2] - loss[0]])
    assert gap[2] > 0.1
    again = [run_all(Refit(200, 0.02), path.subject(0), Refit().target(path.subject(0), 0, k)) for k in range(3)]
    assert np.abs(np.mean(again) - loss[0]) < 3 * reading.data.refit_loss_error.values[0, 0] + 0.05
    assert reading.data.total_dead_fraction.values[0].tolist() == [
        reading.data.total_dead_fraction.values[0, 0]
    ] * 2 + [1]


# ------------------------------------------------------------------ units, ranks, norms


def test_each_checkpoint_is_what_the_probes_say_there(tmp_path: Path) -> None:
    path = toys.world("trajectory", tmp_path).subject
    data = QUICK.run(path).data
    assert list(data["layer"].values) == ["bend"]
    for k, step in enumerate(path.steps):
        subject = path.subject(step)
        units = DormantUnits().run(subject).data
        ranks = FeatureRank(of="features", layers="bend").run(subject).data
        for name in ("saturated_fraction", "active_fraction", "dormant_fraction"):
            for of in (name, f"{name}_error"):
                assert float(data[of][0, k, 0]) == float(units[of][0])
        for name in ("effective_rank", "effective_rank_error", "threshold_rank"):
            assert float(data[name][0, k, 0]) == approx(float(ranks[name][0, 0]), nan_ok=True)
        model = toys.net()
        model.load_state_dict(path.weights(step))
        model.eval()
        model.zero_grad()
        x, y = toys.examples()
        nn.functional.cross_entropy(model(x), y).backward()
        learned = [p for n, p in model.named_parameters() if n != "first.bias"]
        assert float(data.gradient_norm[0, k]) == approx(float(torch.cat([p.grad.flatten() for p in learned]).norm()))
        pooled = torch.cat([p.detach().flatten() for p in learned])
        assert float(data.weight_mean[0, k]) == approx(float(pooled.abs().mean()))
        assert float(data.weight_norm[0, k]) == approx(float(pooled.norm()))


def test_pooled_mean_and_rms_of_matrices_are_different_things() -> None:
    model = nn.Sequential(nn.Identity(), nn.ReLU(), nn.Linear(3, 1)).double()
    with torch.no_grad():
        model[2].weight.fill_(1.0)
        model[2].bias.fill_(5.0)
    data = torch.randn(9, 3, dtype=torch.float64)
    path = Trajectory(Held("one", (), {0: model.state_dict()})).using(model, (data, data[:, :1]), "mse")
    found = QUICK.run(path).data
    assert (found.weight_mean.item(), found.weight_rms.item()) == (2, 1)
    assert found.tensor_rms.values[0, 0].tolist() == [1, 5]


# ------------------------------------------------------------------------------ tasks


def test_the_curve_over_tasks_against_an_arm_of_fresh_networks() -> None:
    def rows(*scores: tuple[float, ...]) -> list[dict[str, float]]:
        return [
            {"train_accuracy": s} | ({"task": float(k)} if i == 0 else {})
            for k, task in enumerate(scores)
            for i, s in enumerate(task)
        ]

    runs = {"plain": held("plain", rows((0.5, 0.9), (0.4, 0.6), (0.1, 0.3)))}
    runs |= {"fresh": held("fresh", rows((0.5, 0.9), (0.5, 0.9), (0.6, 0.8)))}
    reading = QUICK.run(Runs(runs))
    data = reading.data
    assert data.task_mean.values[0] == approx([0.7, 0.5, 0.2])
    assert data.task_end.values[0] == approx([0.9, 0.6, 0.3])
    assert data.plasticity_lost.values[0] == approx([0, 0.2, 0.5])
    assert data.plasticity_lost.values[1] == approx([0, 0, 0]), "the control loses nothing"
    assert len(reading.figure().panels) == 5
    alone = QUICK.run(runs["plain"]).data
    assert np.isnan(alone.plasticity_lost).all()
    recorded = [{**row, "fresh": 0.8} for row in rows((0.5, 0.9), (0.4, 0.6))]
    assert QUICK.run(held("both", recorded)).data.plasticity_lost.values[0] == approx([0.1, 0.3])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=4), min_size=1, max_size=5),
    st.floats(-1, 1),
)
def test_adding_a_constant_to_a_score_adds_it_to_every_task(scores: list[list[float]], constant: float) -> None:
    def curve(shift: float) -> dict[float, tuple[float, float]]:
        rows = [{"task": float(k), "s": x + shift} for k, task in enumerate(scores) for x in task]
        lines = tuple(Line(i, 0.0, values=row) for i, row in enumerate(rows))
        return by_task(Trajectory(Held("run", lines)), "task", "s")

    plain, shifted = curve(0.0), curve(constant)
    assert [v[0] for v in plain.values()] == approx([float(np.mean(task)) for task in scores])
    assert [v[1] for v in plain.values()] == [task[-1] for task in scores]
    assert [v[0] - w[0] for v, w in zip(shifted.values(), plain.values(), strict=True)] == approx(
        [constant] * len(scores), abs=1e-9
    )


def test_what_cannot_be_measured_stays_unknown_and_says_so(tmp_path: Path) -> None:
    broken = {n: t.clone() for n, t in net().state_dict().items()}
    broken["2.bias"][0] = torch.nan
    path = Trajectory(Held("run", (), {0: net().state_dict(), 4: broken})).using(
        net(), toys.examples(), "cross_entropy"
    )
    reading = QUICK.run(path)
    assert np.isfinite(reading.data.effective_rank.values[0, 0]).all()
    assert np.isnan(reading.data.effective_rank.values[0, 1]).all()
    assert not reading.converged
    assert "step 4 of run could not be measured" in " ".join(reading.notes)
    with pytest.raises(TypeError, match="Give Runs of Trajectories"):
        Plasticity().run(Runs({"a": toys.ToySubject()}))
