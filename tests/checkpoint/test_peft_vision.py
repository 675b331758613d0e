"""Adapters of models that see, in PEFT's format: what peft makes of them in transformers."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel

from lechat_jax.checkpoint import peft
from lechat_jax.checkpoint.saved_model import SavedModel
from lechat_jax.config import MistralConfig
from lechat_jax.generate.vision import as_images
from lechat_jax.model.adapters import Adapters
from lechat_jax.model.binding import Weights, bind
from tests.parity.convert.test_vision import KINDS, pixels, prompt, theirs
from tests.support.images import two_images

# peft asks transformers for what that calls by another name now.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

ADAPTERS = Adapters(
    rank=3,
    alpha=5.0,
    targets=("q", "o", "up", "blocks.1.attn.k"),
    ranks={"blocks.1.attn.q": 2},
    alphas={"blocks.0.mlp.up": 7.0},
)


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


def test_peft_computes_what_lechat_does_and_leaves_the_tower_without_adapters(
    saved: Any, tmp_path: Path
) -> None:
    folder, config = saved
    base, weights = SavedModel.open(folder).load().weights, learned(config, ADAPTERS)
    peft.write_adapter(tmp_path / "adapter", config, ADAPTERS, weights)
    model = PeftModel.from_pretrained(in_memory(folder, config), tmp_path / "adapter")
    expected = logits(config, base | weights | ADAPTERS.scales(config))
    close(of_transformers(config, model), expected)
    assert np.abs(expected - logits(config, base)).max() > 0.05 * np.abs(expected).max()
    assert not [name for name, _ in model.named_parameters() if "vision" in name and "lora" in name]
    again, found = peft.read_adapter(tmp_path / "adapter", config)
    assert again == ADAPTERS
    for name, array in weights.items():
        np.testing.assert_array_equal(found[name], array)
