"""Rows of tokens to learn from: what the data makes, and a training step reads."""

from typing import Any, NamedTuple

from jaxtyping import Bool, Integer


class Rows(NamedTuple):
    """Rows of T + 1 tokens, of which each but the first is the target of the one before.

    Of numpy or JAX, or descriptions, with as many axes before the rows as are wanted, such as
    one for the steps of a call.

    Attributes:
        tokens: the ids.
        counted: which of them are learned as targets; by default all. The first of a row is
            none, whatever is said here.
    """

    tokens: Integer[Any, "*calls B row"]
    counted: Bool[Any, "*calls B row"] | None = None
