"""What an optimizer does to curvature: its preconditioner at a moment, and where a quadratic stops being stable.

Every update handled here is, with state frozen, θ ← θ - η P⁻¹ (a g + b m) with m ← β m + (1 - β) g. On ½ λ θ² it is
stable while η λ / P < c = 2 (1 + β) / (a (1 + β) + b (1 - β)): 2 for gradient descent, 2 (1 + β) for heavy ball,
2 (1 + β) / (1 - β) for Adam's average, 2 (1 + β) / (1 + 2β) for PyTorch's Nesterov momentum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from workbench.record import load_tensors

Settings = Mapping[str, Any]
State = Mapping[str, Any]


@dataclass(frozen=True)
class Response:
    """The update of one group with its state frozen: coefficients β, a and b of the module's formula, and its words."""

    decay: float
    direct: float
    averaged: float
    words: str

    @property
    def constant(self) -> float:
        """c, the largest η λ / P at which a quadratic does not diverge."""
        rest = self.direct * (1 + self.decay) + self.averaged * (1 - self.decay)
        return 2 * (1 + self.decay) / rest


@dataclass(frozen=True, eq=False)
class OptimizerState:
    """An optimizer at one moment: ``kind`` (its class's name), each group's settings, each parameter's group and state.

    What a snapshot or a checkpoint keeps of an optimizer. ``groups_of`` and ``states`` go by parameter name; state
    tensors that lie in a file (``path``, with ``keys`` name -> prefix there) are read when asked for.
    """

    kind: str
    param_groups: tuple[Settings, ...]
    groups_of: Mapping[str, int]
    states: Mapping[str, State] = field(default_factory=dict[str, State])
    path: Path | None = None
    keys: Mapping[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def recorded(cls, held: Mapping[str, Any], path: Path | None) -> OptimizerState:
        """What a checkpoint's header says of the optimizer, and the file with its tensors, where they were kept."""
        names = [str(name) for name in held["parameters"]]
        groups = cast("list[dict[str, Any]]", held["groups"])
        places = {names[i]: k for k, group in enumerate(groups) for i in group["params"]}
        plain: dict[str, dict[str, Any]] = {}
        for key, value in held["state"].items():
            index, _, entry = key.partition("/")
            plain.setdefault(names[int(index)], {})[entry] = value
        keys = {name: str(i) for i, name in enumerate(names)}
        kind = str(held["class"]).rpartition(".")[2].rpartition(":")[2]
        return cls(kind, tuple(_settings(g) for g in groups), places, plain, path, keys)

    def loaded(self) -> Mapping[str, State]:
        """Each parameter's state by name, with the tensors that lie in a file: the whole file is read."""
        if self.path is None:
            return self.states
        tensors, made = load_tensors(self.path), {name: dict(state) for name, state in self.states.items()}
        names = {key: name for name, key in self.keys.items()}
        for key, tensor in tensors.items():
            index, _, entry = key.partition("/")
            made.setdefault(names[index], {})[entry] = tensor
        return made


Optimizer = torch.optim.Optimizer | OptimizerState


def state_of(optimizer: Optimizer, named: Mapping[str, Tensor], *, copy: bool = False) -> OptimizerState:
    """An optimizer by the names of its parameters, which are found by identity; others keep their place's number.

    ``copy`` clones the tensors that the preconditioner needs and leaves the rest out, so that the state stays as it is
    when training goes on; else tensors are the optimizer's own.
    """
    if isinstance(optimizer, OptimizerState):
        return optimizer
    inner = getattr(optimizer, "optimizer", None)  # wrappers of training libraries
    chosen = inner if isinstance(inner, torch.optim.Optimizer) else optimizer
    kind, names = type(chosen).__name__, {id(p): name for name, p in named.items()}
    places: dict[str, int] = {}
    states: dict[str, State] = {}
    for k, group in enumerate(chosen.param_groups):
        for p in group["params"]:
            name = names.get(id(p), f"#{len(places)}")
            places[name] = k
            if p in chosen.state:
                states[name] = _kept(chosen.state[p], copy)
    return OptimizerState(_kind(chosen, kind), tuple(_settings(g) for g in chosen.param_groups), places, states)


def frozen(optimizer: Optimizer | None, named: Mapping[str, Tensor]) -> OptimizerState | None:
    """A copy of what a preconditioner needs of an optimizer, which stays as it is; None for None."""
    return None if optimizer is None else state_of(optimizer, named, copy=True)


def _kept(state: Mapping[str, Any], copy: bool) -> dict[str, Any]:
    if not copy:
        return dict(state)
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in state.items() if k in _NEEDED}


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group without its parameters, and with numbers where settings are tensors."""
    return {k: _plain(v) for k, v in group.items() if k != "params"}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_plain(v) for v in cast("list[Any]", value))
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _kind(optimizer: torch.optim.Optimizer, name: str) -> str:
    """The class's name; one that only shares its name with one of PyTorch's is given its full name."""
    return name if type(optimizer).__module__.startswith("torch.optim") else f"{type(optimizer).__module__}.{name}"


# ------------------------------------------------------------------------------------------------ the updates


def _root(square: Tensor, settings: Settings) -> Tensor:
    return square.sqrt() + float(settings["eps"])


def _adam(settings: Settings, state: State) -> Tensor:
    """(1 - β1^t) (√(ν / (1 - β2^t)) + ε), ν with AMSGrad its maximum so far."""
    first, second = (1 - float(b) ** float(state["step"]) for b in settings["betas"])
    square = state["max_exp_avg_sq" if settings.get("amsgrad") else "exp_avg_sq"]
    return first * _root(square.double() / second, settings)


def _nadam(settings: Settings, state: State) -> Tensor:
    """√(ν / (1 - β2^t)) + ε; what corrects the first moment is in the response."""
    second = 1 - float(settings["betas"][1]) ** float(state["step"])
    return _root(state["exp_avg_sq"].double() / second, settings)


def _adamax(settings: Settings, state: State) -> Tensor:
    """(1 - β1^t) u, u the decaying maximum of |g| + ε."""
    return (1 - float(settings["betas"][0]) ** float(state["step"])) * state["exp_inf"].double()


def _rmsprop(settings: Settings, state: State) -> Tensor:
    """√ν + ε, ν centred where asked."""
    square = state["square_avg"].double()
    if settings.get("centered"):
        square = (square - state["grad_avg"].double() ** 2).clamp_(min=0)
    return _root(square, settings)


def _adagrad(settings: Settings, state: State) -> Tensor:
    """(√Σg² + ε) (1 + (t - 1) decay)."""
    return _root(state["sum"].double(), settings) * (1 + (float(state["step"]) - 1) * float(settings["lr_decay"]))


def _plain_response(settings: Settings, state: State) -> Response:
    return Response(0.0, 1.0, 0.0, "gradient descent")


def _momentum(settings: Settings, state: State) -> Response:
    """Heavy ball v ← β v + (1 - dampening) g, or Nesterov's g + β v."""
    beta = float(settings.get("momentum", 0.0))
    if not beta:
        return _plain_response(settings, state)
    kept = (1 - float(settings.get("dampening", 0.0))) / (1 - beta)
    if settings.get("nesterov"):
        return Response(beta, 1.0, beta * kept, f"Nesterov momentum {beta:g}")
    return Response(beta, 0.0, kept, f"heavy ball, momentum {beta:g}")


