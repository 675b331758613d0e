"""Pixtral's vision transformer (arXiv:2410.07073, section 2): patches of an image to embeddings.

The blocks are the decoder's, with attention in both directions and positions of two dimensions.
Each image is a row of its own, so nothing is hidden from it but the padding: rows of one length
serve images of any size. The patches that become one token lie next to each other in a row, which
attention does not notice, since it knows the place of each by its rotation.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lechat_jax.config import VisionConfig
from lechat_jax.config.vision import CHANNELS
from lechat_jax.data.rows import Images
from lechat_jax.model.attention import attend_patches
from lechat_jax.model.block import Block
from lechat_jax.model.layers import Linear, RMSNorm
from lechat_jax.model.rope import Rotation, Rotations
from lechat_jax.ops.remat import in_one_body


class VisionTower(nnx.Module):
    """Vision transformer (ViT) with 2D rotary positions: one vector for each patch, without a norm.

    The convolution whose stride is its size is a product with each patch.
    """

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs) -> None:
        p = config.patch_size
        self.config = config
        self.patch = Linear((config.dim,), (CHANNELS, p, p), (CHANNELS * p * p) ** -0.5, rngs=rngs)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.blocks = nnx.List([Block(config, i, rngs=rngs) for i in range(config.n_layers)])

    def __call__(self, images: Images) -> Float[Array, "B P d"]:
        """What the tower makes of each patch."""
        x = self.norm(self.patch(images.patches.astype(self.norm.scale[...].dtype)))
        turn = rotation_2d(images.places, self.config, x.dtype)
        n_patches = jnp.sum(images.places[:, :, 0] >= 0, axis=1, dtype=jnp.int32)
        apply = functools.partial(_applied, rotary=Rotations(turn, turn), n_patches=n_patches)
        graphs, states = zip(*map(nnx.split, self.blocks), strict=True)
        if in_one_body(states):
            stack = jax.tree.map(lambda *of: jnp.stack(of), *states)
            return jax.lax.scan(
                lambda x, own: (apply(nnx.merge(graphs[0], own), x), None), x, stack
            )[0]
        for block in self.blocks:
            x = apply(block, x)
        return x


class Projector(nnx.Module):
    """Vision-language adapter: patches merged to tokens, then an MLP to the decoder's width.

    Lanes of a merged token are ordered as torch's `unfold` has them: all patches of a lane, then
    the next lane.
    """

    def __init__(self, config: VisionConfig, dim: int, eps: float, *, rngs: nnx.Rngs) -> None:
        d, m = config.dim, config.n_merged
        self.config = config
        if config.projector_norm:
            self.norm = RMSNorm(d, eps)
        if m > 1:
            self.merge = Linear((d,), (d, m), (d * m) ** -0.5, rngs=rngs)
        bias = config.projector_bias
        self.linear_1 = Linear((dim,), (d,), d**-0.5, has_bias=bias, rngs=rngs)
        self.linear_2 = Linear((dim,), (dim,), dim**-0.5, has_bias=bias, rngs=rngs)

    def __call__(self, x: Float[Array, "B P d"]) -> Float[Array, "B M D"]:
        """The embeddings of the image tokens."""
        if self.config.projector_norm:
            x = self.norm(x)
        if (m := self.config.n_merged) > 1:
            B, P, d = x.shape
            x = self.merge(jnp.swapaxes(x.reshape(B, P // m, m, d), 2, 3))
        hidden = self.linear_1(x)
        wide = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
        return self.linear_2(jax.nn.gelu(wide, approximate=False).astype(hidden.dtype))


def rotation_2d(places: Int[Array, "B P 2"], config: VisionConfig, dtype: DTypeLike) -> Rotation:
    """2D rotary embedding: half of the lane pairs turn by the row of a patch, half by its column.

    Of the frequencies theta^(-2i/h) rows have those with an even i and columns the others, as in
    mistral-inference's `precompute_freqs_cis_2d`; computed like `rope.rotation`.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    lane = jnp.arange(0, config.head_dim, 2, dtype=wide)
    inv_freq = 1.0 / config.rope_theta ** (lane / config.head_dim)
    row, column = jnp.split(places.astype(wide), 2, axis=-1)
    angles = jnp.concatenate([row * inv_freq[0::2], column * inv_freq[1::2]], axis=-1)
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def _applied(
    block: Callable[..., tuple[Array, Any, Any]], x: Array, rotary: Rotations, n_patches: Array
) -> Array:
    """Block on the patches of images, of which each row has so many."""

    def mix(q: Array, k: Array, v: Array, memory: None) -> tuple[Array, None]:
        return attend_patches(q, k, v, n_patches), memory

    return block(x, rotary, mix, None)[0]
