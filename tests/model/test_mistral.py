"""The model computes what the papers define, in the precision of its weights.

The oracle is written from the definitions, in float64 NumPy: arXiv:2310.06825 section 2,
RMSNorm (1910.07467), rotary embeddings (2104.09864) as complex numbers, SwiGLU (2002.05202),
YaRN (2309.00071) worked out by hand; `test_rope` has the ramps of transformers.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from lechat_jax.config import Llama4Scaling, MistralConfig, Yarn, preset
from lechat_jax.model.binding import bind, shapes_of, weights_of
from lechat_jax.model.cache import EMPTY, empty_cache
from lechat_jax.model.layers import MLP, RMSNorm
from lechat_jax.model.mistral import Mistral
from tests.support.jaxprs import equations

T = 33  # more than twice the window of the tiny model

# With a theta of 16 the four pairs turn by 1, 1/2, 1/4 and 1/8 a token, which makes 10.2, 5.1,
# 2.5 and 1.3 turns in 64 tokens. So beta is half a pair after the first, whose speed is kept, and
# alpha half a pair before the last, which is four times as slow; a third and two thirds of the
# way the speed falls by a third and two thirds of three quarters.
STRETCHED = Yarn(4.0, 64, beta=7.2, alpha=1.8, apply_scale=True)
STRETCHED_SPEEDS = np.array([1, 3 / 8, 1 / 8, 1 / 32])
BUDGET = 1e-11  # of the largest logit in float64; measured 1e-15


def oracle(config: MistralConfig, weights: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Logits [T, V] of one sequence [T]."""

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_eps) * scale

    def rotate(x: np.ndarray) -> np.ndarray:
        half = config.head_dim // 2
        turn = length * np.exp(1j * position * speeds(config))
        turned = (x[..., :half] + 1j * x[..., half:]) * turn[:, None]
        return np.concatenate([turned.real, turned.imag], axis=-1)

    yarn, growth = config.yarn, config.llama_4_scaling
    length = np.log(yarn.factor) / 10 + 1 if yarn and yarn.apply_scale else 1
    position = np.arange(len(tokens))[:, None]
    steps = position // growth.original_max_position_embeddings if growth else 0 * position
    grown = 1 + (growth.beta if growth else 0) * np.log(1 + steps)
    distance = position - position.T
    x = weights["embed.kernel"][tokens]
    for i, window in enumerate(config.windows):
        block = {n.split(".", 2)[2]: w for n, w in weights.items() if n.startswith(f"blocks.{i}.")}
        h = norm(x, block["attn_norm.scale"])
        q, k, v = (np.einsum("TD,NHD->TNH", h, block[f"attn.{n}.kernel"]) for n in "qkv")
        q, k = rotate(q) * grown[..., None], rotate(k)
        seen = (distance >= 0) & (distance < (window or len(tokens)))
        for n in range(config.n_heads):
            kv = n * config.n_kv_heads // config.n_heads
            scores = q[:, n] @ k[:, kv].T / math.sqrt(config.head_dim)
            share = np.where(seen, np.exp(scores), 0)
            mixed = share / share.sum(axis=1, keepdims=True) @ v[:, kv]
            x = x + mixed @ block["attn.o.kernel"][:, n].T
        h = norm(x, block["mlp_norm.scale"])
        gate, up = (h @ block[f"mlp.{n}.kernel"].T for n in ("gate", "up"))
        x = x + gate / (1 + np.exp(-gate)) * up @ block["mlp.down.kernel"].T
    head = weights["embed.kernel" if config.tied_embeddings else "head.kernel"]
    return norm(x, weights["norm.scale"]) @ head.T


def speeds(config: MistralConfig) -> np.ndarray:
    """Radians a token of each pair of lanes."""
    half = config.head_dim // 2
    speed = config.rope_theta ** (-np.arange(half) / half)
    yarn = config.yarn
    if yarn is None:
        return speed
    assert (config.head_dim, config.rope_theta, yarn) == (8, 16.0, STRETCHED)
    return STRETCHED_SPEEDS


