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

An int4 kernel has two features of an output in a byte, and gives all that are in low halves and
then all in high ones. So that is the order of features in which the rows meet it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int32, Shaped, UInt8

from lechat_jax.pairs import halves
from lechat_jax.projection import BLOCK, here, is_on_cpu, widened, zeros_after

TILE = 128  # rows of a group at a time
ALONE = 8  # rows up to which each takes its kernel on its own


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
            _cut(part, (*start, 0), (1, n, part.shape[2]))[0]
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


def grouped(
    rows: Float[Array, "T D"], kernels: Kernels, sizes: Int[Array, " E"]
) -> Float[Array, "T F"]:
    """Each row times the transposed kernel of its group; rows beyond all groups are anything.

    Products are added up in at least float32 and rounded once. Kernels of int8 and int4 are
    constants to a gradient, which goes to the rows alone: those of one product at a time are
    made floats, when its turn comes.
    """
    group = _group_of_each(rows, sizes)
    if kernels.zero is not None:
        x = _features_of_bytes(rows, kernels.order, group)
        y = _product(x, kernels._replace(order=None), sizes)
    else:
        y = _product(rows, Kernels(kernels.numbers), sizes)
        y = y if kernels.scale is None else y * kernels.scale[group]
    return y.astype(rows.dtype)


def _group_of_each(rows: Float[Array, "T D"], sizes: Int[Array, " E"]) -> Int[Array, " T"]:
    """The group of each row; of those beyond all groups, the last."""
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(rows)), side="right")
    return jnp.minimum(group, len(sizes) - 1)


def _features_of_bytes(
    rows: Float[Array, "T D"], order: Int32[Array, "E D"] | None, group: Int[Array, " T"]
) -> Float[Array, "T D"]:
    """The features that are in low halves of bytes of the kernel of each row, then the others."""
    if order is None:
        return jnp.concatenate([rows[:, 0::2], rows[:, 1::2]], axis=1)
    order = jnp.concatenate([order[:, 0::2], order[:, 1::2]], axis=1)
    return jnp.take_along_axis(rows, order[group], axis=1)


@jax.custom_vjp
def _product(rows: Array, kernels: Kernels, sizes: Array) -> Float[Array, "T F"]:
    """In at least float32."""
    if not is_on_cpu():
        kernels, rows = here(kernels, rows)
        return _ragged(rows, kernels.floats(rows.dtype), sizes)
    if len(rows) <= ALONE:
        return _each_alone(rows, kernels, sizes)
    return _by_group(rows, kernels, sizes)


def _ragged(rows: Array, kernel: Array, sizes: Array) -> Float[Array, "T F"]:
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    return jax.lax.ragged_dot_general(rows, kernel, sizes, numbers, preferred_element_type=wide)


def _forward(rows: Array, kernels: Kernels, sizes: Array) -> tuple[Array, tuple]:
    return _product(rows, kernels, sizes), (rows, kernels, sizes)


def _backward(
    kept: tuple[Array, Kernels, Array], dy: Float[Array, "T F"]
) -> tuple[Array, Kernels | None, None]:
    rows, kernels, sizes = kept
    is_learned = jnp.issubdtype(kernels.numbers.dtype, jnp.floating)
    if is_on_cpu():
        d_rows = _back_by_group(dy, kernels, sizes)
        d_kernel = _outer(dy, rows, sizes) if is_learned else None
    else:
        kernels, dy = here(kernels, dy)
        made = kernels.floats(rows.dtype)
        _, back = jax.vjp(lambda rows, kernel: _ragged(rows, kernel, sizes), rows, made)
        d_rows, d_kernel = back(dy)
        d_kernel = d_kernel if is_learned else None
    d_kernels = None if d_kernel is None else Kernels(d_kernel.astype(kernels.numbers.dtype))
    return d_rows.astype(rows.dtype), d_kernels, None


