"""Held-out rows for validation, with their UTF-8 bytes, for bits per byte."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer

from lechat_jax.data.rows import RowImages, Rows
from lechat_jax.data.tokens import Tokens
from lechat_jax.errors import BadInput
from lechat_jax.tokenizer.tokenizer import Tokenizer


def score_rows(val: Integer[np.ndarray, " val"], block: int, bos_id: int) -> Rows:
    """Rows of `block + 1` tokens that score each token of a validation stream once, except BOS.

    Rows are consecutive, so the first tokens of a row are predicted from little context.
    The last row is padded with BOS, which never counts.

    >>> rows = score_rows(np.array([1, 7, 8, 2, 1, 9]), 3, bos_id=1)
    >>> rows.tokens.tolist(), rows.counted.astype(int).tolist()
    ([[1, 7, 8, 2], [2, 1, 9, 1]], [[0, 1, 1, 1], [0, 0, 1, 0]])

    Raises:
        BadInput: there is no token to score, or the first token is not BOS.
    """
    if len(val) < 2 or val[0] != bos_id:
        raise BadInput(f"{len(val)} validation tokens hold no BOS ({bos_id}) and one to score")
    n = -(-(len(val) - 1) // block)
    padded = np.full(n * block + 1, bos_id, np.int32)
    padded[: len(val)] = val
    tokens = np.lib.stride_tricks.sliding_window_view(padded, block + 1)[::block]
    counted = tokens != bos_id
    counted[:, 0] = False
    return Rows(tokens, counted)


def interim_rows(n_rows: int, limit: int) -> Integer[np.ndarray, " rows"]:
    """A fixed, evenly spread subset of at most `limit` rows, for validation during training.

    >>> interim_rows(10, 4).tolist()
    [1, 3, 6, 8]
    """
    n = min(n_rows, limit)
    return (2 * np.arange(n) + 1) * n_rows // (2 * n)


BLOCK = 1024  # tokens in a row: long, so that few are scored with little before them


INTERIM_ROWS = 8  # of them, evenly spread, in a validation during training


class HeldOut(NamedTuple):
    """Held-out rows, which are scored and never trained on.

    Attributes:
        rows: rows of T + 1 tokens, with their loss mask.
        n_bytes: UTF-8 bytes of the text of the scored tokens.
        subset: indices of the rows that are scored during training.
        bytes_of: gives the UTF-8 bytes of the scored tokens of some rows.
        images_of: gives the images of some rows.
    """

    rows: Rows
    n_bytes: int
    subset: Integer[np.ndarray, " rows"]
    bytes_of: Callable[[Integer[np.ndarray, " rows"]], int]
    images_of: Callable[[Integer[np.ndarray, " rows"]], RowImages | None] = lambda _: None

    @property
    def counts(self) -> Integer[np.ndarray, " rows"]:
        """Number of scored tokens of each row."""
        return np.asarray(self.rows.counted)[:, 1:].sum(axis=1)

    @classmethod
    def of_text(
        cls,
        tokens: Tokens,
        tokenizer: Tokenizer,
        block: int | None = None,
        interim: int = INTERIM_ROWS,
    ) -> "HeldOut":
        """The held-out stream of a text: every token but BOS is scored exactly once.

        Rows have `block` targets, by default `BLOCK`; the subset has at most `interim` rows.
        """
        rows = score_rows(tokens.val, block or BLOCK, tokenizer.bos_id)
        subset = interim_rows(len(rows.tokens), interim)
        return cls(rows, tokens.val_bytes, subset, decoded_bytes(rows, tokenizer))


def decoded_bytes(
    rows: Rows, tokenizer: Tokenizer
) -> Callable[[Integer[np.ndarray, " rows"]], int]:
    """A function that counts the UTF-8 bytes of the scored tokens of some rows, by decoding them.

    Rows are cut anywhere, and decoding drops a row's leading space: 0.02 % of the bytes in
    English. For a score of all rows the bytes of the text itself are used.
    """

    def bytes_of(chosen: Integer[np.ndarray, " rows"]) -> int:
        tokens, counted = np.asarray(rows.tokens), np.asarray(rows.counted)
        own = (tokens[row, 1:][counted[row, 1:]].tolist() for row in chosen)
        return sum(len(tokenizer.decode(ids).encode()) for ids in own)

    return bytes_of
