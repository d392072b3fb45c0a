"""Options of the serve command: what is wrong is named in one line before anything is loaded."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.serve import parse_arguments
from stagdist.cluster.hosts.leftovers import JOB_VARIABLE
from stagdist.errors import ConfigError
from stagdist.serving import settings as settings_module
from stagdist.serving.serve_settings import server_settings
from stagdist.serving.settings import KEYS_VARIABLE, ServerSettings


def settings(*words: str, **environment: str) -> ServerSettings:
    """The settings of a command line."""
    return server_settings(parse_arguments(["--model", "m", *words]), environment)


def test_options_become_settings(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b"\xef\xbb\xbfone\r\n\r\n two \r\n")
    (tmp_path / "template").write_text("\ufeff{{ messages[0]['content'] }}")
    words = ["--port", "8123", "--host", "0.0.0.0", "--served-model-name", "a", "--served-model-name", "b"]
    words += ["--api-key-file", str(tmp_path / "keys"), "--chat-template", str(tmp_path / "template")]
    words += ["--max-body-mib", "0.5", "--cors-origin", "https://a.example", "--no-access-log", "--any-model"]
    words += ["--root-path", "/llm", "--metrics-prefix", "x:", "--keep-alive-s", "80", "--max-queued-requests", "3"]
    found = settings(*words, "--drain-timeout-s", "5", "--hang-timeout-s", "6", "--restart-timeout-s", "7")
    expected = {
        "host": "0.0.0.0", "port": 8123, "names": ("a", "b"), "api_keys": ("one", "two"), "max_body_bytes": 1 << 19,
        "chat_template": "{{ messages[0]['content'] }}", "cors_origins": ("https://a.example",), "access_log": False,
        "any_model": True, "root_path": "/llm", "metrics_prefix": "x:", "keep_alive_s": 80, "max_queued_requests": 3,
        "drain_timeout_s": 5.0, "hang_timeout_s": 6.0, "restart_timeout_s": 7.0, "supervised": False,
    }  # fmt: skip
    assert {name: getattr(found, name) for name in expected} == expected
    assert found.engine_socket.endswith(f"/0.0.0.0-8123.{os.getpid()}.sock")


def test_the_environment_has_keys_and_says_whether_there_is_a_supervisor(tmp_path: Path) -> None:
    assert settings().api_keys == ()
    found = settings(**{KEYS_VARIABLE: "a, b,", JOB_VARIABLE: "run.1"})
    assert found.api_keys == ("a", "b") and found.supervised
    assert found == settings(**{KEYS_VARIABLE: "a, b,", JOB_VARIABLE: "run.2"})  # the next attempt finds the process
    assert found.engine_socket != settings(**{JOB_VARIABLE: "other.1"}).engine_socket
    (tmp_path / "keys").write_text("of the file")
    assert settings("--api-key-file", str(tmp_path / "keys"), **{KEYS_VARIABLE: "a"}).api_keys == ("of the file",)
    with pytest.raises(ConfigError, match="holds no key, and everyone would be served"):
        settings(**{KEYS_VARIABLE: " , "})


WRONG: list[tuple[list[str], str]] = [
    (["--port", "0"], "--port is 0; clients need a known one, give 1 to 65535"),
    (["--port", "65536"], "--port is 65536"),
    (["--port", "http"], "argument --port: invalid int value: 'http'"),
    (["--api-key-file", "FOLDER/nowhere"], "--api-key-file FOLDER/nowhere cannot be read: No such file"),
    (["--api-key-file", "FOLDER"], "--api-key-file FOLDER cannot be read: Is a directory"),
    (["--api-key-file", "FOLDER/empty"], "--api-key-file FOLDER/empty holds no key"),
    (["--api-key-file", "FOLDER/binary"], "--api-key-file FOLDER/binary cannot be read: it is no UTF-8 text"),
    (
        ["--api-key-file", "FOLDER/two bytes"],
        "--api-key-file FOLDER/two bytes: key 1 has characters that no client",
    ),
    (["--api-key-file", "FOLDER/pointer"], "--api-key-file FOLDER/pointer is a git-lfs pointer"),
    (["--chat-template", "FOLDER/empty"], "--chat-template FOLDER/empty writes no `messages`; give a Jinja template"),
    (["--chat-template", "FOLDER/page"], "--chat-template FOLDER/page writes no `messages`"),
    (
        ["--chat-template", "FOLDER/deep"],
        "--chat-template FOLDER/deep: the chat template of the model cannot be",
    ),
    (["--root-path", "llm"], "--root-path is 'llm'; give a path that begins with /"),
    (["--cors-origin", "https://a.example/"], "--cors-origin is 'https://a.example/'; give an origin without a path"),
    (["--metrics-prefix", "a b"], "--metrics-prefix is 'a b'; give letters"),
    (["--served-model-name", "\udcff"], "--host, --served-model-name and --cors-origin must be UTF-8 text"),
    (["--hang-timeout-s", "inf"], "--hang-timeout-s is inf: input should be a finite number"),
    (["--chat-template", "FOLDER/nowhere"], "--chat-template FOLDER/nowhere cannot be read: No such file"),
    (["--chat-template", "FOLDER/broken"], "--chat-template FOLDER/broken: "),
    (["--max-queued-requests", "0"], "--max-queued-requests is 0: input should be greater than or equal to 1"),
    (["--max-body-mib", "0"], "--max-body-mib is 0; give MiB above 0"),
    (["--max-body-mib", "nan"], "--max-body-mib is nan"),
    (["--drain-timeout-s", "-1"], "--drain-timeout-s is -1.0: input should be greater"),
    (["--hang-timeout-s", "nan"], "--hang-timeout-s is nan"),
    (["--prot", "80"], "unrecognized arguments: --prot 80"),
]


@pytest.mark.parametrize(
    ("words", "complaint"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_wrong_option_is_named(tmp_path: Path, words: list[str], complaint: str) -> None:
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "two bytes").write_bytes("key\n".encode("utf-16-le"))
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    (tmp_path / "page").write_text("<!DOCTYPE html>")
    (tmp_path / "deep").write_text("{% if messages %}" * 1000)
    (tmp_path / "broken").write_text("{% for x in %}")
    fill: Callable[[str], str] = lambda text: text.replace("FOLDER", str(tmp_path))  # noqa: E731
    with pytest.raises(ConfigError) as raised:
        settings(*map(fill, words))
    assert str(raised.value).startswith(fill(complaint)) and "\n" not in str(raised.value)


def test_a_temporary_folder_with_a_long_path_or_of_others_or_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings_module.tempfile, "gettempdir", lambda: str(tmp_path))
    settings()
    (folder,) = tmp_path.glob("stagdist-*")
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match="open to other users"):
        settings()
    folder.chmod(0o700)
    settings()
    with monkeypatch.context() as another, pytest.raises(ConfigError, match="belongs to another user"):
        another.setattr(settings_module.os, "getuid", lambda: folder.stat().st_uid + 1)
        settings()
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr(settings_module.tempfile, "gettempdir", lambda: str(long))
    with pytest.raises(ConfigError, match="too long for a socket; set TMPDIR"):
        settings()
    monkeypatch.setattr(settings_module.tempfile, "gettempdir", lambda: "/proc")  # which holds no new folders
    with pytest.raises(ConfigError, match="no folder for a socket: .*'/proc/stagdist-.*set TMPDIR"):
        settings()
