"""Hidden states with bidirectional attention are those of transformers with `is_causal` off."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("transformers", reason="the reference is transformers' own model")

import torch

from lechat_jax.config import MistralConfig
from lechat_jax.model.binding import bind
from parity.architectures import ARCHITECTURES
from parity.peers.transformers import build
from parity.random_models import random_weights

KINDS: dict[str, MistralConfig] = {
    "with a window": dataclasses.replace(ARCHITECTURES["mistral"], sliding_window=3),
    "Ministral 3": ARCHITECTURES["ministral-3"],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_causal", [True, False])
def test_they_equal_those_of_transformers(kind: str, is_causal: bool) -> None:
    config = KINDS[kind]
    weights = random_weights(config, 0)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(2, 12))
    model = build(config, weights)
    model.config.is_causal = is_causal
    model.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = model.model(input_ids=torch.from_numpy(tokens)).last_hidden_state.numpy()
    ours = bind(config, {name: jnp.asarray(leaf) for name, leaf in weights.items()}).hidden(
        jnp.asarray(tokens), is_causal=is_causal
    )
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)  # measured: 1.4e-6
