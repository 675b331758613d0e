"""Models with latent attention and shared experts in the files of others, as Mistral Small 4 is."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from lechat_jax.config import PRESETS, LatentConfig, MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.formats import stores
from lechat_jax.formats.configs.hugging_face import from_hugging_face, to_hugging_face
from lechat_jax.formats.configs.mistral import from_params, to_params
from lechat_jax.formats.names import FORMATS, Format, names
from lechat_jax.model.binding import bind
from parity.architectures import ARCHITECTURES, SMALL, STRETCHED, TOWER
from parity.convert.open_source import open_source
from parity.peers import transformers as peer
from parity.random_models import random_weights as varied_weights
from tests.parity.checkpoints import assert_equal, convert, random_weights, spoil, write_torch

Fields = dict[str, Any]

# No two widths agree, so none can be confused; the first layer is dense.
WIDTHS = LatentConfig(
    q_lora_rank=15, kv_lora_rank=18, qk_nope_head_dim=8, qk_rope_head_dim=6, v_head_dim=10
)
LATENT = dataclasses.replace(
    ARCHITECTURES["mistral-small-4"], expert_hidden_dim=12, latent_attention=WIDTHS
)
SQUARED = dataclasses.replace(
    LATENT, latent_attention=dataclasses.replace(WIDTHS, squared_yarn_scale=True)
)
KINDS: dict[str, MistralConfig] = {
    "plain": LATENT,
    "squared": SQUARED,
    "longer": dataclasses.replace(LATENT, yarn=dataclasses.replace(STRETCHED, apply_scale=True)),
    "not stretched": dataclasses.replace(LATENT, yarn=None),
    "neither stretched nor growing": dataclasses.replace(LATENT, yarn=None, llama_4_scaling=None),
    "without experts": dataclasses.replace(
        LATENT,
        n_experts=0,
        n_experts_per_token=0,
        expert_hidden_dim=0,
        n_shared_experts=0,
        n_dense_layers=0,
    ),
    "tied": dataclasses.replace(LATENT, tied_embeddings=True, n_dense_layers=0),
    "whose lanes do not divide": dataclasses.replace(
        LATENT,
        head_dim=44,
        latent_attention=dataclasses.replace(WIDTHS, qk_nope_head_dim=14, qk_rope_head_dim=30),
    ),
}


def logits(config: MistralConfig, weights: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    model = bind(config, {name: jnp.asarray(array) for name, array in weights.items()})
    return np.asarray(model(jnp.asarray(ids)))


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())
def test_transformers_computes_the_function_of_a_config_that_is_written(
    config: MistralConfig,
) -> None:
    weights = varied_weights(config)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 40))
    model = peer.build(config, weights).eval()
    assert type(model) is transformers.Mistral4ForCausalLM
    with torch.inference_mode():
        theirs = model(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(logits(config, weights, ids), theirs, rtol=0, atol=5e-5)
    assert from_hugging_face(to_hugging_face(config, "float32", None, 1, 2), "x") == config


def test_the_scale_of_scores_is_seen_in_logits() -> None:
    """So that the test above can fail."""
    weights = varied_weights(LATENT)
    ids = np.arange(40)[None]
    difference = logits(LATENT, weights, ids) - logits(SQUARED, weights, ids)
    assert np.abs(difference).max() > 0.1


# --- weights ---


@pytest.mark.parametrize("sees", [False, True])
@pytest.mark.parametrize("first", FORMATS)
def test_any_format_leads_to_any_other(first: Format, sees: bool, tmp_path: Path) -> None:
    config = dataclasses.replace(LATENT, n_layers=2, vision=TOWER if sees else None)
    weights = random_weights(config)
    one = convert(write_torch(tmp_path / "start", config, weights), tmp_path / "one", first)
    for second in FORMATS:
        two = convert(one, tmp_path / second, second)
        assert open_source(two).config == config
        assert_equal(two, weights)


def test_hugging_faces_files_have_the_experts_of_a_layer_in_two_tensors(tmp_path: Path) -> None:
    weights = varied_weights(LATENT)
    folder = convert(write_torch(tmp_path / "start", LATENT, weights), tmp_path / "hf", "hf")
    found = load_file(folder / "model.safetensors")
    stem = "model.layers.1.mlp."
    assert {key.removeprefix(stem) for key in found if key.startswith(stem)} == {
        "gate.weight",
        "experts.gate_up_proj",
        "experts.down_proj",
        "shared_experts.gate_proj.weight",
        "shared_experts.up_proj.weight",
        "shared_experts.down_proj.weight",
    }
    assert f"{stem.replace('1', '0')}up_proj.weight" in found
    both = found[f"{stem}experts.gate_up_proj"]
    assert both.shape == (5, 24, 40)
    mlp = "blocks.1.mlp.experts"
    np.testing.assert_array_equal(both[:, :12], weights[f"{mlp}.gate.kernel"])
    np.testing.assert_array_equal(both[:, 12:], weights[f"{mlp}.up.kernel"])
    down = weights[f"{mlp}.down.kernel"]
    np.testing.assert_array_equal(found[f"{stem}experts.down_proj"], down)


def test_a_layer_in_mistrals_own_words() -> None:
    found = [name for name in names(LATENT, "mistral").values() if name.startswith("layers.2.")]
    assert [name.removeprefix("layers.2.") for name in found if ".experts." not in name] == [
        "attention_norm.weight",
        "attention.wo.weight",
        "attention.wq_a.weight",
        "attention.q_a_norm.weight",
        "attention.wq_b.weight",
        "attention.wkv_a_with_mqa.weight",
        "attention.kv_a_norm.weight",
        "attention.wkv_b.weight",
        "ffn_norm.weight",
        "gate.weight",
        "shared_experts.w1.weight",
        "shared_experts.w3.weight",
        "shared_experts.w2.weight",
    ]
    assert {"layers.2.experts.4.w1.weight", "layers.0.feed_forward.w2.weight"} <= set(
        names(LATENT, "mistral").values()
    )


@pytest.mark.parametrize("sees", [False, True])
def test_what_transformers_saves_is_read(sees: bool, tmp_path: Path) -> None:
    config = dataclasses.replace(LATENT, vision=TOWER if sees else None)
    weights = varied_weights(config)
    peer.build(config, weights).save_pretrained(tmp_path / "saved")
    assert open_source(tmp_path / "saved").config == config
    assert_equal(tmp_path / "saved", weights)


def test_kernels_of_experts_that_have_tensors_of_their_own_are_read(tmp_path: Path) -> None:
    """As DeepSeek's are, and those of quantised copies."""
    weights = varied_weights(LATENT)
    folder = convert(write_torch(tmp_path / "start", LATENT, weights), tmp_path / "hf", "hf")
    path = folder / "model.safetensors"
    found = load_file(path)
    for key in [key for key in found if ".experts." in key]:
        array = found.pop(key)
        words = ["gate_proj", "up_proj"] if "gate_up" in key else ["down_proj"]
        for e in range(5):
            for word, kernel in zip(words, np.split(array[e], len(words)), strict=True):
                name = f"{key.rpartition('.')[0]}.{e}.{word}.weight"
                found[name] = np.ascontiguousarray(kernel)
    save_file(found, path)
    assert_equal(folder, weights)


