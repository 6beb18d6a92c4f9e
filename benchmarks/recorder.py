"""What recording costs the training it records: the tour's training, bare and with more and more gauges, interleaved.

    python benchmarks/recorder.py [rounds]

Each arm's overhead is judged three times: by processor time against the bare training of the same round (medians over
rounds; other programs on the machine hardly touch it, and waiting for the disk is not in it), by the wall clock (of the
fastest rounds), and by what the recorder measured of itself, by the wall clock too. Prints a table, writes JSON.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
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
STEPS = 2000
AIMS = {"default gauges": 0.03, "default gauges, sharpness every 50 steps": 0.10}

Arm = Mapping[str, Any] | None


def arms() -> dict[str, Arm]:
    """What is recorded in each; None: nothing at all."""
    data = digits().train
    often = {"every": 10**9, "data": data, "loss": "cross_entropy"}
    sharp = gauges.Sharpness(every=50)
    return {
        "bare": None,
        "scalars": often,
        "default gauges": often | {"gauges": gauges.defaults()},
        "default gauges, sharpness every 50 steps": often | {"gauges": [*gauges.defaults(), sharp]},
        "five checkpoints a decade": often | {"every": log_spaced(5)},
        "a checkpoint whenever 3 % allow it": often | {"every": budget(0.03)},
    }


Row = tuple[float, float, float, int]


def one(arm: Arm, folder: Path) -> Row:
    """Processor and wall-clock seconds of one training, the recorder's own measure of its overhead, and checkpoints."""
    data, model = digits(), conv(**RECIPE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    began, busy = time.perf_counter(), time.process_time()
    with nullcontext() if arm is None else wb.Recorder(folder, model, optimizer, **arm) as recorder:
        train(model, data.train, STEPS, recorder=recorder, optimizer=optimizer)
    busy, seconds = time.process_time() - busy, time.perf_counter() - began
    if arm is None:
        return busy, seconds, 0.0, 0
    trajectory = wb.Trajectory.open(folder)
    return busy, seconds, trajectory.overhead, len(trajectory)


def measure(rounds: int) -> dict[str, list[Row]]:
    """All arms in turn, again and again, each time beginning with another one."""
    found: dict[str, list[Row]] = {name: [] for name in arms()}
    names = list(found)
    with tempfile.TemporaryDirectory() as folder:
        for name, arm in arms().items():
            one(arm, Path(folder) / "warm" / name.replace(" ", "-"))
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                found[name].append(one(arms()[name], Path(folder) / f"{turn}" / name.replace(" ", "-")))
    return found


def summary(found: Mapping[str, list[Row]]) -> dict[str, dict[str, float]]:
    """Overheads as shares of the bare training, by arm."""
    bare = [busy for busy, _, _, _ in found["bare"]]
    fastest = min(row[1] for row in found["bare"])
    made: dict[str, dict[str, float]] = {}
    for name, rows in found.items():
        ratios = [row[0] / plain - 1 for row, plain in zip(rows, bare, strict=True)]
        made[name] = {
            "seconds": statistics.median(row[1] for row in rows),
            "overhead": statistics.median(ratios),
            "overhead_of_fastest": min(row[1] for row in rows) / fastest - 1,
            "overhead_by_its_own_measure": statistics.median(row[2] for row in rows),
            "checkpoints": statistics.median(row[3] for row in rows),
        }
    return made


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    torch.set_num_threads(1)
    made = summary(measure(rounds))
    print("| recorded | seconds | overhead | by the wall | by its own measure | checkpoints | aim |")
    print("|---|---|---|---|---|---|---|")
    for name, row in made.items():
        aim = f"{AIMS[name]:.0%}" if name in AIMS else ""
        shares = (row["overhead"], row["overhead_of_fastest"], row["overhead_by_its_own_measure"])
        cells = " | ".join(f"{share:.1%}" for share in shares)
        print(f"| {name} | {row['seconds']:.2f} | {cells} | {row['checkpoints']:.0f} | {aim} |")
    out = Path(__file__).parent / "results" / "recorder.json"
    facts = {"torch": torch.__version__, "machine": platform.machine(), "steps": STEPS, "rounds": rounds, "threads": 1}
    out.write_text(json.dumps(facts | {"aims": AIMS, "arms": made}, indent=1) + "\n")


if __name__ == "__main__":
    main()
