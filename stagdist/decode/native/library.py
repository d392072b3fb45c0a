"""Compiles `layers.cpp` for this processor, once for each version of the sources and the compiler."""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from stagdist.errors import ConfigError
from stagdist.files import locked, replacing

SOURCE = Path(__file__).with_name("layers.cpp")
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
FUNCTIONS = ("self_attention", "cross_attention", "mlp", "write_memory", "norm_linear")
COMPILE_S = 600.0
PRECISIONS = ("fp32", "bf16", "fp64")


def library() -> ctypes.CDLL:
    """The compiled functions; each takes the address of one `LayerPart`.

    The first call on a machine compiles, which takes about ten seconds, and keeps the result in `~/.cache/stagdist`
    (`XDG_CACHE_HOME`). Without a home folder that can be written, every process compiles.

    Raises:
        ConfigError: there is no C++ compiler, or it fails.
    """
    found = _library_or_error()
    if isinstance(found, ConfigError):
        raise found
    return found


@functools.cache
def _library_or_error() -> ctypes.CDLL | ConfigError:
    """A compiler that fails is not tried again."""
    try:
        folder = _cache_folder()
        if folder is not None:
            return _load_from(folder)
        with tempfile.TemporaryDirectory(prefix="stagdist-") as temporary:
            return _load_from(Path(temporary))
    except ConfigError as error:
        return error


def _load_from(folder: Path) -> ctypes.CDLL:
    """Load the file in a folder, after compiling it if it is not there."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [*filter(shutil.which, COMPILERS)][:1]
    if not compiler:
        raise ConfigError(f"there is no C++ compiler; install one of {', '.join(COMPILERS)}, or set CXX")
    path = folder / f"layers-{_key(compiler)}.so"
    try:
        if not path.exists():
            with locked(path.with_suffix(".lock"), COMPILE_S):  # one rank of a host compiles
                if not path.exists():
                    with replacing(path) as partial:
                        _run(*compiler, *FLAGS, str(SOURCE), "-o", str(partial))
        loaded = ctypes.CDLL(str(path))
    except OSError as error:  # TimeoutError among them
        raise ConfigError(f"the compiled layers cannot be loaded: {error}; delete the file, or set CXX") from error
    for name in (f"{function}_{precision}" for function in FUNCTIONS for precision in PRECISIONS):
        getattr(loaded, name).argtypes = (ctypes.c_void_p,)
        getattr(loaded, name).restype = None
    return loaded


def _cache_folder() -> Path | None:
    """Where compiled files are kept; None if there is no home folder that can be written."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "stagdist"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home folder
        return None
    return folder if os.access(folder, os.W_OK) else None


def _key(compiler: Sequence[str]) -> str:
    """What the result depends on: hosts with different processors may share a home folder."""
    target = _run(*compiler, "-march=native", "-E", "-v", "-x", "c++", os.devnull)
    sources = (path.read_text(encoding="utf-8") for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h"))))
    return hashlib.sha256("\0".join((target, *FLAGS, *sources)).encode()).hexdigest()[:20]


def _run(*command: str) -> str:
    """Run a compiler and return what it reports.

    Raises:
        ConfigError: it cannot be started or fails.
    """
    try:
        done = subprocess.run(command, cwd=SOURCE.parent, capture_output=True, text=True, errors="replace", timeout=600)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"the C++ compiler cannot be run: {error}; set CXX to another one") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-1:]
        raise ConfigError(f"{command[0]} fails on {SOURCE.name}: {' '.join(lines[:1])}; set CXX to another compiler")
    return done.stderr
