"""Every kernel computes the softmax over the keys that a query may see, and its gradient.

The oracle is a loop over queries in float64 NumPy, with its gradient written by hand.
"""

import functools
import itertools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lechat_jax.devices.platform import compiling_for
from lechat_jax.errors import BadInput
from lechat_jax.model import attention
from lechat_jax.model.attention import (
    attend,
    banded_attention,
    dense_attention,
    training_attention,
)
from lechat_jax.ops import attention_backend, flash_attention
from lechat_jax.ops.attention_backend import best_backend, choose_backend, unsupported
from lechat_jax.ops.flash_attention import fused_attention, splash_attention
from tests.support.jaxprs import equations

Arrays = tuple[np.ndarray, ...]
Form = Callable[..., Any]

FORMS: dict[str, Form] = {
    "dense": dense_attention,
    "banded": banded_attention,
    "fused": functools.partial(fused_attention, implementation="xla"),
    "splash": functools.partial(splash_attention, interpret=True),
}

# T, N, K, W: windows of one key, not dividing T, dividing T, longer than T, twice; group
# sizes 3, 5, 1 and 2.
SHAPES = [
    (33, 6, 2, 1),
    (33, 6, 2, 2),
    (33, 6, 2, 7),
    (28, 6, 2, 7),
    (33, 6, 2, 40),
    (5, 6, 2, 7),
    (33, 5, 1, 7),
    (33, 3, 3, 9),
    (64, 4, 2, 16),
]

# Largest error against the loop, over its largest value if that is above 1. Measured:
# float64 7e-16, float32 2e-6 (6e-7 but for the window of one), bfloat16 0.008.
BUDGET = {"float64": 2e-15, "float32": 6e-6, "bfloat16": 0.016}


def loop(q: np.ndarray, k: np.ndarray, v: np.ndarray, up: np.ndarray, window: Any) -> Arrays:
    """Attention one query at a time, and the gradients of sum(up * attention)."""
    q, k, v, up = (x.astype(np.float64) for x in (q, k, v, up))
    (B, T, N, H), group = q.shape, q.shape[2] // k.shape[2]
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    for b, t, n in itertools.product(range(B), range(T), range(N)):
        oldest = 0 if window is None else max(0, t - window + 1)
        seen = (b, slice(oldest, t + 1), n // group)
        weights = np.exp(k[seen] @ q[b, t, n] / math.sqrt(H))
        weights /= weights.sum()
        out[b, t, n] = weights @ v[seen]
        d_weights = v[seen] @ up[b, t, n]
        d_scores = weights * (d_weights - weights @ d_weights) / math.sqrt(H)
        dq[b, t, n] = d_scores @ k[seen]
        dk[seen] += np.outer(d_scores, q[b, t, n])
        dv[seen] += np.outer(weights, up[b, t, n])
    return out, dq, dk, dv


def draw(T: int, N: int, K: int, H: int, dtype: str, B: int = 2) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    heads = (N, K, K, N)  # of q, k, v and the cotangent
    return tuple(jnp.asarray(rng.normal(size=(B, T, n, H)), dtype) for n in heads)


def value_and_gradients(form: Form, window: int | None) -> jax.stages.Wrapped:
    def both(q: Any, k: Any, v: Any, up: Any) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda *qkv: form(*qkv, window), q, k, v)
        return out, *pull(up)

    return jax.jit(both)


def assert_equals_loop(form: Form, T: int, N: int, K: int, W: Any, H: int, dtype: str) -> None:
    arrays = draw(T, N, K, H, dtype)
    got = value_and_gradients(form, W)(*arrays)
    q, k, v, up = (np.asarray(x) for x in arrays)
    expected = loop(q, k, v, up, W)
    for name, x, y in zip(("value", "dq", "dk", "dv"), got, expected, strict=True):
        assert x.dtype == dtype, name
        error = np.abs(np.asarray(x, np.float64) - y).max() / max(1.0, np.abs(y).max())
        assert error <= BUDGET[dtype], (name, error)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("T", "N", "K", "W"), SHAPES)
def test_the_band_computes_values_and_gradients_of_the_loop(T: int, N: int, K: int, W: int) -> None:
    assert_equals_loop(banded_attention, T, N, K, W, H=8, dtype="float64")


