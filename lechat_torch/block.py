"""The layer of a transformer: norm, attention, norm, feed-forward; of the decoder and of the tower.

Arithmetic follows the dtype of the weights; norms are at least float32.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor, nn

from lechat_jax.config import LatentConfig, MistralConfig, VisionConfig
from lechat_torch.moe import Mixture
from lechat_torch.rotary import rotate, rotate_neighbours


class Mix(NamedTuple):
    """What the positions of a pass see of each other and of earlier ones, in one layer.

    Attributes:
        attend: from rotated queries, keys and values to what each query gathers.
        remember: from the keys and values of new positions, or from what these are made of, to
            those of all positions: the same, unless there is a cache.
    """

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    remember: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda k, v: (k, v)


class Place(NamedTuple):
    """What the positions of a pass make of its queries and keys, the same in every layer.

    Attributes:
        rotary: the rotations of both, as complex numbers.
        stretch: of queries alone, if they grow.
    """

    rotary: Complex[Tensor, "#B T 1 pairs"]
    stretch: Float[Tensor, "#B T 1 1"] | None


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019, arXiv:1910.07467).

    Normalised in at least float32 and rounded before the product with the weight, in the
    order of mistral-inference and of transformers.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The same shape and dtype, with a root mean square of `weight`."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, self.weight.shape, eps=self.eps).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with rotary positions."""

    def __init__(self, config: MistralConfig | VisionConfig) -> None:
        super().__init__()
        D, N, K, H = config.dim, config.n_heads, config.n_kv_heads, config.head_dim
        self.head_dim = H
        self.q = nn.Linear(D, N * H, bias=False)
        self.k = nn.Linear(D, K * H, bias=False)
        self.v = nn.Linear(D, K * H, bias=False)
        self.o = nn.Linear(N * H, D, bias=False)

    def forward(self, x: Float[Tensor, "B T D"], place: Place, mix: Mix) -> Float[Tensor, "B T D"]:
        """What each position gathers from those that `mix` lets it see."""
        q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)) for part in (self.q, self.k, self.v))
        q, k = rotate(q, place.rotary), rotate(k, place.rotary)
        if place.stretch is not None:  # rounded before and after, as in transformers
            q = q * place.stretch.to(q.dtype)
        return self.o(mix.attend(q, *mix.remember(k, v)).flatten(2))


class LatentAttention(nn.Module):
    """Multi-head latent attention (MLA; DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Always as it is defined, never absorbed: each head has keys and values of its own, which are
    made anew of the latents and rotary keys that a cache remembers.
    """

    def __init__(self, config: MistralConfig, latent: LatentConfig) -> None:
        super().__init__()
        D, N, R = config.dim, config.n_heads, latent.qk_rope_head_dim
        Q, C, U = latent.q_lora_rank, latent.kv_lora_rank, latent.v_head_dim
        self.n_heads, self.nope_dim = N, latent.qk_nope_head_dim
        self.q_a = nn.Linear(D, Q, bias=False)
        self.q_norm = RMSNorm(Q, config.norm_eps)
        self.q_b = nn.Linear(Q, N * (self.nope_dim + R), bias=False)
        self.kv_a = nn.Linear(D, C + R, bias=False)
        self.kv_norm = RMSNorm(C, config.norm_eps)
        self.kv_b = nn.Linear(C, N * (self.nope_dim + U), bias=False)
        self.o = nn.Linear(N * U, D, bias=False)
        factor = config.yarn.factor if config.yarn and latent.squared_yarn_scale else 1.0
        self.sharpening = (0.1 * math.log(factor) + 1) ** 2  # of scores

    def forward(self, x: Float[Tensor, "B T D"], place: Place, mix: Mix) -> Float[Tensor, "B T D"]:
        """What each position gathers from those that `mix` lets it see."""
        q = self.q_b(self.q_norm(self.q_a(x))).unflatten(-1, (self.n_heads, -1))
        nope, rope = q.tensor_split([self.nope_dim], dim=-1)
        q = torch.cat([nope, rotate_neighbours(rope, place.rotary)], dim=-1) * self.sharpening
        if place.stretch is not None:
            q = q * place.stretch.to(q.dtype)
        latents, rope = self.kv_a(x).tensor_split([self.kv_b.in_features], dim=-1)
        latents = self.kv_norm(latents)[:, :, None]  # of one head, and so is the rotary key
        rope = rotate_neighbours(rope[:, :, None], place.rotary)
        k, v = self.keys_values(*mix.remember(latents, rope))
        return self.o(mix.attend(q, k, v).flatten(2))

    def keys_values(
        self, latents: Float[Tensor, "B S 1 C"], rope: Float[Tensor, "B S 1 R"]
    ) -> tuple[Float[Tensor, "B S N H"], Float[Tensor, "B S N U"]]:
        """Those of each head; the rotary lanes of a key are the same in all."""
        heads = self.kv_b(latents[:, :, 0]).unflatten(-1, (self.n_heads, -1))
        nope, v = heads.tensor_split([self.nope_dim], dim=-1)
        return torch.cat([nope, rope.expand(-1, -1, self.n_heads, -1)], dim=-1), v


class MLP(nn.Module):
    """SwiGLU feed-forward (Shazeer 2020, arXiv:2002.05202): down(silu(gate x) * up x)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim, bias=False)
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Each position on its own."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


def attention(config: MistralConfig | VisionConfig) -> nn.Module:
    """Latent attention or grouped-query attention."""
    if isinstance(config, MistralConfig) and config.latent_attention:
        return LatentAttention(config, config.latent_attention)
    return Attention(config)


def feed_forward(config: MistralConfig | VisionConfig, layer: int) -> nn.Module:
    """One for all tokens, or several to choose from, beside what all tokens share."""
    if isinstance(config, VisionConfig) or not config.has_experts(layer):
        return MLP(config.dim, config.hidden_dim)
    D, X, n_shared = config.dim, config.expert_dim, config.n_shared_experts
    experts: list[nn.Module] = [MLP(D, X) for _ in range(config.n_experts)]
    shared = MLP(D, n_shared * X) if n_shared else None
    return Mixture(D, config.n_experts_per_token, experts, shared)


class Block(nn.Module):
    """One layer: attention, then feed-forward, each normalised before and added after."""

    def __init__(self, config: MistralConfig | VisionConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.attn = attention(config)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = feed_forward(config, layer)

    def forward(self, x: Float[Tensor, "B T D"], place: Place, mix: Mix) -> Float[Tensor, "B T D"]:
        """The residual stream after this layer."""
        x = x + self.attn(self.attn_norm(x), place, mix)
        return x + self.mlp(self.mlp_norm(x))
