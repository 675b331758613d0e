"""A small random model with a template that has tools, and an engine and server for it."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator

import pytest

from lechat_jax.config import MistralConfig
from lechat_jax.generate.loaded_model import LoadedModel
from lechat_jax.serve.api import Access, Api
from lechat_jax.serve.command import listen
from lechat_jax.serve.engine import Engine
from lechat_jax.serve.requests import Requests
from lechat_jax.serve.server import Server, configuration
from lechat_jax.tokenizer.tokenizer import Tokenizer
from tests.support.models import random_model
from tests.support.tokenizers import small_tekken


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(small_tekken(tmp_path_factory.mktemp("tokenizer") / "tekken.json", "v13"))


@pytest.fixture(scope="session")
def model(tiny: MistralConfig, tokenizer: Tokenizer) -> LoadedModel:
    config = dataclasses.replace(
        tiny, n_layers=2, sliding_window=(None, 9), vocab_size=tokenizer.vocab_size
    )
    return LoadedModel(random_model(config), tokenizer, chunk=8, context=256)


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
def live(engine: Engine, access: Access | None = None) -> Iterator[Live]:
    """Serves an engine's model on a free port, from a thread of its own."""
    access = access or Access(hosts=frozenset({"127.0.0.1"}))
    app = Api(engine, Requests(engine.model, "tiny", "fp_test")).app(access)
    listening = listen("127.0.0.1", 0)
    server = Server(configuration(app))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield Live(f"http://127.0.0.1:{listening.getsockname()[1]}", engine)
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Live]:
    with live(engine) as server:
        yield server
