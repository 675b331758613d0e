"""Mistral's SentencePiece tokenizers, versions 1 to 7: BPE with byte fallback."""

import codecs
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from jaxtyping import Int32

from lechat_jax.errors import BadInput

LONG_TEXT = 32_768  # characters given to one thread at a time, ends of lines permitting

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
        """The ids of each text.

        Long texts are split for the threads before a newline: it is a byte piece, which no merge
        crosses. The space that SentencePiece puts before each part is dropped again.
        """
        parts = [_parts(text) for text in texts]
        flat = [part for group in parts for part in group]
        threads = num_threads or os.cpu_count() or 1
        encoded = iter(self._pieces.encode(flat, num_threads=threads))
        prefix = len(self.encode("\n")) - 1
        return [
            np.concatenate(
                [np.array(next(encoded)[prefix * (i > 0) :], np.int32) for i in range(len(group))]
            )
            for group in parts
        ]

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


def _parts(text: str) -> list[str]:
    """Splits a text before newlines into parts of about `LONG_TEXT` characters."""
    parts, start = [], 0
    while len(text) - start > LONG_TEXT:
        end = text.rfind("\n", start + 1, start + LONG_TEXT)
        if end < 0:
            end = text.find("\n", start + LONG_TEXT)
        if end < 0:
            break
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]
