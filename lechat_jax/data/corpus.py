"""Text corpus, split into training text and a held-out tenth. Standard library only."""

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence

from lechat_jax.data.sources import find_texts
from lechat_jax.errors import BadInput

EVERY = 10  # every tenth document or block is validation
BLOCK = 4096  # characters; about 4 KiB of English
FEWEST_BLOCKS = 20  # of a short text, so that two of them are validation


@dataclasses.dataclass(frozen=True)
class Document:
    """A document, or a piece of one.

    Attributes:
        text: the text, never empty.
        ends: whether its end is the document's end, so that EOS follows.
    """

    text: str
    ends: bool = True


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A corpus of text, split into training and held-out documents.

    Attributes:
        name: name of the text, for display.
        train: training pieces.
        val: held-out pieces, spread over all of the text.
        n_bytes: UTF-8 bytes of all of the text.
        sha256: digest of all of the text in order, without separators: that of `sha256sum` for
            a text file, or for the sorted text files of a folder through `cat`.
        n_files: number of files; 0 if there are none.
        notes: messages to the user, a sentence each.
    """

    name: str
    train: tuple[Document, ...]
    val: tuple[Document, ...]
    n_bytes: int
    sha256: str
    n_files: int = 0
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> str:
        """Number of files, documents and bytes, in words."""
        n = sum(piece.ends for piece in (*self.train, *self.val))
        return in_words(self.n_files, n, "document", self.n_bytes)


def in_words(n_files: int, n: int, what: str, n_bytes: int) -> str:
    """Formats the size of training data: files, documents or examples, bytes.

    >>> in_words(1, 1200, "document", 345678), in_words(0, 1, "document", 9)
    ('1 file, 1,200 documents, 345,678 bytes', '1 document, 9 bytes')
    """
    counted = [f"{k:,} {noun}{'' if k == 1 else 's'}" for k, noun in ((n_files, "file"), (n, what))]
    return ", ".join([*counted[not n_files :], f"{n_bytes:,} bytes"])


def load_corpus(data: str | None) -> Corpus:
    """Loads the text that `data` names (see `sources.find_texts`) and splits it by `split`.

    Empty documents are dropped.

    Raises:
        BadInput: there is no such text, or it is unreadable, not UTF-8, or empty.
    """
    found = find_texts(data)
    texts = [text for text in found.documents if text]
    if not any(text.strip() for text in texts):
        raise BadInput(f"{found.name} is empty; give --data a text to learn from")
    digest, n_bytes = hashlib.sha256(), 0
    for text in texts:
        raw = text.encode()
        digest.update(raw)
        n_bytes += len(raw)
    pieces = split(texts)
    return Corpus(
        name=found.name,
        train=tuple(piece for piece, held_out in pieces if not held_out),
        val=tuple(piece for piece, held_out in pieces if held_out),
        n_bytes=n_bytes,
        sha256=digest.hexdigest(),
        n_files=found.n_files,
        notes=found.notes,
    )


def split(texts: Sequence[str]) -> list[tuple[Document, bool]]:
    """Train/validation split of texts: their pieces in order, each with whether it is held out.

    Of ten documents or more, every tenth is held out, and with it all duplicates: a scored
    text is never trained on. Fewer documents are cut into blocks of about 4 KiB, at the end
    of a line or else of a word, and every tenth block is held out; training blocks between
    two of those stay one piece. A short text has smaller blocks, 20 or more.

    >>> [(piece.text, held) for piece, held in split(["a b c d e f g h i j k l"])]
    [('a b c d e f g h i ', False), ('j ', True), ('k l', False)]
    """
    if len(texts) >= EVERY:
        held = set(texts[EVERY - 1 :: EVERY])
        return [(Document(text), text in held) for text in texts]
    pieces, counter = [], itertools.count(1)
    for blocks in _blocks(texts):
        flagged = [(block, next(counter) % EVERY == 0) for block in blocks]
        runs = [(held, list(run)) for held, run in itertools.groupby(flagged, lambda x: x[1])]
        for i, (held, run) in enumerate(runs):
            text = "".join(block for block, _ in run)
            pieces.append((Document(text, ends=i == len(runs) - 1), held))
    return pieces


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
