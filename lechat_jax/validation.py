"""How well held-out text is predicted, in nats a token and in bits a byte."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Integer

from lechat_jax.config import MistralConfig
from lechat_jax.data import Tokens, interim_rows, score_rows
from lechat_jax.model import Weights
from lechat_jax.rows import Rows
from lechat_jax.sharding import ROWS, placed
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


class HeldOut(NamedTuple):
    """What is scored and never learned.

    Attributes:
        rows: of T + 1 tokens, with what counts of them.
        n_bytes: UTF-8 bytes of the text that the counted tokens stand for.
        subset: the rows that are scored on the way.
        subset_bytes: those of them.
    """

    rows: Rows
    n_bytes: int
    subset: Integer[np.ndarray, " rows"]
    subset_bytes: int

    @classmethod
    def of_text(cls, tokens: Tokens, tokenizer: Tokenizer) -> "HeldOut":
        """Every held-out token but BOS, which is given, scored exactly once."""
        rows = score_rows(tokens.val, BLOCK, tokenizer.bos_id)
        subset = interim_rows(len(rows.tokens), INTERIM_ROWS)
        # Rows of the subset are cut anywhere, and decoding drops the space that a row begins
        # with: 0.02 % of the bytes in English. The full score counts the text itself.
        targets = rows.tokens[subset, 1:].tolist()
        n_bytes = sum(len(tokenizer.decode(row).encode()) for row in targets)
        return cls(rows, tokens.val_bytes, subset, n_bytes)


class Validator:
    """The score of a model on what was held out, by a softmax over the whole vocabulary.

    The `interim` score takes every n-th row, always the same ones.
    """

    def __init__(self, config: MistralConfig, options: StepOptions, held_out: HeldOut) -> None:
        self.config, self.options, self.held_out = config, options, held_out
        batch = 4 if jax.default_backend() == "cpu" else 64
        ways = options.mesh.shape[ROWS] if options.mesh else 1
        self.batch = -(-batch // ways) * ways

    def full(self, weights: Weights, on_rows: Callable[[int, int], None]) -> Score:
        """The score on all rows; `on_rows` hears how many are done and how many there are."""
        return self._score(
            weights, np.arange(len(self.held_out.rows.tokens)), self.held_out.n_bytes, on_rows
        )

    def interim(self, weights: Weights) -> Score:
        """The score on the fixed subset."""
        chosen, n_bytes = self.held_out.subset, self.held_out.subset_bytes
        return self._score(weights, chosen, n_bytes, lambda done, of: None)

    def _score(
        self,
        weights: Weights,
        chosen: np.ndarray,
        n_bytes: int,
        on_rows: Callable[[int, int], None],
    ) -> Score:
        nats, tokens = 0.0, 0
        for first in range(0, len(chosen), self.batch):
            part = chosen[first : first + self.batch]
            fill = ((0, self.batch - len(part)), (0, 0))  # with rows that do not count
            rows = Rows(*(None if x is None else np.pad(x[part], fill) for x in self.held_out.rows))
            counted = np.asarray(rows.counted)[:, 1:]
            nats += float(
                score(
                    self.config,
                    self.options,
                    weights,
                    self._placed(rows.tokens[:, :-1].astype(np.int32)),
                    self._placed(rows.tokens[:, 1:].astype(np.int32)),
                    self._placed(counted),
                    None if rows.documents is None else self._placed(rows.documents[:, :-1]),
                )
            )
            tokens += int(counted.sum())
            on_rows(first + len(part), len(chosen))
        return Score(nats, tokens, n_bytes)

    def _placed(self, array: np.ndarray) -> Any:
        return placed(self.options.mesh, "BT", array)