# 34 blocks of 2 queries with 8 keys and 6 heads, 96 scores each: all at once, 17, 12 and 1.
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("most", [34 * 96, 34 * 96 - 1, 12 * 96, 50])
def test_the_band_may_be_computed_in_pieces(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(attention_backend, "CPU_SCORES", most)
    assert_equals_loop(banded_attention, 33, 6, 2, W=7, H=8, dtype="float64")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("W", [1, 7, 40, None])
def test_the_dense_form_computes_the_same(W: int | None) -> None:
    assert_equals_loop(dense_attention, 33, 6, 2, W, H=8, dtype="float64")


# By XLA, from the very arguments that cuDNN gets. The scores are float32 in any precision.
@pytest.mark.parametrize("W", [1, 7, 40, None])
def test_the_arguments_for_cudnn_mean_the_same(W: int | None) -> None:
    assert_equals_loop(FORMS["fused"], 33, 6, 2, W, H=8, dtype="float32")


# The last has three blocks of 128, some pairs of which are skipped.
@pytest.mark.parametrize(("T", "N", "K", "W"), [(33, 6, 2, 1), (33, 5, 1, None), (300, 2, 1, 130)])
def test_the_tpu_kernel_computes_the_same(T: int, N: int, K: int, W: int | None) -> None:
    assert_equals_loop(FORMS["splash"], T, N, K, W, H=24, dtype="float32")


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_rounds_but_does_not_lose_the_softmax(form: str) -> None:
    assert_equals_loop(FORMS[form], T=33, N=6, K=2, W=7, H=24, dtype="bfloat16")


# Documents of one token, shorter and longer than a window, and a last one that is padding.
LENGTHS = ((1, 9, 3, 20), (5, 16, 12))


@pytest.mark.parametrize(
    ("form", "W", "dtype"),
    [
        *(("dense", W, "float64") for W in (1, 7, None)),
        *(("banded", W, "float64") for W in (1, 7, 40)),
        *(("splash", W, "float32") for W in (7, None)),
    ],
)
def test_documents_in_one_row_are_as_if_each_were_alone(form: str, W: Any, dtype: str) -> None:
    numbers = np.stack([np.repeat(range(len(row)), row) for row in LENGTHS])

    def packed(q: Any, k: Any, v: Any, window: Any) -> jax.Array:
        return FORMS[form](q, k, v, window, jnp.asarray(numbers, jnp.int32))

    with jax.enable_x64(dtype == "float64"):
        arrays = draw(33, 6, 2, 8, dtype)
        got = value_and_gradients(packed, W)(*arrays)
    for b, lengths in enumerate(LENGTHS):
        first = 0
        for length in lengths:
            alone = (slice(b, b + 1), slice(first, first + length))
            q, k, v, up = (np.asarray(x)[alone] for x in arrays)
            expected = loop(q, k, v, up, W)
            for name, x, y in zip(("value", "dq", "dk", "dv"), got, expected, strict=True):
                error = np.abs(np.asarray(x, np.float64)[alone] - y).max()
                assert error <= BUDGET[dtype] * max(1.0, np.abs(y).max()), (name, b, first)
            first += length


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "W", "H"), [(33, 7, 24), (128, 64, 24), (64, None, 128), (5, 7, 8)])
def test_cudnn_computes_the_same(T: int, W: int | None, H: int) -> None:
    assert_equals_loop(fused_attention, T, N=6, K=2, W=W, H=H, dtype="bfloat16")


@functools.cache
def jitted(form: str, window: int) -> Form:
    return jax.jit(lambda q, k, v: FORMS[form](q, k, v, window))


@pytest.mark.parametrize("form", ["dense", "banded"])
@given(
    window=st.sampled_from([1, 2, 5, 11]),
    changed=st.integers(0, 9),
    what=st.sampled_from(["k", "v"]),
)
@settings(max_examples=30)
def test_a_key_is_felt_by_the_w_queries_from_its_own_on_and_no_other(
    form: str, window: int, changed: int, what: str
) -> None:
    q, k, v, _ = draw(10, 2, 1, 4, "float32", B=1)
    before = jitted(form, window)(q, k, v)
    k, v = (x.at[:, changed].add(1.0) if what == name else x for name, x in (("k", k), ("v", v)))
    felt = jnp.any(jitted(form, window)(q, k, v) != before, axis=(0, 2, 3))
    seers = range(changed, min(changed + window, 10))
    # A query that sees a single key gives it weight one, whatever the key is.
    seers = [t for t in seers if what == "v" or min(t + 1, window) > 1]
    assert np.flatnonzero(felt).tolist() == seers


def test_keys_may_come_in_any_order_and_lie_anywhere() -> None:
    q, k, v, up = (np.asarray(x) for x in draw(12, 6, 2, 8, "float32"))
    order = np.random.default_rng(1).permutation(12)
    mask = np.tri(12, dtype=bool)[None, 9:, order]
    late = jax.jit(attend)(q[:, 9:], k[:, order], v[:, order], mask)
    np.testing.assert_allclose(late, loop(q, k, v, up, None)[0][:, 9:], atol=2e-6)


