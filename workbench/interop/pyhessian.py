"""PyHessian on a subject: the same loss, examples, parameters and policy, with its own algorithms and stop rules.

The release 0.1 is used as it is and adapted from outside. It gets a module of its own whose loss is the subject's; its
methods run with a private stand-in for the name ``torch``, which draws from a generator of its own, keeps the subject's
precision and has the eigenvalue routine that PyTorch removed. So nothing of the process moves, in no other thread
either: no random state, no ``.grad`` of the user's, no attribute of the package.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from workbench.data import Batch
from workbench.shell import precise
from workbench.subject import Subject

NAME = "PyHessian"
LIMIT, TOLERANCE = 100, 1e-3
"""PyHessian's own defaults: products for an eigenvalue (vectors for the trace), and the change at which it stops."""
Stop = Literal["rule", "limit", "time"]


@dataclass(frozen=True)
class Eigenvalue:
    """One eigenvalue by power iteration.

    ``residual`` is ‖Hv - λv‖ for its vector (nan: not known), ``products`` what it took; it ``stopped`` by its rule, at
    its limit, or because time was up.
    """

    value: float
    residual: float
    products: int
    stopped: Stop


@dataclass(frozen=True)
class Trace:
    """A trace by Hutchinson's estimator: the mean of so many ``vectors``, its standard error, and why it stopped."""

    value: float
    error: float
    vectors: int
    stopped: Stop


class PyHessian:
    """PyHessian 0.1 on a subject's Hessian; use it as a context manager, or call :meth:`close`, to free its graph.

    Args:
        subject: what to look at; its weights are copied, and neither they nor their ``.grad`` are touched.
        seed: of the random vectors, drawn by a generator that nobody else uses.
        seconds: after so long from now its loops are left, and what they had found is given; None: never.

    Cost: one product is a double backward on a kept graph where all examples fit into one chunk, else a fresh one.

    Raises:
        ImportError: PyHessian is not installed.
    """

    def __init__(self, subject: Subject, seed: int = 0, seconds: float | None = None) -> None:
        package = _package()
        self.subject, self.products = subject, 0
        self.deadline = math.inf if seconds is None else time.monotonic() + seconds
        self._model = Copied(subject.snapshot())
        self._runs: list[list[float]] = []
        self._drawn = 0
        self._stand_in = _Torch(seed, subject.dtype, self._began)
        with self._evaluating():
            self._theirs: Any = self._opened(package)

    def _opened(self, package: Any) -> Any:
        single, cuda = self._model.single, self.subject.device.type == "cuda"
        data = (_MARK, _MARK) if single else None
        made = package.hessian(self._model, self._model.criterion, data, None if single else self._model, cuda)
        made.device = str(self.subject.device)  # it knows "cuda" and "cpu" only
        made.full_dataset = True  # so that all its products go through the one method that is watched below
        self._product = self._on_kept_graph(package, made) if single else self._rebound(made, "dataloader_hv_product")
        made.dataloader_hv_product = self._watched
        return made

    def _rebound(self, made: Any, name: str) -> Callable[..., Any]:
        """A method of PyHessian's whose global name ``torch`` is the stand-in, bound to one object."""
        code: Any = getattr(type(made), name)
        names = {**code.__globals__, "torch": self._stand_in}
        return MethodType(FunctionType(code.__code__, names, name, code.__defaults__, code.__closure__), made)

    def _on_kept_graph(self, package: Any, made: Any) -> Callable[[Any], tuple[float, Any]]:
        def product(vector: Any) -> tuple[float, Any]:
            found = package.hessian_vector_product(made.gradsH, made.params, vector)
            return package.group_product(found, vector).item(), found

        return product

    def _began(self) -> None:
        """A random tensor is drawn; as many as there are parameters make one vector, and begin one run."""
        self._drawn += 1
        if (self._drawn - 1) % len(self._model.names) == 0:
            self._runs.append([])

    def _watched(self, vector: Any) -> tuple[float, Any]:
        if time.monotonic() > self.deadline and self.products:
            raise _OutOfTime
        quotient, found = self._product(vector)
        self.products += 1
        if self._runs:
            self._runs[-1].append(quotient)
        return quotient, found

    @contextmanager
    def _evaluating(self) -> Generator[None]:
        try:
            with precise(self.subject.device), torch.enable_grad():
                yield
        finally:
            self._model.zero_grad()

    def eigenvalues(self, top: int = 1, limit: int = LIMIT, tolerance: float = TOLERANCE) -> list[Eigenvalue]:
        """The ``top`` eigenvalues of largest magnitude, in the order found, by power iteration with deflation.

        Each ends when two successive quotients differ by less than ``tolerance`` of the value, or at ``limit``
        products. Where time ran out, the last one is unfinished and further ones are missing.
        """
        self._runs, self._drawn, values, vectors = [], 0, [], []
        with self._evaluating():
            try:
                values, vectors = self._rebound(self._theirs, "eigenvalues")(limit, tolerance, top)
            except _OutOfTime:
                values = [run[-2] for run in self._runs[:-1]] + [run[-1] for run in self._runs[-1:] if run]
            counts = [len(run) for run in self._runs]
            changes: list[Stop] = [_changed(run, tolerance) for run in self._runs]
            residuals = [*map(self._residual, values, vectors), *[math.nan] * len(values)]
        unfinished = len(values) - 1 if not vectors else len(values)
        changes = ["time" if i == unfinished else why for i, why in enumerate(changes)]
        return [Eigenvalue(*found) for found in zip(map(float, values), residuals, counts, changes, strict=False)]

    def _residual(self, value: float, vector: Sequence[Tensor]) -> float:
        try:
            _, found = self._watched(list(vector))
        except _OutOfTime:
            return math.nan
        return math.sqrt(sum(float(((h - value * v) ** 2).sum()) for h, v in zip(found, vector, strict=True)))

    def trace(self, limit: int = LIMIT, tolerance: float = TOLERANCE) -> Trace:
        """The trace, by vectors of ±1, until two running means differ by less than ``tolerance`` or at ``limit``."""
        self._runs, self._drawn = [], 0
        cut: Stop | None = None
        with self._evaluating():
            try:
                self._rebound(self._theirs, "trace")(limit, tolerance)
            except _OutOfTime:
                cut = "time"
        samples = torch.tensor([run[0] for run in self._runs if run], dtype=torch.float64)
        error = float(samples.std() / math.sqrt(len(samples))) if len(samples) > 1 else math.nan
        rule: Stop = "rule" if len(samples) < limit else "limit"
        return Trace(float(samples.mean()) if len(samples) else math.nan, error, len(samples), cut or rule)

    def density(self, steps: int = 100, vectors: int = 1) -> tuple[Tensor, Tensor]:
        """Quadrature nodes and weights (vectors, steps) of the spectral density, float64.

        The release's last line calls ``torch.eig``, which PyTorch removed; the stand-in has it. ``steps`` are at most
        the number of parameters. Not stopped by time.
        """
        self._runs, self._drawn, self.deadline = [], 0, math.inf
        with self._evaluating():
            nodes, weights = self._rebound(self._theirs, "density")(min(steps, self.subject.size), vectors)
        return torch.tensor(nodes, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)

    def close(self) -> None:
        """Free the graph, which PyHessian keeps in ``.grad`` and in a list of its own."""
        self._model.zero_grad()
        self._theirs.gradsH = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _package() -> Any:
    try:
        return importlib.import_module("pyhessian")
    except ImportError as problem:
        raise ImportError(f"PyHessian cannot be imported ({problem}); pip install pyhessian.") from problem


