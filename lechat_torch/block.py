"""The layer of a transformer: norm, attention, norm, feed-forward; of the decoder and of the tower.

Arithmetic follows the dtype of the weights; norms are at least float32.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor, nn

from lechat_jax.config import MistralConfig, VisionConfig
from lechat_torch.moe import Mixture
from lechat_torch.rotary import rotate

# From rotated queries, keys and values to what each query gathers.
Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


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
        return self.o(mix(q, k, v).flatten(2))


class MLP(nn.Module):
    """SwiGLU feed-forward (Shazeer 2020, arXiv:2002.05202): down(silu(gate x) * up x)."""

    def __init__(self, config: MistralConfig | VisionConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.up = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.down = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Each position on its own."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


def feed_forward(config: MistralConfig | VisionConfig) -> nn.Module:
    """One for all tokens, or several to choose from."""
    if isinstance(config, VisionConfig) or not config.n_experts:
        return MLP(config)
    experts: list[nn.Module] = [MLP(config) for _ in range(config.n_experts)]
    return Mixture(config.dim, config.n_experts_per_token, experts)


class Block(nn.Module):
    """One layer: attention, then feed-forward, each normalised before and added after."""

    def __init__(self, config: MistralConfig | VisionConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = feed_forward(config)

    def forward(self, x: Float[Tensor, "B T D"], place: Place, mix: Mix) -> Float[Tensor, "B T D"]:
        """The residual stream after this layer."""
        x = x + self.attn(self.attn_norm(x), place, mix)
        return x + self.mlp(self.mlp_norm(x))
