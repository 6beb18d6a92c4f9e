"""What curvature costs here and elsewhere: products, leading eigenvalues, traces, readings, memory.

``python benchmarks/curvature.py`` prints tables with the aims beside them and writes
``benchmarks/results/curvature.json`` (``curvature-cuda.json`` with ``--device cuda``); ``--quick`` for a look,
``--nets`` for some nets only. Contenders take turns round by round in one process; ratios are medians over rounds with
their range. Errors are against Lanczos in float64 to a residual of 1e-8.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from scipy.stats import wasserstein_distance
from torch import Tensor, nn
from turns import Encoder, Residual, Seconds, fitted, turns

from workbench.numerics.krylov import lanczos
from workbench.numerics.operator import Matrix
from workbench.numerics.ritz import Judged
from workbench.numerics.sampling import Draw
from workbench.numerics.trace import Deflation, hutchinson
from workbench.operators.gauss_newton import GaussNewton
from workbench.operators.hessian import Hessian
from workbench.plan import Plan
from workbench.probes.spectrum import HessianSpectrum
from workbench.selftest import self_test
from workbench.spectra.run import DEPTH
from workbench.subject import Subject
from workbench.zoo.digits import digits

RESULT = Path(__file__).parent / "results" / "curvature.json"


# --- nets ------------------------------------------------------------------------------------------------------------


def dense() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    return net, torch.randn(512, 784)


def resnet() -> tuple[nn.Module, Tensor]:
    blocks = [(16, 16, 1)] * 3 + [(16, 32, 2), (32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 1)]
    first = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*first, *(Residual(*block) for block in blocks), *last), torch.randn(32, 3, 32, 32)


def transformer() -> tuple[nn.Module, Tensor]:
    return Encoder(64, 2), torch.randint(0, 50, (64, 24))


Make = Callable[[], tuple[nn.Module, Tensor]]
NETS: dict[str, Make] = {"dense": dense, "transformer": transformer, "resnet-20": resnet}
STEPS = {"dense": 8, "transformer": 40, "resnet-20": 40}
"""Steps of training: at a loss near zero, float32 itself leaves 2e-3 of the curvature unresolved, whoever measures."""


def prepared(name: str, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A net after some steps of Adam on its one batch, in eval mode."""
    torch.manual_seed(0)
    net, x = NETS[name]()
    net, x = net.to(device), x.to(device)
    y = torch.randint(0, 10, (len(x),), device=device)
    return fitted(net, x, y, STEPS[name]).eval(), x, y


def ratio(times: Seconds, name: str, over: str) -> dict[str, float]:
    """The median over rounds of CPU(name) / CPU(over), its range, and that of wall time."""
    each, wall = (times[name][clock] / times[over][clock] for clock in ("cpu", "wall"))
    found = {"cpu": np.median(each), "low": each.min(), "high": each.max(), "wall": np.median(wall)}
    return {key: round(float(value), 3) for key, value in found.items()}


COMPARED = (
    ("ours", "bare"),
    ("ours, Gauss-Newton", "linearised"),
    ("ours, Gauss-Newton linearised", "linearised"),
    ("curvlinops", "ours"),
    ("bare", "gradient"),
)


# --- products --------------------------------------------------------------------------------------------------------


def products(name: str, device: str, rounds: int, count: int) -> dict[str, Any]:
    """One product, ``count`` at a time: ours, a bare double backward on a kept graph, and the peers."""
    net, x, y = prepared(name, device)
    params = list(net.parameters())
    subject, v = Subject(net, (x, y), batch_size=len(x)), torch.randn(sum(p.numel() for p in params), device=device)
    parts = [t.view_as(p) for t, p in zip(v.split([p.numel() for p in params]), params, strict=True)]
    ours, gauss = Hessian(subject), GaussNewton(subject)
    traced = GaussNewton(subject.with_plan(Plan(push="linearised")))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        bare = torch.autograd.grad(F.cross_entropy(net(x), y), params, create_graph=True)
    for operator in (ours, gauss, traced):
        operator.matvec(v)
    contenders: dict[str, Callable[[], Any]] = {
        "gradient": lambda: [torch.autograd.grad(F.cross_entropy(net(x), y), params) for _ in range(count)],
        "bare": lambda: [torch.autograd.grad(bare, params, parts, retain_graph=True) for _ in range(count)],
        "ours": lambda: [ours.matvec(v) for _ in range(count)],
        "ours, Gauss-Newton": lambda: [gauss.matvec(v) for _ in range(count)],
        "ours, Gauss-Newton linearised": lambda: [traced.matvec(v) for _ in range(count)],
        **_linearised(net, x, parts, count),
        **_curvlinops(net, x, y, v, count),
    }
    times = turns(contenders, rounds)
    return {f"{a} / {b}": ratio(times, a, b) for a, b in COMPARED if a in times and b in times}


