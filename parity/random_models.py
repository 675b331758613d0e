"""Random models in which everything matters, for whoever compares two ways to run one."""

import math

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import is_norm, module_of, n_reads
from lechat_jax.model.binding import bind, shapes_of, weights_of
from lechat_jax.model.mistral import Mistral


def random_model(config: MistralConfig, dtype: DTypeLike = jnp.float32, seed: int = 0) -> Mistral:
    """A model whose logits have a deviation of about 1 and change with every detail.

    Fresh norms are all one and fresh layers add little, so that a lost norm, a wrong
    rotation or a window that is off by one would hardly be seen. Here norms are random,
    and each layer adds as much as was there.
    """
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if is_norm(name):
            return rng.uniform(0.5, 1.5, shape)
        inputs = math.prod(shape[-n_reads(name) :])
        is_lookup = module_of(name) == "embed" and not config.tied_embeddings
        return rng.standard_normal(shape) * (1.0 if is_lookup else inputs**-0.5)

    drawn = {name: draw(name, leaf.shape) for name, leaf in shapes_of(config).items()}
    return bind(config, {name: jnp.asarray(array, dtype) for name, array in drawn.items()})


def random_weights(config: MistralConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """The weights of a random model by lechat's names, float32.

    All of them are numbers that bfloat16 has too, so that models in different arithmetic
    have the very same weights.
    """
    model = random_model(config, jnp.bfloat16, seed)
    return {name: np.asarray(leaf).astype(np.float32) for name, leaf in weights_of(model).items()}
