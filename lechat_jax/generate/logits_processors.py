"""Logits processors: logit bias, presence and frequency penalties, grammar masks, top log-probs.

What a server's requests may want beyond `Sampling`. All are arrays with a value for each row, so
that rows with and without them share one compiled program: a bias of 0 adds nothing to the last
bit, and the reported log-probabilities are the model's own, before any of it.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from lechat_jax.errors import BadInput

MOST_TOP = 20  # likeliest tokens whose log-probabilities can be had, as of OpenAI's API
WORD = 32  # bits of a word of a mask


class Processors(NamedTuple):
    """Logits processors of each row.

    Attributes:
        bias: is added to the logits.
        presence: is subtracted from the logits of ids that the row has produced.
        frequency: is subtracted as often as the row has produced the id.
        allowed: bit i % 32 of word i // 32 says whether id i may come next (a grammar).
        wants_top: whether somebody looks at the likeliest tokens.
        is_single: whether the row makes one token a step, since the next depends on it otherwise
            than by the model: with penalties or a grammar no draft can be verified.
    """

    bias: Float[Array, "B V"]
    presence: Float[Array, "B"]
    frequency: Float[Array, "B"]
    allowed: UInt32[Array, "B words"]
    wants_top: Bool[Array, "B"]
    is_single: Bool[Array, "B"]


class Top(NamedTuple):
    """The likeliest tokens at each position, likeliest first, and their log-probs in nats."""

    ids: Int[Array, "*positions top"]
    logprobs: Float[Array, "*positions top"]


@dataclasses.dataclass(frozen=True)
class LogitsProcessing:
    """Logits processors of one row as a user gives them.

    Attributes:
        logit_bias: what is added to the logit of an id.
        presence_penalty: is subtracted from the logits of ids that the row has produced.
        frequency_penalty: is subtracted as often as the row has produced the id.
        has_grammar: whether `ContinuousBatch.allow` says which ids may come next.
        n_top: likeliest tokens to be told at each step, 0 to 20.
    """

    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    has_grammar: bool = False
    n_top: int = 0

    def check(self, vocab_size: int) -> None:
        """Raises `BadInput` for a bias of an id that the model does not have."""
        for id_ in self.logit_bias:
            if not 0 <= id_ < vocab_size:
                raise BadInput(
                    f"logit_bias has the id {id_}, and the model's ids are 0 to {vocab_size - 1}"
                )

    def processors(self, vocab_size: int) -> Processors:
        """These as arrays of one row."""
        bias = np.zeros((1, vocab_size), np.float32)
        for id_, value in self.logit_bias.items():
            bias[0, id_] = value
        penalties = (self.presence_penalty, self.frequency_penalty)
        is_single = self.has_grammar or any(penalties)
        presence, frequency = (np.full(1, penalty, np.float32) for penalty in penalties)
        flags = (np.full(1, flag) for flag in (self.n_top > 0, is_single))
        rows = (bias, presence, frequency, all_allowed(1, vocab_size), *flags)
        return Processors(*map(jnp.asarray, rows))


def all_allowed(n_rows: int, vocab_size: int) -> UInt32[np.ndarray, "B words"]:
    """A grammar mask that allows every id."""
    return np.full((n_rows, -(-vocab_size // WORD)), 2**WORD - 1, np.uint32)


def process(
    logits: Float[Array, "B T V"], processors: Processors, counts: Int[Array, "B V"]
) -> Float[Array, "B T V"]:
    """The logits to choose from: with bias and penalties, and -inf for what the grammar forbids.

    Args:
        logits: the model's.
        processors: of each row.
        counts: how often each row has produced each id.
    """
    _, presence, frequency, allowed, _, _ = processors
    V = logits.shape[-1]
    penalty = presence[:, None] * (counts > 0) + frequency[:, None] * counts
    words = jnp.repeat(allowed, WORD, axis=1)[:, :V]
    is_allowed = (words >> (jnp.arange(V, dtype=jnp.uint32) % WORD)) & 1
    changed = logits + (processors.bias - penalty).astype(logits.dtype)[:, None]
    return jnp.where(is_allowed[:, None] > 0, changed, -jnp.inf)


def top_of(logits: Float[Array, "*positions V"], is_wanted: Bool[Array, ""]) -> Top:
    """The likeliest tokens under the model; of equal ones the lowest ids. Zeros if not wanted."""
    k = min(MOST_TOP, logits.shape[-1])

    def found() -> Top:
        values, ids = jax.lax.top_k(logits, k)
        return Top(ids, values - jax.nn.logsumexp(logits, axis=-1, keepdims=True))

    def nothing() -> Top:
        shape = (*logits.shape[:-1], k)
        return Top(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, logits.dtype))

    return jax.lax.cond(is_wanted, found, nothing)
