"""Ours, exact, curvlinops and PyHessian side by side on nets of every kind that are small enough for a dense matrix.

``python benchmarks/crosscheck.py`` writes ``benchmarks/results/crosscheck.json`` and ``docs/crosscheck.md``, and ends
with 1 where one of our numbers is farther from the exact one than the error that it states. Exact matrices come from
plain loops of autograd in float64 that share no code with the package. Each peer is called as its own documentation
does, at its defaults, on a copy of the model; where it raises, the table holds the first line of its error.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from architectures import SMALL, Rows, examples, trained
from pitfalls.exact import IDS, N, built, derivatives, flat
from pitfalls.test_06_parameters import NETS as COUNTED
from toys import examples as clouds
from toys import net as mixed

from workbench.probes.spectrum import HessianSpectrum
from workbench.subject import Subject

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "benchmarks" / "results" / "crosscheck.json", ROOT / "docs" / "crosscheck.md"
WRONG, ZERO = 0.01, 1e-9
"""Relative errors that are marked; and the share of λ_1 below which an exact value counts as zero."""
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5}
"""What products leave open beyond a residual, over λ_1."""
TOP, TRACE_PRODUCTS = 3, 30
Data = list[tuple[Tensor, Tensor]]


# --- nets ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model in float64 and eval mode, its batches, and the precision in which ours and the peers get it."""

    name: str
    model: nn.Module
    batches: Data
    dtype: torch.dtype | None = None

    @property
    def whole(self) -> tuple[Tensor, Tensor]:
        """All examples in one batch."""
        x, y = (torch.cat(part) for part in zip(*self.batches, strict=True))
        return x, y

    def given(self, dtype: torch.dtype) -> tuple[nn.Module, Data]:
        """A copy of the model and the batches in a precision, or in the case's own."""
        dtype = self.dtype or dtype
        cast = [(x.to(dtype) if x.is_floating_point() else x, y) for x, y in self.batches]
        return copy.deepcopy(self.model).to(dtype), cast


class Residual(nn.Module):
    """Two convolutions with BatchNorm and a way around them, then a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(F.avg_pool2d(torch.relu(x + self.second(x)), 4).flatten(1))


class Attention(nn.Module):
    """Self-attention by PyTorch's fused kernel, and no LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(8, 24), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        heads = (part.unsqueeze(1) for part in self.mix(x.squeeze(1)).chunk(3, -1))
        return self.head(F.scaled_dot_product_attention(*heads).squeeze(1).mean(1))


class Normed(nn.Module):
    """LayerNorm between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.AvgPool1d(4), nn.Linear(16, 12), nn.LayerNorm(12), nn.Tanh())
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


MORE: dict[str, Callable[[], nn.Module]] = {
    "residual, conv + BatchNorm": Residual,
    "LayerNorm": Normed,
    "fused attention": Attention,
    "GRU": lambda: Rows(nn.Identity(), nn.GRU(8, 6, batch_first=True), 6),
}


def cases() -> Iterator[Case]:
    """Nets of every kind, trained a little, and those that count parameters in an unusual way, as initialised."""
    for name, build in (SMALL | MORE).items():
        made = trained(build, count=70)
        count = 12 if name == "tied embedding" else 70
        yield Case(name, made.model, [examples(made.model, count)])
    dense = trained(SMALL["dense GELU"])
    x, y = dense.data
    yield Case("ragged batches 32, 32, 6", dense.model, list(zip(x.split(32), y.split(32), strict=True)))
    yield Case("one of 64, one of 6", dense.model, list(zip(x.split([64, 6]), y.split([64, 6]), strict=True)))
    for name, (build, data) in COUNTED.items():
        yield Case(f"{name} parameters", _single(built(build).eval()), [data])
    yield Case("BatchNorm, dropout and mixed flags", _single(mixed().eval()), [clouds()])
    late = trained(SMALL["dense GELU"], steps=2000)
    yield Case("dense GELU, loss near zero", late.model, [late.data])
    half = copy.deepcopy(dense.model).bfloat16()
    rounded = [(x.bfloat16().double(), y)]
    yield Case("dense GELU in bfloat16", half.double(), rounded, torch.bfloat16)


def _single(model: nn.Module) -> nn.Module:
    """With values that float32 holds too, so that every precision looks at one point."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.copy_(tensor.float())
    return model


# --- exact -----------------------------------------------------------------------------------------------------------


def exact_hessian(case: Case) -> np.ndarray:
    """All eigenvalues, largest first: double backward entry by entry."""
    return _eigenvalues(derivatives(case.model, *case.whole)[2])


