"""Probes around a point, or between points: the shape of the loss."""

from workbench.resolve import folder

__getattr__, __dir__ = folder("workbench.landscape")
