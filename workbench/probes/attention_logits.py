"""Attention logits: how large the scores before the softmax are, head by head, and how spread the attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from workbench.data import Batch
from workbench.figure import Axis, Figure, Panel, Points, Rule, Text
from workbench.numerics.sampling import Draw
from workbench.numerics.stats import error_of_mean
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Doc, Range
from workbench.shell import precise
from workbench.subject import Subject

MASKED = -1e8
"""Scores at or below this are masks, whatever large negative number stands for minus infinity."""
DANGER = 1e4
"""Scores of this size have been seen before trainings in half precision diverged."""
_SOFTMAX = (functional.softmax, torch.softmax, Tensor.softmax)


@dataclass(frozen=True)
class AttentionLogits(Probe[Subject]):
    """Attention logits z = q·k/√d before the softmax: largest, root mean square, and attention entropy, by head.

    What it measures, over pairs of a query and a key that it may see: ``largest`` max z (and ``smallest``),
    ``rms`` √(mean z²); over queries that see two keys at least: ``entropy`` mean of -Σ p log p with p = softmax(z), and
    ``relative_entropy`` that over the logarithm of how many keys are seen: 1 is uniform, 0 attends to one key.

    How to read it: ``largest`` that grows through training, with ``relative_entropy`` falling to 0, is the growth that
    precedes divergence at large learning rates; 10⁴ is far into it. Normalising queries and keys bounds it.

    What is seen: every softmax over the last axis of three or more axes: ``scaled_dot_product_attention``,
    ``nn.MultiheadAttention`` and attention written out by hand, after scaling, masks, rotary positions and
    normalisation, in the subject's precision (float32 at least; never a fused kernel's). A layer is named by the module
    that runs it, with #2, #3 ... where it attends several times. A net without any gives one row, called "none".

    What it costs: one forward pass over ``sequences`` examples, with (queries x keys) scores for each head.

    When it misleads: a maximum grows with the number of sequences: compare equal ``sequences`` and lengths. A router
    over experts, or any other softmax over the last axis of three, is taken for attention too. Rows that a mask empties
    count as zeros. Masks that add less than 10⁸ (some add 10⁴) are taken for scores: ``smallest`` shows them.

    Errors: maxima are exact for these examples; the others have standard errors over examples.

    Source: Dehghani et al. 2023 (growth of attention logits); Wortsman et al. 2023; Zhai et al. 2023 (entropy).
    """

    sequences: Annotated[
        int, Range(1, 100_000, log=True, soft=(8, 512)), Doc("At most so many examples, drawn at random.")
    ] = 32

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("largest", ("layer", "head"), "largest attention logit"),
        Variable("smallest", ("layer", "head"), "smallest attention logit that is not masked"),
        Variable("rms", ("layer", "head"), "root mean square of attention logits", error="rms_error"),
        Variable("rms_error", ("layer", "head"), "its standard error over examples"),
        Variable("entropy", ("layer", "head"), "attention entropy, mean over queries", "nat", "entropy_error"),
        Variable("entropy_error", ("layer", "head"), "its standard error over examples", "nat"),
        Variable("relative_entropy", ("layer", "head"), "entropy over that of uniform attention",
                 error="relative_entropy_error"),
        Variable("relative_entropy_error", ("layer", "head"), "its standard error over examples"),
        Variable("measured", (), "examples that were looked at"),
        Variable("train_loss", (), "loss at the point, on these examples", error="train_loss_error"),
        Variable("train_loss_error", (), "standard error of the loss over examples"),
    )  # fmt: skip

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """Batch after batch of the chosen examples."""
        used = min(self.sequences, subject.examples)
        if used < subject.examples:
            subject = subject.selected(draw.generator(0).permutation(subject.examples)[:used].tolist())
        run = _Run(self, subject)
        for batch in subject.batches():
            run.add(batch)
            yield run.report(0.99 * min(run.seen / used, 1.0))
        yield run.report(1.0)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The largest logit of all heads and where it is, and the least spread head."""
        largest, names = data.largest.values, data["layer"].values
        found: dict[str, Value] = {"largest": _nanless(np.max, largest)}
        found["relative_entropy_least"] = _nanless(np.min, data.relative_entropy.values)
        if np.isfinite(largest).any():
            found["layer"] = str(names[np.unravel_index(int(np.nanargmax(largest)), largest.shape)[0]])
        return found | {"train_loss": float(data.train_loss), "train_loss_error": float(data.train_loss_error)}

    def figure(self, data: xr.Dataset) -> Figure:
        """Largest logits and relative entropies of every head, layer by layer."""
        if not np.isfinite(data.largest.values).any():
            words = Text(0.0, 0.0, "no attention ran, or its logits are not finite")
            return Figure((Panel((words,), Axis("layer"), Axis("attention logit")),))
        count, heads = data.largest.shape
        at = np.repeat(np.arange(1, count + 1), heads)
        large, rms = data.largest.values.ravel(), data.rms.values.ravel()
        marks = [Points(at, large, label="largest"), Points(at, rms, data.rms_error.values.ravel(), "rms", "second")]
        danger = (Rule(DANGER, label="danger in half precision"),) if np.nanmax(large) > DANGER / 100 else ()
        spread = Points(at, data.relative_entropy.values.ravel(), data.relative_entropy_error.values.ravel())
        logits = Panel((*marks, *danger), Axis("layer"), Axis("attention logit", "symlog", threshold=1.0))
        return Figure((logits, Panel((spread, Rule(1.0)), Axis("layer"), Axis("relative entropy"))))

    def estimate(self, subject: Subject) -> Cost:
        """One pass; the scores are within what a pass of the subject takes, some of them twice."""
        return Cost(2 * subject.memory() + 2**16, 1, f"one pass over {min(self.sequences, subject.examples)} examples")


