"""Sweeps: the same readings as by hand, asked once, failures written down, and workers killed under them at random."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import examples, net, record_training

from workbench.dynamics.along import Along
from workbench.dynamics.learning_rates import LearningRateSensitivity
from workbench.dynamics.spikes import Spikes
from workbench.landscape.plane import Plane
from workbench.probes.collapse import NeuralCollapse
from workbench.probes.spectrum import HessianSpectrum
from workbench.several import Runs
from workbench.store import Store
from workbench.subject import Subject
from workbench.sweeping import Sweep, sweep
from workbench.trainings import TrainingsFailed, trainings
from workbench.trajectory import Trajectory

distributed = pytest.importorskip("distributed")
SPECTRUM = HessianSpectrum(top=2, minimum=False, trace=False, density=False)


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Two worker processes that come back when they die."""
    import dask

    settings = {
        "distributed.scheduler.allowed-failures": 3,
        "distributed.nanny.pre-spawn-environ": {"OMP_NUM_THREADS": "1"},
    }
    with (
        dask.config.set(settings),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit=None, silence_logs=50
        ) as cluster,
        distributed.Client(cluster) as connected,
    ):
        yield connected


def subjects(count: int) -> dict[str, Subject]:
    return {f"seed {seed}": Subject(net(seed), examples(), loss="cross_entropy") for seed in range(count)}


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    folder = tmp_path_factory.mktemp("runs") / "one"
    record_training(folder, 0, examples())
    return Trajectory.open(folder).using(net(0), examples(), "cross_entropy")


def test_a_sweep_gives_the_readings_of_each_run_by_hand_and_asks_once(client: Any, tmp_path: Path) -> None:
    members, seen = subjects(3), list[float]()
    probes = [SPECTRUM, NeuralCollapse()]
    done = sweep(probes, members, tmp_path / "store", client, seed=4, on_progress=lambda s: seen.append(s.done))
    assert list(done.table.status) == ["measured"] * 6
    assert seen == pytest.approx(np.arange(1, 7) / 6)
    for task, reading in done.readings():
        by_hand = task.probe.run(members[task.label], seed=4)
        assert reading.data.identical(by_hand.data) or reading.summary == pytest.approx(by_hand.summary)
    again = sweep(probes, members, tmp_path / "store", client, seed=4)
    assert set(again.table.status) == {"stored"}
    assert set(again.table.key) == set(done.table.key)
    assert list(again.summaries("HessianSpectrum").sharpness) == list(done.summaries("HessianSpectrum").sharpness)
    assert not (tmp_path / "store" / ".sweep").exists()


def test_probes_of_points_look_at_every_checkpoint_and_those_of_paths_at_the_whole(
    client: Any, trajectory: Trajectory, tmp_path: Path
) -> None:
    done = sweep([SPECTRUM, Along(SPECTRUM, every=3)], {"run": trajectory}, tmp_path, client)
    steps = [None if s is np.ma.masked or s != s else int(s) for s in done.table.step.to_numpy(dtype=float)]
    assert steps == [*trajectory.steps, None]
    chosen = sweep(SPECTRUM, trajectory, tmp_path, client, steps=trajectory.steps[-1:])
    assert list(chosen.table.status) == ["stored"]
    with pytest.raises(ValueError, match="has no weights at step 7; it has 0, 4, 8, 12"):
        sweep(SPECTRUM, trajectory, tmp_path, client, steps=[7])
    with pytest.raises(ValueError, match="none of these probes looks at one"):
        sweep(Along(SPECTRUM), trajectory, tmp_path, client, steps="last")


