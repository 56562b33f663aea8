"""Fixtures that several test files share."""

from __future__ import annotations

import gc
import os
import shutil

import hypothesis
import pytest

from tests.forked import Forks

# The tests' tensors are so small that a second thread costs more than it brings, many times more on a busy machine.
# Before PyTorch is imported; OMP_NUM_THREADS=4 pytest runs them with four, but for the scripts of tests/forked.py.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Inductor compiles few kernels here: processes of its own, which import PyTorch, take longer than they save.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# No test asserts a time: machines are shared.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # the libraries stay: looking through them takes a twentieth of the suite's time


@pytest.fixture(scope="session")
def forks():
    """One process from which other processes are forked: they need not import PyTorch first."""
    with Forks() as forks:
        yield forks


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium from the system's packages; the test is skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright (pip install -e '.[test]')")
    executable = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if executable is None:
        pytest.skip(f"needs a browser from the system's packages: none of {', '.join(BROWSERS)} is on the PATH")
    # Pages may talk to this machine alone, so that a test sees the same with and without a network.
    offline = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE localhost , EXCLUDE 127.0.0.1"
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable,
            args=["--no-sandbox", "--disable-dev-shm-usage", "--no-proxy-server", offline],
            env=environment,
        )
        yield browser
        browser.close()


@pytest.fixture
def browser_page(browser):
    """An empty page of 1400 × 900 px; `page.problems` lists its console errors, exceptions and failed requests."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.problems = problems = []

    def on_console(message) -> None:
        if message.type == "error":
            problems.append(f"console: {message.text}")

    def on_response(response) -> None:
        if response.status >= 400:
            problems.append(f"{response.status}: {response.url}")

    page.on("console", on_console)
    page.on("pageerror", lambda error: problems.append(f"exception: {error}"))
    page.on("requestfailed", lambda request: problems.append(f"failed: {request.url} {request.failure}"))
    page.on("response", on_response)
    yield page
    context.close()
