"""A headless Chromium that Playwright drives, and the built documentation, served on loopback to it."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parents[2]
SITE = ROOT / "site"
PACKAGES = ROOT / ".venv.browser"  # see install.sh
CHROMIUM_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


def why_not() -> str | None:
    """Why there can be no browser here, None where there is one."""
    if shutil.which("chromium") is None:
        return "there is no chromium: tests/browser/install.sh installs it"
    if not (PACKAGES / ".ready").exists():
        return "there is no Playwright: tests/browser/install.sh installs it"
    return None


def demand(reason: str | None) -> None:
    """Skips the test where something is missing, but fails where all is installed."""
    if reason:
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


class Visit:
    """A tab, and all that was wrong in it: requests to other hosts, what failed, what the console said."""

    def __init__(self, page, home: str):
        self.page, self.home = page, home
        self.faults: list[str] = []
        page.on("request", lambda request: self._requested(request.url))
        page.on("requestfailed", lambda request: self._failed(request.failure, request.url))
        page.on("response", lambda response: self._answered(response.status, response.url))
        page.on("console", lambda message: self._said(message.type, message.text))
        page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))

    def _requested(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob") and parts.hostname != "127.0.0.1":
            self.faults.append(f"asks another host: {url}")

    def _failed(self, why: str, url: str) -> None:
        if why != "net::ERR_ABORTED":  # by the next page
            self.faults.append(f"{why}: {url}")

    def _answered(self, status: int, url: str) -> None:
        if status >= 400:
            self.faults.append(f"{status}: {url}")

    def _said(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.faults.append(f"console: {text}")

    def open(self, path: str) -> None:
        self.page.goto(self.home + path, wait_until="load")


@pytest.fixture(scope="session")
def home() -> Iterator[str]:
    """The address of the site, with a slash at its end."""
    demand(None if (SITE / ".built").exists() else "the documentation is not built: bash docs/build.sh")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(SITE)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def browser():
    demand(why_not())
    sys.path.append(str(PACKAGES))
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), headless=True, args=CHROMIUM_FLAGS, timeout=120_000
        )
        yield browser
        browser.close()


@pytest.fixture
def open_tab(browser) -> Iterator[Callable[..., Visit]]:
    """`open_tab(home, width, height)` is a tab of an empty profile. All must be well in it until the end."""
    visits = []

    def new(home: str, width: int = 1280, height: int = 900) -> Visit:
        context = browser.new_context(viewport={"width": width, "height": height})
        context.set_default_timeout(30_000)
        visits.append(Visit(context.new_page(), home))
        return visits[-1]

    yield new
    for visit in visits:
        visit.page.context.close()
    assert [fault for visit in visits for fault in visit.faults] == []


@pytest.fixture(params=[(1280, 900), (390, 800)], ids=["desktop", "narrow"])
def visit(browser, home, request) -> Iterator[Visit]:
    """A tab of an empty profile. A test ends with a failure where anything in it was wrong."""
    width, height = request.param
    context = browser.new_context(viewport={"width": width, "height": height})
    context.set_default_timeout(30_000)
    visit = Visit(context.new_page(), home)
    yield visit
    context.close()
    assert not visit.faults
