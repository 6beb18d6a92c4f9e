"""Deep linear nets of several pathways side by side, and gates that close one of them for a while."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from workbench.zoo.interventions import Intervention


class Pathways(nn.Module):
    """f(x) = Σ_p g_p W_p,D ... W_p,1 x with gates g_p that are 0 or 1, kept as the buffer ``gates`` (paths,).

    A closed pathway adds nothing to the outputs and gets gradients that are exactly 0, so that plain gradient descent
    leaves it alone; momentum or decay would not.
    """

    gates: Tensor

    def __init__(self, paths: Sequence[nn.Sequential]) -> None:
        super().__init__()
        self.paths = nn.ModuleList(paths)
        self.register_buffer("gates", torch.ones(len(paths)))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (n, out) of inputs (n, ...), which are flattened."""
        rows = x.flatten(1)
        return torch.stack([gate * path(rows) for gate, path in zip(self.gates, self.paths, strict=True)]).sum(0)

    @torch.no_grad()
    def maps(self) -> Tensor:
        """W_p,D ... W_p,1 of each pathway, whatever its gate: (paths, out, in)."""
        return torch.stack([_product(path) for path in self.paths])


def pathways(widths: Sequence[int] = (16, 16, 16), paths: int = 2, scale: float = 0.3, seed: int = 0) -> Pathways:
    """Pathways of ``len(widths) - 1`` linear layers, each layer orthogonal times scale^(1/layers); float32.

    Where sizes only grow or only shrink, all singular values of each pathway's map are ``scale``; else some are less.

    Args:
        widths: input size, sizes between, output size; at least two numbers.
        paths: how many pathways, each with weights of its own.
        scale: singular values of each pathway's map.
        seed: of the initial weights.

    Raises:
        ValueError: fewer than two sizes or one path, a size below 1, or a scale that is not above 0.
    """
    if len(widths) < 2 or any(w < 1 for w in widths) or paths < 1:
        raise ValueError(
            f"pathways needs two sizes and one path at least, all >= 1; got {list(widths)} and paths={paths}."
        )
    if not scale > 0:
        raise ValueError(f"pathways(scale=...) is the size of initial singular values, above 0; got {scale!r}.")
    generator, depth = torch.Generator().manual_seed(seed), len(widths) - 1
    made: list[nn.Sequential] = []
    for _ in range(paths):
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, (ins, outs) in enumerate(itertools.pairwise(widths), 1):
            linear = nn.utils.skip_init(nn.Linear, ins, outs, bias=False)
            for weight in linear.parameters():
                nn.init.orthogonal_(weight, scale ** (1 / depth), generator=generator)
            layers[f"linear{number}"] = linear
        made.append(nn.Sequential(layers))
    return Pathways(made)


def mapping(values: Sequence[float] = (4.0, 10 / 3, 8 / 3, 2.0), size: int = 16, seed: int = 0) -> Tensor:
    """A random matrix (size, size), float64, of the singular values given and 0 for the rest.

    Raises:
        ValueError: more values than the size.
    """
    if len(values) > size:
        raise ValueError(f"a matrix of size {size} has {size} singular values at most; got {len(values)}.")
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0] for _ in range(2)
    )
    return left[:, : len(values)] * torch.tensor(list(values), dtype=torch.float64) @ right[:, : len(values)].T


