"""The kernels of several groups as one, in whichever form they are stored."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, Shaped, UInt8

from lechat_jax.ops.matmul import widened
from lechat_jax.ops.matmul_int4 import halves


class Kernels(NamedTuple):
    """The kernels of E groups, from D features to F outputs: floats, int8 or int4.

    Attributes:
        numbers: of floats, or their bits, or int8; of int4 two in a byte.
        scale: of each output of int8 [E, F], or of its groups of features of int4 [E, F, groups].
        zero: of int4, the number that stands for nought.
        order: of int4, the feature that each of the kernel's is, where that is not the same.
    """

    numbers: Shaped[Array, "E F D"]
    scale: Float32[Array, "E F"] | Float32[Array, "E F groups"] | None = None
    zero: UInt8[Array, "E F groups"] | None = None
    order: Int32[Array, "E D"] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Groups, outputs and features."""
        E, F, D = self.numbers.shape
        return E, F, D if self.zero is None else 2 * D

    def block(self, start: tuple, n: int, dtype: DTypeLike) -> Float[Array, "few D"]:
        """The floats of n outputs of a kernel; `start` is its group and the first of them."""
        numbers, *grids = (
            cut(part, (*start, 0), (1, n, part.shape[2]))[0]
            for part in (self.numbers, self.scale, self.zero)
            if part is not None
        )
        if not grids:
            return widened(numbers, dtype)
        return jnp.concatenate(halves(numbers, *grids), axis=1).astype(dtype)

    def floats(self, dtype: DTypeLike) -> Float[Array, "E F D"]:
        """All of them."""
        if self.scale is None or self.zero is None:
            return self.numbers.astype(dtype)
        E, F, D = self.shape
        numbers, *grids = (x.reshape(E * F, -1) for x in (self.numbers, self.scale, self.zero))
        return jnp.concatenate(halves(numbers, *grids), axis=1).astype(dtype).reshape(E, F, D)


def cut(array: Array, start: tuple, size: tuple[int, ...]) -> Array:
    """A part of an array, by the place of its first number."""
    return jax.lax.dynamic_slice(array, [jnp.asarray(i, jnp.int32) for i in start], size)


def put(array: Array, part: Array, start: tuple) -> Array:
    """The array with that part in place of what was there."""
    return jax.lax.dynamic_update_slice(array, part, [jnp.asarray(i, jnp.int32) for i in start])
