"""Small random models in which everything matters, made of lechat_jax alone.

`parity` draws models of its own; the tests of lechat_jax run where it isn't installed.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array

from lechat_jax.config import LatentConfig, Llama4Scaling, MistralConfig, Yarn
from lechat_jax.config.layout import is_norm, n_reads
from lechat_jax.model.binding import bind, shapes_of, weights_of
from lechat_jax.model.mistral import Mistral

# Three layers in which no two dimensions agree, so none can be confused.
TINY = MistralConfig(
    dim=40,
    n_layers=3,
    n_heads=6,
    n_kv_heads=2,
    head_dim=8,
    hidden_dim=56,
    vocab_size=97,
    norm_eps=1e-5,
    rope_theta=1e4,
    sliding_window=7,
)

# The same with experts, each a little smaller.
TINY_MIXTURE = dataclasses.replace(TINY, hidden_dim=28, n_experts=5, n_experts_per_token=2)

# As Ministral 3: stretched, and queries grow. With a theta of 5, two of the four pairs of lanes
# keep their speed, one is slowed down, and one is between.
TINY_STRETCHED = dataclasses.replace(
    TINY,
    rope_theta=5.0,
    sliding_window=None,
    tied_embeddings=True,
    yarn=Yarn(
        factor=16.0,
        original_max_position_embeddings=9,
        beta=0.85,
        alpha=0.45,
        apply_scale=False,
    ),
    llama_4_scaling=Llama4Scaling(beta=0.1, original_max_position_embeddings=9),
)

# As Mistral Small 4 and Large 3: latent attention in which no two widths agree, shared experts, a
# dense layer first.
TINY_LATENT = dataclasses.replace(
    TINY_STRETCHED,
    tied_embeddings=False,
    n_kv_heads=6,
    head_dim=14,
    n_experts=5,
    n_experts_per_token=2,
    expert_hidden_dim=18,
    n_shared_experts=2,
    n_dense_layers=1,
    latent_attention=LatentConfig(
        q_lora_rank=24, kv_lora_rank=20, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=10
    ),
)


def random_model(config: MistralConfig, dtype: DTypeLike = jnp.float32, seed: int = 0) -> Mistral:
    """A model whose logits have a deviation of about 1 and change with every detail.

    Fresh norms are all one and fresh layers add little, so that a lost norm, a wrong rotation
    or a window that is off by one would hardly be seen. Here norms are random, and each layer
    adds as much as was there.
    """
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if is_norm(name):
            return rng.uniform(0.5, 1.5, shape)
        inputs = math.prod(shape[-n_reads(name) :])
        is_lookup = name.startswith("embed") and not config.tied_embeddings
        return rng.standard_normal(shape) * (1.0 if is_lookup else inputs**-0.5)

    drawn = {name: draw(name, leaf.shape) for name, leaf in shapes_of(config).items()}
    return bind(config, {name: jnp.asarray(array, dtype) for name, array in drawn.items()})


def random_weights(config: MistralConfig) -> dict[str, np.ndarray]:
    """The weights of a random model, float32, all of them numbers that bfloat16 has too."""
    weights = weights_of(random_model(config, jnp.bfloat16))
    return {name: np.asarray(leaf).astype(np.float32) for name, leaf in weights.items()}


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config: MistralConfig, weights: dict[str, Any], ids: ArrayLike) -> Array:
    """Logits of one pass, compiled as one program; weights by lechat's names, in any form."""
    return bind(config, weights)(jnp.asarray(ids))
