"""What a tangent kernel costs here and elsewhere, and how right it is.

``python benchmarks/kernel.py`` prints a table with the aims beside it and writes ``benchmarks/results/kernel.json``
(``kernel-cuda.json`` with ``--device cuda``); ``--only`` takes some cases, and results of the others stay. Contenders
take turns round by round in one process; times are processor time on a CPU (one thread: OMP_NUM_THREADS=1), ratios
medians over rounds with their range. Errors are against float64.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from workbench.operators.tangent_kernel import TangentKernel
from workbench.subject import Subject

RESULTS = Path(__file__).parent / "results"
OUTPUTS = 10
AIMS: dict[str, dict[str, float]] = {
    "dense, 64 examples": {"nngeometry": 10, "jacrev": 100, "curvlinops": 150},
    "conv, 16 examples": {"nngeometry": 15, "tensor by tensor": 1},
}
Contender = Callable[[], Tensor]


# --- nets ------------------------------------------------------------------------------------------------------------


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, OUTPUTS))


def convolutional() -> nn.Module:
    """26 010 parameters on 28 x 28 pixels."""
    first = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    second = (nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    return nn.Sequential(*first, *second, nn.Linear(32 * 49, 13), nn.ReLU(), nn.Linear(13, OUTPUTS))


class Residual(nn.Module):
    """Two convolutions with BatchNorm and a way around them."""

    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        conv, norm = nn.Conv2d, nn.BatchNorm2d
        first = (conv(ins, outs, 3, stride, 1, bias=False), norm(outs), nn.ReLU())
        self.body = nn.Sequential(*first, conv(outs, outs, 3, 1, 1, bias=False), norm(outs))
        same = stride == 1 and ins == outs
        self.around = nn.Identity() if same else nn.Sequential(conv(ins, outs, 1, stride, bias=False), norm(outs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.around(x))


def resnet() -> nn.Module:
    """ResNet-18 for 32 x 32 pixels: 11 173 962 parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    ins = 64
    for outs in (64, 128, 256, 512):
        layers += [Residual(ins, outs, 1 if outs == 64 else 2), Residual(outs, outs, 1)]
        ins = outs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(ins, OUTPUTS))


# --- contenders ------------------------------------------------------------------------------------------------------


def contenders(model: nn.Module, x: Tensor, slow: bool) -> dict[str, Contender]:
    """Each gives the whole kernel (n C, n C) from scratch; ``slow`` ones form the Jacobian of the batch."""
    data = x, torch.arange(len(x), device=x.device) % OUTPUTS
    subject = Subject(model, data)

    def ours() -> Tensor:
        return TangentKernel(subject).full().reshape(len(x) * OUTPUTS, -1)

    found: dict[str, Contender] = {"workbench": ours, "tensor by tensor": lambda: _per_sample(model, x)}
    if slow:
        found |= {"jacrev": lambda: _jacrev(model, x)}
    for name, make in {"nngeometry": _nngeometry, "curvlinops": _curvlinops}.items():
        if name == "nngeometry" or slow:
            try:
                found[name] = make(model, data)
            except ImportError:
                print(f"{name} is not installed", file=sys.stderr)
    return found


def _per_sample(model: nn.Module, x: Tensor) -> Tensor:
    params = {k: p.detach() for k, p in model.named_parameters()}

    def one(p: dict[str, Tensor], example: Tensor) -> Tensor:
        return functional_call(model, p, (example.unsqueeze(0),))[0]

    rows = vmap(jacrev(one), (None, 0))(params, x)
    flat = [j.flatten(2).flatten(0, 1) for j in rows.values()]
    total = flat[0] @ flat[0].T
    for j in flat[1:]:
        total.addmm_(j, j.T)
    return total


def _jacrev(model: nn.Module, x: Tensor) -> Tensor:
    params = {k: p.detach() for k, p in model.named_parameters()}
    rows = jacrev(lambda p: functional_call(model, p, (x,)))(params)
    flat = torch.cat([j.flatten(2).flatten(0, 1) for j in rows.values()], 1)
    return flat @ flat.T


def _nngeometry(model: nn.Module, data: tuple[Tensor, Tensor]) -> Contender:
    from nngeometry import GramMatrix
    from torch.utils.data import DataLoader, TensorDataset

    own = data[0].clone(), data[1]  # it switches gradients on in what it is given
    loader = DataLoader(TensorDataset(*own), batch_size=len(own[0]))

    def run() -> Tensor:
        gram = GramMatrix(model, loader, function=lambda *batch: model(batch[0])).data  # (C, n, C, n)
        return gram.detach().permute(1, 0, 3, 2).reshape(len(own[0]) * OUTPUTS, -1)

    return run


def _curvlinops(model: nn.Module, data: tuple[Tensor, Tensor]) -> Contender:
    from curvlinops import JacobianLinearOperator, TransposedJacobianLinearOperator

    params = dict(model.named_parameters())
    size = len(data[0]) * OUTPUTS

    def run() -> Tensor:
        given = (model, params, [data]) if _takes_names() else (model, list(params.values()), [data])
        j = JacobianLinearOperator(*given, check_deterministic=False)
        back = TransposedJacobianLinearOperator(*given, check_deterministic=False)
        eye = torch.eye(size, device=data[0].device)
        return j @ (back @ eye)

    return run


def _takes_names() -> bool:
    import curvlinops

    return int(getattr(curvlinops, "__version__", "3").split(".")[0] or 3) > 3


# --- measuring -------------------------------------------------------------------------------------------------------


def clock(run: Contender) -> float:
    """Median time of calls that take 0.2 s together: of the processor on a CPU, where other work disturbs it less."""
    gc.collect()
    times = list[float]()
    while sum(times) < 0.2:
        began, worked = time.perf_counter(), time.process_time()
        found = run()
        if found.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began if found.is_cuda else time.process_time() - worked)
    return float(np.median(times))


