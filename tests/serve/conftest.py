"""A small random model with a template that has tools, an engine and server for it, a browser."""

import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

from lechat_jax.config import MistralConfig
from lechat_jax.generate.loaded_model import LoadedModel
from lechat_jax.serve.api import Access, Api
from lechat_jax.serve.command import listen
from lechat_jax.serve.engine import Engine
from lechat_jax.serve.requests import Requests
from lechat_jax.serve.server import Server, configuration
from lechat_jax.tokenizer.tokenizer import Tokenizer
from tests.serve.fake_server import FakeServer
from tests.support.images import TOWER
from tests.support.models import random_model
from tests.support.tokenizers import small_tekken

if TYPE_CHECKING:  # there may be none, and then no test of the page either
    from playwright.sync_api import Browser, Page

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(small_tekken(tmp_path_factory.mktemp("tokenizer") / "tekken.json", "v13"))


@pytest.fixture(scope="session")
def model(tiny: MistralConfig, tokenizer: Tokenizer) -> LoadedModel:
    config = dataclasses.replace(
        tiny, n_layers=2, sliding_window=(None, 9), vocab_size=tokenizer.vocab_size
    )
    return LoadedModel(random_model(config), tokenizer, chunk=8, context=256)


@pytest.fixture(scope="session")
def seeing_model(model: LoadedModel) -> LoadedModel:
    """The model with a vision tower."""
    config = dataclasses.replace(model.config, vision=TOWER)
    return LoadedModel(random_model(config), model.tokenizer, chunk=8, context=256)


@pytest.fixture(scope="module")
def engine(model: LoadedModel) -> Iterator[Engine]:
    """Three rows and a prefix cache; its chunks have 8 tokens."""
    with Engine(model, 3, max_queue=8, prefix_bytes=2**20) as engine:
        yield engine


@dataclasses.dataclass
class Live:
    """A server that runs: its address, engine and application."""

    url: str
    engine: Engine


@contextlib.contextmanager
def live(engine: Engine, access: Access | None = None, buffer: int = 0) -> Iterator[Live]:
    """Serves an engine's model on a free port, from a thread of its own.

    With a `buffer`, its connections hold so many bytes that a client has not read.
    """
    access = access or Access(hosts=frozenset({"127.0.0.1"}))
    app = Api(engine, Requests(engine.model, "tiny", "fp_test")).app(access)
    listening = listen("127.0.0.1", 0)
    if buffer:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    server = Server(configuration(app))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Live(f"http://127.0.0.1:{listening.getsockname()[1]}", engine)
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Live]:
    with live(engine) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:
        yield client


@pytest.fixture(scope="module")
def http(server: Live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    from playwright.sync_api import expect, sync_playwright

    from tests.serve.browsing import executable

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu"]  # it may be root's, in a container
        path = executable(playwright)
        with playwright.chromium.launch(executable_path=path, args=flags) as browser:
            expect.set_options(timeout=15_000)
            yield browser


@pytest.fixture
def faults() -> Iterator[list[str]]:
    """What went wrong unseen; a test that wants something to go wrong takes it out."""
    faults: list[str] = []
    yield faults
    assert faults == []


@pytest.fixture
def page(browser: "Browser", server: FakeServer, faults: list[str]) -> Iterator["Page"]:
    """The page, opened by somebody whom the server has never seen."""
    from tests.serve.browsing import opened

    with opened(browser, server.address, faults) as page:
        yield page


def named(function: str) -> Any:
    return {"type": "function", "function": {"name": function}}


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    fields = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "seed": 1} | fields
    return client.chat.completions.create(**fields)


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    fields = {"model": "tiny", "prompt": "The cat", "max_tokens": 12, "seed": 1} | fields
    return client.completions.create(**fields)


def port(server: Live) -> int:
    return int(server.url.rpartition(":")[2])


def is_idle(server: Live) -> bool:
    """Whether nobody has a row, soon."""
    until = time.monotonic() + 20
    while server.engine.n_running + server.engine.n_waiting and time.monotonic() < until:
        time.sleep(0.01)
    return server.engine.n_running + server.engine.n_waiting == 0
