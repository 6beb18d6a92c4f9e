"""What an experiment looks at before it has trained anything: nothing, said in the way that probes are driven."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from workbench.plan import available_memory


class Nothing:
    """No model and no data: experiments train their own from their settings and their seed.

    It answers what a job, a store and a reading's provenance ask of anything that is looked at, and never changes.
    """

    kind: ClassVar[str] = "nothing"
    dtype: ClassVar[torch.dtype] = torch.float64
    device: ClassVar[torch.device] = torch.device("cpu")

    def fingerprint(self) -> str:
        """The same for all, so that an experiment's reading is known by its settings and its seed."""
        return "nothing"

    def version(self) -> tuple[Any, ...]:
        """Never changes."""
        return ()

    def describe(self) -> dict[str, Any]:
        """JSON-ready facts."""
        return {"on": "nets trained for it", "model": "trained for it", "device": "cpu"}

    def available_memory(self) -> int:
        """Bytes that are free."""
        return available_memory(self.device)
