"""Models that see: their towers are converted both ways, and compute what transformers' do."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lechat_jax.checkpoint.weights import load_weights
from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.formats.configs.hugging_face import to_hugging_face
from lechat_jax.generate.generator import Generator
from lechat_jax.generate.sampling import Sampling
from lechat_jax.generate.vision import as_images
from lechat_jax.model.binding import bind
from lechat_jax.tokenizer.images import Image, read_image
from parity.architectures import ARCHITECTURES
from parity.convert.command import main as convert
from parity.convert.open_source import open_source
from tests.support.images import PIXTRAL, SEES, TOWER, noise, two_images

MINISTRAL_3 = dataclasses.replace(ARCHITECTURES["ministral-3"], vision=TOWER)
KINDS: dict[str, MistralConfig] = {
    "mistral-small-3.1": SEES,
    "ministral-3": MINISTRAL_3,
    "pixtral-12b": dataclasses.replace(SEES, vision=PIXTRAL),
}


def theirs(config: MistralConfig) -> Any:
    """Transformers' own model of that shape, with weights in which everything matters."""
    fields = to_hugging_face(config, "float32", None, 1, 2)
    words: Any = transformers.AutoConfig.for_model(**fields)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(words).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(0, weight[0].numel() ** -0.5)
    model.set_attn_implementation("eager")
    model.generation_config.eos_token_id = None
    return model


def prompt(images: list[Image]) -> list[int]:
    """Ids with the images among them, the second in another turn."""
    first, second = images
    return [1, 3, *first.ids, 33, 34, 35, *second.ids, 44, 45]