def test_experts_that_are_too_few_are_refused(tmp_path: Path) -> None:
    weights = varied_weights(LATENT)
    folder = convert(write_torch(tmp_path / "start", LATENT, weights), tmp_path / "hf", "hf")
    path = folder / "model.safetensors"
    found = load_file(path)
    key = "model.layers.1.mlp.experts.down_proj"
    save_file(found | {key: found[key][:4]}, path)
    with pytest.raises(BadInput, match=r"down_proj in .* \[4, 40, 12\], which is not of 5 experts"):
        open_source(folder)


def test_a_weight_of_an_expert_that_is_not_finite_is_named(tmp_path: Path) -> None:
    start = write_torch(tmp_path / "start", LATENT, random_weights(LATENT))
    spoil(start, "blocks.2.mlp.experts.3.up.weight", lambda x: x.fill_(torch.nan))
    with pytest.raises(BadInput, match=r"^blocks\.2\.mlp\.experts\.3\.up\.weight in .* not finite"):
        convert(start, tmp_path / "hf", "hf")
    assert not (tmp_path / "hf").exists()


def test_experts_of_int8_are_dequantised_once_for_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = write_torch(tmp_path / "start", LATENT, random_weights(LATENT))
    int8 = convert(start, tmp_path / "int8", "lechat", "--quantize", "int8")
    source = open_source(int8, dequantize=True)
    wanted = {name: source.read(name).astype(np.float32) for name in source.names}
    asked: list[str] = []
    numbers_of = stores.numbers_of

    def counted(name: str, *args: Any) -> np.ndarray:
        asked.append(name)
        return numbers_of(name, *args)

    monkeypatch.setattr(stores, "numbers_of", counted)
    convert(int8, tmp_path / "mistral", "mistral", "--dtype", "float32")
    assert len(asked) == len(set(asked)) > 0
    monkeypatch.undo()
    assert_equal(tmp_path / "mistral", wanted)


