"""Tasks of lm-evaluation-harness on a model directory, through the exported `transformers` model."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stagdist.checkpoint.published.transformers_model import load_with_transformers
from stagdist.errors import CheckpointError, ConfigError

PACKAGES = {"lm_eval": "lm-eval", "accelerate": "accelerate"}
"""What the extra `eval` brings: module and package."""


def require_harness() -> None:
    """Refuse to start without the optional packages.

    Raises:
        ConfigError: one is not installed, with the command that does it.
    """
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"lm-evaluation-harness needs {' and '.join(missing)}, not installed here; install the extra: "
            "pip install 'stagdist[eval]', in a checkout pip install -c constraints.txt -e '.[eval]'"
        )


def harness_directory(path: str | Path) -> Path:
    """The model directory that a path means: itself, or that of a run's folder.

    Raises:
        CheckpointError: there is none, with the command that makes one.
    """
    for folder in (Path(path), Path(path) / "model"):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(
        f"{path} is no model directory and holds none; lm-evaluation-harness runs on an exported model: "
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
    """Run tasks in this process; what `lm_eval.simple_evaluate` returns, without the samples.

    Args:
        model: model directory, or the folder of a run that wrote one.
        tasks: names of tasks or groups.
        include_path: folder with task files of one's own.
        limit: documents per task, below 1 a share of them; None for all.
        num_fewshot: examples before each document; None as the task says.

    Raises:
        ConfigError: a setting cannot work, the harness is not installed, or it does not know a task.
        CheckpointError: the model cannot be loaded.
    """
    _check_settings(tasks, include_path, limit, num_fewshot, batch_size)
    require_harness()
    directory = harness_directory(model)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    known = TaskManager(include_path=include_path)
    unknown = [name for name in tasks if not known.match_tasks([name])]
    if unknown:
        raise ConfigError(
            f"lm-evaluation-harness {lm_eval.__version__} knows no task {', '.join(unknown)}; name the folder of its "
            "file with --include-path, or see `lm_eval ls tasks`"
        )
    loaded, tokenizer = load_with_transformers(directory, dtype)
    runner = HFLM(
        pretrained=loaded.to(device), tokenizer=tokenizer, batch_size=batch_size,
        max_length=loaded.config.max_position_embeddings,
    )  # fmt: skip
    results: dict[str, Any] = lm_eval.simple_evaluate(
        model=runner, tasks=list(tasks), task_manager=known, limit=limit, num_fewshot=num_fewshot, log_samples=False
    )
    return results


def _check_settings(
    tasks: Sequence[str], include_path: str | None, limit: float | None, num_fewshot: int | None, batch_size: int
) -> None:
    """Refuse what the harness would stumble over or pass over.

    Raises:
        ConfigError: naming the option.
    """
    if not tasks:
        raise ConfigError("--tasks names no task; give names as A,B, see `lm_eval ls tasks`")
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"--include-path {include_path} is no folder; give the one that holds the task files")
    if limit is not None and not 0 < limit < float("inf"):
        raise ConfigError(f"--limit is {limit:g}; it must be above 0 (documents per task, below 1 a share of them)")
    if num_fewshot is not None and num_fewshot < 0:
        raise ConfigError(f"--num-fewshot is {num_fewshot}; it must be at least 0")
    if batch_size < 1:
        raise ConfigError(f"--batch-size is {batch_size}; it must be at least 1")


def results_table(results: dict[str, Any]) -> str:
    """The harness's own table of results."""
    from lm_eval.utils import make_table

    return str(make_table(results))
