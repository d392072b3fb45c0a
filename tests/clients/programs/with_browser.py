"""The page of the server at argv[1] in Chromium (argv[2]): load, type, stream, stop. argv[3] may name a screenshot.

Everything is done with the keyboard, on a page of phone width with dark colors, then on a wide one with light colors.
"""

import json
import sys
import time
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

PROMPT = "def main("
WIDTHS = {"phone": (380, "dark"), "wide": (1280, "light")}


def open_page(browser: Browser, width: int, scheme: Any, problems: list[str]) -> Page:
    """The page when the server is ready; what the console reports is added to `problems`."""
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(f"{request.url} {request.failure}"))
    page.goto(sys.argv[1])
    page.wait_for_selector("#state[data-state=ready]")
    wait_until(page, "document.getElementById('model').textContent.includes('sections')")
    return page


def wait_until(page: Page, condition: str) -> None:
    """Wait for an expression. Playwright's own function evaluates a text in the page, which its policy forbids."""
    deadline = time.monotonic() + 30
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(20)


def focused(page: Page) -> str:
    """Id of the element that has the focus."""
    return str(page.evaluate("document.activeElement.id"))


def focus(page: Page, name: str) -> None:
    """Move the focus to an element with Tab alone."""
    for _ in range(40):
        if focused(page) == name:
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab does not reach {name}")


def continue_text(page: Page, tokens: int) -> dict[str, Any]:
    """Choose the mode, set the limit, send, and wait for the end."""
    focus(page, "mode-chat" if page.is_checked("#mode-chat") else "mode-text")
    page.keyboard.press("ArrowRight" if page.is_checked("#mode-chat") else "ArrowDown")
    if not page.is_checked("#mode-text"):
        page.keyboard.press("ArrowRight")
    page.evaluate("document.getElementById('options').open = true")
    focus(page, "max-tokens")
    page.keyboard.press("Control+a")
    page.keyboard.type(str(tokens))
    page.focus("#prompt")
    page.keyboard.type(PROMPT)
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn.text .facts", timeout=60_000)
    return {"text": page.inner_text(".turn.text pre"), "facts": page.inner_text(".turn.text .facts")}


def chat_and_stop(page: Page) -> dict[str, Any]:
    """Ask for a long answer and stop it with Escape. The model may end by itself, so several seeds are tried."""
    for seed in range(20):
        page.reload()
        page.wait_for_selector("#state[data-state=ready]")
        wait_until(page, "document.getElementById('model').textContent.includes('sections')")
        page.evaluate(f"document.getElementById('seed').value = {seed}")
        page.focus("#prompt")
        page.keyboard.type("Hi")
        page.keyboard.press("Enter")
        wait_until(page, "document.querySelector('.turn.assistant')?.textContent.length > 3")
        busy = page.get_attribute("#answers", "aria-busy")
        page.keyboard.press("Escape")
        page.wait_for_selector(".turn.assistant .facts")
        if "stopped" in (facts := page.inner_text(".turn.assistant .facts")):
            return {"facts": facts, "busy": [busy, page.get_attribute("#answers", "aria-busy")], "focus": focused(page)}
    raise AssertionError("no answer could be stopped")


def fail(page: Page) -> str:
    """An answer of the server that is an error, as the page shows it."""
    page.evaluate("document.getElementById('temperature').value = -1")
    page.focus("#prompt")
    page.keyboard.type("x")
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn.failed")
    return page.inner_text(".turn.failed")


def use_key(page: Page) -> dict[str, Any]:
    """The page when it asks for a key, and when it has described the server again."""
    page.check("#mode-text", force=True)  # which is not what the page chooses for a model with a template
    page.route("**/v1/completions", lambda route: route.fulfill(status=401, json={"error": {"message": "no key"}}))
    page.focus("#prompt")
    page.keyboard.press("Enter")  # the prompt that failed is still there
    page.wait_for_selector(".turn.text.failed")
    wait_until(page, "document.activeElement.id === 'api-key'")
    page.keyboard.type("secret")
    with page.expect_response("**/v1/models"):
        page.keyboard.press("Tab")
    wait_until(page, "document.getElementById('model').textContent.includes('sections')")
    return {"text": page.inner_text(".turn.text.failed"), "mode": page.is_checked("#mode-text")}


def main() -> None:
    """Print what was seen."""
    seen: dict[str, Any] = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=sys.argv[2], args=["--no-sandbox"])
        for name, (width, scheme) in WIDTHS.items():
            problems: list[str] = []
            page = open_page(browser, width, scheme, problems)
            seen[name] = {
                "model": page.inner_text("#model"),
                "slots": page.locator("#slots li").count(),
                "too_wide": page.evaluate("document.documentElement.scrollWidth - innerWidth"),
                "back": page.evaluate("getComputedStyle(document.body).backgroundColor"),
                "completion": continue_text(page, 40),
            }
            if name == "wide" and len(sys.argv) > 3:
                page.evaluate("document.getElementById('options').open = false")
                page.wait_for_timeout(2500)  # slow motion
                page.screenshot(path=sys.argv[3], full_page=True)
            seen[name] |= {
                "stopped": chat_and_stop(page),
                "problems": [text for text in problems if "ERR_ABORTED" not in text],
                "failure": fail(page),
                "key": use_key(page),
            }
        browser.close()
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