def test_probes_that_compare_runs_look_at_all_of_them_together(client: Any, tmp_path: Path) -> None:
    runs = trainings(recipe(), {f"seed {seed}": {"seed": seed} for seed in range(2)}, tmp_path / "runs", client)
    probes = [LearningRateSensitivity(), Spikes(series="train_loss")]
    done = sweep(probes, dict(runs), tmp_path / "store", client)
    assert [(t.probe.name, t.label) for t in done.tasks] == [
        ("LearningRateSensitivity", "all together"),
        ("Spikes", "seed 0"),
        ("Spikes", "seed 1"),
    ]
    assert set(done.table.status) == {"measured"}
    found = dict(done.summaries("LearningRateSensitivity").iloc[0])
    assert found["best_rate"] == LearningRateSensitivity().run(runs).summary["best_rate"] == 0.1
    with pytest.raises(TypeError, match="LearningRateSensitivity looks at several runs; got trajectory"):
        sweep(probes[0], {"one": runs["seed 0"]}, tmp_path / "store", client)


def test_a_failure_is_a_row_and_stops_nothing(client: Any, tmp_path: Path) -> None:
    members: dict[str, Any] = subjects(2)
    with torch.no_grad():
        broken = net(9)
        broken.head.weight[0, 0] = torch.nan
    members["broken"] = Subject(net(9), examples(), loss="cross_entropy")
    members["broken"]._shell.module.load_state_dict(broken.state_dict())
    done = sweep(SPECTRUM, members, tmp_path, client)
    assert sorted(done.table.status) == ["failed", "measured", "measured"]
    assert done.failed.subject.item() == "broken"
    assert len(done.failed.message.item()) > 20
    assert len(list(done.readings())) == 2


def test_a_budget_that_ran_out_is_told(client: Any, tmp_path: Path) -> None:
    done = sweep(Plane(points=201, sampling="grid"), subjects(1), tmp_path, client, seconds=0.05)
    assert list(done.table.status) == ["cut short"]
    assert Store(tmp_path).partial(done.table.key.item()) is not None


def test_what_cannot_be_measured_is_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Along looks at a trajectory; got subject"):
        sweep([SPECTRUM, Along(SPECTRUM)], subjects(1), tmp_path, client=object())
    with pytest.raises(TypeError, match="got nothing"):
        sweep(SPECTRUM, [], tmp_path, client=object())