def exact_gauss_newton(case: Case) -> np.ndarray:
    """Those of (1/n) Σ Jᵀ (diag(p) - p pᵀ) J, with J row by row."""
    model, (x, _) = copy.deepcopy(case.model), case.whole
    params = [p for p in model.parameters() if p.requires_grad]
    words: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        outputs = model(x)
        outputs = outputs.reshape(-1, outputs.shape[-1])
        rows = torch.stack([flat(torch.autograd.grad(z, params, **words)) for z in outputs.flatten()])
    p = outputs.detach().softmax(1)
    jacobian = rows.view(*outputs.shape, -1)
    bent = p[..., None] * (jacobian - (p[..., None] * jacobian).sum(1, keepdim=True))
    return _eigenvalues(torch.einsum("ncp,ncq->pq", jacobian, bent) / len(outputs))


def _eigenvalues(matrix: Tensor) -> np.ndarray:
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2).flip(0).detach().numpy()


# --- what is asked ---------------------------------------------------------------------------------------------------


@dataclass
class Answers:
    """Values by quantity (λ1.., minimum, trace), our stated errors, and why a quantity is missing."""

    values: dict[str, float] = field(default_factory=dict)
    stated: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def quantities(operator: str) -> list[str]:
    """Gauss-Newton matrices have no negative eigenvalues to ask for."""
    tops = [f"λ{i}" for i in range(1, TOP + 1)]
    return [*tops, "minimum", "trace"] if operator == "hessian" else [*tops, "trace"]


def ours(case: Case, operator: str) -> Answers:
    """HessianSpectrum with its default settings."""
    model, batches = case.given(torch.float64)
    subject = Subject(model, batches)
    data = HessianSpectrum(operator=operator, top=TOP).run(subject).data  # type: ignore[arg-type]
    rounding = ROUNDING[subject.dtype] * float(data.eigenvalue[0])
    found = Answers()
    for i in range(TOP):
        found.values[f"λ{i + 1}"] = float(data.eigenvalue[i])
        found.stated[f"λ{i + 1}"] = float(data.residual[i]) + rounding
    if operator == "hessian":
        found.values["minimum"] = float(data.eigenvalue_min)
        found.stated["minimum"] = float(data.eigenvalue_min_residual) + rounding
    found.values["trace"] = float(data.trace)
    found.stated["trace"] = float(data.trace_error) + rounding * subject.size**0.5
    return found


class FlatLoss(nn.CrossEntropyLoss):
    """The mean cross-entropy over all examples, or tokens: peers know no sequences."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input.reshape(-1, input.shape[-1]), target.reshape(-1))


def curvlinops(case: Case, operator: str) -> Answers:
    """Its linear operators with scipy's eigsh, in float64, and its XTrace with 30 products."""
    package: Any = importlib.import_module("curvlinops")
    kind = {"hessian": package.HessianLinearOperator, "ggn": package.GGNLinearOperator}[operator]
    found = Answers()

    def made() -> Any:
        model, batches = case.given(torch.float64)
        loss = FlatLoss() if model(batches[0][0]).dim() > 2 else nn.CrossEntropyLoss()
        return kind(model, loss, [p for p in model.parameters() if p.requires_grad], batches)

    def largest() -> dict[str, float]:
        values = eigsh(made().to_scipy(), k=TOP, which="LA", return_eigenvectors=False)
        return {f"λ{i + 1}": float(v) for i, v in enumerate(sorted(values, reverse=True))}

    _ask(found, [f"λ{i + 1}" for i in range(TOP)], largest)
    if operator == "hessian":
        _ask(found, ["minimum"], lambda: {"minimum": eigsh(made().to_scipy(), k=1, which="SA")[0].item()})
    _ask(found, ["trace"], lambda: {"trace": float(package.xtrace(made(), _even(case)))})
    return found