def test_gguf_is_refused(tmp_path: Path) -> None:
    start = write_torch(tmp_path / "start", LATENT, random_weights(LATENT))
    with pytest.raises(BadInput, match=r"^a model with latent attention or shared experts"):
        convert(start, tmp_path / "x.gguf", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


# --- configs ---

# As copies of the releases' params.json have them, but for how weights are quantised.
YARN = {"alpha": 1, "apply_scale": False, "beta": 32, "original_max_position_embeddings": 8192}
SMALL_4: Fields = {
    "dim": 4096,
    "n_layers": 36,
    "head_dim": 128,
    "hidden_dim": 12288,
    "n_heads": 32,
    "n_kv_heads": 32,
    "rope_theta": 10000.0,
    "norm_eps": 1e-06,
    "vocab_size": 131072,
    "tied_embeddings": False,
    "max_position_embeddings": 1048576,
    "llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 8192},
    "q_lora_rank": 1024,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe": {
        "expert_parallel": 1,
        "expert_model_parallel": 1,
        "route_every_n": 1,
        "first_k_dense_replace": 0,
        "num_experts": 128,
        "num_experts_per_tok": 4,
        "num_expert_groups": 1,
        "num_expert_groups_per_tok": 1,
        "routed_scale": 1.0,
        "expert_hidden_dim": 2048,
        "num_shared_experts": 1,
    },
    "vision_encoder": {
        "image_token_id": 10,
        "image_break_token_id": 12,
        "image_end_token_id": 13,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "mm_projector_id": "patch_merge",
        "spatial_merge_size": 2,
        "hidden_size": 1024,
        "num_channels": 3,
        "image_size": 1540,
        "max_image_size": 1540,
        "patch_size": 14,
        "rope_theta": 10000.0,
        "add_pre_mm_projector_layer_norm": True,
        "adapter_bias": False,
    },
    "yarn": YARN | {"factor": 128},
}
LARGE_3: Fields = SMALL_4 | {
    "dim": 7168,
    "n_layers": 61,
    "hidden_dim": 16384,
    "n_heads": 128,
    "n_kv_heads": 128,
    "max_position_embeddings": 294912,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "yarn": YARN | {"factor": 36},
    "moe": SMALL_4["moe"] | {"first_k_dense_replace": 3, "expert_hidden_dim": 4096},
    "vision_encoder": SMALL_4["vision_encoder"]
    | {"num_hidden_layers": 48, "hidden_size": 1664, "intermediate_size": 8192},
}


@pytest.mark.parametrize(
    ("params", "preset"),
    [(SMALL_4, "mistral-small-4-119b-2603"), (LARGE_3, "mistral-large-3-675b-2512")],
)
def test_params_of_a_release_are_the_preset_and_are_written_again(
    params: Fields, preset: str
) -> None:
    assert from_params(params, "params.json", None) == PRESETS[preset]
    written = to_params(PRESETS[preset])
    assert written.keys() - params.keys() == set()
    same = params | {"moe": {k: v for k, v in params["moe"].items() if "_parallel" not in k}}
    assert {key: same[key] for key in written} == written


def test_the_defaults_of_transformers_are_small_4() -> None:
    preset = PRESETS["mistral-small-4-119b-2603"]
    assert from_hugging_face(transformers.Mistral4Config().to_dict(), "x") == preset.text
    fields = to_hugging_face(preset, "bfloat16", None, 1, 2)
    words = transformers.AutoConfig.for_model(**fields)
    assert isinstance(words.text_config, transformers.Mistral4Config)
    defaults = transformers.Mistral4Config().to_dict()
    rope = defaults.pop("rope_parameters").keys() | {"pad_token_id", "dtype"}
    text = words.text_config.to_dict()
    assert {key: text[key] for key in defaults.keys() - rope} == {
        key: value for key, value in defaults.items() if key not in rope
    }


def changed(fields: Fields, change: Fields) -> Fields:
    """The fields with others, those of an object within it."""
    both = {
        key: {**fields[key], **value} if isinstance(value, dict) and key in fields else value
        for key, value in change.items()
    }
    return {**fields, **both}


OFFICIAL = {"attention_factor": None, "mscale": 1.0, "mscale_all_dim": 1.0}  # as of Small 4


@pytest.mark.parametrize("said", [False, True])
def test_the_square_of_yarn_is_meant_only_where_it_is_said(said: bool, tmp_path: Path) -> None:
    weights = random_weights(LATENT)
    folder = convert(write_torch(tmp_path / "start", LATENT, weights), tmp_path / "hf", "hf")
    path = folder / "config.json"
    fields = changed(json.loads(path.read_text()), {"rope_parameters": OFFICIAL})
    path.write_text(json.dumps(fields | ({"squared_yarn_scale": True} if said else {})))
    source = open_source(folder)
    assert source.config == (SQUARED if said else LATENT)
    # (0.1 ln 16 + 1)^2, which transformers multiplies by
    notes = ["transformers multiplies scores by 1.631" in note for note in source.store.notes]
    assert notes == ([] if said else [True])


