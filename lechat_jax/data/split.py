"""Train/validation split of text: which documents or blocks are held out. Standard library only."""

import itertools
from collections.abc import Sequence

from lechat_jax.data.sources import Document

EVERY = 10  # every tenth document or block is validation
ENOUGH = 8_000_000  # bytes of validation text, which more documents are not held out for
BLOCK = 4096  # characters; about 4 KiB of English
FEWEST_BLOCKS = 20  # of a short text, so that two of them are validation


def split_few(texts: Sequence[str]) -> list[tuple[Document, bool]]:
    """Train/validation split of fewer than ten texts: pieces in order, each with if it is held out.

    They are cut into blocks of about 4 KiB, at the end of a line or else of a word, and every
    tenth block is held out; training blocks between two of those stay one piece. A short text has
    smaller blocks, 20 or more.

    >>> [(piece.text, held) for piece, held in split_few(["a b c d e f g h i j k l"])]
    [('a b c d e f g h i ', False), ('j ', True), ('k l', False)]
    """
    pieces, counter = [], itertools.count(1)
    for blocks in _blocks(texts):
        flagged = [(block, next(counter) % EVERY == 0) for block in blocks]
        runs = [(held, list(run)) for held, run in itertools.groupby(flagged, lambda x: x[1])]
        for i, (held, run) in enumerate(runs):
            text = "".join(block for block, _ in run)
            pieces.append((Document(text, ends=i == len(runs) - 1), held))
    return pieces


def held_out_every(n_documents: int, n_bytes: int) -> int:
    """Of how many documents one is held out: of ten, and of more where a tenth is a lot of text.

    >>> held_out_every(1000, 5_000_000), held_out_every(10_000_000, 10_000_000_000)
    (10, 1250)
    """
    return min(n_documents, max(EVERY, -(-n_bytes // ENOUGH)))


def _blocks(texts: Sequence[str]) -> list[list[str]]:
    """Cuts each text into blocks, small enough to be 20 in all, if there are enough words."""
    total = sum(map(len, texts))
    size = BLOCK if total >= EVERY * BLOCK else max(1, total // FEWEST_BLOCKS)
    while True:
        blocks = [_cut(text, size) for text in texts]
        if size in (1, BLOCK) or sum(map(len, blocks)) >= FEWEST_BLOCKS:
            return blocks
        size //= 2  # long words have made some blocks longer than asked


def _cut(text: str, size: int) -> list[str]:
    """Cuts a text into consecutive blocks of at most `size` characters, between words."""
    blocks, start = [], 0
    while start < len(text):
        end = _block_end(text, start, size)
        blocks.append(text[start:end])
        start = end
    return blocks


def _block_end(text: str, start: int, size: int) -> int:
    """End of a block: after a line in its second half, else after a word.

    White space stays with the word before it, so that the next block starts with a word. Text
    of 4 KiB without white space (Chinese, base64) is cut anyway.
    """
    target = start + size
    if target >= len(text):
        return len(text)
    if (newline := text.rfind("\n", start + size // 2, target)) >= 0:
        return newline + 1
    longest = min(len(text), start + BLOCK)
    for end in (*range(target, start, -1), *range(target + 1, longest)):
        if text[end - 1].isspace():
            return end
    return longest