def _linearised(net: nn.Module, x: Tensor, parts: list[Tensor], count: int) -> dict[str, Callable[[], Any]]:
    """The peer for Gauss-Newton: forward pass linearised once, vector-Jacobian product kept."""
    named = {n: p.detach() for n, p in net.named_parameters()}
    direction = dict(zip(named, parts, strict=True))
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            z, push = torch.func.linearize(lambda p: torch.func.functional_call(net, p, (x,)), named)
            leaves = [p.requires_grad_() for p in (t.clone() for t in named.values())]
            out = torch.func.functional_call(net, dict(zip(named, leaves, strict=True)), (x,))
    except (RuntimeError, NotImplementedError) as problem:
        print(f"  no linearised forward pass: {str(problem).splitlines()[0][:100]}")
        return {}
    p = z.softmax(1)

    def once() -> Any:
        u = push(direction)
        bent = (p * u - p * (p * u).sum(1, keepdim=True)) / len(x)
        return torch.autograd.grad(out, leaves, bent, retain_graph=True)

    return {"linearised": lambda: [once() for _ in range(count)]}


def _curvlinops(net: nn.Module, x: Tensor, y: Tensor, v: Tensor, count: int) -> dict[str, Callable[[], Any]]:
    operator = _their_operator(copy.deepcopy(net), x, y)
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            operator @ v
    except (RuntimeError, NotImplementedError) as problem:
        print(f"  curvlinops cannot: {str(problem).splitlines()[0][:100]}")
        return {}

    def work() -> None:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            for _ in range(count):
                operator @ v

    return {"curvlinops": work}


def _their_operator(net: nn.Module, x: Tensor, y: Tensor, check: bool = False) -> Any:
    import curvlinops

    params = [p for p in net.parameters() if p.requires_grad]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return curvlinops.HessianLinearOperator(net, nn.CrossEntropyLoss(), params, [(x, y)], check_deterministic=check)


# --- leading eigenvalues ---------------------------------------------------------------------------------------------


TOPS: tuple[tuple[int, float, Judged, int], ...] = (
    (1, 1e-3, "estimate", 3),
    (5, 0.02, "residual", 1),
    (10, 0.05, "residual", 1),
)
"""How many eigenvalues, to what tolerance, by what, and how many times the usual rounds: those of one depend much on
the random starts."""


