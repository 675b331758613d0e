"""Embeddings: pooled hidden states, of each text as if it were alone, through the command too."""

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import pytest

from lechat_jax.checkpoint.weights import save_weights
from lechat_jax.config import MistralConfig
from lechat_jax.embed import command
from lechat_jax.embed.embedder import Embedder, EmbeddingOptions, Pooling
from lechat_jax.errors import BadInput
from lechat_jax.model.binding import bind, weights_of
from lechat_jax.tokenizer.tokenizer import Tokenizer
from tests.support import tokenizers
from tests.support.models import random_model

TEXTS = ["abra", "cadabra " * 9, "", "abra cadabra, abra", "x"]


@pytest.fixture(scope="module")
def folder(tiny: MistralConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("weights")
    tokenizer = Tokenizer(tokenizers.taught(made))
    config = dataclasses.replace(tiny, n_layers=2, vocab_size=tokenizer.vocab_size)
    save_weights(made / "model", config, weights_of(random_model(config)), tokenizer.path)
    return made / "model"


def embedder(folder: Path, **how: Any) -> Embedder:
    return Embedder.from_checkpoint(folder, EmbeddingOptions(**how))


def hidden(one: Embedder, ids: list[int]) -> np.ndarray:
    is_causal = one.options.attention == "causal"
    model = bind(one.config, one.weights)
    program = jax.jit(lambda ids: model.hidden(ids, is_causal=is_causal))
    return np.asarray(program(np.array([ids]))[0], np.float64)


@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_a_vector_is_the_pooled_hidden_states_of_its_text(pooling: Pooling, folder: Path) -> None:
    one = embedder(folder, pooling=pooling, batch=2)
    ids = one.encode(TEXTS)
    for row, vector in zip(ids, one.embed(TEXTS), strict=True):
        states = hidden(one, row)
        expected = {
            "mean": states.mean(axis=0),
            "last": states[-1],
            "weighted": np.average(states, axis=0, weights=np.arange(1, len(row) + 1)),
        }[pooling]
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=2e-6)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_a_text_has_the_vector_that_it_has_alone(attention: Any, folder: Path) -> None:
    one = embedder(folder, attention=attention, batch=4)
    together = one.embed(TEXTS)
    alone = np.concatenate([one.embed([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(("attention", "sees"), [("causal", False), ("bidirectional", True)])
def test_only_bidirectional_attention_sees_what_comes_later(
    attention: Any, sees: bool, folder: Path
) -> None:
    one = embedder(folder, attention=attention)
    first, other = (hidden(one, ids)[0] for ids in ([1, 5, 6], [1, 5, 7]))
    assert (np.abs(first - other).max() > 1e-3) == sees


def test_a_long_text_is_cut_and_keeps_the_eos_that_is_pooled(folder: Path) -> None:
    one = embedder(folder, pooling="last", append_eos=True, max_tokens=5)
    long = one.encode(["cadabra " * 9])[0]
    short = [*long[:4], one.tokenizer.eos_id]
    np.testing.assert_array_equal(one.embed_ids([long]), one.embed_ids([short]))


@pytest.mark.parametrize("ids", [[], [1, 10**6], [-1]])
def test_ids_of_another_model_are_refused(ids: list[int], folder: Path) -> None:
    with pytest.raises(BadInput, match="the ids of a text must be"):
        embedder(folder).embed_ids([ids])


def test_the_command_writes_lines_or_an_array(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = embedder(folder).embed(["abra", "cadabra"])
    given = [str(folder), "--text", "abra", "--text", "cadabra"]
    assert command.main(given) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["index"] for line in lines] == [0, 1]
    assert [np.float32(line["embedding"]).tolist() for line in lines] == expected.tolist()
    assert command.main([*given, "--out", str(tmp_path / "a.npy")]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), expected)


def test_the_command_reads_records_and_tells_what_is_cut(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = tmp_path / "texts.jsonl"
    records.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("abra", "b " * 40)))
    out = tmp_path / "vectors.jsonl"
    flags = ["--data", str(records), "--max-tokens", "8", "--out", str(out)]
    assert command.main([str(folder), *flags]) == 0
    assert "1 of 2 texts have more than 8 tokens" in capsys.readouterr().err
    assert [json.loads(line)["tokens"] for line in out.read_text().splitlines()][1] == 8


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ([], "say what to embed"),
        (["--text", "a", "--data", "b"], "say what to embed"),
        (["--text", "a", "--out", "vectors.txt"], r"must end in \.npy or \.jsonl"),
        (["--text", "a", "--batch", "0"], "--batch must be at least 1"),
    ],
)
def test_bad_flags_are_a_sentence(flags: list[str], why: str, folder: Path) -> None:
    with pytest.raises(BadInput, match=why):
        command.main([str(folder), *flags])
