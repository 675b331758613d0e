"""The Mistral 7B decoder (arXiv:2310.06825, section 2) in PyTorch.

Arithmetic follows the dtype of the weights: `model.to(torch.bfloat16)` computes in bfloat16
and `model.to(torch.float64)` in float64. Norms, rotations, scores, softmax and the returned
logits are at least float32.
"""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from lechat_jax.config import MistralConfig
from lechat_torch.attention import attend
from lechat_torch.cache import Cache, attend_cached
from lechat_torch.moe import Mixture
from lechat_torch.rotary import rotate, rotations, stretch

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

    def __init__(self, config: MistralConfig) -> None:
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

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.up = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.down = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Each position on its own."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


def feed_forward(config: MistralConfig) -> nn.Module:
    """One for all tokens, or several to choose from."""
    if not config.n_experts:
        return MLP(config)
    experts: list[nn.Module] = [MLP(config) for _ in range(config.n_experts)]
    return Mixture(config.dim, config.n_experts_per_token, experts)


class Block(nn.Module):
    """One layer: attention, then feed-forward, each normalised before and added after."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = feed_forward(config)

    def forward(self, x: Float[Tensor, "B T D"], place: Place, mix: Mix) -> Float[Tensor, "B T D"]:
        """The residual stream after this layer."""
        x = x + self.attn(self.attn_norm(x), place, mix)
        return x + self.mlp(self.mlp_norm(x))


class Mistral(nn.Module):
    """A decoder of `config.n_layers` blocks between an embedding and a head.

    Its weights are meant to be loaded; fresh, they are as PyTorch draws them, in float32.

    >>> from lechat_jax.config import preset
    >>> with torch.device("meta"):
    ...     model = Mistral(preset("lechat-15m"))
    >>> sum(weight.numel() for weight in model.parameters())
    15165888
    >>> list(model.state_dict())[:3]
    ['embed.weight', 'blocks.0.attn_norm.weight', 'blocks.0.attn.q.weight']
    """

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layers)])
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.embed.weight

    def forward(
        self, tokens: Int[Tensor, "B T"], first_position: int = 0
    ) -> Float[Tensor, "B T V"]:
        """Logits of the token that follows each position of whole sequences."""
        return self.logits(self.hidden(tokens, first_position))

    def hidden(self, tokens: Int[Tensor, "B T"], first_position: int = 0) -> Float[Tensor, "B T D"]:
        """What the head reads at each position of whole sequences.

        Where a sequence begins changes nothing but rounding, since only distances matter,
        unless queries grow with their position.
        """
        positions = first_position + torch.arange(tokens.shape[1], device=tokens.device)[None]
        mixes = [functools.partial(attend, window=window) for window in self.config.windows]
        return self._decode(tokens, positions, mixes)

    def loss(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
        """Mean nats of predicting each token but the first of a row from those before it."""
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def extend(
        self, tokens: Int[Tensor, "B T"], positions: Int[Tensor, "B T"], cache: Cache
    ) -> tuple[Float[Tensor, "B T V"], Cache]:
        """Logits behind each new token, and the cache with them in it: the one given, changed.

        A position of -1 is padding, which nothing will see. T must fit the chunk that the
        cache was made for.
        """
        mixes = [
            functools.partial(attend_cached, ring=ring, positions=positions, window=window)
            for ring, window in zip(cache, self.config.windows, strict=True)
        ]
        return self.logits(self._decode(tokens, positions, mixes)), cache

    def logits(self, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """The head's score of every token id; rounded to the model's dtype, then widened.

        In that order in mistral-inference too.
        """
        logits = self.head(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _decode(
        self,
        tokens: Int[Tensor, "B T"],
        positions: Int[Tensor, "#B T"],
        mixes: Iterable[Mix],
    ) -> Float[Tensor, "B T D"]:
        x = self.embed(tokens)
        c = self.config
        rotary = rotations(positions, c.head_dim, c.rope_theta, x.dtype, c.yarn)
        growth = c.llama_4_scaling
        place = Place(rotary, growth and stretch(positions, growth, x.dtype))
        for block, mix in zip(self.blocks, mixes, strict=True):
            x = block(x, place, mix)
        return self.norm(x)
