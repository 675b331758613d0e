"""What a row of a batch says of itself as its tokens come in."""

import math

import pytest

from lechat_jax.continuation import Continuation, Sample, join
from lechat_jax.errors import BadInput
from lechat_jax.tokenizer import Tokenizer


def row(max_tokens: int = 5, room: int | None = None, eos: tuple[int, ...] = ()) -> Continuation:
    return Continuation([1], max_tokens, room, eos, None)


@pytest.mark.parametrize(
    ("max_tokens", "room", "limit", "stopped"),
    [(3, None, 3, "length"), (3, 4, 3, "length"), (3, 3, 3, "length"), (3, 2, 2, "context")],
)
def test_a_row_stops_at_the_nearer_of_its_limits(
    max_tokens: int, room: int | None, limit: int, stopped: str
) -> None:
    row_ = row(max_tokens, room)
    assert row_.limit == limit
    said = [row_.take([7], [-1.0]).stopped for _ in range(limit)]
    assert said == [None] * (limit - 1) + [stopped]


@pytest.mark.parametrize(("max_tokens", "room"), [(0, None), (0, 0), (9, 0)])
def test_a_row_without_room_has_stopped_before_it_began(max_tokens: int, room: int | None) -> None:
    assert row(max_tokens, room).stopped == ("context" if max_tokens else "length")


def test_eos_is_the_reason_even_as_the_last_token_there_was_room_for() -> None:
    row_ = row(max_tokens=2, eos=(2, 5))
    assert row_.take([7, 5], [-1.0, -1.0]).stopped == "eos"
    assert row_.take([], []) == Sample([], [], "", "eos")


def test_text_comes_as_whole_characters_and_what_is_left_at_the_end() -> None:
    tokenizer = Tokenizer.mistral_v1()
    id_of = {byte: id_ for id_, byte in tokenizer.byte_of.items()}
    smile = [id_of[byte] for byte in "😀".encode()]
    before, all_ids = tokenizer.encode("The cat"), tokenizer.encode("The cat is")
    new = [*all_ids[len(before) :], *smile, *smile[:2]]
    row_ = Continuation(before, len(new), None, (), tokenizer)
    pieces = [row_.take([id_], [-1.0]) for id_ in new]
    assert [piece.text for piece in pieces] == [" is", "", "", "", "😀", "", "\ufffd\ufffd"]


def test_pieces_join_to_the_sample_they_are_of() -> None:
    pieces = [Sample([1, 2], [-1.0, -2.0], "ab", None), Sample([3], [-3.0], "c", "length")]
    assert join(pieces) == Sample([1, 2, 3], [-1.0, -2.0, -3.0], "abc", "length")


@pytest.mark.parametrize("logprob", [math.nan, math.inf, -math.inf])
def test_what_is_no_log_probability_is_not_passed_on(logprob: float) -> None:
    with pytest.raises(BadInput, match="weights are broken"):
        row().take([7, 8], [-1.0, logprob])
