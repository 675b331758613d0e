"""Rotary position embeddings, split-half: lane h of a head is paired with lane h + H/2.

Su et al. 2021 (arXiv:2104.09864), in the layout of Hugging Face's checkpoints. Mistral's
own consolidated files pair neighbouring lanes instead; converting them permutes the rows
of the query and key kernels, never this code.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lechat_jax.config import Llama4Scaling, MistralConfig, Yarn


class Rotation(NamedTuple):
    """Cosines and sines of one rotation per position and lane pair, shared by all layers."""

    cos: Float[Array, "B T H/2"]
    sin: Float[Array, "B T H/2"]


class Rotations(NamedTuple):
    """Rotations of queries and of keys: the same, unless queries are scaled.

    Attributes:
        q: of queries, as long as their scale.
        k: of keys.
        scale: of queries, for lanes of them that are not rotated; `None` where it is 1.
    """

    q: Rotation
    k: Rotation
    scale: Float[Array, "B T"] | None = None


def rotations(positions: Int[Array, "B T"], config: MistralConfig, dtype: DTypeLike) -> Rotations:
    """Rotations of the queries and keys at these positions, for a model that computes in `dtype`.

    Llama 4's scale of queries by position is multiplied into their cosines and sines, where it
    costs nothing. So is what YaRN multiplies scores by, in the variant of latent attention that
    does it.
    """
    latent = config.latent_attention
    lanes = latent.qk_rope_head_dim if latent else config.head_dim
    k = rotation(positions, lanes, config.rope_theta, dtype, config.yarn)
    scale = None
    if config.llama_4_scaling:
        scale = query_scale(positions, config.llama_4_scaling, k.cos.dtype)
    if latent and latent.squared_yarn_scale and config.yarn:
        one = jnp.ones(positions.shape, k.cos.dtype) if scale is None else scale
        scale = one * config.yarn.mscale**2
    if scale is None:
        return Rotations(k, k)
    return Rotations(Rotation(k.cos * scale[..., None], k.sin * scale[..., None]), k, scale)


def rotation(
    positions: Int[Array, "B T"],
    head_dim: int,
    theta: float,
    dtype: DTypeLike,
    yarn: Yarn | None = None,
) -> Rotation:
    """Cosine and sine of the RoPE angle position * theta^(-2h/H) of each lane pair h.

    Computed in float32, or in float64 when `dtype` is, since in bfloat16 position 257
    would already be 256. `theta` is the base of the frequencies, which `yarn` stretches; then
    both are as long as its attention factor, so that scores are multiplied by its square.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    lane = jnp.arange(0, head_dim, 2, dtype=wide)
    inv_freq = 1.0 / theta ** (lane / head_dim)
    length = None
    if yarn is not None:
        slow = _slowed(head_dim, theta, yarn, wide)
        inv_freq = inv_freq * (1 - slow) + inv_freq / yarn.factor * slow
        length = yarn.attention_factor
    # Elementwise, not an einsum: a matrix unit would round the positions to bfloat16.
    angles = positions[..., None].astype(wide) * inv_freq
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return Rotation(cos, sin) if length is None else Rotation(cos * length, sin * length)


def _slowed(head_dim: int, theta: float, yarn: Yarn, dtype: DTypeLike) -> Float[Array, " pairs"]:
    """YaRN's ramp: how much of each pair's frequency is divided by the factor, from 0 to 1.

    The line runs between whole pairs, those around the ones that make just `beta` and `alpha`
    turns in the original length. As in transformers' `_compute_yarn_parameters`.
    """

    def pair(rotations: float) -> float:
        ratio = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(theta))

    first = max(math.floor(pair(yarn.beta)), 0)
    last = min(math.ceil(pair(yarn.alpha)), head_dim - 1)
    width = last - first or 1e-3  # a step, where both are the same pair
    return jnp.clip((jnp.arange(head_dim // 2, dtype=dtype) - first) / width, 0, 1)


def query_scale(
    positions: Int[Array, "B T"], scaling: Llama4Scaling, dtype: DTypeLike
) -> Float[Array, "B T"]:
    """Llama 4's query scale at each position; 1 for padding, whose position is -1.

    >>> found = query_scale(jnp.array([[0, 9, 10, 99]]), Llama4Scaling(0.5, 10), jnp.float32)
    >>> found.round(4).tolist() == jnp.array([[1, 1, 1.3466, 2.1513]]).round(4).tolist()
    True
    """
    steps = jnp.maximum(positions, 0) // scaling.original_max_position_embeddings
    return 1 + scaling.beta * jnp.log1p(steps.astype(dtype))


def deinterleaved(x: Float[Array, "*B R"]) -> Float[Array, "*B R"]:
    """Lanes in the order of `rotate`: pairs (2h, 2h + 1) become pairs (h, h + R/2).

    >>> deinterleaved(jnp.array([0.0, 3.0, 1.0, 4.0, 2.0, 5.0])).tolist()
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """
    return jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


def rotate(x: Float[Array, "B T N H"], by: Rotation) -> Float[Array, "B T N H"]:
    """Applies RoPE: rotates every lane pair of every head by the angle of its position.

    Lengths are kept, or multiplied by that of `by`, and but for that the product of a query
    and a key depends on the distance of their positions alone. Computed in the dtype of `by`,
    returned in that of `x`.
    """
    first, second = jnp.split(x.astype(by.cos.dtype), 2, axis=-1)
    cos, sin = by.cos[:, :, None], by.sin[:, :, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
