"""Training, scoring and decoding can be lowered for TPUs and NVIDIA GPUs without having one.

Lowering ends before XLA's own compiler: it shows that every operation exists on the
platform and that the attention kernel meant for it is in the program.
"""

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax._src.cudnn import fused_attention_stablehlo

from lechat_jax.config import MistralConfig, preset
from lechat_jax.data.rows import Images, Rows
from lechat_jax.devices.mesh import described, make_mesh
from lechat_jax.generate.decode import DecodeState, Request, decode, prefill
from lechat_jax.generate.sampling import Sampling
from lechat_jax.generate.vision import image_features
from lechat_jax.model.cache import empty_cache
from lechat_jax.model.scoring import score
from lechat_jax.ops import attention_backend
from lechat_jax.quantize.scheme import INT8, Form
from lechat_jax.train.step import StepOptions, init_state, train_steps
from tests.support.images import SEES, TOWER

# The default model's shapes, fewer layers.
CONFIG = dataclasses.replace(preset("lechat-15m"), n_layers=2)
MIXTURE = dataclasses.replace(CONFIG, n_experts=4, n_experts_per_token=2)
B, T, W = 8, 256, CONFIG.sliding_window

TRITON = "__gpu$xla.gpu.triton"  # a Pallas kernel
CUDNN = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")

# A hot function with its static arguments bound, and what its arrays look like.
Call = tuple[Callable[..., Any], tuple[Any, ...]]


