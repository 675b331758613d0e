"""Rolling KV cache: a ring buffer of keys and values that never grows with the text.

The token at position p of a row lies in slot p % S of that row, together with its position,
and `window_mask` alone decides what may be read. Before the queries of a chunk attend, all
of the chunk's keys are written, so the oldest of T queries still needs the W - 1 keys before
it while the newest is already there:

    S >= W + T - 1          W = 4, T = 3: queries 7 8 9 need keys 4 5 6 | 7 8 9, S >= 6

So T tokens may also be a guess. What turns out wrong is overwritten by what takes its
position, before a query comes that could see it, and it has overwritten nothing that any
query still needs.

Without a window nothing may be forgotten, so S is the whole context. Padding is written
nowhere, and a chunk may go round the end: each token is scattered to its own slot, where an
update of one contiguous piece would be moved back from the end without a word.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lechat_jax.config import MistralConfig, Window

EMPTY = -1  # the position of a slot that holds nothing, and of padding


class Ring(NamedTuple):
    """Ring buffer: keys and values of the layers that share a window, and the slots' positions.

    An array for each layer, heads before slots, is what attention multiplies as it lies in
    memory: one array for all layers was cut into a copy of each (XLA on a CPU).

    Attributes:
        k: the keys of each layer, already rotated. Of latent attention, one rotary key for all
            heads.
        v: the values of each layer. Of latent attention, the latents, normed.
        position: of the token in each slot, or `EMPTY`.
    """

    k: tuple[Float[Array, "B K S H"], ...]
    v: tuple[Float[Array, "B K S U"], ...]
    position: Int[Array, "B S"]

    @property
    def capacity(self) -> int:
        """Number of slots S."""
        return self.position.shape[1]

    def claim(self, positions: Int[Array, "B T"], window: Window) -> "Ring":
        """Assigns these positions to their slots; `EMPTY` gets none.

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
        rows, slots = self._where(positions)
        return self._replace(position=self.position.at[rows, slots].set(positions, mode="drop"))

    def write(
        self,
        layer: int,
        positions: Int[Array, "B T"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K U"],
    ) -> "Ring":
        """Writes one layer's keys and values to the slots of these positions.

        Each head's vector has a place of its own, so that a TPU scatters into the ring as it lies
        in memory. By pieces of all heads it would have slots before heads, and copy every ring
        at the start and the end of a call.
        """
        rows, slots = (place[:, None] for place in self._where(positions))
        heads = jnp.arange(k.shape[2])[None, :, None]
        alone = k.shape[:3] == (1, 1, 1)

        def put(into: Array, new: Array) -> Array:
            new = jnp.swapaxes(new, 1, 2).astype(into.dtype)
            place = (rows, heads, slots)
            if alone:
                # XLA makes an update in one piece of a scatter of one, and fuses what reads the
                # ring into it, for which it copies the whole ring. A scatter of two stays one.
                *place, new = (jnp.concatenate([x, x], axis=2) for x in (*place, new))
            return into.at[tuple(place)].set(new, mode="drop", unique_indices=not alone)

        return self._replace(
            k=(*self.k[:layer], put(self.k[layer], k), *self.k[layer + 1 :]),
            v=(*self.v[:layer], put(self.v[layer], v), *self.v[layer + 1 :]),
        )

    def used(self, positions: Int[Array, "B T"]) -> Int[Array, ""]:
        """Number of first slots among which all are that queries at these positions may see.

        A ring fills from its first slot on, and of a text that is shorter the rest is empty.
        """
        return jnp.minimum(jnp.max(positions) + 1, self.capacity)

    def read(self, layer: int) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S U"]]:
        """Keys and values of one layer, in slot order."""
        return self.k[layer], self.v[layer]

    def _where(self, positions: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
        """Row and slot of each position; padding's are out of bounds, so nothing is written."""
        B, T = positions.shape
        rows = jnp.broadcast_to(jnp.arange(B)[:, None], (B, T))
        return rows, jnp.where(
            positions == EMPTY, self.capacity + jnp.arange(T), self._slot(positions)
        )

    def _slot(self, positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
        return positions % self.capacity


class Cache(NamedTuple):
    """Rolling KV cache of all layers: one ring buffer for each window.

    Attributes:
        rings: one for each distinct window of the model, in the order of `distinct_windows`.
    """

    rings: tuple[Ring, ...]

    @property
    def dtype(self) -> DTypeLike:
        """Dtype of the keys and values."""
        return self.rings[0].k[0].dtype

    def claim(self, config: MistralConfig, positions: Int[Array, "B T"]) -> "Cache":
        """Assigns `positions` to slots of every ring."""
        windows = distinct_windows(config)
        return Cache(
            tuple(
                ring.claim(positions, window)
                for ring, window in zip(self.rings, windows, strict=True)
            )
        )

    def spare(self, config: MistralConfig) -> int | None:
        """Number of last tokens that can be rolled back; `None` is any.

        What so many have overwritten no later query needs, and what they left in the ring is
        overwritten in turn before a query comes that could see it.
        """
        pairs = zip(self.rings, distinct_windows(config), strict=True)
        return min((ring.capacity - w + 1 for ring, w in pairs if w is not None), default=None)

    def layer(self, place: "Place") -> Ring:
        """Ring of one layer, as if it were alone in it."""
        ring = self.rings[place.ring]
        return Ring((ring.k[place.layer],), (ring.v[place.layer],), ring.position)

    def with_layer(self, place: "Place", alone: Ring) -> "Cache":
        """Replaces the keys and values of one layer."""
        ring, i = self.rings[place.ring], place.layer
        k, v = (
            (*old[:i], *new, *old[i + 1 :]) for old, new in ((ring.k, alone.k), (ring.v, alone.v))
        )
        ring = Ring(k, v, ring.position)
        return Cache((*self.rings[: place.ring], ring, *self.rings[place.ring + 1 :]))


class Place(NamedTuple):
    """Place of a layer's keys and values: its ring, and its row in it."""

    ring: int
    layer: int


def distinct_windows(config: MistralConfig) -> tuple[Window, ...]:
    """Distinct windows in order of first use: one ring each."""
    return tuple(dict.fromkeys(config.windows))


def places(config: MistralConfig) -> tuple[Place, ...]:
    """Place of each layer of the model."""
    windows = distinct_windows(config)
    return tuple(
        Place(windows.index(window), config.windows[:layer].count(window))
        for layer, window in enumerate(config.windows)
    )


def capacity(window: Window, chunk: int, context: int) -> int:
    """Capacity of a ring in slots for chunks of up to `chunk` tokens, a multiple of 8.

    Matrix units read along the slots in vectors of eight, and slowly when some are left over. A
    large ring is a multiple of 128, for kernels that read it in whole blocks.

    >>> capacity(window=64, chunk=64, context=1), capacity(window=None, chunk=64, context=100)
    (128, 104)
    """
    needed = max(context, chunk) if window is None else window + chunk - 1
    step = 8 if needed <= 1024 else 128
    return -(-needed // step) * step


def empty_cache(
    config: MistralConfig, batch: int, chunk: int, context: int, dtype: DTypeLike
) -> Cache:
    """Allocates an empty cache for chunks of up to `chunk` tokens.

    `context` is the number of positions that a layer without a window can hold; layers
    with one do not look at it.
    """
    rings = []
    for window in distinct_windows(config):
        slots = capacity(window, chunk, context)
        n, (heads, *widths) = config.windows.count(window), config.cached
        shapes = [(batch, heads, slots, width) for width in widths]
        k, v = (tuple(jnp.zeros(shape, dtype) for _ in range(n)) for shape in shapes)
        rings.append(Ring(k, v, jnp.full((batch, slots), EMPTY, jnp.int32)))
    return Cache(tuple(rings))


def cache_bytes(
    config: MistralConfig, batch: int, chunk: int, context: int, dtype: DTypeLike
) -> int:
    """Size of the cache in bytes, for the arguments of `empty_cache`."""
    cache = jax.eval_shape(lambda: empty_cache(config, batch, chunk, context, dtype))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
