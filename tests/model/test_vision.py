"""The vision tower: what an image is does not depend on what is beside it or behind it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from lechat_jax.data.rows import Images
from lechat_jax.generate.vision import as_images, image_features
from lechat_jax.model.attention import attend, attend_patches, blockwise_attention
from lechat_jax.model.binding import weights_of
from lechat_jax.model.vision import rotation_2d
from lechat_jax.ops import attention_backend
from lechat_jax.ops.flash_attention import bidirectional_cudnn, splash_attention
from tests.support.images import PIXTRAL, SEES, TOWER, two_images
from tests.support.models import random_model

KINDS = {
    "merged": SEES,
    "pixtral": dataclasses.replace(SEES, vision=PIXTRAL),
}


@pytest.fixture(params=KINDS)
def seeing(request: pytest.FixtureRequest) -> Any:
    config = KINDS[request.param]
    with jax.enable_x64(True):
        return config, weights_of(random_model(config, jnp.float64))


def test_padding_and_other_images_change_nothing(seeing: Any) -> None:
    config, weights = seeing
    images = two_images(config.vision)
    with jax.enable_x64(True):
        together = image_features(config, weights, as_images(images, 80))
        for row, image in zip(together, images, strict=True):
            [alone] = image_features(config, weights, as_images([image], len(image.patches)))
            np.testing.assert_allclose(row[: image.n_tokens], alone, rtol=0, atol=1e-13)
            assert np.std(alone) > 0.1


def test_patches_in_another_order_of_tokens_give_the_tokens_in_that_order(seeing: Any) -> None:
    """What a patch is to the others is told by its place alone."""
    config, weights = seeing
    image, m = two_images(config.vision)[0], config.vision.n_merged
    order = np.random.default_rng(0).permutation(image.n_tokens)
    rows = (order[:, None] * m + np.arange(m)).ravel()
    with jax.enable_x64(True):
        [right] = image_features(config, weights, as_images([image], len(rows)))
        patches, places = (jnp.asarray(x[rows])[None] for x in (image.patches, image.places))
        [found] = image_features(config, weights, Images(patches, places))
        np.testing.assert_allclose(found, right[order], rtol=0, atol=1e-13)


def test_a_swap_of_rows_and_columns_is_seen(seeing: Any) -> None:
    config, weights = seeing
    image = two_images(config.vision)[0]
    turned = dataclasses.replace(image, places=image.places[:, ::-1])
    with jax.enable_x64(True):
        one, other = (
            image_features(config, weights, as_images([x], len(x.patches))) for x in (image, turned)
        )
        assert np.max(np.abs(one - other)) > 0.1


def test_pairs_turn_by_row_then_by_column_with_frequencies_dealt_in_turn() -> None:
    """With theta 16, four pairs: 1, 1/2, 1/4, 1/8; rows have the first and third."""
    tower = dataclasses.replace(TOWER, dim=16, n_heads=2, rope_theta=16.0)
    found = rotation_2d(jnp.array([[[3, 0], [0, 5]]]), tower, "float32")
    angles = np.array([[3, 3 / 4, 0, 0], [0, 0, 5 / 2, 5 / 8]])
    np.testing.assert_allclose(found.cos[0], np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(found.sin[0], np.sin(angles), atol=1e-6)


B, T, N, H = 2, 256, 4, 8
LENGTHS = np.array([200, 37])


def inputs() -> tuple[Array, Array, Array]:
    draw = np.random.default_rng(0).standard_normal
    q, k, v = (jnp.asarray(draw((B, T, N, H)), jnp.float32) for _ in range(3))
    return q, k, v


def dense(q: Array, k: Array, v: Array) -> Array:
    mask = jnp.arange(T)[None, None] < jnp.asarray(LENGTHS)[:, None, None]
    return attend(q, k, v, jnp.broadcast_to(mask, (B, T, T)))


def real(x: Array) -> np.ndarray:
    return np.concatenate([np.asarray(row[:n]) for row, n in zip(x, LENGTHS, strict=True)])


@pytest.mark.parametrize("scores", [2**9, 2**12, 2**15, 2**17, 2**19, 2**30])
def test_attention_in_blocks_is_attention(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one query, of some of a head, of some heads, of all; and their gradients."""
    monkeypatch.setattr(attention_backend, "CPU_SCORES", scores)
    qkv, lengths = inputs(), jnp.asarray(LENGTHS)

    def total(f: Any) -> Any:
        return lambda *qkv: jnp.sum(jnp.sin(f(*qkv)) * (jnp.arange(T)[None, :, None, None] < 37))

    q, k, v = qkv
    found, right = attend_patches(q, k, v, lengths), dense(q, k, v)
    np.testing.assert_allclose(real(found), real(right), atol=2e-6)
    grads = (
        jax.grad(total(f), argnums=(0, 1, 2))(*qkv)
        for f in (lambda q, k, v: attend_patches(q, k, v, lengths), dense)
    )
    for ours, theirs in zip(*grads, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


def test_scores_of_an_image_are_never_all_in_memory() -> None:
    """12,100 patches of 16 heads would have 9.4 GB of them; here a block has a million."""
    q = jax.ShapeDtypeStruct((1, 4096, 16, 64), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, 1, 4096), bool)
    compiled = jax.jit(blockwise_attention).lower(q, q, q, mask).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 4 * 4096 * 16 * 64 * 4 + 4 * 4 * 2**20


def test_the_kernels_of_accelerators_mask_the_padding_likewise() -> None:
    qkv = inputs()
    padding = (jnp.arange(T)[None] >= jnp.asarray(LENGTHS)[:, None]).astype(jnp.int32)
    splash = splash_attention(*qkv, None, padding, interpret=True, is_causal=False)
    cudnn = bidirectional_cudnn(*qkv, jnp.asarray(LENGTHS), implementation="xla")
    for found in (splash, cudnn):
        np.testing.assert_allclose(real(found), real(dense(*qkv)), atol=2e-6)
