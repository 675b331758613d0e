"""The block that decoder and vision tower are made of: attention, then feed-forward.

Pre-norm with residuals (arXiv:2310.06825, section 2). How attention mixes is not decided here but
by whoever calls: over a whole sequence, over the cache, or over the patches of an image.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lechat_jax.config import MistralConfig, VisionConfig
from lechat_jax.model.cache import Ring
from lechat_jax.model.layers import Linear, RMSNorm
from lechat_jax.model.moe import Load, Mixture
from lechat_jax.model.rope import Rotations, rotate

# What says how wide a block is.
Shape = MistralConfig | VisionConfig

# What a layer remembers of the tokens before: its keys and values, or nothing.
Memory = TypeVar("Memory", Ring, None)

# From rotated queries, keys and values, and the memory, to what each query gathers and the
# memory after it.
Mixer = Callable[[Array, Array, Array, Memory], tuple[Array, Memory]]


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with rotary positions."""

    def __init__(self, config: Shape, *, rngs: nnx.Rngs) -> None:
        D, N, K, H = config.dim, config.n_heads, config.n_kv_heads, config.head_dim
        out_std = (N * H * 2 * config.n_layers) ** -0.5
        self.q = Linear((N, H), (D,), D**-0.5, rngs=rngs)
        self.k = Linear((K, H), (D,), D**-0.5, rngs=rngs)
        self.v = Linear((K, H), (D,), D**-0.5, rngs=rngs)
        self.o = Linear((D,), (N, H), out_std, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], rotary: Rotations, mix: Mixer[Memory], memory: Memory
    ) -> tuple[Float[Array, "B T D"], Memory]:
        """Attention output of each position; `mix` attends, over the sequence or the cache."""
        q, k, v = rotate(self.q(x), rotary.q), rotate(self.k(x), rotary.k), self.v(x)
        mixed, memory = mix(q, k, v, memory)
        return self.o(mixed), memory


class MLP(nnx.Module):
    """SwiGLU feed-forward (Shazeer 2020, arXiv:2002.05202): down(silu(gate x) * up x).

    The activation is at least float32 and rounded once, as PyTorch's is. In bfloat16 its
    derivative, the sum of two products, would be rounded at every step.
    """

    def __init__(self, config: Shape, *, rngs: nnx.Rngs) -> None:
        D, F = config.dim, config.hidden_dim
        self.gate = Linear((F,), (D,), D**-0.5, rngs=rngs)
        self.up = Linear((F,), (D,), D**-0.5, rngs=rngs)
        self.down = Linear((D,), (F,), (F * 2 * config.n_layers) ** -0.5, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], None]:
        """Feed-forward of each position; without experts there is no load."""
        gate = self.gate(x)
        wide = gate.astype(jnp.promote_types(gate.dtype, jnp.float32))
        return self.down(jax.nn.silu(wide).astype(gate.dtype) * self.up(x)), None


class Block(nnx.Module):
    """Pre-norm transformer block: attention, then feed-forward, each with a residual."""

    def __init__(self, config: Shape, *, rngs: nnx.Rngs) -> None:
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.attn = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        if isinstance(config, MistralConfig) and config.n_experts:
            self.mlp = Mixture(config, rngs=rngs)
        else:
            self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], rotary: Rotations, mix: Mixer[Memory], memory: Memory
    ) -> tuple[Float[Array, "B T D"], Memory, Load | None]:
        """The residual stream after this layer, its cache, and the load of its experts.

        That is how its experts were chosen, if it has any.
        """
        mixed, memory = self.attn(self.attn_norm(x), rotary, mix, memory)
        x = x + mixed
        made, load = self.mlp(self.mlp_norm(x))
        return x + made, memory, load