def _average(settings: Settings, state: State) -> Response:
    beta = float(settings["betas"][0])
    return Response(beta, 0.0, 1.0, f"averaged gradients, β1 = {beta:g}")


def _nadam_response(settings: Settings, state: State) -> Response:
    """The coefficients of the step that was taken last; of an endless run where there was none."""
    beta, decay = float(settings["betas"][0]), float(settings["momentum_decay"])
    step = float(state.get("step", math.inf)) or math.inf
    now, then = (beta * (1 - 0.5 * 0.96 ** (t * decay)) for t in (step, step + 1))
    product = float(state.get("mu_product", 0.0)) if math.isfinite(step) else 0.0
    words = f"Nesterov's averaged gradients, β1 = {beta:g}"
    return Response(beta, (1 - now) / (1 - product), then / (1 - product * then), words)


@dataclass(frozen=True)
class _Rule:
    """How an optimizer scales and responds, and which state the scale is made of; None: it does not precondition."""

    respond: Callable[[Settings, State], Response]
    scale: Callable[[Settings, State], Tensor] | None = None
    needs: tuple[str, ...] = ()


_ADAM = _Rule(_average, _adam, ("exp_avg_sq", "step"))
_RULES: Mapping[str, _Rule] = {
    "SGD": _Rule(_momentum),
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "NAdam": _Rule(_nadam_response, _nadam, ("exp_avg_sq", "step")),
    "Adamax": _Rule(_average, _adamax, ("exp_inf", "step")),
    "RMSprop": _Rule(_momentum, _rmsprop, ("square_avg",)),
    "Adagrad": _Rule(_plain_response, _adagrad, ("sum", "step")),
}
_NEEDED = {"max_exp_avg_sq", "grad_avg", "mu_product", "exp_avg"} | {
    name for rule in _RULES.values() for name in rule.needs
}


def _rule(state: OptimizerState) -> _Rule:
    if state.kind not in _RULES:
        raise ValueError(
            f"no preconditioner is known for {state.kind}; there are those of {', '.join(_RULES)} (torch.optim). Give "
            "another one as a vector or a function: Preconditioned(operator, root), with root = P^(-1/2)."
        )
    if any(group.get("maximize") for group in state.param_groups):
        raise ValueError("the optimizer maximises its objective (maximize=True); curvature here is that of a loss.")
    return _RULES[state.kind]


# ------------------------------------------------------------------------------------------------ what is asked


