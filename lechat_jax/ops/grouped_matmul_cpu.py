"""Grouped matmul on a CPU, with its gradients: rows are multiplied by their own kernel only.

`jax.lax.ragged_dot` on a CPU multiplies every row by every kernel and then selects: with 8
groups 8 times the work. So here each kernel is read in blocks that fit the cache and multiplied
by its rows, a tile of rows at a time, in loops whose length depends on the group sizes. A tile
may overlap the next group's rows; those are masked.

With few rows, as in decoding, each row reads its kernel by itself, as a sum that XLA fuses with
the read: no copy of the kernel is made.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lechat_jax.ops.kernel_forms import Dense, PackedInt4, cut, put
from lechat_jax.ops.matmul import BLOCK, zeros_after

ALONE = 8  # rows up to which each takes its kernel on its own
TILE = 128  # rows of a group at a time
SMALL = 32  # of the last of them, if two such tiles are enough


class Tile(NamedTuple):
    """A tile of consecutive rows, and a mask of those that belong to the group.

    Attributes:
        at: index of the first row.
        size: number of rows.
        is_own: whether a row belongs to the group; the tile may overlap its neighbours.
    """

    at: Int[Array, ""]
    size: int
    is_own: Bool[Array, "size 1"]


class Groups(NamedTuple):
    """Offsets of the groups that have rows.

    Attributes:
        n: number of groups that have rows.
        which: group ids: those that have rows, in order, then the others.
        start: first row of each group.
        end: one past the last row of each group.
    """

    n: Int[Array, ""]
    which: Int[Array, " E"]
    start: Int[Array, " E"]
    end: Int[Array, " E"]

    @classmethod
    def of(cls, sizes: Int[Array, " E"]) -> "Groups":
        """The groups of these sizes."""
        end, is_empty = jnp.cumsum(sizes), sizes == 0
        return cls(jnp.sum(~is_empty), jnp.argsort(is_empty, stable=True), end - sizes, end)

    def by_blocks(
        self, F: int, n: int, each: Callable[[Array, Array, Array], Array], y: Array
    ) -> Array:
        """Loop over the groups' kernels in blocks of outputs, carrying `y` through `each`.

        `each` gets the group and the first output of a block of n; fewer may remain in the last.
        """
        n_blocks = -(-F // n)

        def turn(j: Array, y: Array) -> Array:
            return each(self.which[j // n_blocks], j % n_blocks * n, y)

        return jax.lax.fori_loop(0, self.n * n_blocks, turn, y)

    def by_tiles(self, e: Array, T: int, each: Callable[[Tile, Array], Array], y: Array) -> Array:
        """Loop over the rows of a group in tiles, carrying `y` through `each`."""
        first, end = self.start[e], self.end[e]
        for n, size in _tiles(end - first, T):

            def turn(i: Array, y: Array, first: Array = first, size: int = size) -> Array:
                begin = first + i * size
                at = jnp.minimum(begin, T - size)
                row = at + jnp.arange(size)
                return each(Tile(at, size, ((row >= begin) & (row < end))[:, None]), y)

            y = jax.lax.fori_loop(0, n, turn, y)
            first += n * size
        return y


def _tiles(rows: Array, T: int) -> list[tuple[Array, int]]:
    """Number and size of the tiles that a group of `rows` needs, of T rows in all.

    No tile has all T rows where smaller ones exist: XLA would hoist its product out of the loop,
    and compute it even where there is no such tile.
    """
    if T <= TILE:
        size = min(SMALL, T)
        return [(-(-rows // size), size)]
    rest = rows % TILE
    is_large = rest > 2 * SMALL
    return [
        (rows // TILE + is_large, TILE),
        (jnp.where(is_large, 0, -(-rest // SMALL)), SMALL),
    ]


def group_of_each(T: int, sizes: Int[Array, " E"]) -> Int[Array, " T"]:
    """The group id of each row; the last group for rows after all groups."""
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(T), side="right")
    return jnp.minimum(group, len(sizes) - 1)


def product(
    rows: Float[Array, "T D"], kernels: Dense | PackedInt4, sizes: Int[Array, " E"]
) -> Float[Array, "T F"]:
    """Grouped matmul on a CPU: each row times its transposed kernel; zero after all groups."""
    rows = _wide(rows)
    T, (_, F, D) = len(rows), kernels.shape
    if T <= ALONE:
        return _each_alone(rows, kernels, sizes)
    n, groups = _rows_of_block(F, D), Groups.of(sizes)

    def block(e: Array, begin: Array, y: Array) -> Array:
        first = jnp.minimum(begin, F - n)
        part = kernels.block((e, first), n, rows.dtype)

        def multiply(tile: Tile, y: Array) -> Array:
            made = cut(rows, (tile.at, 0), (tile.size, D)) @ part.T
            before = cut(y, (tile.at, first), (tile.size, n))
            return put(y, jnp.where(tile.is_own, made, before), (tile.at, first))

        return groups.by_tiles(e, T, multiply, y)

    return groups.by_blocks(F, n, block, zeros_after(rows, (T, F), rows.dtype))


def _each_alone(
    rows: Float[Array, "T D"], kernels: Dense | PackedInt4, sizes: Int[Array, " E"]
) -> Float[Array, "T F"]:
    """Row by row: a kernel is read once per row, in blocks if it must be converted."""
    T, (_, F, D) = len(rows), kernels.shape
    group = group_of_each(T, sizes)
    n = F if kernels.numbers.dtype == rows.dtype else _rows_of_block(F, D)

    def block(j: Array, y: Array) -> Array:
        a, b = j // -(-F // n), j % -(-F // n)
        first = jnp.minimum(b * n, F - n)
        own = kernels.block((group[a], first), n, rows.dtype)
        return put(y, jnp.sum(own * rows[a], axis=-1)[None], (a, first))

    n_rows = jnp.minimum(jnp.sum(sizes), T)
    y = zeros_after(rows, (T, F), rows.dtype)
    return jax.lax.fori_loop(0, n_rows * -(-F // n), block, y)


def gradient_of_rows(
    dy: Float[Array, "T F"], kernels: Dense | PackedInt4, sizes: Int[Array, " E"]
) -> Float[Array, "T D"]:
    """Gradient of the rows: grouped matmul by the kernels; zero after all groups."""
    dy = _wide(dy)
    T, (_, F, D) = len(dy), kernels.shape
    n, groups = _rows_of_block(F, D), Groups.of(sizes)

    def block(e: Array, begin: Array, total: Array) -> Array:
        first = jnp.minimum(begin, F - n)
        part = kernels.block((e, first), n, dy.dtype)
        if F % n:  # what the last block shares with the one before counts once
            part = jnp.where((first + jnp.arange(n) >= begin)[:, None], part, 0)

        def add(tile: Tile, total: Array) -> Array:
            made = cut(dy, (tile.at, first), (tile.size, n)) @ part
            before = cut(total, (tile.at, 0), (tile.size, D))
            return put(total, before + jnp.where(tile.is_own, made, 0), (tile.at, 0))

        return groups.by_tiles(e, T, add, total)

    return groups.by_blocks(F, n, block, zeros_after(dy, (T, D), dy.dtype))


def gradient_of_kernels(
    dy: Float[Array, "T F"], rows: Float[Array, "T D"], sizes: Int[Array, " E"]
) -> Float[Array, "E F D"]:
    """Gradient of the kernels: the sum of outer products of each group."""
    dy, rows = _wide(dy), _wide(rows)
    (T, F), D, E = dy.shape, rows.shape[1], len(sizes)
    n, groups = _rows_of_block(F, D), Groups.of(sizes)

    def block(e: Array, begin: Array, total: Array) -> Array:
        first = jnp.minimum(begin, F - n)

        def add(tile: Tile, part: Array) -> Array:
            dy_tile = jnp.where(tile.is_own, cut(dy, (tile.at, first), (tile.size, n)), 0)
            return part + dy_tile.T @ cut(rows, (tile.at, 0), (tile.size, D))

        part = groups.by_tiles(e, T, add, jnp.zeros((n, D), dy.dtype))
        return put(total, part[None], (e, first, 0))

    return groups.by_blocks(F, n, block, zeros_after(dy, (E, F, D), dy.dtype))


def _wide(x: Float[Array, "T D"]) -> Float[Array, "T D"]:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _rows_of_block(F: int, D: int) -> int:
    """Rows of a kernel per block that fits the cache; all rows if they nearly fit."""
    n_blocks = -(-F * D // BLOCK)
    return -(-F // n_blocks)