def test_a_query_that_sees_nothing_gets_the_plain_average() -> None:
    q, k, v, _ = draw(4, 2, 1, 8, "float32", B=1)
    mixed = jax.jit(attend)(q, k, v, jnp.zeros((1, 4, 4), bool))
    np.testing.assert_allclose(mixed, jnp.broadcast_to(v.mean(1, keepdims=True), q.shape), 1e-5)


def largest_intermediate(fun: Form, *arrays: jax.Array) -> int:
    jaxpr = jax.make_jaxpr(fun)(*arrays).jaxpr
    return max(math.prod(out.aval.shape) for e in equations(jaxpr) for out in e.outvars)


def test_keys_and_values_are_never_repeated_for_the_heads_of_a_group() -> None:
    q, k, v, up = draw(2, 12, 2, 16, "float32", B=1)
    k, v = jnp.tile(k, (1, 25, 1, 1)), jnp.tile(v, (1, 25, 1, 1))  # S = 50
    mask = jnp.ones((1, 2, 50), bool)

    def masked(q: jax.Array, k: jax.Array, v: jax.Array, window: None) -> jax.Array:
        return attend(q, k, v, mask)

    def repeating(q: jax.Array, k: jax.Array, v: jax.Array, window: None) -> jax.Array:
        return attend(q, jnp.repeat(k, 6, axis=2), jnp.repeat(v, 6, axis=2), mask)

    assert largest_intermediate(value_and_gradients(masked, None), q, k, v, up) == k.size
    assert largest_intermediate(value_and_gradients(repeating, None), q, k, v, up) == 6 * k.size


def test_twice_the_text_costs_the_band_twice_the_work_and_memory() -> None:
    def cost(form: str, T: int) -> tuple[float, int]:
        arrays = draw(T, 4, 2, 8, "float32", B=1)
        both = value_and_gradients(FORMS[form], 16)
        analysis = both.lower(*arrays).cost_analysis()
        assert analysis is not None
        return analysis["flops"], largest_intermediate(both, *arrays)

    for shorter, longer in itertools.pairwise(16 * n for n in (2, 4, 8, 16)):
        for less, more in zip(cost("banded", shorter), cost("banded", longer), strict=True):
            assert 1.9 * less <= more <= 2.1 * less
    for less, more in zip(cost("dense", 128), cost("dense", 256), strict=True):
        assert more >= 3.9 * less


def test_twice_the_text_costs_the_tpu_kernel_twice_the_blocks() -> None:
    def steps(T: int) -> int:
        q, k, v, up = draw(T, 2, 1, 8, "float32", B=1)
        jaxpr = jax.make_jaxpr(value_and_gradients(FORMS["splash"], 64))(q, k, v, up).jaxpr
        grids = [
            e.params["grid_mapping"].grid for e in equations(jaxpr) if "pallas" in str(e.primitive)
        ]
        assert len(grids) == 3  # forward, gradient of q, gradient of k and v
        return sum(math.prod(grid) for grid in grids)

    assert steps(2048) == 2 * steps(1024) == 4 * steps(512)


@pytest.mark.parametrize(
    ("platform", "dtype", "T", "window", "head_dim", "expected"),
    [
        ("cpu", "float32", 128, 64, 24, "banded"),
        ("cpu", "float32", 80, 64, 24, "dense"),  # 80 * 80 scores either way
        ("cpu", "float32", 81, 64, 24, "banded"),
        ("cpu", "float32", 64, 64, 24, "dense"),
        ("cpu", "float64", 4096, None, 24, "dense"),
        ("cpu", "bfloat16", 4096, 64, 24, "banded"),
        ("gpu", "bfloat16", 4096, 64, 24, "cudnn"),
        ("cuda", "float16", 128, None, 128, "cudnn"),
        ("gpu", "float32", 4096, 64, 24, "banded"),
        ("gpu", "float32", 4096, None, 24, "dense"),
        ("gpu", "bfloat16", 4096, 64, 20, "banded"),
        ("gpu", "bfloat16", 4096, 64, 264, "banded"),
        ("rocm", "bfloat16", 4096, 64, 24, "banded"),
        ("tpu", "bfloat16", 4096, 64, 24, "splash"),
        ("tpu", "float32", 128, None, 128, "splash"),
        ("tpu", "float16", 4096, 64, 24, "banded"),
        ("tpu", "bfloat16", 127, 64, 24, "banded"),
        ("tpu", "bfloat16", 64, 64, 24, "dense"),
    ],
)
def test_the_kernel_follows_from_the_platform_and_the_shapes(
    platform: str, dtype: str, T: int, window: int | None, head_dim: int, expected: str
) -> None:
    assert choose_backend(platform, dtype, T, window, head_dim) == expected


