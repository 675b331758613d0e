"""Mistral's SentencePiece tokenizers, versions 1 to 7: BPE with byte fallback."""

import codecs
import functools
import os
import re
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from jaxtyping import Int32

from lechat_jax.errors import BadInput

SPACE = "\u2581"  # how SentencePiece writes a space in its pieces
MOST_WORDS = 1 << 19  # in the cache, some 100 MB; rarer ones are encoded each time
LONGEST_WORD = 64  # characters of a word that is kept
_WORD = re.compile(r" +[^ \n]*|\n[^ \n]*")
# What normalisation other than the identity would change: spaces, a ligature, a combining accent.
_PROBE = " a  b\t\u00a0\ufb01e\u0301\u3000A "

# The control piece that each version added. mistral-common goes by the file's name instead,
# but Hugging Face's `tokenizer.model` has no version in it.
MARKS = {"v7": "[SYSTEM_PROMPT]", "v3": "[PREFIX]", "v2": "[INST]"}


def _one_by_one(error: UnicodeError) -> tuple[str, int]:
    """Decodes one invalid byte to U+FFFD and goes on after it, as SentencePiece does."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd", error.start + 1


codecs.register_error("lechat.one_by_one", _one_by_one)


class SentencePiece:
    """A SentencePiece model with byte fallback; for its methods see `Tokenizer`."""

    broken = "lechat.one_by_one"

    def __init__(self, path: Path, content: bytes) -> None:
        try:
            pieces = sentencepiece.SentencePieceProcessor(model_proto=content or b"?")
        except RuntimeError as error:
            raise BadInput(f"{path} is not a SentencePiece model") from error
        self._path, self._pieces = path, pieces
        self.vocab_size: int = pieces.vocab_size()
        self.bos_id: int = pieces.bos_id()
        self.eos_id: int = pieces.eos_id()
        ids = [pieces.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self.byte_of = {id_: byte for byte, id_ in enumerate(ids) if pieces.is_byte(id_)}
        self._letter = ids[ord("a")]
        if len(self.byte_of) < 256 or min(self.bos_id, self.eos_id) < 0:
            raise BadInput(
                f"{path} has no byte fallback or no ids for start and end, "
                "so it is no tokenizer of Mistral's"
            )
        marked = (v for v, mark in MARKS.items() if pieces.is_control(pieces.piece_to_id(mark)))
        self.version = next(marked, "v1")

    @functools.cached_property
    def _words(self) -> "_Words | None":
        """The cache of words; `None` where the ids of a text are not those of its words."""
        return _Words(self._pieces) if _is_cut_at_words(self._pieces) else None

    @property
    def file_name(self) -> str:
        """Mistral's file name for this version; v7m1 differs from v7 only for images."""
        name = f"tokenizer.model.{self.version}"
        return self._path.name if self._path.name.startswith(f"{name}m") else name

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return self._pieces.encode(text)

    def encode_after(self, text: str) -> list[int]:
        """The ids of a text that follows another text: without SentencePiece's leading space."""
        return self.encode(f"\n{text}")[
            len(self.encode("\n")) :
        ]  # a byte, which nothing merges with

    def encode_batch(
        self, texts: Sequence[str], num_threads: int
    ) -> list[Int32[np.ndarray, "..."]]:
        """The ids of each text, word by word from a cache, or in threads where words do not do."""
        if self._words is None or any(SPACE in text for text in texts):
            threads = num_threads or os.cpu_count() or 1
            found = self._pieces.encode([*texts], num_threads=threads)
            return [np.array(ids, np.int32) for ids in found]
        return [np.frombuffer(self._words.encode(text), np.int32) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """The text of the ids."""
        return self._pieces.decode(ids)

    def raw(self, id_: int) -> bytes | None:
        """The byte of a byte-fallback id; `None` for any other."""
        byte = self.byte_of.get(id_)
        return None if byte is None else bytes([byte])

    def text(self, id_: int, first: bool) -> str:
        """The text of one id; the `first` id of a text lacks SentencePiece's leading space."""
        if first:
            return self.decode([id_])
        return self.decode([self._letter, id_])[1:]  # any byte before it makes it not the first

    def control_id(self, name: str) -> int | None:
        """The id of a control token; `None` if there is none."""
        id_ = self._pieces.piece_to_id(name)
        return id_ if self._pieces.is_control(id_) else None

    def is_control(self, id_: int) -> bool:
        """Whether the id has no text, so that the id after it still counts as the first."""
        return self._pieces.is_control(id_)


def _is_cut_at_words(pieces: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether the ids of a text are those of its words, each with the spaces before it, in a row.

    So it is where no piece spans two words or holds an end of line, since then no merge does, and
    where the text is not changed before. It holds for all of Mistral's tokenizers.
    """
    spelled = (pieces.id_to_piece(id_) for id_ in range(pieces.vocab_size()))
    if any(re.search(f"[ \n]|[^{SPACE}]{SPACE}", piece) for piece in spelled):
        return False
    return pieces.normalize(_PROBE) == f" {_PROBE}".replace(" ", SPACE)


class _Words(dict[str, bytes]):
    """The ids of a text, as the bytes of int32, from a cache of the ids of its words.

    A word has one space before it, or begins with a space for each further one, or with the end of
    line before it. What was not asked for before is added.
    """

    def __init__(self, pieces: sentencepiece.SentencePieceProcessor) -> None:
        self._pieces, self._before = pieces, len(pieces.encode("\n"))

    def encode(self, text: str) -> bytes:
        """The ids of a text, before which SentencePiece puts a space."""
        if not text:
            return b""
        if "  " in text or text[0] == " ":
            words = [word.removeprefix(" ") for word in _WORD.findall(f" {text}")]
        else:
            words = text.replace("\n", " \n").split(" ")
        return b"".join(map(self.__getitem__, words))

    def __missing__(self, word: str) -> bytes:
        # Behind a byte, which nothing merges with, there is no space that SentencePiece adds.
        space = "" if word[:1] == "\n" else " "
        ids = self._pieces.encode(f"\n{space}{word}")[self._before :]
        found = array("i", ids).tobytes()
        if len(self) < MOST_WORDS and len(word) <= LONGEST_WORD:
            self[word] = found
        return found