def _nanless(function: Callable[[Any], Any], values: np.ndarray) -> float:
    """The extreme of what is known; nan where nothing is."""
    known = values[~np.isnan(values)]
    return float(function(known)) if known.size else math.nan


class _Run:
    """What one stream knows so far: by layer, numbers of each example and head."""

    def __init__(self, probe: AttentionLogits, subject: Subject) -> None:
        self.probe, self.subject, self.seen = probe, subject, 0
        self.heads: dict[str, list[Tensor]] = {}
        self.ends: dict[str, list[Tensor]] = {}
        self.settled = False

    def add(self, batch: Batch) -> None:
        """Watch one forward pass."""
        subject, counts = self.subject, dict[str, int]()

        def take(place: str, module: nn.Module | None, scores: Tensor) -> None:
            counts[place] = counts.get(place, 0) + 1
            name = f"{place}#{counts[place]}" if counts[place] > 1 else place
            if self.settled and name not in self.heads:
                return  # a path that the first batch did not take has no row
            parts, ends = _measure(_by_head(scores, module))
            self.heads.setdefault(name, []).append(parts)
            self.ends.setdefault(name, []).append(ends)

        quiet = torch.no_grad(), precise(subject.device)
        with subject.lock, quiet[0], quiet[1], _places(subject.module) as place, _Watch(lambda z: take(*place(), z)):
            subject.batch_outputs(subject.params, batch)
        self.settled, self.seen = True, self.seen + batch.size

    def report(self, done: float) -> Reading:
        """The reading of now."""
        names = list(self.heads) or ["none"]
        width = max((p[0].shape[1] for p in self.heads.values()), default=1)
        values: dict[str, Any] = {v.name: np.full((len(names), width), np.nan) for v in self.probe.variables if v.dims}
        for row, name in enumerate(self.heads):
            for key, found in _numbers(self.heads[name], self.ends[name]).items():
                values[key][row, : len(found)] = found
        values["measured"] = self.seen
        if done == 1:
            found = self.subject.evaluate(None, ("loss",))
            values |= {"train_loss": found["loss"], "train_loss_error": found["loss_error"]}
        coords = {"layer": np.array(names), "head": np.arange(1, width + 1)}
        return self.probe.reading(done, values, coords=coords, converged=done == 1, notes=self.notes())

    def notes(self) -> tuple[str, ...]:
        """What a reader must know about these numbers."""
        subject = self.subject
        none = () if self.heads else ("no attention ran: no softmax over the last of three or more axes",)
        return (*subject.notes, subject.on, *none)


