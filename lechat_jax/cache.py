"""The rolling cache: a ring of keys and values that never grows, however long the text.

A ring of S slots is written in order and wraps; each slot remembers the position of the
token it holds, and `window_mask` alone decides what may be read. Before the queries of a
chunk attend, all of the chunk's keys are written, so the oldest of T queries still needs
the W - 1 keys before it while the newest is already there:

    S >= W + T - 1          W = 4, T = 3: queries 7 8 9 need keys 4 5 6 | 7 8 9, S >= 6

Without a window nothing may be forgotten, so S is the whole context. A chunk may begin at
any slot and go round the end, since each token is scattered to its own slot; an update of
one contiguous piece would be moved back from the end without a word. On a CPU the scatter
is as fast, and as much in place.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lechat_jax.config import MistralConfig, Window

EMPTY = -1  # the position of a slot that holds nothing, or padding


class Ring(NamedTuple):
    """Keys and values of the L layers that share one window, and the slots' positions.

    One array for all layers, heads before slots: carried through a loop it is updated in
    place, where an array per layer is copied for each token (measured, XLA on CPU).

    Attributes:
        k: the keys, already rotated.
        v: the values.
        position: of the token in each slot, or `EMPTY`.
    """

    k: Float[Array, "L B K S H"]
    v: Float[Array, "L B K S H"]
    position: Int[Array, "B S"]

    @property
    def capacity(self) -> int:
        """Number of slots S."""
        return self.position.shape[1]

    def claim(self, cursor: Int[Array, ""], positions: Int[Array, "B T"], window: Window) -> "Ring":
        """The ring with the next T slots holding these positions (`EMPTY` for padding).

        Raises:
            ValueError: T is more than the ring was made for, so that a key would be
                overwritten which a query of this `window` still needs.
        """
        T = positions.shape[1]
        if (window or 1) + T - 1 > self.capacity:
            raise ValueError(
                f"{T} tokens at once are too many for a ring of {self.capacity} slots "
                f"and a window of {window}"
            )
        slots = self._next(cursor, T)
        return self._replace(
            position=self.position.at[:, slots].set(positions, unique_indices=True)
        )

    def write(
        self,
        layer: int,
        cursor: Int[Array, ""],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
    ) -> "Ring":
        """The ring with one layer's keys and values in the next T slots."""
        slots = self._next(cursor, k.shape[1])

        def put(into: Array, new: Array) -> Array:
            # Indexed by an array between two slices, the T axis comes first.
            new = jnp.moveaxis(new, 1, 0).astype(into.dtype)
            return into.at[layer, :, :, slots].set(new, unique_indices=True)

        return self._replace(k=put(self.k, k), v=put(self.v, v))

    def read(self, layer: int) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """All slots of one layer, in slot order."""
        return jnp.swapaxes(self.k[layer], 1, 2), jnp.swapaxes(self.v[layer], 1, 2)

    def _next(self, cursor: Int[Array, ""], T: int) -> Int[Array, "T"]:
        return (cursor + jnp.arange(T)) % self.capacity


class Cache(NamedTuple):
    """One ring for each distinct window of the model, all written at one cursor.

    Attributes:
        rings: in the order of `distinct_windows`.
        cursor: slots written since the cache was made. All rows of the batch share it, so
            that a token is one update; rows whose prompts are shorter are padded on the
            left with `EMPTY` positions.
    """

    rings: tuple[Ring, ...]
    cursor: Int[Array, ""]


class Place(NamedTuple):
    """Where a layer's keys and values live."""

    ring: int
    layer: int


def distinct_windows(config: MistralConfig) -> tuple[Window, ...]:
    """The windows that occur, in order of first use: one ring each."""
    return tuple(dict.fromkeys(config.windows))


def places(config: MistralConfig) -> tuple[Place, ...]:
    """The ring and the row in it of each layer of the model."""
    windows = distinct_windows(config)
    return tuple(
        Place(windows.index(window), config.windows[:layer].count(window))
        for layer, window in enumerate(config.windows)
    )


def capacity(window: Window, chunk: int, context: int) -> int:
    """Slots that a ring needs for chunks of up to `chunk` tokens, in whole eights.

    Matrix units read along the slots in vectors of eight, and slowly when some are left over.

    >>> capacity(window=64, chunk=64, context=1), capacity(window=None, chunk=64, context=100)
    (128, 104)
    """
    needed = max(context, chunk) if window is None else window + chunk - 1
    return -(-needed // 8) * 8


def empty_cache(
    config: MistralConfig, batch: int, chunk: int, context: int, dtype: DTypeLike
) -> Cache:
    """A cache that holds nothing yet, for chunks of up to `chunk` tokens.

    `context` is the number of positions that a layer without a window can hold; layers
    with one do not look at it. Padding takes no room from the text: it lies to the left of
    it, so it is overwritten first.
    """
    rings = []
    for window in distinct_windows(config):
        slots = capacity(window, chunk, context)
        shape = (config.windows.count(window), batch, config.n_kv_heads, slots, config.head_dim)
        k, v = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
        rings.append(Ring(k, v, jnp.full((batch, slots), EMPTY, jnp.int32)))
    return Cache(tuple(rings), jnp.zeros((), jnp.int32))


def cache_bytes(
    config: MistralConfig, batch: int, chunk: int, context: int, dtype: DTypeLike
) -> int:
    """Memory that `empty_cache` takes for the same arguments, in bytes."""
    cache = jax.eval_shape(lambda: empty_cache(config, batch, chunk, context, dtype))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