@dataclass(frozen=True)
class Stability:
    """Where the loss's quadratic model stops being stable under an optimizer.

    ``constant`` is c, the limit of η λ_1(P⁻¹H), a number without units; ``sharpness`` = c / η that of λ_1(P⁻¹H) itself
    (nan where groups differ in c or η); ``words`` say which update it is.
    """

    constant: float
    sharpness: float
    words: str


@dataclass(frozen=True, eq=False)
class Scale:
    """P for one parameter as float64, or 1; the learning rate; and c. ``moved`` is False where there is no state."""

    entries: Tensor | float
    rate: float
    constant: float
    moved: bool = True


def threshold(optimizer: Optimizer, named: Mapping[str, Tensor] | None = None) -> Stability:
    """The stability limit of an optimizer as it is now, for a fixed preconditioner.

    Where groups differ in c, ``constant`` is the smallest, which :func:`scales` takes account of.

    Raises:
        ValueError: an optimizer that is not known here.
    """
    held = state_of(optimizer, named or {})
    rule = _rule(held)
    states = held.loaded() if rule.respond is _nadam_response else held.states
    found: set[tuple[Response, float]] = set()
    for k, group in enumerate(held.param_groups):
        one = next((s for n, s in states.items() if held.groups_of.get(n) == k), {})
        found.add((rule.respond(group, one), float(group["lr"])))
    limits = {r.constant / rate if rate else math.inf for r, rate in found}
    words = f"{held.kind} ({', '.join(sorted({r.words for r, _ in found}))})"
    return Stability(min(r.constant for r, _ in found), limits.pop() if len(limits) == 1 else math.nan, words)


def scales(optimizer: Optimizer, named: Mapping[str, Tensor]) -> dict[str, Scale]:
    """P, η and c for each of the ``named`` tensors, which the optimizer knows by identity (a recorded one by name).

    Raises:
        ValueError: an optimizer that is not known, has not stepped, was recorded without its state, or does not hold
            one of the tensors.
    """
    held = state_of(optimizer, named)
    rule, states = _rule(held), held.loaded()
    if rule.scale is not None:
        _check_stepped(held, states, named)
    _check_held(held, named)
    made: dict[str, Scale] = {}
    for name in named:
        group, state = held.groups_of[name], states.get(name, {})
        settings = held.param_groups[group]
        moved = rule.scale is None or _stepped(rule, state)
        entries = rule.scale(settings, state) if rule.scale is not None and moved else 1.0
        made[name] = Scale(entries, float(settings["lr"]), rule.respond(settings, state).constant, moved)
    return made


def averaged_steps(optimizer: Optimizer, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Averaged gradient over preconditioner, m / P in float64, for each of the ``named`` tensors.

    For Adam, AdamW and Adamax the update that was taken last, before learning rate and weight decay: m̂ / (√v̂ + ε).
    Zero for a parameter that the optimizer never moved.

    Raises:
        ValueError: as :func:`scales`, and an optimizer that does not average gradients.
    """
    held = state_of(optimizer, named)
    if _rule(held).respond not in (_average, _nadam_response):
        known = ", ".join(kind for kind, rule in _RULES.items() if rule.respond in (_average, _nadam_response))
        raise ValueError(f"{held.kind} keeps no average of gradients over which a step is made; {known} do.")
    found, states = scales(optimizer, named), held.loaded()
    return {name: _averaged(found[name], states.get(name, {}), like) for name, like in named.items()}


def _averaged(scale: Scale, state: State, like: Tensor) -> Tensor:
    if not scale.moved or "exp_avg" not in state:
        return torch.zeros(like.shape, dtype=torch.float64, device=like.device)
    mean: Tensor = state["exp_avg"].double()
    return (mean / scale.entries).reshape(like.shape).to(like.device)


def _stepped(rule: _Rule, state: State) -> bool:
    return all(name in state for name in rule.needs) and float(state.get("step", 1)) > 0


def _check_stepped(held: OptimizerState, states: Mapping[str, State], named: Mapping[str, Tensor]) -> None:
    rule = _RULES[held.kind]
    if any(_stepped(rule, states.get(name, {})) for name in named):
        return
    if held.keys and held.path is None:
        raise ValueError(
            f"the record holds {held.kind}'s settings but not its state: record with "
            "Recorder(..., keep_optimizer=True), or look at a step after the first."
        )
    _check_held(held, named)
    raise ValueError(
        f"{held.kind} has not stepped yet, so it has no preconditioner; take at least one step (or load its state), "
        "or look at the loss without it."
    )


def _check_held(held: OptimizerState, named: Mapping[str, Tensor]) -> None:
    strange = [name for name in named if name not in held.groups_of]
    if strange:
        raise ValueError(
            f"{held.kind} does not hold {strange[0]} ({len(strange)} of the subject's {len(named)} parameters): give "
            "the optimizer of this very model, or leave them out with Subject(parameters=...)."
        )
