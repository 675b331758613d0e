"""What a Mistral is: its shape. Standard library only, so that it is read without JAX."""

from lechat_jax.config.mistral import LatentConfig, Llama4Scaling, MistralConfig, Window, Yarn
from lechat_jax.config.presets import PRESETS, preset
from lechat_jax.config.vision import VisionConfig

__all__ = [
    "PRESETS",
    "LatentConfig",
    "Llama4Scaling",
    "MistralConfig",
    "VisionConfig",
    "Window",
    "Yarn",
    "preset",
]
