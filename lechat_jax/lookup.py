"""Prompt lookup: what followed the last time that the text went like this, as a guess.

Saxena 2023 (github.com/apoorvumang/prompt-lookup-decoding). A text that repeats itself, as
code, edits and summaries do, is guessed well, and a guess costs nothing but a search: one
comparison with each of the last `SEEN` tokens.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from lechat_jax.cache import EMPTY

SEEN = 8192  # tokens of a row that are searched, the newest ones
NGRAM = 3  # tokens that have to be equal for the best kind of match; fewer will do


def newest(texts: Sequence[Sequence[int]], S: int) -> Int[np.ndarray, "B S"]:
    """The last S tokens of each text, that of position p in slot p % S.

    >>> newest([[5, 6, 7, 8], [9]], 3).tolist()
    [[8, 6, 7], [9, -1, -1]]
    """
    seen = np.full((len(texts), S), EMPTY, np.int32)
    for row, text in enumerate(texts):
        positions = np.arange(max(0, len(text) - S), len(text)) if S else np.arange(0)
        seen[row, positions % max(S, 1)] = np.asarray(text, np.int32)[positions]
    return seen


def record(
    seen: Int[Array, "B S"], positions: Int[Array, "B T"], tokens: Int[Array, "B T"]
) -> Int[Array, "B S"]:
    """`seen` with these tokens in it, that of position p in slot p % S; `EMPTY` is left out."""
    S = seen.shape[1]
    rows = jnp.arange(seen.shape[0])[:, None]
    slots = jnp.where(positions == EMPTY, S, positions % S)
    return seen.at[rows, slots].set(tokens, mode="drop")


def look_up(seen: Int[Array, "B S"], position: Int[Array, "B"], n: int) -> Int[Array, "B draft"]:
    """The n tokens that followed the latest of the longest matches with the end of each row.

    A match is the last three tokens, or two, or one; without any, the guess is arbitrary. One
    that reaches the end of the text goes round: after `a b a b` comes `a b a b`.

    Args:
        seen: the tokens, that of position p in slot p % S.
        position: of the newest token of each row, which is in `seen`.
        n: length of the guess, at most S.

    >>> look_up(jnp.array([[7, 8, 9, 1, 7, 8, -1, -1]]), jnp.array([5]), n=3).tolist()
    [[9, 1, 7]]
    """
    S = seen.shape[1]
    newest = position[:, None]
    age = (newest - jnp.arange(S)) % S  # of the token in each slot: 0 is the newest
    length = jnp.zeros_like(seen)
    equal = (age > 0) & (age <= newest)  # slots that hold another token of the text
    for back in range(NGRAM):
        mine = jnp.take_along_axis(seen, (newest - back) % S, axis=1)
        theirs = jnp.roll(seen, back, axis=1)
        is_there = (age + back < S) & (age + back <= newest)
        equal &= is_there & (theirs == mine)
        length += equal
    best = jnp.argmax(length * S - age, axis=1, keepdims=True)
    period = jnp.maximum(jnp.take_along_axis(age, best, axis=1), 1)
    return jnp.take_along_axis(seen, (best + 1 + jnp.arange(n) % period) % S, axis=1)
