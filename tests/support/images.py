"""Images of noise, and a small model that sees them."""

import base64
import dataclasses
import io

import numpy as np
from PIL import Image as Pillow

from lechat_jax.config import MistralConfig, VisionConfig
from lechat_jax.tokenizer.images import Image, read_image
from tests.support.models import TINY

# No two of its dimensions agree, nor with those of the decoder.
TOWER = VisionConfig(
    dim=24,
    n_layers=2,
    n_heads=2,
    hidden_dim=20,
    patch_size=4,
    max_image_size=48,
    rope_theta=1e4,
    spatial_merge_size=2,
    projector_norm=True,
    projector_bias=False,
)
# As of Pixtral 12B, whose projector neither normalises nor merges.
PIXTRAL = dataclasses.replace(
    TOWER, spatial_merge_size=1, projector_norm=False, projector_bias=True
)
SEES: MistralConfig = dataclasses.replace(TINY, sliding_window=None, vision=TOWER)


def noise(width: int, height: int, seed: int = 0) -> Pillow.Image:
    """An image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Pillow.fromarray(pixels)


def png(image: Pillow.Image) -> bytes:
    """An image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    """The data URL of a file."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def two_images(vision: VisionConfig) -> list[Image]:
    """Two images of noise, neither square nor of one shape: 3 rows of 5 tokens, and 4 of 2."""
    p = vision.patch_size * vision.spatial_merge_size
    sizes = ((5 * p, 3 * p), (2 * p, 4 * p))
    return [read_image(noise(*size, seed), vision) for seed, size in enumerate(sizes)]
