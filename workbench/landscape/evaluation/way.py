"""One way of evaluating the loss at points of a plane: what is cut up, laid out and computed together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Way:
    """How points are evaluated; all ways give the same numbers to rounding, except ``preview``.

    ``chunk`` examples at once (None: as the subject's plan has it), images and filters with channels last in memory,
    the first layers by their products with both directions (``affine``), ``together`` points at once by
    ``torch.func.vmap``, forward passes in bfloat16 (``preview``), other kernels where nobody differentiates
    (``fast``), and BatchNorm by its running statistics ``folded`` into the layer before it.
    """

    chunk: int | None = None
    channels_last: bool = False
    affine: bool = False
    together: int = 1
    preview: bool = False
    fast: bool = False
    folded: bool = False

    def words(self, planned: int) -> str:
        """The way in words; ``planned`` is the chunk of the subject's plan."""
        parts = [f"{self.chunk or planned} examples at a time"]
        if self.channels_last:
            parts.append("channels last in memory")
        if self.folded:
            parts.append("BatchNorm folded into the layer before it")
        if self.fast:
            parts.append("with kernels that are not differentiated (oneDNN's, fused attention and log softmax)")
        if self.affine:
            parts.append("first layer from its products with both directions")
        if self.together > 1:
            parts.append(f"{self.together} points at once")
        return ", ".join(parts)
