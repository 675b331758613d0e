"""lechat_jax goes on with a text as transformers does, token for token."""

import dataclasses
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the reference is transformers' own model")

from lechat_jax.config import MistralConfig
from parity.check.oracles.lechat_jax import JaxOracle
from parity.check.oracles.transformers import TransformersOracle
from parity.random_models import random_weights

W = 7

# Two of the likeliest tokens that are closer than this, in deviations of the logits, may
# change places in float32. Measured: logits differ by 4e-7.
MARGIN = 1e-5

MODELS: dict[str, dict[str, Any]] = {
    "with a window": {},
    "without a window": {"sliding_window": None},
    "one kv head": {"n_kv_heads": 1},
    "a kv head for each query head": {"n_kv_heads": 6},
    "heads as wide as the model": {"dim": 48},
    "tied": {"tied_embeddings": True},
}


QUICK = ("with a window", "one kv head", "tied")


@pytest.mark.parametrize(
    "model",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
def test_greedy_tokens_are_those_of_transformers(tiny: MistralConfig, model: str) -> None:
    config = dataclasses.replace(tiny, n_layers=2, **MODELS[model])
    weights = random_weights(config, seed=2)
    draw = np.random.default_rng(5).integers
    prompts = [draw(config.vocab_size, size=n).tolist() for n in (W - 1, 2 * W + 3, 1)]
    ours, theirs = (
        oracle(config, weights, "float32").greedy(prompts, 3 * W, chunk=4, context=6 * W)
        for oracle in (JaxOracle, TransformersOracle)
    )
    reference = TransformersOracle(config, weights, "float32")
    for prompt, a, b in zip(prompts, ours, theirs, strict=True):
        assert len(a.ids) == len(b.ids) == 3 * W
        differing = [t for t in range(3 * W) if a.ids[t] != b.ids[t]]
        if differing:
            t = differing[0]
            logits = reference.forward(np.array([prompt + b.ids[:t]]))["logits"][0, -1]
            assert abs(logits[a.ids[t]] - logits[b.ids[t]]) < MARGIN * logits.std()
        else:
            np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5)