def drawn(config: MistralConfig) -> dict[str, np.ndarray]:
    """Weights that hide nothing: uneven norms, sharp attention, logits of deviation 1."""
    rng = np.random.default_rng(0)
    weights = {}
    for name, like in shapes_of(config).items():
        if name.endswith("scale"):
            weights[name] = rng.uniform(0.5, 1.5, like.shape)
        else:
            fan_in = math.prod(like.shape[1:]) if ".o." in name else like.shape[-1]
            std = 1 if name.startswith("embed") and not config.tied_embeddings else fan_in**-0.5
            weights[name] = rng.normal(0, std, like.shape)
    return weights


def text(config: MistralConfig, B: int = 2) -> np.ndarray:
    return np.random.default_rng(1).integers(config.vocab_size, size=(B, T))


def as_arrays(weights: dict[str, np.ndarray], dtype: str) -> dict[str, jax.Array]:
    return {name: jnp.asarray(weight, dtype) for name, weight in weights.items()}


def assert_close(logits: Any, expected: np.ndarray) -> None:
    assert 0.5 < expected.std() < 2
    assert np.abs(np.asarray(logits) - expected).max() <= BUDGET * np.abs(expected).max()


VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "tied": {"tied_embeddings": True},
    "per-layer windows": {"sliding_window": (7, None, 3)},
    "full attention": {"sliding_window": None},
    "one kv head": {"n_kv_heads": 1, "rope_theta": 1e6, "norm_eps": 0.1},
    "no groups, odd heads": {"n_heads": 3, "n_kv_heads": 3, "head_dim": 14},
    "stretched and growing": {
        "rope_theta": 16.0,
        "yarn": STRETCHED,
        "llama_4_scaling": Llama4Scaling(0.3, 9),
    },
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_definitions(tiny: MistralConfig, variant: str) -> None:
    config = dataclasses.replace(tiny, **VARIANTS[variant])
    weights, tokens = drawn(config), text(config)
    logits = jax.jit(lambda w, t: bind(config, w)(t))(as_arrays(weights, "float64"), tokens)
    assert_close(logits, np.stack([oracle(config, weights, row) for row in tokens]))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("backend", ["dense", "banded"])
def test_the_kernel_makes_no_difference(tiny: MistralConfig, backend: Any) -> None:
    weights, tokens = drawn(tiny), text(tiny, B=1)
    logits = jax.jit(lambda w, t: bind(tiny, w)(t, backend))(as_arrays(weights, "float64"), tokens)
    assert_close(logits, oracle(tiny, weights, tokens[0])[None])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("windows", [7, (7, None, 3)])
@pytest.mark.parametrize("chunk", [1, 5, 40])
def test_a_text_fed_in_pieces_gives_the_same(tiny: MistralConfig, windows: Any, chunk: int) -> None:
    config = dataclasses.replace(tiny, sliding_window=windows)
    weights, tokens = drawn(config), text(config)
    positions = np.tile(np.arange(T, dtype=np.int32), (2, 1))
    positions[1] -= 4  # the second row is four tokens shorter, and padded in front
    positions = np.maximum(positions, EMPTY)
    cache = empty_cache(config, batch=2, chunk=chunk, context=T + chunk, dtype="float64")
    step = jax.jit(lambda w, *new: bind(config, w).extend(*new))
    pieces = []
    for start in range(0, T, chunk):
        piece = np.s_[:, start : start + chunk]
        hidden, cache = step(as_arrays(weights, "float64"), tokens[piece], positions[piece], cache)
        pieces.append(hidden)
    logits = bind(config, as_arrays(weights, "float64")).logits(jnp.concatenate(pieces, axis=1))
    assert_close(logits[0], oracle(config, weights, tokens[0]))
    assert_close(logits[1, 4:], oracle(config, weights, tokens[1, 4:]))


def forward_and_backward(config: MistralConfig, dtype: str) -> list[Any]:
    """The equations of logits, of the gradient of their spread, and of a cached step."""
    weights, tokens = as_arrays(drawn(config), dtype), jnp.asarray(text(config))
    cache = empty_cache(config, batch=2, chunk=T, context=T, dtype=dtype)

    def spread(weights: dict[str, jax.Array]) -> jax.Array:
        return jax.nn.logsumexp(bind(config, weights)(tokens), axis=-1).sum()

    def everything(weights: dict[str, jax.Array], cache: Any) -> Any:
        positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), tokens.shape)
        hidden, cache = bind(config, weights).extend(tokens, positions, cache)
        return jax.value_and_grad(spread)(weights), hidden, cache

    return list(equations(jax.make_jaxpr(everything)(weights, cache).jaxpr))