def _even(case: Case) -> int:
    size = sum(p.numel() for p in case.model.parameters() if p.requires_grad)
    return min(TRACE_PRODUCTS, (size - 1) // 2 * 2)  # XTrace wants an even number, below the size


def pyhessian(case: Case, operator: str) -> Answers:
    """Its three eigenvalues of largest magnitude and its trace, at its defaults, in float32; it has nothing else."""
    package: Any = importlib.import_module("pyhessian")
    found = Answers()
    if operator != "hessian":
        found.missing = dict.fromkeys(quantities(operator), "not offered")
        return found
    found.missing["minimum"] = "not offered"

    def made() -> Any:
        model, batches = case.given(torch.float32)
        loss = FlatLoss() if model(batches[0][0]).dim() > 2 else nn.CrossEntropyLoss()
        single = len(batches) == 1
        words = {"data": batches[0]} if single else {"dataloader": batches}
        return package.hessian(model, loss, cuda=False, **words)

    def largest() -> dict[str, float]:
        found = sorted(made().eigenvalues(top_n=TOP)[0], reverse=True)  # it gives them in the order found
        return {f"λ{i + 1}": float(v) for i, v in enumerate(found)}

    _ask(found, [f"λ{i + 1}" for i in range(TOP)], largest)
    _ask(found, ["trace"], lambda: {"trace": float(np.mean(made().trace()))})
    return found


def _ask(found: Answers, wanted: list[str], work: Callable[[], dict[str, float]]) -> None:
    """Values, or the first line of what was raised."""
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            found.values |= work()
    except Exception as problem:  # whatever a peer raises belongs into the table
        line = f"{type(problem).__name__}: {(str(problem).strip() or 'no words').splitlines()[0]}"
        found.missing |= dict.fromkeys(wanted, line[:90])


PEERS: dict[str, Callable[[Case, str], Answers]] = {"ours": ours, "curvlinops": curvlinops, "PyHessian": pyhessian}


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One quantity of one net: the exact value, and what each package says (relative errors, or why not)."""

    net: str
    parameters: int
    operator: str
    quantity: str
    exact: float
    errors: dict[str, float]
    missing: dict[str, str]
    ours: float
    stated: float
    scale: float

    @property
    def kept(self) -> bool:
        """Whether ours is as near as it says."""
        return abs(self.ours - self.exact) <= self.stated

    def cell(self, who: str) -> str:
        """A relative error, marked where it is more than one per cent; or the words of an error."""
        if who in self.missing:
            return self.missing[who].replace("|", "/")
        error = self.errors[who]
        words = f"{error:.1e}" if error < 10 else f"{error:.0f}"
        if who == "ours":
            words += f" (says {self.stated / self.scale:.1e})" + ("" if self.kept else " **outside**")
        return f"**{words}**" if error > WRONG else words


def rows(case: Case) -> Iterator[Row]:
    """All quantities of one net."""
    for operator, truth in (("hessian", exact_hessian), ("ggn", exact_gauss_newton)):
        values = truth(case)
        exact = {f"λ{i + 1}": values[i] for i in range(TOP)} | {"minimum": values[-1], "trace": values.sum()}

        def size(value: float, first: float = values[0]) -> float:
            return max(abs(value), ZERO * abs(first))

        answers = {who: ask(case, operator) for who, ask in PEERS.items()}
        for name in quantities(operator):
            known = {who: a.values[name] for who, a in answers.items() if name in a.values}
            yield Row(
                net=case.name,
                parameters=len(values),
                operator=operator,
                quantity=name,
                exact=float(exact[name]),
                errors={who: abs(v - exact[name]) / size(exact[name]) for who, v in known.items()},
                missing={who: a.missing[name] for who, a in answers.items() if name in a.missing},
                ours=answers["ours"].values[name],
                stated=answers["ours"].stated[name],
                scale=size(exact[name]),
            )


def table(found: list[Row]) -> str:
    """The page: what was compared, and a line for each quantity of each net."""
    lines = [
        "# Cross-check: ours, exact, curvlinops and PyHessian",
        "",
        "Written by `benchmarks/crosscheck.py`; do not edit. Numbers are relative errors against matrices built entry",
        "by entry in float64. Ours are those of `HessianSpectrum` at its default tolerance of 2 %, with the error that",
        "the reading states beside them (residual, or 95 % interval of the trace; rounding included). **Bold**: off by",
        "more than 1 %. Peers run at their defaults: curvlinops' operators with SciPy's `eigsh`, and its XTrace",
        "with 30 products; PyHessian's `eigenvalues(top_n=3)`, sorted, and `trace()`, in float32. Where a peer",
        "raises, the cell holds the first line of its error. An exact value below 1e-9 λ1 counts as zero: errors are",
        "then over 1e-9 λ1.",
        "",
        *_counts(found),
        "",
        "| net | parameters | matrix | quantity | exact | ours | curvlinops | PyHessian |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in found:
        cells = " | ".join(r.cell(who) for who in PEERS)
        lines.append(f"| {r.net} | {r.parameters} | {r.operator} | {r.quantity} | {r.exact:.6g} | {cells} |")
    return "\n".join(lines) + "\n"


def _counts(found: list[Row]) -> list[str]:
    lines = ["| | right to 1 % | wrong by more | raises | not offered |", "| --- | --- | --- | --- | --- |"]
    for who in PEERS:
        wrong = sum(r.errors[who] > WRONG for r in found if who in r.errors)
        absent = sum(r.missing.get(who) == "not offered" for r in found)
        raised = sum(who in r.missing for r in found) - absent
        lines.append(f"| {who} | {len(found) - wrong - absent - raised} | {wrong} | {raised} | {absent} |")
    return lines


def main() -> None:
    """Compare, print, write; 1 where ours is outside its own error."""
    found: list[Row] = []
    for case in cases():
        found += rows(case)
        print(f"{case.name}: done", file=sys.stderr, flush=True)
    page = table(found)
    print(page)
    PAGE.write_text(page, encoding="utf-8")
    facts = {"torch": torch.__version__, "wrong_beyond": WRONG, "examples": N, "tokens": list(IDS.shape)}
    held = facts | {"rows": [vars(r) | {"within_stated_error": r.kept} for r in found]}
    RESULT.write_text(json.dumps(held, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    outside = [f"{r.net}, {r.operator}, {r.quantity}: {r.ours:.6g}, exact {r.exact:.6g}" for r in found if not r.kept]
    if outside:
        print("Outside our own error:", *outside, sep="\n  ", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
