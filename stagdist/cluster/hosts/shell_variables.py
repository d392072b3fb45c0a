"""Which variables of the shell a rank needs, and how they reach it: generated `.deepspeed_env` files.

DeepSpeed's launcher hands on few variables by itself and writes them into the command line of the remote shell,
between double quotes at best. So only plain values are handed on in this way. What is secret, or holds a character
that a shell could take for more than itself, travels in a private file that only its owner can read; the command
line holds that file's path. The name of a variable decides whether ranks need it; its name and value decide whether
it may be shown.
"""

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from stagdist.cluster.hosts.leftovers import JOB_VARIABLE, SERVICE_LOG
from stagdist.errors import ConfigError
from stagdist.files import writing
from stagdist.parallel.private_variables import PRIVATE_FILE, VARIABLE_NAME
from stagdist.telemetry.pulse import PULSE_FILE

DEEPSPEED_ENV = ".deepspeed_env"
"""Name under which DeepSpeed looks for the file, in the home and the current directory; DS_ENV_FILE names another."""

NAMES = frozenset({
    "LANG", "LC_ALL", "MASTER_ADDR", "MASTER_PORT", "TMPDIR", "TZ", "VIRTUAL_ENV", "XDG_CACHE_HOME", "no_proxy",
    "NO_PROXY",
})  # fmt: skip
"""Variables handed on by their name. Open MPI's ranks learn MASTER_ADDR in no other way."""

EARLY_NAMES = frozenset({"PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHOME", "PYTHONPATH"})
"""Needed before Python runs, so no file of ours can bring them; see `is_early` for the rest of PYTHON's."""

PREFIXES = (
    "CUDA_", "CUBLAS", "DEEPSPEED_", "DS_", "FI_", "GLOO_", "HF_", "KMP_", "MEGATRON_", "MKL_", "MLFLOW", "MPLBACKEND",
    "MV2", "NCCL", "NVIDIA_", "NVTE_", "OMP_", "PYTHON", "PYTORCH_", "STAGDIST_", "TOKENIZERS_", "TORCH", "TRITON_",
    "UCX", "WANDB_",
)  # fmt: skip
"""Beginnings of variables handed on."""

EXPORTED_BY_DEEPSPEED = ("MLFLOW", "MV2", "NCCL", "PYTHON", "UCX")
"""Beginnings of variables that DeepSpeed puts into the command line of the hosts by itself, without care; the same
names in the generated file replace them, with nothing where the private file brings the value."""

NEVER_FORWARDED = frozenset(
    {"CUDA_VISIBLE_DEVICES", "DS_ENV_FILE", "PYTHONSTARTUP", PRIVATE_FILE, JOB_VARIABLE, PULSE_FILE, SERVICE_LOG}
)
"""Variables that mean something on this host or to this process alone; a supervisor inside a supervised job must not
mark its ranks with the mark of the outer one."""

_CREDENTIAL = re.compile(
    r"(API_?KEY|(ACCESS|ACCOUNT|PRIVATE|SECRET|STORAGE)_?KEY|ACCESS_KEY_ID|STORAGE_CONNECTION_STRING|CREDENTIAL|PASSWD"
    r"|PASSWORD|SECRET|TOKEN)S?$"
)
_NOT_TO_BE_SEEN = re.compile(r"(_KEY|AUTH|CONNECTION_STRING|PASSPHRASE)S?$|_(PASS|PWD)$")
_PASSWORD_IN_URL = re.compile(r"://([^/@]+|[^/@]*:(?!\d{1,5}/)[^@]*)@")
"""A user, or a user and a password, in which databases allow a slash; no port before a path that holds an @."""

_PROXIES = re.compile(r"(https?|all|ftp)_proxy", re.IGNORECASE)
_PLAIN = re.compile(r"[\w@+=:,./-]*", re.ASCII)


def is_credential(name: str) -> bool:
    """Whether a variable holds a credential: a key, token or password, or a proxy, whose URL may hold a password.

    A key id counts as a credential, because it is useless without the key.
    """
    return bool(_CREDENTIAL.search(name.upper()) or _PROXIES.fullmatch(name))


def is_secret(name: str, value: str) -> bool:
    """Whether a value must not be seen, for what its variable is called or for a password in a URL.

    More than credentials: what ranks have no need of, such as a passphrase, is hidden where something else hands it on.
    """
    if not value:
        return False
    return bool(is_credential(name) or _NOT_TO_BE_SEEN.search(name.upper()) or _PASSWORD_IN_URL.search(value))


def is_plain(value: str) -> bool:
    """Whether every shell and launcher takes the text for itself; no per cent signs, which pdsh replaces."""
    return bool(_PLAIN.fullmatch(value))


def may_be_shown(name: str, value: str) -> bool:
    """Whether a variable may be on a command line."""
    return is_plain(value) and not is_secret(name, value)


def is_early(name: str, value: str) -> bool:
    """Whether Python needs a variable to start; secrets of its tools, such as keyring's, are for later."""
    return name in EARLY_NAMES or (name.startswith("PYTHON") and not is_secret(name, value))


def refuse_password(name: str, value: str) -> None:
    """Check a variable that Python needs to start, which must be on the command line.

    Raises:
        ConfigError: it holds a password.
    """
    if is_secret(name, value):
        raise ConfigError(f"{name} holds a URL with a password, which all users of the hosts would see; take it out")


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a rank needs, secrets included, sorted by name."""
    names = NAMES | EARLY_NAMES
    return {
        name: value
        for name, value in sorted(environment.items())
        if name not in NEVER_FORWARDED
        and VARIABLE_NAME.fullmatch(name)
        and (name in names or name.startswith(PREFIXES) or is_credential(name))
    }


def split_private(variables: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Divide into variables for the command line and variables for the private file.

    Raises:
        ConfigError: a variable that Python needs to start may not.
    """
    public: dict[str, str] = {}
    private: dict[str, str] = {}
    for name, value in variables.items():
        if is_early(name, value):
            refuse_password(name, value)
            if not is_plain(value):
                raise ConfigError(
                    f"{name} holds characters that a shell on the hosts could run or split: {value[:80]!r}; give it "
                    "only letters, digits and @+=:,./_- or unset it"
                )
        (public if may_be_shown(name, value) else private)[name] = value
    return public, private


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
    variables = rank_variables(environment)
    public, hidden = split_private(variables)
    public |= {name: "" for name in hidden if name.startswith(EXPORTED_BY_DEEPSPEED)}
    if hidden:
        public[PRIVATE_FILE] = str(private.resolve())
        if not is_plain(public[PRIVATE_FILE]):
            raise ConfigError(f"{public[PRIVATE_FILE]!r} holds characters that a shell could run or split; rename it")
    try:
        if hidden:
            with writing(private, private=True) as stream:
                stream.writelines(f"{name}={shlex.quote(value)}\n" for name, value in hidden.items())
        with writing(path, private=True) as stream:
            stream.writelines(f"{name}={value}\n" for name, value in public.items())
    except OSError as error:
        raise ConfigError(f"{error.filename or path} cannot be written: {error.strerror or error}") from error
    return list(variables)
