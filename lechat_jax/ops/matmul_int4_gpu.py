"""Matmul of few positions and a packed int4 kernel on an NVIDIA GPU: a Pallas kernel, by Triton.

XLA writes the dequantized kernel to memory before it multiplies, and reads it again.
Here each block of outputs reads its packed bytes once, dequantizes a group of features in
registers, and multiplies all positions with it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, UInt8

MOST = 64  # positions up to which all of them fit the registers beside a block
BLOCK = 32  # outputs of a block
LEAST = 16  # of each axis of a product in Triton


def fits(T: int, groups: int, D: int, F: int) -> bool:
    """Whether this is the kernel for T positions: half a group is a power of two, 16 or more."""
    half = D // groups // 2
    return T <= MOST and half >= LEAST and half & (half - 1) == 0 and F % BLOCK == 0


def project_packed(
    x: Float[Array, "T D"],
    packed: UInt8[Array, "F half"],
    scale: Float[Array, "F groups"],
    zero: UInt8[Array, "F groups"],
    interpret: bool = False,
) -> Float[Array, "T F"]:
    """`x` times the transposed, dequantized kernel, of up to `MOST` positions, in float32.

    `interpret` runs it, slowly, on any device, for tests.
    """
    T, (F, half), groups = len(x), packed.shape, scale.shape[1]
    rows = max(LEAST, 1 << (T - 1).bit_length())
    x = jnp.pad(x, ((0, rows - T), (0, 0)))

    def block(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((BLOCK, width), lambda i: (i, 0))

    whole = pl.BlockSpec((rows, half), lambda i: (0, 0))
    made = pl.pallas_call(
        functools.partial(_kernel, size=half // groups),
        out_shape=jax.ShapeDtypeStruct((rows, F), jnp.float32),
        grid=(F // BLOCK,),
        in_specs=[whole, whole, block(half), block(groups), block(groups)],
        out_specs=pl.BlockSpec((rows, BLOCK), lambda i: (0, i)),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
    )(x[:, 0::2], x[:, 1::2], packed, scale, zero)
    return made[:T]


def _kernel(
    even: Any, odd: Any, packed: Any, scale: Any, zero: Any, out: Any, *, size: int
) -> None:
    """One block of outputs, by references; `even` features are those of low nibbles."""

    def add(group: Array, total: Array) -> Array:
        features, this = pl.ds(group * size, size), pl.ds(group, 1)
        pairs, shift = packed[:, features], zero[:, this].astype(jnp.float32)
        for x, numbers in ((even, pairs & 15), (odd, pairs >> 4)):
            made = (numbers.astype(jnp.float32) - shift) * scale[:, this]
            made = made.astype(even.dtype).T
            total += jnp.dot(x[:, features], made, preferred_element_type=jnp.float32)
        return total

    n_groups = scale.shape[1]
    out[...] = jax.lax.fori_loop(0, n_groups, add, jnp.zeros(out.shape, jnp.float32))
