"""The two hot functions: what they are given up, copy, count and return."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from lechat_jax.checkpoint.weights import weight_shapes
from lechat_jax.config import MistralConfig, preset
from lechat_jax.generate.decode import MOST, DecodeState, Produced, Request, decode, prefill
from lechat_jax.generate.prefill import chunk_of
from lechat_jax.generate.prompt_lookup import SEEN
from lechat_jax.generate.sampling import Sampling
from lechat_jax.model.binding import Weights, weights_of
from lechat_jax.model.cache import EMPTY, empty_cache
from lechat_jax.quantize.scheme import INT8, Form
from tests.support.models import random_model


def test_a_prompt_is_read_in_chunks_without_its_last_token() -> None:
    """Whole chunks from where reading starts; behind the last token there is padding."""
    prompt = [11, 12, 13, 14, 15, 16]
    read = [chunk_of(prompt, at, chunk=3) for at in (0, 3, 4)]
    assert [tokens.tolist() for tokens, _ in read] == [[[11, 12, 13]], [[14, 15, 0]], [[15, 0, 0]]]
    assert [where.tolist() for _, where in read] == [[[0, 1, 2]], [[3, 4, -1]], [[4, -1, -1]]]


@pytest.fixture(scope="module")
def weights(tiny: MistralConfig) -> Weights:
    return weights_of(random_model(tiny))


def start(config: MistralConfig, left: list[int], dtype: str = "float32") -> DecodeState:
    """Rows at the first token of their text, which is their row number."""
    B = len(left)
    cache = empty_cache(config, B, chunk=4, context=64, dtype=dtype)
    nobody = jnp.zeros((B, 0), jnp.int32)
    return DecodeState(cache, jnp.arange(B), jnp.zeros(B, jnp.int32), jnp.array(left), nobody)


def request(config: MistralConfig, B: int, ends: tuple[int, ...] = ()) -> Request:
    greedy = Sampling(temperature=0)
    is_end = jnp.asarray(np.isin(np.arange(config.vocab_size), ends))
    return Request(greedy.controls(B), greedy.streams(B), jnp.tile(is_end, (B, 1)))


def run(
    config: MistralConfig, weights: Weights, left: list[int], calls: list[int], ends: tuple = ()
) -> tuple[DecodeState, list[Produced]]:
    state, produced = start(config, left), []
    for n in calls:
        state, out = decode(config, weights, state, request(config, len(left), ends), jnp.int32(n))
        produced.append(out)
    return state, produced


def texts(produced: list[Produced]) -> list[list[int]]:
    rows = zip(
        *[zip(out.ids.tolist(), out.length.tolist(), strict=True) for out in produced], strict=True
    )
    return [[id_ for ids, length in row for id_ in ids[:length]] for row in rows]


def test_a_text_does_not_depend_on_how_it_is_cut_into_calls(
    tiny: MistralConfig, weights: Weights
) -> None:
    state, produced = run(tiny, weights, [20, 20], [20])
    again, pieces = run(tiny, weights, [20, 20], [1, 7, 0, 5, 64])
    assert texts(produced) == texts(pieces)
    assert [len(text) for text in texts(pieces)] == [20, 20]
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


def test_rows_stop_when_they_have_enough_and_the_call_when_all_do(
    tiny: MistralConfig, weights: Weights
) -> None:
    state, (out,) = run(tiny, weights, [3, 0, 9], [30])
    assert out.length.tolist() == [3, 0, 9]
    assert state.left.tolist() == [0, 0, 0]
    assert state.position.tolist() == [3, 0, 9]
    assert out.steps == 9  # and not 30
    beyond = np.arange(MOST) >= np.array([[3], [0], [9]])
    assert not np.asarray(out.ids)[beyond].any()
    assert not np.asarray(out.logprobs)[beyond].any()


def test_a_row_is_the_same_whether_others_are_done_or_not(
    tiny: MistralConfig, weights: Weights
) -> None:
    _, together = run(tiny, weights, [2, 20, 5], [20])
    _, longer = run(tiny, weights, [20, 20, 20], [20])
    assert texts(together)[1] == texts(longer)[1]
    assert texts(longer)[0][:2] == texts(together)[0]


def test_a_token_that_ends_a_text_is_its_last(tiny: MistralConfig, weights: Weights) -> None:
    _, (out,) = run(tiny, weights, [20], [20])
    (text,) = texts([out])
    end = text[6]
    state, (out,) = run(tiny, weights, [20], [20], ends=(end,))
    assert texts([out]) == [text[: text.index(end) + 1]]
    assert state.left.tolist() == [0]


def large(config: MistralConfig, n_layers: int, window: int) -> MistralConfig:
    """The tiny model with a cache that outweighs all else it needs."""
    return dataclasses.replace(
        config, n_layers=n_layers, n_kv_heads=3, head_dim=128, sliding_window=window
    )


def decode_memory(config: MistralConfig, B: int, draft: int) -> tuple[int, int, int]:
    """Bytes of the cache, of what the compiled decode updates in place, and of its scratch."""

    def shapes() -> tuple[Weights, DecodeState, Request]:
        state = start(config, [1] * B)
        seen = jnp.zeros((B, SEEN if draft else 0), jnp.int32)
        return weights_of(random_model(config)), state._replace(seen=seen), request(config, B)

    weights, state, asked = jax.eval_shape(shapes)
    n = jax.ShapeDtypeStruct((), jnp.int32)
    memory = decode.lower(config, weights, state, asked, n, draft).compile().memory_analysis()
    assert memory is not None
    cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache))
    return cache, memory.alias_size_in_bytes, memory.temp_size_in_bytes


@pytest.mark.parametrize(("B", "draft"), [(1, 0), (8, 0), (1, 3), (8, 7)])
def test_a_token_does_not_copy_the_cache(tiny: MistralConfig, B: int, draft: int) -> None:
    """Neither the keys nor the values of a layer; what scratch there is are scores."""
    config = large(tiny, n_layers=4, window=4096)
    cache, in_place, scratch = decode_memory(config, B, draft)
    assert in_place >= cache
    assert scratch < cache / (2 * 4)  # measured: 0.06 to 0.5 of that


@pytest.mark.parametrize(
    ("form", "n_experts"), [(INT8, 0), (Form("int4", 32), 0), (None, 4)], ids=str
)
def test_reading_a_prompt_takes_memory_for_one_layer_at_a_time(
    form: Form | None, n_experts: int
) -> None:
    """Whatever the loops of a layer write over is made when its turn comes."""

    def scratch(n_layers: int) -> int:
        config = dataclasses.replace(
            preset("lechat-15m"),
            n_layers=n_layers,
            n_experts=n_experts,
            n_experts_per_token=min(2, n_experts),
        )
        weights = weight_shapes(config, form)
        cache = jax.eval_shape(lambda: empty_cache(config, 1, 64, 64, "float32"))
        row, tokens = (jax.ShapeDtypeStruct(dims, jnp.int32) for dims in ((), (1, 64)))
        lowered = prefill.lower(config, weights, cache, row, tokens, tokens)
        memory = lowered.compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert scratch(n_layers=8) < 1.1 * scratch(n_layers=4)


def test_what_is_passed_in_is_given_up(tiny: MistralConfig, weights: Weights) -> None:
    state = start(tiny, [4])
    after, _ = decode(tiny, weights, state, request(tiny, 1), jnp.int32(2))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.cache))
    rows = jnp.zeros((1, 4), jnp.int32)
    later = prefill(tiny, weights, after.cache, jnp.int32(0), rows, jnp.full((1, 4), EMPTY))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(after.cache))
    assert not any(leaf.is_deleted() for leaf in [*weights.values(), *jax.tree.leaves(later)])


def test_padding_alone_changes_nothing_that_is_seen(tiny: MistralConfig, weights: Weights) -> None:
    """A chunk of padding, even in the middle of a text, is as if it had not been."""

    def continued(pad: bool) -> Array:
        state, _ = decode(tiny, weights, start(tiny, [9]), request(tiny, 1), jnp.int32(3))
        if pad:
            rows = jnp.zeros((1, 1), jnp.int32)
            where = jnp.full((1, 1), EMPTY)
            cache = prefill(tiny, weights, state.cache, jnp.int32(0), rows, where)
            state = state._replace(cache=cache)
        return decode(tiny, weights, state, request(tiny, 1), jnp.int32(6))[1].logprobs

    np.testing.assert_allclose(continued(pad=True), continued(pad=False), rtol=1e-5)
