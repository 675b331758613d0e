"""Flash attention with a sliding window: cuDNN on NVIDIA GPUs, splash attention on TPUs.

Both (arXiv:2205.14135) never write the scores to memory, and skip blocks outside the window.
Both count a window without the query itself: W - 1.
"""

import functools
import logging
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Queries = Float[Array, "B T N H"]
Keys = Float[Array, "B T K H"]  # and values, of the same width
Values = Float[Array, "B T K U"]
Mixed = Float[Array, "B T N U"]

LANES = 128  # splash works on blocks of a multiple of this many positions

log = logging.getLogger(__name__)


def fused_attention(
    q: Queries,
    k: Keys,
    v: Keys,
    window: int | None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Queries:
    """Flash attention by cuDNN: causal, with a sliding window, in bfloat16 or float16.

    It is given causal and a window, never a mask: cuDNN would take a mask as a bias and compute
    its gradient, and a window without causal sees the future (jax#39576). "xla" computes the
    same on any machine, for tests.
    """
    local = None if window is None or window >= q.shape[1] else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=local, implementation=implementation
    )


def bidirectional_cudnn(
    q: Queries,
    k: Keys,
    v: Keys,
    lengths: Int[Array, "B"],
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Queries:
    """Flash attention by cuDNN in both directions, over the first positions of each row."""
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )


@functools.cache
def cudnn_works(dtype: str, head_dim: int) -> bool:
    """Whether cuDNN attention works forward and backward on this machine; if not, warns why.

    Tried once, on a few tokens: versions and devices differ too much to list.
    """
    q, k = np.ones((1, 64, 2, head_dim), dtype), np.ones((1, 64, 1, head_dim), dtype)

    def total(q: Array, k: Array, v: Array) -> Array:
        return fused_attention(q, k, v, window=16).astype(jnp.float32).sum()

    try:
        with jax.ensure_compile_time_eval():  # the caller may be tracing
            jax.block_until_ready(jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, k))
    except (RuntimeError, ValueError) as error:
        why = str(error).strip().partition("\n")[0]
        log.warning("cuDNN attention does not work here, so XLA does it, slower: %s", why)
        return False
    return True


def splash_attention(
    q: Queries,
    k: Keys,
    v: Keys,
    window: int | None,
    documents: Int[Array, "B T"] | None = None,
    interpret: bool = False,
    is_causal: bool = True,
) -> Queries:
    """Splash attention, JAX's TPU kernel: causal, with a sliding window and document masks.

    T is padded at the end to full blocks; no query sees what comes after it, or it is another
    document, so only padding sees the padding. Documents are masked within the blocks; blocks that
    they mask completely are computed all the same. `interpret` runs it, slowly, on any device, for
    tests.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    T, N, H = q.shape[1:]
    length, block = splash_blocks(T, window)
    kernel = _splash_kernel(length, block, N, window, interpret, is_causal)

    def head_major(x: Array) -> Array:
        return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, length - T), (0, 0), (0, 0))), 1, 2)

    ids = None
    if documents is not None:
        padded = jnp.pad(documents, ((0, 0), (0, length - T)), constant_values=-1)
        ids = SegmentIds(padded, padded)
    mixed = jax.vmap(kernel)(head_major(q * H**-0.5), head_major(k), head_major(v), ids)
    return jnp.swapaxes(mixed, 1, 2)[:, :T]


def splash_blocks(T: int, window: int | None) -> tuple[int, int]:
    """Padded length and block size of splash attention for T tokens.

    Blocks of 512 keep the matrix unit busy, but a block wider than the window computes
    mostly what the window hides.

    >>> splash_blocks(4096, 4096), splash_blocks(4096, 64), splash_blocks(200, None)
    ((4096, 512), (4096, 128), (256, 256))
    """
    length = -(-T // LANES) * LANES
    widest = max(LANES, length if window is None else window)
    return length, max(b for b in (128, 256, 512) if length % b == 0 and b <= widest)


@functools.cache
def _splash_kernel(
    length: int, block: int, n_heads: int, window: int | None, interpret: bool, is_causal: bool
) -> Any:
    """The splash kernel for one shape, cached, since building it visits all pairs of blocks.

    Its two backward kernels are separate: the fused one holds a partial gradient of the
    queries for every block of keys, which is T * T / block memory.
    """
    # Imported here, being experimental and of use on a TPU alone.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        FullMask,
        LocalMask,
        MultiHeadMask,
        make_splash_mha,
    )

    left, size = None if window is None else window - 1, (length, length)
    mask = LocalMask(size, (left, 0), offset=0) if is_causal else FullMask(size)
    with jax.ensure_compile_time_eval():  # the caller may be tracing
        kernel = make_splash_mha(
            MultiHeadMask([mask] * n_heads),
            block_sizes=BlockSizes(block, block, block, block, block, block, block, block),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)