def leading(name: str, device: str, rounds: int, top: int, tolerance: float, judged: Judged) -> dict[str, Any]:
    """The ``top`` eigenvalues: our probe whole, PyHessian at its defaults, curvlinops with ARPACK at 1e-3.

    Ours and PyHessian's numbers of products depend on their random starts: other ones in each round, the same in each
    run of this benchmark.
    """
    net, x, y = prepared(name, device)
    exact = _reference(net, x, y, top)
    subject = Subject(net, (x, y), batch_size=len(x))
    with Hessian(subject) as hessian:
        self_test(hessian)  # once a subject
    probe = HessianSpectrum(top=top, tolerance=tolerance, judged=judged, minimum=False, trace=False, density=False)
    torch.manual_seed(1)
    answers: dict[str, Any] = {}

    def ours() -> None:
        reading = probe.run(subject, seed=len(answers.setdefault("seeds", [])))
        answers["seeds"].append(0)
        answers.setdefault("ours", []).append((reading.data.eigenvalue.values, int(reading.data.products)))

    contenders: dict[str, Callable[[], Any]] = {"ours": ours}
    for peer, work in (("pyhessian", _pyhessian), ("curvlinops", _arpack)):
        try:
            work(net, x, y, top, answers)
            contenders[peer] = lambda work=work: work(net, x, y, top, answers)
        except (RuntimeError, NotImplementedError, AssertionError) as problem:
            print(f"  {peer} cannot: {str(problem).splitlines()[0][:100]}")
    times = turns(contenders, rounds)
    found: dict[str, Any] = {}
    for who in contenders:
        errors = [float(np.abs(np.sort(v)[::-1][:top] / exact - 1).max()) for v, _ in answers[who][-rounds:]]
        counts = [c for _, c in answers[who][-rounds:]]
        found[who] = {"error": float(np.median(errors)), "worst": max(errors), "products": float(np.median(counts))}
        if who != "ours":
            found[who]["time over ours"] = ratio(times, who, "ours")
    return found


def _reference(net: nn.Module, x: Tensor, y: Tensor, top: int) -> np.ndarray:
    inputs = x.double() if x.is_floating_point() else x
    with Hessian(Subject(copy.deepcopy(net).double(), (inputs, y), batch_size=len(x))) as hessian:
        draw = Draw(9, "reference", hessian.size, hessian.dtype, hessian.device)
        *_, last = lanczos(
            hessian, draw(0), top=top, bottom=0, tolerance=1e-8, basis=max(64, 4 * top), limit=2000, fresh=draw
        )
        return last.top_values


def _pyhessian(net: nn.Module, x: Tensor, y: Tensor, top: int, answers: dict[str, Any]) -> None:
    """At its defaults, on a copy, products counted from outside."""
    theirs: Any = importlib.import_module("pyhessian.hessian")  # the package shadows its module by a class
    model, calls, own = copy.deepcopy(net), [0], theirs.hessian_vector_product

    def counted(*args: Any) -> Any:
        calls[0] += 1
        return own(*args)

    theirs.hessian_vector_product = counted
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            made = theirs.hessian(model, nn.CrossEntropyLoss(), data=(x, y), cuda=x.is_cuda)
            values, _ = made.eigenvalues(top_n=top)
    finally:
        theirs.hessian_vector_product = own
        for p in model.parameters():
            p.grad = None
    answers.setdefault("pyhessian", []).append((np.array(values), calls[0]))


def _arpack(net: nn.Module, x: Tensor, y: Tensor, top: int, answers: dict[str, Any]) -> None:
    operator, calls = _their_operator(copy.deepcopy(net), x, y, check=True).to_scipy(), [0]
    own = operator.matvec
    from scipy.sparse.linalg import LinearOperator

    def counted(v: Any) -> Any:
        calls[0] += 1
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return own(v)

    wrapped = LinearOperator(operator.shape, matvec=counted, dtype=operator.dtype)
    values = eigsh(wrapped, k=top, which="LA", tol=1e-3, return_eigenvectors=False)
    answers.setdefault("curvlinops", []).append((values, calls[0]))


# --- traces ----------------------------------------------------------------------------------------------------------


def traces(seeds: int) -> dict[str, Any]:
    """Products of plain Hutchinson over ours at equal RMSE, once the spectrum of a run of ours is there.

    The small net, trained (outliers above a bulk) and as it was initialised (flatter).
    """
    found: dict[str, Any] = {}
    for kind, steps in {"trained": 150, "untrained": 0}.items():
        net, x, y = _small(steps)
        with Hessian(Subject(net, (x, y), batch_size=len(x))) as hessian:
            matrix = Matrix(hessian @ torch.eye(hessian.size, dtype=torch.float64))
        values = np.linalg.eigvalsh(matrix.matrix.numpy())[::-1]
        draw = Draw(0, "spectrum", matrix.size)
        *_, run = lanczos(
            matrix, draw(0), top=10, bottom=1, least=DEPTH, near_zero=0.05, fresh=partial(_after_first, draw)
        )
        rms: dict[str, float] = {}
        for name, known in (("plain", None), ("ours", Deflation(run.span(), run.values))):
            last = [
                _after(hutchinson(matrix, Draw(s, "trace", matrix.size), deflation=known), 24) for s in range(seeds)
            ]
            rms[name] = float(np.sqrt(np.mean((np.array(last) - values.sum()) ** 2)) / abs(values.sum()))
        share = float(np.square(values[:10]).sum() / np.square(values).sum())
        found[kind] = {"products, plain over ours": (rms["plain"] / rms["ours"]) ** 2, **rms, "top 10 of Σλ²": share}
    return found


