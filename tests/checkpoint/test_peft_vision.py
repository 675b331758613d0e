"""Adapters of models that see, in PEFT's format: what peft makes of them in transformers."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

from lechat_jax.checkpoint import peft
from lechat_jax.checkpoint.saved_model import SavedModel
from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.generate.vision import as_images
from lechat_jax.model.adapters import Adapters
from lechat_jax.model.binding import Weights, bind
from tests.parity.convert.test_vision import KINDS, pixels, prompt, theirs
from tests.support.images import two_images

# peft asks transformers for what that calls by another name now.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

Convert = Callable[[list[str]], int]

ADAPTERS = Adapters(
    rank=3,
    alpha=5.0,
    targets=("q", "o", "up", "blocks.1.attn.k"),
    ranks={"blocks.1.attn.q": 2},
    alphas={"blocks.0.mlp.up": 7.0},
)
WITH_PROJECTOR = dataclasses.replace(ADAPTERS, projector=True)
EITHER = pytest.mark.parametrize("adapters", [ADAPTERS, WITH_PROJECTOR], ids=["alone", "projector"])
TOWERS = r".*vision_tower.*"


@pytest.fixture(scope="module", params=["mistral-small-3.1", "pixtral-12b"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of transformers' and its folder, with its config in lechat's words."""
    config, folder = KINDS[request.param], tmp_path_factory.mktemp("seeing") / "hf"
    theirs(config).save_pretrained(folder)
    return folder, config


def in_memory(folder: Path, config: MistralConfig) -> Any:
    """The model of that folder as transformers computes it."""
    model = theirs(config)
    return type(model).from_pretrained(folder, attn_implementation="eager").eval()


def learned(config: MistralConfig, adapters: Adapters) -> Weights:
    """Weights that do about as much as the kernels."""
    rng = np.random.default_rng(1)
    return {
        name: jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32)
        for name, shape in adapters.shapes(config).items()
    }


def logits(config: MistralConfig, weights: Weights) -> np.ndarray:
    """Lechat's, of a text with two images."""
    assert config.vision is not None
    images = two_images(config.vision)
    ids, n_patches = prompt(images), 4 * -(-max(len(image.patches) for image in images) // 4)
    model = bind(config, weights)
    seen = model.see(as_images(images, n_patches))
    at = np.zeros((1, len(ids), config.dim), np.float32)
    at[0, np.array(ids) == 10] = np.concatenate(
        [row[: image.n_tokens] for row, image in zip(seen, images, strict=True)]
    )
    return np.asarray(model.logits(model.hidden(jnp.asarray([ids]), features=jnp.asarray(at))))


def of_transformers(config: MistralConfig, model: Any) -> np.ndarray:
    """Transformers', of the same."""
    assert config.vision is not None
    images = two_images(config.vision)
    with torch.no_grad():
        given = pixels(images, config)
        return model(input_ids=torch.tensor([prompt(images)]), **given).logits.numpy()


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * expected.std())


@EITHER
def test_peft_computes_what_lechat_does_and_leaves_the_tower_without_adapters(
    adapters: Adapters, saved: Any, tmp_path: Path
) -> None:
    folder, config = saved
    base, weights = SavedModel.open(folder).load().weights, learned(config, adapters)
    peft.write_adapter(tmp_path / "adapter", config, adapters, weights)
    model = PeftModel.from_pretrained(in_memory(folder, config), tmp_path / "adapter")
    expected = logits(config, base | weights | adapters.scales(config))
    close(of_transformers(config, model), expected)
    assert np.abs(expected - logits(config, base)).max() > 0.05 * np.abs(expected).max()
    assert not [name for name, _ in model.named_parameters() if "vision" in name and "lora" in name]
    again, found = peft.read_adapter(tmp_path / "adapter", config)
    assert again == adapters
    assert found.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(found[name], array)


def test_what_peft_learns_with_the_projector_is_read_and_merged(
    saved: Any, tmp_path: Path, convert: Convert
) -> None:
    folder, config = saved
    torch.manual_seed(0)
    settings = LoraConfig(
        r=2,
        target_modules=["q_proj", "down_proj"],
        exclude_modules=TOWERS,
        modules_to_save=["multi_modal_projector"],
        init_lora_weights=False,
    )
    model: Any = get_peft_model(in_memory(folder, config), settings)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "projector.modules_to_save" in name:
                weight.normal_(0, 0.3)
    model.save_pretrained(str(tmp_path / "adapter"))
    expected = of_transformers(config, model.eval())
    adapters, arrays = peft.read_adapter(tmp_path / "adapter", config)
    weights = {name: jnp.asarray(array) for name, array in arrays.items()}
    base = SavedModel.open(folder).load().weights
    close(logits(config, base | weights | adapters.scales(config)), expected)
    merged = tmp_path / "merged"
    flags = ["--adapter", str(tmp_path / "adapter"), "--to", "hf"]
    assert convert([str(folder), str(merged), *flags]) == 0
    close(of_transformers(config, in_memory(merged, config)), expected)


def test_a_text_part_takes_the_text_part_of_an_adapter_and_says_so(
    saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, config = saved
    peft.write_adapter(tmp_path, config, WITH_PROJECTOR, learned(config, WITH_PROJECTOR))
    adapters, found = peft.read_adapter(tmp_path, config.text)
    assert adapters == ADAPTERS
    assert found.keys() == ADAPTERS.shapes(config).keys()
    assert "tensors of the adapter left out: 4" in capsys.readouterr().err


def test_adapters_of_the_tower_and_half_a_projector_are_refused(saved: Any, tmp_path: Path) -> None:
    _, config = saved
    peft.write_adapter(tmp_path, config, WITH_PROJECTOR, learned(config, WITH_PROJECTOR))
    path = tmp_path / "adapter_model.safetensors"
    arrays, words = load_file(path), tmp_path / "adapter_config.json"
    within = "base_model.model.model."
    eye = f"{within}vision_tower.transformer.layers.0.attention.q_proj.lora_A.weight"
    save_file({**arrays, eye: np.ones((3, 24), np.float32)}, path)
    with pytest.raises(BadInput, match=r"vision_tower.*the decoder and a whole multi_modal_proj"):
        peft.read_adapter(tmp_path, config)
    half = {
        k: x for k, x in arrays.items() if k != f"{within}multi_modal_projector.linear_1.weight"
    }
    save_file(half, path)
    with pytest.raises(BadInput, match=r"lacks its modules_to_save, of which projector.linear_1"):
        peft.read_adapter(tmp_path, config)
    save_file(arrays, path)
    words.write_text(json.dumps(json.loads(words.read_text()) | {"modules_to_save": None}))
    with pytest.raises(BadInput, match="modules_to_save"):
        peft.read_adapter(tmp_path, config)
