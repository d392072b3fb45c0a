"""What a replacement leaves when a kill comes between its two renames: the old folder, whole, under a hidden name.

`put_in_place` of `stagdist/checkpoint/staging.py` replaces; whoever comes next gives the old one its name back.
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


def nameless(folder: Path) -> list[Path]:
    """The names that are missing in a folder since a replacement was cut short, sorted."""
    if not folder.is_dir():
        return []
    named = (path.with_name(path.name.removeprefix(_ASIDE)) for path in folder.glob(f"{_ASIDE}*") if path.is_dir())
    return sorted(path for path in named if not path.exists())
