"""Grouped matmul (ragged dot) of a dropless mixture of experts: each row times its expert's kernel.

Rows [T, D] are sorted by group: the first sizes[0] for the kernel of group 0 and so on. Sizes are
arbitrary: no row is dropped, and none is multiplied by another group's kernel.

On a GPU or TPU this is `jax.lax.ragged_dot`, which may read all kernels, or for few rows of many
groups a product for each row, which reads its own; on a CPU see `grouped_matmul_cpu`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lechat_jax.ops import grouped_matmul_cpu
from lechat_jax.ops.grouped_matmul_cpu import ALONE, group_of_each
from lechat_jax.ops.kernel_forms import Dense, PackedInt4, cut
from lechat_jax.ops.matmul import here, is_on_cpu

FEW = 4  # times as many groups as rows, for each row to take its kernel by itself


def grouped(
    rows: Float[Array, "T D"], kernels: Any, sizes: Int[Array, " E"]
) -> Float[Array, "T F"]:
    """Grouped matmul: each row times its group's transposed kernel; undefined after all.

    Products are accumulated in at least float32 and rounded once. Int8 and int4 kernels have no
    gradient, only the rows have; they are dequantized for one product at a time.
    """
    group = group_of_each(len(rows), sizes)
    y = kernels.by_group(rows, group, lambda rows, numbers: _product(rows, numbers, sizes))
    return y.astype(rows.dtype)


@jax.custom_vjp
def _product(rows: Array, kernels: Dense | PackedInt4, sizes: Array) -> Float[Array, "T F"]:
    """The grouped matmul, in at least float32."""
    if not is_on_cpu():
        kernels, rows = here(kernels, rows)
        E = kernels.shape[0]
        if len(rows) <= min(ALONE, E // FEW):
            return _each_alone(rows, kernels, sizes)
        return _ragged(rows, kernels.floats(rows.dtype).astype(rows.dtype), sizes)
    return grouped_matmul_cpu.product(rows, kernels, sizes)


def _each_alone(
    rows: Float[Array, "T D"], kernels: Dense | PackedInt4, sizes: Int[Array, " E"]
) -> Float[Array, "T F"]:
    """The grouped matmul row by row, each of which takes its kernel as it is stored.

    Rows after all groups, which are other devices', take none.
    """
    T, (_, F, _) = len(rows), kernels.shape
    group = group_of_each(T, sizes)
    wide = jnp.promote_types(rows.dtype, jnp.float32)

    def multiply(i: Int[Array, ""]) -> Array:
        own = jax.tree.map(lambda part: cut(part, (group[i], 0, 0), (1, *part.shape[1:])), kernels)
        # Else XLA converts the kernels of all groups, ahead of the loop.
        own = jax.lax.optimization_barrier(own)
        row = rows[i]
        if isinstance(own, PackedInt4):  # whose features come two by two, see `by_group`
            return own.matmul(row.reshape(2, -1).T.reshape(1, -1))[0].astype(wide)
        return own.matmul(row[None], wide)[0]

    def nothing(i: Int[Array, ""]) -> Array:
        return jnp.zeros(F, wide)

    n = jnp.sum(sizes)
    return jnp.stack([jax.lax.cond(i < n, multiply, nothing, i) for i in range(T)])


def _ragged(rows: Array, kernel: Array, sizes: Array) -> Float[Array, "T F"]:
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    return jax.lax.ragged_dot_general(rows, kernel, sizes, numbers, preferred_element_type=wide)


def _forward(rows: Array, kernels: Dense | PackedInt4, sizes: Array) -> tuple[Array, tuple]:
    return _product(rows, kernels, sizes), (rows, kernels, sizes)


def _backward(
    kept: tuple[Array, Dense | PackedInt4, Array], dy: Float[Array, "T F"]
) -> tuple[Array, Dense | None, None]:
    rows, kernels, sizes = kept
    is_learned = jnp.issubdtype(kernels.numbers.dtype, jnp.floating)
    if is_on_cpu():
        d_rows = grouped_matmul_cpu.gradient_of_rows(dy, kernels, sizes)
        d_kernel = grouped_matmul_cpu.gradient_of_kernels(dy, rows, sizes) if is_learned else None
    else:
        kernels, dy = here(kernels, dy)
        made = kernels.floats(rows.dtype).astype(rows.dtype)
        _, back = jax.vjp(lambda rows, kernel: _ragged(rows, kernel, sizes), rows, made)
        d_rows, d_kernel = back(dy)
        d_kernel = d_kernel if is_learned else None
    d_kernels = None if d_kernel is None else Dense(d_kernel.astype(kernels.numbers.dtype))
    return d_rows.astype(rows.dtype), d_kernels, None


_product.defvjp(_forward, _backward)