_product.defvjp(_forward, _backward)


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
    rows: Float[Array, "T D"], kernels: Kernels, sizes: Int[Array, " E"]
) -> Float[Array, "T F"]:
    """A kernel is read as often as it has rows; in blocks if it has to be converted."""
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    T, (_, F, D) = len(rows), kernels.shape
    group = _group_of_each(rows, sizes)
    n = F if kernels.numbers.dtype == wide else _rows_of_block(F, D)

    def block(j: Array, y: Array) -> Array:
        a, b = j // -(-F // n), j % -(-F // n)
        first = jnp.minimum(b * n, F - n)
        own = kernels.block((group[a], first), n, wide)
        made = jnp.sum(own * rows[a].astype(wide), axis=-1)
        return _put(y, made[None], (a, first))

    n_rows = jnp.minimum(jnp.sum(sizes), T)
    return jax.lax.fori_loop(0, n_rows * -(-F // n), block, zeros_after(rows, (T, F), wide))


def _by_group(
    rows: Float[Array, "T D"], kernels: Kernels, sizes: Int[Array, " E"]
) -> Float[Array, "T F"]:
    """A block of a kernel with all rows of its group, before the next is read."""
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    _, F, D = kernels.shape
    n, groups, tile = _rows_of_block(F, D), Groups.of(sizes), min(TILE, len(rows))
    n_blocks = -(-F // n)
    padded = jnp.pad(rows.astype(wide), ((0, tile), (0, 0)))

    def block(j: Array, y: Array) -> Array:
        e, first = groups.which[j // n_blocks], jnp.minimum(j % n_blocks * n, F - n)
        part = kernels.block((e, first), n, wide)

        def multiply(i: Array, y: Array) -> Array:
            at = groups.start[e] + i * tile
            return _put(y, _cut(padded, (at, 0), (tile, D)) @ part.T, (at, first))

        return jax.lax.fori_loop(0, -(-sizes[e] // tile), multiply, y)

    y = zeros_after(rows, (len(padded), F), wide)
    return jax.lax.fori_loop(0, groups.n * n_blocks, block, y)[: len(rows)]


def _back_by_group(
    dy: Float[Array, "T F"], kernels: Kernels, sizes: Int[Array, " E"]
) -> Float[Array, "T D"]:
    """The product with the kernels themselves, which is the gradient of the rows."""
    wide = jnp.promote_types(dy.dtype, jnp.float32)
    _, F, D = kernels.shape
    n, groups, tile = _rows_of_block(F, D), Groups.of(sizes), min(TILE, len(dy))
    n_blocks = -(-F // n)
    padded = jnp.pad(dy.astype(wide), ((0, tile), (0, 0)))

    def block(j: Array, total: Array) -> Array:
        e, b = groups.which[j // n_blocks], j % n_blocks
        first = jnp.minimum(b * n, F - n)
        part = kernels.block((e, first), n, wide)
        if F % n:  # what the last block shares with the one before counts once
            part = jnp.where((first + jnp.arange(n) >= b * n)[:, None], part, 0)

        def add(i: Array, total: Array) -> Array:
            at = groups.start[e] + i * tile
            made = _cut(padded, (at, first), (tile, n)) @ part
            if n_blocks > 1:
                made += jnp.where(b == 0, 0, _cut(total, (at, 0), (tile, D)))
            return _put(total, made, (at, 0))

        return jax.lax.fori_loop(0, -(-sizes[e] // tile), add, total)

    total = zeros_after(dy, (len(padded), D), wide)
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

    return jax.lax.fori_loop(0, groups.n * n_blocks, block, zeros_after(dy, (E, F, D), wide))


def _rows_of_block(F: int, D: int) -> int:
    """Of a kernel, as many as fit into a block, all if they nearly do."""
    n_blocks = -(-F * D // BLOCK)
    return -(-F // n_blocks)


def _cut(array: Array, start: tuple, size: tuple[int, ...]) -> Array:
    return jax.lax.dynamic_slice(array, [jnp.asarray(i, jnp.int32) for i in start], size)


def _put(array: Array, part: Array, start: tuple) -> Array:
    return jax.lax.dynamic_update_slice(array, part, [jnp.asarray(i, jnp.int32) for i in start])
