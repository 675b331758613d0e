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


class Turns(NamedTuple):
    """How queries and how keys are turned: alike, unless queries grow with their position."""

    q: Rotation
    k: Rotation


def turns(positions: Int[Array, "B T"], config: MistralConfig, dtype: DTypeLike) -> Turns:
    """What queries and keys at these positions are turned by, in a model that computes in `dtype`.

    A turn keeps lengths or multiplies all of a head by one number, so the growth of queries is
    part of theirs and costs nothing.
    """
    turn = rotation(positions, config.head_dim, config.rope_theta, dtype, config.yarn)
    if config.llama_4_scaling is None:
        return Turns(turn, turn)
    growth = query_scale(positions, config.llama_4_scaling, turn.cos.dtype)[..., None]
    return Turns(Rotation(turn.cos * growth, turn.sin * growth), turn)


def rotation(
    positions: Int[Array, "B T"],
    head_dim: int,
    theta: float,
    dtype: DTypeLike,
    yarn: Yarn | None = None,
) -> Rotation:
    """The angle position * theta^(-2h/H) of each lane pair h, as cosine and sine.

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
    turn = Rotation(jnp.cos(angles), jnp.sin(angles))
    return turn if length is None else Rotation(turn.cos * length, turn.sin * length)


def _slowed(head_dim: int, theta: float, yarn: Yarn, dtype: DTypeLike) -> Float[Array, " pairs"]:
    """How much of each pair's speed is divided by the factor: from none to all, along a line.

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
    """What the query at each position is multiplied by; 1 for padding, whose position is -1.

    >>> found = query_scale(jnp.array([[0, 9, 10, 99]]), Llama4Scaling(0.5, 10), jnp.float32)
    >>> found.round(4).tolist() == jnp.array([[1, 1, 1.3466, 2.1513]]).round(4).tolist()
    True
    """
    steps = jnp.maximum(positions, 0) // scaling.original_max_position_embeddings
    return 1 + scaling.beta * jnp.log1p(steps.astype(dtype))


def rotate(x: Float[Array, "B T N H"], by: Rotation) -> Float[Array, "B T N H"]:
    """Every lane pair of every head turned by the angle of its position.

    Lengths are kept, or multiplied by that of `by`, and but for that the product of a query
    and a key depends on the distance of their positions alone. Turned in the precision of
    `by`, returned in that of `x`.
    """
    first, second = jnp.split(x.astype(by.cos.dtype), 2, axis=-1)
    cos, sin = by.cos[:, :, None], by.sin[:, :, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
