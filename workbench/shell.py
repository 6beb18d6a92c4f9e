"""The shell: a module as a function of its tensors, evaluated beside the user's model and never through it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]

from workbench.kernels import Rules
from workbench.twin import twin, unwrap

_top_hooks: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks  # pyright: ignore
Norm = Literal["eval", "batch", "recompute"]
Tensors = Mapping[str, Tensor]
SAMPLE = 16
"""Entries of a tensor that are looked at to notice writes that autograd's version counter misses."""


class Shell:
    """A twin of the user's module with its own flags, hooks and lock; the tensors stay the user's.

    ``run(function, tensors)`` calls ``function(module)`` with the named tensors in place of the module's own. It is a fixed,
    differentiable function of them: dropout is off, random numbers and attributes are the same at every call, buffers are
    passed as clones, attention is explicit, autocast and inference mode are off. One thread at a time.

    Where ``dtype`` or ``device`` differ from the model's, floating-point tensors are converted copies, made anew when the
    user's change; else they share storage and version with the user's.
    """

    def __init__(
        self,
        module: nn.Module,
        norm: Norm = "eval",
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        seed: int = 0,
    ) -> None:
        self.norm: Norm = norm
        self.seed = seed
        self.dtype, self.device = dtype, device
        self.lock = threading.RLock()
        self.seen: set[str] = set()
        inner = unwrap(module)
        self.hooked = sum(_user_hooks(m) for m in inner.modules())
        self._adopt(inner)

    def _adopt(self, module: nn.Module) -> None:
        registered = {id(t) for m in module.modules() for t in (*m._parameters.values(), *m._buffers.values())}
        self.module = twin(module, lambda t: t if id(t) in registered else self.convert(t))
        self.parameters: dict[str, Tensor] = dict(self.module.named_parameters())
        self.buffers: dict[str, Tensor] = dict(self.module.named_buffers())
        self.norms = tuple(m for m in self.module.modules() if isinstance(m, _NormBase) and m.running_mean is not None)
        if self.norm == "batch":
            for m in self.norms:
                m.training = True
        self._call = _Call(self.module)
        self._state = [(m, dict(m.__dict__)) for m in self.module.modules()]
        self._copies: tuple[Any, dict[str, Tensor]] = (None, {})

    def snapshot(self) -> Shell:
        """A shell over clones of the tensors as they are now, which nobody else can change."""
        made = Shell.__new__(Shell)
        made.norm, made.seed, made.dtype, made.device = self.norm, self.seed, None, None
        made.lock, made.seen, made.hooked = threading.RLock(), set(self.seen), self.hooked
        now = {name: tensor.clone() for name, tensor in self.tensors(deep=True).items()}
        with self.lock, torch.inference_mode(False):
            own = {id(t): now[name] for name, t in (*self.parameters.items(), *self.buffers.items())}
            made._adopt(twin(self.module, lambda t: own[id(t)] if id(t) in own else t.detach().clone()))
        return made

    def convert(self, tensor: Tensor) -> Tensor:
        """A tensor in the shell's precision and place (integers keep their type), detached; itself where it fits."""
        floating = tensor.is_floating_point() and self.dtype is not None
        with torch.no_grad(), torch.inference_mode(False):
            tensor = tensor.detach().to(self.device or tensor.device, self.dtype if floating else tensor.dtype)
            return tensor.clone() if tensor.is_inference() else tensor

    @property
    def copies(self) -> bool:
        """Whether the tensors had to be converted, so that they are copies and not the user's storage."""
        return any(
            (self.device is not None and t.device != self.device)
            or (self.dtype is not None and t.is_floating_point() and t.dtype != self.dtype)
            for t in (*self.parameters.values(), *self.buffers.values())
        )

    def tensors(self, deep: bool = False) -> dict[str, Tensor]:
        """Every parameter and buffer as of now, detached. ``deep`` looks for unannounced writes too before reusing copies."""
        originals = {**self.parameters, **self.buffers}
        if not self.copies:
            return {name: self.convert(t) for name, t in originals.items()}
        with self.lock:
            version = self.version() if deep or not self._copies[1] else (*_places(originals), self._copies[0][-1])
            if version != self._copies[0]:
                self._copies = version, {name: self.convert(t) for name, t in originals.items()}
            return dict(self._copies[1])

    def version(self) -> tuple[Any, ...]:
        """Changes when any weight or buffer is written.

        Autograd's counter misses writes through ``.data``, fused optimizers and BatchNorm's running statistics (torch 2.13),
        so up to :data:`SAMPLE` entries of each tensor are compared as well. Cost: about 5 µs a tensor.
        """
        originals = {**self.parameters, **self.buffers}
        return (*_places(originals), _sample(tuple(originals.values())))

    def run(
        self,
        function: Callable[[nn.Module], Any],
        tensors: Tensors | None = None,
        buffers: Tensors | None = None,
        recompute: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """``function(module)`` with ``tensors`` (and ``buffers``) in place of the module's own; see the class.

        ``recompute`` names running statistics that this call updates in place.
        """
        given = self.tensors()
        fresh = {name: given[name].clone() for name in self.buffers}
        given |= fresh | dict(buffers or {}) | dict(tensors or {}) | dict(recompute or {})
        rules = Rules(self.seed)
        with self.lock, _clean(next(iter(given.values())).device), rules:
            try:
                for m in self.norms if recompute else ():
                    m.training, m.momentum = True, None
                prefixed = {f"module.{name}": tensor for name, tensor in given.items()}
                return torch.func.functional_call(self._call, prefixed, (function,))
            finally:
                self.seen |= rules.seen
                for m, attributes in self._state:
                    m.__dict__.clear()
                    m.__dict__.update(attributes)

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)`` under the same rules, for what comes after the module: losses."""
        rules = Rules(self.seed)
        with _clean(self.device or next(iter(self.parameters.values())).device), rules:
            found = function(*args)
        self.seen |= rules.seen
        return found

    def notes(self, micro: int) -> tuple[str, ...]:
        """What a reading should say about how the module was evaluated; ``micro`` is the batch for batch statistics."""
        policy = {
            "eval": "BatchNorm uses its running statistics",
            "batch": f"BatchNorm uses the statistics of micro-batches of {micro} examples; running statistics are left alone",
            "recompute": f"BatchNorm's running statistics are estimated anew at each point, over micro-batches of {micro}",
        }
        said = [policy[self.norm]] if self.norms else []
        if self.hooked:
            said.append(f"{self.hooked} hooks on the model are not run")
        return (*said, *(words for key, words in _SEEN.items() if key in self.seen))

    def running_statistics(self) -> dict[str, Tensor]:
        """New, empty running statistics of every normalisation layer, by buffer name: mean 0, variance 1, count 0."""
        made: dict[str, Tensor] = {}
        current = self.tensors()
        for name, m in self.module.named_modules():
            if m in self.norms:
                for key in ("running_mean", "running_var", "num_batches_tracked"):
                    full = f"{name}.{key}" if name else key
                    if full in current:
                        made[full] = torch.full_like(current[full], float(key == "running_var"))
        return made


class _Call(nn.Module):
    """Gives ``functional_call`` a forward that may do anything with the module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[nn.Module], Any]) -> Any:
        """``function(module)``."""
        return function(self.module)


