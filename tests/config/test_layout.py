"""The table of weights is what the model has; a name that is not in it stands for nothing."""

import dataclasses
from typing import cast

import pytest

from lechat_jax.config import MistralConfig, layout
from lechat_jax.model.binding import shapes_of


@pytest.fixture(params=["dense", "tied", "mixture"])
def config(request: pytest.FixtureRequest, tiny: MistralConfig) -> MistralConfig:
    changes = {
        "tied": {"tied_embeddings": True},
        "mixture": {"n_experts": 4, "n_experts_per_token": 2},
    }
    return dataclasses.replace(tiny, **changes.get(request.param, {}))


def test_the_table_has_the_weights_of_the_model_and_their_axes(config: MistralConfig) -> None:
    found = {name: config.shape(row.letters) for name, row in config.weights.items()}
    assert found == {name: leaf.shape for name, leaf in shapes_of(config).items()}


def test_a_weight_is_found_by_its_name_and_by_that_of_its_stack(config: MistralConfig) -> None:
    for name, row in config.weights.items():
        assert layout.row_of(name) == row
        layer, stack = layout.layer_of(name), layout.stacked(name)
        if layer is None:
            assert (stack, layout.is_stack(name)) == (name, False)
        else:
            assert layout.row_of(stack).letters == f"L{row.letters}"
            assert layout.is_stack(stack)
            assert layout.in_layer(stack, layer) == name


def test_a_weight_is_of_one_kind(config: MistralConfig) -> None:
    for name in config.weights:
        kinds = (layout.is_norm, layout.is_kernel, lambda name: name.endswith("router.kernel"))
        assert sum(kind(name) for kind in kinds) == 1, name
        assert layout.is_matrix(name) != layout.is_norm(name)
        assert layout.part_of(name) == ""


@pytest.mark.parametrize("part", [".scale", ".zero", ".order"])
def test_a_part_belongs_to_its_kernel(config: MistralConfig, part: str) -> None:
    for name in filter(layout.is_kernel, config.weights):
        assert layout.is_part(name + part)
        assert layout.kernel_of(name + part) == name
        assert layout.is_expert(name + part) == layout.is_expert(name)
        assert not layout.is_kernel(name + part)


def test_an_adapter_belongs_to_a_map_of_attention_or_the_dense_feed_forward() -> None:
    latent = ["q_a", "q_b", "kv_a", "kv_b"]
    assert [*layout.MAPS] == ["q", "k", "v", *latent, "o", "gate", "up", "down"]
    for name in layout.MAPS.values():
        module = layout.module_of(name)
        assert layout.is_adapter(f"{module}.lora.a")
        assert layout.kernel_of(f"{module}.lora.a") == name
    assert not layout.is_adapter("blocks.0.mlp.experts.up.lora.a")
    assert not layout.is_adapter("embed.lora.a")


STRANGERS = [
    "norm",
    "blocks.0.attn.q.lora",
    "kernel",
    "blocks.0.attn.x.kernel",
    "blocks.0.norm.scale",
    "norm.kernel",
    "attn.q.kernel",
]


@pytest.mark.parametrize("name", [*STRANGERS, "embed.kernel.scale", "blocks.0.attn.q.lora.a"])
def test_what_is_no_weight_has_no_axes(name: str) -> None:
    assert layout.letters(name) == ""
    for ask in (layout.row_of, layout.n_reads):
        with pytest.raises(ValueError, match=f"{name} is no weight of a model"):
            ask(name)


@pytest.mark.parametrize("name", STRANGERS)
def test_a_stranger_is_of_no_kind(name: str) -> None:
    kinds = (layout.is_norm, layout.is_kernel, layout.is_part, layout.is_adapter, layout.is_expert)
    assert not any(kind(name) for kind in (*kinds, layout.is_matrix, layout.is_map))


def test_the_weights_of_a_config_are_not_to_be_changed(tiny: MistralConfig) -> None:
    with pytest.raises(TypeError, match="does not support item assignment"):
        cast(dict[str, layout.Row], tiny.weights)["norm.scale"] = layout.row_of("embed.kernel")
