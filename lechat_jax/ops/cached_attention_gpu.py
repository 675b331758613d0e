"""Attention of a prefill chunk over a ring on an NVIDIA GPU: a Pallas kernel, by Triton.

Flash attention (arXiv:2205.14135) forward, with a mask of any kind, since a ring's slots are in no
order: scores stay in registers, where XLA writes those of each block of slots to memory.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, Int

BLOCK_Q, BLOCK_K = 64, 64  # queries, and slots of the ring, of a block
LEAST = 16  # of each axis of a product in Triton


def fits(q: Float[Array, "B T N H"], k: Float[Array, "B K S H"]) -> bool:
    """Whether the kernel can compute these shapes: half precision, and whole blocks."""
    T, H, S = q.shape[1], q.shape[3], k.shape[2]
    is_half = q.dtype.itemsize == 2 and k.dtype == q.dtype  # float32 would be multiplied as TF32
    are_powers = all(n >= LEAST and n & (n - 1) == 0 for n in (min(T, BLOCK_Q), H))
    return is_half and are_powers and T % min(T, BLOCK_Q) == 0 and S % BLOCK_K == 0


def attend_in_chunk(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
    used: Int[Array, ""],
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Attention over the first `used` slots, as `model.attention.attend_cached` defines it.

    `interpret` runs it, slowly, on any device, for tests.
    """
    B, T, N, H = q.shape
    K, S = k.shape[1:3]
    G, block = N // K, min(T, BLOCK_Q)
    head = pl.BlockSpec((None, None, block, H), lambda b, n, t: (b, n, t, 0))
    ring = pl.BlockSpec((None, None, S, H), lambda b, n, t: (b, n // G, 0, 0))
    made = pl.pallas_call(
        functools.partial(_kernel, scale=H**-0.5),
        out_shape=jax.ShapeDtypeStruct((B, N, T, H), q.dtype),
        grid=(B, N, T // block),
        in_specs=[
            pl.BlockSpec((1,), lambda b, n, t: (0,)),
            head,
            ring,
            ring,
            pl.BlockSpec((None, block, S), lambda b, n, t: (b, t, 0)),
        ],
        out_specs=head,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(used[None], jnp.swapaxes(q, 1, 2), k, v, mask)
    return jnp.swapaxes(made, 1, 2)


def _kernel(used: Any, q: Any, k: Any, v: Any, mask: Any, out: Any, *, scale: float) -> None:
    """One block of queries of a head, by references."""
    queries = q[...]
    low = jnp.finfo(jnp.float32).min / 2

    def add(i: Array, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, mixed = so_far
        slots = pl.ds(i * BLOCK_K, BLOCK_K)
        scores = jnp.dot(queries, k[slots, :].T, preferred_element_type=jnp.float32) * scale
        scores = scores + jnp.where(mask[:, slots], 0.0, low)
        higher = jnp.maximum(top, scores.max(axis=1))
        weights, kept = jnp.exp(scores - higher[:, None]), jnp.exp(top - higher)
        more = jnp.dot(weights.astype(v.dtype), v[slots, :], preferred_element_type=jnp.float32)
        return higher, total * kept + weights.sum(axis=1), mixed * kept[:, None] + more

    rows, width = queries.shape
    nothing = jnp.full(rows, 2 * low, jnp.float32), jnp.zeros(rows, jnp.float32)
    n_blocks = jnp.maximum(1, (used[0] + BLOCK_K - 1) // BLOCK_K)
    start = (*nothing, jnp.zeros((rows, width), jnp.float32))
    _, total, mixed = jax.lax.fori_loop(0, n_blocks, add, start)
    out[...] = (mixed / total[:, None]).astype(out.dtype)
