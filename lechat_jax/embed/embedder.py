"""Text embeddings from a decoder: its final hidden states, pooled to one vector of length one."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lechat_jax.checkpoint.load import load_to_compute
from lechat_jax.checkpoint.saved_model import SavedModel
from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.model.binding import Weights, bind, weights_of
from lechat_jax.model.mistral import Mistral
from lechat_jax.quantize.scheme import Format
from lechat_jax.tokenizer.tokenizer import Tokenizer
from lechat_jax.tokenizer.vocabulary import no_tokenizer

Pooling = Literal["mean", "last", "weighted"]
AttentionName = Literal["causal", "bidirectional"]
SHORTEST = 16  # tokens of a row; longer ones have a power of two, so that few are compiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingOptions:
    """How texts are embedded, for the command and Python alike.

    Attributes:
        pooling: How the hidden states of a text become one vector: their mean, that of the last
            token, or a mean weighted by position, in which later tokens, which have seen more,
            count for more (SGPT, arXiv:2202.08904).
        attention: Attention: causal, as the model was trained, or bidirectional, as some are
            fine-tuned for embeddings: each token sees all of its text, or as many tokens on either
            side as the window has.
        append_eos: Put EOS behind each text, whose vector --pooling last then takes.
        max_tokens: Upper limit of a text in tokens; of a longer one the first are embedded.
        batch: Texts embedded at a time.
    """

    pooling: Pooling = "mean"
    attention: AttentionName = "causal"
    append_eos: bool = False
    max_tokens: int = 2048
    batch: int = 8

    def __post_init__(self) -> None:
        for flag, value in (("--max-tokens", self.max_tokens), ("--batch", self.batch)):
            if value < 1:
                raise BadInput(f"{flag} must be at least 1, not {value}")


class Embedder:
    """Embeds texts with a model: vectors whose dot product is the cosine similarity of two texts.

    A decoder was trained to continue texts and not to compare them: its vectors are as good as
    its fine-tuning for that. Take the pooling and attention that it was fine-tuned with.

    Attributes:
        config: the model's config.
        weights: the model's weights by name.
        tokenizer: of the texts; each begins with BOS.
        options: how they are embedded.
    """

    def __init__(
        self, model: Mistral, tokenizer: Tokenizer, options: EmbeddingOptions | None = None
    ) -> None:
        self.config: MistralConfig = model.config
        self.weights, self.tokenizer = weights_of(model), tokenizer
        self.options = options or EmbeddingOptions()

    @classmethod
    def from_checkpoint(
        cls,
        folder: Path | str | SavedModel,
        options: EmbeddingOptions | None = None,
        *,
        dtype: DTypeLike | None = None,
        quantize: Format | None = None,
    ) -> "Embedder":
        """Loads a training run's last good checkpoint, or weights of any format.

        Arguments as for the class, and as for `Generator.from_checkpoint`.

        Raises:
            BadInput: the folder is neither, is damaged, or has no tokenizer; or the weights do not
                fit into memory.
        """
        saved = folder if isinstance(folder, SavedModel) else SavedModel.open(folder)
        if saved.tokenizer is None:
            raise BadInput(no_tokenizer(saved.folder, "no text can be read"))
        weights = load_to_compute(saved, dtype, quantize, lambda shapes: None)
        return cls(bind(saved.config, weights), saved.tokenizer, options)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, whole: BOS, the text, and EOS if it is appended."""
        ends = [self.tokenizer.eos_id] if self.options.append_eos else []
        encoded = self.tokenizer.encode_batch(list(texts))
        return [[self.tokenizer.bos_id, *map(int, ids), *ends] for ids in encoded]

    def embed(self, texts: Sequence[str]) -> Float[np.ndarray, "texts D"]:
        """Embeds texts, in float32; the vector of each is what it would be alone."""
        return self.embed_ids(self.encode(texts))

    def embed_ids(
        self,
        texts: Sequence[Sequence[int]],
        on_done: Callable[[int, int], None] = lambda done, of: None,
    ) -> Float[np.ndarray, "texts D"]:
        """Embeds texts given as ids, as `encode` makes them.

        Args:
            texts: the ids of each.
            on_done: called with the number of texts done and to do, after each batch.

        Raises:
            BadInput: ids are none of the model, or a text has none.
        """
        rows, B = [self._cut(ids) for ids in texts], self.options.batch
        vectors = np.zeros((len(rows), self.config.dim), np.float32)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for first in range(0, len(order), B):
            chosen = order[first : first + B]
            longest = max(SHORTEST, len(rows[chosen[-1]]))
            tokens = np.zeros((B, 1 << (longest - 1).bit_length()), np.int32)
            lengths = np.ones(B, np.int32)
            for place, i in enumerate(chosen):
                tokens[place, : len(rows[i])], lengths[place] = rows[i], len(rows[i])
            found = pooled(
                self.config,
                self.options.pooling,
                self.options.attention == "causal",
                self.weights,
                tokens,
                lengths,
            )
            vectors[chosen] = found[: len(chosen)]
            on_done(first + len(chosen), len(order))
        return vectors

    def _cut(self, ids: Sequence[int]) -> Sequence[int]:
        """The first of the ids; EOS stays the last, since it is what `last` pools."""
        if not len(ids) or not all(0 <= i < self.config.vocab_size for i in ids):
            raise BadInput(
                f"the ids of a text must be one or more of 0 to {self.config.vocab_size - 1}"
            )
        if len(ids) <= self.options.max_tokens:
            return ids
        ends = [ids[-1]] if self.options.append_eos else []
        return [*ids[: self.options.max_tokens - len(ends)], *ends]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def pooled(
    config: MistralConfig,
    pooling: Pooling,
    is_causal: bool,
    weights: Weights,
    tokens: Int[np.ndarray | Array, "B T"],
    lengths: Int[np.ndarray | Array, " B"],
) -> Float[Array, "B D"]:
    """Pooled and normalised hidden states of rows, of which the first `lengths` tokens are text."""
    place, n = jnp.arange(tokens.shape[1]), jnp.asarray(lengths)[:, None]
    is_text = place < n
    hidden = bind(config, weights).hidden(
        jnp.asarray(tokens), documents=(~is_text).astype(jnp.int32), is_causal=is_causal
    )
    counts = {"mean": is_text, "last": place == n - 1, "weighted": is_text * (place + 1)}
    share = counts[pooling].astype(jnp.promote_types(hidden.dtype, jnp.float32))
    vectors = jnp.einsum("BT,BTD->BD", share, hidden.astype(share.dtype))
    return vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)
