"""A config is a Mistral that can be built, or is refused with a sentence; it survives JSON."""

import dataclasses
import json
from typing import Any

import jax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from lechat_jax.config import PRESETS, Llama4Scaling, MistralConfig, Yarn, preset
from lechat_jax.config.mistral import MIXTURE, PARTS
from lechat_jax.config.presets import UNVERIFIED
from lechat_jax.errors import BadInput
from lechat_jax.model.mistral import Mistral

SIZES = st.integers(1, 10**6)
NUMBERS = st.floats(min_value=1e-12, max_value=1e12)
WINDOWS = st.none() | SIZES
YARN = Yarn(16.0, 16384, 32.0, 1.0, apply_scale=False)
YARN_FIELDS = dataclasses.asdict(YARN)


@st.composite
def fields(draw: st.DrawFn) -> dict[str, Any]:
    n_layers, n_kv_heads = draw(st.integers(1, 40)), draw(st.integers(1, 16))
    return {
        "dim": draw(SIZES),
        "n_layers": n_layers,
        "n_heads": n_kv_heads * draw(st.integers(1, 16)),
        "n_kv_heads": n_kv_heads,
        "head_dim": 2 * draw(SIZES),
        "hidden_dim": draw(SIZES),
        "vocab_size": draw(SIZES),
        "norm_eps": draw(NUMBERS),
        "rope_theta": draw(NUMBERS),
        "sliding_window": draw(WINDOWS | st.tuples(*[WINDOWS] * n_layers)),
        "tied_embeddings": draw(st.booleans()),
        "yarn": draw(st.none() | st.just(YARN)),
        "llama_4_scaling": draw(st.none() | st.just(Llama4Scaling(0.1, 16384))),
    }


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dim": 0}, "dim must be positive, not 0"),
        ({"n_layers": -1}, "n_layers must be positive, not -1"),
        ({"norm_eps": 0.0}, "norm_eps must be positive, not 0.0"),
        ({"rope_theta": -1e4}, "rope_theta must be positive, not -10000.0"),
        ({"n_heads": 7}, "n_heads (7) must be divisible by n_kv_heads (2), "),
        ({"n_kv_heads": 4}, "n_heads (6) must be divisible by n_kv_heads (4), "),
        ({"head_dim": 7}, "head_dim must be even for rotary embeddings, not 7"),
        ({"sliding_window": 0}, "sliding_window must be at least 1 (a query sees itself), not 0"),
        ({"sliding_window": (7, -3, None)}, "sliding_window must be at least 1"),
        ({"sliding_window": (7, None)}, "sliding_window names 2 layers, but n_layers is 3"),
    ],
)
def test_a_contradiction_is_refused_with_a_sentence_that_names_the_field(
    tiny: MistralConfig, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(BadInput) as error:
        dataclasses.replace(tiny, **changes)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(MistralConfig)][:9])
def test_what_is_no_number_is_refused_as_a_json_file_may_hold_anything(
    tiny: MistralConfig, name: str
) -> None:
    for value in ("40", None, [40], float("nan"), float("inf"), True):
        with pytest.raises(BadInput, match=f"^{name} must be"):
            MistralConfig.from_dict(tiny.to_dict() | {name: value})


@pytest.mark.parametrize("name", ["dim", "n_layers", "head_dim", "vocab_size"])
def test_a_size_is_whole(tiny: MistralConfig, name: str) -> None:
    with pytest.raises(BadInput, match=f"^{name} must be"):
        MistralConfig.from_dict(tiny.to_dict() | {name: 40.5})


def test_a_whole_number_will_do_where_a_fraction_may_stand(tiny: MistralConfig) -> None:
    assert MistralConfig.from_dict(tiny.to_dict() | {"rope_theta": 10_000}) == tiny