def pixels(images: list[Image], config: MistralConfig) -> dict[str, torch.Tensor]:
    """The very pixels that lechat reads, as transformers is given them."""
    assert config.vision is not None
    p = config.vision.patch_size
    grids = [1 + image.places.max(axis=0) for image in images]
    whole = torch.zeros(len(images), 3, *(p * np.max(grids, axis=0)))
    for number, image in enumerate(images):
        for patch, (row, column) in zip(image.patches, image.places, strict=True):
            where = slice(row * p, (row + 1) * p), slice(column * p, (column + 1) * p)
            whole[number, :, *where] = torch.from_numpy(patch)
    return {"pixel_values": whole, "image_sizes": torch.tensor(np.array(grids) * p)}


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of transformers', its folder, and its config in lechat's words."""
    config = KINDS[request.param]
    model, folder = theirs(config), tmp_path_factory.mktemp("seeing") / "hf"
    model.save_pretrained(folder)
    return model, folder, config


def test_a_seeing_model_goes_through_all_formats_and_comes_back_byte_by_byte(
    saved: Any, tmp_path: Path
) -> None:
    _, folder, config = saved
    way = [(folder, "lechat"), (None, "mistral"), (None, "torch"), (None, "hf")]
    src = folder
    for i, (_, fmt) in enumerate(way):
        dst = tmp_path / f"{i}-{fmt}"
        assert convert([str(src), str(dst), "--to", fmt]) == 0
        assert open_source(dst).config == config
        src = dst
    before, after = (load_file(at / "model.safetensors") for at in (folder, src))
    assert before.keys() == after.keys()
    assert any(key.startswith("vision_tower.") for key in before)
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key


def test_features_and_logits_and_greedy_text_are_transformers(saved: Any, tmp_path: Path) -> None:
    """In float32, to what rounding leaves; `parity.check` measures it in all arithmetic."""
    model, folder, config = saved
    assert convert([str(folder), str(tmp_path / "ours"), "--to", "lechat"]) == 0
    loaded, weights = load_weights(tmp_path / "ours")
    assert loaded == config
    ours = bind(config, weights)
    assert config.vision is not None
    images = two_images(config.vision)
    ids, given = prompt(images), pixels(images, config)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids]), **given)
        features = model.get_image_features(**given).pooler_output
    n_patches = 4 * -(-max(len(image.patches) for image in images) // 4)
    seen = ours.see(as_images(images, n_patches))
    for row, image, wanted in zip(seen, images, features, strict=True):
        found = np.asarray(row[: image.n_tokens])
        np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=2e-5 * wanted.std().item())
    at = np.zeros((1, len(ids), config.dim), np.float32)
    at[0, np.array(ids) == 10] = np.concatenate([np.asarray(f) for f in features])
    logits = ours.logits(ours.hidden(jnp.asarray([ids]), features=jnp.asarray(at)))
    std = expected.logits.std().item()
    np.testing.assert_allclose(logits, expected.logits.numpy(), rtol=0, atol=1e-4 * std)
    made = model.generate(
        input_ids=torch.tensor([ids]), **given, max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    sample = Generator(ours, chunk=5).generate(
        ids, 12, Sampling(temperature=0), eos_ids=(), images=images
    )
    assert sample.ids == made[0, len(ids) :].tolist()


def test_text_only_leaves_the_tower_out_and_says_so(
    saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder, config = saved
    assert convert([str(folder), str(tmp_path / "text"), "--to", "lechat", "--text-only"]) == 0
    assert "only the text part is read; tensors of the vision tower left out: " in (
        capsys.readouterr().out
    )
    loaded, weights = load_weights(tmp_path / "text")
    assert loaded == config.text
    ids = np.random.default_rng(0).integers(20, config.vocab_size, size=(2, 33))
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    found = bind(loaded, weights)(jnp.asarray(ids, jnp.int32))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * expected.std())
    assert convert([str(tmp_path / "text"), str(tmp_path / "own"), "--to", "mistral"]) == 0
    assert "vision_encoder" not in json.loads((tmp_path / "own" / "params.json").read_text())


def test_quantising_leaves_the_tower_in_floats(saved: Any, tmp_path: Path) -> None:
    _, folder, _ = saved
    arguments = [str(folder), str(tmp_path / "int8"), "--to", "lechat", "--quantize", "int8"]
    assert convert(arguments) == 0
    _, weights = load_weights(tmp_path / "int8")
    assert weights["blocks.0.attn.q.kernel"].dtype == np.int8
    source = open_source(folder)
    for name, leaf in weights.items():
        if name.startswith(("vision.", "projector.")):
            np.testing.assert_array_equal(np.asarray(leaf), source.read(name))


def renamed(folder: Path, into: Path, names: dict[str, str], **config: Any) -> Path:
    """The folder with its keys' beginnings changed, and with other fields in its config."""
    into.mkdir()
    tensors = load_file(folder / "model.safetensors")
    for old, new in names.items():
        tensors = {
            new + key.removeprefix(old) if key.startswith(old) else key: tensor
            for key, tensor in tensors.items()
        }
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text()) | config
    (into / "config.json").write_text(json.dumps(fields))
    return into


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "hf"
    theirs(SEES).save_pretrained(folder)
    return folder


LIVE = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


@pytest.mark.parametrize("tie", [True, None, False])
def test_names_of_a_live_model_are_read_and_a_head_that_is_there_is_believed(
    tie: bool | None, small: Path, tmp_path: Path
) -> None:
    """As transformers does, whose class would tie a model that does not say that it is not."""
    fields = json.loads((small / "config.json").read_text())
    text = {**fields["text_config"], "tie_word_embeddings": tie}
    live = renamed(small, tmp_path / "live", LIVE, tie_word_embeddings=tie, text_config=text)
    first, second = open_source(small), open_source(live)
    assert first.config == second.config == SEES
    for name in first.names:
        np.testing.assert_array_equal(first.read(name), second.read(name))


def test_a_part_that_nobody_knows_is_not_left_out(small: Path, tmp_path: Path) -> None:
    odd = renamed(small, tmp_path / "odd", {"vision_tower.": "hearing."})
    for text_only in (False, True):
        with pytest.raises(BadInput, match=r"has hearing\..*which its config does not know"):
            open_source(odd, text_only=text_only)


def test_a_tensor_that_is_there_under_both_names_is_refused(small: Path, tmp_path: Path) -> None:
    norm = {"vision_tower.ln_pre.weight": "model.language_model.norm.weight"}
    with pytest.raises(BadInput, match=r"has language_model\.model\.norm\.weight twice"):
        open_source(renamed(small, tmp_path / "twice", norm))


