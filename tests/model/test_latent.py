"""Latent attention: two ways to one sum, whose cache is a twentieth of that of all heads."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lechat_jax.config import LatentConfig, MistralConfig, preset
from lechat_jax.config.layout import module_of
from lechat_jax.data.rows import Rows
from lechat_jax.devices.mesh import make_mesh, settled
from lechat_jax.errors import BadInput
from lechat_jax.generate.generator import Generator
from lechat_jax.generate.sampling import Sampling
from lechat_jax.model.adapters import Adapters, target_words
from lechat_jax.model.attention import training_attention
from lechat_jax.model.binding import bind, weights_of
from lechat_jax.model.cache import EMPTY, cache_bytes, empty_cache
from lechat_jax.model.mistral import Mistral
from lechat_jax.model.rope import rotations
from lechat_jax.quantize.scheme import numbers_of, quantize_weights, scheme_for
from lechat_jax.train.step import StepOptions, gradient
from tests.support.models import TINY_LATENT, logits_of, random_model, random_weights

slope = jax.jit(gradient, static_argnums=(0, 1))
TOKENS = np.random.default_rng(0).integers(97, size=(2, 40))
WIDTHS = LatentConfig(24, 20, 6, 8, 10)
assert TINY_LATENT.latent_attention == WIDTHS

# Widths that eight devices and groups of int4 divide.
EVEN = dataclasses.replace(
    TINY_LATENT,
    dim=64,
    n_heads=8,
    n_kv_heads=8,
    head_dim=24,
    hidden_dim=64,
    vocab_size=96,
    n_experts=8,
    expert_hidden_dim=32,
    latent_attention=LatentConfig(
        q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=8
    ),
)


def by_definition(config: MistralConfig, w: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Attention of the first layer, a head and a query at a time, from the equations."""
    latent, yarn, growth = config.latent_attention, config.yarn, config.llama_4_scaling
    assert latent is not None
    assert yarn is not None
    assert growth is not None
    a = {key.removeprefix("blocks.0.attn."): leaf for key, leaf in w.items()}

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2) + config.norm_eps) * scale

    def turned(pairs: np.ndarray, position: int) -> np.ndarray:
        """Neighbouring lanes as a complex number."""
        R, found = len(pairs), []
        L = yarn.original_max_position_embeddings
        first, last = (
            R * math.log(L / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))
            for turns in (yarn.beta, yarn.alpha)
        )
        first, last = max(math.floor(first), 0), min(math.ceil(last), R - 1)
        for i in range(R // 2):
            slow = min(max((i - first) / ((last - first) or 1e-3), 0), 1)
            speed = config.rope_theta ** (-2 * i / R) * (1 - slow + slow / yarn.factor)
            z = (pairs[2 * i] + 1j * pairs[2 * i + 1]) * np.exp(1j * position * speed)
            found += [z.real, z.imag]
        return np.array(found)

    def split(t: int) -> tuple[np.ndarray, np.ndarray]:
        made = a["kv_a.kernel"] @ x[t]
        C = latent.kv_lora_rank
        return norm(made[:C], a["kv_norm.scale"]), turned(made[C:], t)

    made, n = [], latent.qk_nope_head_dim
    for t in range(len(x)):
        heads = []
        grown = 1 + growth.beta * math.log1p(t // growth.original_max_position_embeddings)
        for head in range(config.n_heads):
            q = a["q_b.kernel"][head] @ norm(a["q_a.kernel"] @ x[t], a["q_norm.scale"])
            q = grown * np.concatenate([q[:n], turned(q[n:], t)])
            up = a["kv_b.kernel"][head]
            seen = [split(s) for s in range(t + 1)]
            scores = np.array([q @ np.concatenate([up[:n] @ c, k]) for c, k in seen])
            p = np.exp(scores / math.sqrt(latent.head_dim))
            values = np.array([up[n:] @ c for c, _ in seen])
            heads.append(p / p.sum() @ values)
        made.append(np.einsum("DNU,NU->D", a["o.kernel"], np.array(heads)))
    return np.array(made)


def test_attention_is_its_equations(x64: None) -> None:
    weights = {name: leaf.astype(np.float64) for name, leaf in random_weights(TINY_LATENT).items()}
    attn = bind(TINY_LATENT, jax.tree.map(jnp.asarray, weights)).blocks[0].attn
    x = np.random.default_rng(1).standard_normal((1, 24, TINY_LATENT.dim))
    rotary = rotations(jnp.arange(24)[None], TINY_LATENT, jnp.float64)

    def mix(q: jax.Array, k: jax.Array, v: jax.Array, memory: None) -> tuple[jax.Array, None]:
        return training_attention(q, k, v, None), memory

    found = attn(jnp.asarray(x), rotary, mix, None)[0][0]
    np.testing.assert_allclose(found, by_definition(TINY_LATENT, weights, x[0]), atol=1e-12)


def read(model: Mistral, tokens: np.ndarray, pieces: list[int], pad: int = 0) -> np.ndarray:
    """Logits of rows that are read through the cache, each piece with padding behind it."""
    B, T = tokens.shape
    cache = empty_cache(model.config, B, max(pieces) + pad, T, model.norm.scale[...].dtype)
    found, start = [], 0
    for n in pieces:
        part = np.pad(tokens[:, start : start + n], ((0, 0), (0, pad)))
        places = np.r_[start : start + n, [EMPTY] * pad]
        hidden, cache = model.extend(
            jnp.asarray(part, jnp.int32), jnp.tile(jnp.asarray(places, jnp.int32), (B, 1)), cache
        )
        found.append(model.logits(hidden[:, :n]))
        start += n
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize(("pieces", "pad"), [([40], 0), ([16, 16, 8], 3), ([21, *[1] * 19], 0)])
def test_absorbed_over_the_cache_is_expanded_over_the_whole(
    pieces: list[int], pad: int, x64: None
) -> None:
    model = random_model(TINY_LATENT, jnp.float64)
    expected = model(jnp.asarray(TOKENS))
    np.testing.assert_allclose(read(model, TOKENS, pieces, pad), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("is_expanded", [False, True])
@pytest.mark.parametrize("block", [8, 40])
def test_a_ring_gives_the_same_in_blocks_and_expanded(
    is_expanded: bool, block: int, x64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(TINY_LATENT, jnp.float64)
    monkeypatch.setattr("lechat_jax.model.attention.slots_at_once", lambda S, T: block)
    monkeypatch.setattr("lechat_jax.model.latent.expands", lambda *sizes: is_expanded)
    jax.clear_caches()
    expected = model(jnp.asarray(TOKENS))
    np.testing.assert_allclose(read(model, TOKENS, [16, 16, 8]), expected, rtol=0, atol=1e-11)
    jax.clear_caches()


def test_values_may_be_wider_than_keys_and_the_square_of_yarn_is_a_variant(x64: None) -> None:
    for change in ({"v_head_dim": 20}, {"squared_yarn_scale": True}):
        widths = dataclasses.replace(WIDTHS, **change)
        model = random_model(dataclasses.replace(TINY_LATENT, latent_attention=widths), jnp.float64)
        found = read(model, TOKENS, [16, 16, 8])
        np.testing.assert_allclose(found, model(jnp.asarray(TOKENS)), rtol=0, atol=1e-11)


def test_the_cache_holds_a_latent_and_one_rotary_key_a_token() -> None:
    """320 numbers of a layer of Small 4, where its 32 heads would have 8,192."""
    config = preset("mistral-small-4-119b-2603").text
    one, two = (cache_bytes(config, 1, 64, context, jnp.bfloat16) for context in (2048, 4096))
    position = 4
    assert (two - one) / 2048 == 2 * 320 * 36 + position
    assert 2 * 320 * 36 == 23_040


def test_the_first_layers_are_dense_and_the_others_share_experts() -> None:
    names = [name for name in TINY_LATENT.weights if ".mlp." in name]
    words = [{module_of(n)[13:] for n in names if n.startswith(f"blocks.{i}")} for i in range(3)]
    mixed = {
        "router",
        *(f"{of}.{w}" for of in ("experts", "shared") for w in ("gate", "up", "down")),
    }
    assert words == [{"gate", "up", "down"}, mixed, mixed]
    assert TINY_LATENT.shape("FXJ") == (56, 18, 36)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"head_dim": 8}, r"qk_nope_head_dim \+ qk_rope_head_dim, here 14"),
        ({"n_kv_heads": 2}, r"n_kv_heads is n_heads, here 6; not 14 and 2"),
        ({"sliding_window": 8}, "latent attention has no sliding_window"),
        ({"n_dense_layers": 4}, r"n_dense_layers \(4\) must be at most n_layers \(3\)"),
        ({"n_shared_experts": -1}, "n_shared_experts must be 0 in a model without"),
        ({"n_experts": 0, "n_experts_per_token": 0}, "expert_hidden_dim must be 0 in a model"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        dataclasses.replace(TINY_LATENT, **change)
    with pytest.raises(BadInput, match="qk_rope_head_dim must be even"):
        LatentConfig(24, 20, 6, 7, 10)


def test_a_config_comes_back_from_json() -> None:
    assert MistralConfig.from_dict(TINY_LATENT.to_dict()) == TINY_LATENT


@pytest.mark.parametrize("form", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_what_is_quantised_is_the_model_of_its_numbers(form: Any) -> None:
    """Router and the map that is absorbed stay as they are."""
    scheme = scheme_for(form, EVEN)
    assert scheme
    weights = quantize_weights(random_weights(EVEN), scheme)
    weights = {name: np.asarray(leaf) for name, leaf in weights.items()}
    assert weights["blocks.1.attn.kv_b.kernel"].dtype == np.float32
    assert "blocks.1.mlp.shared.up.kernel.scale" in weights
    shapes = {name: leaf.shape for name, leaf in random_weights(EVEN).items()}
    numbers = {
        name: numbers_of(name, weights, shape) if scheme.format_of(name) else weights[name]
        for name, shape in shapes.items()
    }
    one, other = (
        logits_of(EVEN, jax.tree.map(jnp.asarray, of), TOKENS % 96) for of in (weights, numbers)
    )
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)


@pytest.mark.parametrize("mesh", ["tp=8", pytest.param("fsdp=2,tp=4", marks=pytest.mark.slow)])
def test_many_devices_generate_what_one_does(mesh: str) -> None:
    model = random_model(EVEN)
    prompts: list[list[int]] = [TOKENS[0, :n].tolist() for n in (20, 5, 9, 1)]
    found = []
    for where in (None, make_mesh(mesh)):
        made = Generator(model, chunk=4, context=64, mesh=where)
        found.append(made.generate(prompts, 8, Sampling(temperature=0), eos_ids=()))
    assert len(found[0]) == 4
    assert [one.ids for one in found[0]] == [one.ids for one in found[1]]


def test_many_devices_and_adapters_have_the_slope_of_one(x64: None) -> None:
    weights = {name: jnp.asarray(leaf, jnp.float64) for name, leaf in random_weights(EVEN).items()}
    adapters = Adapters(rank=2, alpha=4.0, targets=target_words(EVEN))
    assert adapters.targets == ("q_a", "q_b", "kv_a", "kv_b", "o", "gate", "up", "down")
    learning = {
        name: jax.random.normal(jax.random.key(i), leaf.shape)
        for i, (name, leaf) in enumerate(adapters.draw(EVEN, seed=0).items())
    }
    found = []
    for where in (None, make_mesh("fsdp=2,tp=4")):
        frozen = settled(where, weights | adapters.scales(EVEN))
        options = StepOptions(dtype="float64", mesh=where)
        rows = Rows(TOKENS % 96)
        found.append(
            jax.jit(gradient, static_argnums=(0, 1))(
                EVEN, options, settled(where, learning), frozen, rows
            )[1]
        )
    for name, wanted in found[0].items():
        assert np.abs(wanted).max() > 0, name
        atol = 1e-12 * np.abs(wanted).max()
        np.testing.assert_allclose(found[1][name], wanted, rtol=0, atol=atol)


def test_an_adapter_of_what_is_absorbed_is_the_merged_kernel(x64: None) -> None:
    model = random_model(TINY_LATENT, jnp.float64)
    adapters = Adapters(rank=2, alpha=4.0, targets=("blocks.1.attn.kv_b",))
    drawn = {
        name: jax.random.normal(jax.random.key(i), leaf.shape)
        for i, (name, leaf) in enumerate(adapters.draw(TINY_LATENT, seed=0).items())
    }
    beside = bind(TINY_LATENT, weights_of(model) | drawn | adapters.scales(TINY_LATENT))
    low, name = 2 * jnp.tensordot(*reversed([*drawn.values()]), axes=1), "blocks.1.attn.kv_b.kernel"
    merged = bind(TINY_LATENT, weights_of(model) | {name: weights_of(model)[name] + low})
    for pieces in ([40], [16, 16, 8]):
        found, wanted = (read(each, TOKENS, pieces) for each in (beside, merged))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-11)
    found, wanted = (each(jnp.asarray(TOKENS)) for each in (beside, merged))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-11)
