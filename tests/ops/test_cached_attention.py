"""Attention over a ring is the same softmax in blocks, at once, and by the kernel of a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lechat_jax.model.attention import attend, attend_cached
from lechat_jax.model.mask import window_mask
from lechat_jax.ops import attention_backend
from lechat_jax.ops.cached_attention_gpu import attend_in_chunk, fits

Arrays = tuple[jax.Array, ...]


def ring(B: int, T: int, S: int, K: int, window: int | None, length: int, dtype: str) -> Arrays:
    """Queries of the newest T of `length` tokens; what each slot holds, if any, is random."""
    N, H = 4, 16
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (B, T, N, H)).astype(dtype)
    k, v = (jax.random.normal(key, (B, K, S, H)).astype(dtype) for key in keys[1:])
    slots = np.full((B, S), -1, np.int32)
    for position in range(max(0, length - S), length):
        slots[:, position % S] = position
    newest = np.broadcast_to(np.arange(length - T, length, dtype=np.int32), (B, T))
    mask = window_mask(jnp.asarray(newest), jnp.asarray(slots), window)
    return q, k, v, mask, jnp.int32(min(length, S))


def by_definition(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> np.ndarray:
    wide = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (q, k, v)]
    return np.asarray(
        attend(wide[0], jnp.swapaxes(wide[1], 1, 2), jnp.swapaxes(wide[2], 1, 2), mask)
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("T", [1, 17])
@pytest.mark.parametrize("length", [20, 60, 200])  # a few blocks, most of them, a full ring
@pytest.mark.parametrize("window", [None, 11])
def test_in_blocks_it_is_the_same_softmax(
    monkeypatch: pytest.MonkeyPatch, window: int | None, length: int, T: int
) -> None:
    monkeypatch.setattr(attention_backend, "SLOTS", 16)  # a ring of 104 slots has half a block
    monkeypatch.setattr(attention_backend, "WHOLE", 64)
    q, k, v, mask, used = ring(2, T, 104, 2, window, length, "float64")
    found = attend_cached(q, k, v, mask, used)
    np.testing.assert_allclose(found, by_definition(q, k, v, mask), rtol=0, atol=1e-12)


def test_slots_that_hold_nothing_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_backend, "SLOTS", 16)
    q, k, v, mask, used = ring(1, 17, 104, 2, None, 20, "float32")
    expected = attend_cached(q, k, v, mask, used)
    k, v = (x.at[:, :, 32:].set(jnp.nan) for x in (k, v))
    np.testing.assert_array_equal(attend_cached(q, k, v, mask, used), expected)


@pytest.mark.parametrize("T", [1, 17])
def test_a_row_does_not_depend_on_how_long_another_is(
    monkeypatch: pytest.MonkeyPatch, T: int
) -> None:
    monkeypatch.setattr(attention_backend, "SLOTS", 16)
    monkeypatch.setattr(attention_backend, "WHOLE", 64)
    q, k, v, mask, _ = ring(1, T, 104, 2, None, 20, "float32")
    short, long = (attend_cached(q, k, v, mask, jnp.int32(used)) for used in (20, 104))
    np.testing.assert_array_equal(short, long)


@pytest.mark.parametrize("T", [16, 128])
@pytest.mark.parametrize("length", [130, 400])
@pytest.mark.parametrize("window", [None, 100])
def test_the_kernel_of_a_gpu_computes_the_same(window: int | None, length: int, T: int) -> None:
    q, k, v, mask, used = ring(2, T, 256, 2, window, length, "bfloat16")
    assert fits(q, k)
    found = attend_in_chunk(q, k, v, mask, used, interpret=True)
    np.testing.assert_allclose(found, by_definition(q, k, v, mask), rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    ("T", "S", "dtype"),
    [(1, 256, "bfloat16"), (48, 256, "bfloat16"), (16, 104, "bfloat16"), (16, 256, "float32")],
)
def test_what_the_kernel_cannot_do_is_left_to_xla(T: int, S: int, dtype: str) -> None:
    q, k, *_ = ring(1, T, S, 2, None, 60, dtype)
    assert not fits(q, k)
