"""Multi-head latent attention (MLA; DeepSeek-V2, arXiv:2405.04434, section 2.1).

A token's keys and values are made of one vector, the latent c, and of a rotary key that all heads
share, and nothing else is cached. There are two ways to the same sum. Expanded, each head has its
key and value, and attention is as ever: of a whole sequence that is the least work. Absorbed, with
W_k and W_v a head's halves of `kv_b`,

    q . (W_k c) = (W_k^T q) . c        sum of p (W_v c) = W_v (sum of p c)

so a query is made one over latents, which are keys and values of all heads at once: more
arithmetic for each query and key, and a few hundredths of the bytes to read. So few queries over a
cache are absorbed, and for many its latents are expanded, a block at a time.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lechat_jax.config import LatentConfig, MistralConfig
from lechat_jax.model.attention import Expansion, LatentQueries, Memory, Mixer
from lechat_jax.model.layers import Linear, RMSNorm
from lechat_jax.model.rope import Rotations, deinterleaved, rotate
from lechat_jax.ops.kernel_forms import as_form


class LatentAttention(nnx.Module):
    """Latent attention: expanded, or absorbed where few queries read a ring of latents."""

    def __init__(self, config: MistralConfig, widths: LatentConfig, *, rngs: nnx.Rngs) -> None:
        D, N, H, U = config.shape("DNHU")
        Q, C, Z, Y = config.shape("QCZY")
        self.n_plain, self.rank = widths.qk_nope_head_dim, C
        self.q_a = Linear((Q,), (D,), D**-0.5, rngs=rngs)
        self.q_norm = RMSNorm(Q, config.norm_eps)
        self.q_b = Linear((N, H), (Q,), Q**-0.5, rngs=rngs)
        self.kv_a = Linear((Z,), (D,), D**-0.5, rngs=rngs)
        self.kv_norm = RMSNorm(C, config.norm_eps)
        self.kv_b = Linear((N, Y), (C,), C**-0.5, rngs=rngs)
        self.o = Linear((D,), (N, U), (N * U * 2 * config.n_layers) ** -0.5, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], rotary: Rotations, mix: Mixer[Memory], memory: Memory
    ) -> tuple[Float[Array, "B T D"], Memory]:
        """Attention output of each position; `mix` attends, over the sequence or the cache."""
        q = self.q_b(self.q_norm(self.q_a(x)))
        q, q_rotary = q[..., : self.n_plain], q[..., self.n_plain :]
        if rotary.scale is not None:
            q = q * rotary.scale[..., None, None].astype(q.dtype)
        q_rotary = rotate(deinterleaved(q_rotary), rotary.q)
        c = self.kv_a(x)[:, :, None]
        c, k_rotary = self.kv_norm(c[..., : self.rank]), c[..., self.rank :]
        k_rotary = rotate(deinterleaved(k_rotary), rotary.k)
        if memory is None:
            mixed, memory = mix(*self._expanded(q, q_rotary, c, k_rotary), memory)
            return self.o(mixed), memory
        kv_b = as_form(self.kv_b.kernel.get_value()).floats(x.dtype).astype(x.dtype)
        halves = Expansion(kv_b[:, : self.n_plain], kv_b[:, self.n_plain :])
        scale = (self.n_plain + q_rotary.shape[-1]) ** -0.5
        if expands(x.shape[1], self.rank, kv_b.shape[1]):
            mixed, memory = mix(LatentQueries(q, q_rotary, scale, halves), k_rotary, c, memory)
            return self.o(mixed), memory
        q = jnp.einsum("BTNO,NOC->BTNC", q, halves.k)
        mixed, memory = mix(LatentQueries(q, q_rotary, scale), k_rotary, c, memory)
        return self.o(jnp.einsum("BTNC,NUC->BTNU", mixed, halves.v)), memory

    def _expanded(
        self, q: Array, q_rotary: Array, c: Array, k_rotary: Array
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N H"], Float[Array, "B T N U"]]:
        """Query, key and value of each head."""
        kv = self.kv_b(c[:, :, 0])
        k, v = kv[..., : self.n_plain], kv[..., self.n_plain :]
        k_rotary = jnp.broadcast_to(k_rotary, q_rotary.shape)
        return jnp.concatenate([q, q_rotary], -1), jnp.concatenate([k, k_rotary], -1), v


def expands(n_queries: int, rank: int, lanes: int) -> bool:
    """Whether it is less arithmetic to expand latents than to absorb as many queries.

    Absorbed, a query and a slot cost a head `rank` multiplications for the score and as many for
    the mix; expanded, the `lanes` of a key and a value, and `rank` times as many to make these.

    >>> from lechat_jax.config import preset
    >>> C, Y = preset("mistral-small-4-119b-2603").shape("CY")
    >>> expands(153, C, Y), expands(154, C, Y)
    (False, True)
    """
    return n_queries * (2 * rank - lanes) > rank * lanes
