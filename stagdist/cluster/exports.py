"""Which variables of the shell a rank needs, and how they reach it: generated `.deepspeed_env` files.

DeepSpeed's launcher hands on few variables by itself and writes them into the command line of the remote shell,
between double quotes at best. So only plain values are handed on in this way. What is secret, or holds a character
that a shell could take for more than itself, travels in a private file that only its owner can read; the command
line holds that file's path.
"""

import os
import re
import shlex
import stat
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from stagdist.cluster.marks import MARK
from stagdist.errors import ConfigError
from stagdist.telemetry.pulse import PULSE_FILE

PRIVATE_FILE = "STAGDIST_PRIVATE_ENV"
"""Variable that names the private file."""

DEEPSPEED_ENV = ".deepspeed_env"
"""Name under which DeepSpeed looks for the file, in the home and the current directory; DS_ENV_FILE names another."""

NAMES = frozenset({
    "LANG", "LC_ALL", "MASTER_ADDR", "MASTER_PORT", "TMPDIR", "TZ", "VIRTUAL_ENV", "XDG_CACHE_HOME", "no_proxy",
    "NO_PROXY",
})  # fmt: skip
"""Variables handed on by their name. Open MPI's ranks learn MASTER_ADDR in no other way."""

EARLY_NAMES = frozenset({"PATH", "LD_LIBRARY_PATH", "LD_PRELOAD"})
"""Needed before Python runs, so no file of ours can bring them; names that begin with PYTHON are of this kind too."""

PREFIXES = (
    "CUDA_", "CUBLAS", "DEEPSPEED_", "DS_", "FI_", "GLOO_", "HF_", "KMP_", "MEGATRON_", "MKL_", "MLFLOW", "MPLBACKEND",
    "MV2", "NCCL", "NVIDIA_", "NVTE_", "OMP_", "PYTHON", "PYTORCH_", "STAGDIST_", "TOKENIZERS_", "TORCH", "TRITON_",
    "UCX", "WANDB_",
)  # fmt: skip
"""Beginnings of variables handed on. DeepSpeed adds those of PYTHON, NCCL and the like by itself, without care; the
same names in the generated file replace them."""

NEVER = frozenset({"CUDA_VISIBLE_DEVICES", "DS_ENV_FILE", "PYTHONSTARTUP", PRIVATE_FILE, MARK, PULSE_FILE})
"""Variables that mean something on this host or to this process alone; a supervisor inside a supervised job must not
mark its ranks with the mark of the outer one."""

_SECRET = re.compile(r"(API_?KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|PRIVATE_KEY)S?$")
_PROXIES = re.compile(r"(https?|all|ftp)_proxy", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN = re.compile(r"[\w@+=:,./-]*", re.ASCII)


def is_secret(name: str) -> bool:
    """Whether a variable's value must not be seen: keys, tokens, passwords; proxies, which may hold a password."""
    return bool(_SECRET.search(name.upper()) or _PROXIES.fullmatch(name))


def is_plain(value: str) -> bool:
    """Whether every shell and launcher takes the text for itself; no per cent signs, which pdsh replaces."""
    return bool(_PLAIN.fullmatch(value))


def wanted(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a rank needs, secrets included, sorted by name."""
    names = NAMES | EARLY_NAMES
    return {
        name: value
        for name, value in sorted(environment.items())
        if name not in NEVER
        and _NAME.fullmatch(name)
        and (name in names or name.startswith(PREFIXES) or is_secret(name))
    }


def split_private(variables: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Divide into what may stand on a command line and what travels in the private file.

    Raises:
        ConfigError: a variable that Python needs to start is not plain.
    """
    public: dict[str, str] = {}
    private: dict[str, str] = {}
    for name, value in variables.items():
        plain = is_plain(value)
        if not plain and (name in EARLY_NAMES or name.startswith("PYTHON")):
            raise ConfigError(
                f"{name} holds characters that a shell on the hosts could run or split: {value[:80]!r}; give it only "
                "letters, digits and @+=:,./_- or unset it"
            )
        (public if plain and not is_secret(name) else private)[name] = value
    return public, private


def write_private(path: Path, text: str) -> None:
    """Write a file that nobody but its owner can read, replacing one of that name."""
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(text)
    part.rename(path)


def write_deepspeed_env(path: Path, private: Path, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Write the file for DeepSpeed and, where something must not be seen or is not plain, the private one.

    Args:
        path: usually `.deepspeed_env` in the folder where `deepspeed` is started.
        private: on a file system that all hosts see; its path must be plain.
        environment: the shell's variables.

    Returns: the names handed on.

    Raises:
        ConfigError: a value cannot be handed on, or a file cannot be written.
    """
    variables = wanted(environment)
    public, hidden = split_private(variables)
    if hidden:
        public[PRIVATE_FILE] = str(private.resolve())
        if not is_plain(public[PRIVATE_FILE]):
            raise ConfigError(f"{public[PRIVATE_FILE]!r} holds characters that a shell could run or split; rename it")
    try:
        if hidden:
            write_private(private, "".join(f"{name}={shlex.quote(value)}\n" for name, value in hidden.items()))
        write_private(path, "".join(f"{name}={value}\n" for name, value in public.items()))
    except OSError as error:
        raise ConfigError(f"{error.filename or path} cannot be written: {error.strerror or error}") from error
    return list(variables)


def load_private(environment: MutableMapping[str, str] = os.environ) -> None:
    """Read the private file that the environment names, if any, into the environment; what is set already stays.

    Raises:
        ConfigError: it is missing, damaged, or others can read it.
    """
    name = environment.get(PRIVATE_FILE)
    if name is None:
        return
    remedy = "write it again with launch/doctor.py --write-env"
    try:
        with Path(name).open() as stream:
            status = os.fstat(stream.fileno())
            if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
                raise ConfigError(f"{PRIVATE_FILE} {name} can be read or changed by others; chmod 600 it, or {remedy}")
            words = shlex.split(stream.read())
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{PRIVATE_FILE} {name} cannot be read: {reason}; {remedy}") from error
    for word in words:
        key, found, value = word.partition("=")
        if not found or not _NAME.fullmatch(key):
            raise ConfigError(f"{PRIVATE_FILE} {name} is damaged: it holds more than NAME=VALUE lines; {remedy}")
        environment.setdefault(key, value)
