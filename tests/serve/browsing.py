"""A browser that opens the chat page, and how a test finds its way about it."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, Playwright, expect

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def executable(playwright: Playwright) -> str:
    own = playwright.chromium.executable_path
    found = own if Path(own).exists() else next(filter(None, map(shutil.which, BROWSERS)), None)
    # A browser is no package of Python's, so no extra can bring one.
    return found or pytest.skip("there is no Chromium: `playwright install chromium` brings one")


@contextlib.contextmanager
def opened(browser: Browser, address: str, faults: list[str]) -> Iterator[Page]:
    def note(kind: str, text: str) -> None:
        # An answer of 429, or none, is an error to Chromium; the page tells it, as tests see.
        if kind in ("error", "warning") and not text.startswith("Failed to load resource"):
            faults.append(text)

    def check(url: str) -> None:
        if not url.startswith((address, "data:")):
            faults.append(f"a request to {url}")

    with browser.new_context() as context:
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", lambda message: note(message.type, message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: check(request.url))
        page.goto(address)
        yield page


def ask(page: Page, question: str) -> None:
    page.get_by_label("Message").fill(question)
    page.get_by_label("Message").press("Enter")


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def questions(page: Page) -> Locator:
    return page.locator("article.user p")


def answers(page: Page) -> Locator:
    return page.locator("article.assistant p")


def is_done(page: Page) -> None:
    """Waits until no answer is coming."""
    expect(button(page, "Send")).to_be_visible()


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}
