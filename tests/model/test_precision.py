"""Precision that only the types of a program show: what is added up is added up in float32.

On a small model a sum in bfloat16 is hardly worse than the rounding of what goes into it, and on
a CPU it may not be made at all. So these tests read the program: of every operation the types of
its operands and of its result, in a training step and in decoding, as traced for a CPU and for a
GPU, where other branches are taken.
"""

import dataclasses
import functools
import platform as host
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from lechat_jax.checkpoint.weights import weight_shapes
from lechat_jax.config import MistralConfig
from lechat_jax.data.rows import described_rows
from lechat_jax.generate.decode import DecodeState, Request, decode
from lechat_jax.generate.sampling import Sampling
from lechat_jax.model.adapters import Adapters
from lechat_jax.model.cache import empty_cache
from lechat_jax.ops.matmul import as_bits
from lechat_jax.quantize.scheme import INT8, Form
from lechat_jax.train.optimizer import usual_rule
from lechat_jax.train.step import StepOptions, state_of, train_steps
from tests.support.jaxprs import equations
from tests.support.models import TINY_MIXTURE, TINY_STRETCHED

# A row of so many tokens that a CPU multiplies them as a matrix. No size is another's, but where
# heads are joined or halved, which have no letter: they are written as numbers, [48] and [16] as
# all heads of queries and of keys.
T, RANK = 67, 7
LETTERS = {
    40: "D",
    6: "N",
    8: "H",
    56: "F",
    97: "V",
    3: "G",
    2: "K",
    5: "E",
    32: "S",
    1: "B",
    T: "T",
}

# Products that may be rounded to bfloat16 at once, since nothing follows that this would spoil:
# those of positions and the kernels of maps, what attention gathers, and their gradients.
WIDTH = r"(D|F|\[48\]|\[16\])"
MAPS = rf"(T|\[4\]){WIDTH},(T|{WIDTH}){WIDTH}->(T|\[4\]|{WIDTH}){WIDTH}"
MIXED = r"BTKH,BKTGT->BKHTG|BKHTG,BTKH->BKTGT|BKHTG,BKTGT->BKHT|\[4\]KGS,\[4\]KSH->\[4\]KGH"
ADAPTERS = r"T\[7\],\[7\]\[16\]->T\[16\]|T\[16\],T\[7\]->\[16\]\[7\]|T\[16\],\[7\]\[16\]->T\[7\]"
INT4 = Form("int4", 4)


def name(variables: Any) -> str:
    return "".join(LETTERS.get(size, f"[{size}]") for size in variables.aval.shape)


def floats(variables: Any) -> set[str]:
    types = {str(v.aval.dtype) for v in variables if hasattr(v.aval, "dtype")}
    return {kind for kind in types if "float" in kind}


