"""Text embeddings from a decoder: its final hidden states, pooled to one vector of length one."""

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


class Embedder:
    """Embeds texts with a model: vectors whose dot product is the cosine similarity of two texts.

    A decoder was trained to continue texts and not to compare them: its vectors are as good as
    its fine-tuning for that. Take the pooling and attention that it was fine-tuned with.

    Attributes:
        config: the model's config.
        tokenizer: of the texts; each begins with BOS.
        pooling: mean of all positions, the last position, or a mean weighted by position, in
            which later ones, which have seen more, count for more (SGPT, arXiv:2202.08904).
        attention: causal as in training, or bidirectional, where each position sees all of its
            text, or as many tokens on either side as the window has.
        max_tokens: upper limit of a text; of a longer one the first are embedded.
        batch: texts that are embedded at a time.
        append_eos: whether EOS follows each text, as many of those fine-tuned for `last` want.
    """

    def __init__(
        self,
        model: Mistral,
        tokenizer: Tokenizer,
        *,
        pooling: Pooling = "mean",
        attention: AttentionName = "causal",
        max_tokens: int = 2048,
        batch: int = 8,
        append_eos: bool = False,
    ) -> None:
        if max_tokens < 1 or batch < 1:
            raise BadInput(f"max_tokens ({max_tokens}) and batch ({batch}) must be at least 1")
        self.config: MistralConfig = model.config
        self.tokenizer, self.pooling, self.attention = tokenizer, pooling, attention
        self.max_tokens, self.batch, self.append_eos = max_tokens, batch, append_eos
        self._weights = weights_of(model)

    @classmethod
    def from_checkpoint(
        cls,
        folder: Path | str | SavedModel,
        *,
        dtype: DTypeLike | None = None,
        quantize: Format | None = None,
        pooling: Pooling = "mean",
        attention: AttentionName = "causal",
        max_tokens: int = 2048,
        batch: int = 8,
        append_eos: bool = False,
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
        return cls(
            bind(saved.config, weights),
            saved.tokenizer,
            pooling=pooling,
            attention=attention,
            max_tokens=max_tokens,
            batch=batch,
            append_eos=append_eos,
        )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, whole: BOS, the text, and EOS if it is appended."""
        ends = [self.tokenizer.eos_id] if self.append_eos else []
        encoded = self.tokenizer.encode_batch(list(texts))
        return [[self.tokenizer.bos_id, *map(int, ids), *ends] for ids in encoded]

    def embed(
        self,
        texts: Sequence[str] | Sequence[Sequence[int]],
        on_done: Callable[[int, int], None] = lambda done, of: None,
    ) -> Float[np.ndarray, "texts D"]:
        """Embeds texts, or their ids, in float32; each is what it would be alone.

        Args:
            texts: strings, or the ids of each, as `encode` gives them.
            on_done: called with the number of texts done and to do, after each batch.

        Raises:
            BadInput: ids are none of the model, or a text has none.
        """
        rows = [self._cut(ids) for ids in self._ids_of(texts)]
        vectors = np.zeros((len(rows), self.config.dim), np.float32)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for first in range(0, len(order), self.batch):
            chosen = order[first : first + self.batch]
            longest = max(SHORTEST, *(len(rows[i]) for i in chosen))
            tokens = np.zeros((self.batch, 1 << (longest - 1).bit_length()), np.int32)
            lengths = np.ones(self.batch, np.int32)
            for place, i in enumerate(chosen):
                tokens[place, : len(rows[i])], lengths[place] = rows[i], len(rows[i])
            how = (self.config, self.pooling, self.attention == "causal")
            vectors[chosen] = pooled(*how, self._weights, tokens, lengths)[: len(chosen)]
            on_done(first + len(chosen), len(order))
        return vectors

    def _ids_of(self, texts: Sequence[str] | Sequence[Sequence[int]]) -> list[Sequence[int]]:
        strings = [text for text in texts if isinstance(text, str)]
        if strings and len(strings) == len(texts):
            return [*self.encode(strings)]
        rows = [text for text in texts if not isinstance(text, str)]
        if strings:
            raise BadInput("give texts or ids to embed, not both")
        for ids in rows:
            if not len(ids) or not all(0 <= i < self.config.vocab_size for i in ids):
                raise BadInput(
                    f"the ids of a text must be one or more of 0 to {self.config.vocab_size - 1}"
                )
        return rows

    def _cut(self, ids: Sequence[int]) -> Sequence[int]:
        """The first of the ids; EOS stays the last, since it is what `last` pools."""
        if len(ids) <= self.max_tokens:
            return ids
        return [*ids[: self.max_tokens - self.append_eos], *([ids[-1]] if self.append_eos else [])]


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
