"""Who sees whom, written out, and against a loop that says it in words."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lechat_jax.model.mask import Documents, window_mask

POSITIONS = st.lists(st.integers(-1, 12), min_size=6, max_size=6)


def sees(q_pos: list[int], k_pos: list[int], window: int | None) -> list[list[int]]:
    """The mask of one row, as literals of 0 and 1."""
    mask = window_mask(jnp.array([q_pos]), jnp.array([k_pos]), window)
    assert mask.dtype == jnp.bool
    return mask[0].astype(int).tolist()


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (1, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
        (3, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]]),
        (4, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]),
        (None, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]),
    ],
)
def test_a_sequence_sees_itself_and_the_window_before(
    window: int | None, expected: list[list[int]]
) -> None:
    assert sees([0, 1, 2, 3], [0, 1, 2, 3], window) == expected


def test_a_late_query_sees_as_many_keys_as_the_window_says() -> None:
    keys = list(range(100))
    assert np.flatnonzero(sees([50], keys, 7)[0]).tolist() == [44, 45, 46, 47, 48, 49, 50]


def test_slots_of_a_ring_may_be_in_any_order_and_empty() -> None:
    ring = [8, 9, -1, 3, 4, 5, 6, 7]
    assert sees([8, 9], ring, 4) == [[1, 0, 0, 0, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0, 1, 1]]


def test_padding_neither_sees_nor_is_seen() -> None:
    assert sees([-1, 0, 1], [-1, 0, 1], None) == [[0, 0, 0], [0, 1, 0], [0, 1, 1]]


def test_rows_of_a_batch_have_their_own_positions() -> None:
    q_pos = jnp.array([[5], [2]])
    k_pos = jnp.array([[3, 4, 5], [1, 2, 3]])
    mask = window_mask(q_pos, k_pos, 2)
    assert mask.astype(int).tolist() == [[[0, 1, 1]], [[1, 1, 0]]]


@given(POSITIONS, POSITIONS, st.none() | st.integers(1, 14))
def test_the_mask_is_what_the_words_say(
    q_pos: list[int], k_pos: list[int], window: int | None
) -> None:
    expected = []
    for q in q_pos:
        row = []
        for k in k_pos:
            empty, ahead = k == -1, k > q
            too_old = window is not None and k not in range(q, q - window, -1)
            row.append(int(not (empty or ahead or too_old)))
        expected.append(row)
    assert sees(q_pos, k_pos, window) == expected


def test_documents_of_a_row_do_not_see_each_other() -> None:
    row = jnp.arange(5)[None]
    numbers = jnp.array([[4, 4, 0, 0, 0]])
    mask = window_mask(row, row, 2, Documents(numbers, numbers))
    assert mask[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1],
    ]