REFUSED: list[tuple[Fields, str]] = [
    ({"n_group": 8}, "has n_group = 8, and only 1"),
    ({"topk_group": 2}, "has topk_group = 2, and only 1"),
    ({"routed_scaling_factor": 2.5}, "has routed_scaling_factor = 2.5, and only 1.0"),
    ({"norm_topk_prob": False}, "has norm_topk_prob = false, and only true"),
    ({"rope_interleave": False}, "has rope_interleave = false, and only true"),
    ({"rms_norm_eps": 1e-5}, "has rms_norm_eps = 1e-05, and only 1e-06"),
    ({"attention_bias": True}, "has attention_bias = true"),
    ({"hidden_act": "gelu"}, "has hidden_act 'gelu'"),
    ({"q_lora_rank": None}, "has q_lora_rank = null, and latent attention needs a whole number"),
    ({"v_head_dim": "10"}, 'has v_head_dim = "10", and latent attention needs a whole number'),
    ({"num_key_value_heads": 2}, "n_kv_heads is n_heads"),
    ({"sliding_window": 7}, "latent attention has no sliding_window"),
    ({"rope_parameters": None}, "has no rope_parameters, in which Mistral 4 models differ"),
    ({"rope_parameters": {"rope_type": "default"}}, "rotary parameters that are not supported"),
    ({"rope_parameters": {"mscale_all_dim": 0.7}}, "has mscale_all_dim = 0.7"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "which is not 6 of 14 lanes"),
    ({"squared_yarn_scale": True}, "has squared_yarn_scale and no mscale_all_dim"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_a_config_of_what_is_not_computed_is_refused(change: Fields, message: str) -> None:
    fields = to_hugging_face(LATENT, "float32", None, 1, 2)
    with pytest.raises(BadInput) as error:
        from_hugging_face(changed(fields, change), "folder/config.json")
    assert message in str(error.value)


def test_a_model_that_does_not_stretch_is_refused_where_transformers_has_no_other() -> None:
    fields = to_hugging_face(LATENT, "float32", None, 1, 2)
    rope = {"rope_type": "default", "rope_theta": 5.0, "llama_4_scaling_beta": 0.1}
    with pytest.raises(BadInput, match="has no YaRN"):
        from_hugging_face(fields | {"rope_parameters": rope}, "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_eps": 1e-5}, "norms latents with an epsilon of 1e-06, and this model with 1e-05"),
        ({"n_shared_experts": 0}, "has experts that all tokens share, and this model none"),
        (
            {"latent_attention": None, "head_dim": 8, "n_kv_heads": 2},
            "only in its Mistral 4, which has latent attention",
        ),
    ],
)
def test_a_model_that_transformers_does_not_have_is_not_written(
    change: Fields, message: str
) -> None:
    with pytest.raises(BadInput) as error:
        to_hugging_face(dataclasses.replace(LATENT, **change), "float32", None, 1, 2)
    assert message in str(error.value)
    assert str(error.value).endswith("convert to --to mistral or --to lechat instead")


@pytest.mark.parametrize("name", [name for name in KINDS if name != "squared"])
def test_params_of_mistrals_give_the_config_back(name: str) -> None:
    assert from_params(to_params(KINDS[name]), "x", None) == KINDS[name]


def test_mistrals_programs_have_no_word_for_the_square() -> None:
    with pytest.raises(BadInput, match="no word for squared_yarn_scale"):
        to_params(SQUARED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"route_every_n": 2}, "has route_every_n = 2 in its moe, and only 1"),
        ({"routed_scale": 2.5}, "has routed_scale = 2.5 in its moe"),
        ({"num_expert_groups": 8}, "has num_expert_groups = 8 in its moe"),
        ({"num_expert_groups_per_tok": 4}, "has num_expert_groups_per_tok = 4 in its moe"),
        ({"renorm_strategy": "SCORES"}, 'has renorm_strategy = "SCORES" in its moe'),
        ({"use_load_balancing_bias": True}, "has use_load_balancing_bias = true in its moe"),
        ({"num_shared_experts": None}, "has no num_shared_experts in its moe"),
        ({"jitter": 0.1}, "has moe = "),
    ],
)
def test_params_of_what_is_not_computed_are_refused(change: Fields, message: str) -> None:
    with pytest.raises(BadInput) as error:
        from_params(changed(to_params(LATENT), {"moe": change}), "params.json", None)
    assert message in str(error.value)


def test_params_may_say_how_a_model_was_trained_and_null() -> None:
    moe = {"expert_parallel": 4, "expert_model_parallel": 1, "use_load_balancing_bias": False}
    moe |= {"renorm_strategy": "WEIGHTS"}
    fields = changed(to_params(LATENT), {"moe": moe, "head_dim": 99})
    assert from_params(fields, "x", None) == LATENT
    dense = dataclasses.replace(SMALL, sliding_window=None)
    assert from_params({**to_params(dense), "q_lora_rank": None}, "x", None) == dense
