"""A JupyterLab server and pages in it, for tests: on loopback, in a home of its own, by the same few waits."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHOTS = ROOT / "screenshots"
CHROMIUM = ("chromium", "google-chrome", "chromium-browser")
# Milliseconds after which a page is taken to hang: many times what a loaded machine needs.
PATIENCE = 150_000
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run"),
)
# Opening a notebook and clicking too early asks for a kernel and then nothing ever runs: wait for the kernel itself.
READY = """() => { const w = window.jupyterapp?.shell.currentWidget, s = w?.sessionContext, k = s?.session?.kernel;
  return !!(s && s.isReady && k && k.connectionStatus === 'connected' && k.status === 'idle'); }"""
WITHOUT_KERNEL = (
    "() => !!window.jupyterapp?.shell.currentWidget?.content?.model && !!document.querySelector('.jp-Cell')"
)


def chromium() -> str:
    """The browser that Debian installed; on Ubuntu, whose package needs snap, the one that Playwright installed."""
    cache = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or Path.home() / ".cache" / "ms-playwright")
    installed = [shutil.which(name) for name in CHROMIUM]
    own = [str(path) for path in sorted(cache.glob("chromium-*/chrome-linux*/chrome"))]
    for path in (*installed[:2], *own, *installed[2:]):
        if path is not None:
            return path
    raise FileNotFoundError(
        "the browser tests need Chromium: apt-get install chromium, or playwright install chromium; "
        "or set WORKBENCH_NO_BROWSER=1 to go without them, knowingly."
    )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(home: Path) -> dict[str, str]:
    """This environment with a home, a store and Jupyter folders of its own."""
    home.mkdir(parents=True, exist_ok=True)
    own = {
        "HOME": home,
        "XDG_CACHE_HOME": home / "cache",
        "JUPYTER_CONFIG_DIR": home / "config",
        "JUPYTER_DATA_DIR": home / "data",
        "JUPYTER_RUNTIME_DIR": home / "runtime",
        "JUPYTERLAB_SETTINGS_DIR": home / "settings",
        "IPYTHONDIR": home / "ipython",
        "WORKBENCH_STORE": home / "store",
    }
    return dict(os.environ) | {k: str(v) for k, v in own.items()} | {"OMP_NUM_THREADS": "1"}


def wait_for_http(url: str, process: subprocess.Popen[Any], log: Path, seconds: float = PATIENCE / 1000) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}:\n{log.read_text()[-4000:]}")
        try:
            urllib.request.urlopen(url, timeout=2).read()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"no answer from {url} within {seconds} s:\n{log.read_text()[-4000:]}")


class Lab:
    """One JupyterLab on a folder of its own."""

    def __init__(self, home: Path) -> None:
        self.home, self.root = home, home / "notebooks"
        self.root.mkdir(parents=True)
        self.token, self.port = secrets.token_hex(16), free_port()
        settings = home / "settings" / "@jupyterlab" / "apputils-extension"
        settings.mkdir(parents=True)
        news = {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}
        (settings / "notification.jupyterlab-settings").write_text(json.dumps(news))
        options = {
            "ServerApp.root_dir": self.root,
            "ServerApp.port": self.port,
            "ServerApp.port_retries": 0,
            "ServerApp.ip": "127.0.0.1",
            "ServerApp.allow_root": True,
            "ServerApp.open_browser": False,
            "IdentityProvider.token": self.token,
            "LabApp.expose_app_in_browser": True,
        }
        command = [sys.executable, "-m", "jupyterlab", *(f"--{k}={v}" for k, v in options.items())]
        self.log = home / "lab.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=self.root, env=environment(home), stdout=log, stderr=log)
        wait_for_http(f"http://127.0.0.1:{self.port}/api", self.process, self.log)

    def adopt(self, notebook: Path) -> str:
        """Copy a notebook into the server's folder."""
        shutil.copy(notebook, self.root / notebook.name)
        return notebook.name

    def write(self, name: str, *cells: str) -> str:
        """Make a notebook of code cells."""
        made = [
            {"cell_type": "code", "id": f"c{i}", "metadata": {}, "execution_count": None, "outputs": [], "source": text}
            for i, text in enumerate(cells)
        ]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        (self.root / name).write_text(
            json.dumps({"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5})
        )
        return name

    def url(self, notebook: str) -> str:
        return f"http://127.0.0.1:{self.port}/lab/tree/{notebook}?token={self.token}&reset"

    def read(self, notebook: str) -> dict[str, Any]:
        return json.loads((self.root / notebook).read_text())

    def shut_kernels(self) -> None:
        """End every kernel of this server."""
        for kernel in self._api("GET", "kernels"):
            self._api("DELETE", f"kernels/{kernel['id']}")
        for session in self._api("GET", "sessions"):
            self._api("DELETE", f"sessions/{session['id']}")

    def _api(self, method: str, path: str) -> Any:
        head = {"Authorization": f"token {self.token}"}
        asked = urllib.request.Request(f"http://127.0.0.1:{self.port}/api/{path}", method=method, headers=head)
        found = urllib.request.urlopen(asked, timeout=20).read()
        return json.loads(found) if found else None

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def open_notebook(page: Any, lab: Lab, notebook: str) -> None:
    """Open a notebook and wait until its kernel answers."""
    page.goto(lab.url(notebook))
    page.wait_for_function(READY, timeout=PATIENCE)


def run_all(page: Any) -> None:
    """Run every cell; returns when all are done."""
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")


def save(page: Any) -> None:
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")


def shoot(page: Any, name: str) -> None:
    """Keep a picture of the page for people to look at."""
    SHOTS.mkdir(exist_ok=True)
    page.screenshot(path=str(SHOTS / f"{name}.png"))


def ask_kernel(page: Any, code: str) -> str:
    """Run code in the open notebook's kernel, beside its cells, and return what it printed."""
    script = """async (code) => {
      const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
      const future = kernel.requestExecute({ code, store_history: false });
      let said = "";
      future.onIOPub = (m) => {
        if (m.header.msg_type === "stream") said += m.content.text;
        if (m.header.msg_type === "error") said += m.content.ename + ": " + m.content.evalue;
      };
      await future.done;
      return said;
    }"""
    return page.evaluate(script, code)
