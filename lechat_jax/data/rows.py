"""Rows of tokens to learn from: what the data makes, and a training step reads."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Integer


class Rows(NamedTuple):
    """Rows of T + 1 tokens, of which each but the first is the target of the one before.

    Of numpy or JAX, or descriptions, with as many axes before the rows as are wanted, such as
    one for the steps of a call.

    Attributes:
        tokens: the ids.
        counted: which of them are learned as targets; by default all. The first of a row is
            none, nor is the first of a document, whatever is said here.
        documents: the number of the document that each token is part of; those of a document
            stand side by side. By default a row is one document.
    """

    tokens: Integer[Any, "*calls B row"]
    counted: Bool[Any, "*calls B row"] | None = None
    documents: Integer[Any, "*calls B row"] | None = None


def positions_in(documents: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The position of each token in its own document, which begins at 0.

    >>> positions_in(jnp.asarray([[7, 7, 7, 2, 2, 9]])).tolist()
    [[0, 1, 2, 0, 1, 0]]
    """
    place = jnp.broadcast_to(jnp.arange(documents.shape[1]), documents.shape)
    begins = documents[:, 1:] != documents[:, :-1]
    first = jnp.pad(jnp.where(begins, place[:, 1:], 0), ((0, 0), (1, 0)))
    return place - jax.lax.cummax(first, axis=1)
