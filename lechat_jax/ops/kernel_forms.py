"""The forms in which a kernel is stored, each with its own products: floats, int8, int4.

A layer asks its kernel for one of these and does not know in which form it is:

    matmul    positions [T, D] times the transposed kernel: maps, and the head
    lookup    the rows of token ids: the embedding
    floats    all numbers of it: the head's loss, and experts on a GPU
    by_group  rows times the kernel of the group of each: experts, whose kernels have E first

A form is a tuple of the kernel, or its numbers, and of its parts. A new one is a class here and a
line in `model.binding`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int8, Int32, Shaped, UInt8

from lechat_jax.ops.matmul import from_bits, project, widened
from lechat_jax.ops.matmul_int4 import even_odd, project_int4

# Of rows, and a kernel whose numbers stand for themselves but for a factor, in float32 or wider.
GroupedProduct = Callable[[Array, Any], Array]


class Dense(NamedTuple):
    """Numbers that stand for themselves: floats, or bfloat16 as its bits in uint16."""

    numbers: Shaped[Array, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of experts: groups, outputs and features."""
        return self.numbers.shape

    def matmul(self, x: Float[Array, "T D"], dtype: DTypeLike | None = None) -> Array:
        """`x` times the transposed kernel, in `dtype` or else that of `x`."""
        return project(x, self.numbers.reshape(-1, x.shape[1]), dtype=dtype)

    def lookup(self, ids: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T D"]:
        """The rows of these ids, which have a type of their own."""
        return from_bits(_looked_up(self.numbers, ids))

    def floats(self, dtype: DTypeLike) -> Array:
        """All numbers, which have a type of their own."""
        return self.numbers

    def by_group(
        self, rows: Float[Array, "T D"], group: Int[Array, " T"], product: GroupedProduct
    ) -> Float[Array, "T F"]:
        """Each row times the transposed kernel of its group."""
        return product(rows, self)

    def block(self, start: tuple, n: int, dtype: DTypeLike) -> Float[Array, "few D"]:
        """The floats of n outputs of a kernel; `start` is its group and the first of them."""
        return widened(cut(self.numbers, (*start, 0), (1, n, self.shape[2]))[0], dtype)


class ScaledInt8(NamedTuple):
    """Integers of one byte, and the scale of each output, see `quantize.int8`."""

    numbers: Int8[Array, "..."]
    scale: Float32[Array, "..."]

    def matmul(self, x: Float[Array, "T D"], dtype: DTypeLike | None = None) -> Array:
        """`x` times the transposed kernel, in `dtype` or else that of `x`."""
        return project(x, self.numbers.reshape(-1, x.shape[1]), self.scale.reshape(-1), dtype)

    def lookup(self, ids: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T D"]:
        """The rows of these ids."""
        # A TPU takes a single row as a slice, for which it first copies the whole table.
        twice = jnp.concatenate([ids, ids], axis=1) if ids.size == 1 else ids
        rows = (self.numbers[twice] * self.scale[twice][..., None]).astype(dtype)
        return rows[:, : ids.shape[1]]

    def floats(self, dtype: DTypeLike) -> Array:
        """All numbers, whole in memory."""
        return (self.numbers * self.scale[..., None]).astype(dtype)

    def by_group(
        self, rows: Float[Array, "T D"], group: Int[Array, " T"], product: GroupedProduct
    ) -> Float[Array, "T F"]:
        """Each row times the transposed kernel of its group."""
        return product(rows, Dense(self.numbers)) * self.scale[group]


class PackedInt4(NamedTuple):
    """Two integers a byte, and scale and zero point of each group of features, see `quantize.int4`.

    Of experts its features are those in low nibbles of bytes, and then those in high ones. The
    numbers of other kernels may be by groups, see `ops.matmul_int4`.
    """

    numbers: Shaped[Array, "..."]
    scale: Float32[Array, "..."]
    zero: UInt8[Array, "..."]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of experts: groups, outputs and features."""
        E, F, half = self.numbers.shape
        return E, F, 2 * half

    def matmul(self, x: Float[Array, "T D"]) -> Float[Array, "T F"]:
        """`x` times the transposed kernel, in the type of `x`."""
        if self.numbers.dtype == jnp.uint4:
            return project_int4(x, *self)
        scale, zero = (part.reshape(-1, part.shape[-1]) for part in self[1:])
        return project_int4(x, self.numbers.reshape(len(scale), -1), scale, zero)

    def floats(self, dtype: DTypeLike) -> Float[Array, "E F D"]:
        """All numbers of experts, whole in memory."""
        E, F, _ = self.shape
        parts = (part.reshape(E * F, -1) for part in self)
        return jnp.concatenate(even_odd(*parts), axis=1).astype(dtype).reshape(self.shape)

    def by_group(
        self, rows: Float[Array, "T D"], group: Int[Array, " T"], product: GroupedProduct
    ) -> Float[Array, "T F"]:
        """Each row times the transposed kernel of its group."""
        return product(jnp.concatenate([rows[:, 0::2], rows[:, 1::2]], axis=1), self)

    def block(self, start: tuple, n: int, dtype: DTypeLike) -> Float[Array, "few D"]:
        """The floats of n outputs of a kernel; `start` is its group and the first of them."""
        parts = (cut(part, (*start, 0), (1, n, part.shape[2]))[0] for part in self)
        return jnp.concatenate(even_odd(*parts), axis=1).astype(dtype)


class Ordered(NamedTuple):
    """A kernel whose features have an order of their own, as GPTQ's act-order leaves them.

    Attributes:
        kernel: with its features in that order.
        order: the feature of the input that each of the kernel's is.
    """

    kernel: Any
    order: Int32[Array, "*E D"]

    def matmul(self, x: Float[Array, "T D"]) -> Float[Array, "T F"]:
        """`x` times the transposed kernel, in the type of `x`."""
        return as_form(self.kernel).matmul(x[:, self.order])

    def by_group(
        self, rows: Float[Array, "T D"], group: Int[Array, " T"], product: GroupedProduct
    ) -> Float[Array, "T F"]:
        """Each row times the transposed kernel of its group."""
        rows = jnp.take_along_axis(rows, self.order[group], axis=1)
        return as_form(self.kernel).by_group(rows, group, product)


def as_form(kernel: Any) -> Any:
    """The kernel with the products of its form; a bare array, as a fresh model has it, is dense."""
    return kernel if isinstance(kernel, tuple) else Dense(kernel)


def cut(array: Array, start: tuple, size: tuple[int, ...]) -> Array:
    """A part of an array, by the place of its first number."""
    return jax.lax.dynamic_slice(array, [jnp.asarray(i, jnp.int32) for i in start], size)


def put(array: Array, part: Array, start: tuple) -> Array:
    """The array with that part in place of what was there."""
    return jax.lax.dynamic_update_slice(array, part, [jnp.asarray(i, jnp.int32) for i in start])


@jax.custom_vjp
def _looked_up(kernel: Shaped[Array, "V D"], ids: Int[Array, "B T"]) -> Shaped[Array, "B T D"]:
    """`kernel[ids]`, whose gradient is added up in at least float32 and rounded once.

    A token may come thousands of times in a batch, and a sum in bfloat16 stops to grow when it
    has some hundred terms.
    """
    return kernel[ids]


def _backward(kept: tuple[Array, Array], dy: Float[Array, "B T D"]) -> tuple[Array, None]:
    kernel, ids = kept
    wide = jnp.promote_types(dy.dtype, jnp.float32)
    total = jnp.zeros(kernel.shape, wide).at[ids].add(dy.astype(wide))
    return total.astype(kernel.dtype), None


_looked_up.defvjp(lambda kernel, ids: (kernel[ids], (kernel, ids)), _backward)
