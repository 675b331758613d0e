"""Adapters: a product of low rank beside a kernel that stays, whatever type that is in."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import is_kernel
from lechat_jax.data.rows import Rows
from lechat_jax.errors import BadInput
from lechat_jax.generate.generator import Generator
from lechat_jax.generate.sampling import Sampling
from lechat_jax.model.adapters import Adapters
from lechat_jax.model.binding import Weights, bind, weights_of
from lechat_jax.model.scoring import total_nats
from lechat_jax.quantize.scheme import dequantize, quantize_weights
from lechat_jax.train.optimizer import usual_rule
from lechat_jax.train.step import StepOptions, state_of, train_steps
from tests.support.models import random_model

ADAPTERS = Adapters(
    rank=3, alpha=5.0, ranks={"blocks.1.attn.q": 2}, alphas={"blocks.0.mlp.down": 7.0}
)
OPTIONS = StepOptions(chunk=20, rule=usual_rule("adamw", "adapters"), learning_rate=20.0)
TOKENS = np.random.default_rng(0).integers(97, size=(4, 3, 17), dtype=np.int32)


@pytest.fixture(scope="module")
def small(tiny: MistralConfig) -> MistralConfig:
    return dataclasses.replace(tiny, n_layers=2)


@functools.cache
def base(config: MistralConfig) -> Weights:
    return weights_of(random_model(config))


@functools.cache
def int8_base(config: MistralConfig) -> Weights:
    return quantize_weights(dict(base(config)))


@functools.cache
def trained(config: MistralConfig) -> Weights:
    """Adapters that do about as much as the kernels."""
    rng = np.random.default_rng(1)
    return {
        name: jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32)
        for name, shape in ADAPTERS.shapes(config).items()
    }


def with_adapters(config: MistralConfig, weights: Weights) -> Weights:
    return weights | trained(config) | ADAPTERS.scales(config)


def kernels_with(config: MistralConfig, weights: Weights) -> Weights:
    """The same function without adapters: W + alpha / r * B A, written out."""
    changed = dict(weights)
    for name in {name.rsplit(".lora", 1)[0] for name in trained(config)}:
        a, b = (np.asarray(trained(config)[f"{name}.lora.{x}"], np.float64) for x in "ab")
        rank, alpha = len(a), 7.0 if name == "blocks.0.mlp.down" else 5.0
        assert rank == (2 if name == "blocks.1.attn.q" else 3)
        product = np.tensordot(b, a, axes=(-1, 0)) * alpha / rank
        changed[f"{name}.kernel"] = jnp.asarray(weights[f"{name}.kernel"] + product, jnp.float32)
    return changed


def dequantized(config: MistralConfig) -> Weights:
    weights = int8_base(config)
    return {
        name: jnp.asarray(dequantize(np.asarray(leaf), np.asarray(weights[f"{name}.scale"])))
        if is_kernel(name)
        else leaf
        for name, leaf in weights.items()
        if not name.endswith("kernel.scale")
    }


@functools.partial(jax.jit, static_argnums=0)
def logits(config: MistralConfig, weights: Weights, tokens: Any) -> jax.Array:
    return bind(config, weights)(tokens)


@functools.partial(jax.jit, static_argnums=0)
def slope(config: MistralConfig, learning: Weights, frozen: Weights) -> Weights:
    def loss(learning: Weights) -> jax.Array:
        inputs, targets = jnp.asarray(TOKENS[0, :, :-1]), jnp.asarray(TOKENS[0, :, 1:])
        share = jnp.full((3, 16), 1 / 48)
        return total_nats(config, OPTIONS, frozen | learning, inputs, targets, share)

    return jax.grad(loss)(learning)


def close(found: Any, expected: Any, tolerance: float) -> None:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


# --- the function ---


def test_an_adapter_adds_its_product_to_the_kernel(small: MistralConfig) -> None:
    found = logits(small, with_adapters(small, base(small)), TOKENS[0])
    close(found, logits(small, kernels_with(small, base(small)), TOKENS[0]), 1e-5)


def unscaled(weights: Weights) -> Weights:
    return {n: jnp.ones(()) if n.endswith("lora.scale") else x for n, x in weights.items()}


def undivided(weights: Weights) -> Weights:
    ranks = {n: len(weights[n.replace("scale", "a")]) for n in weights if n.endswith("lora.scale")}
    return {n: x * ranks.get(n, 1) for n, x in weights.items()}


def swapped(weights: Weights) -> Weights:
    """A of keys, which has the shape of that of values."""
    k, v = (f"blocks.0.attn.{word}.lora.a" for word in "kv")
    return weights | {k: weights[v], v: weights[k]}


def in_mistrals_order(weights: Weights) -> Weights:
    name = "blocks.0.attn.q.lora.b"
    N, H, rank = weights[name].shape
    rows = weights[name].reshape(N, 2, H // 2, rank).swapaxes(1, 2)
    return weights | {name: rows.reshape(N, H, rank)}


@pytest.mark.parametrize("fault", [unscaled, undivided, swapped, in_mistrals_order])
def test_a_planted_fault_shows(small: MistralConfig, fault: Any) -> None:
    found = logits(small, fault(with_adapters(small, base(small))), TOKENS[0])
    with pytest.raises(AssertionError):
        close(found, logits(small, kernels_with(small, base(small)), TOKENS[0]), 1e-2)


def test_merging_gives_the_same_kernels(small: MistralConfig) -> None:
    convert = pytest.importorskip("parity.convert.merge_adapters")
    expected = kernels_with(small, base(small))
    for name, part in ADAPTERS.parts(small).items():
        a, b = (np.asarray(trained(small)[f"{name}.lora.{x}"]) for x in "ab")
        kernel = np.asarray(base(small)[f"{name}.kernel"])
        found = convert.merged(kernel, convert.Product(a, b, part.scale))
        close(found, expected[f"{name}.kernel"], 1e-6)


def test_a_fresh_adapter_changes_no_bit(small: MistralConfig) -> None:
    fresh = base(small) | ADAPTERS.draw(small, seed=0) | ADAPTERS.scales(small)
    found, expected = (logits(small, weights, TOKENS[0]) for weights in (fresh, base(small)))
    assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()


# --- learning ---


def test_the_gradient_follows_from_that_of_the_kernel(small: MistralConfig) -> None:
    """It is s B'dW for A and s dW A' for B, with dW from the model without adapters."""
    whole = kernels_with(small, base(small))
    names = [f"{name}.kernel" for name in ADAPTERS.parts(small)]
    of_kernels = slope(small, {name: whole[name] for name in names}, whole)
    found = slope(small, trained(small), base(small) | ADAPTERS.scales(small))
    for name, part in ADAPTERS.parts(small).items():
        a, b = (np.asarray(trained(small)[f"{name}.lora.{x}"]) for x in "ab")
        flat_a, flat_b = a.reshape(len(a), -1), b.reshape(-1, len(a))
        dw = np.asarray(of_kernels[f"{name}.kernel"]).reshape(len(flat_b), -1)
        close(found[f"{name}.lora.a"].reshape(flat_a.shape), part.scale * flat_b.T @ dw, 1e-4)
        close(found[f"{name}.lora.b"].reshape(flat_b.shape), part.scale * dw @ flat_a.T, 1e-4)


def test_an_int8_base_passes_on_the_gradient_of_what_it_stands_for(small: MistralConfig) -> None:
    scales = ADAPTERS.scales(small)
    found = slope(small, trained(small), int8_base(small) | scales)
    expected = slope(small, trained(small), dequantized(small) | scales)
    for name, leaf in expected.items():
        close(found[name], leaf, 2e-5)


@pytest.mark.parametrize("of", [base, int8_base])
def test_only_the_adapters_learn(small: MistralConfig, of: Any) -> None:
    frozen = of(small) | ADAPTERS.scales(small)
    before = {name: np.asarray(leaf).tobytes() for name, leaf in frozen.items()}
    drawn = ADAPTERS.draw(small, seed=0)
    state = state_of(dict(drawn), OPTIONS)
    kept = {name: np.asarray(leaf) for name, leaf in drawn.items()}
    losses = []
    for _ in range(5):
        state, some = train_steps(
            small, OPTIONS, state, frozen, Rows(TOKENS), jnp.int32(4), jnp.int32(100)
        )
        losses += np.asarray(some).tolist()
    assert losses[-1] < losses[0] - 0.3
    assert {name: np.asarray(leaf).tobytes() for name, leaf in frozen.items()} == before
    assert state.weights.keys() == kept.keys()
    for name, leaf in state.weights.items():
        assert (np.asarray(leaf) != kept[name]).any(), name


# --- generating ---


def test_text_is_generated_as_by_the_merged_model(small: MistralConfig) -> None:
    """The base is int8 here; in a run of adapters it is what it was (test_adapters.py)."""
    whole = kernels_with(small, dequantized(small))
    prompts: list[list[int]] = [TOKENS[0, 0].tolist(), [1, 2]]
    greedy = Sampling(temperature=0)
    found, expected = (
        Generator(bind(small, weights), context=64).generate(prompts, 20, greedy)
        for weights in (with_adapters(small, int8_base(small)), whole)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.ids == theirs.ids
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-4)


# --- which maps ---


def test_targets_are_maps_of_every_layer_or_single_ones(small: MistralConfig) -> None:
    parts = Adapters(2, 2.0, targets=("v", "blocks.1.mlp.up")).parts(small)
    assert list(parts) == ["blocks.0.attn.v", "blocks.1.attn.v", "blocks.1.mlp.up"]
    assert (parts["blocks.0.attn.v"].writes, parts["blocks.0.attn.v"].reads) == ((2, 8), (40,))


def test_rank_stabilised_adapters_are_divided_by_the_root(small: MistralConfig) -> None:
    first, second = "blocks.0.attn.o", "blocks.1.attn.o"
    adapters = Adapters(4, 6.0, ("o",), ranks={second: 9}, alphas={second: 12.0}, rslora=True)
    scales = {name: part.scale for name, part in adapters.parts(small).items()}
    assert scales == {first: 6 / 2, second: 12 / 3}
    divided = dataclasses.replace(adapters, rslora=False).parts(small)
    assert {name: part.scale for name, part in divided.items()} == {first: 6 / 4, second: 12 / 9}


def test_a_fresh_a_is_uniform_within_the_root_of_its_inputs_and_b_is_zero(
    small: MistralConfig,
) -> None:
    """Inputs are all axes that a map reads: of attention's output heads times their width."""
    inputs = {"q": 40, "k": 40, "v": 40, "o": 6 * 8, "gate": 40, "up": 40, "down": 56}
    drawn = Adapters(rank=16, alpha=16.0).draw(small, seed=0)
    for name, leaf in drawn.items():
        word, _, half = name.split(".")[-3:]
        if half == "b":
            assert not leaf.any()
            continue
        bound = inputs[word] ** -0.5
        assert 0.98 * bound < np.abs(leaf).max() <= bound, name
        assert abs(float(leaf.mean())) < 0.1 * bound, name
        assert float(leaf.std()) == pytest.approx(bound / 3**0.5, rel=0.1), name
    assert len({leaf.tobytes() for leaf in map(np.asarray, drawn.values()) if leaf.any()}) == 14
    other = Adapters(rank=16, alpha=16.0).draw(small, seed=1)["blocks.0.attn.q.lora.a"]
    assert not np.array_equal(other, drawn["blocks.0.attn.q.lora.a"])


