"""Adapters of latent attention are the same function in PEFT, on transformers' Mistral 4."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lechat_jax.checkpoint import peft
from lechat_jax.errors import BadInput
from lechat_jax.model.adapters import Adapters
from lechat_jax.model.binding import bind
from parity.convert.open_source import open_source
from parity.peers import transformers as peer
from parity.random_models import random_weights
from tests.parity.checkpoints import convert, write_torch
from tests.parity.convert.test_latent import LATENT

# peft asks transformers for what that calls by another name now.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

CONFIG = dataclasses.replace(LATENT, n_layers=2)
TOKENS = np.random.default_rng(3).integers(97, size=(2, 19), dtype=np.int32)
ATTENTION = ("q_a", "q_b", "kv_a", "kv_b", "o")


def theirs(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def ours(adapters: Adapters, arrays: Mapping[str, Any]) -> np.ndarray:
    weights = {**random_weights(CONFIG), **arrays, **adapters.scales(CONFIG)}
    model = bind(CONFIG, {name: jnp.asarray(array) for name, array in weights.items()})
    return np.asarray(model(jnp.asarray(TOKENS)))


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_peft_computes_what_lechat_does(tmp_path: Path) -> None:
    """Of a dense layer too, whose words are those of the experts that all tokens share."""
    adapters = Adapters(3, 5.0, (*ATTENTION, "blocks.0.mlp.up", "down"), {"blocks.1.attn.q_b": 2})
    rng = np.random.default_rng(1)
    shapes = adapters.shapes(CONFIG)
    assert {
        name for name in shapes if ".mlp." in name and not name.startswith("blocks.0.")
    } == set()
    arrays = {
        name: jnp.asarray(rng.normal(size=n) * 0.3, jnp.float32) for name, n in shapes.items()
    }
    peft.write_adapter(tmp_path, CONFIG, adapters, arrays)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["target_modules"] == [
        "q_a_proj",
        "q_b_proj",
        "kv_a_proj_with_mqa",
        "kv_b_proj",
        "o_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
    ]
    model = PeftModel.from_pretrained(peer.build(CONFIG, random_weights(CONFIG)), tmp_path)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == len(shapes) // 2
    close(theirs(model), ours(adapters, arrays))
    again, weights = peft.read_adapter(tmp_path, CONFIG)
    assert again.parts(CONFIG) == adapters.parts(CONFIG)
    assert weights.keys() == arrays.keys()
    close(ours(again, weights), ours(adapters, arrays))


def test_what_peft_writes_is_read_and_merged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    words = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    settings = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=9, init_lora_weights=False, target_modules=words
    )
    weights = random_weights(CONFIG)
    model = get_peft_model(peer.build(CONFIG, weights), settings)
    model.save_pretrained(str(tmp_path / "adapter"))
    adapters, arrays = peft.read_adapter(tmp_path / "adapter", CONFIG)
    assert adapters.targets == ATTENTION
    close(ours(adapters, arrays), theirs(model))
    base = convert(write_torch(tmp_path / "start", CONFIG, weights), tmp_path / "base", "hf")
    merged = convert(base, tmp_path / "out", "mistral", "--adapter", str(tmp_path / "adapter"))
    source = open_source(merged)
    found = {name: jnp.asarray(source.read(name)) for name in source.names}
    close(np.asarray(bind(CONFIG, found)(jnp.asarray(TOKENS))), theirs(model))


def test_an_adapter_of_shared_experts_is_refused(tmp_path: Path) -> None:
    settings = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["gate_proj"])
    model = get_peft_model(peer.build(CONFIG, random_weights(CONFIG)), settings)
    model.save_pretrained(str(tmp_path))
    with pytest.raises(
        BadInput, match=r"shared_experts\.gate_proj\.lora_A\.weight, and only lora_A"
    ):
        peft.read_adapter(tmp_path, CONFIG)
