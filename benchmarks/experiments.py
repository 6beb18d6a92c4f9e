"""Do the papers' effects show? Every experiment over seeds that its threshold was not set on.

``python benchmarks/experiments.py`` prints a Markdown table and writes ``benchmarks/results/experiments.json``; names
after it run only these experiments, and leave what is known of the others. ``--seeds`` says how many, from 0.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from workbench import catalog
from workbench.experiments.experiment import Experiment, judge
from workbench.provenance import versions
from workbench.schema import to_json

RESULTS = Path(__file__).parent / "results" / "experiments.json"


def measure(experiment: Experiment, seeds: int) -> dict[str, Any]:
    """Verdicts over the seeds, with the seconds that each took."""
    rows: list[dict[str, Any]] = []
    for found in judge(experiment, range(seeds)):
        verdict = found.verdict
        statistic = verdict.statistic if math.isfinite(verdict.statistic) else None
        rows.append({"seed": found.seed, "passed": verdict.passed, "statistic": statistic, "words": verdict.words})
        rows[-1] |= {"seconds": round(found.seconds, 1)}
        print(f"{experiment.name}, seed {found.seed}: {verdict}", file=sys.stderr)
    return {
        "threshold": verdict.threshold,
        "calibrated_on": list(experiment.calibrated_on),
        "settings": to_json(experiment),
        "versions": dict(versions()),
        "threads": torch.get_num_threads(),
        "rows": rows,
    }


def table(known: dict[str, Any]) -> str:
    """One row for each experiment: statistics from lowest to highest, threshold, seeds passed, seconds."""
    lines = [
        "| experiment | statistic over seeds | wanted at least | passed | seconds a seed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, found in known.items():
        rows = found["rows"]
        values = sorted(math.nan if r["statistic"] is None else r["statistic"] for r in rows)
        seconds = sorted(r["seconds"] for r in rows)
        spread = ", ".join(f"{v:.3g}" for v in values)
        passed = f"{sum(r['passed'] for r in rows)} of {len(rows)}"
        lines.append(f"| {name} | {spread} | {found['threshold']:g} | {passed} | {seconds[0]:g} to {seconds[-1]:g} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="experiments to run (default: all)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds to judge, from 0")
    chosen = parser.parse_args()
    every = catalog.probes("nothing")
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in chosen.names or every:
        known[name] = measure(every[name](), chosen.seeds)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    print(table(known))


if __name__ == "__main__":
    main()
