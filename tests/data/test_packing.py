"""Packed rows hold each document once an epoch, whole, and are a function of (seed, step)."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lechat_jax.data.packing import Documents, Packed, best_fit
from lechat_jax.data.rows import Rows
from lechat_jax.errors import BadInput

ROOM = 33
LENGTHS = st.lists(st.integers(2, ROOM), min_size=1, max_size=40)


def documents(lengths: list[int]) -> Documents:
    """Documents whose ids tell which they are; every second token is learned."""
    ids = [np.full(n, 100 + i) for i, n in enumerate(lengths)]
    return Documents.of([(own.tolist(), [t % 2 == 1 for t in range(len(own))]) for own in ids])


def found(rows: Rows) -> list[int]:
    """The documents in the rows, each checked to be whole and by itself."""
    seen = []
    assert rows.counted is not None
    assert rows.documents is not None
    for tokens, counted, part in zip(rows.tokens, rows.counted, rows.documents, strict=True):
        for number in dict.fromkeys(part.tolist()):
            places = np.flatnonzero(part == number)
            assert np.array_equal(places, np.arange(places[0], places[-1] + 1))
            own = tokens[places]
            assert len(set(own.tolist())) == 1
            if own[0]:
                seen.append(int(own[0]))
                assert counted[places].tolist() == [t % 2 == 1 for t in range(len(own))]
            else:
                assert places[-1] == len(tokens) - 1, "padding is at the end"
                assert not counted[places].any()
    return seen


def flat(rows: Rows) -> Rows:
    """The rows of all steps one after the other."""
    return jax.tree.map(lambda leaf: np.reshape(leaf, (-1, ROOM)), rows)


@given(LENGTHS, st.integers(0, 3))
def test_an_epoch_holds_every_document_once_and_whole(lengths: list[int], epoch: int) -> None:
    packed = Packed(documents(lengths), ROOM - 1, batch=1, seed=7)
    rows = packed.rows(epoch * packed.windows, packed.windows)
    assert sorted(found(flat(rows))) == [100 + i for i in range(len(lengths))]
    one = packed.rows(epoch * packed.windows, 1).tokens[0, 0]
    assert np.array_equal(one, rows.tokens[0, 0])


@given(LENGTHS)
def test_no_two_rows_would_fit_into_one(lengths: list[int]) -> None:
    rows = best_fit(lengths, ROOM)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = sorted(sum(lengths[i] for i in row) for row in rows)
    assert filled[-1] <= ROOM
    assert len(filled) < 2 or filled[0] + filled[1] > ROOM


def test_an_epoch_mixes_anew_and_the_seed_decides() -> None:
    lengths = np.random.default_rng(0).integers(2, 20, size=300).tolist()
    packed = Packed(documents(lengths), ROOM - 1, batch=3, seed=0)
    assert packed.padding < 0.01
    first, second = (packed.rows(step, 1) for step in (0, packed.windows))  # three epochs later
    assert not np.array_equal(first.tokens, second.tokens)
    again = Packed(documents(lengths), ROOM - 1, batch=3, seed=0)
    leaves = (jax.tree.leaves(flat(rows)) for rows in (packed.rows(11, 5), again.rows(10, 6)))
    for ours, theirs in zip(*leaves, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs)[3:])
    other = Packed(documents(lengths), ROOM - 1, batch=3, seed=1)
    assert not np.array_equal(first.tokens, other.rows(0, 1).tokens)


def test_one_document_a_row_where_they_are_not_packed() -> None:
    packed = Packed(documents([5, 3, 7]), ROOM - 1, batch=3, seed=0, together=False)
    assert packed.windows == 3
    assert sorted(found(flat(packed.rows(0, 1)))) == [100, 101, 102]


def test_a_long_text_is_cut_so_that_each_token_is_a_target_once() -> None:
    stream = np.array([1, *range(10, 23), 1, 5, 1, 6, 7])
    pieces = Documents.of_stream(stream, bos_id=1, block=4)
    rows = [pieces.ids[a:b].tolist() for a, b in itertools.pairwise(pieces.begins)]
    assert rows == [
        [1, 10, 11, 12, 13],
        [13, 14, 15, 16, 17],
        [17, 18, 19, 20, 21],
        [21, 22],
        [1, 5],
        [1, 6, 7],
    ]


def test_a_document_that_no_row_holds_is_refused() -> None:
    with pytest.raises(BadInput, match="has 34 tokens and a block of 32 holds 33"):
        Packed(documents([34]), ROOM - 1, batch=1, seed=0)


@pytest.mark.parametrize(
    ("lengths", "block", "batch", "seed", "said"),
    [
        ([], 4, 1, 0, r"the number of documents \(0\)"),
        ([3], 0, 1, 0, r"block \(0\)"),
        ([3], 4, 0, 0, r"batch \(0\)"),
        ([3], 4, 1, -1, r"seed \(-1\)"),
    ],
)
def test_what_gives_no_rows_is_refused(
    lengths: list[int], block: int, batch: int, seed: int, said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        Packed(documents(lengths), block, batch, seed)


def test_padding_is_the_share_of_tokens_that_are_no_document_s() -> None:
    assert Packed(documents([5, 3, 7]), 7, batch=1, seed=0).padding == 1 / 16
    assert Packed(documents([8, 8]), 7, batch=1, seed=0).padding == 0