def examples_of(target: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs (in, in) and outputs (in, out) of a linear map, for which "half_mse" is ½ ‖M - target‖_F² exactly.

    So that learning rate times steps is the time of the flow M' = -∂/∂θ ½ ‖M - target‖².
    """
    ins = target.shape[1]
    return ins**0.5 * torch.eye(ins, dtype=target.dtype), ins**0.5 * target.T


@torch.no_grad()
def align(net: Pathways, target: Tensor, strengths: Sequence[float]) -> None:
    """Set each pathway's map to ``strength`` times each singular mode of the target, all its layers in balance.

    Every layer gets the singular values strength^(1/depth), its right singular vectors the left ones of the layer
    before. Under gradient flow on :func:`examples_of` the modes then stay apart, and of each, with target value s,
    K_p' = depth · K_p^(2 - 2/depth) · (s - Σ_open K).

    Raises:
        ValueError: not one strength >= 0 for each pathway, or layers narrower than the target's rank.
    """
    if len(strengths) != len(net.paths) or min(strengths) < 0:
        raise ValueError(f"align needs a strength >= 0 for each of {len(net.paths)} pathways; got {list(strengths)}.")
    left, values, right = torch.linalg.svd(target.double(), full_matrices=False)
    rank = int((values > 1e-12 * values[0]).sum())
    for path, strength in zip(net.paths, strengths, strict=True):
        weights = list(path.parameters())
        narrow = min(min(w.shape) for w in weights)
        if narrow < rank:
            raise ValueError(f"a layer of width {narrow} cannot carry the {rank} modes of the target.")
        ends = [right[:rank].T, *(torch.eye(len(w), rank, dtype=torch.float64) for w in weights[:-1]), left[:, :rank]]
        for weight, (before, after) in zip(weights, itertools.pairwise(ends), strict=True):
            weight.copy_(strength ** (1 / len(weights)) * after @ before.T)


class Gate(Intervention):
    """Closes one pathway after ``onset`` steps and opens it again after ``removal``: a deficit of a training.

    ``closed`` says whether the step to come is taken under the deficit; record it of each step as the scalar
    ``deficit``, which CriticalPeriods reads.

    Args:
        net: its gate, or that of each net of a stack, is set at once, and after each step.
        path: number of the pathway.
        onset: steps before it closes.
        removal: steps before it opens again; not above ``onset``: it never closes.
    """

    def __init__(self, net: Pathways | PathwayStack, path: int = 1, onset: int = 0, removal: int = 200) -> None:
        self._net, self._path, self._window, self._count = net, path, (onset, removal), 0
        self._set()

    @property
    def closed(self) -> bool:
        """Whether the pathway is closed for the next step."""
        onset, removal = self._window
        return onset <= self._count < removal

    def after_step(self) -> None:
        """One step nearer to opening or closing."""
        self._count += 1
        self._set()

    def _set(self) -> None:
        self._net.gates[self._path] = float(not self.closed)


def _product(path: nn.Module) -> Tensor:
    first, *rest = (w.detach() for w in path.parameters())
    for weight in rest:
        first = weight @ first
    return first


class PathwayStack:
    """Copies of Pathways of one shape that learn one map side by side, by plain gradient descent on ½ ‖M - target‖_F².

    That is "half_mse" on :func:`examples_of` the target, without the examples. Every net takes the steps that it would
    take alone, to rounding; all have the same ``gates`` (paths,), so that one :class:`Gate` closes a pathway of each.

    Args:
        nets: at least one, of equal shapes, with ungated pathways; they stay as they are.
        target: the map (out, in), brought to the weights' type.
        rate: learning rate.
    """

    def __init__(self, nets: Sequence[Pathways], target: Tensor, rate: float) -> None:
        held = [list(net.parameters()) for net in nets]
        self.names = [name for name, _ in nets[0].named_parameters()]
        self.paths, self.rate = len(nets[0].paths), rate
        self.gates = torch.ones(self.paths)
        rows = [torch.stack([one[k].detach() for one in held]) for k in range(len(self.names))]
        depth = len(rows) // self.paths
        # One tensor a layer, (nets, paths, out, in): a step is one chain of products for all nets and pathways.
        self._layers = [torch.stack(rows[k::depth], 1).requires_grad_() for k in range(depth)]
        self._target = target.to(rows[0])

    @torch.enable_grad()
    def descend(self) -> Tensor:
        """Take one step; returns the loss of each net before it, (nets,)."""
        losses = self._losses()
        slopes = torch.autograd.grad(losses.sum(), self._layers)
        with torch.no_grad():
            for weight, slope in zip(self._layers, slopes, strict=True):
                weight.sub_(slope, alpha=self.rate)
        return losses.detach()

    @torch.no_grad()
    def losses(self) -> Tensor:
        """½ ‖M - target‖_F² of each net, (nets,)."""
        return self._losses()

    def _losses(self) -> Tensor:
        product, *rest = self._layers
        for weight in rest:
            product = weight @ product
        whole = (self.gates.to(product)[:, None, None] * product).sum(1)
        return (whole - self._target).square().sum((1, 2)) / 2

    def weights(self) -> list[dict[str, Tensor]]:
        """A copy of each net's weights as they are now, by their names in Pathways."""
        rows = [t for path in range(self.paths) for t in (layer.detach()[:, path].clone() for layer in self._layers)]
        return [dict(zip(self.names, one, strict=True)) for one in zip(*rows, strict=True)]
