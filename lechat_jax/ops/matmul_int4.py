"""Matmul of positions and a group-wise int4 kernel, in the form that each device is fast at.

A kernel is stored with two features a byte, and must be read as it lies: dequantized in memory it
would move several times the bytes.

    CPU    some rows at a time are dequantized, which stay in the cache, as in `matmul`. Nibbles
           are never interleaved: a product is the sum of two, of the even features (low nibbles)
           and of the odd ones (high nibbles)
    GPU    a kernel in `matmul_int4_gpu` for few positions; more are worth dequantizing for
    TPU    `device_forms` makes `uint4` [groups, outputs, features of a group] of it, of which to
           dequantize is elementwise, and the product sums over two axes: XLA fuses the two
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped, UInt4, UInt8

from lechat_jax.devices.platform import platform
from lechat_jax.ops.matmul import BLOCK, here, is_on_cpu, zeros_after

EvenOdd = tuple[Array, Array]


@jax.custom_vjp
def project_int4(
    x: Float[Array, "T D"],
    kernel: Shaped[Array, "..."],
    scale: Float[Array, "..."],
    zero: UInt8[Array, "..."],
) -> Float[Array, "T F"]:
    """Int4 linear layer: `x` times the transposed, dequantized kernel; see `quantize.int4`.

    Products are accumulated in at least float32 and rounded once. The kernel has no gradient,
    only `x` has; kernels are dequantized one at a time.

    Args:
        x: positions, in the compute dtype.
        kernel: two features a byte, uint8 [F, D / 2]; or `by_groups`, as the other two then are.
        scale: of each output and group, [F, groups].
        zero: likewise, the number that stands for zero.
    """
    return _project(x, kernel, scale, zero).astype(x.dtype)


def _project(x: Array, kernel: Array, scale: Array, zero: Array) -> Float[Array, "T F"]:
    is_packed = kernel.dtype == jnp.uint8
    if is_packed and is_on_cpu():
        return _in_blocks(x, kernel, scale, zero)
    is_whole = jax.sharding.get_abstract_mesh().empty  # XLA cannot split a custom kernel
    if is_packed and is_whole and platform() == "gpu":
        from lechat_jax.ops import matmul_int4_gpu  # Pallas takes 0.7 s to import

        if matmul_int4_gpu.fits(len(x), scale.shape[1], x.shape[1], len(kernel)):
            return matmul_int4_gpu.project_packed(x, kernel, scale, zero)
    kernel, x = here(kernel, x)
    if is_packed:
        kernel, scale, zero = by_groups(kernel, scale, zero)
    made = dequantized(kernel, scale, zero, x.dtype)
    grouped = x.reshape(len(x), len(made), -1)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("TGD,GFD->TF", grouped, made, preferred_element_type=wide)


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
    if kernel.dtype == jnp.uint8:
        of_each = (
            jnp.einsum("TF,FD->TD", dy, half.astype(dy.dtype), preferred_element_type=wide)
            for half in even_odd(kernel, scale, zero)
        )
        dx = jnp.stack([*of_each], axis=-1)
    else:
        made = dequantized(kernel, scale, zero, dy.dtype)
        dx = jnp.einsum("TF,GFD->TGD", dy, made, preferred_element_type=wide)
    return dx.reshape(len(dy), -1).astype(dy.dtype), None, None, None


project_int4.defvjp(_forward, _backward)


class ByGroups(NamedTuple):
    """An int4 kernel as `uint4`, its scales and its zeros, all with their groups of features first.

    Dequantizing it is elementwise then, which XLA does within the product that reads it.
    """

    kernel: UInt4[Array, "groups F size"]
    scale: Float[Array, "groups F"]
    zero: UInt8[Array, "groups F"]


def by_groups(
    kernel: UInt8[Array, "F half"],
    scale: Float[Array, "F groups"],
    zero: UInt8[Array, "F groups"],
) -> ByGroups:
    """A packed kernel with its groups first.

    >>> packed, scale = jnp.array([[0x21, 0x43]], jnp.uint8), jnp.ones((1, 2))
    >>> by_groups(packed, scale, jnp.zeros((1, 2), jnp.uint8)).kernel.tolist()
    [[[1, 2]], [[3, 4]]]
    """
    F, groups = scale.shape
    pairs = kernel.reshape(F, groups, -1)
    numbers = jnp.stack([pairs & 15, pairs >> 4], axis=-1).reshape(F, groups, -1)
    return ByGroups(jnp.swapaxes(numbers, 0, 1).astype(jnp.uint4), scale.T, zero.T)


def dequantized(
    kernel: UInt4[Array, "groups F size"],
    scale: Float[Array, "groups F"],
    zero: UInt8[Array, "groups F"],
    dtype: DTypeLike,
) -> Float[Array, "groups F size"]:
    """The floats of an int4 kernel by its groups, rounded once to `dtype`."""
    shift, factor = (part.astype(jnp.float32)[..., None] for part in (zero, scale))
    return ((kernel.astype(jnp.float32) - shift) * factor).astype(dtype)


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
