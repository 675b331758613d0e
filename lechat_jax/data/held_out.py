"""Held-out rows: what is scored and never learned, and the bytes of text that it stands for."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Integer

from lechat_jax.data.batches import Tokens
from lechat_jax.data.rows import Rows
from lechat_jax.errors import BadInput
from lechat_jax.tokenizer.tokenizer import Tokenizer


def score_blocks(
    val: Integer[np.ndarray, " val"], block: int, bos_id: int
) -> tuple[Integer[np.ndarray, "B T"], Integer[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Inputs, targets and weights that score each validation token once, except BOS.

    Rows are consecutive, so the first tokens of a row are predicted from little context.
    The last row is filled with BOS; weights are False where the target is BOS.

    >>> inputs, targets, weights = score_blocks(np.array([1, 7, 8, 2, 1, 9]), 3, bos_id=1)
    >>> inputs.tolist(), targets.tolist(), weights.astype(int).tolist()
    ([[1, 7, 8], [2, 1, 9]], [[7, 8, 2], [1, 9, 1]], [[1, 1, 1], [0, 1, 0]])

    Raises:
        BadInput: there is no token to score, or the first, which nothing precedes, is not BOS.
    """
    if len(val) < 2 or val[0] != bos_id:
        raise BadInput(f"{len(val)} validation tokens hold no BOS ({bos_id}) and one to score")
    n = -(-(len(val) - 1) // block)
    padded = np.full(n * block + 1, bos_id, val.dtype)
    padded[: len(val)] = val
    inputs, targets = padded[:-1].reshape(n, block), padded[1:].reshape(n, block)
    return inputs, targets, targets != bos_id


def score_rows(val: Integer[np.ndarray, " val"], block: int, bos_id: int) -> Rows:
    """The same as `score_blocks`, as rows of `block + 1` tokens.

    Raises:
        BadInput: as there.
    """
    inputs, targets, counted = score_blocks(val, block, bos_id)
    tokens = np.concatenate([inputs[:, :1], targets], axis=1)
    return Rows(tokens.astype(np.int32), np.pad(counted, ((0, 0), (1, 0))))


def interim_rows(n_rows: int, limit: int) -> Integer[np.ndarray, " rows"]:
    """At most `limit` of the rows of `score_blocks`, evenly spread and always the same ones.

    >>> interim_rows(10, 4).tolist()
    [1, 3, 6, 8]
    """
    n = min(n_rows, limit)
    return (2 * np.arange(n) + 1) * n_rows // (2 * n)


BLOCK = 1024  # tokens in a row: long, so that few are scored with little before them


INTERIM_ROWS = 8  # of them, evenly spread, in a validation during training


class HeldOut(NamedTuple):
    """What is scored and never learned.

    Attributes:
        rows: of T + 1 tokens, with what counts of them.
        n_bytes: UTF-8 bytes of the text that the counted tokens stand for.
        subset: the rows that are scored on the way.
        bytes_of: those of some rows.
    """

    rows: Rows
    n_bytes: int
    subset: Integer[np.ndarray, " rows"]
    bytes_of: Callable[[Integer[np.ndarray, " rows"]], int]

    @property
    def counts(self) -> Integer[np.ndarray, " rows"]:
        """How many tokens of each row are scored."""
        return np.asarray(self.rows.counted)[:, 1:].sum(axis=1)

    @classmethod
    def of_text(cls, tokens: Tokens, tokenizer: Tokenizer) -> "HeldOut":
        """Every held-out token but BOS, which is given, scored exactly once."""
        rows = score_rows(tokens.val, BLOCK, tokenizer.bos_id)
        subset = interim_rows(len(rows.tokens), INTERIM_ROWS)
        return cls(rows, tokens.val_bytes, subset, decoded_bytes(rows, tokenizer))


def decoded_bytes(
    rows: Rows, tokenizer: Tokenizer
) -> Callable[[Integer[np.ndarray, " rows"]], int]:
    """Tells how many UTF-8 bytes the counted tokens of some rows stand for, by decoding them.

    Rows are cut anywhere, and decoding drops the space that one begins with: 0.02 % of the
    bytes in English. A score of all rows counts the text itself.
    """

    def bytes_of(chosen: Integer[np.ndarray, " rows"]) -> int:
        tokens, counted = np.asarray(rows.tokens), np.asarray(rows.counted)
        own = (tokens[row, 1:][counted[row, 1:]].tolist() for row in chosen)
        return sum(len(tokenizer.decode(ids).encode()) for ids in own)

    return bytes_of
