"""The files that benchmarks leave: checked before minutes are spent on measuring, written whole or not at all."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from stagdist.errors import ConfigError

OPTIONS = ("json", "trace", "timeline")
"""Those that name such a file."""


def check_outputs(arguments: argparse.Namespace) -> None:
    """Make the folders of all files that were asked for; the one for runs must be there.

    Raises:
        ConfigError: something could not be written, by its option.
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
                found = "is a folder" if path.is_dir() else "lies in a folder that cannot be written"
                raise ConfigError(f"--{option} {path} {found}; give the name of a file")
    folder = getattr(arguments, "folder", None)
    if folder is not None and not (Path(folder).is_dir() and os.access(folder, os.W_OK)):
        raise ConfigError(f"--folder {folder} is no folder that can be written")


def write_results(path: str | Path, results: dict[str, Any]) -> None:
    """Store results as JSON."""
    final = Path(path)
    aside = final.with_name(final.name + ".partial")
    aside.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, final)
