"""How well held-out text is predicted, in nats a token and in bits a byte."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lechat_jax.config import MistralConfig
from lechat_jax.data import Tokens, interim_rows, score_blocks
from lechat_jax.model import Weights
from lechat_jax.step import StepOptions, score
from lechat_jax.tokenizer import Tokenizer

BLOCK = 1024  # tokens in a row: long, so that few are scored with little before them
INTERIM_ROWS = 8  # of them, evenly spread, in a validation during training


@dataclasses.dataclass(frozen=True)
class Score:
    """Total nats over a number of tokens, which stand for a number of UTF-8 bytes."""

    nats: float
    tokens: int
    n_bytes: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Nats / ln 2 / bytes, which compares models whatever their tokenizers.

        >>> Score(nats=math.log(2) * 16, tokens=4, n_bytes=8).bits_per_byte
        2.0
        """
        return self.nats / math.log(2) / self.n_bytes

    def metrics(self) -> dict[str, Any]:
        """The keys of a line of `metrics.jsonl`."""
        return {
            "val/loss": self.loss,
            "val/bpb": self.bits_per_byte,
            "val/tokens": self.tokens,
            "val/bytes": self.n_bytes,
        }


class Validator:
    """The held-out tokens in rows, and the score of a model on them.

    Every held-out token but BOS, which is given, is scored exactly once, by a softmax over
    the whole vocabulary. The `interim` score takes every n-th row, always the same ones.
    """

    def __init__(
        self, config: MistralConfig, options: StepOptions, tokens: Tokens, tokenizer: Tokenizer
    ) -> None:
        self.config, self.options = config, options
        self.rows = score_blocks(tokens.val, BLOCK, tokenizer.bos_id)
        self.n_bytes = tokens.val_bytes
        self.subset = interim_rows(len(self.rows[0]), INTERIM_ROWS)
        # Rows of the subset are cut anywhere, and decoding drops the space that a row begins
        # with: 0.02 % of the bytes in English. The full score counts the text itself.
        self.subset_bytes = sum(
            len(tokenizer.decode(row).encode()) for row in self.rows[1][self.subset].tolist()
        )
        self.batch = 4 if jax.default_backend() == "cpu" else 64

    def full(self, weights: Weights, on_rows: Callable[[int, int], None]) -> Score:
        """The score on all rows; `on_rows` hears how many are done and how many there are."""
        return self._score(weights, np.arange(len(self.rows[0])), self.n_bytes, on_rows)

    def interim(self, weights: Weights) -> Score:
        """The score on the fixed subset."""
        return self._score(weights, self.subset, self.subset_bytes, lambda done, of: None)

    def _score(
        self,
        weights: Weights,
        chosen: np.ndarray,
        n_bytes: int,
        on_rows: Callable[[int, int], None],
    ) -> Score:
        nats = 0.0
        for first in range(0, len(chosen), self.batch):
            part = chosen[first : first + self.batch]
            fill = ((0, self.batch - len(part)), (0, 0))  # with rows that do not count
            inputs, targets, counted = (np.pad(rows[part], fill) for rows in self.rows)
            nats += float(
                score(
                    self.config,
                    self.options,
                    weights,
                    jnp.asarray(inputs, jnp.int32),
                    jnp.asarray(targets, jnp.int32),
                    jnp.asarray(counted),
                )
            )
            on_rows(first + len(part), len(chosen))
        return Score(nats, int(self.rows[2][chosen].sum()), n_bytes)