@pytest.mark.parametrize("rslora", [False, True])
def test_what_describes_them_can_be_stored(rslora: bool) -> None:
    adapters = dataclasses.replace(ADAPTERS, targets=("q", "blocks.1.mlp.up"), rslora=rslora)
    assert Adapters.from_dict(json.loads(json.dumps(adapters.to_dict()))) == adapters


def test_what_cannot_be_adapted_is_refused(small: MistralConfig) -> None:
    with pytest.raises(BadInput, match=r"head, qq cannot have an adapter.* q, k, v, o, gate"):
        Adapters(2, 2.0, targets=("q", "head", "qq")).parts(small)
    with pytest.raises(BadInput, match="rank of an adapter must be at least 1, not 0"):
        Adapters(2, 2.0, ranks={"blocks.0.attn.q": 0})
    for alpha in (float("nan"), float("inf"), 0.0, -1.0):
        with pytest.raises(
            BadInput, match=f"alpha of an adapter must be a number above 0, not {alpha}"
        ):
            Adapters(2, alpha)
        with pytest.raises(BadInput, match="alpha of an adapter must be a number above 0"):
            Adapters(2, 2.0, alphas={"blocks.0.attn.q": alpha})
    with pytest.raises(BadInput, match="rank of an adapter must be at least 1, not -1"):
        Adapters(-1, 2.0)
