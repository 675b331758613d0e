"""int4 is the nearest that the scale and the zero of a group allow; its product is exact."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lechat_jax.checkpoint.saved_model import SavedModel
from lechat_jax.checkpoint.weights import load_weights, save_weights, weight_shapes
from lechat_jax.config import MistralConfig, preset
from lechat_jax.config.layout import SCALE, ZERO
from lechat_jax.devices.platform import compiling_for
from lechat_jax.errors import BadInput
from lechat_jax.model.binding import weights_of
from lechat_jax.ops import matmul_int4, matmul_int4_gpu
from lechat_jax.ops.device_forms import for_device
from lechat_jax.ops.matmul_int4 import by_groups, project_int4
from lechat_jax.ops.matmul_int4_gpu import project_packed
from lechat_jax.quantize import int8
from lechat_jax.quantize.int4 import Packed, pack, packed, unpack, unpacked
from lechat_jax.quantize.scheme import (
    Form,
    form_of,
    numbers_of,
    pop_format,
    quantize_weights,
    scheme_for,
)
from tests.support.models import logits_of, random_model


def group(*weights: float) -> tuple[list[int], float, int]:
    made = packed("head.kernel", np.array([weights], np.float32), len(weights))
    return unpack(made.kernel)[0].tolist(), float(made.scale[0, 0]), int(made.zero[0, 0])


def test_sixteen_numbers_lie_between_the_extremes_and_nought_is_one_of_them() -> None:
    assert group(-8, 7, 0, 0.4) == ([0, 15, 8, 8], 1.0, 8)
    assert group(15, 3, 0, 14.6) == ([15, 3, 0, 15], 1.0, 0)
    assert group(-15, -3, 0, -0.6) == ([0, 12, 15, 14], 1.0, 15)
    assert group(0, 0, -0.0, 0) == ([0, 0, 0, 0], 1.0, 0)
    assert group(1e-38, -1e-38, 0, 0) == ([0, 0, 0, 0], 1.0, 0)


def test_the_largest_weight_is_fifteen_where_rounding_would_make_it_sixteen() -> None:
    """Of -3 to 3 a step is 0.4, nought is 7.5 of them, and both halves are rounded up to 8."""
    assert group(3, -3, 0, 2.8) == ([15, 0, 8, 15], pytest.approx(0.4), 8)
    assert group(-6, 6, 6, -5.6) == ([0, 15, 15, 1], pytest.approx(0.8), 8)


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=8, max_size=8))
def test_no_weight_is_off_by_more_than_a_scale(weights: list[float]) -> None:
    """By half, and by what the rounding of the zero moves the end of the range."""
    q, scale, zero = group(*weights)
    for n, weight in zip(q, weights, strict=True):
        assert abs((n - zero) * scale - weight) <= scale * 1.001 or abs(weight) < 1e-35


def test_pieces_make_no_difference_and_bytes_are_two_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = np.random.default_rng(0).standard_normal((40, 6, 8)).astype(np.float32)
    name = "blocks.0.attn.o.kernel"
    made = packed(name, drawn, 16)
    assert [part.shape for part in made[:3]] == [(40, 6, 4), (40, 3), (40, 3)]
    q = unpack(made.kernel.reshape(40, 24))
    assert (q[:, 0] + 16 * q[:, 1] == made.kernel[:, 0, 0]).all()
    np.testing.assert_array_equal(pack(q), made.kernel.reshape(40, 24))
    numbers = unpacked(made)
    assert np.abs(numbers.reshape(drawn.shape) - drawn).max() < made.scale.max()
    monkeypatch.setattr(int8, "PIECE", 100)
    for one, other in zip(packed(name, drawn, 16)[:3], made[:3], strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(unpacked(made), numbers)


def test_what_is_no_number_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match=r"^there is not finite, so it has no int4 form"):
        packed("head.kernel", np.array([[np.nan] + [0.0] * 7]), 8, "there")


def kernel_of(F: int, D: int, size: int) -> Packed:
    rng = np.random.default_rng(1)
    return packed("head.kernel", rng.standard_normal((F, D)), size)


@pytest.mark.parametrize("block", [1500, 1 << 20])  # of a few rows or one kernel
@pytest.mark.parametrize("T", [1, 2, 70])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cpu_multiplies_in_blocks(
    monkeypatch: pytest.MonkeyPatch, T: int, dtype: str, block: int
) -> None:
    monkeypatch.setattr(matmul_int4, "BLOCK", block)
    made = kernel_of(96, 56, 8)
    assert_is_the_product(dtype, T, made, lambda x: project_int4(x, *map(jnp.asarray, made[:3])))


@pytest.mark.parametrize("T", [1, 2, 70])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_ready", [True, False])
def test_a_tpu_multiplies_by_groups(T: int, dtype: str, is_ready: bool) -> None:
    made = kernel_of(96, 56, 8)
    weights = {f"head.kernel{part}": x for part, x in zip(("", SCALE, ZERO), made[:3], strict=True)}
    with compiling_for("tpu"):
        if is_ready:
            weights = for_device({name: jnp.asarray(x) for name, x in weights.items()})
            assert weights["head.kernel"].shape == (7, 96, 8)
            assert weights["head.kernel"].dtype == jnp.uint4
        parts = [jnp.asarray(x) for x in weights.values()]
        assert_is_the_product(dtype, T, made, lambda x: project_int4(x, *parts))


@pytest.mark.parametrize("T", [1, 17, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [32, 128])
def test_a_gpu_multiplies_from_bytes(T: int, dtype: str, size: int) -> None:
    made = kernel_of(96, 256, size)
    assert matmul_int4_gpu.fits(T, 256 // size, 256, 96)
    packed, scale, zero = map(jnp.asarray, made[:3])
    assert_is_the_product(
        dtype, T, made, lambda x: project_packed(x, packed, scale, zero, interpret=True)
    )


@pytest.mark.parametrize(
    ("T", "groups", "D", "F"),
    [(65, 2, 256, 96), (1, 2, 256, 100), (1, 16, 256, 96), (1, 2, 192, 96)],
    ids=["many positions", "no blocks of outputs", "small groups", "no power of two"],
)
def test_what_the_kernel_of_a_gpu_cannot_do_it_is_not_asked(
    T: int, groups: int, D: int, F: int
) -> None:
    assert not matmul_int4_gpu.fits(T, groups, D, F)


def test_only_a_tpu_has_kernels_by_groups_and_only_of_maps() -> None:
    shapes = {
        "embed.kernel": ((64, 32), "int8"),
        "embed.kernel.scale": ((64,), "float32"),
        "blocks.0.attn.o.kernel": ((32, 4, 4), "uint8"),
        "blocks.0.attn.o.kernel.scale": ((32, 4), "float32"),
        "blocks.0.attn.o.kernel.zero": ((32, 4), "uint8"),
        "blocks.0.mlp.experts.up.kernel": ((2, 24, 16), "uint8"),
        "blocks.0.mlp.experts.up.kernel.scale": ((2, 24, 4), "float32"),
        "blocks.0.mlp.experts.up.kernel.zero": ((2, 24, 4), "uint8"),
    }
    weights = {name: jax.ShapeDtypeStruct(*of) for name, of in shapes.items()}
    assert for_device({**weights}) == weights
    with compiling_for("tpu"):
        found = for_device({**weights})
    changed = {
        "blocks.0.attn.o.kernel": ((4, 32, 8), "uint4"),
        "blocks.0.attn.o.kernel.scale": ((4, 32), "float32"),
        "blocks.0.attn.o.kernel.zero": ((4, 32), "uint8"),
    }
    assert found == weights | {name: jax.ShapeDtypeStruct(*of) for name, of in changed.items()}


def assert_is_the_product(
    dtype: str, T: int, made: Packed, project: Callable[[jax.Array], jax.Array]
) -> None:
    exact = unpacked(made).astype(np.float64)
    x = jax.random.normal(jax.random.key(2), (T, exact.shape[1])).astype(dtype)
    exact = np.asarray(x, np.float64) @ exact.T
    budget = 1e-2 if dtype == "bfloat16" else 1e-6
    assert np.abs(np.asarray(project(x), np.float64) - exact).max() < budget * 4 * exact.std()


@pytest.mark.parametrize("by_group", [True, False])
def test_the_gradient_is_that_of_the_product(by_group: bool) -> None:
    made = kernel_of(24, 16, 8)
    x = jax.random.normal(jax.random.key(2), (5, 16))
    plain = jnp.asarray(unpacked(made))
    parts = [*map(jnp.asarray, made[:3])]
    if by_group:
        parts = [*by_groups(*parts)]
    ours = jax.grad(lambda x: jnp.sum(jnp.sin(project_int4(x, *parts))))(x)
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(x @ plain.T)))(x)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_loop_does_not_make_the_kernel_beforehand() -> None:
    kernels = [
        (
            jax.ShapeDtypeStruct((1024, 1024), "uint8"),
            jax.ShapeDtypeStruct((1024, 16), "float32"),
            jax.ShapeDtypeStruct((1024, 16), "uint8"),
        )
    ] * 8

    def loop(x: jax.Array, kernels: list[tuple[jax.Array, ...]], n: int) -> jax.Array:
        def once(_: int, x: jax.Array) -> jax.Array:
            for kernel in kernels:
                x = jnp.sin(jnp.tile(project_int4(x, *kernel), 2))
            return x

        return jax.lax.fori_loop(0, n, once, x)

    x = jax.ShapeDtypeStruct((1, 2048), "float32")
    memory = jax.jit(loop).lower(x, kernels, 9).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2 * 4 * 1024 * 2048  # of 8 kernels


@pytest.fixture(scope="module")
def small(tiny: MistralConfig) -> MistralConfig:
    return MistralConfig.from_dict(tiny.to_dict() | {"n_layers": 1})


def test_a_model_in_int4_is_saved_loaded_and_computes_what_its_numbers_do(
    small: MistralConfig, tmp_path: Path
) -> None:
    form = Form("int4", 8)
    assert scheme_for("int4", small) == form
    made = quantize_weights(weights_of(random_model(small)), form)
    assert form_of(made) == form
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in made.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in weight_shapes(small, form).items()
    }
    save_weights(tmp_path / "int4", small, made, None)
    trained = SavedModel.open(tmp_path / "int4")
    assert trained.quantization == form
    assert trained.weights_bytes("float32") == sum(leaf.nbytes for leaf in made.values())
    _, loaded = load_weights(tmp_path / "int4", dtype="bfloat16", quantize="int8")
    for name, leaf in made.items():
        dtype = jnp.bfloat16 if name.endswith("norm.scale") else leaf.dtype
        np.testing.assert_array_equal(loaded[name], leaf.astype(dtype), strict=True)
    plain = weights_of(random_model(small))
    save_weights(tmp_path / "plain", small, plain, None)
    _, again = load_weights(tmp_path / "plain", quantize="int4")
    for name, leaf in made.items():
        np.testing.assert_array_equal(again[name], leaf, strict=True)
    arrays = {name: np.asarray(leaf) for name, leaf in made.items()}
    meant = {
        name: jnp.asarray(numbers_of(name, arrays, leaf.shape)) if form.format_of(name) else leaf
        for name, leaf in plain.items()
    }
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 97)
    found, expected = logits_of(small, made, tokens), logits_of(small, meant, tokens)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert float(jnp.abs(expected - logits_of(small, plain, tokens)).max()) > 0.03


def test_groups_divide_the_widths_or_int4_is_refused(small: MistralConfig) -> None:
    found = scheme_for("int4", preset("mistral-7b-v0.1"))
    assert found == Form("int4", 128)
    # Attention's output reads three heads of eight, the other maps 64 and 128.
    narrow = {"dim": 64, "hidden_dim": 128, "n_heads": 3, "n_kv_heads": 1, "head_dim": 8}
    form = scheme_for("int4", MistralConfig.from_dict(small.to_dict() | narrow))
    assert form == Form("int4", 8)
    odd = MistralConfig.from_dict(small.to_dict() | {"hidden_dim": 44})
    with pytest.raises(BadInput, match=r"int4 has groups of 8 .* of this model, 40, 44, 48;"):
        scheme_for("int4", odd)


@pytest.mark.parametrize(
    "form",
    [
        Form("int8"),
        Form("int8", has_int8_embeddings=False),
        Form("int4", 64),
        Form("int4", 128, is_ordered=True, has_int8_embeddings=False),
    ],
)
def test_a_form_is_said_in_words_and_read_again(form: Form) -> None:
    fields = {"quantization": form.to_dict()}
    assert pop_format(fields, Path("config.json")) == form
    assert not fields
