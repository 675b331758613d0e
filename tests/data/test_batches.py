"""Batches that depend on the step alone, each token scored once."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lechat_jax.data.batches import Batches
from lechat_jax.data.held_out import interim_rows, score_rows
from lechat_jax.errors import BadInput

BOS = 1

# --- batches ---

shapes = st.tuples(st.integers(2, 400), st.integers(1, 40), st.integers(1, 9)).filter(
    lambda shape: shape[0] > shape[1]
)


@given(shapes, st.integers(0, 2**32))
@example((6, 5, 3), 0)
@example((11, 5, 3), 0)
def test_every_window_of_an_epoch_is_read_exactly_once(
    shape: tuple[int, int, int], seed: int
) -> None:
    n_tokens, block, batch = shape
    batches = Batches(n_tokens, block, batch, seed)
    n_steps = -(-3 * batches.windows // batch)
    rows = batches.starts_range(0, n_steps).ravel()
    for epoch in range(3):
        starts = np.sort(rows[epoch * batches.windows : (epoch + 1) * batches.windows])
        assert (np.diff(starts) == block).all(), "side by side"
        assert starts[0] >= 0
        assert starts[-1] + block + 1 <= n_tokens
    assert batches.windows >= max(1, n_tokens // block - 1), "less than two blocks are left out"


@given(shapes, st.integers(0, 2**32), st.lists(st.integers(0, 50), min_size=1, max_size=8))
def test_a_step_is_the_same_whenever_and_however_it_is_asked_for(
    shape: tuple[int, int, int], seed: int, steps: list[int]
) -> None:
    whole = Batches(*shape, seed).starts_range(0, 51)
    other = Batches(*shape, seed)
    for step in steps:
        assert other.starts(step).tolist() == whole[step].tolist()
        assert other.starts_range(step, 2)[0].tolist() == whole[step].tolist()


def test_epochs_differ_in_phase_and_order_and_seeds_in_both() -> None:
    batches = Batches(n_tokens=10_001, block=100, batch=99, seed=0)
    assert batches.windows == 99
    epochs = batches.starts_range(0, 50)
    assert len(set(epochs.min(axis=1))) > 30, "phases"
    assert len({tuple(np.argsort(epoch)) for epoch in epochs}) == 50, "orders"
    assert Batches(10_001, 100, 99, 1).starts(0).tolist() != epochs[0].tolist()


def test_over_the_epochs_every_token_is_a_target() -> None:
    batches = Batches(n_tokens=57, block=8, batch=6, seed=3)
    targets = Counter(
        int(start) + 1 + i for start in batches.starts_range(0, 400).ravel() for i in range(8)
    )
    assert set(targets) == set(range(1, 57))


def test_twenty_steps_of_a_large_batch_take_milliseconds() -> None:
    batches = Batches(n_tokens=2_400_000, block=128, batch=512, seed=0)
    batches.starts_range(0, 20)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        batches.starts_range(0, 20)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.005


@pytest.mark.parametrize(
    ("arguments", "complains"),
    [
        ((128, 128, 4, 0), "has 128 tokens, but a block of 128 needs 129"),
        ((0, 1, 1, 0), "has 0 tokens, but a block of 1 needs 2"),
        ((100, 0, 4, 0), r"block \(0\)"),
        ((100, 8, 0, 0), r"batch \(0\)"),
        ((100, 8, 4, -1), r"seed \(-1\)"),
    ],
)
def test_what_gives_no_batch_is_refused(
    arguments: tuple[int, int, int, int], complains: str
) -> None:
    with pytest.raises(BadInput, match=complains):
        Batches(*arguments)


# --- scoring ---

stream = st.lists(st.integers(1, 6), min_size=1, max_size=60).map(
    lambda ids: np.array([BOS, *ids], np.uint16)
)


@given(stream, st.integers(1, 12))
def test_each_validation_token_is_scored_once_except_bos(val: np.ndarray, block: int) -> None:
    tokens, counted, *_ = score_rows(val, block, BOS)
    assert counted is not None
    assert tokens.shape[1] == block + 1
    assert not counted[:, 0].any()
    assert tokens[counted].tolist() == val[val != BOS].tolist()
    before = tokens[:, :-1][counted[:, 1:]]
    assert before.tolist() == val[:-1][val[1:] != BOS].tolist(), "what came before"
    assert len(tokens) * block - (len(val) - 1) < block, "no more rows than needed"


def test_the_last_row_is_filled_up() -> None:
    tokens, counted, *_ = score_rows(np.array([1, 5, 6, 2, 1, 7]), 4, BOS)
    assert counted is not None
    assert tokens.tolist() == [[1, 5, 6, 2, 1], [1, 7, 1, 1, 1]]
    assert counted.tolist() == [[False, True, True, True, False], [False, True] + 3 * [False]]


@pytest.mark.parametrize("val", [[], [1], [5, 6]])
def test_a_stream_that_cannot_be_scored_whole_is_refused(val: list[int]) -> None:
    with pytest.raises(BadInput, match="validation"):
        score_rows(np.array(val, np.uint16), 4, BOS)


@given(st.integers(1, 5000), st.integers(1, 300))
def test_interim_rows_are_spread_evenly(n_rows: int, limit: int) -> None:
    rows = interim_rows(n_rows, limit)
    assert len(rows) == min(n_rows, limit)
    steps = np.diff([-1 - rows[0], *rows, 2 * n_rows - 1 - rows[-1]])[1:-1]
    assert len(set(rows.tolist())) == len(rows)
    assert len(steps) == 0 or steps.max() - steps.min() <= 1
    assert 0 <= rows[0]
    assert rows[-1] < n_rows
    assert abs(int(rows[0]) - (n_rows - 1 - int(rows[-1]))) <= 1, "no end is favoured"
