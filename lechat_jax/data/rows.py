"""Batch of token rows with loss mask and document ids, as a training step takes it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Integer


class Rows(NamedTuple):
    """Rows of T + 1 tokens: inputs, and targets shifted by one.

    Arrays of numpy or JAX, or `jax.ShapeDtypeStruct`s, with any leading axes, such as one for the
    steps of a call.

    Attributes:
        tokens: token ids.
        counted: loss mask: tokens that are trained on as targets; by default all. The first token
            of a row or a document never counts.
        documents: document id of each token, constant within a document, for the attention
            mask. By default a row is one document.
    """

    tokens: Integer[Any, "*calls B row"]
    counted: Bool[Any, "*calls B row"] | None = None
    documents: Integer[Any, "*calls B row"] | None = None


def described_rows(shape: tuple[int, ...], is_packed: bool) -> Rows:
    """`jax.ShapeDtypeStruct`s of rows: tokens, and of packed ones loss mask and document ids."""
    tokens, counted = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.bool_))
    return Rows(tokens, counted, tokens) if is_packed else Rows(tokens)


def positions_in(documents: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of each token in its own document, from 0.

    >>> positions_in(jnp.asarray([[7, 7, 7, 2, 2, 9]])).tolist()
    [[0, 1, 2, 0, 1, 0]]
    """
    place = jnp.broadcast_to(jnp.arange(documents.shape[1]), documents.shape)
    begins = documents[:, 1:] != documents[:, :-1]
    first = jnp.pad(jnp.where(begins, place[:, 1:], 0), ((0, 0), (1, 0)))
    return place - jax.lax.cummax(first, axis=1)
