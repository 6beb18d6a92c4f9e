"""Papers as probes of a training recipe, each with a verdict."""

from workbench.resolve import folder

__getattr__, __dir__ = folder("workbench.experiments")
