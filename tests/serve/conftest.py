"""A small random model with a template that has tools, and an engine that serves it."""

import dataclasses
from collections.abc import Iterator

import pytest

from lechat_jax.config import MistralConfig
from lechat_jax.generate.loaded_model import LoadedModel
from lechat_jax.tokenizer.tokenizer import Tokenizer
from tests.support.models import random_model
from tests.support.tokenizers import small_tekken

pytest.importorskip("starlette")
pytest.importorskip("llguidance")

from lechat_jax.serve.engine import Engine


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
