"""What recording costs the training it records: the tour's training, bare and with more and more gauges, interleaved.

    python benchmarks/recorder.py [rounds]

The arms' trainings take turns in blocks of 50 steps, so that a busy moment hits all of them. Overheads are judged by
processor time (waiting for the disk is not in it) of the lower quartile and of the fastest block against the bare
training's, and by what the recorder measured of itself, by the wall clock. A second bare training shows what such a
comparison can tell apart. The recorder's own measure cannot see that training is slower after it has been at work (its
code and data have pushed training's out of the caches), so it is the smaller one. Prints a table, writes JSON.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import workbench as wb
from workbench.dynamics import gauges
from workbench.dynamics.schedules import budget, log_spaced
from workbench.zoo.digits import digits
from workbench.zoo.nets import conv
from workbench.zoo.training import train

RECIPE = {"channels": [8, 16], "classes": 10, "size": 8, "seed": 0}
BLOCK = 50
AIMS = {"default gauges": 0.03, "default gauges, sharpness every 50 steps": 0.10}

Arm = Mapping[str, Any] | None


def arms() -> dict[str, Arm]:
    """What is recorded in each; None: nothing at all."""
    data = digits().train
    often = {"every": 10**9, "data": data, "loss": "cross_entropy"}
    sharp = gauges.Sharpness(every=50)
    return {
        "bare": None,
        "bare again": None,
        "scalars": often,
        "default gauges": often | {"gauges": gauges.defaults()},
        "default gauges, sharpness every 50 steps": often | {"gauges": [*gauges.defaults(), sharp]},
        "five checkpoints a decade": often | {"every": log_spaced(5)},
        "a checkpoint whenever 3 % allow it": often | {"every": budget(0.03)},
    }


class Contender:
    """One arm's training, which goes on block by block."""

    def __init__(self, arm: Arm, folder: Path) -> None:
        self.data, self.model, self.folder = digits(), conv(**RECIPE), folder
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.recorder = None
        if arm is not None:
            self.recorder = wb.Recorder(folder, self.model, self.optimizer, **arm).__enter__()
        self.left = time.perf_counter()

    def block(self) -> float:
        """Processor seconds of one more block of the tour's training."""
        busy, began = time.process_time(), time.perf_counter()
        if self.recorder:  # the others' turns are not this one's training
            self.recorder._clock._began += began - self.left
        train(self.model, self.data.train, BLOCK, recorder=self.recorder, optimizer=self.optimizer)
        self.left = time.perf_counter()
        return time.process_time() - busy

    def close(self) -> tuple[float, int]:
        """The overhead that the recorder measured of itself, and its number of checkpoints."""
        if self.recorder is None:
            return 0.0, 0
        self.recorder._clock._began += time.perf_counter() - self.left
        self.recorder.__exit__(None, None, None)
        trajectory = wb.Trajectory.open(self.folder)
        return trajectory.overhead, len(trajectory)


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """All arms in turn, block by block, each round beginning with another one; the first round only warms up."""
    found: dict[str, list[float]] = {name: [] for name in arms()}
    names = list(found)
    with tempfile.TemporaryDirectory() as folder:
        trainings = {name: Contender(arm, Path(folder) / name.replace(" ", "-")) for name, arm in arms().items()}
        for turn in range(rounds + 1):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                found[name].append(trainings[name].block())
        ends = {name: training.close() for name, training in trainings.items()}
    return {name: row(rows[1:], found["bare"][1:], *ends[name]) for name, rows in found.items()}


def row(busy: list[float], bare: list[float], own: float, checkpoints: int) -> dict[str, float]:
    """Overheads as shares of the bare training: of the lower quartile, the fastest, and by the recorder's measure."""
    quarter, usual = statistics.quantiles(busy)[0], statistics.quantiles(bare)[0]
    return {
        "microseconds_a_step": 1e6 * quarter / BLOCK,
        "overhead": quarter / usual - 1,
        "overhead_of_fastest": min(busy) / min(bare) - 1,
        "overhead_by_its_own_measure": own,
        "checkpoints": checkpoints,
    }


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    torch.set_num_threads(1)
    made = measure(rounds)
    print("| recorded | µs a step | overhead | of the fastest block | by its own measure | checkpoints | aim |")
    print("|---|---|---|---|---|---|---|")
    for name, one in made.items():
        aim = f"{AIMS[name]:.0%}" if name in AIMS else ""
        shares = (one["overhead"], one["overhead_of_fastest"], one["overhead_by_its_own_measure"])
        cells = " | ".join(f"{share:.1%}" for share in shares)
        print(f"| {name} | {one['microseconds_a_step']:.0f} | {cells} | {one['checkpoints']:.0f} | {aim} |")
    out = Path(__file__).parent / "results" / "recorder.json"
    facts = {"torch": torch.__version__, "machine": platform.machine(), "block": BLOCK, "rounds": rounds, "threads": 1}
    facts |= {"load": os.getloadavg()[0]}
    out.write_text(json.dumps(facts | {"aims": AIMS, "arms": made}, indent=1) + "\n")


if __name__ == "__main__":
    main()
