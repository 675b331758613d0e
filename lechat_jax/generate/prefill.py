"""Prefill: chunk size of prompts, and size of the KV cache."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Int

from lechat_jax.config import MistralConfig
from lechat_jax.devices.mesh import HEADS, ROWS
from lechat_jax.devices.platform import platform
from lechat_jax.model.binding import Weights
from lechat_jax.model.cache import EMPTY, cache_bytes, capacity
from lechat_jax.ops.attention_backend import slots_at_once
from lechat_jax.ops.matmul import FEW

# Tokens of a short and of a long prefill chunk.
CHUNKS = {"cpu": (FEW, 512), "gpu": (256, 256), "tpu": (256, 512)}

# Weights by name, or only their shapes and types.
Described = Weights | Mapping[str, jax.ShapeDtypeStruct]


class CacheSize(NamedTuple):
    """The arguments of `empty_cache`, which decide a KV cache's size."""

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
    """Size of the KV cache for `batch` rows, with prefill chunks and drafts.

    Keys have the compute dtype, that of the norms, but at least float32 on a CPU, which would
    convert the complete ring buffer, and back, to write one bfloat16 token into it. A draft may
    reach beyond the context, though no text does.
    """
    dtype = weights["norm.scale"].dtype
    if platform() == "cpu":
        dtype = jnp.promote_types(dtype, jnp.float32)
    return CacheSize(config, batch, max(chunk, 1 + draft), context + draft, dtype)


def cached_bytes(size: CacheSize, mesh: Mesh | None = None) -> int:
    """Memory of a KV cache in bytes: its ring buffers, and the attention scores of one layer.

    Scores are of one row's chunk, since prefill takes one row at a time. With a mesh, of one of
    its devices; on a CPU, whose simulated devices have one memory, of all.
    """
    config, batch, chunk, context, dtype = size
    if mesh is not None and platform() != "cpu":
        rows = -(-batch // mesh.shape[ROWS])
        size = size._replace(batch=rows)
        return -(-cached_bytes(size) // mesh.shape[HEADS])
    slots = max(capacity(window, chunk, context) for window in config.windows)
    wide = jnp.promote_types(dtype, jnp.float32).itemsize
    alone = cache_bytes(*size._replace(batch=1)) if batch > 1 else 0
    scores = max(batch * slots, chunk * slots_at_once(slots, chunk))
    return cache_bytes(*size) + alone + config.n_heads * scores * wide


def chunk_sizes(config: MistralConfig, context: int) -> tuple[int, ...]:
    """Tokens of a prefill chunk on this device: of the end of a prompt, and of a long one before.

    A chunk takes as long whether it is full or padded, so a short prompt wants a short one. On a
    CPU, up to `FEW` positions are multiplied as fast as any; of a long prompt, 512 at once save a
    third of the time. An accelerator is bound by reading the weights up to so many positions as
    its arithmetic and its memory differ by: an H100 295 (989 TFLOP/s over 3.35 TB/s), a v6e 560.

    A ring has room for a chunk beside its window, so a model with small windows has short ones.

    >>> from lechat_jax.config import preset
    >>> chunk_sizes(preset("lechat-15m"), 4096), chunk_sizes(preset("mistral-7b-v0.1"), 4096)
    ((64,), (64, 512))
    """
    short, long = CHUNKS[platform()]
    rooms = [context if window is None else window // 4 for window in config.windows]
    return (short, long) if short < long <= min(rooms) else (short,)


def chunk_of(
    prompt: Sequence[int], at: int, chunk: int
) -> tuple[Int[np.ndarray, "1 T"], Int[np.ndarray, "1 T"]]:
    """A prefill chunk: tokens and positions of a prompt from `at` on, without its last token.

    The rest of the chunk is padding, at position -1 (`EMPTY`).

    >>> chunk_of([11, 12, 13, 14, 15], at=3, chunk=3)
    (array([[14,  0,  0]], dtype=int32), array([[ 3, -1, -1]], dtype=int32))
    """
    part = prompt[at : min(at + chunk, len(prompt) - 1)]
    tokens, positions = np.zeros((1, chunk), np.int32), np.full((1, chunk), EMPTY, np.int32)
    tokens[0, : len(part)] = part
    positions[0, : len(part)] = np.arange(at, at + len(part))
    return tokens, positions
