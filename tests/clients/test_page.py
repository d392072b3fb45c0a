"""The page in headless Chromium, by keyboard, at the width of a phone and of a screen."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)")
def test_the_page_loads_types_streams_and_stops(program: Callable[..., Any]) -> None:
    seen = program("with_browser", str(CHROMIUM))
    for name, page in seen.items():
        assert page["problems"] == [], name
        assert "2 sections · 2 processes" in page["model"] and page["model"].startswith("tiny: ")
        assert "K parameters" in page["model"]
        assert page["slots"] == 4
        assert page["too_wide"] <= 0
        assert page["completion"]["text"].startswith("def main(") and len(page["completion"]["text"]) > 12
        assert "tokens" in page["completion"]["facts"] and "first after" in page["completion"]["facts"]
        assert "stopped" in page["stopped"]["facts"]
        assert page["stopped"]["busy"] == ["true", "false"] and page["stopped"]["focus"] == "prompt"
        assert "temperature" in page["failure"]
        assert page["key"] == {"text": "x\nno key", "mode": True}
    assert seen["phone"]["back"] != seen["wide"]["back"]  # dark and light
