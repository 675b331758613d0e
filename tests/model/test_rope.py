"""Rotary embeddings against complex multiplication, which they are, written in NumPy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lechat_jax.config import Llama4Scaling, MistralConfig, Yarn
from lechat_jax.model.rope import rotate, rotation, rotations

HEAD_DIM, THETA = 8, 1e4
POSITION = st.integers(0, 5000)


def turned(x: np.ndarray, position: int, theta: float = THETA) -> np.ndarray:
    """One head of width H as H/2 complex numbers, lane h with lane h + H/2, each turned."""
    half = x.shape[-1] // 2
    angle = position * theta ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=-1)


def head(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(HEAD_DIM)


def rotated(x: np.ndarray, position: int) -> np.ndarray:
    """One head at one position through the real thing, in float32."""
    rotary = rotation(jnp.array([[position]]), HEAD_DIM, THETA, jnp.float32)
    return np.asarray(rotate(jnp.asarray(x, jnp.float32)[None, None, None], rotary))[0, 0, 0]


def test_one_pair_of_lanes_turns_by_one_radian_a_position() -> None:
    rotary = rotation(jnp.array([[0, 1, 2]]), head_dim=2, theta=123.0, dtype=jnp.float32)
    x = jnp.tile(jnp.array([1.0, 0.0]), (1, 3, 1, 1))
    np.testing.assert_allclose(
        rotate(x, rotary)[0, :, 0],
        [[1.0, 0.0], [0.54030231, 0.84147098], [-0.41614684, 0.90929743]],
        rtol=1e-6,
    )


def test_lane_h_is_paired_with_lane_h_plus_half_and_turns_slower() -> None:
    # Position 100, theta 10^4, H = 4: lane 0 turns by 100 rad, lane 1 by 1 rad.
    rotary = rotation(jnp.array([[100]]), head_dim=4, theta=1e4, dtype=jnp.float32)
    x = jnp.array([0.0, 1.0, 0.0, 0.0])[None, None, None]
    np.testing.assert_allclose(
        rotate(x, rotary)[0, 0, 0], [0.0, 0.54030231, 0.0, 0.84147098], rtol=1e-6
    )


def test_a_batch_of_heads_is_turned_as_complex_numbers_are(x64: None) -> None:
    x = np.random.default_rng(0).standard_normal((2, 5, 3, HEAD_DIM))
    positions = np.array([[0, 1, 2, 3, 4], [1000, 7, 99999, 12, 1 << 20]])
    rotary = rotation(jnp.asarray(positions), HEAD_DIM, THETA, jnp.float64)
    expected = [[turned(x[b, t], int(positions[b, t])) for t in range(5)] for b in range(2)]
    assert rotary.cos.dtype == jnp.float64
    np.testing.assert_allclose(rotate(jnp.asarray(x), rotary), expected, atol=1e-9, rtol=0)
    near = rotation(jnp.arange(100)[None], HEAD_DIM, THETA, jnp.float64)
    angle = np.arange(100)[:, None] * THETA ** (-np.arange(4) / 4)
    np.testing.assert_allclose(near.sin[0], np.sin(angle), atol=1e-13, rtol=0)


@given(POSITION, st.integers(0, 9))
def test_lengths_are_kept(position: int, seed: int) -> None:
    x = head(seed)
    assert np.linalg.norm(rotated(x, position)) == pytest.approx(np.linalg.norm(x), rel=1e-5)


@given(POSITION, POSITION, st.integers(0, 5000))
def test_products_depend_on_the_distance_alone(q_pos: int, k_pos: int, shift: int) -> None:
    q, k = head(1), head(2)
    here = rotated(q, q_pos) @ rotated(k, k_pos)
    there = rotated(q, q_pos + shift) @ rotated(k, k_pos + shift)
    assert here == pytest.approx(there, abs=5e-3)  # float32 angles up to 10,000 rad
    assert here == pytest.approx(turned(q, q_pos - k_pos) @ k, abs=5e-3)


def test_bfloat16_does_not_confuse_neighbouring_positions() -> None:
    # 257 is not a bfloat16: it would be 256, and every odd position after it wrong.
    positions = jnp.array([[256, 257, 4097]])
    rotary = rotation(positions, HEAD_DIM, THETA, jnp.bfloat16)
    exact = rotation(positions, HEAD_DIM, THETA, jnp.float32)
    assert rotary.cos.dtype == jnp.float32
    np.testing.assert_array_equal(rotary.cos, exact.cos)
    assert not np.array_equal(rotary.cos[0, 0], rotary.cos[0, 1])
    x = jnp.ones((1, 3, 1, HEAD_DIM), jnp.bfloat16)
    assert rotate(x, rotary).dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        rotate(x, rotary), rotate(x.astype(jnp.float32), rotary).astype(jnp.bfloat16)
    )


def test_every_head_at_a_position_is_turned_alike() -> None:
    x = jnp.tile(jnp.asarray(head(0), jnp.float32), (1, 2, 3, 1))
    y = rotate(x, rotation(jnp.array([[3, 4]]), HEAD_DIM, THETA, jnp.float32))
    np.testing.assert_array_equal(y[:, :, 0], y[:, :, 2])
    assert not np.array_equal(y[:, 0], y[:, 1])


# Speeds of some pairs, as `ROPE_INIT_FUNCTIONS["yarn"]` of transformers 5.24 makes them.
YARNS: dict[str, tuple[int, float, Yarn, dict[int, float]]] = {
    "some are between": (
        *(8, 16.0, Yarn(4.0, 64, 7.2, 1.8, apply_scale=True)),
        {0: 1.0, 1: 0.375, 2: 0.125, 3: 0.03125},
    ),
    "the fastest is not fast enough": (
        *(8, 5.0, Yarn(16.0, 9, 4.0, 0.45, apply_scale=True)),
        {0: 1.0, 1: 0.4597589, 2: 0.1677051, 3: 0.01869186},
    ),
    "all are kept": (
        *(8, 16.0, Yarn(4.0, 64, 1.0, 0.5, apply_scale=False)),
        {0: 1.0, 1: 0.5, 2: 0.25, 3: 0.125},
    ),
    "the slowest is not slow enough": (
        *(8, 16.0, Yarn(4.0, 64, 7.2, 0.02, apply_scale=True)),
        {0: 1.0, 1: 0.4464286, 2: 0.1964286, 3: 0.08482143},
    ),
    "between two neighbours": (
        *(8, 16.0, Yarn(4.0, 64, 10.2, 10.1, apply_scale=True)),
        {0: 1.0, 1: 0.125, 2: 0.0625, 3: 0.03125},
    ),
    "Devstral 2": (
        *(128, 1e6, Yarn(64.0, 4096, 4.0, 1.0, apply_scale=True)),
        {22: 8.659643e-3, 23: 6.978306e-3, 24: 4.931469e-3, 30: 2.135445e-4, 31: 1.938965e-5},
    ),
}


@pytest.mark.parametrize("name", YARNS)
def test_stretched_speeds_are_those_of_transformers(name: str) -> None:
    head_dim, theta, yarn, speeds = YARNS[name]
    rotary = rotation(jnp.array([[0, 1]]), head_dim, theta, jnp.float32, yarn)
    found = np.arctan2(rotary.sin[0, 1], rotary.cos[0, 1])
    np.testing.assert_allclose(found[list(speeds)], list(speeds.values()), rtol=2e-6)
    length = {1.0: 1.0, 4.0: 1.1386294, 16.0: 1.2772589, 64.0: 1.4158883}
    expected = length[yarn.factor if yarn.apply_scale else 1.0]
    np.testing.assert_allclose(np.hypot(rotary.sin, rotary.cos), expected, rtol=1e-6)


def test_queries_alone_grow_by_steps_of_the_original_length(tiny: MistralConfig) -> None:
    """By 1 + 0.5 ln 1, ln 2, ln 3 at positions 0, 4, 8; padding as the first."""
    positions = jnp.array([[-1, 0, 3, 4, 7, 8]])
    config = dataclasses.replace(tiny, llama_4_scaling=Llama4Scaling(0.5, 4))
    plain = rotation(positions, tiny.head_dim, tiny.rope_theta, jnp.bfloat16)
    found = rotations(positions, config, jnp.bfloat16)
    growth = np.array([1, 1, 1, 1.3465736, 1.3465736, 1.5493061])[:, None]
    for grown, one, other in zip(found.q, found.k, plain, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(grown[0], other[0] * growth, rtol=1e-6)
