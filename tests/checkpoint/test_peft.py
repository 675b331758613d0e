"""Adapters in PEFT's format: what Python's peft loads, and what it writes, is the same function."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from lechat_jax.checkpoint import peft
from lechat_jax.checkpoint.weights import save_weights
from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.model.binding import bind, weights_of
from tests.model.test_lora import ADAPTERS, logits, trained, with_adapters
from tests.support.models import random_model

# peft asks transformers for what that calls by another name now.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

Convert = Callable[[list[str]], int]

Q = "base_model.model.model.layers.0.self_attn.q_proj"
TOKENS = np.random.default_rng(3).integers(97, size=(2, 19), dtype=np.int32)


@pytest.fixture(scope="module")
def small(tiny: MistralConfig) -> MistralConfig:
    return dataclasses.replace(tiny, n_layers=2)


@pytest.fixture(scope="module")
def lechat(small: MistralConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "lechat"
    save_weights(folder, small, weights_of(random_model(small)), None)
    return folder


@pytest.fixture(scope="module")
def hf(lechat: Path, convert: Convert) -> Path:
    folder = lechat.with_name("hf")
    assert convert([str(lechat), str(folder), "--to", "hf"]) == 0
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
    return np.asarray(logits(small, with_adapters(small, weights_of(random_model(small))), TOKENS))


# --- written ---


def test_peft_computes_what_lechat_does(hf: Path, adapter: Path, expected: np.ndarray) -> None:
    model = PeftModel.from_pretrained(transformers_model(hf), adapter)
    close(theirs(model), expected)


@pytest.mark.parametrize("rslora", [False, True])
def test_every_word_that_is_written_is_read_again(
    small: MistralConfig, tmp_path: Path, rslora: bool
) -> None:
    adapters = dataclasses.replace(ADAPTERS, targets=("q", "blocks.0.mlp.down"), rslora=rslora)
    for ranks, alphas in ((ADAPTERS.ranks, ADAPTERS.alphas), ({}, {"blocks.1.attn.q": 0.5})):
        asked = dataclasses.replace(adapters, ranks=ranks, alphas=alphas)
        shapes = asked.shapes(small)
        arrays = {name: jnp.full(shape, i + 1.0) for i, (name, shape) in enumerate(shapes.items())}
        peft.write_adapter(tmp_path / "adapter", small, asked, arrays, base="a/base")
        again, weights = peft.read_adapter(tmp_path / "adapter", small)
        assert again == asked
        assert again.parts(small) == asked.parts(small)
        for name, array in arrays.items():
            np.testing.assert_array_equal(weights[name], array)
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "a/base"


def test_peft_divides_by_the_root_of_the_rank_that_a_map_has(
    small: MistralConfig, hf: Path, tmp_path: Path
) -> None:
    adapters = dataclasses.replace(ADAPTERS, rslora=True)
    peft.write_adapter(tmp_path / "adapter", small, adapters, trained(small))
    base = weights_of(random_model(small)) | trained(small) | adapters.scales(small)
    model = PeftModel.from_pretrained(transformers_model(hf), tmp_path / "adapter")
    close(theirs(model), logits(small, base, TOKENS))


def test_names_are_those_of_the_weights(small: MistralConfig) -> None:
    names = pytest.importorskip("lechat_jax.formats.names")
    table = names.rows(small)
    for name in ADAPTERS.parts(small):
        assert f"{peft._theirs(name, small)}.weight" == table[f"{name}.kernel"].hf


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
    found = bind(small, weights_of(random_model(small)) | weights | adapters.scales(small))
    close(found(jnp.asarray(TOKENS)), theirs(model.eval()))


@pytest.mark.parametrize(
    "prefix",
    [
        "base_model.model.model.language_model.layers.",  # a model that sees, in transformers 5
        "base_model.model.language_model.model.layers.",  # and 4
        "base_model.model.layers.",  # a model without its head, as AutoModel loads it
        "base_model.model.model.layers.",
    ],
)
def test_an_adapter_is_the_same_whatever_its_model_was_called(
    prefix: str, small: MistralConfig, adapter: Path, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    shutil.copytree(adapter, path.parent)
    arrays = load_file(path)
    named = {k.replace("base_model.model.model.layers.", prefix): x for k, x in arrays.items()}
    sees = "language_model" in prefix
    if sees:
        eye = "base_model.model.model.vision_tower.transformer.layers.0.attention.q_proj"
        named |= {f"{eye}.lora_{letter}.weight": np.ones((4, 4), np.float32) for letter in "AB"}
    save_file(named, path)
    config = path.with_name("adapter_config.json")
    module = prefix.removeprefix("base_model.model.")
    config.write_text(config.read_text().replace("model.layers.", module))
    found, expected = peft.read_adapter(path.parent, small), peft.read_adapter(adapter, small)
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for name, array in expected[1].items():
        np.testing.assert_array_equal(found[1][name], array)
    assert ("tensors of the adapter left out: 2" in capsys.readouterr().err) == sees


def test_patterns_are_of_the_names_that_the_model_had(
    small: MistralConfig, adapter: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    old, new = "base_model.model.model.layers.", "base_model.model.model.language_model.layers."
    save_file({key.replace(old, new): x for key, x in load_file(path).items()}, path)
    said = {"alpha_pattern": {r"^model\.language_model\.layers\.0\.self_attn\.q_proj": 77}}
    config = tmp_path / "adapter" / "adapter_config.json"
    fields = config.read_text().replace("model.layers.", "model.language_model.layers.")
    config.write_text(json.dumps(json.loads(fields) | said))
    adapters, _ = peft.read_adapter(tmp_path / "adapter", small)
    assert adapters.alphas["blocks.0.attn.q"] == 77


@pytest.mark.parametrize("scaling", [None, 0.5])
def test_what_mistral_finetune_leaves_is_merged_as_its_own_program_does(
    scaling: float | None, small: MistralConfig, lechat: Path, convert: Convert, tmp_path: Path
) -> None:
    """W + scaling B A in Mistral's names and order of rows; scaling is 2 where nothing is said."""
    base, rng = tmp_path / "base", np.random.default_rng(0)
    assert convert([str(lechat), str(base), "--to", "mistral"]) == 0
    weights = load_file(base / "consolidated.safetensors")
    lora: dict[str, np.ndarray] = {}
    for map_ in ("attention.wq", "attention.wk", "attention.wo", "feed_forward.w2"):
        kernel = weights[f"layers.1.{map_}.weight"]
        a, b = (rng.standard_normal((3, n)).astype(np.float32) for n in kernel.shape[::-1])
        lora[f"layers.1.{map_}.lora_A.weight"] = a
        lora[f"layers.1.{map_}.lora_B.weight"] = np.ascontiguousarray(b.T)
        weights[f"layers.1.{map_}.weight"] = kernel + (scaling or 2.0) * b.T @ a
    (tmp_path / "lora").mkdir()
    save_file(lora, tmp_path / "lora" / "lora.safetensors")
    params = json.loads((base / "params.json").read_text())
    if scaling:
        params["lora"] = {"enable": True, "rank": 3, "scaling": scaling}
        (tmp_path / "lora" / "params.json").write_text(json.dumps(params))
    made = tmp_path / "made"
    flags = ["--adapter", str(tmp_path / "lora"), "--to", "mistral"]
    assert convert([str(lechat), str(made), *flags]) == 0
    found = load_file(made / "consolidated.safetensors")
    for name, array in weights.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5)
    # What it has merged itself is read whatever params.json says of how it was made.
    for lora_ in ({"enable": True, "rank": 3, "scaling": 2.0}, {"enable": False}, None):
        (base / "params.json").write_text(json.dumps(params | {"lora": lora_, "moe": None}))
        assert convert([str(base), str(made), "--to", "lechat", "--overwrite"]) == 0


