"""int8 is the nearest that a scale per output channel allows, or nothing is made at all."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lechat_jax.checkpoint.run import Run
from lechat_jax.checkpoint.saved_model import SavedModel
from lechat_jax.checkpoint.training_state import Checkpoints
from lechat_jax.checkpoint.weights import save_weights, weight_shapes
from lechat_jax.cli.display import Display
from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.model.binding import weights_of
from lechat_jax.quantize import int8 as module
from lechat_jax.quantize.scheme import INT8, check_format, dequantize, quantize_weights, quantized
from lechat_jax.tokenizer.tokenizer import Tokenizer
from lechat_jax.train.command import set_up
from lechat_jax.train.options import TrainConfig
from lechat_jax.train.start import run_of
from tests.support.models import logits_of, random_model

DTYPES = ["float32", "float64", "float16", ml_dtypes.bfloat16]


def channel(*weights: float) -> tuple[list[int], float]:
    q, scale = quantized("head.kernel", np.array([weights], np.float32))
    return q[0].tolist(), float(scale[0])


def test_the_largest_weight_of_a_channel_is_127_scales() -> None:
    assert channel(1.27, -0.5, 0.004, 0.006) == ([127, -50, 0, 1], pytest.approx(0.01))
    assert channel(-1.27, 0.5) == ([-127, 50], pytest.approx(0.01))


def test_halves_are_rounded_to_even() -> None:
    assert channel(127, 0.5, 1.5, 2.5, -0.5, -1.5) == ([127, 0, 2, 2, 0, -2], 1.0)


def test_a_channel_of_zeros_has_the_scale_one() -> None:
    assert channel(0, 0, -0.0) == ([0, 0, 0], 1.0)


def test_a_channel_too_small_for_a_scale_becomes_zero() -> None:
    """XLA flushes numbers below 1.2e-38; dividing by a scale that is flushed gives no number."""
    assert channel(1e-36, -1e-40) == ([0, 0], 1.0)
    (q, _), scale = channel(2e-36, -1e-36)
    assert (q, float(jnp.float32(scale) * 127)) == (127, pytest.approx(2e-36))


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=9))
def test_no_weight_is_off_by_more_than_half_a_scale(weights: list[float]) -> None:
    q, scale = channel(*weights)
    assert all(-127 <= n <= 127 for n in q)
    for n, weight in zip(q, weights, strict=True):
        assert abs(n * scale - weight) <= scale * (0.5 + 1e-5) or abs(weight) < 1e-35


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_float_is_read_and_pieces_make_no_difference(
    dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = np.random.default_rng(0).standard_normal((40, 6, 8)).astype(dtype)
    q, scale = quantized("blocks.0.attn.o.kernel", drawn)
    wide = drawn.astype(np.float32)
    np.testing.assert_array_equal(scale, np.abs(wide).max(axis=(1, 2)) / np.float32(127))
    np.testing.assert_array_equal(q, np.rint(wide / scale[:, None, None]).astype(np.int8))
    monkeypatch.setattr(module, "PIECE", 100)
    again = quantized("blocks.0.attn.o.kernel", drawn)
    np.testing.assert_array_equal(again.kernel, q)
    np.testing.assert_array_equal(again.scale, scale)
    for target in (np.float32, ml_dtypes.bfloat16):
        back = dequantize(q, scale, target)
        expected = (q * scale[:, None, None]).astype(target)
        np.testing.assert_array_equal(back, expected, strict=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused_by_name(bad: float) -> None:
    weights = {"norm.scale": jnp.ones(3), "head.kernel": jnp.ones((4, 3)).at[2, 1].set(bad)}
    with pytest.raises(BadInput, match=r"^head\.kernel is not finite, so it has no int8 form"):
        quantize_weights(weights)


def test_a_double_beyond_float32_is_no_number() -> None:
    with pytest.raises(BadInput, match=r"head\.kernel is not finite"):
        quantized("head.kernel", np.array([[1e300, 1]]))


@pytest.mark.parametrize("tied", [False, True])
def test_all_kernels_and_no_norm_become_int8(tiny: MistralConfig, tied: bool) -> None:
    config = MistralConfig.from_dict(tiny.to_dict() | {"tied_embeddings": tied, "n_layers": 1})
    weights = weights_of(random_model(config))
    found = quantize_weights(dict(weights))
    shapes = {name: (leaf.shape, str(leaf.dtype)) for name, leaf in found.items()}
    assert shapes == {
        "blocks.0.attn.k.kernel": ((2, 8, 40), "int8"),
        "blocks.0.attn.k.kernel.scale": ((2, 8), "float32"),
        "blocks.0.attn.o.kernel": ((40, 6, 8), "int8"),
        "blocks.0.attn.o.kernel.scale": ((40,), "float32"),
        "blocks.0.attn.q.kernel": ((6, 8, 40), "int8"),
        "blocks.0.attn.q.kernel.scale": ((6, 8), "float32"),
        "blocks.0.attn.v.kernel": ((2, 8, 40), "int8"),
        "blocks.0.attn.v.kernel.scale": ((2, 8), "float32"),
        "blocks.0.attn_norm.scale": ((40,), "float32"),
        "blocks.0.mlp.down.kernel": ((40, 56), "int8"),
        "blocks.0.mlp.down.kernel.scale": ((40,), "float32"),
        "blocks.0.mlp.gate.kernel": ((56, 40), "int8"),
        "blocks.0.mlp.gate.kernel.scale": ((56,), "float32"),
        "blocks.0.mlp.up.kernel": ((56, 40), "int8"),
        "blocks.0.mlp.up.kernel.scale": ((56,), "float32"),
        "blocks.0.mlp_norm.scale": ((40,), "float32"),
        "embed.kernel": ((97, 40), "int8"),
        "embed.kernel.scale": ((97,), "float32"),
        "norm.scale": ((40,), "float32"),
    } | (
        {} if tied else {"head.kernel": ((97, 40), "int8"), "head.kernel.scale": ((97,), "float32")}
    )
    expected = weight_shapes(config, INT8)
    assert list(expected) == list(found)
    assert {name: (leaf.shape, str(leaf.dtype)) for name, leaf in expected.items()} == shapes
    assert found["norm.scale"] is weights["norm.scale"]


def test_the_dict_is_emptied_so_that_two_models_are_never_in_memory() -> None:
    weights = {
        "a.kernel": jnp.ones((3, 4)),
        "b.kernel": jnp.ones((3, 4)),
        "norm.scale": jnp.ones(4),
    }
    alive = {name: leaf.unsafe_buffer_pointer() for name, leaf in weights.items()}
    assert len(alive) == 3
    quantize_weights(weights)
    assert weights == {}


def test_a_model_computes_with_int8_what_it_would_with_the_weights_int8_stands_for(
    tiny: MistralConfig,
) -> None:
    model = random_model(tiny)
    in_int8 = quantize_weights(weights_of(model))
    back = {
        name: jnp.asarray(dequantize(np.asarray(leaf), np.asarray(in_int8[f"{name}.scale"])))
        if name.endswith("kernel")
        else leaf
        for name, leaf in in_int8.items()
        if not name.endswith("kernel.scale")
    }
    tokens = jax.random.randint(jax.random.key(0), (2, 33), 0, 97)
    found, expected = logits_of(tiny, in_int8, tokens), logits_of(tiny, back, tokens)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    distance = float(
        jnp.abs(expected - logits_of(tiny, weights_of(random_model(tiny)), tokens)).max()
    )
    assert 1e-3 < distance < 0.3, "int8 is near the weights, but not the weights"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: MistralConfig) -> Run:
    """A run that has stopped after its first step."""
    run = Run.create(tmp_path_factory.mktemp("runs") / "run")
    run.config = {"model": tiny.to_dict(), "train": {}}
    Checkpoints(run.checkpoints).save(1, {"model": weights_of(random_model(tiny))}, {})
    return run


def test_a_run_is_quantised_when_it_is_loaded(run: Run, tiny: MistralConfig) -> None:
    trained = SavedModel.open(run.folder)
    assert trained.quantization is None
    loaded = trained.load("bfloat16", "int8").weights
    expected = quantize_weights(weights_of(random_model(tiny)))
    assert set(loaded) == set(expected)
    for name, leaf in expected.items():
        dtype = jnp.bfloat16 if name.endswith("norm.scale") else leaf.dtype
        np.testing.assert_array_equal(loaded[name], leaf.astype(dtype), strict=True)
    # float32 is in memory before it is quantised
    assert trained.weights_bytes("bfloat16", "int8") == 4 * tiny.n_params
    with pytest.raises(BadInput, match="quantised to int8 or int4 here, not to int3"):
        check_format("int3")


def test_training_does_not_start_from_int8(tmp_path: Path, tiny: MistralConfig) -> None:
    in_int8 = quantize_weights(weights_of(random_model(tiny)))
    save_weights(tmp_path / "int8", tiny, in_int8, Tokenizer.mistral_v1().path)
    options = TrainConfig(init_from=tmp_path / "int8", out=tmp_path / "run", steps=1)
    with (
        Display(None) as display,
        pytest.raises(BadInput, match=r"--init-from needs floating-point .*int8 are int8; start"),
    ):
        set_up(run_of(options), options, 0.0, display)
    assert not (tmp_path / "run").exists()