@contextmanager
def _clean(device: torch.device) -> Iterator[None]:
    """No autocast, no inference mode; recomputing checkpoints are refused, since they would recompute at other weights."""
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if _top_hooks(True) is None:  # hooks around the call are the caller's own, and refuse to be switched off
            stack.enter_context(torch.autograd.graph.disable_saved_tensors_hooks(_NO_CHECKPOINTS))
        yield


_SEEN = {
    "attention": "attention is computed by explicit products, since fused kernels have no second derivative",
    "random": "the forward pass draws random numbers; they are held fixed",
    "recurrent": "cuDNN is off for recurrent layers while they run, since its kernels have no second derivative",
}
_NO_CHECKPOINTS = (
    "the model's forward uses saved-tensor hooks (torch.utils.checkpoint?), which would recompute it later at other weights; "
    "switch gradient checkpointing off for the probe, for example model.gradient_checkpointing_disable()."
)


def precise(device: torch.device) -> AbstractContextManager[None]:
    """Context for backward passes too: full float32 convolutions on a GPU; nothing on other devices.

    cuDNN's TF32 switch is the process's; on a GPU it is off as long as the context lasts.
    """
    return torch.backends.cudnn.flags(allow_tf32=False) if device.type == "cuda" else ExitStack()  # type: ignore[return-value]


def _places(tensors: Tensors) -> tuple[Any, ...]:
    return tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors.values())


def _sample(tensors: tuple[Tensor, ...]) -> bytes:
    """Up to SAMPLE entries of each tensor, bit for bit."""
    with torch.no_grad(), torch.inference_mode(False):
        picked = [t.detach().reshape(-1)[:: max(1, t.numel() // SAMPLE)][:SAMPLE] for t in tensors if t.numel()]
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for p in picked:
            kinds.setdefault(p.dtype, []).append(p)
        return b"".join(torch.cat(ps).contiguous().view(torch.uint8).cpu().numpy().tobytes() for ps in kinds.values())


def _user_hooks(module: nn.Module) -> int:
    from workbench.twin import _is_torchs  # pyright: ignore[reportPrivateUsage]

    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values(), *module._backward_hooks.values())
    return sum(not _is_torchs(h, None) for h in hooks)
