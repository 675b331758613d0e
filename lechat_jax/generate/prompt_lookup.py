"""Prompt lookup decoding: drafts the tokens that followed the last match of the text's end.

Speculative decoding without a draft model (Saxena 2023,
github.com/apoorvumang/prompt-lookup-decoding). Texts that repeat themselves, as code, edits and
summaries do, are drafted well, and a draft costs only a search among the last `SEEN` tokens.
"""

from collections.abc import Sequence
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from lechat_jax.model.cache import EMPTY

SEEN = 8192  # tokens of a row that are searched, the newest ones
Number = TypeVar("Number", float, Array)
NGRAM = 3  # tokens that have to be equal for the best kind of match; fewer will do


def newest(texts: Sequence[Sequence[int]], S: int) -> Int[np.ndarray, "B S"]:
    """Ring buffer of the last S tokens of each text: position p is in slot p % S.

    >>> newest([[5, 6, 7, 8], [9]], 3).tolist()
    [[8, 6, 7], [9, -1, -1]]
    """
    seen = np.full((len(texts), S), EMPTY, np.int32)
    for row, text in enumerate(texts):
        start = max(0, len(text) - S)
        seen[row, np.arange(start, len(text)) % max(S, 1)] = text[start:]
    return seen


def record(
    seen: Int[Array, "B S"], positions: Int[Array, "B T"], tokens: Int[Array, "B T"]
) -> Int[Array, "B S"]:
    """Writes tokens into the ring buffer: position p into slot p % S; `EMPTY` is left out."""
    S = seen.shape[1]
    rows = jnp.arange(seen.shape[0])[:, None]
    slots = jnp.where(positions == EMPTY, S, positions % S)
    return seen.at[rows, slots].set(tokens, mode="drop")


def look_up(seen: Int[Array, "B S"], position: Int[Array, "B"], n: int) -> Int[Array, "B draft"]:
    """Drafts n tokens: those that followed the latest of the longest matches of each row's end.

    A match is an n-gram of the last three tokens, or two, or one; without any, the draft is
    arbitrary. A draft that reaches the text's end repeats: after `a b a b` comes `a b a b`.

    Args:
        seen: ring buffer of tokens: position p in slot p % S.
        position: position of each row's newest token, which is in `seen`.
        n: length of the draft, at most S.

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


class Repeats:
    """Estimates the acceptance rate of prompt lookup on a text, by replaying it as decoding would.

    A step with a draft costs more than one without, so drafts are made only where they have been
    right. This depends on the tokens alone and not on a clock, so that the same request takes the
    same steps.

    Attributes:
        text: the token ids.
        rate: recent tokens per step with drafts; 1 if no drafted token is right.

    >>> Repeats([1, 2, 3, 4, 5] * 5, draft=3).rate > 3
    True
    >>> Repeats(list(range(25)), draft=3).rate
    1.0
    """

    def __init__(self, text: Sequence[int], draft: int) -> None:
        self.text: list[int] = [int(id_) for id_ in text[:-SEEN]]
        self.rate = 1.0
        self._draft = draft
        self._latest: dict[tuple[int, ...], int] = {}  # where what followed each n-gram is
        self._source: int | None = None  # place of the next guess
        self._right = 0  # guesses of this step
        self.add(text[-SEEN:])

    def add(self, ids: Sequence[int]) -> None:
        """Appends tokens to the text and updates the rate."""
        for id_ in map(int, ids):
            text, source = self.text, self._source
            text.append(id_)
            is_right = source is not None and self._right < self._draft and text[source] == id_
            ending = tuple(text[-NGRAM:])
            if is_right and source is not None:
                self._right, self._source = self._right + 1, source + 1
            else:
                self.rate = lately(self.rate, 1.0 + self._right)
                found = self._latest.get(ending)
                is_seen = found is not None and len(text) - found < SEEN
                self._right, self._source = 0, found if is_seen else None
            self._latest[ending] = len(text)


def lately(rate: Number, made: Number) -> Number:
    """Moving average of tokens per step, mostly of the last four, after a step that made so many.

    >>> lately(1.0, 5.0)
    2.0
    """
    return rate + (made - rate) / 4
