"""Tokens that are made once, batches that depend on the step alone, each token scored once."""

import dataclasses
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lechat_jax.data import batches as data
from lechat_jax.data import token_cache
from lechat_jax.data.batches import Batches, load_tokens
from lechat_jax.data.corpus import Corpus, Document, load_corpus
from lechat_jax.data.held_out import interim_rows, score_rows
from lechat_jax.data.token_cache import HEADER
from lechat_jax.errors import BadInput
from lechat_jax.tokenizer.tokenizer import Tokenizer

TOKENIZER = Tokenizer.mistral_v1()
CORPUS = Corpus(
    name="three pieces",
    train=(Document("Hello", ends=False), Document("world caf\u00e9\n")),
    val=(Document("Hello Hello"), Document("caf\u00e9", ends=False)),
    n_bytes=33,
    sha256="not looked at",
)
BOS, EOS, HELLO = 1, 2, 22557


@pytest.fixture
def tokenises_no_more(monkeypatch: pytest.MonkeyPatch):
    def forbid() -> None:
        def encode_batch(self: Tokenizer, texts: list[str]) -> None:
            raise AssertionError("tokenised again")

        monkeypatch.setattr(Tokenizer, "encode_batch", encode_batch)

    return forbid


# --- the streams ---


def test_each_piece_starts_with_bos_and_each_document_ends_with_eos(tmp_path: Path) -> None:
    tokens = load_tokens(CORPUS, TOKENIZER, tmp_path)
    world, cafe = TOKENIZER.encode("world caf\u00e9\n"), TOKENIZER.encode("caf\u00e9")
    assert tokens.train.tolist() == [BOS, HELLO, BOS, *world, EOS]
    assert tokens.val.tolist() == [BOS, HELLO, HELLO, EOS, BOS, *cafe]
    assert tokens.train.dtype == tokens.val.dtype == np.uint16
    assert tokens.val_bytes == 11 + 5
    assert (tokens.name, tokens.n_bytes, tokens.sha256) == ("three pieces", 33, "not looked at")
    assert (tokens.cached, tokens.note) == (False, "")


def test_a_large_vocabulary_needs_larger_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TOKENIZER, "vocab_size", 65_537)
    assert load_tokens(CORPUS, TOKENIZER, tmp_path).train.dtype == np.uint32
    monkeypatch.setattr(TOKENIZER, "vocab_size", 65_536)
    assert load_tokens(CORPUS, TOKENIZER, tmp_path / "other").train.dtype == np.uint16


def test_progress_counts_bytes_up_to_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "GROUP", 6)
    seen: list[tuple[int, int]] = []
    tokens = load_tokens(CORPUS, TOKENIZER, tmp_path, lambda *at: seen.append(at))
    assert seen == [(17, 33), (28, 33), (33, 33)]
    assert tokens.train.tolist() == load_tokens(CORPUS, TOKENIZER, tmp_path / "b").train.tolist()


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_corpus_with_nothing_in_one_part_is_refused(tmp_path: Path, part: str) -> None:
    corpus = dataclasses.replace(CORPUS, **{part: ()})
    with pytest.raises(BadInput, match="three pieces is too short") as caught:
        load_tokens(corpus, TOKENIZER, tmp_path)
    assert "0 " in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_file_of_a_few_words_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("just a few words")
    with pytest.raises(BadInput, match="give a longer text"):
        load_tokens(load_corpus(str(tmp_path / "a.txt")), TOKENIZER, tmp_path)


# --- the cache ---


def test_the_second_call_reads_the_cache(tmp_path: Path, tokenises_no_more) -> None:
    first = load_tokens(CORPUS, TOKENIZER, tmp_path)
    tokenises_no_more()
    second = load_tokens(CORPUS, TOKENIZER, tmp_path)
    assert second.cached
    assert isinstance(second.train, np.memmap)
    assert second.train.tolist() == first.train.tolist()
    assert second.val.tolist() == first.val.tolist()
    unlike = {field.name for field in dataclasses.fields(first)} - {"train", "val", "cached"}
    assert all(getattr(first, name) == getattr(second, name) for name in unlike)


