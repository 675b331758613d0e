"""Attention mask: causal sliding window, and documents that are packed into a row."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Documents(NamedTuple):
    """Document ids of the queries and keys of a packed row, in any order."""

    q: Int[Array, "B T"]
    k: Int[Array, "B S"]


def window_mask(
    q_pos: Int[Array, "#B T"],
    k_pos: Int[Array, "#B S"],
    window: int | None,
    documents: Documents | None = None,
    is_causal: bool = True,
) -> Bool[Array, "B T S"]:
    """Causal sliding-window mask: True where a key is neither ahead, nor empty, nor too far back.

    A function of absolute positions only, so the same lines serve training, chunked
    prefill and a ring whose slots are in no order at all. `window` counts the keys that
    a query sees, itself included; `None` is full causal attention. A negative key
    position marks an empty slot. Where several documents share a row, no query sees
    another one's keys. Without `is_causal` the mask is bidirectional: a query sees what is ahead
    too, up to `window` keys on either side, as in transformers.

    >>> row = jnp.arange(4)[None]
    >>> window_mask(row, row, window=2).astype(int)[0].tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    >>> two = jnp.asarray([[0, 0, 1, 1]])
    >>> window_mask(row, row, window=2, documents=Documents(two, two)).astype(int)[0].tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    """
    distance = q_pos[:, :, None] - k_pos[:, None, :]
    seen = ((distance >= 0) | (not is_causal)) & (k_pos >= 0)[:, None, :]
    if documents is not None:
        seen &= documents.q[:, :, None] == documents.k[:, None, :]
    if window is None:
        return seen
    return seen & (distance < window if is_causal else jnp.abs(distance) <= window)