def test_the_chosen_kernel_is_used_and_a_named_one_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = draw(40, 2, 1, 8, "float32", B=1)
    calls = []
    for name in ("dense_attention", "banded_attention"):
        whole = getattr(attention, name)
        monkeypatch.setattr(
            attention, name, lambda *a, name=name, whole=whole: calls.append(name) or whole(*a)
        )
    for named in ((7,), (7, "dense"), (None,)):
        jax.eval_shape(lambda *qkv, named=named: training_attention(*qkv, *named), q, k, v)
    assert calls == ["banded_attention", "dense_attention", "dense_attention"]


@pytest.mark.parametrize(
    ("backend", "dtype", "window", "head_dim", "reason"),
    [
        ("banded", "float32", None, 8, "banded attention needs a window"),
        ("cudnn", "float32", 7, 8, "bfloat16 or float16, not float32"),
        ("cudnn", "bfloat16", 7, 12, "head_dim of 8, 16, ... 256, not 12"),
        ("splash", "float16", 7, 8, "bfloat16 or float32, not float16"),
    ],
)
def test_a_named_kernel_that_cannot_do_it_is_refused(
    backend: Any, dtype: str, window: int | None, head_dim: int, reason: str
) -> None:
    q, k, v, _ = draw(8, 2, 1, head_dim, dtype, B=1)
    with pytest.raises(BadInput, match=reason):
        training_attention(q, k, v, window, backend)


def test_cudnn_is_given_no_row_of_several_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would let them see each other, and say nothing."""
    given: list[str] = []

    def cudnn(q: Any, k: Any, v: Any, documents: Any, window: Any) -> Any:
        given.append("cudnn")
        return q

    monkeypatch.setitem(attention.KERNELS, "cudnn", cudnn)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention_backend, "cudnn_works", lambda *kind: True)
    q, k, v, _ = draw(33, 2, 1, 8, "bfloat16", B=1)
    documents = jnp.zeros((1, 33), jnp.int32)

    def ours(documents: Any, window: int | None, backend: Any = None) -> None:
        jax.eval_shape(lambda: training_attention(q, k, v, window, backend, documents))

    for window in (7, None):
        ours(None, window)
        assert given.pop() == "cudnn"
        ours(documents, window)
        assert given == []
    reason = "cudnn attention cannot keep the documents of a row apart; use dense or banded"
    for window in (7, None):
        with pytest.raises(BadInput, match=reason):
            ours(documents, window, "cudnn")
    for platform, packed in (("cuda", "banded"), ("tpu", "splash"), ("cpu", "banded")):
        assert choose_backend(platform, "bfloat16", 4096, 64, 24, packed=True) == packed
    for backend in ("dense", "banded", "splash"):
        assert unsupported(backend, "bfloat16", 64, 24, packed=True) is None


@pytest.mark.parametrize("H", [8, 16, 128, 256])
def test_cudnn_takes_heads_of_whole_eights_up_to_256(H: int) -> None:
    for dtype in ("bfloat16", "float16"):
        assert unsupported("cudnn", dtype, 64, H) is None
        assert unsupported("cudnn", dtype, None, H) is None
        assert choose_backend("gpu", dtype, T=17, window=64, head_dim=H) == "cudnn"


def test_an_unknown_kernel_is_refused_with_those_there_are() -> None:
    reason = unsupported("flash", "float32", window=7, head_dim=8)
    assert reason == "unknown attention 'flash'; choose one of dense, banded, cudnn, splash"


def test_without_a_working_cudnn_one_warning_is_given_and_xla_does_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    flash_attention.cudnn_works.cache_clear()
    with caplog.at_level(logging.WARNING):
        for T in (33, 40):
            assert_equals_loop(training_attention, T, N=6, K=2, W=7, H=8, dtype="bfloat16")
    flash_attention.cudnn_works.cache_clear()
    [record] = caplog.records
    assert "cuDNN attention does not work here" in record.getMessage()


def test_on_a_gpu_that_is_not_there_cudnn_is_not_tried(
    caplog: pytest.LogCaptureFixture,
) -> None:
    flash_attention.cudnn_works.cache_clear()
    with caplog.at_level(logging.WARNING), compiling_for("gpu"):
        assert best_backend("bfloat16", T=512, window=None, head_dim=64) == "cudnn"
        assert best_backend("float32", T=512, window=None, head_dim=64) == "dense"
    assert not caplog.records