def _after_first(draw: Draw, number: int) -> Tensor:
    return draw(1 + number)


def _after(estimates: Any, count: int) -> float:
    for estimate in estimates:
        if estimate.samples == count:
            return float(estimate.value)
    raise RuntimeError("the estimator ended early")


# --- densities -------------------------------------------------------------------------------------------------------


def densities(seeds: int) -> dict[str, Any]:
    """CPU time for the spectral density of a small net, ours and curvlinops' at its cheapest depth that errs no more.

    Errors are distances W1 to the exact distribution of eigenvalues, over its range.
    """
    import curvlinops

    net, x, y = _small()
    subject = Subject(net, (x, y), batch_size=len(x))
    with Hessian(subject) as hessian:
        exact = np.linalg.eigvalsh((hessian @ torch.eye(hessian.size, dtype=torch.float64)).numpy())
    probe = HessianSpectrum(top=5, trace=False)
    probe.run(subject)

    def ours(seed: int) -> tuple[np.ndarray, np.ndarray]:
        data = probe.run(subject, seed=seed).data
        known = np.isfinite(data.node.values)
        return data.node.values[known], data.weight.values[known]

    def theirs(seed: int, depth: int) -> tuple[np.ndarray, np.ndarray]:
        torch.manual_seed(seed)
        grid, density = curvlinops.lanczos_approximate_spectrum(_their_operator(net, x, y), depth)
        weights = density.numpy().clip(0)
        return grid.numpy(), weights / weights.sum()

    found = {"ours": _distance(ours, exact, seeds)}
    for depth in (8, 16, 32, 64, 128, 256, 512):
        if depth < exact.size:
            now = found[f"curvlinops, depth {depth}"] = _distance(lambda s, d=depth: theirs(s, d), exact, seeds)
            if now["error"] <= found["ours"]["error"]:
                return {**found, "time, curvlinops over ours": now["cpu"] / found["ours"]["cpu"]}
    return {**found, "time, curvlinops over ours": f"more than {now['cpu'] / found['ours']['cpu']:.1f}: never as good"}


def _distance(estimate: Callable[[int], tuple[np.ndarray, np.ndarray]], exact: np.ndarray, seeds: int) -> Any:
    errors, cpu = [], time.process_time()
    for seed in range(seeds):
        nodes, weights = estimate(seed)
        errors.append(wasserstein_distance(exact, nodes, v_weights=weights) / np.ptp(exact))
    return {"error": float(np.median(errors)), "cpu": (time.process_time() - cpu) / seeds}