class Killer:
    """Kills, at random, workers that have just ended a task and hold the next one."""

    def __init__(self, seed: int, often: float) -> None:
        self.rng, self.often, self.kills = random.Random(seed), often, 0

    def __call__(self, sweep: Sweep) -> None:
        pids = {o.worker for o in sweep.outcomes if o.worker}
        if self.rng.random() < self.often:
            alive = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
            if alive:
                os.kill(self.rng.choice(alive), signal.SIGKILL)
                self.kills += 1


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="tells living processes by /proc")
@pytest.mark.parametrize(
    ("tasks", "often"), [(12, 0.25), pytest.param(200, 0.1, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_workers_killed_at_random_change_nothing(client: Any, tmp_path: Path, tasks: int, often: float) -> None:
    members, killer = subjects(tasks), Killer(tasks, often)
    probe = Plane(points=21, sampling="grid")
    done = sweep(probe, members, tmp_path, client, on_progress=killer)
    assert killer.kills >= 2, "no worker was killed: nothing is shown"
    assert set(done.table.status) <= {"measured", "stored"}
    assert len(set(done.table.key)) == tasks
    for task, reading in list(done.readings())[:: tasks // 5]:
        wanted = task.probe.run(members[task.label])
        np.testing.assert_allclose(reading.data.loss.values, wanted.data.loss.values, rtol=1e-9)


def test_along_by_workers_is_along_by_hand(client: Any, trajectory: Trajectory, tmp_path: Path) -> None:
    seen = list[float]()
    along = Along(SPECTRUM)
    by_hand = along.run(trajectory, seed=2)
    found = along.run(
        trajectory, seed=2, client=client, store=tmp_path, on_reading=lambda reading: seen.append(reading.done)
    )
    assert found.done == 1
    assert found.provenance["fingerprint"] == by_hand.provenance["fingerprint"]
    for name in ("headline", "eigenvalue", "checkpoint_done"):
        np.testing.assert_allclose(found.data[name], by_hand.data[name], rtol=1e-9)
    assert len(seen) >= len(trajectory.steps)
    assert seen[-1] == 1


def recipe() -> Callable[..., None]:
    """A training whose code travels by value."""

    def train(folder: str, seed: int, steps: int = 6, fail: bool = False) -> None:
        import torch

        from workbench.dynamics.recorder import Recorder
        from workbench.zoo.nets import dense

        if fail:
            raise RuntimeError("the data are not there")
        model, generator = dense((4, 8, 3), seed=seed), torch.Generator().manual_seed(0)
        x, y = torch.randn(32, 4, generator=generator), torch.arange(32) % 3
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Recorder(folder, model, optimizer, every=2) as recorder:
            for _ in range(steps):
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                recorder.step(train_loss=loss.item())

    return train


def test_trainings_give_runs_by_label_and_are_not_repeated(client: Any, tmp_path: Path) -> None:
    settings = {f"seed {seed}": {"seed": seed} for seed in range(3)}
    runs = trainings(recipe(), settings, tmp_path, client)
    assert isinstance(runs, Runs)
    assert list(runs) == list(settings)
    assert all(run.steps == (0, 2, 4, 6) for run in runs.values())
    written = (tmp_path / "seed_0" / "training.json").stat().st_mtime_ns
    said = dict[str, str]()
    more = settings | {"seed 3": {"seed": 3}}
    trainings(recipe(), more, tmp_path, client, on_progress=lambda label, outcome: said.update({label: outcome.status}))
    assert said == {"seed 0": "stored", "seed 1": "stored", "seed 2": "stored", "seed 3": "measured"}
    assert (tmp_path / "seed_0" / "training.json").stat().st_mtime_ns == written


def test_a_training_that_raises_leaves_the_others(client: Any, tmp_path: Path) -> None:
    settings = {"good": {"seed": 0}, "bad": {"seed": 1, "fail": True}}
    with pytest.raises(
        TrainingsFailed, match="1 of 2 trainings failed; the first: RuntimeError: the data are not there"
    ):
        trainings(recipe(), settings, tmp_path, client)
    assert Trajectory.open(tmp_path / "good").steps[-1] == 6
    with pytest.raises(TypeError, match="settings of 'typo': got an unexpected keyword argument 'sed'"):
        trainings(recipe(), {"typo": {"seed": 0, "sed": 1}}, tmp_path, client)
    with pytest.raises(ValueError, match="would share a folder"):
        trainings(recipe(), {"a b": {"seed": 1}, "a_b": {"seed": 1}}, tmp_path, client)


def test_another_recipe_is_not_given_the_runs_of_the_first_and_one_that_records_nothing_is_told(
    client: Any, tmp_path: Path
) -> None:
    trainings(recipe(), {"a": {"seed": 0}}, tmp_path, client)

    def silent(folder: str, seed: int) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)

    def other(folder: str, seed: int) -> None:
        raise RuntimeError("another training")

    with pytest.raises(TrainingsFailed, match="another training"):
        trainings(other, {"a": {"seed": 0}}, tmp_path, client)
    with pytest.raises(TrainingsFailed, match="silent recorded nothing"):
        trainings(silent, {"b": {"seed": 0}}, tmp_path, client)
    with pytest.raises(ValueError, match=r"'\.\.' names none"):
        trainings(silent, {"..": {"seed": 0}}, tmp_path, client)


def test_a_cluster_of_its_own_is_closed_again(tmp_path: Path) -> None:
    before = threading.active_count()
    done = sweep(SPECTRUM, subjects(1), tmp_path, workers=1)
    assert list(done.table.status) == ["measured"]
    deadline = time.monotonic() + 20
    while threading.active_count() > before + 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert threading.active_count() <= before + 3
