"""One browser and one JupyterLab for all browser tests of a worker."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from browser.lab import FLAGS, PATIENCE, Lab, chromium


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a browser only when asked to; a missing one fails."""
    for item in items:
        if os.environ.get("WORKBENCH_NO_BROWSER") == "1" and item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.skip(reason="WORKBENCH_NO_BROWSER=1: asked to go without a browser"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's Chromium, headless."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A fresh page of a fresh profile."""
    context = browser.new_context(viewport={"width": 1400, "height": 1250}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    yield page
    context.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A running JupyterLab."""
    server = Lab(tmp_path_factory.mktemp("lab"))
    yield server
    server.stop()