class _OutOfTime(Exception):
    """Time is up: no fault, but the way out of another package's loop."""


_MARK = torch.zeros(1)
"""What PyHessian passes on as inputs and targets: the model knows its batch itself, of whatever shape and nesting."""


class Copied(nn.Module):
    """A subject as the model, the criterion and the loader that PyHessian asks for; its parameters are copies.

    PyHessian weighs each batch's loss by its number of examples. The criterion undoes that, so that what comes
    out is Σ batch losses over the total weight, also where examples carry unequal weights.
    """

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject, self.names = subject, tuple(subject.params)
        self.copies = nn.ParameterList([nn.Parameter(p) for p in subject.params.values()])
        self.batch: Batch = next(subject.batches())
        self.single = self.batch.size == subject.examples

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.subject.batches():
            self.batch = batch
            yield torch.zeros(self.batch.size), _MARK

    def forward(self, inputs: Tensor) -> Tensor:
        """The present batch's contribution to the loss."""
        return self.subject.batch_loss(self.point, self.batch)

    @property
    def point(self) -> Mapping[str, Tensor]:
        return dict(zip(self.names, self.copies, strict=True))

    def criterion(self, total: Tensor, targets: Tensor) -> _Loss:
        """The same over the weight of this many examples, so that PyHessian's average over examples is L."""
        share = self.subject.examples / (self.subject.total_weight * self.batch.size)
        return _Loss(total * share, list(self.copies))


@dataclass(frozen=True)
class _Loss:
    """A loss that knows one way of going backward, without the warning that PyTorch's own gives each time."""

    value: Tensor
    leaves: Sequence[nn.Parameter]

    def backward(self, create_graph: bool) -> None:
        """Put gradients with their graphs into ``.grad``; parameters that the loss does not use get zeros with one."""
        if self.value.requires_grad:
            found = torch.autograd.grad(
                self.value, self.leaves, create_graph=create_graph, allow_unused=True, materialize_grads=True
            )
        else:
            found = [torch.zeros_like(p) for p in self.leaves]
        for leaf, gradient in zip(self.leaves, found, strict=True):
            leaf.grad = gradient + 0.0 * leaf  # on a graph through each leaf, or PyHessian's next step refuses


class _Torch:
    """PyTorch as PyHessian's methods see it."""

    def __init__(self, seed: int, dtype: torch.dtype, drawn: Callable[[], None]) -> None:
        self._generator, self._dtype, self._drawn = torch.Generator().manual_seed(seed), dtype, drawn

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def randn(self, size: Sequence[int]) -> Tensor:
        self._drawn()
        return torch.randn(size, generator=self._generator, dtype=self._dtype)

    def randint_like(self, like: Tensor, high: int, device: str) -> Tensor:
        self._drawn()
        return torch.randint(0, high, like.shape, generator=self._generator, dtype=like.dtype).to(device)

    def zeros(self, *size: Any) -> Tensor:
        return torch.zeros(*size, dtype=self._dtype)

    def eig(self, matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
        """What ``torch.eig`` gave for a symmetric matrix: values as (real, imaginary), and vectors as columns."""
        values, vectors = torch.linalg.eigh(matrix.double())
        return torch.stack([values, torch.zeros_like(values)], dim=1), vectors


def _changed(run: Sequence[float], tolerance: float) -> Stop:
    """Whether its rule ended a run of quotients: the last two agree."""
    small = len(run) > 1 and abs(run[-2] - run[-1]) / (abs(run[-2]) + 1e-6) < tolerance
    return "rule" if small else "limit"
