"""Rotary position embeddings, split-half: lane h of a head is paired with lane h + H/2.

Su et al. 2021 (arXiv:2104.09864), in the layout of Hugging Face's checkpoints. Mistral's
own consolidated files pair neighbouring lanes instead; converting them permutes the rows
of the query and key kernels, never this code.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


class Rotation(NamedTuple):
    """Cosines and sines of one rotation per position and lane pair, shared by all layers."""

    cos: Float[Array, "B T H/2"]
    sin: Float[Array, "B T H/2"]


def rotation(
    positions: Int[Array, "B T"], head_dim: int, theta: float, dtype: DTypeLike
) -> Rotation:
    """The angle position * theta^(-2h/H) of each lane pair h, as cosine and sine.

    Computed in float32, or in float64 when `dtype` is, since in bfloat16 position 257
    would already be 256. `theta` is the base of the frequencies.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    lane = jnp.arange(0, head_dim, 2, dtype=wide)
    inv_freq = 1.0 / theta ** (lane / head_dim)
    # Elementwise, not an einsum: a matrix unit would round the positions to bfloat16.
    angles = positions[..., None].astype(wide) * inv_freq
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "B T N H"], by: Rotation) -> Float[Array, "B T N H"]:
    """Every lane pair of every head turned by the angle of its position.

    Lengths are kept, and the product of a query and a key depends on the distance of
    their positions alone. Turned in the precision of `by`, returned in that of `x`.
    """
    first, second = jnp.split(x.astype(by.cos.dtype), 2, axis=-1)
    cos, sin = by.cos[:, :, None], by.sin[:, :, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
