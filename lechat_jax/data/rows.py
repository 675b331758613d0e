"""Batch of token rows with loss mask and document ids, as a training step takes it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer


class Images(NamedTuple):
    """Patches of images, each padded at the end.

    Attributes:
        patches: normalised pixels of each patch: channels, rows, columns.
        places: row and column of each patch in its image, from 0; -1 is padding. Patches that
            become one token are neighbours, in the order of rows.
    """

    patches: Float[Any, "*B P c p p"]
    places: Integer[Any, "*B P 2"]


class RowImages(NamedTuple):
    """Images of rows, some slots a row.

    Attributes:
        images: an image in each slot of each row; an empty one is all padding.
        slots: for each position of an image token the one that it is, of all tokens of its row's
            slots; elsewhere anything.
    """

    images: Images
    slots: Integer[Any, "*B T"]


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
        images: images of the rows, if there are any.
    """

    tokens: Integer[Any, "*calls B row"]
    counted: Bool[Any, "*calls B row"] | None = None
    documents: Integer[Any, "*calls B row"] | None = None
    images: RowImages | None = None


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
