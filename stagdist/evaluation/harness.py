"""Tasks of lm-evaluation-harness on a model directory, run through the exported `transformers` model."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stagdist.checkpoint.published.transformers_model import load_with_transformers
from stagdist.errors import CheckpointError, ConfigError
from stagdist.parallel.world import choose_device

PACKAGES = {"lm_eval": "lm-eval", "accelerate": "accelerate"}
"""Module and package of everything in the extra `eval`."""


def require_harness() -> None:
    """Check that the optional packages are installed.

    Raises:
        ConfigError: one is not installed; the message has the command that installs it.
    """
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"lm-evaluation-harness needs {' and '.join(missing)}, which is not installed; install the extra: "
            "pip install 'stagdist[eval]', in a checkout pip install -c constraints.txt -e '.[eval]'"
        )


def harness_directory(path: str | Path) -> Path:
    """The model directory at a path: the path itself, or the `model` folder of a run.

    Raises:
        CheckpointError: there is none; the message has the command that exports one.
    """
    for folder in (Path(path), Path(path) / "model"):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(
        f"{path} is not a model directory and contains none; lm-evaluation-harness needs an exported model: "
        f"python tools/convert_checkpoint.py export {path} DIR"
    )


def run_tasks(
    model: str | Path,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Run tasks in this process. Returns the result of `lm_eval.simple_evaluate`, without the samples.

    Args:
        model: model directory, or the folder of a run that wrote one.
        tasks: names of tasks or groups.
        include_path: folder with task files of the user.
        limit: documents per task, or a fraction of them if below 1; None for all.
        num_fewshot: examples before each document; None for the number that the task defines.

    Raises:
        ConfigError: a setting is invalid, the harness is not installed, or it has no such task.
        CheckpointError: the model cannot be loaded.
    """
    _check_settings(tasks, include_path, limit, num_fewshot, batch_size)
    require_harness()
    directory = harness_directory(model)
    device = choose_device(device)
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    available = TaskManager(include_path=include_path)
    unknown = [name for name in tasks if not available.match_tasks([name])]
    if unknown:
        raise ConfigError(
            f"lm-evaluation-harness {lm_eval.__version__} has no task {', '.join(unknown)}; give the folder of its "
            "file with --include-path, or see `lm_eval ls tasks`"
        )
    loaded, tokenizer = load_with_transformers(directory, dtype)
    runner = HFLM(
        pretrained=loaded.to(device), tokenizer=tokenizer, batch_size=batch_size,
        max_length=loaded.config.max_position_embeddings,
    )  # fmt: skip
    results: dict[str, Any] = lm_eval.simple_evaluate(
        model=runner, tasks=list(tasks), task_manager=available, limit=limit, num_fewshot=num_fewshot, log_samples=False
    )
    return results


def _check_settings(
    tasks: Sequence[str], include_path: str | None, limit: float | None, num_fewshot: int | None, batch_size: int
) -> None:
    """Refuse settings that the harness would ignore or fail on."""
    if not tasks:
        raise ConfigError("--tasks is empty; give names as A,B, see `lm_eval ls tasks`")
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"--include-path {include_path} is not a folder; give the folder of the task files")
    if limit is not None and not 0 < limit < float("inf"):
        raise ConfigError(f"--limit is {limit:g}; it must be above 0 (documents per task, below 1 a fraction)")
    if num_fewshot is not None and num_fewshot < 0:
        raise ConfigError(f"--num-fewshot is {num_fewshot}; it must be at least 0")
    if batch_size < 1:
        raise ConfigError(f"--batch-size is {batch_size}; it must be at least 1")