def test_calls_at_the_same_time_agree_and_the_next_uses_the_cache(
    tmp_path: Path, tokenises_no_more
) -> None:
    found: list[data.Tokens] = []
    threads = [
        threading.Thread(target=lambda: found.append(load_tokens(CORPUS, TOKENIZER, tmp_path)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len({(*tokens.train.tolist(), *tokens.val.tolist()) for tokens in found}) == 1
    tokenises_no_more()
    assert load_tokens(CORPUS, TOKENIZER, tmp_path).cached
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "changed",
    [
        dataclasses.replace(CORPUS, train=CORPUS.val, val=CORPUS.train),
        dataclasses.replace(CORPUS, train=(Document("Hello"), CORPUS.train[1])),
        dataclasses.replace(
            CORPUS, train=(Document("Hell", ends=False), Document("oworld caf\u00e9\n"))
        ),
        dataclasses.replace(CORPUS, val=CORPUS.val[:1]),
        dataclasses.replace(CORPUS, train=CORPUS.train[:1], val=(CORPUS.train[1], *CORPUS.val)),
    ],
    ids=["other split", "ends elsewhere", "cut elsewhere", "shorter", "other border"],
)
def test_another_corpus_has_another_cache(tmp_path: Path, changed: Corpus) -> None:
    load_tokens(CORPUS, TOKENIZER, tmp_path / "one")
    tokens = load_tokens(changed, TOKENIZER, tmp_path / "one")
    assert not tokens.cached
    assert tokens.note == ""
    alone = load_tokens(changed, TOKENIZER, tmp_path / "other")
    assert tokens.train.tolist() == alone.train.tolist()
    assert tokens.val.tolist() == alone.val.tolist()
    assert load_tokens(CORPUS, TOKENIZER, tmp_path / "one").cached


def test_another_tokenizer_has_another_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_tokens(CORPUS, TOKENIZER, tmp_path)
    monkeypatch.setattr(TOKENIZER, "sha256", "another")
    assert not load_tokens(CORPUS, TOKENIZER, tmp_path).cached


def test_another_format_has_another_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_tokens(CORPUS, TOKENIZER, tmp_path)
    monkeypatch.setattr(data, "FORMAT", data.FORMAT + 1)
    assert not load_tokens(CORPUS, TOKENIZER, tmp_path).cached


def test_a_damaged_cache_is_made_again_and_the_fact_is_told(tmp_path: Path) -> None:
    good = load_tokens(CORPUS, TOKENIZER, tmp_path).train.tolist()
    (file,) = tmp_path.iterdir()
    raw = bytearray(file.read_bytes())
    raw[HEADER + 2] ^= 1
    file.write_bytes(raw)
    again = load_tokens(CORPUS, TOKENIZER, tmp_path)
    assert again.train.tolist() == good
    assert not again.cached
    assert again.note == (
        f"the cached tokens were damaged ({file}: wrong checksum) and have been made again"
    )
    after = load_tokens(CORPUS, TOKENIZER, tmp_path)
    assert (after.cached, after.note) == (True, "")


def test_a_folder_that_cannot_be_written_does_not_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    tokens = load_tokens(CORPUS, TOKENIZER, tmp_path / "file" / "cache")
    assert tokens.train.tolist() == load_tokens(CORPUS, TOKENIZER, tmp_path).train.tolist()
    assert not tokens.cached
    assert "could not be kept" in tokens.note
    assert "Not a directory" in tokens.note


def test_no_cache_folder_at_all_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LECHAT_CACHE", str(tmp_path / "file"))
    tokens = load_tokens(CORPUS, TOKENIZER)
    assert tokens.val.tolist()[:2] == [BOS, HELLO]
    assert str(tmp_path / "file") in tokens.note


def test_a_cache_in_a_folder_that_cannot_be_written_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_tokens(CORPUS, TOKENIZER, tmp_path)

    def read_only(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(token_cache, "write_arrays", read_only)
    tokens = load_tokens(CORPUS, TOKENIZER, tmp_path)
    assert (tokens.cached, tokens.note) == (True, "")


def test_the_cache_lies_below_the_user_s_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LECHAT_CACHE", str(tmp_path / "mine"))
    load_tokens(CORPUS, TOKENIZER)
    assert [path.suffix for path in (tmp_path / "mine" / "tokens").iterdir()] == [".tokens"]


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
    tokens, counted, _ = score_rows(val, block, BOS)
    assert counted is not None
    assert tokens.shape[1] == block + 1
    assert not counted[:, 0].any()
    assert tokens[counted].tolist() == val[val != BOS].tolist()
    before = tokens[:, :-1][counted[:, 1:]]
    assert before.tolist() == val[:-1][val[1:] != BOS].tolist(), "what came before"
    assert len(tokens) * block - (len(val) - 1) < block, "no more rows than needed"


def test_the_last_row_is_filled_up() -> None:
    tokens, counted, _ = score_rows(np.array([1, 5, 6, 2, 1, 7]), 4, BOS)
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