def resident() -> int:
    """The largest resident memory of this process so far, bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def compare(model: nn.Module, x: Tensor, rounds: int, slow: bool) -> dict[str, Any]:
    """Seconds of each by round, ratios to ours, and errors against float64."""
    made = contenders(model, x, slow)
    double = Subject(model, (x, torch.arange(len(x), device=x.device) % OUTPUTS), dtype=torch.float64)
    truth = TangentKernel(double).full().reshape(len(x) * OUTPUTS, -1)
    errors, seconds = dict[str, float](), {name: list[float]() for name in made}
    for name, run in list(made.items()):
        try:
            errors[name] = float((run().double() - truth).abs().max() / truth.abs().max())
        except Exception as problem:  # a peer that cannot do it is no reason to stop
            print(f"{name} fails: {type(problem).__name__}: {str(problem)[:200]}", file=sys.stderr)
            del made[name], seconds[name]
    for _ in range(rounds):
        for name, run in made.items():
            seconds[name].append(clock(run))
    mine = np.array(seconds["workbench"])
    return {
        name: {
            "seconds": float(np.median(times)),
            "ratio": float(np.median(np.array(times) / mine)),
            "range": [float(f(np.array(times) / mine)) for f in (np.min, np.max)],
            "error": errors[name],
        }
        for name, times in seconds.items()
    }


def exactness(device: str) -> float:
    """Largest relative difference from jacrev, both in float64."""
    torch.manual_seed(0)
    worst = 0.0
    for model, x in ((dense(), torch.randn(12, 784)), (convolutional(), torch.randn(6, 1, 28, 28))):
        model, x = model.double().to(device), x.double().to(device)
        truth = _jacrev(model, x)
        found = TangentKernel(Subject(model, (x, torch.arange(len(x), device=device) % OUTPUTS))).full()
        worst = max(worst, float((found.reshape_as(truth) - truth).abs().max() / truth.abs().max()))
    return worst


PEAK = """
import sys, torch; sys.path.insert(0, {folder!r})
from kernel import *
torch.manual_seed(0)
model, x = {net}().to({device!r}), torch.randn({shape}).to({device!r})
subject = Subject(model, (x, torch.arange(len(x), device=x.device) % OUTPUTS))
TangentKernel(subject.selected(range(4))).full()
cuda = x.is_cuda
torch.cuda.reset_peak_memory_stats() if cuda else None
before = torch.cuda.memory_allocated() if cuda else resident()
began, cpu = time.perf_counter(), time.process_time()
kernel = TangentKernel(subject)
found = kernel.full()
torch.cuda.synchronize() if cuda else None
seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
after = torch.cuda.max_memory_allocated() if cuda else resident()
print(json.dumps(dict(seconds=seconds, cpu_seconds=cpu, peak_bytes=after - before, resident_bytes=after,
    expected_bytes=kernel.expected_bytes(), kernel_bytes=found.numel() * 4, parameters=subject.size)))
"""


def peak(net: str, shape: tuple[int, ...], device: str) -> dict[str, Any]:
    """Time and memory of one kernel in a process of its own."""
    code = PEAK.format(folder=str(Path(__file__).parent), net=net, shape=", ".join(map(str, shape)), device=device)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# --- cases -----------------------------------------------------------------------------------------------------------


def cases(device: str) -> dict[str, Callable[[], dict[str, Any]]]:
    def contest(build: Callable[[], nn.Module], shape: tuple[int, ...], rounds: int, slow: bool) -> Any:
        def run() -> dict[str, Any]:
            torch.manual_seed(0)
            return compare(build().to(device), torch.randn(shape).to(device), rounds, slow)

        return run

    return {
        "exactness in float64": lambda: {"error": exactness(device)},
        "dense, 64 examples": contest(dense, (64, 784), 3, True),
        "conv, 16 examples": contest(convolutional, (16, 1, 28, 28), 7, True),
        "dense, 512 examples": contest(dense, (512, 784), 3, False),
        "peak, dense, 512 examples": lambda: peak("dense", (512, 784), device),
        "peak, ResNet, 256 examples": lambda: peak("resnet", (256, 3, 32, 32), device),
    }


def show(name: str, found: dict[str, Any]) -> None:
    print(f"\n## {name}\n")
    if "workbench" not in found:
        print(", ".join(f"{key} {value:.4g}" for key, value in found.items()))
        return
    print("| | ms | times ours (range) | aim | error |\n| --- | --- | --- | --- | --- |")
    for contender, row in found.items():
        aim = AIMS.get(name, {}).get(contender)
        met = "" if aim is None else f"{aim:g}: {'met' if row['ratio'] >= aim else 'MISSED'}"
        low, high = row["range"]
        times = f"{row['ratio']:.1f} ({low:.1f} to {high:.1f})"
        print(f"| {contender} | {1e3 * row['seconds']:.1f} | {times} | {met} | {row['error']:.1e} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", help="words that a case's name must contain")
    args = parser.parse_args()
    path = RESULTS / ("kernel.json" if args.device == "cpu" else f"kernel-{args.device}.json")
    held: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    held |= {"aims": AIMS, "torch": torch.__version__, "machine": platform.machine()}
    for name, run in cases(args.device).items():
        if args.only and not any(word in name for word in args.only):
            continue
        found = run()
        show(name, found)
        facts = {"date": time.strftime("%Y-%m-%d"), "threads": torch.get_num_threads(), "device": args.device}
        if hasattr(os, "getloadavg"):
            facts["load"] = round(os.getloadavg()[0], 1)
        held["cases"][name] = {**facts, "found": found}
        path.write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
