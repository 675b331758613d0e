"""The ring: what it remembers, what it forgets, and how many slots that takes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lechat_jax.config import MistralConfig, preset
from lechat_jax.generate.prefill import cache_size
from lechat_jax.model.cache import (
    EMPTY,
    Cache,
    Place,
    Ring,
    cache_bytes,
    capacity,
    distinct_windows,
    empty_cache,
    places,
)
from lechat_jax.model.mask import window_mask


def ring_of(slots: int, n_layers: int = 1, batch: int = 1) -> Ring:
    """An empty ring whose keys and values are single numbers: K = H = 1."""
    zeros = (jnp.zeros((batch, 1, slots, 1)),) * n_layers
    return Ring(zeros, zeros, jnp.full((batch, slots), EMPTY))


def put(ring: Ring, positions: list[int], layer: int = 0) -> Ring:
    """One chunk of one row: the key at position p is p + 0.25, the value p + 0.5."""
    at = jnp.array([positions])
    ring = ring.claim(at, None)
    x = jnp.array(positions, jnp.float32)[None, :, None, None]
    return ring.write(layer, at, x + 0.25, x + 0.5)


def test_a_ring_is_written_in_order_and_wraps() -> None:
    ring = ring_of(slots=4)
    for positions, expected in [
        ([0, 1, 2], [0, 1, 2, -1]),
        ([3], [0, 1, 2, 3]),
        ([4], [4, 1, 2, 3]),
        ([5, 6, 7], [4, 5, 6, 7]),
        ([8, 9], [8, 9, 6, 7]),
        ([10, 11, 12], [12, 9, 10, 11]),  # round the end
        ([EMPTY, EMPTY, 13], [12, 13, 10, 11]),  # padding is nowhere
        ([EMPTY], [12, 13, 10, 11]),
        ([12, 13, 14], [12, 13, 14, 11]),  # two that were guesses, once more
    ]:
        ring = put(ring, positions)
        assert ring.position.tolist() == [expected]
        k, v = ring.read(0)
        held = ring.position[0] >= 0
        np.testing.assert_array_equal(k[0, 0, held, 0], ring.position[0, held] + 0.25)
        np.testing.assert_array_equal(v[0, 0, held, 0], ring.position[0, held] + 0.5)


def test_layers_of_a_ring_and_rows_of_a_batch_are_apart() -> None:
    ring = ring_of(slots=4, n_layers=3, batch=2)
    k = jnp.array([[1.0, 2.0], [3.0, 4.0]])[:, :, None, None]
    ring = ring.write(1, jnp.array([[3, 4], [5, 6]]), k, -k)
    assert [keys[:, 0, :, 0].tolist() for keys in ring.k] == [
        [[0, 0, 0, 0], [0, 0, 0, 0]],
        [[2, 0, 0, 1], [0, 3, 4, 0]],
        [[0, 0, 0, 0], [0, 0, 0, 0]],
    ]
    for keys, values in zip(ring.k, ring.v, strict=True):
        np.testing.assert_array_equal(values, -keys)


def test_heads_and_lanes_come_back_as_they_were_written() -> None:
    zeros = (jnp.zeros((2, 3, 8, 5)),)
    ring = Ring(zeros, zeros, jnp.full((2, 8), EMPTY))
    k = jax.random.normal(jax.random.key(0), (2, 4, 3, 5))
    positions = jnp.array([[6, 7, 8, 9]] * 2)
    read_k, read_v = ring.write(0, positions, k, 2 * k).read(0)
    written = jnp.swapaxes(k, 1, 2)
    np.testing.assert_array_equal(read_k[:, :, jnp.array([6, 7, 0, 1])], written)
    np.testing.assert_array_equal(read_v[:, :, jnp.array([6, 7, 0, 1])], 2 * written)


@pytest.mark.parametrize(("T", "window"), [(4, 6), (9, None), (9, 1)])
def test_more_tokens_than_the_ring_was_made_for_are_refused(T: int, window: int | None) -> None:
    ring = ring_of(slots=8)
    ring.claim(jnp.arange(T - 1)[None], window)
    with pytest.raises(ValueError, match=f"{T} tokens at once are too many for a ring of 8 slots"):
        ring.claim(jnp.arange(T)[None], window)


@given(st.integers(1, 9), st.lists(st.integers(1, 5), min_size=1, max_size=12))
def test_every_query_finds_its_whole_window(window: int, chunks: list[int]) -> None:
    """Chunks of any sizes, in any order: W + T - 1 slots for the largest T are enough."""
    ring = ring_of(slots=window + max(chunks) - 1)
    length = 0
    for size in chunks:
        new = list(range(length, length + size))
        ring = ring.claim(jnp.array([new]), window)
        length += size
        held = ring.position[0].tolist()
        for query in new:
            assert set(range(max(0, query - window + 1), query + 1)) <= set(held)
            assert sum(
                query - window < position <= query for position in held if position >= 0
            ) == min(window, query + 1)


def test_one_slot_less_loses_a_key_that_is_still_needed() -> None:
    # W = 4, T = 3: query 7 needs key 4, which the chunk 7 8 9 overwrites in a ring of 5.
    def keys_of_query_7(slots: int) -> list[int]:
        ring = ring_of(slots)
        for chunk in [[0], [1, 2, 3], [4, 5, 6], [7, 8, 9]]:
            ring = put(ring, chunk)
        seen = np.asarray(window_mask(jnp.array([[7]]), ring.position, 4))[0, 0]
        return sorted(np.asarray(ring.position)[0, seen].tolist())

    assert keys_of_query_7(slots=6) == [4, 5, 6, 7]
    assert keys_of_query_7(slots=5) == [5, 6, 7]


@given(st.integers(1, 5000), st.integers(1, 512), st.integers(1, 9000))
def test_capacity_follows_the_law(window: int, chunk: int, context: int) -> None:
    windowed, full = capacity(window, chunk, context), capacity(None, chunk, context)
    for slots, needed in ((windowed, window + chunk - 1), (full, max(context, chunk))):
        step = 8 if needed <= 1024 else 128  # large ones in whole blocks of a kernel
        assert needed <= slots < needed + step
        assert slots % step == 0


def test_layers_with_one_window_share_a_ring(tiny: MistralConfig) -> None:
    config = dataclasses.replace(tiny, n_layers=5, sliding_window=(7, None, 7, 3, None))
    assert distinct_windows(config) == (7, None, 3)
    assert places(config) == (Place(0, 0), Place(1, 0), Place(0, 1), Place(2, 0), Place(1, 1))
    cache = empty_cache(config, batch=2, chunk=4, context=50, dtype=jnp.bfloat16)
    assert [[keys.shape for keys in ring.k] for ring in cache.rings] == [
        [(2, 2, 16, 8)] * 2,
        [(2, 2, 56, 8)] * 2,
        [(2, 2, 8, 8)],
    ]
    assert {values.dtype for ring in cache.rings for values in ring.v} == {cache.dtype}
    assert cache.dtype == jnp.bfloat16
    assert all((ring.position == EMPTY).all() for ring in cache.rings)


def test_memory_is_known_before_it_is_taken(tiny: MistralConfig) -> None:
    # Mistral 7B: 131,072 bytes a cached token in bfloat16, here 4096 + 255 tokens in eights.
    large = preset("mistral-7b-v0.1")
    assert cache_bytes(large, 1, 256, 1, jnp.bfloat16) == 4352 * (131_072 + 4)
    made = empty_cache(tiny, 3, 5, 1, jnp.float32)
    assert cache_bytes(tiny, 3, 5, 1, jnp.float32) == sum(x.nbytes for x in jax.tree.leaves(made))


def test_a_cache_is_a_pytree_that_jit_takes_and_returns(tiny: MistralConfig) -> None:
    cache = empty_cache(tiny, 1, 4, 1, jnp.float32)
    same = jax.jit(lambda c: c.claim(tiny, jnp.array([[5]])))(cache)
    assert isinstance(same, Cache)
    assert same.rings[0].position[0, 4:7].tolist() == [EMPTY, 5, EMPTY]
    assert same.rings[0].capacity == 16


# --- what a prompt asks of it ---


@pytest.mark.parametrize(
    ("platform", "dtype", "expected"),
    [
        ("cpu", "bfloat16", "float32"),  # which a CPU would convert, all of it, at every token
        ("cpu", "float32", "float32"),
        ("gpu", "bfloat16", "bfloat16"),
        ("gpu", "float32", "float32"),
    ],
)
def test_keys_are_kept_in_what_is_computed_in(
    tiny: MistralConfig, platform: str, dtype: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    weights = {"norm.scale": jax.ShapeDtypeStruct((40,), dtype)}
    for chunk, draft, wide in ((8, 3, 8), (2, 5, 6), (1, 0, 1)):
        size = cache_size(tiny, weights, 2, chunk, 50, draft)
        assert size == (tiny, 2, wide, 50 + draft, jnp.dtype(expected))
