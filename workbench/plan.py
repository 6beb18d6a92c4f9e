"""How an evaluation is cut up, and what memory there is for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

PUSHES = ("graph", "forward", "linearised", "compiled")


@dataclass(frozen=True)
class Plan:
    """The order in which sums are taken: equal plans and thread counts give bitwise equal readings on a CPU.

    ``chunk`` examples are evaluated at once (None: the subject chooses), ``retained`` says whether the graph of the
    gradient is kept between products (None: the operator chooses), ``threads`` is PyTorch's thread count as recorded.
    ``push`` is how Gauss-Newton and Fisher products move the outputs along a direction: on a kept "graph", by "forward"
    mode, "linearised" once (pays off after 20 to 400 products), or that "compiled" (10 to 30 s to compile, for runs of
    thousands of products); None: "forward" for nets with convolutions, else "graph".
    """

    chunk: int | None = None
    retained: bool | None = None
    threads: int | None = None
    push: Literal["graph", "forward", "linearised", "compiled"] | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"Plan.chunk must be at least 1 example; got {self.chunk}.")
        if self.push not in (None, *PUSHES):
            raise ValueError(f"Plan.push must be one of {', '.join(PUSHES)} or None; got {self.push!r}.")

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-ready values; ``Plan(**stored)`` is the plan again."""
        return asdict(self)


def fitting(chunk: int, each: float, room: float) -> int:
    """``chunk`` halved until so many examples of ``each`` bytes fit into ``room`` bytes; at least 1."""
    while chunk > 1 and chunk * each > room:
        chunk = -(-chunk // 2)
    return chunk


def available_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device; on a CPU the smaller of the machine's and the container's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + kept)
    import psutil

    return int(min(psutil.virtual_memory().available, _container_room()))


def smaller(subject: Any, problem: BaseException) -> Any:
    """The subject with half the chunk after an out-of-memory error; None when that was not the problem or no help."""
    out = isinstance(problem, torch.OutOfMemoryError) or "can't allocate memory" in str(problem)
    chunk = getattr(getattr(subject, "plan", None), "chunk", None)
    if not out or not chunk or chunk <= 1:
        return None
    return subject.with_plan(replace(subject.plan, chunk=chunk // 2))


def _container_room() -> float:
    """What the control group still grants (version 2, else 1); infinite outside a container."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            return max(0.0, float(Path(limit).read_text()) - float(Path(used).read_text()))
        except (OSError, ValueError):  # absent, or the word "max"
            continue
    return float("inf")
