"""Rows of a batch come and go, and none of them can be told from one that is alone."""

import dataclasses
import itertools

import numpy as np
import pytest

from lechat_jax.config import MistralConfig
from lechat_jax.generate.continuous_batch import ContinuousBatch, RowTokens
from lechat_jax.generate.loaded_model import LoadedModel
from lechat_jax.generate.sampling import Sampling
from lechat_jax.model.binding import bind, weights_of
from tests.support.models import random_model

GREEDY = Sampling(temperature=0)
ASKED = {  # row by row, and each of another kind
    0: (23, GREEDY, 17),
    1: (1, Sampling(temperature=1.3, top_k=9, seed=5), 40),
    2: (38, Sampling(temperature=0.9, top_p=0.8, seed=6), 9),
    3: (5, Sampling(temperature=0.7, min_p=0.05, seed=7), 25),
}


def prompt_of(row: int) -> list[int]:
    return np.random.default_rng(row).integers(97, size=ASKED[row][0]).tolist()


@pytest.fixture(scope="module", params=["one window", "windows and none"])
def model(request: pytest.FixtureRequest, tiny: MistralConfig) -> LoadedModel:
    windows = 5 if request.param == "one window" else (None, 5)
    config = dataclasses.replace(tiny, n_layers=2, sliding_window=windows)
    return LoadedModel(random_model(config), chunk=4, context=128)


def join(rounds: list[RowTokens]) -> RowTokens:
    return RowTokens(*(list(itertools.chain(*parts)) for parts in zip(*rounds, strict=True)))


def alone(model: LoadedModel, n_rows: int, row: int, draft: int = 0) -> RowTokens:
    """What a row says when nobody else is there."""
    batch, (_, sampling, limit) = model.continuous_batch(n_rows, draft), ASKED[row]
    batch.admit(row, prompt_of(row), limit, sampling, stream=row)
    batch.read_all()
    return finish(batch, row)


def finish(batch: ContinuousBatch, row: int) -> RowTokens:
    made = []
    while not made or made[-1].ids:
        made.append(batch.advance(8)[row])
    return join(made)


@pytest.mark.parametrize("steps", [1, 3, 64])
def test_a_row_is_bit_for_bit_what_it_is_alone(model: LoadedModel, steps: int) -> None:
    """Whoever joins, is being read or leaves meanwhile, and however many steps a call takes."""
    batch = model.continuous_batch(4)
    waiting, made = [*ASKED], {row: list[RowTokens]() for row in ASKED}
    while waiting or any(not rounds or rounds[-1].ids for rounds in made.values()):
        if waiting:
            row = waiting.pop()
            batch.admit(row, prompt_of(row), ASKED[row][2], ASKED[row][1], stream=row)
        batch.read()  # one chunk, between two calls of the others
        for row, piece in enumerate(batch.advance(steps)):
            made[row] += [piece] if piece.ids or made[row] else []
    for row, rounds in made.items():
        assert join(rounds) == alone(model, 4, row)


def test_a_short_prompt_is_read_beside_a_long_one(model: LoadedModel) -> None:
    """Of chunks of 4 tokens the long one gets every second, and all when it is alone again."""
    batch = model.continuous_batch(4)
    batch.admit(0, [1] * 25, 1, GREEDY)
    order = [batch.read()]
    batch.admit(1, [1] * 9, 1, GREEDY)
    batch.admit(2, [1] * 5, 1, GREEDY)
    while read := batch.read():
        order.append(read)
    assert [read.row for read in order if read] == [0, 2, 0, 1, 0, 1, 0, 0, 0]


def test_a_row_that_was_used_is_as_good_as_new(model: LoadedModel) -> None:
    batch = model.continuous_batch(4)
    for row in ASKED:
        batch.admit(row, prompt_of(3 - row), 30, GREEDY)
    batch.read_all()
    batch.advance(20)
    for row, (_, sampling, limit) in ASKED.items():
        batch.free(row)
        batch.admit(row, prompt_of(row), limit, sampling, stream=row)
        batch.read_all()
        assert finish(batch, row) == alone(model, 4, row)


