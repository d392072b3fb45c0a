"""The generated reference of the configuration."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from stagdist.config.schema import schema_keys

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_config_reference", ROOT / "tools/write_config_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(tool: ModuleType) -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert page == tool.reference(), "run: python tools/write_config_reference.py"


def test_every_key_is_on_the_page_with_its_meaning(tool: ModuleType) -> None:
    page = tool.reference()
    for key in schema_keys():
        name = key.path.rpartition(".")[-1]
        assert key.schema["description"], f"{key.path} has no description"
        assert f"| `{name}` |" in page or f"## `{key.path}`" in page, f"{key.path} is not on the page"


def test_limits_and_defaults_are_written_in_words(tool: ModuleType) -> None:
    page = tool.reference()
    assert "| `stagger` | integer 0 to 2 | `1` |" in page
    assert "| `betas` | list of 2 of number 0 to 1 | `[0.9, 0.95]` |" in page
    assert "| `eps` | number > 0 | `1e-8` |" in page
    assert "| `num_samples` | integer >= 1 or null | `null` |" in page
    assert "| `steps` | integer >= 1 | **required** |" in page
