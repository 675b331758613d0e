"""Generation against the one thing it must equal: reading the whole text at once.

A text is generated, then scored in one pass with dense attention and no cache, and the
log-probabilities of its tokens are compared. Prompts end before, at and after the window,
and whole chunks do not fill them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lechat_jax.config import MistralConfig, Window
from lechat_jax.generate.continuation import Sample
from lechat_jax.generate.decode import idle_rows
from lechat_jax.generate.generator import Generator
from lechat_jax.generate.sampling import Sampling
from lechat_jax.model import cache
from lechat_jax.model.binding import Weights, bind, weights_of
from lechat_jax.model.cache import Ring
from lechat_jax.model.mistral import Mistral
from tests.support.models import random_model

W = 7
LENGTHS = (W - 1, W, W + 1, 2 * W + 3)
PLAIN = Sampling(temperature=1.0, top_p=1.0)

# Of each log-probability, in float64; in float32 absolute, and in proportion to the logits
# where their deviation is above 0.5. Measured: 8e-16 and 2e-6.
BUDGET = {"float64": 1e-11, "float32": 1e-5}


def prompt_of(length: int) -> list[int]:
    return np.random.default_rng(length).integers(97, size=length).tolist()


@functools.partial(jax.jit, static_argnums=0)
def forward(config: MistralConfig, weights: Weights, tokens: jax.Array) -> jax.Array:
    return bind(config, weights)(tokens, backend="dense")


def one_pass(model: Mistral, prompt: list[int], sample: Sample) -> tuple[np.ndarray, float]:
    """The log-probabilities of the new tokens, and the deviation of the logits."""
    text = prompt + sample.ids
    padded = jnp.array([text + [0] * (-len(text) % 64)])  # one program for all lengths
    logits = forward(model.config, weights_of(model), padded)[0, : len(text)]
    new = np.asarray(jax.nn.log_softmax(logits))[len(prompt) - 1 : -1]
    return new[np.arange(len(sample.ids)), sample.ids], float(logits.std())


def excess(made: Generator, reference: Mistral) -> list[float]:
    """How 3 W generated tokens differ from one pass, in units of the budget, for each prompt."""
    found = []
    for length in LENGTHS:
        prompt = prompt_of(length)
        (sample,) = made.generate([prompt], 3 * W, PLAIN)
        assert (len(sample.ids), sample.stopped) == (3 * W, "length")
        exact, deviation = one_pass(reference, prompt, sample)
        dtype = exact.dtype.name
        scale = np.abs(exact) if dtype == "float64" else max(1.0, 2 * deviation)
        difference = np.abs(np.array(sample.logprobs) - exact) / scale
        found.append(float(difference.max()) / BUDGET[dtype])
    return found


VARIANTS: dict[str, dict[str, Any]] = {
    "windows": {"sliding_window": (W, None, 3), "n_layers": 3},
    "no window": {"sliding_window": None},
    "tied, one kv head": {"tied_embeddings": True, "n_kv_heads": 1},
    "window of one, all kv heads": {"sliding_window": (W, 1), "n_kv_heads": 6},
}


@pytest.fixture(scope="module")
def tiny(tiny: MistralConfig) -> MistralConfig:
    return dataclasses.replace(tiny, n_layers=2)


@pytest.mark.parametrize("chunk", [4, pytest.param(32, marks=pytest.mark.slow)])
def test_decoding_past_the_window_is_one_pass_in_float64(
    tiny: MistralConfig, x64: None, chunk: int
) -> None:
    model = random_model(tiny, "float64")
    assert max(excess(Generator(model, chunk=chunk), model)) < 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_one_pass_in_float64(tiny: MistralConfig, x64: None, variant: str) -> None:
    model = random_model(dataclasses.replace(tiny, **VARIANTS[variant]), "float64")
    assert max(excess(Generator(model, chunk=5, context=40), model)) < 1


def test_float32_is_one_pass_but_for_rounding(tiny: MistralConfig) -> None:
    model = random_model(dataclasses.replace(tiny, **VARIANTS["windows"]))
    assert max(excess(Generator(model, chunk=5, context=40), model)) < 1


def test_a_window_that_is_off_by_one_would_be_seen(tiny: MistralConfig) -> None:
    model = random_model(tiny)
    made = Generator(model, chunk=4)
    assert max(excess(made, model)) < 1
    for other in (W - 1, W + 1):
        assert (
            min(excess(made, random_model(dataclasses.replace(tiny, sliding_window=other)))) > 1000
        )


def test_a_ring_that_is_too_small_would_be_seen(
    tiny: MistralConfig, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    model = random_model(tiny)
    claim = cache.Ring.claim
    compiled: Any = idle_rows
    request.addfinalizer(compiled.clear_cache)

    def unguarded(ring: Ring, positions: jax.Array, _: Window) -> Ring:
        return claim(ring, positions, None)

    def with_slots(slots: int) -> float:
        monkeypatch.setattr(cache, "capacity", lambda window, chunk, context: slots)
        compiled.clear_cache()  # which was traced for another
        return max(excess(Generator(model, chunk=5), model))

    monkeypatch.setattr(cache.Ring, "claim", unguarded)
    assert with_slots(W + 5 - 1) < 1  # the law, without its rounding to eights
    assert with_slots(W + 5 - 2) > 100


def test_prompts_of_a_batch_are_each_as_if_alone(tiny: MistralConfig) -> None:
    greedy = Sampling(temperature=0)
    made = Generator(
        random_model(dataclasses.replace(tiny, sliding_window=(W, None))), chunk=5, context=64
    )
    prompts = [prompt_of(length) for length in (9, 1, 17, 6, 2)]
    together = made.generate(prompts, 3 * W, greedy)
    for prompt, sample in zip(prompts, together, strict=True):
        (alone,) = made.generate([prompt], 3 * W, greedy)
        assert sample.ids == alone.ids
        np.testing.assert_allclose(sample.logprobs, alone.logprobs, rtol=0, atol=1e-5)


def test_a_greedy_text_is_the_likeliest_token_each_time(tiny: MistralConfig) -> None:
    model, prompt = random_model(tiny), prompt_of(9)
    (sample,) = Generator(model, chunk=4).generate([prompt], 3 * W, Sampling(temperature=0))
    logits = forward(tiny, weights_of(model), jnp.array([prompt + sample.ids]))
    assert logits[0, len(prompt) - 1 : -1].argmax(axis=-1).tolist() == sample.ids


def test_without_a_window_padding_takes_no_room_from_the_context(tiny: MistralConfig) -> None:
    model = random_model(dataclasses.replace(tiny, sliding_window=(W, None)))
    prompts = [prompt_of(11), prompt_of(1)]
    for prompt, sample in zip(
        prompts, Generator(model, chunk=5, context=24).generate(prompts, 23, PLAIN), strict=True
    ):
        assert len(prompt) + len(sample.ids) == 24
        exact, _ = one_pass(model, prompt, sample)
        np.testing.assert_allclose(sample.logprobs, exact, rtol=0, atol=1e-5)
