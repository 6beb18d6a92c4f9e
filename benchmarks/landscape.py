"""What a point of a landscape costs: ours, one evaluation after another, loss-landscapes, Landscaper, and the floor.

``python benchmarks/landscape.py`` prints tables with the aims beside them and writes
``benchmarks/results/landscape.json``. Contenders take turns round by round in one process, each with a whole grid of as
many points on the same examples (their own directions, which cost the same); ratios are of medians over rounds, with
their range. The floor is the forward pass's FLOPs over the matmul peak measured in the same rounds: the higher of
PyTorch's own product and oneDNN's.

Landscaper needs older releases of other packages, so it is not installed beside ours. ``--landscaper FOLDER`` reads its
sources from where ``pip install --no-deps --target FOLDER landscaper`` put them, without what it draws with.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import io
import itertools
import json
import os
import platform
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from turns import Encoder, Residual, Seconds, fitted, turns

from workbench.landscape.directions import mover, random_direction
from workbench.landscape.evaluation.fast import FAST
from workbench.landscape.points import PlanePoints
from workbench.numerics.sampling import Draw
from workbench.subject import Subject

RESULT = Path(__file__).parent / "results" / "landscape.json"
GRID = 25
AIMS = {
    "resnet-20": 2.0,
    "transformer": 1.4,
    "dense": 1.9,
    "transformer, width 64": 1.0,
    "tiny": 1.0,
    "tiny, 64 examples": 1.0,
}


# --- nets ------------------------------------------------------------------------------------------------------------


def perceptron(*widths: int) -> nn.Module:
    """Dense layers with ReLU between."""
    pairs = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*pairs[:-1])


def resnet() -> nn.Module:
    """The ResNet-20 of CIFAR-10."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    for ins, outs in ((16, 16), (16, 32), (32, 64)):
        layers += [Residual(ins, outs, outs // ins), Residual(outs, outs, 1), Residual(outs, outs, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def net_of(name: str) -> tuple[nn.Module, Tensor, int]:
    """The net, its examples, and how many points a side a round's grid has."""
    if name == "resnet-20":
        return resnet(), torch.randn(256, 3, 32, 32), 3
    if "transformer" in name:
        width, layers, tokens = (64, 2, 24) if "width 64" in name else (128, 4, 32)
        return Encoder(width, layers), torch.randint(0, 50, (512, tokens)), 3
    if name == "dense":
        return perceptron(784, 512, 512, 10), torch.randn(1024, 784), 7
    return perceptron(64, 32, 10), torch.randn(64 if "64 examples" in name else 1024, 64), GRID


def prepared(name: str, device: str) -> tuple[nn.Module, Tensor, Tensor, int]:
    """A net after ten steps of Adam on its examples, in eval mode."""
    torch.manual_seed(0)
    net, x, side = net_of(name)
    net, x, y = net.to(device), x.to(device), torch.randint(0, 10, (len(x),), device=device)
    return fitted(net, x, y, 10).eval(), x, y, side


# --- contenders ------------------------------------------------------------------------------------------------------


def ours(net: nn.Module, x: Tensor, y: Tensor, side: int) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """Points in the way that is chosen, in a bfloat16 preview, and one after another; with what choosing took.

    The peers give the mean loss alone; ours comes with its standard error, and in the second row with error rates.
    """
    subject = Subject(net, (x, y))
    draw = Draw(0, "benchmark", subject.size, subject.dtype, subject.device)
    u, v = (random_direction(subject, draw, i, "filter") for i in range(2))
    grid = np.stack(np.meshgrid(np.linspace(-1, 1, side), np.linspace(-1, 1, side)), -1).reshape(-1, 2)
    points, at = PlanePoints(subject, u, v, expected=GRID**2), mover(subject, u, v)
    rough = PlanePoints(subject, u, v, expected=GRID**2, preview=True)
    began = time.process_time()
    points.evaluate(grid[:1])
    chosen = time.process_time() - began
    exact = [subject.evaluate(at(*p)) for p in grid]
    contenders: dict[str, Callable[[], Any]] = {
        "ours": lambda: points.evaluate(grid, ("loss",)),
        "ours, with error rates": lambda: points.evaluate(grid),
        "one after another": lambda: [subject.evaluate(at(*p), ("loss",)) for p in grid],
        "bfloat16 preview": lambda: rough.evaluate(grid, ("loss",)),
    }
    facts = {
        "how": points.how,
        "choosing_s": chosen,
        "largest relative difference": _apart(points.evaluate(grid), exact),
        "of the preview": _apart(rough.evaluate(grid), exact),
    }
    return contenders, facts


def _apart(found: list[dict[str, float]], exact: list[dict[str, float]]) -> float:
    return max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(found, exact, strict=True))


def loss_landscapes(net: nn.Module, x: Tensor, y: Tensor, side: int) -> dict[str, Callable[[], Any]]:
    """``random_plane`` as its documentation has it, and under ``no_grad``, which the package leaves to its users."""
    theirs: Any = importlib.import_module("loss_landscapes")
    metrics: Any = importlib.import_module("loss_landscapes.metrics")
    model, metric = copy.deepcopy(net), metrics.Loss(nn.CrossEntropyLoss(), x, y)

    def plane() -> Any:
        return theirs.random_plane(model, metric, distance=100, steps=side, deepcopy_model=True)

    return {"loss-landscapes": plane, "loss-landscapes, no_grad": torch.no_grad()(plane)}


def landscaper(folder: str, net: nn.Module, x: Tensor, y: Tensor, side: int) -> dict[str, Callable[[], Any]]:
    """``compute_loss_landscape``, out of the package's sources."""
    if not folder:
        return {}
    package: Any = types.ModuleType("landscaper")  # its own __init__ imports what only older numpy has
    package.__path__ = [str(Path(folder) / "landscaper")]
    sys.modules["landscaper"] = package
    compute: Any = importlib.import_module("landscaper.compute")
    model = copy.deepcopy(net)
    directions = [[torch.randn_like(p) for p in model.parameters()] for _ in range(2)]

    def loss(model: nn.Module, data: Any) -> float:
        return F.cross_entropy(model(data[0]), data[1]).item()

    def plane() -> Any:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return compute.compute_loss_landscape(
                model, (x, y), directions, loss, steps=side, distance=0.01, dim=2, device=x.device.type
            )

    return {"Landscaper": plane}


def peaks(device: str) -> dict[str, Callable[[], Any]]:
    """Sixteen products of 1024 × 1024 matrices in float32, by each library that there is."""
    a, b = torch.randn(2, 1024, 1024, device=device)
    product: Any = FAST.get(F.linear)
    found: dict[str, Callable[[], Any]] = {"peak": lambda: [a @ b for _ in range(16)]}
    if product is not None and device == "cpu":
        found["peak, oneDNN"] = lambda: [product(None, F.linear, (a, b), {}) for _ in range(16)]
    return found


def ratio(times: Seconds, name: str, over: str, clock: str) -> dict[str, float]:
    """The ratio of medians over rounds, and the range of the rounds' own ratios."""
    one, other = times[name][clock], times[over][clock]
    each = one / other
    return {"ratio": float(np.median(one) / np.median(other)), "low": float(each.min()), "high": float(each.max())}


def measured(name: str, device: str, rounds: int, folder: str) -> dict[str, Any]:
    """Milliseconds a point, ratios over ours, and everything over the floor."""
    net, x, y, side = prepared(name, device)
    contenders, facts = ours(net, x, y, side)
    contenders |= loss_landscapes(net, x, y, side)
    contenders |= landscaper(folder, net, x, y, side)
    bare = peaks(device)
    times = turns({**contenders, **bare}, rounds)
    clock = "wall" if device == "cuda" else "cpu"
    with FlopCounterMode(display=False) as counter:  # without gradients fused layers would hide their products
        net(x)
    rates = {n: 16 * 2 * 1024**3 / float(np.median(times[n][clock])) for n in bare}
    rate = max(rates.values())
    floor = counter.get_total_flops() / rate
    each = {n: float(np.median(times[n][clock])) / side**2 for n in contenders}
    whole = (facts["choosing_s"] + GRID**2 * each["ours"]) / GRID**2
    return {
        **facts,
        "examples": len(x),
        "points a round": side**2,
        "floor_ms": 1e3 * floor,
        "peak_gflops": {n: found / 1e9 for n, found in rates.items()},
        "ms a point": {n: 1e3 * seconds for n, seconds in each.items()},
        "over the floor": {n: seconds / floor for n, seconds in each.items()},
        "over ours": {n: ratio(times, n, "ours", clock) for n in contenders if n != "ours"},
        f"over ours, with choosing, {GRID} x {GRID} points": {n: each[n] / whole for n in each if n != "ours"},
    }


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--nets", nargs="*", default=list(AIMS), help="only these; the others' results are kept")
    parser.add_argument("--landscaper", default="", metavar="FOLDER")
    given = parser.parse_args()
    path = RESULT if given.device == "cpu" else RESULT.with_stem(f"landscape-{given.device}")
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    found |= {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if given.device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
        "aims, over the fastest peer": AIMS,
        "Landscaper": "its compute module alone" if given.landscaper else "not measured: needs numpy below 2",
    }
    for name in given.nets:
        found[name] = measured(name, given.device, given.rounds, given.landscaper)
        print(f"## {name} (aim {AIMS[name]} over the fastest peer)\n{json.dumps(found[name], indent=1)}", flush=True)
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