@pytest.mark.parametrize("window", ["full", 7.5, [7, "7", 7], True, float("nan")])
def test_a_window_is_whole_or_none(tiny: MistralConfig, window: object) -> None:
    with pytest.raises(BadInput, match=r"^sliding_window must be"):
        MistralConfig.from_dict(tiny.to_dict() | {"sliding_window": window})


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ({"yarn": 16}, "yarn must be null or an object, not 16"),
        ({"yarn": {"factor": 16}}, "yarn lacks alpha, apply_scale, beta, original_max_position"),
        ({"yarn": YARN_FIELDS | {"mscale": 1}}, "yarn has unknown fields: mscale"),
        ({"yarn": YARN_FIELDS | {"factor": 0.5}}, "yarn must stretch some length by a factor"),
        ({"yarn": YARN_FIELDS | {"beta": "32"}}, "beta must be a number, not '32'"),
        ({"yarn": YARN_FIELDS | {"alpha": 32}}, "yarn needs 0 < alpha < beta, not 32.0 and 32.0"),
        ({"yarn": YARN_FIELDS | {"apply_scale": 0}}, "apply_scale must be true or false, not 0"),
        ({"yarn": YARN_FIELDS | {"factor": float("inf")}}, "yarn must stretch some length"),
        ({"yarn": YARN_FIELDS | {"original_max_position_embeddings": 0}}, "yarn must stretch some"),
        ({"yarn": YARN_FIELDS | {"alpha": 0}}, "yarn needs 0 < alpha < beta, not 0.0 and 32.0"),
        ({"yarn": YARN_FIELDS | {"beta": float("inf")}}, "yarn needs 0 < alpha < beta, not 1.0"),
        (
            {"llama_4_scaling": {"beta": float("inf"), "original_max_position_embeddings": 9}},
            "llama_4_scaling needs a beta of at least 0",
        ),
        (
            {"llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 0}},
            "llama_4_scaling needs a beta of at least 0 and a positive original length",
        ),
        ({"n_experts": 4}, "n_experts_per_token must be between 1 and n_experts (4)"),
        ({"n_experts": 4, "n_experts_per_token": 5}, "n_experts_per_token must be between 1 and"),
        ({"n_experts_per_token": 1}, "n_experts_per_token must be between 1 and n_experts (0)"),
        ({"n_experts": -1, "n_experts_per_token": -1}, "n_experts_per_token must be between"),
        ({"llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling lacks original_max_position"),
        (
            {"llama_4_scaling": {"beta": -1, "original_max_position_embeddings": 9}},
            "llama_4_scaling needs a beta of at least 0",
        ),
        (
            {"llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 9.5}},
            "original_max_position_embeddings must be a whole number, not 9.5",
        ),
    ],
)
def test_a_part_that_is_none_is_refused_with_a_sentence(
    tiny: MistralConfig, part: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(BadInput) as error:
        MistralConfig.from_dict(tiny.to_dict() | part)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    "change",
    [
        {"yarn": dataclasses.replace(YARN, factor=1.0)},
        {"llama_4_scaling": Llama4Scaling(0.0, 1)},
        {"n_experts": 4, "n_experts_per_token": 4},
        {"n_experts": 1, "n_experts_per_token": 1},
        {"sliding_window": 1, "n_kv_heads": 6, "head_dim": 2},
        {"sliding_window": (1, None, 7)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_just_within_its_bounds_is_a_model_and_survives_json(
    tiny: MistralConfig, change: dict[str, Any]
) -> None:
    config = dataclasses.replace(tiny, **change)
    assert MistralConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_part_that_a_model_has_not_goes_unsaid(tiny: MistralConfig) -> None:
    assert not PARTS.keys() & tiny.to_dict().keys()
    assert MistralConfig.from_dict(tiny.to_dict() | {"yarn": None}) == tiny


def test_fields_that_are_missing_or_unknown_are_all_named(tiny: MistralConfig) -> None:
    fields = tiny.to_dict()
    del fields["rope_theta"], fields["dim"]
    with pytest.raises(BadInput, match=r"^model config lacks dim, rope_theta$"):
        MistralConfig.from_dict(fields)
    with pytest.raises(BadInput, match=r"^model config has unknown fields: colour, n_head$"):
        MistralConfig.from_dict(tiny.to_dict() | {"n_head": 6, "colour": "blue"})


def test_an_unknown_preset_is_answered_with_those_there_are() -> None:
    with pytest.raises(BadInput, match="unknown preset 'mistral'; choose one of lechat-15m, "):
        preset("mistral")


# --- what it says ---


@pytest.mark.parametrize(
    ("sliding_window", "windows"),
    [(7, (7, 7, 7)), (None, (None, None, None)), ((7, None, 1), (7, None, 1))],
)
def test_each_layer_has_a_window(
    tiny: MistralConfig, sliding_window: Any, windows: tuple[int | None, ...]
) -> None:
    assert dataclasses.replace(tiny, sliding_window=sliding_window).windows == windows


def test_a_group_of_query_heads_shares_a_key_value_head(tiny: MistralConfig) -> None:
    assert tiny.group_size == 3


def test_only_what_most_models_do_not_have_has_a_default() -> None:
    defaults = [
        field.name
        for field in dataclasses.fields(MistralConfig)
        if field.default is not dataclasses.MISSING
    ]
    assert defaults == ["tied_embeddings", *MIXTURE, *PARTS]
    assert not any(getattr(PRESETS["mistral-7b-v0.1"], name) for name in defaults)


@given(fields())
def test_json_and_back_is_the_same_config(fields: dict[str, Any]) -> None:
    config = MistralConfig(**fields)
    again = MistralConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)  # one compiled program serves both


# As the model cards have it, or the sum of the tensors in the release's index.
PUBLISHED = {  # of those that see: the decoder, and the tower with its projector
    "lechat-15m": 15_165_888,
    "bench-284m": 283_673_600,
    "bench-1b": 1_003_554_816,
    "bench-small-4": 288_979_232,
    "lechat-sees-3m": 2_489_760 + 428_800,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mathstral-7b": 7_248_023_552,
    "mixtral-8x7b-v0.1": 46_702_792_704,
    "mixtral-8x22b-v0.1": 140_620_634_112,
    "mixtral-8x22b-v0.3": 140_630_071_296,
    "mistral-nemo-12b-2407": 12_247_782_400,
    "codestral-22b": 22_247_282_688,
    "mistral-small-22b-2409": 22_247_282_688,
    "mistral-small-24b-2501": 23_572_403_200,
    "mistral-small-24b-2503": 23_572_403_200 + 438_958_080,
    "pixtral-12b-2409": 12_247_782_400 + 403_489_792 + 31_467_520,
    "mistral-large-2407": 122_610_069_504,
    "mistral-large-2411": 122_610_069_504,
    "ministral-8b-2410": 8_019_808_256,
    "ministral-3-3b-2512": 3_429_006_336 + 420_083_712,
    "ministral-3-8b-2512": 8_489_553_920 + 428_472_320,
    "ministral-3-14b-2512": 13_506_073_600 + 438_958_080,
    "devstral-small-2-24b-2512": 23_572_403_200 + 438_958_080,
    "devstral-2-123b-2512": 125_025_988_608,
    # Of the next three only totals are published; of Voxtral, which hears, this is the text part.
    "mistral-medium-3.5-128b": 125_025_988_608 + 2_678_221_568,
    "shieldstral-1.0-3b": 3_429_006_336 + 420_083_712,
    "voxtral-mini-3b-2507": 4_014_136_320,
    "mistral-nemo-minitron-8b": 8_414_105_600,
    # "119B", and of Large 3 "673B" beside a tower of "2.5B".
    "mistral-small-4-119b-2603": 118_972_826_624 + 428_472_320,
    "leanstral-2603": 118_972_826_624 + 428_472_320,
    "mistral-large-3-675b-2512": 673_421_089_792 + 2_570_087_168,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_number_of_weights(name: str) -> None:
    """Of the model's own shapes; behind dense ones layers are alike: the last is what each adds."""
    first = PRESETS[name].n_dense_layers + 1
    one, two = (
        weights_of_eval_shape(dataclasses.replace(PRESETS[name], n_layers=n, sliding_window=None))
        for n in (first, first + 1)
    )
    total = one + (PRESETS[name].n_layers - first) * (two - one)
    assert total == PRESETS[name].n_params == PUBLISHED[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_whole_presets_have_the_published_number_of_weights(name: str) -> None:
    assert weights_of_eval_shape(PRESETS[name]) == PUBLISHED[name]


def weights_of_eval_shape(config: MistralConfig) -> int:
    """The weights of the model itself, none of which is made."""
    model = nnx.eval_shape(lambda: Mistral(config, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))


def test_what_could_not_be_verified_is_marked() -> None:
    assert UNVERIFIED.keys() <= PRESETS.keys()
    names = {field.name for field in dataclasses.fields(MistralConfig)}
    assert all(fields and set(fields) <= names for fields in UNVERIFIED.values())


def test_the_default_model_trains_with_a_window_shorter_than_its_block() -> None:
    assert preset("lechat-15m") == MistralConfig(192, 6, 8, 2, 24, 672, 32000, 1e-5, 1e4, 64)


@pytest.mark.parametrize("tied", [False, True])
def test_the_number_of_weights_is_that_of_the_model(tiny: MistralConfig, tied: bool) -> None:
    config = dataclasses.replace(tiny, tied_embeddings=tied)
    assert config.n_params == weights_of_eval_shape(config)


def test_every_preset_is_named_like_its_release() -> None:
    assert all(name == name.lower() and " " not in name for name in PRESETS)


@pytest.mark.parametrize(("n_experts", "chosen"), [(4, 0), (4, 5), (0, 2), (-1, 0)])
def test_as_many_experts_are_chosen_as_there_can_be(
    tiny: MistralConfig, n_experts: int, chosen: int
) -> None:
    with pytest.raises(BadInput, match="n_experts_per_token must be between 1 and n_experts"):
        dataclasses.replace(tiny, n_experts=n_experts, n_experts_per_token=chosen)
