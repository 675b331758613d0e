"""Adapters in PEFT's format: what Python's peft loads, and what it writes, is the same function."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lechat_jax import peft
from lechat_jax.config import MistralConfig
from lechat_jax.model import bind, weights_of
from lechat_jax.weights import save_weights
from parity import convert, names
from parity.lively import lively
from tests.test_lora import ADAPTERS, logits, trained, with_adapters

# peft asks transformers for what that calls by another name now.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

TOKENS = np.random.default_rng(3).integers(97, size=(2, 19), dtype=np.int32)


@pytest.fixture(scope="module")
def small(tiny: MistralConfig) -> MistralConfig:
    return dataclasses.replace(tiny, n_layers=2)


@pytest.fixture(scope="module")
def lechat(small: MistralConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "lechat"
    save_weights(folder, small, weights_of(lively(small)), None)
    return folder


@pytest.fixture(scope="module")
def hf(lechat: Path) -> Path:
    folder = lechat.with_name("hf")
    assert convert.main([str(lechat), str(folder), "--to", "hf"]) == 0
    return folder


@pytest.fixture(scope="module")
def adapter(small: MistralConfig, lechat: Path) -> Path:
    folder = lechat.with_name("adapter")
    peft.write_adapter(folder, small, ADAPTERS, trained(small))
    return folder


def theirs(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def transformers_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.fixture(scope="module")
def expected(small: MistralConfig) -> np.ndarray:
    """The logits of lechat with the adapter on."""
    return np.asarray(logits(small, with_adapters(small, weights_of(lively(small))), TOKENS))


# --- written ---


def test_peft_computes_what_lechat_does(hf: Path, adapter: Path, expected: np.ndarray) -> None:
    model = PeftModel.from_pretrained(transformers_model(hf), adapter)
    close(theirs(model), expected)


def test_names_are_those_of_the_weights(small: MistralConfig) -> None:
    table = names.rows(small)
    for name in ADAPTERS.parts(small):
        assert f"{peft._theirs(name)}.weight" == table[f"{name}.kernel"].hf


# --- read ---


@pytest.mark.parametrize(
    "asked",
    [
        {"r": 4, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj"]},
        {
            "r": 4,
            "lora_alpha": 9,
            "target_modules": r"model.layers\.1\..*(o|up)_proj",
            "use_rslora": True,
        },
        {
            "r": 2,
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {"down_proj": 3, r"layers\.1\.self_attn\.k_proj": 5},
            "alpha_pattern": {"^model.layers.1.mlp.*": 7},
            "layers_to_transform": [1],
        },
    ],
    ids=["list", "regex, rslora", "patterns"],
)
def test_what_peft_writes_is_read(
    small: MistralConfig, hf: Path, tmp_path: Path, asked: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    settings = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **asked)
    model = get_peft_model(transformers_model(hf), settings)
    model.save_pretrained(str(tmp_path))
    adapters, arrays = peft.read_adapter(tmp_path, small)
    weights = {name: jnp.asarray(array) for name, array in arrays.items()}
    found = bind(small, weights_of(lively(small)) | weights | adapters.scales(small))
    close(found(jnp.asarray(TOKENS)), theirs(model.eval()))