def floats(variables: Any) -> set[str]:
    """The floating types among the operands or results of an equation."""
    types = {str(v.aval.dtype) for v in variables if hasattr(v.aval, "dtype")}
    return {name for name in types if "float" in name}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("windows", [7, (7, None, 3)])
def test_a_float64_run_is_float64_throughout(tiny: MistralConfig, windows: Any) -> None:
    config = dataclasses.replace(tiny, sliding_window=windows)
    for equation in forward_and_backward(config, "float64"):
        assert floats([*equation.invars, *equation.outvars]) <= {"float64"}, equation


def test_bfloat16_weights_multiply_in_bfloat16_and_normalise_in_float32(
    tiny: MistralConfig,
) -> None:
    found = forward_and_backward(dataclasses.replace(tiny, n_layers=1), "bfloat16")
    wide = {"exp": 0, "rsqrt": 0, "cos": 0, "sin": 0, "log": 0}
    products = []
    for equation in found:
        name = equation.primitive.name
        if name in wide:
            wide[name] += 1
            assert floats(equation.invars) == {"float32"}, equation
        if name == "dot_general":
            products.append(floats(equation.invars))
    assert min(wide.values()) >= 1
    # Backward, gradients of float32 scores and logits meet bfloat16 weights.
    assert products.count({"bfloat16"}) >= 2 * 9 + 1
    assert {"float32"} not in products


def test_hidden_states_are_in_the_precision_of_the_weights_and_logits_wide(
    tiny: MistralConfig,
) -> None:
    def types(weights: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        model = bind(tiny, weights)
        return model.hidden(jnp.asarray(text(tiny))), model(jnp.asarray(text(tiny)))

    hidden, logits = jax.eval_shape(types, as_arrays(drawn(tiny), "bfloat16"))
    assert (hidden.dtype, hidden.shape) == (jnp.bfloat16, (2, T, 40))
    assert (logits.dtype, logits.shape) == (jnp.float32, (2, T, 97))


def test_the_shapes_are_those_of_a_fresh_model_in_the_precision_of_the_moment(
    tiny: MistralConfig,
) -> None:
    def fresh() -> dict[str, tuple]:
        made = weights_of(Mistral(tiny, rngs=nnx.Rngs(0)))
        return {name: (leaf.shape, leaf.dtype) for name, leaf in made.items()}

    for in_float64 in (False, True, False):
        with jax.enable_x64(in_float64):
            described = {name: (leaf.shape, leaf.dtype) for name, leaf in shapes_of(tiny).items()}
            assert described == fresh()


def test_the_default_model_has_the_weights_it_is_named_for() -> None:
    config = preset("lechat-15m")
    assert sum(like.size for like in shapes_of(config).values()) == config.n_params == 15_165_888


@given(
    dim=st.integers(1, 64),
    n_layers=st.integers(1, 3),
    n_kv_heads=st.integers(1, 4),
    group=st.integers(1, 4),
    head_dim=st.integers(1, 16).map(lambda half: 2 * half),
    hidden_dim=st.integers(1, 64),
    vocab_size=st.integers(1, 100),
    tied=st.booleans(),
)
@settings(max_examples=15)
def test_the_config_knows_how_many_weights_its_model_has(
    dim: int,
    n_layers: int,
    n_kv_heads: int,
    group: int,
    head_dim: int,
    hidden_dim: int,
    vocab_size: int,
    tied: bool,
) -> None:
    config = MistralConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_kv_heads * group,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        hidden_dim=hidden_dim,
        vocab_size=vocab_size,
        norm_eps=1e-5,
        rope_theta=1e4,
        sliding_window=4,
        tied_embeddings=tied,
    )
    assert sum(like.size for like in shapes_of(config).values()) == config.n_params


