"""A headless Chromium for the tests of the report page; without one, they are skipped and say why.

Debian: `apt-get install chromium`; any: put a Chromium or Chrome on the path. `pip install playwright` drives it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """One browser for all tests of a file; the event loop that drives it must be gone before other tests run."""
    path = next((found for name in CHROMIUMS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no Chromium on the path ({', '.join(CHROMIUMS)}): apt-get install chromium")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS, headless=True)
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page that was opened, and what it said and asked for."""

    page: Any
    path: Path
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def quiet(self) -> None:
        """Nothing on the console, no request but that for the file itself."""
        assert self.errors == []
        assert {address.split("#")[0] for address in self.requests} == {self.path.as_uri()}


@pytest.fixture
def visit(chromium: Any) -> Iterator[Any]:
    """Opens a file in a fresh window: `visit(path, state="q=entropy", dark=True, size=(1440, 900))`."""
    contexts = []

    def opened(path: Path, state: str = "", *, dark: bool = False, size: tuple[int, int] = (1440, 900)) -> Visit:
        context = chromium.new_context(
            viewport={"width": size[0], "height": size[1]},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce",
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        found = Visit(page, path)
        page.on("console", lambda message: found.errors.append(message.text))
        page.on("pageerror", lambda error: found.errors.append(str(error)))
        page.on("request", lambda request: found.requests.append(request.url))
        page.goto(path.as_uri() + (f"#{state}" if state else ""))
        for part, container in (("inspector", "#inspect"), ("curves", "#charts")):
            if page.locator(container).count():
                page.wait_for_selector(f"html[data-{part}=ready]", state="attached")
        return found

    yield opened
    for context in contexts:
        context.close()
