"""What is measured: a model, data and a loss as one function of the parameters."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from workbench import parameters as theta
from workbench.criterion import Params, of_loss, of_objective
from workbench.data import Examples, freeze
from workbench.evaluation import Metric, check_finite, saved_bytes
from workbench.feed import CHUNK, Feed, accepted_names, compares_next_token
from workbench.fingerprint import TensorDigests, digest
from workbench.function import LossFunction
from workbench.losses import Reduction
from workbench.optimizers import Optimizer, frozen
from workbench.parameters import Choice
from workbench.plan import Plan, available_memory, fitting
from workbench.shell import Norm, Shell
from workbench.trees import leaves
from workbench.twin import twin, unwrap

TRIED = 32
"""Examples on which model and loss are tried when a subject is made."""
_COUPLED = "the loss couples the examples of a batch, so batches of {} are part of what it is"
_MEASURED = ("_bytes_each", "_default_chunk", "_fixed_digest", "data_digest")
SHARE = 0.25
"""The share of free memory that one chunk's graph may take by default."""


class Subject(LossFunction):
    """A model, data and a loss as one function of the parameters: L(θ) = Σ ℓ / Σ weights, the model untouched.

    The examples are read once and frozen. The model is evaluated through a :class:`Shell` of its own: in eval mode,
    without dropout, without the user's hooks, with explicit attention, at tensors that are given. ``params`` share
    storage with the model where no other precision or device is asked for; :meth:`snapshot` gives one that does not.

    Args:
        model: any ``torch.nn.Module``; compiled, DataParallel and DDP wrappers are looked through.
        data: (x, y), a Dataset, a DataLoader, a list or generator of batches. A batch is a tuple, its last entry the
            targets, or a dict, with targets under labels, label, targets, target or y.
        loss: cross_entropy, half_mse, mse, l1, binary_cross_entropy_with_logits, nll, a function or a module.
        objective: instead of ``loss``: f(model, batch) -> loss. There are no outputs then, nor GGN and Fisher.
        reduction: how the loss combines a batch, where that cannot be found. L is always a mean over examples (over
            unmasked tokens, or elements, where PyTorch's own mean is).
        metrics: your own by name, beside loss and error rate in ``evaluate`` and on planes: f(outputs, targets), a
            number for each example or one for a batch; or f(model) -> float, run without gradients (a reward, say).
        held_out: a second data set, available as :attr:`held_out`.
        parameters: names, module names, globs or a predicate (name, tensor) -> bool; None: all that require gradients.
        optimizer: the optimizer in use (or its state, as a trajectory's steps have it), for probes that precondition.
        norm: "eval" (running statistics, the default), "batch" (statistics of each micro-batch of ``batch_size``) or
            "recompute" (running statistics estimated anew, by cumulative averages over the examples, at each point).
        device: "auto" for the model's own.
        dtype: precision of a private copy; None: the model's, float32 for half precision.
        batch_size: examples evaluated at once; the micro-batch for ``norm="batch"``.
        max_examples: at most so many examples, drawn by ``seed`` without replacement; None: all.
        seed: for that choice, and for reading data with random augmentation.

    Raises:
        ValueError, TypeError: what was got, what was wanted and what to do; before any probe runs.
    """

    kind: ClassVar[str] = "subject"
    path: Any = None
    """What the subject was opened from, with ``steps``, ``weights(step)`` and ``fingerprint()``; else None."""

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        loss: str | Callable[..., Any] = "cross_entropy",
        *,
        objective: Callable[[nn.Module, Any], Tensor] | None = None,
        reduction: Reduction | None = None,
        metrics: Mapping[str, Callable[..., Any]] | None = None,
        held_out: Any = None,
        parameters: Choice = None,
        optimizer: Optimizer | None = None,
        norm: Norm | None = None,
        device: str | torch.device = "auto",
        dtype: torch.dtype | None = None,
        batch_size: int | None = None,
        max_examples: int | None = 2048,
        seed: int = 0,
    ) -> None:
        theta.check_model(model)
        inner = unwrap(model)
        first = next(iter(inner.parameters()))
        self.seed, self.optimizer, self.batch_size = seed, optimizer, batch_size
        self.norm: Norm = theta.settle_norm(inner, norm, batch_size)
        self.device = theta.settle_device(first.device, device)
        self.dtype, precision = theta.working_dtype(inner.parameters(), dtype)
        elsewhere = self.device if self.device != first.device else None
        self._shell = Shell(model, self.norm, self.dtype if precision else None, elsewhere, seed)
        self._names, excluded = theta.choose(self._shell.module, parameters)
        self._stated = (*excluded, *((precision,) if precision else ()))
        self._title, self._plan, self._digests = type(inner).__name__, Plan(), TensorDigests()
        self._given: tuple[Any, Reduction | None, bool] = (objective or loss, reduction, objective is None)
        self._adopt(freeze(data, max_examples, seed))
        self.metrics = {name: Metric.of(name, f, self.has_outputs) for name, f in (metrics or {}).items()}
        held = None if held_out is None else freeze(held_out, max_examples, seed)
        self.held_out: Subject | None = held and self._with(held, held_out=None)

    @torch.no_grad()
    def _adopt(self, data: Examples) -> None:
        """Take the examples, try model and loss on a few of them, and check every label, before anything else runs."""
        model = self._shell.module
        feed = Feed(data, self.device, self.dtype, accepted_names(model)).here()
        batch = feed.first(feed.micro(self.batch_size) if self.norm == "batch" else TRIED)
        given, reduction, is_loss = self._given
        own = twin(given, self._shell.convert) if is_loss and isinstance(given, nn.Module) else given
        self._criterion = (of_loss if is_loss else of_objective)(self._shell, own, reduction, batch)
        shifted = isinstance(given, str) and compares_next_token(model, batch, self._criterion.shape)
        self._feed = dataclasses.replace(feed, weigh=self._criterion.weigh, shifted=shifted)
        self._statistics: tuple[Any, dict[str, Tensor]] = (None, {})
        self.total_weight = self._criterion.check_targets(self._feed.targets())
        if self.norm != "recompute":
            check_finite(float(self.batch_loss({}, self._feed.first(TRIED), {})), True)

    def _with(self, data: Examples | None = None, **changes: Any) -> Subject:
        """This subject with some attributes exchanged, and what was measured and remembered forgotten."""
        other = copy.copy(self)
        for name in _MEASURED:
            vars(other).pop(name, None)
        vars(other).update({"_digests": TensorDigests(), "_statistics": (None, {}), **changes})
        if data is not None:
            other._adopt(data)
        return other

    # --- what it is -------------------------------------------------------------------------------------------------

    @property
    def params(self) -> dict[str, Tensor]:
        """The chosen parameters, detached, in ``named_parameters`` order, tied ones once; live unless converted."""
        now = self._shell.tensors(deep=True)
        return {name: now[name] for name in self._names}

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer, chosen or not, detached; live unless converted."""
        return self._shell.tensors(deep=True)

    @property
    def size(self) -> int:
        """The number of chosen scalars."""
        return sum(self._shell.parameters[name].numel() for name in self._names)

    @property
    def examples(self) -> int:
        """The number of examples that are used."""
        return self._feed.data.size

    @property
    def available(self) -> int | None:
        """The number of examples they were chosen from; None for a stream that was not read to its end."""
        return self._feed.data.available

    @property
    def on(self) -> str:
        """How many of them there are, as notes say it: "on 256 of 60000 examples"."""
        return f"on {self.examples} of {self.available or 'unknown'} examples"

    @property
    def places(self) -> tuple[int, ...]:
        """Where each example stands in the data that were given: a dataset's index, or how many came before it."""
        return tuple(self._feed.data.places)

    @property
    def classes(self) -> int | None:
        """The number of classes, for losses of class targets."""
        loss = self._criterion.loss
        return self._criterion.shape[1 if loss.class_first else -1] if loss and loss.kind == "classes" else None

    @property
    def has_outputs(self) -> bool:
        """Whether outputs and a loss of them are known: not for subjects made with ``objective=``."""
        return self._criterion.loss is not None

    @property
    def module(self) -> nn.Module:
        """The shell's module, for hooks while :attr:`lock` is held; flags and attributes go back after each call."""
        return self._shell.module

    @property
    def lock(self) -> Any:
        """A re-entrant lock, held during each evaluation; hold it while hooks are on :attr:`module`."""
        return self._shell.lock

    @property
    def notes(self) -> tuple[str, ...]:
        """Facts that every reading states: what was left out, converted or computed otherwise than in training."""
        shifted = ("targets are the labels moved one token to the left",) if self._feed.shifted else ()
        coupled = (_COUPLED.format(self._micro),) if self._criterion.coupled else ()
        return (*self._stated, *shifted, *coupled, *self._shell.notes(self._micro))

    @property
    def plan(self) -> Plan:
        """How sums are cut up; what was left open is filled in."""
        given = self._plan
        return dataclasses.replace(
            given, chunk=given.chunk or self._default_chunk, threads=given.threads or torch.get_num_threads()
        )

    def with_plan(self, plan: Plan) -> Subject:
        """The same subject evaluated by another plan."""
        other = copy.copy(self)
        other._plan = plan
        return other

    def snapshot(self) -> Subject:
        """The subject at the weights of now, on copies that nobody else can change."""
        shell, optimizer = self._shell.snapshot(), frozen(self.optimizer, self._shell.parameters)
        held_out = self.held_out and self.held_out._with(_shell=shell)
        return self._with(_shell=shell, held_out=held_out, optimizer=optimizer)

    def at(self, params: Params, note: str = "") -> Subject:
        """The same function standing at other weights (those not named: as they are now), on copies of its own.

        ``note`` says where that is, in the notes of readings.

        Raises:
            KeyError: a name that is neither a parameter nor a buffer.
        """
        stated = (*self._stated, note) if note else self._stated
        return self._with(_shell=self._shell.snapshot(params), held_out=None, optimizer=None, _stated=stated)

    def under(self, norm: Norm) -> Subject:
        """The same model under another policy for BatchNorm's statistics: "eval", "batch" or "recompute"."""
        policy = theta.settle_norm(self._shell.module, norm, self.batch_size)
        shell = Shell(self._shell.module, policy, self._shell.dtype, self._shell.device, self.seed)
        held = self.held_out and self.held_out._with(norm=policy, _shell=shell)
        return self._with(norm=policy, _shell=shell, held_out=held)

    def excerpt(self, examples: int, dtype: torch.dtype | None = None) -> Subject:
        """The same function of the first ``examples`` only, in a precision of its own: for checks at little cost."""
        dtype = dtype or self.dtype
        shell = Shell(self._shell.module, self.norm, dtype, self.device, self.seed)
        return self._with(self._feed.data.some(examples), dtype=dtype, _shell=shell, _plan=Plan(), held_out=None)

    def selected(self, chosen: Sequence[int]) -> Subject:
        """The same function of the examples at these places only (0 to ``examples`` - 1): L of a subset."""
        feed = dataclasses.replace(self._feed, data=self._feed.data.picked(chosen))
        weight = self._criterion.check_targets(feed.targets())  # model and loss were tried before
        return self._with(_feed=feed, total_weight=weight, held_out=None)

    def restricted(self, parameters: Choice) -> Subject:
        """The same loss as a function of some of its parameters, the others held fixed; ``parameters`` as above."""
        return self._with(_names=theta.narrowed(self._shell.module, self._names, parameters))

    def version(self) -> tuple[Any, ...]:
        """Changes when any weight or buffer is written; see :meth:`Shell.version` for what is noticed, and its cost."""
        return self._shell.version()

    def fingerprint(self) -> str:
        """A hash of all that the numbers depend on: weights, buffers, examples, loss, policy, parameters, precision."""
        return digest(self._digests(self.version(), self._shell.tensors(deep=True)), self._fixed_digest)

    @functools.cached_property
    def data_digest(self) -> str:
        """A hash of the frozen examples, in their order: equal where two subjects look at the same ones."""
        return digest(self._feed.data.parts)

    @functools.cached_property
    def _fixed_digest(self) -> str:
        micro = self._micro if self.norm != "eval" or self._criterion.coupled else None
        held = None if self.held_out is None else self.held_out._feed.data.parts
        optimizer = None if self.optimizer is None else theta.optimizer_settings(self.optimizer)
        policy = (self.norm, micro, str(self.dtype), self._names, repr(self._shell.module), optimizer, self.seed)
        own = [(name, metric.function) for name, metric in self.metrics.items()]
        return digest(self.data_digest, held, self._given, policy, *((own,) if own else ()))

    def describe(self) -> dict[str, Any]:
        """JSON-ready facts for a reading's provenance."""
        return {
            "model": self._title,
            "size": self.size,
            "loss": self._criterion.name,
            "reduction": self._criterion.reduction,
            "norm": self.norm,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "examples": self.examples,
            "available": self.available,
            "on": self.on,
            "seed": self.seed,
            "batch_size": self._micro if self.norm != "eval" else self.batch_size,
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        return "<Subject {model}: {size} parameters, {loss} {on}>".format(**self.describe())

    # --- what it costs ----------------------------------------------------------------------------------------------

    @functools.cached_property
    def _default_chunk(self) -> int:
        return fitting(self.batch_size or min(self.examples, CHUNK), self._bytes_each, SHARE * self.available_memory())

    @functools.cached_property
    def _bytes_each(self) -> float:
        batch = self._feed.first(min(TRIED, self._micro))
        point = {name: p.requires_grad_() for name, p in self.params.items()}
        outside = {t.untyped_storage().data_ptr() for t in (*point.values(), *leaves(batch.raw))}
        return saved_bytes(lambda: self.batch_loss(point, batch, {}), outside) / batch.size

    def memory(self) -> int:
        """Bytes that autograd keeps of one chunk's forward pass: measured on a few examples, scaled to the chunk."""
        return int(self._bytes_each * min(self.plan.chunk or CHUNK, self.examples))

    def available_memory(self) -> int:
        """Bytes that are free on the subject's device."""
        return available_memory(self.device)