@pytest.mark.parametrize("name", ["lora.safetensors", "adapter_model.safetensors"])
def test_an_adapter_alone_is_no_model_and_the_command_that_merges_it_is_told(
    name: str, convert: Convert, tmp_path: Path
) -> None:
    folder = tmp_path / "my adapter"
    folder.mkdir()
    save_file({"layers.0.attention.wq.lora_A.weight": np.zeros((1, 2))}, folder / name)
    (folder / "params.json").write_text("{}")
    with pytest.raises(BadInput, match=f"BASE '{folder}-merged' --adapter '{folder}' --to lechat"):
        convert([str(folder), str(tmp_path / "out"), "--to", "lechat"])


# --- refused ---


def written(small: MistralConfig, folder: Path, **fields: Any) -> Path:
    """An adapter whose config says more than lechat's does."""
    peft.write_adapter(folder, small, ADAPTERS, trained(small))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"use_dora": True}, "use_dora true, which is not done here; merge the adapter with peft"),
        ({"bias": "lora_only"}, 'bias "lora_only"'),
        ({"modules_to_save": ["lm_head"]}, r'modules_to_save \["lm_head"\]'),
        ({"fan_in_fan_out": True}, "fan_in_fan_out true"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights "pissa"'),
        ({"something_new": 3}, "something_new 3"),
        ({"peft_type": "LOHA"}, "is for LOHA adapters; only LORA"),
        ({"rank_pattern": {"q_proj": 9}}, r"gives model.layers.0.self_attn.q_proj the rank 9"),
        ({"alpha_pattern": {"(": 9}}, "does not say r, lora_alpha and their patterns"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_kind_of_adapter_is_refused(
    small: MistralConfig, tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        peft.read_adapter(written(small, tmp_path / "adapter", **fields), small)


def change(folder: Path, new: dict[str, np.ndarray | None]) -> None:
    path = folder / "adapter_model.safetensors"
    arrays = load_file(path) | new
    save_file({key: array for key, array in arrays.items() if array is not None}, path)


@pytest.mark.parametrize(
    ("new", "said"),
    [
        ({f"{Q}.lora_B.weight": None}, r"lacks the other half of blocks.0.attn.q.lora.b"),
        ({f"{Q}.lora_B.weight": np.zeros((7, 3))}, r"lora_B.weight in .* has the shape \[7, 3\]"),
        ({f"{Q}.lora_A.weight": np.full((3, 40), np.nan)}, "is not finite"),
        ({"base_model.model.lm_head.lora_A.weight": np.zeros((3, 40))}, "lm_head.lora_A.weight"),
    ],
    ids=["half", "shape", "nan", "head"],
)
def test_tensors_that_do_not_fit_are_refused(
    small: MistralConfig, tmp_path: Path, new: dict[str, np.ndarray | None], said: str
) -> None:
    folder = written(small, tmp_path / "adapter")
    change(folder, new)
    with pytest.raises(BadInput, match=said):
        peft.read_adapter(folder, small)
