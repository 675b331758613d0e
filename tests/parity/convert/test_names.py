"""One table names every weight in every format, and its rows are all of a model's weights."""

import dataclasses

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float

from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.formats.layouts import from_format, to_format
from lechat_jax.formats.names import FORMATS, Format, Tensor, match, names, rows, shapes, tied_head
from lechat_jax.model.binding import shapes_of
from lechat_torch import model as lechat_torch


@pytest.mark.parametrize("tied", [False, True])
def test_the_table_has_the_weights_of_lechats_model(tiny: MistralConfig, tied: bool) -> None:
    config = dataclasses.replace(tiny, tied_embeddings=tied)
    found = shapes_of(config)
    assert shapes(config, "lechat") == {name: leaf.shape for name, leaf in found.items()}


@pytest.mark.parametrize("tied", [False, True])
def test_the_table_has_the_weights_of_transformers_model(tiny: MistralConfig, tied: bool) -> None:
    config = dataclasses.replace(tiny, tied_embeddings=tied)
    words = transformers.MistralConfig(
        vocab_size=97,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    theirs = {
        name: tuple(parameter.shape)
        for name, parameter in transformers.MistralForCausalLM(words).named_parameters()
    }
    ours = shapes(config, "hf")
    assert {key: ours[name] for name, key in names(config, "hf").items()} == theirs


def test_a_layer_in_mistrals_own_words(tiny: MistralConfig) -> None:
    found = [name for name in names(tiny, "mistral").values() if name.startswith("layers.2.")]
    assert found == [
        "layers.2.attention_norm.weight",
        "layers.2.attention.wq.weight",
        "layers.2.attention.wk.weight",
        "layers.2.attention.wv.weight",
        "layers.2.attention.wo.weight",
        "layers.2.ffn_norm.weight",
        "layers.2.feed_forward.w1.weight",
        "layers.2.feed_forward.w3.weight",
        "layers.2.feed_forward.w2.weight",
    ]


@pytest.mark.parametrize("fmt", [*FORMATS, "gguf"])
def test_no_two_weights_share_a_name(tiny: MistralConfig, fmt: Format) -> None:
    found = names(tiny, fmt)
    assert len(set(found.values())) == len(found) == 3 + 9 * tiny.n_layers


def test_missing_and_extra_keys_are_both_listed(tiny: MistralConfig) -> None:
    keys = set(names(tiny, "hf").values()) - {"model.norm.weight"} | {"model.bias"}
    with pytest.raises(BadInput) as error:
        match(tiny, "hf", keys, "x")
    assert str(error.value) == (
        "x lacks model.norm.weight and has model.bias, which its config does not know; "
        "config and weights are of different models"
    )


def test_a_long_list_of_differences_is_cut(tiny: MistralConfig) -> None:
    with pytest.raises(BadInput, match=r"input_layernorm\.weight, .* and 26 more"):
        match(tiny, "hf", {}, "x")


def test_only_a_tied_model_may_repeat_its_head(tiny: MistralConfig) -> None:
    tied = dataclasses.replace(tiny, tied_embeddings=True)
    keys = {*names(tied, "hf").values(), "lm_head.weight"}
    assert tied_head(tied, "hf") == "lm_head.weight"
    assert "head.kernel" not in match(tied, "hf", keys, "x")
    with pytest.raises(BadInput, match=r"lacks lm_head\.weight"):
        match(tiny, "hf", names(tied, "hf").values(), "x")
    with pytest.raises(BadInput, match=r"has output\.weight"):
        match(tied, "hf", {*keys, "output.weight"}, "x")


def test_stored_frequencies_of_early_files_are_passed_over(tiny: MistralConfig) -> None:
    keys = {*names(tiny, "hf").values(), "model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert match(tiny, "hf", keys, "x") == names(tiny, "hf")


@given(st.data())
def test_every_format_gives_the_same_bytes_back(data: st.DataObject) -> None:
    kv_heads = data.draw(st.integers(1, 3))
    config = MistralConfig(
        dim=data.draw(st.integers(1, 7)),
        n_layers=1,
        n_heads=kv_heads * data.draw(st.integers(1, 3)),
        n_kv_heads=kv_heads,
        head_dim=2 * data.draw(st.integers(1, 4)),
        hidden_dim=5,
        vocab_size=6,
        norm_eps=1e-5,
        rope_theta=1e4,
        sliding_window=None,
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    for row in rows(config).values():
        array = rng.standard_normal(shapes(config, "lechat")[row.lechat]).astype(np.float32)
        for fmt in (*FORMATS, "gguf"):
            stored = to_format(array, config, fmt, row)
            assert stored.shape == shapes(config, fmt)[row.lechat]
            np.testing.assert_array_equal(from_format(stored, config, fmt, row), array)


def test_only_rotated_rows_are_copied(tiny: MistralConfig) -> None:
    copied = {
        (fmt, name.split(".", 2)[-1])
        for fmt in FORMATS
        for name, row in rows(tiny).items()
        for array in [np.zeros(shapes(tiny, "lechat")[name])]
        if not np.shares_memory(to_format(array, tiny, fmt, row), array)
    }
    assert copied == {("mistral", "attn.q.kernel"), ("mistral", "attn.k.kernel")}


def as_mistral_rotates(x: Float[np.ndarray, "T N H"], theta: float) -> Float[np.ndarray, "T N H"]:
    """Neighbouring lanes as one complex number, turned; after mistral-inference's rope.py."""
    T, _, H = x.shape
    angles = np.outer(np.arange(T), theta ** (-np.arange(0, H, 2) / H))
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack([np.real(turned), np.imag(turned)], -1).reshape(x.shape)


def as_hugging_face_rotates(
    x: Float[np.ndarray, "T N H"], theta: float
) -> Float[np.ndarray, "T N H"]:
    """Lanes half a head apart, turned as transformers' rotate_half does."""
    T, _, H = x.shape
    angles = np.outer(np.arange(T), theta ** (-np.arange(0, H, 2) / H))
    cos, sin = (np.tile(f(angles), 2)[:, None] for f in (np.cos, np.sin))
    return x * cos + np.concatenate([-x[..., H // 2 :], x[..., : H // 2]], -1) * sin


def test_each_format_has_the_row_order_that_its_own_rotation_needs(tiny: MistralConfig) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((11, tiny.dim))
    table = rows(tiny)

    def scores(fmt: Format, kernels: dict[str, Float[np.ndarray, "..."]]) -> np.ndarray:
        rotate = as_mistral_rotates if fmt == "mistral" else as_hugging_face_rotates
        q, k = (
            rotate((x @ kernels[name].T).reshape(11, -1, tiny.head_dim), tiny.rope_theta)
            for name in "qk"
        )
        return np.einsum("TNH,SNH->NTS", q, np.repeat(k, tiny.group_size, axis=1))

    original: dict[str, np.ndarray] = {  # as a consolidated file has them
        "q": rng.standard_normal((tiny.n_heads * tiny.head_dim, tiny.dim)),
        "k": rng.standard_normal((tiny.n_kv_heads * tiny.head_dim, tiny.dim)),
    }

    def converted(row_of: dict[str, Tensor]) -> dict[str, np.ndarray]:
        ours = {n: from_format(a, tiny, "mistral", row_of[n]) for n, a in original.items()}
        return {n: to_format(a, tiny, "hf", row_of[n]) for n, a in ours.items()}

    row_of = {name: table[f"blocks.0.attn.{name}.kernel"] for name in "qk"}
    wanted = scores("mistral", original)
    np.testing.assert_allclose(scores("hf", converted(row_of)), wanted, rtol=0, atol=1e-11)
    unturned = {name: row._replace(rotary=False) for name, row in row_of.items()}
    assert np.abs(scores("hf", converted(unturned)) - wanted).max() > 1  # the test can fail


@pytest.mark.parametrize("tied", [False, True])
def test_the_table_has_the_weights_of_lechat_torchs_model(tiny: MistralConfig, tied: bool) -> None:
    config = dataclasses.replace(tiny, tied_embeddings=tied)
    theirs = {name: tuple(x.shape) for name, x in lechat_torch.Mistral(config).state_dict().items()}
    ours = shapes(config, "torch")
    found = {key: ours[name] for name, key in names(config, "torch").items()}
    if head := tied_head(config, "torch"):
        found[head] = found["embed.weight"]
    assert found == theirs
