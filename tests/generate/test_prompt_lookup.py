"""What a guess is taken from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lechat_jax.generate.prompt_lookup import NGRAM, Repeats, look_up, newest, record
from lechat_jax.model.cache import EMPTY

looked_up = jax.jit(look_up, static_argnums=2)


def guess(text: list[int], n: int, S: int = 32) -> list[int]:
    return looked_up(jnp.asarray(newest([text], S)), jnp.array([len(text) - 1]), n)[0].tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([1, 2, 3, 4, 9, 1, 2, 3], [4, 9, 1]),  # three tokens
        ([1, 2, 3, 4, 5, 2, 3, 6, 1, 2, 3], [4, 5, 2]),  # three that are older, before two
        ([2, 3, 4, 5, 2, 3, 6, 1, 2, 3], [6, 1, 2]),  # of two the later
        ([7, 8, 9, 7], [8, 9, 7]),  # one
        ([1, 2, 1, 2], [1, 2, 1]),  # round and round
        ([5, 5], [5, 5, 5]),
    ],
)
def test_a_guess_follows_the_latest_of_the_longest_matches(
    text: list[int], expected: list[int]
) -> None:
    assert guess(text, 3) == expected


@given(st.lists(st.integers(0, 3), min_size=2, max_size=40), st.integers(4, 12))
def test_only_what_is_kept_is_searched(text: list[int], S: int) -> None:
    """The same as a search by hand through the last S tokens."""
    kept = text[-S:]
    end = len(kept) - 1

    def matched(at: int) -> int:
        back = 0
        while back < NGRAM and at - back >= 0 and kept[at - back] == kept[end - back]:
            back += 1
        return back

    best = max(range(end), key=lambda at: (matched(at), at), default=0)
    if matched(best):
        assert guess(text, 1, S) == [kept[best + 1]]


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 8), st.integers(0, 8))
def test_tokens_that_are_recorded_one_by_one_are_as_if_kept_from_the_start(
    text: list[int], S: int, first: int
) -> None:
    first = min(first, len(text))
    seen = jnp.asarray(newest([text[:first]], S))
    for position in range(first, len(text)):
        at = jnp.array([[position, EMPTY]])
        seen = record(seen, at, jnp.array([[text[position], 77]]))
    np.testing.assert_array_equal(seen, newest([text], S))


def test_a_text_is_worth_guessing_while_it_repeats_itself() -> None:
    """Six right guesses and the token after them are a step of seven."""
    rng = np.random.default_rng(0)
    once, other = rng.permutation(5000)[:300].tolist(), rng.permutation(5000)[:60].tolist()
    repeats = Repeats(once, draft=6)
    assert repeats.rate == 1.0
    repeats.add(once)
    assert repeats.rate == pytest.approx(7, abs=0.01)
    repeats.add(other)
    assert repeats.rate == pytest.approx(1, abs=0.01)
    assert repeats.text == once + once + other


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(0, 60))
def test_what_repeats_does_not_depend_on_how_a_text_comes(text: list[int], at: int) -> None:
    in_parts = Repeats(text[:at], draft=3)
    in_parts.add(text[at:])
    assert in_parts.rate == Repeats(text, draft=3).rate
