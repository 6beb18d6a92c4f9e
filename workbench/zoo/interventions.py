"""What keeps a network plastic, as small additions to any training loop: decay, resets and projections.

Each is made once for a model and told of the loop: ``before_step`` between ``backward`` and ``optimizer.step``,
``after_step`` behind it, ``between_tasks`` where the data change.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workbench.zoo.nets import initialise

_ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.ELU, nn.Sigmoid)


class Intervention:
    """No intervention: what the others override, and the plain arm of a comparison."""

    def before_step(self) -> None:
        """Gradients are there, the optimizer has not used them."""

    def after_step(self) -> None:
        """The optimizer has changed the weights."""

    def between_tasks(self) -> None:
        """One task is over, the next has not begun."""


class WeightPenalty(Intervention):
    """L2: adds the gradient of ½ ``strength`` ‖θ - θ_0‖² to each gradient; θ_0 is 0, or the weights of now.

    The same as PyTorch's coupled ``weight_decay`` where θ_0 is 0. ``to_initial`` pulls back to the weights at the time
    of making (L2-init, Kumar et al. 2023). Parameters without a gradient are left out.
    """

    def __init__(self, model: nn.Module, strength: float, to_initial: bool = False) -> None:
        self.strength = strength
        self._pulled = [(p, p.detach().clone() if to_initial else None) for p in model.parameters() if p.requires_grad]

    def before_step(self) -> None:
        """Add the penalty's gradient."""
        for p, origin in self._pulled:
            if p.grad is not None:
                p.grad.add_(p.detach() if origin is None else p.detach() - origin, alpha=self.strength)


