"""What a row of a batch says of itself as its tokens come in."""

import math

import pytest

from lechat_jax.errors import BadInput
from lechat_jax.generate.continuation import Continuation, Sample, join
from lechat_jax.tokenizer.tokenizer import Tokenizer


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


TEXT = "Once upon a time, in a land far away, a caf\u00e9 \U0001f600 stood. And\n\nthe end"


def heard(stop: list[str], cuts: list[int], text: str = TEXT) -> tuple[list[int], Sample]:
    """All ids of the text, and what is heard of them where they come in pieces of these sizes."""
    tokenizer = Tokenizer.mistral_v1()
    ids = tokenizer.encode(text)
    row_ = Continuation([1], len(ids), None, (), tokenizer, stop)
    pieces, at = [], 0
    for size in [*cuts, len(ids)]:
        if not row_.stopped:
            part = ids[at : at + size]
            pieces.append(row_.take(part, [-float(at + i) for i in range(len(part))]))
            at += size
    return ids, join(pieces)


CUTS = [[], [1] * 99, [2] * 99, [3, 1, 7, 2, 30]]


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (["land"], "Once upon a time, in a "),
        (["d f", "way"], "Once upon a time, in a lan"),  # over borders and within tokens
        (["O"], ""),
        (["\U0001f600"], "Once upon a time, in a land far away, a caf\u00e9 "),  # of four bytes
        (["\n\n"], TEXT.partition("\n")[0]),
        (["time, in b", "far"], "Once upon a time, in a land "),  # one that only begins
        (["in a land far", "land"], "Once upon a time, in a "),  # the first that is complete
        (["end"], TEXT[:-3]),  # with the last token there was room for
    ],
)
def test_a_text_ends_before_its_stop_text_however_it_comes(
    stop: list[str], text: str, cuts: list[int]
) -> None:
    ids, sample = heard(stop, cuts)
    assert (sample.text, sample.stopped) == (text, "stop")
    assert sample.ids == ids[: len(sample.ids)]
    assert sample.logprobs == [-float(i) for i in range(len(sample.ids))]
    tokenizer = Tokenizer.mistral_v1()
    assert tokenizer.decode(sample.ids).startswith(text)
    assert len(tokenizer.decode(sample.ids[:-1])) <= len(text)  # the last one begins before it


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_what_might_have_become_a_stop_text_is_not_lost(cuts: list[int]) -> None:
    ids, sample = heard(["the end.", "And\n\nthen", "never"], cuts)
    assert (sample.ids, sample.text, sample.stopped) == (ids, TEXT, "length")


def test_nothing_is_told_that_a_stop_text_may_take_back() -> None:
    tokenizer = Tokenizer.mistral_v1()
    row_ = Continuation([1], 99, None, (), tokenizer, ["cat sat"])
    pieces = [row_.take([id_], [-1.0]) for id_ in tokenizer.encode("A cat. The cat sat")]
    assert [piece.text for piece in pieces] == ["A", " ", "cat.", " The", " ", ""]
    assert [len(piece.ids) for piece in pieces] == [1, 1, 1, 1, 1, 0]
    assert [piece.stopped for piece in pieces] == [None] * 5 + ["stop"]


def test_eos_ends_what_is_held_back() -> None:
    tokenizer = Tokenizer.mistral_v1()
    row_ = Continuation([1], 99, None, (2,), tokenizer, ["cat sat"])
    sample = row_.take([*tokenizer.encode("The cat"), 2], [-1.0] * 3)
    assert (sample.ids, sample.text, sample.stopped) == ([415, 5255, 2], "The cat", "eos")


def test_a_stop_text_needs_a_tokenizer() -> None:
    with pytest.raises(BadInput, match="a stop text needs a tokenizer"):
        Continuation([1], 5, None, (), None, ["x"])
