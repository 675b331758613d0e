"""Window attention by hand-written kernels: NVIDIA's cuDNN, and splash attention for TPUs.

Both are flash attention (arXiv:2205.14135), which never writes the scores to memory, and
skip what lies outside the window. Both count a window without the query itself: W - 1.
"""

import functools
import logging
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Queries = Float[Array, "B T N H"]
Keys = Float[Array, "B T K H"]  # and values

LANES = 128  # splash works on blocks of a multiple of this many positions

log = logging.getLogger(__name__)


def fused_attention(
    q: Queries,
    k: Keys,
    v: Keys,
    window: int | None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Queries:
    """Causal window attention over a whole sequence by cuDNN, in bfloat16 or float16.

    Causal and a window, never a mask: cuDNN would read a mask as a bias and compute its
    gradient, and a window that is not causal sees the future (jax#39576). "xla" computes
    from the same arguments what any machine can check.
    """
    local = None if window is None or window >= q.shape[1] else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=local, implementation=implementation
    )


@functools.cache
def cudnn_works(dtype: str, head_dim: int) -> bool:
    """Whether cuDNN attention can be trained on this machine; if not, a warning says why.

    Asked once, by doing it for a few tokens: versions and devices differ too much to list.
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
) -> Queries:
    """Causal window attention over a whole sequence by JAX's own TPU kernel.

    T is padded at the end to whole blocks; no query sees what comes after it, so the
    padding is seen by itself alone. Documents are told apart within the blocks; blocks
    of which they hide everything are computed all the same. `interpret` runs it, slowly,
    on any device.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    T, N, H = q.shape[1:]
    length, block = splash_blocks(T, window)
    kernel = _splash_kernel(length, block, N, window, interpret)

    def head_major(x: Array) -> Array:
        return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, length - T), (0, 0), (0, 0))), 1, 2)

    ids = None
    if documents is not None:
        padded = jnp.pad(documents, ((0, 0), (0, length - T)), constant_values=-1)
        ids = SegmentIds(padded, padded)
    mixed = jax.vmap(kernel)(head_major(q * H**-0.5), head_major(k), head_major(v), ids)
    return jnp.swapaxes(mixed, 1, 2)[:, :T]


def splash_blocks(T: int, window: int | None) -> tuple[int, int]:
    """The length that T is padded to, and the block that divides it, for the TPU kernel.

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
    length: int, block: int, n_heads: int, window: int | None, interpret: bool
) -> Any:
    """The kernel for one shape; building it walks all pairs of blocks, so it is kept.

    Its two backward kernels are separate: the fused one holds a partial gradient of the
    queries for every block of keys, which is T * T / block memory.
    """
    # Imported here, being experimental and of use on a TPU alone.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        LocalMask,
        MultiHeadMask,
        make_splash_mha,
    )

    left = None if window is None else window - 1
    mask = MultiHeadMask([LocalMask((length, length), (left, 0), offset=0)] * n_heads)
    with jax.ensure_compile_time_eval():  # the caller may be tracing
        kernel = make_splash_mha(
            mask,
            block_sizes=BlockSizes(block, block, block, block, block, block, block, block),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)
