"""Documents packed into rows are learned as if each had a row of its own."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lechat_jax.config import MistralConfig
from lechat_jax.data.rows import Rows
from lechat_jax.model import attention
from lechat_jax.model.binding import Weights, bind, weights_of
from lechat_jax.model.scoring import total_nats
from lechat_jax.ops.attention_backend import Backend
from lechat_jax.ops.flash_attention import splash_attention
from lechat_jax.train.step import StepOptions, shares
from lechat_jax.train.step import gradient as gradient_of
from tests.support.models import TINY, TINY_STRETCHED, random_model

# Documents longer than the window of 7, shorter, and of two tokens; the last row has padding.
LENGTHS = ((19, 2, 12), (5, 20, 8))
ROW = 33


@functools.cache
def documents() -> list[np.ndarray]:
    """The ids of each document, and which of them are learned."""
    rng = np.random.default_rng(0)
    return [rng.integers(97, size=(n,), dtype=np.int32) for row in LENGTHS for n in row]


def packed() -> Rows:
    """Them all in two rows; what is counted is decided by the id, but not in the padding."""
    tokens = np.concatenate(documents()).reshape(2, ROW)
    numbers = np.stack([np.repeat(range(len(row)), row) for row in LENGTHS])
    counted = tokens % 3 > 0
    counted[1, -LENGTHS[1][-1] :] = False
    return Rows(jnp.asarray(tokens), jnp.asarray(counted), jnp.asarray(numbers, jnp.int32))


def apart() -> Rows:
    """Each document in a row of its own, filled up with what nothing before it can see."""
    tokens = np.zeros((6, max(map(len, documents()))), np.int32)
    counted = np.zeros(tokens.shape, bool)
    for row, ids in enumerate(documents()):
        tokens[row, : len(ids)] = ids
        counted[row, : len(ids)] = (ids % 3 > 0) & (row < 5)
    return Rows(jnp.asarray(tokens), jnp.asarray(counted))


def learn(
    config: MistralConfig, options: StepOptions, weights: Weights, rows: Rows
) -> tuple[jax.Array, Weights]:
    """-log p of every target [B, T], and the gradient of the sum of those that count."""
    inputs, targets = rows.tokens[:, :-1], rows.tokens[:, 1:]
    numbers = None if rows.documents is None else rows.documents[:, :-1]
    share = (shares(rows) > 0).astype(options.dtype)
    hidden = bind(config, weights).hidden(inputs, options.backend, documents=numbers)
    log_p = jax.nn.log_softmax(bind(config, weights).logits(hidden))
    gradient = jax.grad(total_nats, argnums=2)(
        config, options, weights, inputs, targets, share, numbers
    )
    return -jnp.take_along_axis(log_p, targets[..., None], axis=2)[..., 0], gradient


def budget(dtype: str, expected: np.ndarray) -> float:
    """What sums over all positions may differ by that are added up in another order.

    Adding n numbers rounds n - 1 times, each time by up to half of eps times the sum so far; two
    orders differ by up to twice that. Measured is a tenth of it; documents that see each other
    make a difference of 0.1.
    """
    return 2 * ROW * float(np.finfo(dtype).eps) * max(1.0, float(np.abs(expected).max()))


@pytest.mark.parametrize(
    ("backend", "dtype", "kind"),
    [
        pytest.param("dense", "float64", "mistral", marks=pytest.mark.slow),
        ("dense", "float64", "stretched"),
        ("banded", "float64", "mistral"),
        ("splash", "float32", "mistral"),
    ],
)
def test_a_packed_row_is_learned_as_each_document_alone(
    backend: Backend, dtype: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreted = functools.partial(splash_attention, interpret=True)
    monkeypatch.setattr(attention, "splash_attention", interpreted)
    config = dataclasses.replace(TINY if kind == "mistral" else TINY_STRETCHED, n_layers=2)
    options = StepOptions(dtype=dtype, backend=backend)
    alone = dataclasses.replace(options, backend="dense")
    with jax.enable_x64(dtype == "float64"):
        weights = weights_of(random_model(config, dtype))
        nats, gradient = jax.jit(functools.partial(learn, config, options))(weights, packed())
        theirs, expected = jax.jit(functools.partial(learn, config, alone))(weights, apart())
    begins = np.cumsum([0, *map(len, documents())])
    for number, (begin, ids) in enumerate(zip(begins, documents(), strict=False)):
        row, place = divmod(int(begin), ROW)
        ours = np.asarray(nats)[row, place : place + len(ids) - 1]
        wanted = np.asarray(theirs)[number, : len(ids) - 1]
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=budget(dtype, wanted))
    for name in gradient:
        leaf, wanted = np.asarray(gradient[name]), np.asarray(expected[name])
        assert np.abs(leaf).max() > 0.1, name
        atol = budget(dtype, wanted)
        np.testing.assert_allclose(leaf, wanted, rtol=0, atol=atol, err_msg=name)


def test_a_step_on_packed_rows_is_one_on_their_documents() -> None:
    """Loss and gradient, each target with the document of what comes before it."""
    config = dataclasses.replace(TINY, n_layers=1)
    options = StepOptions(backend="dense")
    weights = weights_of(random_model(config))
    slope = jax.jit(functools.partial(gradient_of, config, options))
    (loss, grads), (expected, theirs) = (slope(weights, {}, of()) for of in (packed, apart))
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    for name, wanted in theirs.items():
        atol = 1e-5 * float(np.abs(wanted).max())
        np.testing.assert_allclose(grads[name], wanted, rtol=0, atol=atol, err_msg=name)


def test_the_share_of_a_target_is_the_same_for_all_that_count_and_one_in_sum() -> None:
    """The first token of a document is nobody's target, whatever `counted` says of it."""
    rows = packed()
    ids = np.asarray(rows.tokens)
    learned = [ids[0, 1:19], ids[0, 20:21], ids[0, 22:], ids[1, 1:5], ids[1, 6:25]]
    n = sum(int((part % 3 > 0).sum()) for part in learned)
    share = np.asarray(shares(rows))
    assert sorted(set(share.reshape(-1).tolist())) == [0, pytest.approx(1 / n)]
    assert np.count_nonzero(share) == n
    assert share[0, [18, 20]].tolist() == [0, 0]
    everything = np.asarray(shares(rows._replace(counted=None)))
    assert np.count_nonzero(everything) == 2 * (ROW - 1) - 4
