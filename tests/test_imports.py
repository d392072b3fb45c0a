"""The repository keeps the rules for imports, and the rules notice what breaks them."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.import_rules import ROOT, imports_below, violations

# --- the repository ---------------------------------------------------------------------------------------------


def test_imports_of_the_repository_keep_the_rules() -> None:
    found = imports_below(ROOT)
    assert violations(ROOT, found) == []
    seen = {each.path for each in found}
    assert {"stagdist/config/parts.py", "stagdist/parallel/grid.py", "stagdist/model/megatron.py"} <= seen


@pytest.mark.parametrize("module", ["stagdist.config.loading", "stagdist.parallel.world"])
def test_reading_a_configuration_and_the_launchers_variables_imports_no_framework(module: str) -> None:
    code = f"import sys, {module}; print([n for n in ('torch', 'deepspeed', 'numpy') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


# --- the checker itself, on small trees -------------------------------------------------------------------------


def check(tmp_path: Path, files: dict[str, str]) -> list[str]:
    """Violations of a tree given as path and source."""
    for name, source in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return violations(tmp_path, imports_below(tmp_path))


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("stagdist/training/trainer.py", "import deepspeed\nfrom stagdist.model.section import Section"),
        ("stagdist/model/megatron.py", "from megatron.core import tensor_parallel"),
        ("stagdist/data/corpus.py", "def read():\n    from datasets import load_dataset"),
        ("stagdist/config/loading.py", "from stagdist.config.run_config import RunConfig"),
        ("stagdist/checkpoint/export.py", "from stagdist.hf import modeling\nimport transformers"),
        ("stagdist/hf/modeling.py", "import transformers\nfrom .configuration import Config"),
        ("launch/pretrain.py", "import deepspeed\nfrom stagdist.training import trainer"),
        ("stagdist/telemetry/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import wandb"),
    ],
)
def test_allowed_imports_pass(tmp_path: Path, place: str, source: str) -> None:
    assert check(tmp_path, {place: source}) == []


@pytest.mark.parametrize(
    ("place", "source", "problem"),
    [
        ("stagdist/errors.py", "import stagdist.config", "errors is not above config"),
        ("stagdist/config/parts.py", "from stagdist.telemetry import logging", "config is not above telemetry"),
        ("stagdist/model/head.py", "from stagdist.training import trainer", "model is not above training"),
        ("stagdist/model/head.py", "from stagdist.data import loader", "model is not above data"),
        ("stagdist/data/loader.py", "def f():\n    import stagdist.checkpoint", "data is not above checkpoint"),
        ("stagdist/decode/engine.py", "from stagdist import training", "decode is not above training"),
        ("stagdist/decode/engine.py", "from ..training import trainer", "decode is not above training"),
        ("stagdist/model/a.py", "if TYPE_CHECKING:\n    import stagdist.decode.x", "model is not above decode"),
        ("stagdist/novel/part.py", "import stagdist.errors", "give novel"),
        ("stagdist/__init__.py", "from stagdist.config import RunConfig", "give stagdist/__init__.py"),
        ("stagdist/hf/modeling.py", "from stagdist.errors import ConfigError", "hf imports nothing of stagdist"),
        ("stagdist/model/head.py", "from stagdist.hf import modeling", "use hf"),
        ("stagdist/model/section.py", "import deepspeed.pipe", "allowed in stagdist/training/"),
        ("tools/convert.py", "from deepspeed import checkpoint", "allowed in stagdist/training/"),
        ("stagdist/model/section.py", "from megatron.core import x", "allowed in stagdist/model/megatron.py"),
        (
            "stagdist/parallel/grid.py",
            "def f():\n    import megatron.core",
            "allowed in stagdist/model/megatron.py",
        ),
        ("stagdist/decode/x.py", "import importlib\nimportlib.import_module('deepspeed')", "allowed in"),
        (
            "stagdist/training/x.py",
            "from transformers import AutoTokenizer",
            "allowed in stagdist/data/tokenizer_f",
        ),
        ("stagdist/telemetry/x.py", "import wandb", "inside the function"),
        ("stagdist/telemetry/x.py", "try:\n    import matplotlib.pyplot\nexcept ImportError:\n    pass", "inside the"),
        ("stagdist/telemetry/x.py", "try:\n    x = 1\nexcept OSError:\n    import datasets", "inside the function"),
        ("stagdist/telemetry/x.py", "from torch.utils.tensorboard import SummaryWriter", "inside the function"),
    ],
)
def test_forbidden_imports_are_reported(tmp_path: Path, place: str, source: str, problem: str) -> None:
    (found,) = check(tmp_path, {place: source})
    assert found.startswith(f"{place}:")
    assert problem in found


def test_cycles_inside_a_room_are_reported(tmp_path: Path) -> None:
    problems = check(
        tmp_path,
        {
            "stagdist/model/a.py": "from stagdist.model.b import one",
            "stagdist/model/b.py": "from stagdist.model.c import two",
            "stagdist/model/c.py": "from stagdist.model import a",
        },
    )
    assert problems == [
        "import cycle: stagdist/model/a.py -> stagdist/model/b.py -> stagdist/model/c.py -> stagdist/model/a.py"
    ]


def test_an_import_inside_a_function_makes_no_cycle(tmp_path: Path) -> None:
    assert not check(
        tmp_path,
        {
            "stagdist/model/a.py": "from stagdist.model.b import one",
            "stagdist/model/b.py": "def two():\n    from stagdist.model.a import one",
        },
    )


@pytest.mark.parametrize("block", ["if TYPE_CHECKING:", "if typing.TYPE_CHECKING:"])
def test_an_import_for_types_alone_makes_a_cycle(tmp_path: Path, block: str) -> None:
    assert check(
        tmp_path,
        {
            "stagdist/config/a.py": "from stagdist.config.b import one",
            "stagdist/config/b.py": f"{block}\n    from stagdist.config.a import Two",
        },
    ) == ["import cycle: stagdist/config/a.py -> stagdist/config/b.py -> stagdist/config/a.py"]


@pytest.mark.parametrize("indented", ["", "def f():\n    "])
def test_sub_rooms_that_import_each_other_are_reported(tmp_path: Path, indented: str) -> None:
    assert check(
        tmp_path,
        {
            "stagdist/decode/runtime/stage.py": "from stagdist.decode.layers.cache import Cache",
            "stagdist/decode/layers/cache.py": "x = 1",
            "stagdist/decode/layers/weights.py": f"{indented}from stagdist.decode.runtime import slots",
            "stagdist/decode/runtime/slots.py": "x = 1",
        },
    ) == ["import cycle: stagdist/decode/layers/ -> stagdist/decode/runtime/ -> stagdist/decode/layers/"]


def test_a_sub_room_and_a_module_above_it_that_import_each_other_are_reported(tmp_path: Path) -> None:
    files = {
        "stagdist/decode/engine.py": "from stagdist.decode.runtime.stage import Stage",
        "stagdist/decode/runtime/stage.py": "from stagdist.decode.request import Request",
        "stagdist/decode/request.py": "x = 1",
    }
    assert not check(tmp_path, files), "one module may use a sub-room and another be used by it"
    assert check(tmp_path, {"stagdist/decode/runtime/slots.py": "from stagdist.decode import engine"}) == [
        "import cycle: stagdist/decode/engine.py -> stagdist/decode/runtime/ -> stagdist/decode/engine.py"
    ]
