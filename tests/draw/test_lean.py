"""The figure widget comes without the validator that Plotly's own renderers bring, and these still work."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
import workbench.draw.shared
assert "jsonschema" not in sys.modules, "the heavy import is back"
import plotly.graph_objects as go, plotly.io as pio
pio.renderers.default = "plotly_mimetype"
go.Figure().show()
assert "jsonschema" in sys.modules
"""


def test_the_heavy_import_waits_until_plotly_itself_needs_it() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "application/vnd.plotly.v1+json" in done.stdout
