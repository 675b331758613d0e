"""Unused token ids: those that the training text never has share one row of the tables (tying).

Of the 32,000 ids the default text has half, and two thirds of a small model's arithmetic is its
head. In a softmax over all ids, rows of the head that no target ever asks for have the same
gradient if they are equal, so those that start equal stay equal: one row stands for all of them,
whose exponential counts as often as there are ids. Loss and training are exactly those of the
whole tables, in a product, two gradients and an optimiser of half the size. What is stored,
sampled from and exported are the whole tables.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Integer

from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import EMBEDDING, HEAD
from lechat_jax.data.rows import Rows
from lechat_jax.model.binding import Weights

AT_ONCE = 1 << 24  # ids that are counted at a time, since NumPy makes int64 of them
ROWS = 128  # a multiple of which tables have: lanes of a TPU, and what a mesh divides


def count_ids(ids: Integer[np.ndarray, " ids"], vocab_size: int) -> Int[np.ndarray, " V"]:
    """Occurrences of each id.

    >>> count_ids(np.array([1, 3, 3]), 5).tolist()
    [0, 1, 0, 2, 0]
    """
    counts = np.zeros(vocab_size, np.int64)
    for first in range(0, len(ids), AT_ONCE):
        counts += np.bincount(ids[first : first + AT_ONCE], minlength=vocab_size)
    return counts


@dataclasses.dataclass(frozen=True, eq=False)
class UnusedIds:
    """Which ids of a vocabulary have rows of their own; all others share the last row.

    >>> unused = UnusedIds(np.isin(np.arange(8), [1, 2, 5]))
    >>> unused.n_sharing, unused.row_of_id.tolist()
    (5, [3, 0, 1, 3, 3, 2, 3, 3])

    Attributes:
        has_own: of each id, whether it has a row of its own.
    """

    has_own: Bool[np.ndarray, " V"]

    @classmethod
    def none(cls, vocab_size: int) -> "UnusedIds":
        """A row for each id: the tables as they are."""
        return cls(np.ones(vocab_size, bool))

    @classmethod
    def of(cls, counts: Integer[np.ndarray, " V"]) -> "UnusedIds":
        """The ids that a text does not have share a row, but for a few that fill up the tables.

        Args:
            counts: occurrences of each id.
        """
        has_own = counts > 0
        room = -(np.count_nonzero(has_own) + 1) % ROWS
        has_own[np.flatnonzero(~has_own)[:room]] = True
        return cls(has_own) if np.count_nonzero(~has_own) > 1 else cls.none(len(counts))

    @property
    def n_sharing(self) -> int:
        """Number of ids that the last row stands for; 1 if each has its own."""
        return max(1, int(np.count_nonzero(~self.has_own)))

    @functools.cached_property
    def row_of_id(self) -> Int[np.ndarray, " V"]:
        """The row of each id in the narrow tables."""
        own = np.cumsum(self.has_own, dtype=np.int32)
        return np.where(self.has_own, own - 1, own[-1])

    @functools.cached_property
    def id_of_row(self) -> Integer[np.ndarray, " rows"]:
        """An id of each row, of the last row the first that shares it."""
        return np.unique(self.row_of_id, return_index=True)[1]

    def narrow_config(self, config: MistralConfig) -> MistralConfig:
        """The model with as many ids as the narrow tables have rows."""
        return dataclasses.replace(config, vocab_size=len(self.id_of_row))

    def narrowed(self, weights: Mapping[str, Array]) -> Weights:
        """Weights with narrow tables: the rows that ids have, and one for the others."""
        return self._with_tables(weights, self.id_of_row)

    def widened(self, weights: Mapping[str, Array]) -> Weights:
        """Weights with whole tables, a row for each id."""
        return self._with_tables(weights, self.row_of_id)

    def renumbered(self, rows: Rows) -> Rows:
        """Rows of tokens, with the row of each in the narrow tables instead of its id."""
        return rows._replace(tokens=self.row_of_id[rows.tokens])

    def _with_tables(self, weights: Mapping[str, Array], ids: np.ndarray) -> Weights:
        if self.n_sharing == 1:
            return dict(weights)
        tables = {name: weights[name] for name in (EMBEDDING, HEAD) if name in weights}
        return {**weights, **{name: table[jnp.asarray(ids)] for name, table in tables.items()}}
