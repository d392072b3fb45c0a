"""Folders that are being replaced.

`put_in_place` of `staging.py` renames twice. A process that is killed in between leaves the complete old folder under a
hidden name; the next conversion or run restores it.
"""

import shutil
from pathlib import Path

_ASIDE = ".replaced-"


def aside(final: Path) -> Path:
    """The hidden name of a folder while a new one takes its place."""
    return final.parent / f"{_ASIDE}{final.name}"


def recover(final: Path) -> None:
    """Finish an interrupted replacement: restore the old folder, or remove it if the new one is in place."""
    old = aside(final)
    if not old.is_dir():
        return
    if final.exists():
        shutil.rmtree(old)
    else:
        old.rename(final)


def replaced(folder: Path) -> list[Path]:
    """Final names of all folders in `folder` that are kept aside, sorted."""
    if not folder.is_dir():
        return []
    return sorted(path.with_name(path.name.removeprefix(_ASIDE)) for path in folder.glob(f"{_ASIDE}*") if path.is_dir())


def nameless(folder: Path) -> list[Path]:
    """Those of `replaced` that are missing because a replacement was interrupted."""
    return [name for name in replaced(folder) if not name.exists()]
