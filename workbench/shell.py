"""The shell: a module as a function of its tensors, evaluated beside the user's model and never through it."""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
# A module's registries of parameters, buffers and hooks have no public names.

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from workbench.kernels import Handler, Rules
from workbench.twin import is_torchs, twin, unwrap

_top_hooks: Callable[[bool], Any] = getattr(torch._C, "_autograd")._top_saved_tensors_default_hooks  # noqa: B009
Norm = Literal["eval", "batch", "recompute"]
Tensors = Mapping[str, Tensor]
SAMPLE = 16
"""Entries of a tensor that are looked at to notice writes that autograd's version counter misses."""


class Shell:
    """A twin of the user's module with its own flags, hooks and lock; the tensors stay the user's.

    ``run(function, tensors)`` calls ``function(module)`` with the named tensors in place of the module's own.
    It is a fixed, differentiable function of them: dropout is off, random numbers and attributes are the same
    at every call, buffers are passed as clones, attention is explicit, autocast and inference mode are off. One
    thread at a time.

    Where ``dtype`` or ``device`` differ from the model's, floating-point tensors are converted copies, made
    anew when the user's change; else they share storage and version with the user's.
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
        self.instead: Mapping[Any, Handler] = {}
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
        self._slots = tuple(_slots(self.module, {**self.parameters, **self.buffers}))
        self.remember()
        self._copies: tuple[Any, dict[str, Tensor]] = (None, {})

    def remember(self) -> None:
        """From now on each call puts attributes and flags back as they are now."""
        self._state = [(m.__dict__, dict(m.__dict__)) for m in self.module.modules()]

    def snapshot(self, tensors: Tensors | None = None) -> Shell:
        """A shell over clones of the tensors as they are now (or as given), which nobody else can change."""
        self._check_names(tensors or {})
        made = Shell.__new__(Shell)
        made.norm, made.seed, made.dtype, made.device = self.norm, self.seed, None, None
        made.lock, made.seen, made.hooked = threading.RLock(), set(self.seen), self.hooked
        made.instead = {}
        now = {name: tensor.detach().clone() for name, tensor in {**self.tensors(deep=True), **(tensors or {})}.items()}
        for name, p in self.parameters.items():  # which weights are frozen remains known
            now[name].requires_grad_(p.requires_grad)
        with self.lock, torch.no_grad(), torch.inference_mode(False):
            own = {id(t): now[name] for name, t in (*self.parameters.items(), *self.buffers.items())}
            made._adopt(twin(self.module, lambda t: own[id(t)] if id(t) in own else t.detach().clone()))
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("lock", "instead", "_slots", "_state", "norms")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock, self.instead = threading.RLock(), {}
        self._adopt(self.module)

    def convert(self, tensor: Tensor) -> Tensor:
        """A tensor in the shell's precision and place (integers keep their type), detached; itself where it fits."""
        wanted = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
        if not tensor.is_inference() and tensor.dtype == wanted and self.device in (None, tensor.device):
            return tensor.detach()
        with torch.no_grad(), torch.inference_mode(False):
            return tensor.detach().to(self.device or tensor.device, wanted, copy=tensor.is_inference())

    @property
    def copies(self) -> bool:
        """Whether tensors have to be converted, so that they are copies and not the user's storage."""
        return self.dtype is not None or self.device is not None

    def tensors(self, deep: bool = False) -> dict[str, Tensor]:
        """Every parameter and buffer now, detached; ``deep`` looks for unannounced writes before reusing copies."""
        originals = {**self.parameters, **self.buffers}
        if not self.copies:
            return {name: self.convert(t) for name, t in originals.items()}
        with self.lock:
            version = self.version() if deep or self._copies[0] is None else (*_places(originals), self._copies[0][-1])
            if version != self._copies[0]:
                self._copies = version, {name: self.convert(t) for name, t in originals.items()}
            return dict(self._copies[1])

    def version(self) -> tuple[Any, ...]:
        """Changes when any weight or buffer is written.

        Autograd's counter misses writes through ``.data``, fused optimizers and BatchNorm's running statistics
        (torch 2.13), so up to :data:`SAMPLE` entries of each tensor are compared as well. Cost: about 5 µs a
        tensor.
        """
        originals = {**self.parameters, **self.buffers}
        return (*_places(originals), _sample(tuple(originals.values())))

    def run(
        self,
        function: Callable[[nn.Module], Any],
        tensors: Tensors | None = None,
        buffers: Tensors | None = None,
        recompute: Tensors | None = None,
    ) -> Any:
        """``function(module)`` with ``tensors`` (and ``buffers``) in place of the module's own; see the class.

        ``recompute`` names running statistics that this call updates in place. Cost beside the function's own:
        50 to 100 µs.

        Raises:
            KeyError: a name that is neither a parameter nor a buffer.
        """
        asked = {**(buffers or {}), **(tensors or {}), **(recompute or {})}
        given = self._own(asked)
        for name in self.buffers:
            if name not in asked:
                given[name] = given[name].clone()
        given |= asked
        if len(given) != len(self.parameters) + len(self.buffers):
            self._check_names(given)
        rules = Rules(self.seed, self.instead)
        # an objective may differentiate inside, which a caller's no_grad would forbid; without leaves it costs nothing
        grad = torch.is_grad_enabled() or not any(t.requires_grad for t in given.values())
        with self.lock, _clean(next(iter(given.values())).device), torch.set_grad_enabled(grad), rules:
            try:
                for m in self.norms if recompute else ():
                    m.training, m.momentum = True, None
                for place, key, name in self._slots:
                    place[key] = given[name]
                return function(self.module)
            finally:
                self.seen |= rules.seen
                self._restore()

    def _own(self, asked: Tensors) -> dict[str, Tensor]:
        """The module's own tensors, at least those that nothing is ``asked`` in place of: converting costs time."""
        if self.copies:
            return self.tensors()
        return {name: self.convert(t) for name, t in {**self.parameters, **self.buffers}.items() if name not in asked}

    def _check_names(self, tensors: Tensors) -> None:
        strange = next((n for n in tensors if n not in self.parameters and n not in self.buffers), None)
        if strange is not None:
            raise KeyError(f"the model has no parameter or buffer called {strange!r}.")

    def _restore(self) -> None:
        """Put attributes, flags and tensors back: nothing is remembered, so the next call is the same function."""
        for attributes, before in self._state:
            attributes.clear()
            attributes.update(before)
        originals = {**self.parameters, **self.buffers}
        for place, key, name in self._slots:
            place[key] = originals[name]

    @contextmanager
    def handling(self, instead: Mapping[Any, Handler]) -> Generator[None]:
        """Other handlers for some torch functions while this lasts, before the rules; other threads wait."""
        with self.lock:
            before, self.instead = self.instead, instead
            try:
                yield
            finally:
                self.instead = before

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)`` under the same rules, for what comes after the module: losses."""
        rules = Rules(self.seed, self.instead)
        with _clean(self.device or next(iter(self.parameters.values())).device), rules:
            found = function(*args)
        self.seen |= rules.seen
        return found

    def notes(self, micro: int) -> tuple[str, ...]:
        """What a reading should say about how the module was evaluated; ``micro`` is the batch for batch statistics."""
        policy = {
            "eval": "BatchNorm uses its running statistics",
            "batch": f"BatchNorm uses the statistics of micro-batches of {micro} examples",
            "recompute": f"BatchNorm's statistics are estimated anew at each point, over micro-batches of {micro}",
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


def _slots(module: nn.Module, names: Tensors) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Every place that holds a registered tensor, with the tensor's name: a tied tensor has several places."""
    known = {id(tensor): name for name, tensor in names.items()}
    for m in module.modules():
        for place in (m._parameters, m._buffers):
            yield from ((place, key, known[id(t)]) for key, t in place.items() if t is not None)


@contextmanager
def _clean(device: torch.device) -> Generator[None]:
    """No autocast, no inference mode, and no recomputing checkpoints, which would recompute at other weights."""
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
    "the model's forward uses saved-tensor hooks (torch.utils.checkpoint?), which would recompute it later at "
    "other weights; "
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
    kinds: dict[torch.dtype, list[Tensor]] = {}
    with torch.no_grad(), torch.inference_mode(False):
        for t in tensors:
            n = t.numel()
            flat = t if t.is_contiguous() else t.reshape(-1)
            count = min(n, SAMPLE)
            picked = flat.as_strided((count,), (n // SAMPLE or 1,), flat.storage_offset())
            kinds.setdefault(t.dtype, []).append(picked)
        return b"".join(torch.cat(ps).view(torch.uint8).cpu().numpy().tobytes() for ps in kinds.values())


def _user_hooks(module: nn.Module) -> int:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values(), *module._backward_hooks.values())
    return sum(not is_torchs(h) for h in hooks)
