"""How right is HessianSpectrum? Top-10, minimum and trace against Hessians computed entry by entry, on seven nets.

``python benchmarks/spectrum.py`` prints a Markdown table and writes ``benchmarks/results/accuracy.json``; ``--small``
takes the tests' nets of some 500 parameters in place of 1900 to 2600. The reference shares no code with the package.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from architectures import FULL, SMALL, Trained, trained

from workbench.probes.spectrum import HessianSpectrum
from workbench.subject import Subject

TOLERANCE = 1e-4
AIMS = {"float64": 1e-4, "float32": 1e-3}


@dataclass(frozen=True)
class Row:
    """Largest relative errors of one net in one precision, and what they cost."""

    net: str
    parameters: int
    precision: str
    top10: float
    minimum: float
    trace: float
    converged: bool
    products: int
    seconds: float

    @property
    def met(self) -> bool:
        return self.converged and max(self.top10, self.minimum, self.trace) <= AIMS[self.precision]


def measure(name: str, net: Trained, dtype: torch.dtype) -> Row:
    """One row: a run at the tight tolerance beside the exact eigenvalues."""
    truth = net.eigenvalues.detach().numpy()
    began = time.perf_counter()
    reading = HessianSpectrum(tolerance=TOLERANCE).run(Subject(net.model, net.data, dtype=dtype))
    seconds, data = time.perf_counter() - began, reading.data
    return Row(
        net=name,
        parameters=net.size,
        precision=str(dtype).removeprefix("torch."),
        top10=relative(data.eigenvalue.values, truth[:10]),
        minimum=relative(data.eigenvalue_min.values, truth[-1]),
        trace=relative(data.trace.values, truth.sum()),
        converged=reading.converged,
        products=int(data.products),
        seconds=seconds,
    )


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.max(np.abs(found - wanted) / np.abs(wanted)))


def table(rows: list[Row]) -> str:
    lines = [
        f"Largest relative errors at tolerance {TOLERANCE:g}, against exact float64 Hessians.",
        "",
        "| net | parameters | precision | top 10 | minimum | trace | products | seconds | aim met |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        errors = f"{r.top10:.1e} | {r.minimum:.1e} | {r.trace:.1e}"
        cost = f"{r.products} | {r.seconds:.1f} | {'yes' if r.met else 'NO'}"
        lines.append(f"| {r.net} | {r.parameters} | {r.precision} | {errors} | {cost} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="the tests' nets of some 500 parameters")
    nets = SMALL if parser.parse_args().small else FULL
    rows = []
    for name, build in nets.items():
        net = trained(build, count=200)
        rows += [measure(name, net, dtype) for dtype in (torch.float64, torch.float32)]
        print(f"{name}: done", file=sys.stderr)
    print(table(rows))
    facts = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    held = {"tolerance": TOLERANCE, "aims": AIMS, **facts, "rows": [asdict(r) | {"met": r.met} for r in rows]}
    (results / "accuracy.json").write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