def _small(steps: int = 150) -> tuple[nn.Module, Tensor, Tensor]:
    """A net of 1,810 weights on digits, so that all eigenvalues can be had."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).double()
    x, y = (t[:512] for t in digits().train)
    x = x.double()
    return fitted(net, x, y, steps, 1e-2), x, y


# --- a whole reading, and memory -------------------------------------------------------------------------------------


def overhead(name: str, device: str, rounds: int) -> dict[str, Any]:
    """A default reading over as many bare products; the self-test apart, since it comes once a subject."""
    net, x, y = prepared(name, device)
    subject, probe = Subject(net, (x, y), batch_size=len(x)), HessianSpectrum()
    used: list[int] = []
    probe.run(subject)

    def bare() -> None:
        with Hessian(subject) as hessian:
            v = torch.randn(hessian.size, device=device)
            for _ in range(used[-1]):
                hessian.matvec(v)

    times = turns({"reading": lambda: used.append(int(probe.run(subject).data.products)), "products": bare}, rounds)
    gradient = turns({"gradient": subject.gradient}, 3)["gradient"]["wall"]
    return {
        "products": used[-1],
        "gradient_ms": 1e3 * float(np.median(gradient)),
        **ratio(times, "reading", "products"),
    }


def peak(name: str) -> dict[str, float]:
    """Peak memory of a top-10 run and of one gradient, each in a process of its own, over the aim."""
    sizes = {what: float(_process(name, what)) for what in ("nothing", "gradient", "top10")}
    net, _ = NETS[name]()
    weights = sum(p.numel() for p in net.parameters()) * 4
    rows = HessianSpectrum(top=10).aim.rows(weights // 4, 4)
    gradient, run = sizes["gradient"] - sizes["nothing"], sizes["top10"] - sizes["nothing"]
    aim = (rows + 6) * weights + 4 * max(gradient, 0.0)
    return {"run_mb": run / 2**20, "gradient_mb": gradient / 2**20, "aim_mb": aim / 2**20, "run over aim": run / aim}


def _process(name: str, what: str) -> str:
    command = [sys.executable, __file__, "--measure", name, what]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]


def measure(name: str, what: str) -> None:
    """In the child: print the peak resident size in bytes."""
    torch.set_num_threads(1)
    net, x, y = _untrained(name)
    if what == "gradient":
        torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
    if what == "top10":
        HessianSpectrum(top=10, trace=False).run(Subject(net, (x, y), batch_size=len(x)))
    # The high-water mark of this process alone; getrusage's is handed down by the parent.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    print(int(status["VmHWM"].split()[0]) * 1024)


def _untrained(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net, x = NETS[name]()
    return net.eval(), x, torch.randint(0, 10, (len(x),))


# --- all of it -------------------------------------------------------------------------------------------------------


AIMS = {
    "ours / bare": "at most 1.10",
    "ours, Gauss-Newton / linearised": "at most 1.10 (as it comes, and with Plan(push='linearised'))",
    "curvlinops / ours": "at least 1.6",
    "top 1": "1.3 x PyHessian's time, 5 x curvlinops', error 1e-3",
    "top 5": "2.5 x both",
    "top 10": "4.5 x fewer products than PyHessian",
    "traces": "3 with outliers, 1.5 flat",
    "densities": "2.5 x curvlinops' time at equal error",
    "overhead": "1.5 where a gradient takes 20 ms, 1.3 at 100 ms",
    "memory": "at most 1",
}


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--nets", nargs="*", default=list(NETS), help="only these; the others' results are kept")
    parser.add_argument("--measure", nargs=2, metavar=("NET", "WHAT"))
    given = parser.parse_args()
    if given.measure:
        measure(*given.measure)
        return
    rounds = 2 if given.quick else 5
    result = RESULT if given.device == "cpu" else RESULT.with_name("curvature-cuda.json")
    found: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {}
    found |= {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if given.device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
        "aims": AIMS,
    }
    for name in given.nets:
        print(f"## {name}", flush=True)
        part = found[name] = {"products": products(name, given.device, rounds, 5)}
        _show(part)
        for top, tolerance, judged, more in TOPS:
            part[f"top {top}"] = leading(name, given.device, more * max(rounds - 2, 1), top, tolerance, judged)
            _show({f"top {top}": part[f"top {top}"]})
        part["overhead"] = overhead(name, given.device, max(rounds - 2, 1))
        part["memory"] = peak(name) if given.device == "cpu" else {}
        _show({k: part[k] for k in ("overhead", "memory")})
        result.write_text(json.dumps(found, indent=1) + "\n")
    found["traces"] = traces(60 if given.quick else 300)
    found["densities"] = densities(2 if given.quick else 5)
    _show({key: found[key] for key in ("traces", "densities")})
    result.write_text(json.dumps(found, indent=1) + "\n")


def _show(part: dict[str, Any]) -> None:
    for key, value in part.items():
        print(f"  {key}: {json.dumps(value, default=float)}   [{AIMS.get(key, '')}]", flush=True)


if __name__ == "__main__":
    main()
