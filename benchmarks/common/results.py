"""Files that benchmarks write: checked before minutes are spent on measuring."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from stagdist.errors import ConfigError
from stagdist.files import writing

OPTIONS = ("json", "trace", "timeline")
"""Options that name such a file."""


def check_outputs(arguments: argparse.Namespace) -> None:
    """Make the folders of all requested files; `--folder` must exist.

    Raises:
        ConfigError: a file could not be written; names its option.
    """
    for option in OPTIONS:
        if name := getattr(arguments, option, None):
            path = Path(name)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                reason = f"{path.parent} is a file" if isinstance(error, FileExistsError) else error.strerror or error
                raise ConfigError(f"--{option} {path} cannot be written: {reason}") from error
            if path.is_dir() or not os.access(path.parent, os.W_OK):
                found = "is a folder" if path.is_dir() else "is in a folder that cannot be written"
                raise ConfigError(f"--{option} {path} {found}; give the name of a file")
    folder = getattr(arguments, "folder", None)
    if folder is not None and not (Path(folder).is_dir() and os.access(folder, os.W_OK)):
        raise ConfigError(f"--folder {folder} is not a folder that can be written")


def write_results(path: str | Path, results: dict[str, Any]) -> None:
    """Store results as JSON."""
    with writing(Path(path)) as stream:
        stream.write(json.dumps(results, indent=2) + "\n")
