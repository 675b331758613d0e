"""Held-out text is scored once a token, in nats that bits per byte are made of.

Texts are in capitals, whose bytes are ids below 97, so that the tiny model can read them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lechat_jax.config import MistralConfig
from lechat_jax.data import held_out as held_out_rows
from lechat_jax.data.held_out import HeldOut
from lechat_jax.data.tokens import Tokens
from lechat_jax.devices.mesh import ROWS, make_mesh, settled
from lechat_jax.eval.score import Score, Validator
from lechat_jax.model.binding import Weights, bind, shapes_of
from lechat_jax.tokenizer.tokenizer import Tokenizer
from lechat_jax.train.step import StepOptions

TOKENIZER = Tokenizer.mistral_v1()
BOS, EOS, FIRST_BYTE = 1, 2, 3
T = 16  # tokens in a row
OPTIONS = StepOptions(chunk=20)
TEXT = "TO BE, OR NOT TO BE, THAT IS THE QUESTION: WHETHER 'TIS NOBLER IN THE MIND TO SUFFER "


@pytest.fixture(scope="module")
def small(tiny: MistralConfig) -> MistralConfig:
    return dataclasses.replace(tiny, n_layers=1)  # one layer compiles sooner


@pytest.fixture(autouse=True)
def short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out_rows, "BLOCK", T)


def held_out(n_tokens: int) -> Tokens:
    """Documents of 40 tokens, with BOS before and EOS after each, cut to that length."""
    letters = [FIRST_BYTE + ord(letter) for letter in TEXT * (1 + n_tokens // len(TEXT))]
    ids = [id_ for i in range(0, len(letters), 38) for id_ in (BOS, *letters[i : i + 38], EOS)]
    val = np.array(ids[:n_tokens], np.uint16)
    n_bytes = int((val >= FIRST_BYTE).sum())
    return Tokens(val[:1], val, n_bytes, "Hamlet", "1 file", n_bytes, "not looked at", False, "")


def validator(config: MistralConfig, n_tokens: int) -> Validator:
    return Validator(config, OPTIONS, HeldOut.of_text(held_out(n_tokens), TOKENIZER))


@functools.cache
def weights(config: MistralConfig, seed: int = 0) -> Weights:
    """Random ones, of a model that finds some tokens much likelier than others."""
    shapes = shapes_of(config)
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=leaf.shape) / math.sqrt(leaf.shape[-1]), jnp.float32)
        for name, leaf in shapes.items()
    }


def uniform(config: MistralConfig) -> Weights:
    """Weights of a model that finds every token equally likely."""
    return weights(config) | {"head.kernel": jnp.zeros((config.vocab_size, config.dim))}


def full(validator: Validator, weights: Weights) -> Score:
    return validator.full(weights, lambda done, of: None)


@functools.cache
def forward(config: MistralConfig) -> Callable[[Weights, jax.Array], jax.Array]:
    return jax.jit(lambda weights, row: bind(config, weights)(row[None])[0])


def naive_nats(config: MistralConfig, weights: Weights, val: np.ndarray) -> list[float]:
    """Of each row: its tokens but BOS, given those before them in the row."""
    rows = []
    for first in range(0, len(val) - 1, T):
        targets = val[first + 1 : first + 1 + T].astype(np.int64)
        inputs = np.full(T, BOS, np.int32)
        inputs[: len(targets)] = val[first : first + len(targets)]
        z = np.asarray(forward(config)(weights, jnp.asarray(inputs)), np.float64)
        log_p = (z - np.log(np.exp(z).sum(axis=1, keepdims=True)))[np.arange(len(targets)), targets]
        rows.append(float(-log_p[targets != BOS].sum()))
    return rows


# --- the score ---


def test_a_score_is_nats_a_token_and_bits_a_byte() -> None:
    score = Score(nats=6.0, tokens=4, n_bytes=12)
    assert score.metrics() == {
        "val/loss": 1.5,
        "val/bpb": pytest.approx(0.5 / math.log(2), rel=1e-15),
        "val/tokens": 4,
        "val/bytes": 12,
    }


# Rows of one token, just full, one token more, and more rows than one batch holds.
@pytest.mark.parametrize("n_tokens", [2, 16, 17, 18, 41, 64, 65, 100, 333])
def test_every_token_but_bos_is_scored_once(small: MistralConfig, n_tokens: int) -> None:
    held = held_out(n_tokens)
    n_scored = int((held.val != BOS).sum())
    score = full(validator(small, n_tokens), uniform(small))
    assert (score.tokens, score.n_bytes) == (n_scored, held.val_bytes)
    assert score.nats == pytest.approx(n_scored * math.log(97), rel=1e-6)
    assert score.bits_per_byte == pytest.approx(math.log2(97) * n_scored / held.val_bytes, rel=1e-6)


@pytest.mark.parametrize("n_tokens", [30, 333])
def test_the_full_score_is_that_of_a_row_at_a_time(small: MistralConfig, n_tokens: int) -> None:
    score = full(validator(small, n_tokens), weights(small))
    expected = sum(naive_nats(small, weights(small), held_out(n_tokens).val))
    assert score.nats == pytest.approx(expected, rel=1e-6)


def test_progress_counts_the_rows(small: MistralConfig) -> None:
    heard: list[tuple[int, int]] = []
    validator(small, 100).full(uniform(small), lambda done, of: heard.append((done, of)))
    assert heard == [(4, 7), (7, 7)]


# --- where there is no time for all ---


@pytest.mark.parametrize("most", [1, 50, 100, 10_000])
def test_of_a_bounded_score_the_same_rows_are_taken_evenly_spread(
    small: MistralConfig, most: int
) -> None:
    """Of 21 rows: the first, one in the middle, then the quarters, until there is enough."""
    long, val = validator(small, 333), held_out(333).val
    order = [0, 16, 8, 4, 20, 12, 2, 18, 10, 6, 14, 1, 17, 9, 5, 13, 3, 19, 11, 7, 15]
    each = [val[1 + T * row : 1 + T * (row + 1)] for row in order]
    sizes = np.cumsum([(ids != BOS).sum() for ids in each])
    n = 1 + int((sizes < most).sum()) if most < sizes[-1] else len(order)
    score = long.full(weights(small), lambda done, of: None, most)
    assert score.tokens == sizes[n - 1]
    assert score.n_bytes == sum((ids >= FIRST_BYTE).sum() for ids in each[:n])
    nats = naive_nats(small, weights(small), val)
    assert score.nats == pytest.approx(sum(nats[row] for row in order[:n]), rel=1e-6)
    assert long.full(weights(small), lambda done, of: None, score.tokens) == score


def test_a_score_that_is_ended_is_of_what_was_scored(small: MistralConfig) -> None:
    long, heard = validator(small, 333), []
    ended = long.full(uniform(small), lambda done, of: heard.append((done, of)), None, lambda: True)
    assert heard == [(4, 21)]
    assert ended == long.full(uniform(small), lambda done, of: None, ended.tokens)
    assert ended.nats == pytest.approx(ended.tokens * math.log(97), rel=1e-6)


# --- during training ---


def test_the_interim_score_takes_the_same_rows_of_any_model(small: MistralConfig) -> None:
    short = validator(small, 333)  # 21 rows
    val, chosen = held_out(333).val, [1, 3, 6, 9, 11, 14, 17, 19]
    for model in (weights(small), weights(small, seed=1)):
        rows = naive_nats(small, model, val)
        score = short.interim(model)
        assert score.nats == pytest.approx(sum(rows[i] for i in chosen), rel=1e-6)
        scored = np.concatenate([val[1 + T * i : 1 + T * (i + 1)] for i in chosen])
        assert score.tokens == (scored != BOS).sum()
        assert score.n_bytes == (scored >= FIRST_BYTE).sum()
        assert short.interim(model) == score


def test_of_a_short_text_the_interim_score_is_the_full_one(small: MistralConfig) -> None:
    short = validator(small, 100)
    interim, whole = short.interim(weights(small)), full(short, weights(small))
    assert (interim.tokens, interim.n_bytes) == (whole.tokens, whole.n_bytes)
    assert interim.nats == pytest.approx(whole.nats, rel=1e-6)  # summed in another order


# --- on many devices ---


@pytest.mark.parametrize("mesh", ["fsdp=8", "fsdp=2,tp=2"])
def test_more_devices_than_rows_score_what_one_does(small: MistralConfig, mesh: str) -> None:
    """A batch is filled up until each has a row, however few there are."""
    config = dataclasses.replace(small, vocab_size=98)
    where = make_mesh(mesh)
    held = HeldOut.of_text(held_out(41), TOKENIZER)  # three rows
    options = dataclasses.replace(OPTIONS, mesh=where)
    spread = Validator(config, options, held)
    assert spread.batch % where.shape[ROWS] == 0
    assert spread.batch >= max(4, where.shape[ROWS])
    found = full(spread, settled(where, weights(config)))
    expected = full(Validator(config, OPTIONS, held), weights(config))
    assert (found.tokens, found.n_bytes) == (expected.tokens, expected.n_bytes)
    assert found.nats == pytest.approx(expected.nats, rel=1e-6)
