"""How long a user waits: first reading, last reading, a setting seen before, the import. Prints a table, writes JSON.

    python benchmarks/responsiveness.py [rounds]

Rounds are interleaved over the probes, so that a busy moment hits all of them; medians and the fastest are printed.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import workbench as wb
from workbench.zoo.digits import digits
from workbench.zoo.nets import conv
from workbench.zoo.training import train

PROBES = {
    "HessianSpectrum()": wb.probes.HessianSpectrum(),
    "HessianSpectrum(top=1), nothing else": wb.probes.HessianSpectrum(top=1, minimum=False, trace=False, density=False),
    "Plane()": wb.landscape.Plane(),
    "NeuralCollapse()": wb.probes.NeuralCollapse(),
}


def tour(folder: Path) -> wb.Trajectory:
    """The record of notebooks/00_tour.ipynb."""
    recipe = {"channels": [8, 16], "classes": 10, "size": 8, "seed": 0}
    data, model = digits(), conv(**recipe)
    place = {"build": "workbench.zoo.nets:conv", "build_args": recipe, "data": data.train, "loss": "cross_entropy"}
    with wb.Recorder(folder, model, every=wb.log_spaced(5), **place) as record:
        train(model, data.train, steps=400, lr=0.05, recorder=record)
    return wb.Trajectory.open(folder)


def waits(trajectory: wb.Trajectory, probe: wb.Probe, folder: Path, seed: int) -> dict[str, float]:
    """Milliseconds from submit to the first and the last reading, then to the answer for the same setting again."""
    seen: list[float] = []
    subject = trajectory.subject(trajectory.steps[-1])
    with wb.Job(subject, lambda _: seen.append(time.perf_counter()), store=wb.Store(folder)) as job:
        started = time.perf_counter()
        job.submit(probe, seed=seed)
        job.wait()
        ended = time.perf_counter()
        again = time.perf_counter()
        job.submit(probe, seed=seed)
        job.wait()
        stored = time.perf_counter() - again
    return {"first": 1e3 * (seen[0] - started), "last": 1e3 * (ended - started), "seen before": 1e3 * stored}


def imports(rounds: int) -> float:
    """Milliseconds that ``import workbench`` adds to torch and xarray, in fresh interpreters."""
    words = "import torch, xarray, time; t = time.perf_counter(); import workbench; print(time.perf_counter() - t)"
    runs = [
        subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True) for _ in range(rounds)
    ]
    return 1e3 * min(float(r.stdout) for r in runs)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    found: dict[str, list[dict[str, float]]] = {name: [] for name in PROBES}
    with tempfile.TemporaryDirectory() as folder:
        trajectory = tour(Path(folder) / "run")
        for turn in range(rounds):
            for name, probe in PROBES.items():
                found[name].append(waits(trajectory, probe, Path(folder) / "readings", turn))
    print("| ms, median (fastest) | first reading | last reading | seen before |\n|---|---|---|---|")
    for name, rows in found.items():
        cells = (
            f"{statistics.median(r[k] for r in rows):.0f} ({min(r[k] for r in rows):.0f})"
            for k in ("first", "last", "seen before")
        )
        print(f"| `{name}` | {' | '.join(cells)} |")
    light = imports(3)
    print(f"\n`import workbench` beyond torch and xarray: {light:.0f} ms")
    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    out = Path(__file__).parent / "results" / "responsiveness.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(
        json.dumps({"about": about, "rounds": rounds, "milliseconds": found, "import": light}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
