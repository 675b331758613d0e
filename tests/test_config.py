"""A config is a Mistral that can be built, or is refused with a sentence; it survives JSON."""

import dataclasses
import json
from typing import Any

import jax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from lechat_jax.config import PRESETS, MistralConfig, preset
from lechat_jax.errors import BadInput
from lechat_jax.model import Mistral

SIZES = st.integers(1, 10**6)
NUMBERS = st.floats(min_value=1e-12, max_value=1e12)
WINDOWS = st.none() | SIZES


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
    assert defaults == ["tied_embeddings", "n_experts", "n_experts_per_token"]


@given(fields())
def test_json_and_back_is_the_same_config(fields: dict[str, Any]) -> None:
    config = MistralConfig(**fields)
    again = MistralConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)  # one compiled program serves both


@pytest.mark.parametrize(
    ("name", "n_params"),
    [
        ("lechat-15m", 15_165_888),
        ("bench-284m", 283_673_600),
        ("mistral-7b-v0.1", 7_241_732_096),
    ],
)
def test_presets_have_the_published_number_of_weights(name: str, n_params: int) -> None:
    assert preset(name).n_params == n_params


def test_the_default_model_trains_with_a_window_shorter_than_its_block() -> None:
    assert preset("lechat-15m") == MistralConfig(192, 6, 8, 2, 24, 672, 32000, 1e-5, 1e4, 64)


@pytest.mark.parametrize("tied", [False, True])
def test_the_number_of_weights_is_that_of_the_model(tiny: MistralConfig, tied: bool) -> None:
    config = dataclasses.replace(tiny, tied_embeddings=tied)
    model = nnx.eval_shape(lambda: Mistral(config, rngs=nnx.Rngs(0)))
    assert config.n_params == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))


def test_every_preset_is_named_like_its_release() -> None:
    assert all(name == name.lower() and " " not in name for name in PRESETS)


@pytest.mark.parametrize(("n_experts", "chosen"), [(4, 0), (4, 5), (0, 2), (-1, 0)])
def test_as_many_experts_are_chosen_as_there_can_be(
    tiny: MistralConfig, n_experts: int, chosen: int
) -> None:
    with pytest.raises(BadInput, match="n_experts_per_token must be between 1 and n_experts"):
        dataclasses.replace(tiny, n_experts=n_experts, n_experts_per_token=chosen)
