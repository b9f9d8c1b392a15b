"""Fixtures: one real model server and one proxy process for all tests here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import openai
import pytest

from .demo_model import RunningProxy, run_proxy
from .model_server import run_model_server


@pytest.fixture(scope="session")
def model_port() -> Iterator[int]:
    with run_model_server() as port:
        yield port


@pytest.fixture(scope="session")
def direct_url(model_port: int) -> str:
    """Return the URL of the model server itself, without the proxy."""
    return f"http://127.0.0.1:{model_port}"


@pytest.fixture(scope="session")
def proxy(model_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningProxy]:
    folder: Path = tmp_path_factory.mktemp("proxy")
    with run_proxy(folder, model_port) as running:
        yield running


@pytest.fixture
def client(proxy: RunningProxy) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key=proxy.key, max_retries=0) as made:
        yield made


@pytest.fixture
async def async_client(proxy: RunningProxy) -> AsyncIterator[openai.AsyncOpenAI]:
    made = openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key=proxy.key, max_retries=0)
    async with made:
        yield made
