"""Probes at a point: what can be measured at one set of weights."""

from workbench.resolve import folder

__getattr__, __dir__ = folder("workbench.probes")
