"""Matmul of positions and a group-wise int4 kernel, which has two features a byte.

The nibbles of a byte are never interleaved: a product is the sum of two, of the even features
(low nibbles) and of the odd ones (high nibbles). On a CPU a few rows of the kernel are
dequantized at a time, which stay in the cache, as in `matmul`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from lechat_jax.ops.matmul import BLOCK, here, is_on_cpu, zeros_after

EvenOdd = tuple[Array, Array]


@jax.custom_vjp
def project_int4(
    x: Float[Array, "T D"],
    kernel: UInt8[Array, "F half"],
    scale: Float[Array, "F groups"],
    zero: UInt8[Array, "F groups"],
) -> Float[Array, "T F"]:
    """Int4 linear layer: `x` times the transposed, dequantized kernel; see `quantize.int4`.

    Products are accumulated in at least float32 and rounded once. The kernel has no gradient,
    only `x` has; kernels are dequantized one at a time.
    """
    made = _in_blocks(x, kernel, scale, zero) if is_on_cpu() else _whole(x, kernel, scale, zero)
    return made.astype(x.dtype)


def _forward(
    x: Array, kernel: Array, scale: Array, zero: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    return project_int4(x, kernel, scale, zero), (kernel, scale, zero)


def _backward(
    kept: tuple[Array, Array, Array], dy: Float[Array, "T F"]
) -> tuple[Array, None, None, None]:
    kernel, scale, zero = kept
    kernel, dy = here(kernel, dy)
    wide = jnp.promote_types(dy.dtype, jnp.float32)
    of_each = (
        jnp.einsum("TF,FD->TD", dy, half.astype(dy.dtype), preferred_element_type=wide)
        for half in even_odd(kernel, scale, zero)
    )
    dx = jnp.stack([*of_each], axis=-1).reshape(len(dy), -1)
    return dx.astype(dy.dtype), None, None, None


project_int4.defvjp(_forward, _backward)


def even_odd(kernel: Array, scale: Array, zero: Array) -> EvenOdd:
    """Dequantizes int4: weights of the even features and of the odd ones, float32 [F, D / 2] each.

    A barrier keeps the work by group. Otherwise XLA would look up the scale of each weight by
    itself, which takes two to three times as long.
    """
    groups = scale.shape[1]
    pairs = kernel.reshape(len(kernel), groups, -1)
    shift, factor = zero.astype(jnp.float32)[..., None], scale[..., None]
    low, high = ((q.astype(jnp.float32) - shift) * factor for q in (pairs & 15, pairs >> 4))
    low, high = jax.lax.optimization_barrier((low, high))
    return low.reshape(kernel.shape), high.reshape(kernel.shape)


def _whole(x: Array, kernel: Array, scale: Array, zero: Array) -> Float[Array, "T F"]:
    kernel, x = here(kernel, x)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    of_each = (
        jnp.einsum("TD,FD->TF", part, half.astype(x.dtype), preferred_element_type=wide)
        for part, half in zip((x[:, 0::2], x[:, 1::2]), even_odd(kernel, scale, zero), strict=True)
    )
    return sum(of_each, jnp.zeros((), wide))


def _in_blocks(x: Array, kernel: Array, scale: Array, zero: Array) -> Float[Array, "T F"]:
    """The matmul by blocks of the kernel's rows; the last block may overlap the one before."""
    F, half = kernel.shape
    rows = max(1, min(BLOCK // (2 * half), F // 2))
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    even, odd = x[:, 0::2], x[:, 1::2]

    def product(block: Array, part: Array) -> Float[Array, "F T"]:
        if len(part) == 1:  # of a matrix and a vector, for which nothing is repacked
            return (block @ part[0])[:, None]
        return jnp.einsum("FD,TD->FT", block, part)

    def with_block(i: Array, y: Float[Array, "F T"]) -> Float[Array, "F T"]:
        start = jnp.minimum(i * rows, F - rows)
        cut = [jax.lax.dynamic_slice_in_dim(part, start, rows) for part in (kernel, scale, zero)]
        low, high = (block.astype(x.dtype) for block in even_odd(*cut))
        made = product(low, even) + product(high, odd)
        return jax.lax.dynamic_update_slice_in_dim(y, made, start, axis=0)

    return jax.lax.fori_loop(0, -(-F // rows), with_block, zeros_after(x, (F, len(x)), x.dtype)).T
