"""Shape of a vision tower: Pixtral's vision transformer, and its projector into the decoder.

One tower in a few sizes serves Pixtral 12B, Mistral Small 3.1 and later, Magistral, Ministral 3
and Devstral Small 2. Standard library only.
"""

import dataclasses
import math

from lechat_jax.errors import BadInput

CHANNELS = 3  # red, green, blue


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Vision tower: a ViT over the patches of an image, and the projector of what it makes.

    Attributes:
        dim: width d.
        n_layers: number of blocks.
        n_heads: heads n, each with its own keys and values.
        hidden_dim: feed-forward width f.
        patch_size: side p of a patch in pixels.
        max_image_size: longest side of an image in pixels; larger ones are scaled down.
        rope_theta: base of the 2D rotary frequencies.
        spatial_merge_size: a square of so many by so many patches becomes one token.
        projector_norm: whether the projector normalises the patches first.
        projector_bias: whether its two linear maps have biases.
        image_token_id: id of a token whose embedding the image gives; Mistral's `[IMG]`.
        image_break_token_id: id behind each row of an image but the last.
        image_end_token_id: id behind the last one.

    Raises:
        BadInput: a field is out of range.
    """

    dim: int
    n_layers: int
    n_heads: int
    hidden_dim: int
    patch_size: int
    max_image_size: int
    rope_theta: float
    spatial_merge_size: int
    projector_norm: bool
    projector_bias: bool
    image_token_id: int = 10
    image_break_token_id: int = 12
    image_end_token_id: int = 13

    norm_eps = 1e-5  # of all towers

    def __post_init__(self) -> None:
        sizes = "dim n_layers n_heads hidden_dim patch_size max_image_size spatial_merge_size"
        for name in (*sizes.split(), "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise BadInput(f"vision.{name} must be positive, not {getattr(self, name)}")
        if self.dim % self.n_heads or self.head_dim % 4:
            raise BadInput(
                f"vision.dim ({self.dim}) must be vision.n_heads ({self.n_heads}) times a multiple "
                "of 4, since half of the pairs of a head's lanes turn by row and half by column"
            )
        ids = self.token_ids
        if min(ids) < 0 or len({*ids}) < len(ids):
            raise BadInput(
                "vision.image_token_id, image_break_token_id and image_end_token_id must be three "
                f"ids, not {ids[0]}, {ids[1]} and {ids[2]}"
            )

    @property
    def token_ids(self) -> tuple[int, int, int]:
        """Ids of the tokens of an image."""
        return self.image_token_id, self.image_break_token_id, self.image_end_token_id

    @property
    def head_dim(self) -> int:
        """Width h of one head."""
        return self.dim // self.n_heads

    @property
    def n_kv_heads(self) -> int:
        """Key and value heads: as many as queries have."""
        return self.n_heads

    @property
    def n_merged(self) -> int:
        """Patches m that become one token."""
        return self.spatial_merge_size**2
