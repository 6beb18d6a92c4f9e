"""How often does the bracket of a subset's sharpness hold that of all data? Counted over subsets, not promised.

``python benchmarks/brackets.py`` prints a Markdown table and writes ``benchmarks/results/brackets.json``. The data are
the digits with 3 % of the labels redrawn, so that a well fitted net has a few examples that carry its sharpness; "all
data" are the 1348 training examples. ``--subsets`` says how many subsets of each size are drawn.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from workbench.probes.spectrum import HessianSpectrum
from workbench.subject import Subject
from workbench.zoo.digits import digits
from workbench.zoo.nets import dense
from workbench.zoo.training import train

PROBE = HessianSpectrum(top=1, minimum=False, trace=False, density=False)
SIZES = (64, 256, 900)


@dataclass(frozen=True)
class Row:
    """Means over subsets, as ratios to the sharpness of all data, and shares of subsets."""

    steps: int
    examples: int
    plug_in: float
    low: float
    high: float
    holds: float
    holds_unwidened: float
    wide: float
    products: float
    half_products: float


def noisy() -> tuple[Tensor, Tensor]:
    """The training digits with 3 % of the labels redrawn."""
    inputs, targets = digits().train
    random, targets = torch.Generator().manual_seed(0), targets.clone()
    chosen = torch.randperm(len(targets), generator=random)[: int(0.03 * len(targets))]
    targets[chosen] = torch.randint(0, 10, (len(chosen),), generator=random)
    return inputs, targets


def measure(model: nn.Module, data: tuple[Tensor, Tensor], steps: int, examples: int, subsets: int) -> Row:
    """One size of subset, drawn again and again."""
    truth = float(PROBE.run(Subject(model, data, max_examples=None)).data.eigenvalue[0])
    found = []
    for seed in range(subsets):
        d = PROBE.run(Subject(model, data, max_examples=examples, seed=seed), seed=seed).data
        names = ("sharpness_low", "sharpness_high", "halves_spread", "products", "half_products")
        found.append([float(d.eigenvalue[0]), *(float(d[name]) for name in names)])
    plug_in, low, high, spread, products, half_products = np.array(found).T
    return Row(
        steps=steps,
        examples=examples,
        plug_in=float(plug_in.mean() / truth),
        low=float(low.mean() / truth),
        high=float(high.mean() / truth),
        holds=float(np.mean((low <= truth) & (truth <= high))),
        holds_unwidened=float(np.mean((low + spread <= truth) & (truth <= plug_in))),
        wide=float(np.mean(~((low > 0) & (high < 1.25 * low)))),
        products=float(products.mean()),
        half_products=float(half_products.mean()),
    )


def table(rows: list[Row], subsets: int) -> str:
    lines = [
        f"Sharpness on subsets over that of all 1348 examples; {subsets} subsets of each size.",
        "",
        "| steps | examples | λ_1 of the subset | bracket, mean | holds | without widening | asks for more |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        shares = f"{r.holds:.0%} | {r.holds_unwidened:.0%} | {r.wide:.0%}"
        lines.append(f"| {r.steps} | {r.examples} | {r.plug_in:.2f} | {r.low:.2f} to {r.high:.2f} | {shares} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subsets", type=int, default=200, help="subsets of each size")
    subsets = parser.parse_args().subsets
    data, rows = noisy(), []
    for steps in (200, 4000):
        model = dense(activation="gelu")
        train(model, data, steps, lr=0.05)
        rows += [measure(model, data, steps, examples, subsets) for examples in SIZES]
        print(f"{steps} steps: done", file=sys.stderr)
    print(table(rows, subsets))
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    held = {"torch": torch.__version__, "subsets": subsets, "rows": [asdict(row) for row in rows]}
    (results / "brackets.json").write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