class _Watch(TorchFunctionMode):
    """Shows the argument of each softmax over the last of at least three axes; belongs to the calling thread.

    The subject's own rules stand inside of it and compute attention by plain products, so its softmax comes by here.
    """

    def __init__(self, take: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.take = take

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in _SOFTMAX:
            scores = args[0] if args else given["input"]
            dim = args[1] if len(args) > 1 else given.get("dim")
            if scores.ndim >= 3 and dim in (-1, scores.ndim - 1):
                self.take(scores.detach())
        return func(*args, **given)


@contextmanager
def _places(model: nn.Module) -> Generator[Callable[[], tuple[str, nn.Module | None]]]:
    """Tells, during a forward pass, which module is running: the innermost one with a name."""
    running: list[tuple[str, nn.Module]] = []

    def enter(name: str) -> Any:
        return lambda module, _inputs: running.append((name, module))

    def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        running.pop()

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(enter(name or "model")).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield lambda: running[-1] if running else ("model", None)


def _by_head(scores: Tensor, module: nn.Module | None) -> Tensor:
    """Scores as (examples, heads, queries, keys); nn.MultiheadAttention may have put heads beside examples."""
    if scores.ndim == 3:
        heads = module.num_heads if isinstance(module, nn.MultiheadAttention) else 1
        return scores.unflatten(0, (-1, heads))
    return scores.flatten(0, -4) if scores.ndim > 4 else scores


def _measure(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Of each example and head: how many pairs, Σz², and means of both entropies, (n, h, 4); max and min, (2, h)."""
    scores = scores.double()
    hidden = scores <= MASKED
    visible = (~hidden).sum(-1)
    largest = scores.masked_fill(hidden, -math.inf).amax((0, 2, 3))
    smallest = scores.masked_fill(hidden, math.inf).amin((0, 2, 3))
    squares = scores.masked_fill(hidden, 0.0).square().sum((2, 3))
    logs = scores.masked_fill(hidden, -math.inf).log_softmax(-1)
    entropy = -(logs.exp() * logs.masked_fill(hidden, 0.0)).sum(-1)
    open_, choices = visible > 1, visible.clamp_min(2).double().log()
    queries = open_.sum(-1)
    both = [torch.where(open_, e, 0.0).sum(-1) / queries for e in (entropy, entropy / choices)]
    return torch.stack([visible.sum(-1).double(), squares, *both], -1), torch.stack([largest, smallest])


def _numbers(parts: list[Tensor], ends: list[Tensor]) -> dict[str, np.ndarray]:
    """Everything of a layer, head by head, with standard errors over examples."""
    each, extremes = torch.cat(parts).cpu().numpy(), torch.stack(ends).cpu().numpy()
    pairs, squares = each[..., 0], each[..., 1]
    n = len(each)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = squares.sum(0) / pairs.sum(0)
        off = squares - mean * pairs
        spread = np.sqrt((off**2).sum(0) * n / (n - 1)) / pairs.sum(0) if n > 1 else np.full_like(mean, np.nan)
        found = {"rms": np.sqrt(mean), "rms_error": spread / (2 * np.sqrt(mean))}
        for place, name in ((2, "entropy"), (3, "relative_entropy")):
            found[name], found[f"{name}_error"] = each[..., place].mean(0), error_of_mean(each[..., place])
    return found | {"largest": extremes[:, 0].max(0), "smallest": extremes[:, 1].min(0)}
