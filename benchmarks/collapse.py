"""How much memory neural collapse takes over a million examples, and how long all layers of ten checkpoints take.

``python benchmarks/collapse.py`` prints both and writes ``benchmarks/results/collapse.json``; ``--examples`` streams
fewer. The stream makes 2048 features an example from the number of their batch, so that no data are held: class
means on orthonormal axes and Gaussian noise around them, for which Tr(Σ_W Σ_B⁺)/C is σ² (C - 1) in closed form.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import workbench as wb
from workbench.numerics.collapse import TILE, GroupedMoments, Scatter, of_moments
from workbench.probes.collapse_by_layer import CollapseByLayer
from workbench.zoo.digits import digits
from workbench.zoo.nets import conv
from workbench.zoo.training import train

CLASSES, FEATURES, BATCH, NOISE = 100, 2048, 1024, 0.1


def batches(examples: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Features (b, d) in float32, class numbers and example numbers; the same ones each time."""
    for number in range(-(-examples // BATCH)):
        size = min(BATCH, examples - number * BATCH)
        random = torch.Generator().manual_seed(number)
        places = torch.arange(size) + number * BATCH
        features = torch.randn(size, FEATURES, generator=random).mul_(NOISE)
        features[torch.arange(size), places % CLASSES] += 1.0
        yield features, places % CLASSES, places // CLASSES


def peak() -> int:
    """The most bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def stream(examples: int, groups: int) -> dict[str, Any]:
    """Both passes over synthetic features: what was found, how far from closed form, how much memory, how long."""
    for features, labels, _ in batches(2 * BATCH):  # what making batches, and multiplying, takes by itself
        features.double() @ features[:8].double().T + labels[:, None]
    before, began = peak(), time.perf_counter()
    sums = GroupedMoments(CLASSES, FEATURES, groups)
    for features, labels, places in batches(examples):
        sums.add(features, labels, places)
    scatter = Scatter(sums.folds())
    for features, labels, places in batches(examples):
        scatter.add(features, labels, labels, places)
    seconds = time.perf_counter() - began
    exact, found = NOISE**2 * (CLASSES - 1), scatter.within()[0]
    return {
        "examples": examples, "features": FEATURES, "classes": CLASSES, "groups": groups, "tile": TILE,
        "nc1": found, "nc1_closed_form": exact, "nc1_relative_error": abs(found / exact - 1),
        "nc1_ratio": of_moments(scatter.whole)["nc1_ratio"], "nc4": scatter.shares()["differ"][0],
        "bytes_before": before, "bytes_added": peak() - before, "bytes_of_means": 8 * CLASSES * FEATURES,
        "bytes_of_tile": 8 * FEATURES * TILE, "bytes_of_all_features": 8 * examples * FEATURES,
        "bytes_of_covariance": 8 * FEATURES**2, "seconds": seconds,
    }  # fmt: skip


def checkpoints() -> dict[str, Any]:
    """All layers at ten checkpoints of the tour's model, errors and held-out examples included."""
    data, recipe = digits(), {"channels": [8, 16], "classes": 10, "size": 8, "seed": 0}
    with tempfile.TemporaryDirectory() as folder:
        model = conv(**recipe)
        with wb.Recorder(folder, model, every=40, loss="cross_entropy", data=data.train) as record:
            train(model, data.train, steps=360, lr=0.05, recorder=record, test=data.test)
        trajectory = wb.Trajectory.open(folder)
        subjects = [
            wb.Subject(_loaded(recipe, trajectory, step), data.train, held_out=data.test) for step in trajectory.steps
        ]
    began = time.perf_counter()
    readings = [CollapseByLayer().run(subject) for subject in subjects]
    seconds = time.perf_counter() - began
    return {
        "checkpoints": len(readings),
        "layers": readings[0].data["layer"].values.tolist(),
        "examples": subjects[0].examples,
        "held_out": subjects[0].held_out.examples,
        "seconds": seconds,
        "nc1_ratio_last_layer": [float(r.data.nc1_ratio[-1]) for r in readings],
    }


def _loaded(recipe: dict[str, Any], trajectory: Any, step: int) -> torch.nn.Module:
    model = conv(**recipe)
    model.load_state_dict(trajectory.weights(step))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--only", choices=["stream", "checkpoints"])
    chosen = parser.parse_args()
    results = Path(__file__).parent / "results" / "collapse.json"
    held: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    held |= {
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "device": f"cpu, {platform.machine()}, {torch.get_num_threads()} threads",
    }
    if chosen.only != "checkpoints":
        held["stream"] = stream(chosen.examples, 1)
        held["stream_with_errors"] = stream(chosen.examples // 10, 10)
    if chosen.only != "stream":
        held["checkpoints"] = checkpoints()
    results.write_text(json.dumps(held, indent=1) + "\n")
    print(json.dumps(held, indent=1))


if __name__ == "__main__":
    main()