def traced(platform: str, program: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The equations of a program as it is on that platform."""
    jax.clear_caches()  # of what was traced for another
    with mock.patch.object(jax, "default_backend", return_value=platform):
        found = list(equations(jax.make_jaxpr(program)(*arguments).jaxpr))
    jax.clear_caches()
    return found


def training(platform: str, config: MistralConfig, form: Form | None = None) -> list[Any]:
    """A step in bfloat16, of all weights or of adapters beside those of that form."""
    rule = usual_rule("muon" if form is None else "adamw", "random")
    options = StepOptions(dtype="bfloat16", rule=rule, backend="dense", router_aux_loss=0.1)
    frozen: dict[str, Any] = {}
    learning: dict[str, Any] = weight_shapes(config)
    if form is not None:
        learning = Adapters(rank=RANK, alpha=5.0, targets=("k",)).described(config)
        frozen = weight_shapes(config, form)
        frozen |= {key: learning.pop(key) for key in list(learning) if key.endswith("scale")}
    state = jax.eval_shape(lambda weights: state_of(weights, options), learning)
    rows = described_rows((2, 1, T + 1), is_packed=True)
    step = functools.partial(train_steps, config, options)
    return traced(platform, step, state, frozen, rows, jnp.int32(2), jnp.int32(9))


def decoding(platform: str, config: MistralConfig, form: Form | None = None) -> list[Any]:
    """Tokens of a model in bfloat16, one after the other, with every filter."""
    weights = {
        key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if is_fixed(key, form) else "bfloat16")
        for key, leaf in weight_shapes(config, form).items()
    }
    with mock.patch.object(jax, "default_backend", return_value=platform):
        weights = as_bits(weights, 2)
    kind = "float32" if platform == "cpu" else "bfloat16"
    cache = empty_cache(config, 4, chunk=20, context=T, dtype=kind)
    row = jnp.zeros(4, jnp.int32)
    state = DecodeState(cache, token=row, position=row, left=row, seen=row[:, None])
    sampling = Sampling(temperature=0.8, top_k=5, top_p=0.9, min_p=0.1)
    request = Request(sampling.controls(4), sampling.streams(4), jnp.zeros((4, 97), bool))
    return traced(
        platform, functools.partial(decode, config), weights, state, request, jnp.int32(3)
    )


def is_fixed(key: str, form: Form | None) -> bool:
    return form is not None and form.is_fixed(key)


def products(found: list[Any]) -> dict[str, set[tuple[str, ...]]]:
    """The types of operands and result of each product, by the letters of its axes."""
    made: dict[str, set[tuple[str, ...]]] = {}
    for equation in found:
        if equation.primitive.name in ("dot_general", "ragged_dot_general"):
            variables = [*equation.invars[:2], equation.outvars[0]]
            first, second, result = map(name, variables)
            types = tuple(str(v.aval.dtype) for v in variables)
            made.setdefault(f"{first},{second}->{result}", set()).add(types)
    return made


# Whose operands and results have to be float32: sums, largest numbers, and functions of numbers.
WIDE = set(
    "reduce_sum reduce_max reduce_prod cumsum scatter-add psum exp exp2 log log1p rsqrt sqrt cos "
    "sin logistic tanh pow integer_pow div top_k sort argmax".split()
)


def assert_added_up_wide(found: list[Any], rounded: str) -> None:
    """All is added up in float32 but the products whose labels match."""
    seen = set()
    for equation in found:
        operation, variables = equation.primitive.name, [*equation.invars, *equation.outvars]
        seen.add(operation)
        if operation in WIDE:
            assert floats(variables) <= {"float32"}, equation
        if operation == "convert_element_type" and equation.outvars[0].aval.shape == ():
            assert [*map(floats, ([v] for v in variables))] != [{"float32"}, {HALF}], (
                f"a number that all depend on is rounded: {equation}"
            )
    assert {"exp", "rsqrt", "cos", "sin"} <= seen
    for label, types in products(found).items():
        if not re.fullmatch(rounded, label):
            results = {kinds[-1] for kinds in types}
            assert results <= {"float32", "int32"}, f"{label} is added up in bfloat16"


HALF, TO_SINGLE = "bfloat16", {("bfloat16", "bfloat16", "float32")}
SINGLE = {("float32", "float32", "float32")}
PLAIN = dataclasses.replace(TINY_STRETCHED, n_layers=1, sliding_window=7)
MIXTURE = dataclasses.replace(TINY_MIXTURE, n_layers=1)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_step_adds_up_in_float32_what_is_not_a_map(platform: str) -> None:
    found = training(platform, PLAIN)
    assert_added_up_wide(found, f"{MAPS}|{MIXED}")
    made = products(found)
    assert made["BTKGH,BTKH->BKTGT"] == TO_SINGLE  # scores
    assert made["TD,VD->TV"] == TO_SINGLE  # logits
    assert made["TV,VD->TD"] == made["TV,TD->VD"] == TO_SINGLE  # and their gradients
    assert made["TD,D[48]->T[48]"] == {(HALF, HALF, HALF)}, "a map multiplies in bfloat16"


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_router_is_float32_and_experts_are_added_up_in_it(platform: str) -> None:
    found = training(platform, MIXTURE)
    assert_added_up_wide(found, f"{MAPS}|{MIXED}")
    made = products(found)
    assert made["TD,ED->TE"] == SINGLE
    [router] = [
        equation
        for equation in found
        if equation.primitive.name == "dot_general" and name(equation.outvars[0]) == "TE"
    ]
    assert set(router.params["precision"]) == {jax.lax.Precision.HIGHEST}  # not a GPU's TF32
    if platform == "gpu":
        assert made["[134]D,E[28]D->[134][28]"] == TO_SINGLE


@pytest.mark.parametrize("form", [INT8, INT4], ids=str)
def test_adapters_and_quantised_kernels_add_up_in_float32(form: Form) -> None:
    found = training("gpu", PLAIN, form)
    assert_added_up_wide(found, f"{ADAPTERS}|{MIXED}")
    made = products(found)
    assert made["TD,[7]D->T[7]"] == TO_SINGLE
    kernel = "TD,[48]D->T[48]" if form.format == "int8" else "T[10][4],[10][48][4]->T[48]"
    assert made[kernel] == TO_SINGLE


@pytest.mark.parametrize(
    ("platform", "config", "form"),
    [
        ("cpu", MIXTURE, None),
        ("cpu", PLAIN, INT8),
        ("cpu", PLAIN, INT4),
        ("gpu", PLAIN, None),
        ("gpu", MIXTURE, INT8),
        ("gpu", PLAIN, INT4),
    ],
)
def test_decoding_adds_up_in_float32_what_is_not_a_map(
    platform: str, config: MistralConfig, form: Form | None
) -> None:
    found = decoding(platform, config, form)
    rounded = f"{MAPS}|{MIXED}" if form is None and platform == "gpu" else MIXED
    assert_added_up_wide(found, rounded)
    made = products(found)
    if platform == "gpu":
        assert made["[4]KGH,[4]KSH->[4]KGS"] == made["[4]D,VD->[4]V"] == TO_SINGLE
    else:
        assert made["[4]KGH,[4]KSH->[4]KGS"] == SINGLE
    if config.n_experts:
        assert made["[4]D,ED->[4]E"] == SINGLE
    if form == INT8 and platform == "cpu" and "x86" in host.machine():
        assert made["[12]D,[48]D->[12][48]"] == {("int8", "int8", "int32")}