def test_a_row_that_is_done_writes_nothing_into_who_comes_next(model: LoadedModel) -> None:
    """It repeats its last step for as long as others decode, and its prompt is read meanwhile."""
    batch = model.continuous_batch(4)
    batch.admit(0, prompt_of(2), 3, GREEDY)
    batch.admit(1, prompt_of(1), 100, GREEDY)
    batch.read_all()
    batch.advance(5)
    limit, sampling = ASKED[0][2], ASKED[0][1]
    batch.admit(0, prompt_of(0), limit, sampling, stream=0)
    made = []
    while batch.read():
        made.append(batch.advance(1)[0])
    assert join([*made, finish(batch, 0)]) == alone(model, 4, 0)


def test_what_is_no_number_does_not_outlive_its_row(tiny: MistralConfig) -> None:
    """A value of NaN has weight 0 under a mask, and 0 times NaN is NaN."""
    weights = weights_of(random_model(tiny))
    weights["embed.kernel"] = weights["embed.kernel"].at[96].set(np.nan)
    model = LoadedModel(bind(tiny, weights), chunk=4)
    batch = model.continuous_batch(2)
    batch.admit(0, [5, 96, 7, 8], 5, GREEDY)
    batch.admit(1, [5, 6], 5, GREEDY)
    batch.read_all()
    broken, right = batch.advance(2)
    assert np.isnan(broken.logprobs).all()
    assert np.isfinite(right.logprobs).all()
    batch.free(0)
    batch.admit(0, [5, 6], 2, GREEDY)
    batch.read_all()
    assert batch.advance(2)[0] == right


@pytest.mark.parametrize("when", ["waiting", "half read", "decoding"])
def test_a_row_that_is_freed_makes_nothing_more(model: LoadedModel, when: str) -> None:
    batch = model.continuous_batch(4)
    batch.admit(0, prompt_of(0), 17, GREEDY, stream=0)
    batch.read_all()
    batch.admit(2, prompt_of(2), 9, GREEDY)
    made = [batch.advance(2)]
    if when == "half read":
        batch.read()
    if when == "decoding":
        batch.read_all()
        made.append(batch.advance(2))
    batch.free(2)
    assert (batch.unread, batch.lengths[2]) == (0, 0)
    assert batch.read() is None
    made.append(batch.advance(64))
    assert made[-1][2].ids == []
    assert join([row[0] for row in made]) == alone(model, 4, 0)


def test_rows_that_guess_say_what_they_say_alone(model: LoadedModel) -> None:
    """Guesses are the batch's, whose rows may be read to different lengths or free."""
    batch = model.continuous_batch(4, draft=3)
    made = {row: list[RowTokens]() for row in (0, 2)}
    for row in made:
        batch.admit(row, prompt_of(row) * 2, 30, GREEDY)
        batch.read_all()
        pieces = batch.advance(3)
        for other in made:
            made[other].append(pieces[other])
    while any(rounds[-1].ids for rounds in made.values()):
        for row, piece in enumerate(batch.advance(3)):
            if row in made:
                made[row].append(piece)
    for row, rounds in made.items():
        single = model.continuous_batch(1)
        single.admit(0, prompt_of(row) * 2, 30, GREEDY)
        single.read_all()
        assert join(rounds).ids == finish(single, 0).ids


def test_an_end_is_that_of_its_row_alone(model: LoadedModel) -> None:
    batch = model.continuous_batch(2)
    said = alone(model, 2, 0).ids
    batch.admit(0, prompt_of(0), 17, GREEDY, eos_ids=[said[4]])
    batch.admit(1, prompt_of(0), 17, GREEDY)
    batch.read_all()
    ended, other = batch.advance(64)
    assert ended.ids == said[: said.index(said[4]) + 1]
    assert other.ids == said
