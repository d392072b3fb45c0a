"""What a replacement leaves when a kill comes between its two renames: the old folder, whole, under a hidden name.

`put_in_place` of `stagdist/checkpoint/convert/staging.py` replaces; whoever comes next gives the old one its name back.
"""

import shutil
from pathlib import Path

_ASIDE = ".replaced-"


def aside(final: Path) -> Path:
    """Where a folder lies while a new one gets its name."""
    return final.parent / f"{_ASIDE}{final.name}"


def recover(final: Path) -> None:
    """After a replacement that was cut short: the old folder gets its name back, or goes where the new one is there."""
    old = aside(final)
    if not old.is_dir():
        return
    if final.exists():
        shutil.rmtree(old)
    else:
        old.rename(final)


def replaced(folder: Path) -> list[Path]:
    """Names in a folder of which an old bearer is left, sorted."""
    if not folder.is_dir():
        return []
    return sorted(path.with_name(path.name.removeprefix(_ASIDE)) for path in folder.glob(f"{_ASIDE}*") if path.is_dir())


def nameless(folder: Path) -> list[Path]:
    """Of those the names that are missing, since a replacement was cut short."""
    return [name for name in replaced(folder) if not name.exists()]
