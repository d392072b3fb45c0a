"""One HTTP process with a scripted engine for all tests that change neither."""

from collections.abc import Iterator

import httpx
import pytest

from tests.serving.scripted_engine import HttpServer, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    """A server whose engine answers with letters."""
    with serving(tmp_path_factory.mktemp("http")) as running:
        yield running


@pytest.fixture(scope="module")
def http(server: HttpServer) -> Iterator[httpx.Client]:
    """A client of `server`."""
    with server.client() as client:
        yield client