def shape(*dims: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def weights(
    dtype: str, form: Form | None = None, config: MistralConfig = CONFIG
) -> dict[str, jax.ShapeDtypeStruct]:
    """What the model has, with its kernels in the parts of that form."""
    state = jax.eval_shape(lambda: init_state(config, StepOptions(), seed=0))
    found = {}
    for name, leaf in state.weights.items():
        parts = form.parts(name, leaf.shape) if form else {}
        found |= {part: shape(*dims, dtype=kind.name) for part, (kind, dims) in parts.items()}
        if not parts:
            found[name] = shape(*leaf.shape, dtype=dtype)
    return found


ROWS = Rows(shape(4, B, T + 1))


def training(options: StepOptions, config: MistralConfig = CONFIG) -> Call:
    alone = dataclasses.replace(options, mesh=None)
    state = jax.eval_shape(lambda: init_state(config, alone, seed=0))
    state = described(options.mesh, state)
    return partial(train_steps, config, options), (state, {}, ROWS, shape(), shape())


def scoring(options: StepOptions) -> Call:
    rows, counted = shape(B, T), shape(B, T, dtype="bool")
    return partial(score, CONFIG, options), (weights("float32"), rows, rows, counted)


def prefilling(dtype: str, form: Form | None = None) -> Call:
    cache = empty_cache(CONFIG, B, chunk=64, context=T, dtype=dtype)
    row, tokens = shape(), shape(1, 64)
    return partial(prefill, CONFIG), (weights(dtype, form), cache, row, tokens, tokens)


def decoding(dtype: str, form: Form | None = None, config: MistralConfig = CONFIG) -> Call:
    cache = empty_cache(config, B, chunk=64, context=T, dtype=dtype)
    rows = jnp.zeros(B, jnp.int32)
    state = DecodeState(cache, token=rows, position=rows, left=rows, seen=rows[:, None])
    sampling = Sampling(temperature=0.8, top_k=50, top_p=0.9, min_p=0.05)
    ends = jnp.zeros((B, config.vocab_size), bool)
    request = Request(sampling.controls(B), sampling.streams(B), ends)
    return partial(decode, config), (weights(dtype, form, config), state, request, shape())


def lowered(platform: str, call: Call) -> str:
    """The program in StableHLO, traced as on that platform, where other branches are taken.

    Exported as a function of plain arrays: lowering a function of dataclasses, JAX builds
    them around descriptions of arrays, which their annotations do not admit.
    """
    hot, arguments = call
    leaves, tree = jax.tree.flatten(arguments)

    def flat(*leaves: Any) -> list[jax.Array]:
        return jax.tree.leaves(hot(*jax.tree.unflatten(tree, leaves)))

    allowed = [export.DisabledSafetyCheck.custom_call(name) for name in (*CUDNN, TRITON)]
    jax.clear_caches()  # of what was traced for another platform
    backend = {"cuda": "gpu"}.get(platform, platform)
    with mock.patch.object(jax, "default_backend", return_value=backend):
        exported = export.export(jax.jit(flat), platforms=[platform], disabled_checks=allowed)
        return exported(*leaves).mlir_module()


def grouped_products(program: str) -> int:
    """How often rows, which lie in groups, are multiplied with a kernel for each group."""
    return len(re.findall(r'"chlo\.ragged_dot"[ (]', program))


def kernels(program: str) -> set[str]:
    """The hand-written kernels that a program calls, beside what XLA makes itself."""
    called = set(re.findall(r"custom_call @([\w$.]+)", program))
    return {name for name in called if name == "tpu_custom_call" or "cudnn" in name}


@pytest.fixture
def cudnn_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX asks the installed cuDNN for its version before it lowers; here it is told one."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_300)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_training_step_for_tpu_runs_splash_attention(dtype: Any) -> None:
    options = StepOptions(dtype=dtype, backend="splash")
    program = lowered("tpu", training(options))
    assert kernels(program) == {"tpu_custom_call"}
    for kernel in ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"):
        assert kernel in program


@pytest.mark.usefixtures("cudnn_is_there")
def test_a_training_step_for_cuda_runs_cudnn_with_the_window() -> None:
    options = StepOptions(dtype="bfloat16", backend="cudnn")
    program = lowered("cuda", training(options))
    assert kernels(program) == set(CUDNN)
    calls = [line for line in program.splitlines() if "custom_call @__cudnn" in line]
    for call in calls:
        told = call.replace("\\22", '"')
        assert f'"sliding_window_length": {W}' in told
        assert '"mask_type": "CAUSAL"' in told
    assert len(calls) == 2, "all layers are one body"


@pytest.mark.usefixtures("cudnn_is_there")
@pytest.mark.parametrize("mesh", ["fsdp=4,tp=2", pytest.param("fsdp=8", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("platform", "backend", "called"),
    [("tpu", "splash", "tpu_custom_call"), ("cuda", "cudnn", CUDNN[0])],
)
def test_the_kernels_run_on_many_devices(
    platform: str, backend: Any, called: str, mesh: str
) -> None:
    options = StepOptions(dtype="bfloat16", backend=backend, mesh=make_mesh(mesh))
    assert called in kernels(lowered(platform, training(options)))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_training_step_needs_neither_kernel(platform: str) -> None:
    options = StepOptions(dtype="float32", backend="banded")
    assert kernels(lowered(platform, training(options))) == set()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_mixture_multiplies_its_experts_as_groups(platform: str) -> None:
    program = lowered(platform, training(StepOptions(dtype="bfloat16", backend="banded"), MIXTURE))
    # Of three kernels: forward, and back twice.
    assert grouped_products(program) == 3 * 3  # of the one body of all layers


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("form", [INT8, Form("int4", 32, is_ordered=True)], ids=str)
def test_quantised_experts_are_multiplied_as_groups_too(platform: str, form: Form) -> None:
    program = lowered(platform, decoding("bfloat16", form, MIXTURE))
    assert grouped_products(program) == 3  # of the one function that stands for all layers


@pytest.mark.usefixtures("cudnn_is_there")
@pytest.mark.parametrize(
    ("platform", "backend", "called"),
    [("tpu", "splash", {"tpu_custom_call"}), ("cuda", "cudnn", {"__cudnn$fmhaSoftmax"})],
)
def test_scoring_runs_the_forward_kernel_alone(
    platform: str, backend: Any, called: set[str]
) -> None:
    options = StepOptions(dtype="bfloat16", backend=backend)
    assert kernels(lowered(platform, scoring(options))) == called


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(
    ("dtype", "form"),
    [
        ("bfloat16", None),
        ("bfloat16", Form("int4", 32)),
        pytest.param("float32", None, marks=pytest.mark.slow),
        pytest.param("bfloat16", INT8, marks=pytest.mark.slow),
    ],
)
def test_prefill_and_decode_need_no_kernel(platform: str, dtype: str, form: Form | None) -> None:
    assert kernels(lowered(platform, prefilling(dtype, form))) == set()
    program = lowered(platform, decoding(dtype, form))
    assert kernels(program) == set()
    assert "stablehlo.while" in program


@pytest.mark.usefixtures("cudnn_is_there")
@pytest.mark.parametrize(
    ("platform", "dtype", "called"),
    [
        ("tpu", "bfloat16", {"tpu_custom_call"}),
        ("tpu", "float32", {"tpu_custom_call"}),
        ("cuda", "bfloat16", {"__cudnn$fmhaSoftmax"}),
        ("cuda", "float32", set()),  # which no kernel computes, so that scores can be seen
    ],
)
def test_patches_of_images_meet_in_a_kernel(
    platform: str, dtype: str, called: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_backend, "cudnn_works", lambda *kind: True)
    P = 384
    vision = dataclasses.replace(TOWER, dim=32)
    config = dataclasses.replace(SEES, vision=vision)
    p = vision.patch_size
    images = jax.eval_shape(
        lambda: Images(jnp.zeros((2, P, 3, p, p)), jnp.zeros((2, P, 2), jnp.int32))
    )
    seeing = partial(image_features, config), (weights(dtype, config=config), images)
    program = lowered(platform, seeing)
    assert kernels(program) == called
    assert (f"{P}x{P}x" in program) == (not called)
