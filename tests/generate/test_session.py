"""A text in turns is the text in one go, at the price of its new tokens."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.generate import continuous_batch
from lechat_jax.generate.continuation import join
from lechat_jax.generate.generator import Generator
from lechat_jax.generate.sampling import Sampling
from lechat_jax.generate.session import Session
from lechat_jax.model.binding import bind
from lechat_jax.tokenizer.tokenizer import Tokenizer
from tests.support.models import random_model

SAMPLINGS = {"greedy": Sampling(temperature=0), "drawn": Sampling(temperature=0.9, seed=3)}


def ids_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([length, seed]).integers(97, size=length).tolist()


@pytest.fixture(scope="module")
def made(tiny: MistralConfig) -> Generator:
    return Generator(random_model(tiny), chunk=4)


def said(session: Session, n: int, sampling: Sampling, **asked: Any) -> list[int]:
    return [id_ for piece in session.stream(n, sampling, (), **asked) for id_ in piece.ids]


@pytest.mark.parametrize("draft", [0, 3])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_turns_are_the_text_in_one_go(made: Generator, name: str, draft: int) -> None:
    session, sampling = Session(made, draft), SAMPLINGS[name]
    text: list[int] = []
    for turn, length in enumerate((6, 1, 11, 3)):
        session.feed(ids_of(length, turn))
        text += ids_of(length, turn)
        answer = said(session, 9, sampling)
        assert answer == made.generate([text], 9, sampling, ())[0].ids
        text += answer
        assert session.ids == text


def test_an_answer_that_was_cut_short_is_part_of_the_text_as_far_as_it_came(
    made: Generator,
) -> None:
    greedy = SAMPLINGS["greedy"]
    session = Session(made)
    session.feed(ids_of(5))
    pieces = session.stream(40, greedy, ())
    heard = next(pieces).ids + next(pieces).ids
    del pieces
    assert session.ids == ids_of(5) + heard
    session.feed(ids_of(3))
    again = ids_of(5) + heard + ids_of(3)
    assert said(session, 9, greedy) == made.generate([again], 9, greedy, ())[0].ids


def test_a_turn_reads_its_own_tokens_only(made: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = []
    right = continuous_batch.prefill
    monkeypatch.setattr(
        continuous_batch, "prefill", lambda *args: chunks.append(args[4]) or right(*args)
    )
    session = Session(made)
    session.feed(ids_of(41))
    said(session, 5, SAMPLINGS["greedy"])
    assert len(chunks) == 10  # 40 tokens, and the last is read by decoding
    chunks.clear()
    session.feed(ids_of(4))
    said(session, 5, SAMPLINGS["greedy"])
    assert len(chunks) == 1  # the last of the answer, and three of the four


def test_what_is_fed_in_pieces_is_read_as_one(made: Generator) -> None:
    greedy = SAMPLINGS["greedy"]
    session = Session(made)
    for part in (ids_of(3), [], ids_of(2)):
        session.feed(part)
    assert said(session, 5, greedy) == made.generate([ids_of(3) + ids_of(2)], 5, greedy, ())[0].ids


def test_after_a_reset_nothing_is_left(made: Generator) -> None:
    greedy = SAMPLINGS["greedy"]
    session = Session(made)
    session.feed(ids_of(9))
    said(session, 9, greedy)
    session.reset()
    assert session.ids == []
    session.feed(ids_of(5))
    assert said(session, 9, greedy) == made.generate([ids_of(5)], 9, greedy, ())[0].ids


def test_a_context_that_is_full_ends_the_text(tiny: MistralConfig) -> None:
    full = dataclasses.replace(tiny, sliding_window=None)
    session = Session(Generator(random_model(full), chunk=4, context=12))
    assert session.room == 12
    session.feed(ids_of(5))
    assert [p.stopped for p in session.stream(40, SAMPLINGS["greedy"], ())][-1] == "context"
    assert (len(session.ids), session.room) == (12, 0)
    with pytest.raises(BadInput, match="the prompt has 13 tokens and the context 12"):
        session.feed([1])


def test_nothing_can_be_said_before_anything_was_fed(made: Generator) -> None:
    session = Session(made)
    with pytest.raises(BadInput, match="a prompt has no tokens"):
        next(session.stream(4))
    with pytest.raises(BadInput, match="97 is not an id"):
        session.feed([97])


@pytest.fixture(scope="module")
def talking(tiny: MistralConfig) -> Generator:
    config = dataclasses.replace(tiny, vocab_size=32_000, n_layers=1)
    return Generator(random_model(config), Tokenizer.mistral_v1(), chunk=16)


@pytest.mark.parametrize(("chunk", "draft"), [(16, 0), (4, 0), (16, 3)])
def test_after_a_stop_text_the_text_goes_on_as_if_nothing_had_followed(
    talking: Generator, chunk: int, draft: int
) -> None:
    """Whether the cache can take back what was read too much, or has to be made anew."""
    greedy, made = (
        SAMPLINGS["greedy"],
        Generator(bind(talking.config, talking.weights), talking.tokenizer, chunk=chunk),
    )
    (whole,) = made.generate([ids_of(5)], 40, greedy, ())
    stop = whole.text[30:34]
    session = Session(made, draft)
    session.feed(ids_of(5))
    answer = join(list(session.stream(40, greedy, (), stop)))
    assert (answer.text, answer.stopped) == (whole.text.partition(stop)[0], "stop")
    assert session.ids == ids_of(5) + answer.ids
    text = session.ids + ids_of(3)
    session.feed(ids_of(3))
    assert said(session, 9, greedy) == made.generate([text], 9, greedy, ())[0].ids


def test_a_text_is_taken_back_to_a_length(made: Generator) -> None:
    greedy = SAMPLINGS["greedy"]
    session = Session(made)
    session.feed(ids_of(9))
    said(session, 30, greedy)
    for length in (37, 12):  # a little, and more than the ring remembers
        session.reset(length)
        assert len(session.ids) == length
        text = [*session.ids]
        assert said(session, 9, greedy) == made.generate([text], 9, greedy, ())[0].ids