def test_a_fresh_model_guesses_evenly(tiny: MistralConfig) -> None:
    config = dataclasses.replace(tiny, n_layers=1)
    logits = jax.jit(lambda: Mistral(config, rngs=nnx.Rngs(0))(jnp.asarray(text(tiny))))()
    assert 0.7 < logits.std() < 1.4


def norm(scale: list[float], eps: float, dtype: str = "float32") -> RMSNorm:
    module = RMSNorm(len(scale), eps)
    module.scale[...] = jnp.asarray(scale, dtype)
    return module


def test_rms_norm_divides_by_the_root_mean_square() -> None:
    # The mean of 1 and 49 is 25; of 9 and 9, with an epsilon of 16 inside the root, too.
    np.testing.assert_allclose(norm([10, 100], 0.0)(jnp.array([1.0, 7.0])), [2, 140], rtol=1e-6)
    np.testing.assert_allclose(norm([1, 1], 16.0)(jnp.array([3.0, -3.0])), [0.6, -0.6], rtol=1e-6)


def test_rms_norm_rounds_before_it_scales() -> None:
    x = jnp.array([1, 1, 1, 255 / 256, 253 / 256], "bfloat16")
    # 1 / rms is 1.0031, which rounds to 1; times 255/128 first, it would round to 2.
    assert norm([255 / 128] * 5, 0.0, "bfloat16")(x)[0] == 255 / 128


def test_the_gradient_of_a_norms_scale_is_summed_in_float32() -> None:
    """Summed in bfloat16, it would be wrong by 1.3 % after so many positions."""
    rng = np.random.default_rng(0)
    x, out = (jnp.asarray(rng.standard_normal((4096, 64)), jnp.bfloat16) for _ in range(2))

    def loss(scale: jax.Array, dtype: Any) -> jax.Array:
        module = RMSNorm(64, 1e-5)
        module.scale.set_value(scale)
        return jnp.sum(module(x.astype(dtype)).astype(jnp.float32) * out.astype(jnp.float32))

    rough = jax.grad(loss)(jnp.ones(64, jnp.bfloat16), jnp.bfloat16).astype(jnp.float32)
    exact = jax.grad(loss)(jnp.ones(64), jnp.float32)
    assert jnp.linalg.norm(rough - exact) < 4e-3 * jnp.linalg.norm(exact)


def test_the_activation_is_rounded_once(tiny: MistralConfig) -> None:
    D = 256
    config = dataclasses.replace(tiny, dim=D, hidden_dim=D)
    module = MLP(config, config.hidden_dim, rngs=nnx.Rngs(0))
    for linear in (module.gate, module.up, module.down):
        linear.kernel.set_value(jnp.eye(D, dtype=jnp.bfloat16))
    x = jnp.linspace(-6, 6, D, dtype=jnp.bfloat16)[None, None]
    exact = np.asarray(x, np.float64)
    silu = jnp.asarray(exact / (1 + np.exp(-exact)), jnp.bfloat16)
    y, _ = module(x)
    np.testing.assert_array_equal(y, silu * x)


def test_only_the_distance_between_positions_matters(tiny: MistralConfig, x64: None) -> None:
    weights, tokens = as_arrays(drawn(tiny), "float64"), jnp.asarray(text(tiny))
    near, far = (
        jax.jit(lambda w, first=first: bind(tiny, w)(tokens, first_position=first))(weights)
        for first in (0, 10_000)
    )
    np.testing.assert_allclose(far, near, rtol=0, atol=1e-10)
    assert not np.array_equal(far, near)


def test_a_sequence_may_start_anywhere(tiny: MistralConfig, x64: None) -> None:
    """The same as through the cache, which is told every position."""
    weights, tokens = as_arrays(drawn(tiny), "float64"), jnp.asarray(text(tiny))[:, :9]
    positions = jnp.broadcast_to(jnp.arange(500, 509, dtype=jnp.int32), tokens.shape)
    cache = empty_cache(tiny, 2, 9, 9, "float64")
    hidden, _ = jax.jit(lambda w: bind(tiny, w).extend(tokens, positions, cache))(weights)
    expected = jax.jit(lambda w: bind(tiny, w).hidden(tokens, first_position=500))(weights)
    np.testing.assert_allclose(hidden, expected, rtol=0, atol=1e-13)
