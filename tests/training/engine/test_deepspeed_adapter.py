"""Every private name of DeepSpeed that stagdist uses exists as expected, and only the adapter uses it."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import deepspeed
import pytest

from stagdist.training.engine.deepspeed_adapter import TOUCHED, Touched

ROOT = Path(__file__).resolve().parents[3]
ADAPTER = ("stagdist/training/engine/deepspeed_adapter.py", "stagdist/training/engine/section_engine.py")
OTHER_PLACES = {
    "default_pg_timeout": ("stagdist/parallel/groups.py",),
    "default_pg_nccl_timeout": ("stagdist/parallel/groups.py",),
}
"""Names that a module below training must set."""
FILE_FORMAT = "stagdist/checkpoint/training/"
"""Describes DeepSpeed's checkpoint files, which store attributes under their names."""
NOT_DISTINCTIVE = {"save", "load", "parts"}
"""Public names, replaced by subclassing, that other classes have too."""
PUBLIC_MODULES = ("deepspeed.runtime.pipe", "deepspeed.runtime.pipe.schedule", "deepspeed.runtime.pipe.topology")


def problems(touched: dict[str, Touched]) -> list[str]:
    """What differs in the installed release, one line for each name."""
    release = f"DeepSpeed {deepspeed.__version__}"
    found = {name: signature(name) for name in touched}
    return [
        f"{release}: {name} is {found[name]}, expected {each.signature} ({each.why})"
        for name, each in touched.items()
        if found[name] != each.signature
    ]


def signature(name: str) -> str:
    """What a name is: see `Touched.signature`; `missing` if it does not exist."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:-1]:
            owner = getattr(owner, part, None)
        break
    else:
        return "missing"
    if inspect.ismodule(owner) and parts[-1] in inspect.getsource(owner) and not parts[-1][0].isupper():
        return "variable"  # not read: DeepSpeed makes some of them when they are first asked for, which takes seconds
    if owner is not None and hasattr(owner, parts[-1]):
        return _described(getattr(owner, parts[-1]))
    return "attribute" if isinstance(owner, type) and parts[-1] in _assigned(owner) else "missing"


def _described(value: object) -> str:
    if inspect.isclass(value):
        return "class"
    return str(inspect.signature(value)) if inspect.isfunction(value) else type(value).__name__


@cache
def _assigned(owner: type[Any]) -> set[str]:
    """Attributes that methods of a class assign, of `self` or of what they are given."""
    nodes = ast.walk(ast.parse(inspect.getsource(owner)))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}


def uses(path: str, source: str, names: set[str]) -> Iterator[str]:
    """Where a source file touches one of the names, or imports a module of DeepSpeed's that is not documented."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(attr=name) | ast.FunctionDef(name=name) | ast.Name(id=name):
                found = [name]
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "hasattr"), args=[_, ast.Constant(value=str(name)), *_]
            ):
                found = [name]
            case ast.ImportFrom(module=str(module), names=imported):
                found = [each.name for each in imported]
                if module.startswith("deepspeed.runtime") and module not in PUBLIC_MODULES:
                    yield f"{path}:{node.lineno} imports {module}; import it in {ADAPTER[0]}"
            case _:
                continue
        for name in sorted(set(found) & names):
            if path not in OTHER_PLACES.get(name, ()):
                yield f"{path}:{node.lineno} uses {name}; give the adapter a public name for it ({ADAPTER[0]})"


def test_the_installed_deepspeed_has_every_name_as_expected() -> None:
    assert problems(TOUCHED) == []


def test_only_the_adapter_touches_private_names() -> None:
    names = {name.rpartition(".")[2] for name in TOUCHED} - NOT_DISTINCTIVE
    found: list[str] = []
    for room in ("stagdist", "launch", "tools", "benchmarks"):
        for file in sorted((ROOT / room).rglob("*.py")):
            path = file.relative_to(ROOT).as_posix()
            if path not in ADAPTER and not path.startswith(FILE_FORMAT):
                found += uses(path, file.read_text(), names)
    assert found == []


def test_the_table_has_every_private_name_that_the_adapter_overrides() -> None:
    touched = {name.rpartition(".")[2] for name in TOUCHED}
    for path in ADAPTER:
        for owner in ast.parse((ROOT / path).read_text()).body:
            if isinstance(owner, ast.ClassDef) and owner.name in ("SectionEngine", "CutPipeline"):
                methods = {each.name for each in owner.body if isinstance(each, ast.FunctionDef)}
                ours = {"__init__", "_is_finite", "_accumulated_gradients", "_wait_for_device"}
                private = {name for name in methods if name.startswith("_")} - ours
                assert private and private <= touched, f"{path}: add {private - touched} to TOUCHED"


def _changed() -> dict[str, tuple[str, str]]:
    engine, zero = "deepspeed.runtime.pipe.engine.PipelineEngine", "deepspeed.runtime.zero"
    return {
        "another signature": (f"{engine}._exec_schedule", "is (self, pipe_schedule), expected (self)"),
        "a missing method": (f"{engine}._exec_teleport", "is missing, expected (self)"),
        "a missing attribute": (f"{engine}.pipe_puffers", "is missing, expected (self)"),
        "a missing class": (f"{zero}.config.ZeroStageMenu.save", "is missing, expected (self)"),
        "a missing module": (f"{zero}.stage_1_and_3.Optimizer", "is missing, expected (self)"),
        "another kind": (f"{engine}._INSTRUCTION_MAP", "is dict, expected (self)"),
    }


@pytest.mark.parametrize(("name", "says"), _changed().values(), ids=_changed().keys())
def test_a_change_is_reported_with_release_name_and_reason(name: str, says: str) -> None:
    (problem,) = problems({name: Touched("(self)", "needed for this test")})
    assert problem == f"DeepSpeed {deepspeed.__version__}: {name} {says} (needed for this test)"


@pytest.mark.parametrize(
    "source",
    [
        "engine._exec_schedule(plan)",
        "class Engine:\n    def _exec_schedule(self): ...",
        "getattr(engine, '_exec_schedule')",
        "from deepspeed.runtime.engine import DeepSpeedEngine",
    ],
)
def test_a_use_outside_the_adapter_is_reported(source: str) -> None:
    (problem,) = uses("stagdist/x.py", source, {"_exec_schedule"})
    assert re.match(r"stagdist/x\.py:\d (uses _exec_schedule|imports deepspeed\.runtime\.engine); ", problem)


def test_documented_modules_of_deepspeed_may_be_imported_anywhere() -> None:
    assert not list(uses("stagdist/x.py", "from deepspeed.runtime.pipe import schedule", {"_exec_schedule"}))
