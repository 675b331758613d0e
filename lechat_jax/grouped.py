"""The product of rows that lie in groups with a kernel for each group, and no other product.

Rows [T, D] come sorted by group, the first sizes[0] for the kernel of group 0 and so on, as
many as it may be: none is dropped, and none is multiplied with a kernel that is not its own.

A GPU or TPU has `jax.lax.ragged_dot` for that. On a CPU it multiplies every row with every
kernel and then chooses: with 8 groups 8 times the work. So there, kernel after kernel is
taken in blocks that the cache holds and multiplied with the rows of its group, `TILE` at a
time: how many tiles there are is only known when it runs. A tile may reach into the rows of
the next group, which come later and overwrite what is wrong there.

Of a few rows, as in decoding, each takes its kernel on its own, as a sum that XLA fuses with
reading it: no copy of the kernel is made.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from lechat_jax.projection import BLOCK, widened

TILE = 128  # rows of a group at a time
ALONE = 8  # rows up to which each takes its kernel on its own


def grouped(
    rows: Float[Array, "T D"],
    kernel: Shaped[Array, "E F D"],
    sizes: Int[Array, " E"],
    scale: Float[Array, "E F"] | None = None,
) -> Float[Array, "T F"]:
    """Each row times the transposed kernel of its group; rows beyond all groups are anything.

    Products are added up in at least float32 and rounded once. An int8 kernel and its scale
    are constants to a gradient, which goes to the rows alone.
    """
    if jax.default_backend() == "cpu":
        y = _grouped_on_cpu(rows, kernel, sizes)
    else:
        y = _ragged(rows, kernel if scale is None else kernel.astype(rows.dtype), sizes)
    if scale is not None:
        group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(rows)), side="right")
        y = y * scale[jnp.minimum(group, len(sizes) - 1)]
    return y.astype(rows.dtype)


def _ragged(rows: Array, kernel: Array, sizes: Array) -> Float[Array, "T F"]:
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    return jax.lax.ragged_dot_general(rows, kernel, sizes, numbers, preferred_element_type=wide)


@jax.custom_vjp
def _grouped_on_cpu(rows: Array, kernel: Array, sizes: Array) -> Float[Array, "T F"]:
    """In at least float32."""
    if len(rows) <= ALONE:
        return _each_alone(rows, kernel, sizes)
    return _by_group(rows, kernel, sizes)


def _forward(rows: Array, kernel: Array, sizes: Array) -> tuple[Array, tuple[Array, ...]]:
    return _grouped_on_cpu(rows, kernel, sizes), (rows, kernel, sizes)


def _backward(kept: tuple[Array, ...], dy: Float[Array, "T F"]) -> tuple[Array, Array | None, None]:
    rows, kernel, sizes = kept
    d_rows = _back_by_group(dy, kernel, sizes).astype(rows.dtype)
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        return d_rows, None, None
    return d_rows, _outer(dy, rows, sizes).astype(kernel.dtype), None


_grouped_on_cpu.defvjp(_forward, _backward)


class Groups(NamedTuple):
    """Where the groups are that have any rows.

    Attributes:
        n: how many have.
        which: their numbers, in the order of their rows, and behind them those that have none.
        start: the first row of each group.
    """

    n: Int[Array, ""]
    which: Int[Array, " E"]
    start: Int[Array, " E"]

    @classmethod
    def of(cls, sizes: Int[Array, " E"]) -> "Groups":
        """The groups of these sizes."""
        which = jnp.argsort(sizes == 0, stable=True)
        return cls(jnp.sum(sizes > 0), which, jnp.cumsum(sizes) - sizes)


def _each_alone(
    rows: Float[Array, "T D"], kernel: Shaped[Array, "E F D"], sizes: Int[Array, " E"]
) -> Float[Array, "T F"]:
    """A kernel is read as often as it has rows; in blocks if it has to be converted."""
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    T, (_, F, D) = len(rows), kernel.shape
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(T), side="right")
    n = F if kernel.dtype == wide else _rows_of_block(F, D)

    def block(j: Array, y: Array) -> Array:
        a, b = j // -(-F // n), j % -(-F // n)
        first = jnp.minimum(b * n, F - n)
        own = _cut(kernel, (group[a], first, 0), (1, n, D))[0]
        made = jnp.sum(widened(own, wide) * rows[a].astype(wide), axis=-1)
        return _put(y, made[None], (a, first))

    n_rows = jnp.minimum(jnp.sum(sizes), T)
    return jax.lax.fori_loop(0, n_rows * -(-F // n), block, jnp.zeros((T, F), wide))


def _by_group(
    rows: Float[Array, "T D"], kernel: Shaped[Array, "E F D"], sizes: Int[Array, " E"]
) -> Float[Array, "T F"]:
    """A block of a kernel with all rows of its group, before the next is read."""
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    _, F, D = kernel.shape
    n, groups, tile = _rows_of_block(F, D), Groups.of(sizes), min(TILE, len(rows))
    n_blocks = -(-F // n)
    padded = jnp.pad(rows.astype(wide), ((0, tile), (0, 0)))

    def block(j: Array, y: Array) -> Array:
        e, first = groups.which[j // n_blocks], jnp.minimum(j % n_blocks * n, F - n)
        part = widened(_cut(kernel, (e, first, 0), (1, n, D))[0], wide)

        def multiply(i: Array, y: Array) -> Array:
            at = groups.start[e] + i * tile
            return _put(y, _cut(padded, (at, 0), (tile, D)) @ part.T, (at, first))

        return jax.lax.fori_loop(0, -(-sizes[e] // tile), multiply, y)

    y = jnp.zeros((len(padded), F), wide)
    return jax.lax.fori_loop(0, groups.n * n_blocks, block, y)[: len(rows)]


def _back_by_group(
    dy: Float[Array, "T F"], kernel: Shaped[Array, "E F D"], sizes: Int[Array, " E"]
) -> Float[Array, "T D"]:
    """The product with the kernels themselves, which is the gradient of the rows."""
    wide = jnp.promote_types(dy.dtype, jnp.float32)
    _, F, D = kernel.shape
    n, groups, tile = _rows_of_block(F, D), Groups.of(sizes), min(TILE, len(dy))
    n_blocks = -(-F // n)
    padded = jnp.pad(dy.astype(wide), ((0, tile), (0, 0)))

    def block(j: Array, total: Array) -> Array:
        e, b = groups.which[j // n_blocks], j % n_blocks
        first = jnp.minimum(b * n, F - n)
        part = widened(_cut(kernel, (e, first, 0), (1, n, D))[0], wide)
        if F % n:  # what the last block shares with the one before counts once
            part = jnp.where((first + jnp.arange(n) >= b * n)[:, None], part, 0)

        def add(i: Array, total: Array) -> Array:
            at = groups.start[e] + i * tile
            made = _cut(padded, (at, first), (tile, n)) @ part
            if n_blocks > 1:
                made += jnp.where(b == 0, 0, _cut(total, (at, 0), (tile, D)))
            return _put(total, made, (at, 0))

        return jax.lax.fori_loop(0, -(-sizes[e] // tile), add, total)

    total = jnp.zeros((len(padded), D), wide)
    return jax.lax.fori_loop(0, groups.n * n_blocks, block, total)[: len(dy)]


def _outer(
    dy: Float[Array, "T F"], rows: Float[Array, "T D"], sizes: Int[Array, " E"]
) -> Float[Array, "E F D"]:
    """The sum of the outer products of each group, which is the gradient of its kernel."""
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    (T, F), D, E = dy.shape, rows.shape[1], len(sizes)
    n, groups, tile = _rows_of_block(F, D), Groups.of(sizes), min(TILE, T)
    n_blocks = -(-F // n)
    dy, rows = (jnp.pad(x.astype(wide), ((0, tile), (0, 0))) for x in (dy, rows))

    def block(j: Array, total: Array) -> Array:
        e, first = groups.which[j // n_blocks], jnp.minimum(j % n_blocks * n, F - n)

        def add(i: Array, part: Array) -> Array:
            at = groups.start[e] + i * tile
            own = (i * tile + jnp.arange(tile) < sizes[e])[:, None]
            dy_tile = jnp.where(own, _cut(dy, (at, first), (tile, n)), 0)
            x_tile = _cut(rows, (at, 0), (tile, D))
            return part + dy_tile.T @ x_tile

        part = jax.lax.fori_loop(0, -(-sizes[e] // tile), add, jnp.zeros((n, D), wide))
        return _put(total, part[None], (e, first, 0))

    return jax.lax.fori_loop(0, groups.n * n_blocks, block, jnp.zeros((E, F, D), wide))


def _rows_of_block(F: int, D: int) -> int:
    """Of a kernel, as many as fit into a block, all if they nearly do."""
    n_blocks = -(-F * D // BLOCK)
    return -(-F // n_blocks)


def _cut(array: Array, start: tuple, size: tuple[int, ...]) -> Array:
    return jax.lax.dynamic_slice(array, [jnp.asarray(i, jnp.int32) for i in start], size)


def _put(array: Array, part: Array, start: tuple) -> Array:
    return jax.lax.dynamic_update_slice(array, part, [jnp.asarray(i, jnp.int32) for i in start])
