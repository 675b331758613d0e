"""How prompts are read: in which chunks, and into a cache of which size."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Int

from lechat_jax.config import MistralConfig
from lechat_jax.model.cache import EMPTY, cache_bytes, capacity
from lechat_jax.model.mistral import Weights
from lechat_jax.ops.matmul import FEW

# Weights by name, or only their shapes and types.
Described = Weights | Mapping[str, jax.ShapeDtypeStruct]


class CacheSize(NamedTuple):
    """The arguments of `empty_cache`."""

    config: MistralConfig
    batch: int
    chunk: int
    context: int
    dtype: DTypeLike


def cache_size(
    config: MistralConfig,
    weights: Described,
    batch: int,
    chunk: int,
    context: int,
    draft: int,
) -> CacheSize:
    """The cache for so many rows, which are read by the chunk and guessed `draft` tokens ahead.

    Keys have the type that is computed in, that of the norms, but at least float32 on a CPU,
    which would convert the whole ring, and back, to write a token of bfloat16 into it. A guess
    may reach beyond the context, though no text does.
    """
    dtype = weights["norm.scale"].dtype
    if jax.default_backend() == "cpu":
        dtype = jnp.promote_types(dtype, jnp.float32)
    return CacheSize(config, batch, max(chunk, 1 + draft), context + draft, dtype)


def cached_bytes(size: CacheSize) -> int:
    """Memory of a cache and of what reads it: its rings, and the scores of one layer's chunk."""
    config, batch, chunk, context, dtype = size
    slots = max(capacity(window, chunk, context) for window in config.windows)
    wide = jnp.promote_types(dtype, jnp.float32).itemsize
    return cache_bytes(*size) + batch * config.n_heads * chunk * slots * wide


def best_chunk() -> int:
    """Tokens of a prompt to read at once.

    A CPU takes 0.1 ms for each token of a chunk (the default model, two cores), padding too,
    so a short prompt wants a short chunk, and up to `FEW` it multiplies as fast as it ever
    does. On an H200 fewer than 165 tokens take no less time than reading the weights for them
    (790 TFLOP/s over 4.8 TB/s).
    """
    return FEW if jax.default_backend() == "cpu" else 256


def left_padded(
    prompts: Sequence[Sequence[int]], chunk: int, start: int = 0
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """Tokens and positions of all but the last token of each prompt, in whole chunks.

    The first token of each is at position `start` of its text.
    """
    longest = max(len(prompt) for prompt in prompts) - 1
    T = -(-longest // chunk) * chunk
    tokens = np.zeros((len(prompts), T), np.int32)
    positions = np.full_like(tokens, EMPTY)
    for row, prompt in enumerate(prompts):
        n = len(prompt) - 1
        tokens[row, T - n :] = prompt[:-1]
        positions[row, T - n :] = np.arange(start, start + n)
    return tokens, positions