@pytest.mark.parametrize(
    ("part", "key", "value", "said"),
    [
        ("vision_config", "hidden_act", "gelu", r'hidden_act "gelu" in its vision tower'),
        ("vision_config", "hidden_act", None, r"hidden_act"),
        ("vision_config", "num_channels", 4, r"num_channels 4"),
        ("vision_config", "rope_parameters", 1e4, r"rope_parameters = 10000\.0 in its vision"),
        ("vision_config", "rope_parameters", {"rope_type": "yarn"}, r'rope_type "yarn" in its v'),
        ("vision_config", "rope_parameters", {"factor": 2.0}, r"not supported: factor"),
        ("vision_config", "num_attention_heads", 5, r"vision\.dim \(24\) must be vision\.n_heads"),
        ("", "image_token_index", 12, r"must be three ids, not 12, 12 and 13"),
        ("", "image_token_index", 512, r"vision has the token id 512, and vocab_size is"),
        ("", "vision_feature_layer", -2, r"vision_feature_layer -2"),
        ("", "projector_hidden_act", "relu", r'projector_hidden_act "relu"'),
        ("", "vision_config", None, r"without a vision_config"),
    ],
)
def test_a_tower_that_lechat_does_not_compute_is_refused_by_name(
    part: str, key: str, value: Any, said: str, small: Path, tmp_path: Path
) -> None:
    fields = json.loads((small / "config.json").read_text())
    changed = fields[part] if part else fields
    changed[key] = value
    if value is None and part:
        del changed[key]  # transformers' own default is gelu
    with pytest.raises(BadInput, match=said):
        open_source(renamed(small, tmp_path / "odd", {}, **fields))
    assert open_source(tmp_path / "odd", text_only=True).config == SEES.text


def test_mistrals_own_words_for_a_tower_are_those_of_its_releases(
    small: Path, tmp_path: Path
) -> None:
    assert convert([str(small), str(tmp_path / "own"), "--to", "mistral"]) == 0
    path = tmp_path / "own" / "params.json"
    fields = json.loads(path.read_text())
    assert fields["vision_encoder"]["mm_projector_id"] == "patch_merge"
    keys = load_file(tmp_path / "own" / "consolidated.safetensors").keys()
    assert {
        "vision_encoder.patch_conv.weight",
        "vision_encoder.ln_pre.weight",
        "vision_encoder.transformer.layers.1.attention.wq.weight",
        "vision_encoder.transformer.layers.0.feed_forward.w2.weight",
        "vision_language_adapter.w_in.weight",
        "patch_merger.merging_layer.weight",
        "pre_mm_projector_norm.weight",
    } <= keys
    fields["vision_encoder"]["deepstack"] = 3
    path.write_text(json.dumps(fields))
    with pytest.raises(BadInput, match=r"deepstack = 3 in its vision_encoder"):
        open_source(tmp_path / "own")
    assert open_source(tmp_path / "own", text_only=True).config == SEES.text


def test_an_export_has_transformers_own_processor_of_images(small: Path, tmp_path: Path) -> None:
    """Of an image that needs no scaling it makes the very pixels that lechat reads."""
    assert convert([str(small), str(tmp_path / "ours"), "--to", "lechat"]) == 0
    assert convert([str(tmp_path / "ours"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    processor: Any = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    picture = noise(40, 24)
    found = processor(images=[picture], return_tensors="np")
    assert found["image_sizes"][0].tolist() == [24, 40]
    theirs = torch.tensor(np.array(found["pixel_values"][0]))
    ours = pixels([read_image(picture, TOWER)], SEES)["pixel_values"][0]
    np.testing.assert_allclose(theirs, ours, atol=1e-5)
    words = json.loads((tmp_path / "hf" / "processor_config.json").read_text())
    assert (words["patch_size"], words["spatial_merge_size"]) == (4, 2)
    assert convert([str(tmp_path / "hf"), str(tmp_path / "again"), "--to", "hf"]) == 0
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "hf" / name).read_text()