@torch.no_grad()
def shrink_and_perturb(
    model: nn.Module, keep: float = 0.8, fresh: nn.Module | None = None, noise: float = 0.0, seed: int = 0
) -> None:
    """θ ← keep · θ + (1 - keep) · θ_fresh + noise · ξ, ξ ~ N(0, 1), of every floating-point parameter, in place.

    Without ``fresh`` the middle term is missing, so that E‖θ'‖² = keep² ‖θ‖² + noise² P with P parameters. Source: Ash
    and Adams 2020.

    Args:
        model: changed in place.
        keep: from 0 to 1.
        fresh: a network of the same shape, newly initialised.
        noise: standard deviation of what is added.
        seed: of the noise; the global random state is left alone.

    Raises:
        ValueError: ``keep`` out of range, or ``fresh`` has other parameters.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"shrink_and_perturb(keep=...) lies between 0 and 1; got {keep!r}.")
    own, other = dict(model.named_parameters()), dict(fresh.named_parameters()) if fresh else {}
    if fresh is not None and {n: p.shape for n, p in own.items()} != {n: p.shape for n, p in other.items()}:
        raise ValueError("shrink_and_perturb needs a fresh network with the same parameters; build it alike.")
    generator = torch.Generator().manual_seed(seed)
    for name, p in own.items():
        p.mul_(keep)
        if name in other:
            p.add_(other[name].to(p), alpha=1 - keep)
        if noise:
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p), alpha=noise)


class NormProjection(Intervention):
    """Scales each weight tensor of two dims and more back to its Frobenius norm at the time of making, after each step.

    Biases and the scales of normalisation layers are left alone. Where a normalisation follows each weight, as in
    :func:`normalised_dense`, the function stays what it was (but for the normalisation's ε) and the effective learning
    rate stays what it is. A tensor that was or became 0 is left alone. Source: Lyle et al. 2024 (arXiv:2407.01800).
    """

    def __init__(self, model: nn.Module) -> None:
        self._held = [(p, _norm(p)) for p in model.parameters() if p.ndim > 1]

    @torch.no_grad()
    def after_step(self) -> None:
        """Put the norms back."""
        for p, wanted in self._held:
            now = _norm(p)
            p.mul_(torch.where(now > 0, wanted / now, 1.0).to(p.dtype))


def _norm(p: Tensor) -> Tensor:
    return torch.linalg.vector_norm(p.detach(), dtype=torch.float64)


def normalised_dense(widths: Sequence[int] = (64, 32, 10), epsilon: float = 1e-5, seed: int = 0) -> nn.Sequential:
    """A fully connected ReLU net with LayerNorm before each non-linearity, whose hidden linear maps have no bias.

    Args:
        widths: input size, hidden sizes, output size; at least two numbers.
        epsilon: what LayerNorm adds to the variance.
        seed: of the initial weights.
    """
    if len(widths) < 2 or any(w < 1 for w in widths):
        raise ValueError(f"normalised_dense(widths=...) needs at least two sizes, all >= 1; got {list(widths)}.")
    parts: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    last = len(widths) - 1
    for layer, (ins, outs) in enumerate(itertools.pairwise(widths), 1):
        parts[f"linear{layer}"] = nn.utils.skip_init(nn.Linear, ins, outs, bias=layer == last)
        if layer < last:
            parts[f"norm{layer}"] = nn.LayerNorm(outs, eps=epsilon)
            parts[f"activation{layer}"] = nn.ReLU()
    return initialise(nn.Sequential(parts), seed)


@dataclass(eq=False)
class Units:
    """The units of one hidden layer: their maps in and out, what was seen of them, and how old they are."""

    into: nn.Linear
    out: nn.Linear
    utility: Tensor
    mean: Tensor
    age: Tensor
    owed: float = 0.0
    values: Tensor | None = None

    def keep(self, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        """Hear of the activations of a batch."""
        self.values = output.detach().reshape(-1, output.shape[-1])

    def correction(self, decay: float) -> Tensor:
        """1 - decay^age, what a running mean that began at 0 has seen of its weight."""
        return 1 - decay ** self.age.clamp_min(1).to(self.mean.dtype)


class UnitIntervention(Intervention):
    """Hears of the hidden units of a model, and begins units anew: what resets of single units have in common.

    Hidden layers are the linear maps in an ``nn.Sequential`` that lead through an activation (and, if there is one, a
    LayerNorm or dropout before it) to the next linear map; convolutions are left alone.

    Args:
        model: hooks sit on its activations until :meth:`close`.
        optimizer: whose moments are reset; entries of its state that have the parameter's shape.
        seed: of the new weights.

    Raises:
        ValueError: no such hidden layer.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
        self._optimizer, self._generator = optimizer, torch.Generator().manual_seed(seed)
        self.layers: list[Units] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        for into, activation, out in _hidden(model):
            utility, mean, age = into.weight.new_zeros(3, into.out_features).unbind()
            units = Units(into, out, utility, mean, age)
            self.layers.append(units)
            self._hooks.append(activation.register_forward_hook(units.keep))
        if not self.layers:
            raise ValueError(f"{type(self).__name__} found no linear, activation, linear in a row in a Sequential.")

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @torch.no_grad()
    def redraw(self, units: Units, places: Sequence[int]) -> None:
        """Draw incoming weights and biases of units from U(±1/√fan_in), as in the initialisation; moments 0."""
        into, where = units.into, list(places)
        bound = 1 / math.sqrt(into.in_features)
        drawn = torch.rand(len(where), into.in_features + 1, generator=self._generator, dtype=torch.float64)
        new = (2 * drawn.to(into.weight) - 1) * bound
        into.weight[where] = new[:, :-1]
        self._forget(into.weight, (where,))
        for bias in _bias(into):
            bias[where] = new[:, -1]
            self._forget(bias, (where,))

    @torch.no_grad()
    def silence(self, units: Units, places: Sequence[int]) -> None:
        """Set outgoing weights of units to 0, and their moments."""
        where = (slice(None), list(places))
        units.out.weight[where] = 0
        self._forget(units.out.weight, where)

    def _forget(self, parameter: Tensor, where: tuple[slice | list[int], ...]) -> None:
        """Zero the optimizer's moments of some entries."""
        for held in self._optimizer.state.get(parameter, {}).values():
            if isinstance(held, Tensor) and held.shape == parameter.shape:
                held[where] = 0


class ContinualBackprop(UnitIntervention):
    """Continual backpropagation (Dohare et al. 2024): now and then the least useful old units begin anew.

    After each step, for each unit of a hidden layer with activations h: utility u ← decay · u + (1 - decay) · E|h| ·
    Σ|w_out|, a running mean of h likewise, and its age grows by 1. Units older than ``maturity`` are candidates; each
    step adds ``rate`` times their number to what is owed, and for each whole unit owed, the candidate of smallest
    u / (1 - decay^age) begins anew: incoming weights and bias from U(±1/√fan_in) as in the initialisation, outgoing
    weights 0, its mean activation times the old outgoing weights added to the next bias (so that a unit that is
    constant leaves without a trace), the optimizer's moments of all these 0, utility, mean and age 0.

    Hidden layers are those of :class:`UnitIntervention`.

    Args:
        model: hooks sit on its activations until :meth:`close`.
        optimizer: whose moments are reset; entries of its state that have the parameter's shape.
        rate: share of the old units that is replaced at each step.
        maturity: steps for which a new unit is protected.
        decay: of the running means.
        seed: of the new weights.

    Raises:
        ValueError: no such hidden layer.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rate: float = 1e-4,
        maturity: int = 100,
        decay: float = 0.99,
        seed: int = 0,
    ) -> None:
        super().__init__(model, optimizer, seed)
        self.rate, self.maturity, self.decay = rate, maturity, decay

    @torch.no_grad()
    def after_step(self) -> None:
        """Update utilities by the last forward pass, and replace what is owed."""
        for units in self.layers:
            if units.values is None:
                continue
            units.age += 1
            useful = units.values.abs().mean(0) * units.out.weight.abs().sum(0)
            units.utility.lerp_(useful, 1 - self.decay)
            units.mean.lerp_(units.values.mean(0), 1 - self.decay)
            units.values = None
            for place in self._chosen(units):
                self.replace(units, place)

    def _chosen(self, units: Units) -> list[int]:
        """The units whose turn it is, least useful first."""
        old = (units.age > self.maturity).nonzero().flatten()
        units.owed += self.rate * len(old)
        count = min(int(units.owed), len(old))
        if not count:
            return []
        units.owed -= count
        worth = (units.utility / units.correction(self.decay))[old]
        return old[worth.argsort(stable=True)[:count]].tolist()

    @torch.no_grad()
    def replace(self, units: Units, place: int) -> None:
        """Begin one unit anew."""
        out = units.out
        for bias in _bias(out):
            bias += out.weight[:, place] * (units.mean / units.correction(self.decay))[place]
        self.redraw(units, [place])
        self.silence(units, [place])
        for seen in (units.utility, units.mean, units.age):
            seen[place] = 0


class RecycleDormant(UnitIntervention):
    """ReDo (Sokar et al. 2023): every so many steps the dormant units of every hidden layer begin anew.

    Unit i of a layer with activations h is dormant where E|h_i| <= ``tau`` · mean_k E|h_k| on the last batch, as
    DormantUnits has it; all units of a layer that is 0 everywhere are. The dormant units of all layers get incoming
    weights and biases from U(±1/√fan_in), then outgoing weights 0, and 0 for the optimizer's moments of all these. So
    the outputs lose what the dormant units gave to them, and nothing where they were 0. A LayerNorm on the way keeps
    its scale and bias. ``recycled`` counts units.

    Hidden layers are those of :class:`UnitIntervention`.

    Args:
        model: hooks sit on its activations until ``close``.
        optimizer: whose moments are reset; entries of its state that have the parameter's shape.
        tau: 0: only units that are 0 on the whole batch.
        every: steps between two moments of recycling.
        seed: of the new weights.

    Raises:
        ValueError: no such hidden layer, a negative ``tau``, or ``every`` below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        tau: float = 0.025,
        every: int = 1000,
        seed: int = 0,
    ) -> None:
        if tau < 0 or every < 1:
            raise ValueError(f"RecycleDormant wants tau >= 0 and every >= 1; got tau={tau!r} and every={every!r}.")
        super().__init__(model, optimizer, seed)
        self.tau, self.every, self.recycled, self._count = tau, every, 0, 0

    @torch.no_grad()
    def after_step(self) -> None:
        """Recycle where it is time, by the activations of the last forward pass."""
        self._count += 1
        if self._count % self.every == 0:
            self.recycle()

    @torch.no_grad()
    def recycle(self) -> None:
        """Begin the dormant units anew; layers of which no batch was seen are left alone."""
        chosen = [(units, self.dormant(units)) for units in self.layers]
        for units, places in chosen:
            self.redraw(units, places)
            self.recycled += len(places)
        # Only now, so that new incoming weights of the next layer bring no unit back that shall be silent.
        for units, places in chosen:
            self.silence(units, places)

    def dormant(self, units: Units) -> list[int]:
        """The dormant units of one layer."""
        if units.values is None:
            return []
        size = units.values.abs().double().mean(0)
        return (size <= self.tau * size.mean()).nonzero().flatten().tolist()


def _bias(linear: nn.Linear) -> list[Tensor]:
    """The bias, where there is one."""
    return [p for name, p in linear.named_parameters() if name == "bias"]


def _hidden(model: nn.Module) -> Iterator[tuple[nn.Linear, nn.Module, nn.Linear]]:
    """Linear, activation, linear, as they follow on each other in a Sequential."""
    for chain in model.modules():
        if isinstance(chain, nn.Sequential):
            into: nn.Linear | None = None
            activation: nn.Module | None = None
            for part in chain:
                if isinstance(part, nn.Linear):
                    if into is not None and activation is not None:
                        yield into, activation, part
                    into, activation = part, None
                elif isinstance(part, _ACTIVATIONS):
                    activation = part
                elif not isinstance(part, nn.LayerNorm | nn.Dropout):
                    into = activation = None
