"""A config means in lechat what the format's own program makes of it, or is refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lechat_jax.config import PRESETS, Llama4Scaling, MistralConfig, Yarn
from lechat_jax.errors import BadInput
from lechat_jax.formats.configs.hugging_face import from_hugging_face, to_hugging_face
from lechat_jax.formats.configs.mistral import from_params, to_params
from lechat_jax.model.rope import rotation
from lechat_torch.rotary import rotations

Fields = dict[str, Any]

# As released: https://huggingface.co/mistralai/Mistral-7B-v0.1/blob/main/config.json
V01: Fields = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
# As released in mistral-7B-v0.1.tar; it does not say rope_theta.
V01_PARAMS: Fields = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "sliding_window": 4096,
    "vocab_size": 32000,
}


# The `vision_encoder` of Pixtral 12B's params.json; and a `vision_config` that leaves much unsaid.
PIXTRAL_12B = {
    "hidden_size": 1024,
    "num_channels": 3,
    "image_size": 1024,
    "patch_size": 16,
    "rope_theta": 10000.0,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "adapter_bias": True,
    "image_token_id": 10,
}
TOWER = {"model_type": "pixtral", "hidden_act": "silu", "patch_size": 14, "image_size": 1540}


def without(fields: Fields, *keys: str) -> Fields:
    return {key: value for key, value in fields.items() if key not in keys}


def test_the_released_config_is_the_preset() -> None:
    assert from_hugging_face(V01, "x") == PRESETS["mistral-7b-v0.1"]


def test_the_released_config_of_devstral_2_is_the_preset() -> None:
    assert from_hugging_face(DEVSTRAL_2, "x") == PRESETS["devstral-2-123b-2512"]


@pytest.mark.parametrize(
    ("words", "preset"),
    [
        # Two classes of transformers have the numbers of one release for their defaults.
        (transformers.Ministral3Config(), "ministral-3-8b-2512"),  # its text
        (transformers.Mistral3Config(tie_word_embeddings=False), "mistral-small-24b-2503"),
    ],
)
def test_the_defaults_of_transformers_are_the_preset(words: Any, preset: str) -> None:
    fields = words.to_dict()
    if tower := fields.get("vision_config"):
        tower["hidden_act"] = "silu"  # as all releases say; transformers would take gelu
        assert from_hugging_face(fields, "x") == PRESETS[preset]
    assert from_hugging_face(fields, "x", text_only=True) == PRESETS[preset].text


@pytest.mark.parametrize(
    ("change", "apply_scale"),
    [
        ({}, True),
        ({"mscale_all_dim": 1.0}, False),
        ({"mscale": 0.7, "mscale_all_dim": 0.7}, False),
        ({"attention_factor": 1.0}, False),
        ({"attention_factor": 1.4158883083359672}, True),
        ({"mscale": None, "mscale_all_dim": None}, True),
    ],
)
def test_yarns_ways_to_say_how_long_queries_are_mean(change: Fields, apply_scale: bool) -> None:
    rope = {**DEVSTRAL_2["rope_parameters"], **change}
    yarn = from_hugging_face({**DEVSTRAL_2, "rope_parameters": rope}, "x").yarn
    assert yarn
    assert yarn.apply_scale == apply_scale
    words = transformers.Ministral3Config(head_dim=128, rope_parameters=dict(rope))
    theirs = ROPE_INIT_FUNCTIONS["yarn"](words)[1]
    assert yarn.attention_factor == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("name", [name for name, config in PRESETS.items() if config.yarn])
def test_the_speeds_of_a_stretched_model_are_those_of_transformers(name: str) -> None:
    """As a config that we write has them there; float32 against float32 and float64."""
    config = PRESETS[name]
    assert config.yarn
    fields = to_hugging_face(config, "bfloat16", None, 1, 2)
    stretched = config.yarn.factor * config.yarn.original_max_position_embeddings
    text = fields.get("text_config", fields)
    assert text["max_position_embeddings"] == stretched >= 262144
    inv_freq, length = ROPE_INIT_FUNCTIONS["yarn"](transformers.AutoConfig.for_model(**text))
    assert from_hugging_face(fields, "x") == config
    latent = config.latent_attention
    one, lanes = jnp.array([[1]]), latent.qk_rope_head_dim if latent else config.head_dim
    ours = rotation(one, lanes, config.rope_theta, "float32", config.yarn)
    np.testing.assert_allclose(np.arctan2(ours.sin, ours.cos)[0, 0], inv_freq, rtol=2e-6)
    np.testing.assert_allclose(np.hypot(ours.sin, ours.cos), length, rtol=1e-6)
    rotary = rotations(torch.tensor([[1]]), lanes, config.rope_theta, torch.float64, config.yarn)
    np.testing.assert_allclose(rotary.angle()[0, 0, 0], inv_freq, rtol=1e-6)
    np.testing.assert_allclose(rotary.abs()[0, 0, 0], length, rtol=1e-12)


def test_the_released_params_are_the_preset_when_told_the_base() -> None:
    assert from_params(V01_PARAMS, "x", rope_theta=1e4) == PRESETS["mistral-7b-v0.1"]


def test_an_absent_base_in_params_is_asked_for() -> None:
    with pytest.raises(BadInput, match=r"does not say rope_theta.*--rope-theta 10000"):
        from_params(V01_PARAMS, "x", rope_theta=None)


def test_a_base_that_params_has_is_not_overruled() -> None:
    fields = {**V01_PARAMS, "rope_theta": 1e6}
    assert from_params(fields, "x", None).rope_theta == from_params(fields, "x", 1e6).rope_theta
    with pytest.raises(BadInput, match=r"x has rope_theta 1000000\.0; leave out --rope-theta"):
        from_params(fields, "x", rope_theta=1e4)


YARN: Fields = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 64.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
}
# As released: https://huggingface.co/mistralai/Devstral-2-123B-Instruct-2512, without its
# quantisation.
DEVSTRAL_2: Fields = {
    "architectures": ["Ministral3ForCausalLM"],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 12288,
    "intermediate_size": 28672,
    "max_position_embeddings": 262144,
    "model_type": "ministral3",
    "num_attention_heads": 96,
    "num_hidden_layers": 88,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {**YARN, "type": "yarn", "llama_4_scaling_beta": 0.0},
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 131072,
}
V5_ROPE: Fields = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"sliding_window": None}, {"sliding_window": None}),
        ({"head_dim": None}, {"head_dim": 128}),
        ({"head_dim": 64}, {"head_dim": 64}),
        ({"num_key_value_heads": None}, {"n_kv_heads": 32}),
        ({"tie_word_embeddings": True}, {"tied_embeddings": True}),
        (V5_ROPE, {"rope_theta": 5e5}),
        ({"rope_scaling": None, "rope_theta": 1e6}, {"rope_theta": 1e6}),
        ({"rope_scaling": {"type": "default"}}, {"rope_theta": 1e4}),
        ({"attention_bias": False}, {}),
        (
            {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
            {"n_layers": 2, "sliding_window": (None, 4096)},
        ),
        (
            {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
            {"n_layers": 2, "sliding_window": None},
        ),
        ({"model_type": "ministral", "architectures": ["MinistralForCausalLM"]}, {}),
    ],
)
def test_a_config_of_hugging_face_means(change: Fields, expected: Fields) -> None:
    found = from_hugging_face({**V01, **change}, "x")
    assert found == dataclasses.replace(PRESETS["mistral-7b-v0.1"], **expected)


TINY: Fields = {
    "model_type": "mistral",
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 97,
}


@pytest.mark.parametrize("change", [{}, V5_ROPE, {"rope_theta": 7.0}, {"sliding_window": None}])
def test_what_is_absent_means_what_transformers_makes_of_it(change: Fields, tmp_path: Path) -> None:
    fields = {**TINY, **change}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    ours = from_hugging_face(fields, "x")
    assert (ours.n_kv_heads, ours.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)
    assert (ours.norm_eps, ours.sliding_window) == (theirs.rms_norm_eps, theirs.sliding_window)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tied_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "llama"},
            "has the model_type 'llama'; only mistral, ministral, mixtral",
        ),
        ({"model_type": None}, "has the model_type None"),
        ({"architectures": ["MistralForSequenceClassification"]}, "ForSequenceClassification"),
        ({"architectures": "MistralForCausalLM"}, "is of"),
        ({"attention_bias": True}, "has attention_bias = true"),
        ({"mlp_bias": True}, "has mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "has the rope_type .linear"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "has factor = null in its YaRN"),
        ({"rope_parameters": {"full_attention": V5_ROPE}}, "rotary parameters .*: full_attention"),
        ({"rope_parameters": YARN | {"truncate": False}}, "has truncate = false in its YaRN"),
        ({"rope_parameters": YARN | {"mscale_all_dim": 0.5}}, "queries and keys 1.1.* times"),
        ({"rope_parameters": YARN | {"attention_factor": "x"}}, "attention_factor = .*no number"),
        (
            {"rope_parameters": YARN | {"low_freq_factor": 1}},
            "rotary parameters .*: low_freq_factor",
        ),
        ({"rope_parameters": YARN | {"beta_fast": 0.5}}, "yarn needs 0 < alpha < beta"),
        ({"original_max_position_embeddings": 4096}, "has original_max_position_embeddings"),
        ({"rope_parameters": {"llama_4_scaling_beta": 0.1}}, "rotary parameters .*: llama_4_scal"),
        ({"model_type": "ministral3", "rope_parameters": None}, "has no rope_parameters"),
        ({"model_type": "mistral3"}, "of a mistral3 without a vision_config"),
        ({"model_type": "mistral3", "vision_config": TOWER}, "mistral3 without a text_config"),
        ({"rope_parameters": {**V5_ROPE["rope_parameters"], "partial_rotary_factor": 0.5}}, "part"),
        ({"rope_parameters": [1]}, "has rope_parameters = .* no JSON object"),
        ({"layer_types": ["full_attention"]}, "names 1 layers|sliding_window"),
        ({"layer_types": ["chunked_attention"] * 32}, "layer_types other than"),
        ({"layer_types": "sliding_attention"}, "layer_types other than"),
        ({"sliding_window": None, "layer_types": ["sliding_attention"] * 32}, "no sliding_window"),
        ({"sliding_window": 0}, "sliding_window must be at least 1"),
        ({"sliding_window": "4096"}, "sliding_window must be a whole number"),
        ({"hidden_size": "4096"}, "dim must be a whole number|no multiple"),
        ({"num_attention_heads": 0}, "no multiple"),
        ({"num_attention_heads": 7}, "no multiple of num_attention_heads 7"),
        ({"num_key_value_heads": 5}, "must be divisible by n_kv_heads"),
        ({"rms_norm_eps": -1}, "norm_eps must be positive"),
        ({"rope_theta": float("nan")}, "rope_theta must be positive"),
        ({"rope_theta": "x"}, "rope_theta must be a number"),
        ({"tie_word_embeddings": "no"}, "tied_embeddings must be true or false"),
    ],
)
def test_what_lechat_does_not_have_is_refused(change: Fields, message: str) -> None:
    if "layer_types" in change and len(change["layer_types"]) == 1:
        change = {**change, "layer_types": ["full_attention", "sliding_attention"]}
    with pytest.raises(BadInput, match=message) as error:
        from_hugging_face({**V01, **change}, "folder/config.json")
    assert str(error.value).startswith("folder/config.json")


def test_a_config_without_sizes_is_refused() -> None:
    with pytest.raises(BadInput, match="x lacks hidden_size, intermediate_size"):
        from_hugging_face(without(V01, "hidden_size", "intermediate_size"), "x")


FOUR = {**V01_PARAMS, "n_layers": 4, "rope_theta": 1e6}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (without(FOUR, "sliding_window"), {"sliding_window": None}),
        ({**FOUR, "sliding_window": None}, {"sliding_window": None}),
        ({**FOUR, "sliding_window": "4096"}, {"sliding_window": 4096}),
        ({**FOUR, "sliding_window": [None, 8, 8, 8]}, {"sliding_window": (None, 8, 8, 8)}),
        ({**FOUR, "sliding_window": [None, 8]}, {"sliding_window": (None, 8, None, 8)}),
        ({**FOUR, "sliding_window": "[null, 8]"}, {"sliding_window": (None, 8, None, 8)}),
        ({**FOUR, "sliding_window": [8, 8]}, {"sliding_window": 8}),
        (
            {**without(FOUR, "sliding_window"), "_sliding_window": [None, 8, 8, 8]},
            {"sliding_window": (None, 8, 8, 8)},
        ),
        (without(FOUR, "n_kv_heads"), {"n_kv_heads": 32}),
        ({**FOUR, "tied_embeddings": True}, {"tied_embeddings": True}),
        ({**FOUR, "yarn": None, "llama_4_scaling": None, "vision_encoder": None}, {}),
        (
            {**FOUR, "vision_encoder": PIXTRAL_12B},
            {"vision": PRESETS["pixtral-12b-2409"].vision},
        ),
        (
            {
                **FOUR,
                "yarn": {
                    "factor": 16,
                    "original_max_position_embeddings": 16384,
                    "beta": 32,
                    "alpha": 1,
                    "apply_scale": False,
                },
                "llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 16384},
            },
            {
                "yarn": Yarn(16.0, 16384, 32.0, 1.0, apply_scale=False),
                "llama_4_scaling": Llama4Scaling(0.1, 16384),
            },
        ),
        (
            {
                **FOUR,
                "yarn": {
                    "factor": 64,
                    "original_max_position_embeddings": 4096,
                    "beta": 4,
                    "alpha": 1,
                },
            },
            {"yarn": Yarn(64.0, 4096, 4.0, 1.0, apply_scale=True)},
        ),
        (
            {
                **FOUR,
                "max_seq_len": 32768,
                "max_position_embeddings": 1,
                "model_type": "transformer",
                "moe": None,
                "use_biases": False,
                "quantization": {},
            },
            {},
        ),
    ],
)
def test_params_of_mistrals_mean(fields: Fields, expected: Fields) -> None:
    base = dataclasses.replace(PRESETS["mistral-7b-v0.1"], n_layers=4, rope_theta=1e6)
    assert from_params(fields, "x", None) == dataclasses.replace(base, **expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe": {"num_experts": 8, "num_experts_per_tok": 2, "router_bias": True}}, "has moe"),
        ({"moe": {"num_experts": 8}}, "n_experts_per_token must be between 1 and n_experts"),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "has quantization = "),
        ({"yarn": {"factor": 16}}, "yarn lacks alpha, beta, original_max_position"),
        ({"yarn": [16]}, "yarn must be null or an object"),
        ({"llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling lacks original_max_position"),
        ({"multimodal": {"whisper_model_args": {}}}, "has multimodal = "),
        ({"q_lora_rank": 1024}, "has kv_lora_rank = null, and latent attention needs"),
        ({"model_type": "mamba"}, "has model_type = .*mamba"),
        ({"sliding_window": "wide"}, "has sliding_window = 'wide'"),
        ({"sliding_window": [1, 2, 3]}, "sliding_window of 3 layers"),
        ({"sliding_window": []}, "sliding_window of 0 layers"),
        ({"dim": None}, "dim must be a whole number"),
    ],
)
def test_params_of_what_lechat_does_not_have_are_refused(change: Fields, message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        from_params({**FOUR, **change}, "folder/params.json", None)
    assert str(error.value).startswith("folder/params.json")


FIRST_RELEASE = {  # of Mixtral-8x7B, which has Hugging Face's words
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-05,
    "vocab_size": 32000,
    "rope_theta": 1000000.0,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
}


def test_configs_of_mixtral_are_read_and_written_both_ways() -> None:
    config = PRESETS["mixtral-8x7b-v0.1"]
    assert from_params(FIRST_RELEASE, "x", None) == config
    params = to_params(config)
    assert params["moe"] == {"num_experts": 8, "num_experts_per_tok": 2}
    assert from_params(params, "x", None) == config
    fields = to_hugging_face(config, "bfloat16", 32768, 1, 2)
    assert (fields["model_type"], fields["num_local_experts"]) == ("mixtral", 8)
    assert from_hugging_face(fields, "x") == config
    transformers.MixtralConfig(**fields)
    short = {"model_type": "mixtral", "head_dim": None}  # all else as transformers takes it
    sizes = "hidden_size num_hidden_layers num_attention_heads intermediate_size vocab_size".split()
    assert from_hugging_face(short | {key: fields[key] for key in sizes}, "x") == config
    mixed = dataclasses.replace(config, n_layers=2, sliding_window=(None, 8))
    with pytest.raises(BadInput, match="no model that is ministral and mixtral"):
        to_hugging_face(mixed, "bfloat16", 32768, 1, 2)


def test_params_without_sizes_are_refused() -> None:
    with pytest.raises(BadInput, match="x: model config lacks dim, n_heads"):
        from_params(without(FOUR, "dim", "n_heads"), "x", None)


def test_windows_of_two_sizes_have_no_word_in_hugging_face(tiny: MistralConfig) -> None:
    config = dataclasses.replace(tiny, sliding_window=(7, None, 9))
    with pytest.raises(BadInput, match=r"windows of 2 sizes \(\[7, 9\]\).*--to mistral"):
        to_hugging_face(config, "float32", 64, 1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"yarn": Yarn(16.0, 64, 4.0, 1.0, apply_scale=False)},
            "original lengths 64 and 9, and transformers has one",
        ),
        ({"sliding_window": (7, None, 7)}, "no model that is ministral and ministral3"),
    ],
)
def test_what_has_no_word_in_hugging_face_is_refused(
    tiny: MistralConfig, change: Fields, message: str
) -> None:
    config = dataclasses.replace(tiny, llama_4_scaling=Llama4Scaling(0.1, 9), **change)
    with pytest.raises(BadInput, match=message):
        to_hugging_face(config, "float32", 64, 1, 2)


STRETCHES = st.builds(
    Yarn,
    factor=st.sampled_from([1.0, 16.0]),
    original_max_position_embeddings=st.just(9),
    beta=st.sampled_from([4.0, 32.0]),
    alpha=st.just(1.0),
    apply_scale=st.just(False),
) | st.just(Yarn(64.0, 9, 4.0, 1.0, apply_scale=True))
WINDOWS = st.none() | st.just(7) | st.just((7, None, 7)) | st.just((None, 7, 7))


@given(
    st.builds(
        dict,
        sliding_window=WINDOWS,
        tied_embeddings=st.booleans(),
        yarn=st.none() | STRETCHES,
        llama_4_scaling=st.none() | st.just(Llama4Scaling(0.1, 9)),
    )
)
def test_every_config_comes_back(change: Fields) -> None:
    base = dataclasses.replace(PRESETS["lechat-15m"], n_layers=3, rope_theta=1e6)
    config = dataclasses.replace(base, **change)
    if isinstance(config.sliding_window, tuple):  # for which transformers has no growth
        config = dataclasses.replace(config, llama_4_scaling=None)
    hugging_face = json.dumps(to_hugging_face(config, "bfloat16", 64, 1, 2))
    assert from_hugging_face(json.loads(hugging_face), "x") == config
    assert from_params(json.loads(json.dumps(to_params(config))), "x", None) == config


@pytest.mark.parametrize("window", [None, 7, (7, None, 7)])
def test_transformers_reads_what_is_written(
    tiny: MistralConfig, window: int | None | tuple[int | None, ...], tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny, sliding_window=window, rope_theta=3e5)
    fields = to_hugging_face(config, "bfloat16", positions=64, bos_id=1, eos_id=2)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    found = transformers.AutoConfig.from_pretrained(tmp_path)
    layers = getattr(found, "layer_types", None)
    kinds = (
        [found.sliding_window] * 3
        if layers is None
        else [found.sliding_window if layer == "sliding_attention" else None for layer in layers]
    )
    assert kinds == list(config.windows)
    assert found.rope_parameters == {"rope_type": "default", "rope_theta": 3e5}
    assert (found.hidden_size, found.num_attention_heads, found.head_dim) == (40, 6, 8)
    assert str(found.dtype).endswith("bfloat16")
    assert from_hugging_face(found.to_dict(), "x") == config
