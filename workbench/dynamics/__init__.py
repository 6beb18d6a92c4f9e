"""Probes along a path: what happens while a network learns."""

from workbench.resolve import folder

__getattr__, __dir__ = folder("workbench.dynamics")
