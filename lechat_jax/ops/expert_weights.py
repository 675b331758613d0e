"""Stacked expert weights of a mixture of experts: floats, int8 or int4."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, Shaped, UInt8

from lechat_jax.ops.matmul import widened
from lechat_jax.ops.matmul_int4 import even_odd


class Kernels(NamedTuple):
    """Stacked kernels of E experts, from D features to F outputs: floats, int8 or int4.

    Attributes:
        numbers: the floats, or their bits, or int8; int4 has two numbers a byte.
        scale: per output of int8 [E, F]; per output and group of int4 [E, F, groups].
        zero: zero points of int4.
        order: activation order of int4: the model's index of each of the kernel's features.
    """

    numbers: Shaped[Array, "E F D"]
    scale: Float32[Array, "E F"] | Float32[Array, "E F groups"] | None = None
    zero: UInt8[Array, "E F groups"] | None = None
    order: Int32[Array, "E D"] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """The sizes (E, F, D): experts, outputs, features."""
        E, F, D = self.numbers.shape
        return E, F, D if self.zero is None else 2 * D

    def block(self, start: tuple, n: int, dtype: DTypeLike) -> Float[Array, "few D"]:
        """Dequantizes n outputs of one kernel; `start` is the expert and the first output."""
        numbers, *grids = (
            cut(part, (*start, 0), (1, n, part.shape[2]))[0]
            for part in (self.numbers, self.scale, self.zero)
            if part is not None
        )
        if not grids:
            return widened(numbers, dtype)
        return jnp.concatenate(even_odd(numbers, *grids), axis=1).astype(dtype)

    def floats(self, dtype: DTypeLike) -> Float[Array, "E F D"]:
        """Dequantizes all kernels to floats."""
        if self.scale is None or self.zero is None:
            return self.numbers.astype(dtype)
        E, F, D = self.shape
        numbers, *grids = (x.reshape(E * F, -1) for x in (self.numbers, self.scale, self.zero))
        return jnp.concatenate(even_odd(numbers, *grids), axis=1).astype(dtype).reshape(E, F, D)


def cut(array: Array, start: tuple, size: tuple[int, ...]) -> Array:
    """A slice of an array at a dynamic start (`jax.lax.dynamic_slice`)."""
    return jax.lax.dynamic_slice(array, [jnp.asarray(i, jnp.int32) for i in start], size)


def put(array: Array, part: Array, start: tuple) -> Array:
    """Writes a slice into an array at a dynamic start (`jax.lax.dynamic_update_slice`)."""
    return jax.lax.dynamic_update_slice(array, part, [jnp.asarray(i, jnp.int32) for i in start])
