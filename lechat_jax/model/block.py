"""The block that decoder and vision tower are made of: attention, then feed-forward.

Pre-norm with residuals (arXiv:2310.06825, section 2). How attention mixes is not decided here but
by whoever calls: over a whole sequence, over the cache, or over the patches of an image.
"""

from flax import nnx
from jaxtyping import Array, Float

from lechat_jax.config import MistralConfig, VisionConfig
from lechat_jax.model.attention import Memory, Mixer
from lechat_jax.model.latent import LatentAttention
from lechat_jax.model.layers import MLP, Linear, RMSNorm
from lechat_jax.model.moe import Load, Mixture
from lechat_jax.model.rope import Rotations, rotate

# What says how wide a block is.
Shape = MistralConfig | VisionConfig


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


class Block(nnx.Module):
    """Pre-norm transformer block: attention, then feed-forward, each with a residual."""

    def __init__(self, config: Shape, layer: int, *, rngs: nnx.Rngs) -> None:
        is_text = isinstance(config, MistralConfig)
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        if is_text and config.latent_attention:
            self.attn = LatentAttention(config, config.latent_attention, rngs=rngs)
        else:
            self.attn = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        if is_text and config.has_experts(layer):
            self.mlp = Mixture(config, rngs=rngs)
        else:
            self.mlp = MLP(config, config.hidden_dim, rngs=rngs)

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
