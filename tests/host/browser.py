"""A real Chromium on the host's own page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--no-sandbox",  # the only pages are the host's own
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
READY = "window.app?.vueAppReady && app.isGraphReady && app.extensionManager?.spinner === false"
PATIENCE = 120_000  # milliseconds; on a busy machine the page takes long to load


def find_browser() -> str | None:
    """Its path: CHROMIUM_PATH, or the first that is installed."""
    return os.environ.get("CHROMIUM_PATH") or next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def opened(path: str, address: str, width: int = 1500, height: int = 1000) -> Iterator[Page]:
    """The host's page, ready to be used; `page.faults` collects what scripts threw."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(PATIENCE)
            page.faults = []
            page.on("pageerror", lambda error: page.faults.append(str(error)))
            page.goto(f"http://{address}/", wait_until="domcontentloaded")
            ready(page)
            yield page
        finally:
            browser.close()


def ready(page: Page) -> None:
    page.wait_for_function(READY)
    page.wait_for_timeout(1000)


def reload(page: Page) -> None:
    """As a user does, after the page has had the time to save what it shows."""
    page.wait_for_timeout(1500)
    page.reload(wait_until="domcontentloaded")
    ready(page)
