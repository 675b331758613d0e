"""The Mistral 7B decoder (arXiv:2310.06825, section 2) in PyTorch.

Arithmetic follows the dtype of the weights: `model.to(torch.bfloat16)` computes in bfloat16
and `model.to(torch.float64)` in float64. Norms, rotations, scores, softmax and the returned
logits are at least float32.
"""

import functools
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lechat_jax.config import MistralConfig
from lechat_torch.attention import attend
from lechat_torch.block import Block, Mix, Place, RMSNorm
from lechat_torch.cache import Cache, attend_cached, remember
from lechat_torch.rotary import rotations, stretch
from lechat_torch.vision import Projector, VisionTower, splice


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
        self.blocks = nn.ModuleList([Block(config, i) for i in range(config.n_layers)])
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.embed.weight
        if config.vision:
            self.vision = VisionTower(config.vision)
            self.projector = Projector(config.vision, config.dim, config.norm_eps)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        first_position: int = 0,
        features: Float[Tensor, "image_tokens D"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits of the token that follows each position of whole sequences."""
        return self.logits(self.hidden(tokens, first_position, features))

    def hidden(
        self,
        tokens: Int[Tensor, "B T"],
        first_position: int = 0,
        features: Float[Tensor, "image_tokens D"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """What the head reads at each position of whole sequences.

        Where a sequence begins changes nothing but rounding, since only distances matter,
        unless queries grow with their position. Each sequence has the images of these `features`.
        """
        positions = first_position + torch.arange(tokens.shape[1], device=tokens.device)[None]
        mixes = [Mix(functools.partial(attend, window=window)) for window in self.config.windows]
        return self._decode(self.embedded(tokens, features), positions, mixes)

    def see(
        self, images: Sequence[Float[Tensor, "3 _height _width"]]
    ) -> Float[Tensor, "image_tokens D"]:
        """What stands for the embeddings of the image tokens of these images, in their order."""
        assert self.config.vision is not None
        side = self.config.vision.patch_size
        grids = [(image.shape[1] // side, image.shape[2] // side) for image in images]
        return self.projector(self.vision(images), grids)

    def embedded(
        self, tokens: Int[Tensor, "B T"], features: Float[Tensor, "image_tokens D"] | None
    ) -> Float[Tensor, "B T D"]:
        """Embeddings of tokens, and the features of the same images in each sequence."""
        x = self.embed(tokens)
        if features is None or self.config.vision is None:
            return x
        image_id = self.config.vision.image_token_id
        rows = zip(x[:, None], tokens[:, None], strict=True)
        return torch.cat([splice(*row, features, image_id) for row in rows])

    def loss(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
        """Mean nats of predicting each token but the first of a row from those before it."""
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def extend(
        self,
        tokens: Int[Tensor, "B T"],
        positions: Int[Tensor, "B T"],
        cache: Cache,
        embedded: Float[Tensor, "B T D"] | None = None,
    ) -> tuple[Float[Tensor, "B T V"], Cache]:
        """Logits behind each new token, and the cache with them in it: the one given, changed.

        A position of -1 is padding, which nothing will see. T must fit the chunk that the
        cache was made for. `embedded` are the embeddings of these tokens where there are images.
        """
        mixes = [
            Mix(
                functools.partial(attend_cached, ring=ring, positions=positions, window=window),
                functools.partial(remember, ring=ring, positions=positions, window=window),
            )
            for ring, window in zip(cache, self.config.windows, strict=True)
        ]
        x = self.embed(tokens) if embedded is None else embedded
        return self.logits(self._decode(x, positions, mixes)), cache

    def logits(self, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """The head's score of every token id; rounded to the model's dtype, then widened.

        In that order in mistral-inference too.
        """
        logits = self.head(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _decode(
        self, x: Float[Tensor, "B T D"], positions: Int[Tensor, "#B T"], mixes: Iterable[Mix]
    ) -> Float[Tensor, "B T D"]:
        c = self.config
        width = c.latent_attention.qk_rope_head_dim if c.latent_attention else c.head_dim
        rotary = rotations(positions, width, c.rope_theta, x.dtype, c.yarn)
        growth = c.llama_4_scaling
        place = Place(rotary, growth and stretch(positions, growth, x.dtype))
        for block, mix in zip(self.blocks, mixes, strict=True):
            x = block(x, place, mix)
        return self.norm(x)
