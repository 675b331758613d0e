"""Text to Mistral's token ids and back, a stream at a time."""

import codecs
import hashlib
import importlib.util
import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import sentencepiece
from jaxtyping import Int32

from lechat_jax.errors import BadInput

FILE_NAME = "tokenizer.model.v1"
LONG_TEXT = 32_768  # characters given to one thread at a time, ends of lines permitting


class Tokenizer:
    """A SentencePiece model with byte fallback, so that every text has tokens.

    A text gets a space put before it, which `decode` takes away again: `decode(encode(s))`
    is `s`, unless `s` holds U+2581, the sign SentencePiece itself writes for a space.

    Attributes:
        path: the model file it was read from.
        sha256: of that file.
        vocab_size: number of ids V.
        bos_id: id that starts a document.
        eos_id: id that ends one.
        byte_of: the byte that an id stands for, for the 256 ids that stand for one.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._model = path.read_bytes()
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=self._model or b"?")
        except OSError as error:
            raise BadInput(
                f"cannot read the tokenizer {path}: {error.strerror or error}"
            ) from error
        except RuntimeError as error:
            raise BadInput(f"{path} is not a SentencePiece model") from error
        self.path = path
        self.sha256 = hashlib.sha256(self._model).hexdigest()
        self.vocab_size: int = self._pieces.vocab_size()
        self.bos_id: int = self._pieces.bos_id()
        self.eos_id: int = self._pieces.eos_id()
        ids = [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self.byte_of = {id_: byte for byte, id_ in enumerate(ids) if self._pieces.is_byte(id_)}
        self._letter = ids[ord("a")]
        if len(self.byte_of) < 256 or min(self.bos_id, self.eos_id) < 0:
            raise BadInput(
                f"{path} has no byte fallback or no ids for start and end, "
                "so it is no tokenizer of Mistral's"
            )

    @classmethod
    def mistral_v1(cls) -> "Tokenizer":
        """The tokenizer of Mistral-7B v0.1, 32,000 ids, from the file in `mistral_common`.

        Found without importing that package, which would take half a second.

        Raises:
            BadInput: the package is not installed or no longer has the file.
        """
        spec = importlib.util.find_spec("mistral_common")
        for folder in (spec and spec.submodule_search_locations) or ():
            if (path := Path(folder, "data", FILE_NAME)).is_file():
                return cls(path)
        raise BadInput(f"{FILE_NAME} is not installed: pip install mistral-common")

    @classmethod
    def from_file(cls, path: Path | str) -> "Tokenizer":
        """The tokenizer in a SentencePiece model file.

        Raises:
            BadInput: there is no such file, or it holds something else.
        """
        return cls(Path(path))

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without BOS and EOS; control pieces spelled in it stay text.

        Raises:
            BadInput: the text holds half a character pair, as undecodable bytes become.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"character {error.start} of the text is not Unicode") from error
        return self._pieces.encode(text)

    def encode_batch(
        self, texts: Sequence[str], num_threads: int = 0
    ) -> list[Int32[np.ndarray, "..."]]:
        """The ids of each text, equal to `encode`, on `num_threads` threads (0: all cores).

        Long texts are cut for the threads, before a line end: that is a byte piece, which no
        merge crosses. What SentencePiece puts before it, because a text seems to start
        there, is dropped again.
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

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of the ids; control ids have none, a broken byte is U+FFFD.

        Raises:
            BadInput: an id is not in the vocabulary.
        """
        return self._pieces.decode([self._known(id_) for id_ in ids])

    def piece_text(self, id_: SupportsIndex, first: bool) -> str:
        """The text of one id; as the `first` of a text it lacks the space put before that.

        Raises:
            BadInput: the id is not in the vocabulary.
        """
        if first:
            return self.decode([id_])
        return self.decode([self._letter, id_])[1:]  # any byte before it makes it not the first

    def is_control(self, id_: SupportsIndex) -> bool:
        """Whether the id has no text and leaves the next one first (BOS, EOS)."""
        return self._pieces.is_control(self._known(id_))

    def save(self, folder: Path) -> Path:
        """The model file, copied into the folder under Mistral's name for it.

        Raises:
            OSError: the folder cannot be written.
        """
        path = folder / FILE_NAME
        beside = folder / f".{FILE_NAME}.{os.getpid()}"
        try:
            beside.write_bytes(self._model)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        return path

    def _known(self, id_: SupportsIndex) -> int:
        """The id as a plain integer, which must be in the vocabulary."""
        known = operator.index(id_)
        if not 0 <= known < self.vocab_size:
            raise BadInput(
                f"id {known} is not in the tokenizer's vocabulary of {self.vocab_size}; "
                "this model has another tokenizer"
            )
        return known


class StreamDecoder:
    """The text of ids that arrive a few at a time, each character as soon as it is certain.

    The pushes and the `flush` at the end together are `decode` of all ids. Bytes are held
    until they are a character, or can no longer become one and are U+FFFD each, so a prefix
    of the output is never a broken character. Work and memory per id are constant.

    Args:
        prefix_ids: what came before, such as a prompt; its text is not given again, but the
            text after it keeps its leading space, and a character it began is completed.

    >>> tokenizer = Tokenizer.mistral_v1()
    >>> stream = StreamDecoder(tokenizer, tokenizer.encode("The cat"))
    >>> [stream.push([id_]) for id_ in (2495, 243, 162, 155, 131)]
    [' sat', '', '', '', '😀']
    """

    def __init__(self, tokenizer: Tokenizer, prefix_ids: Iterable[SupportsIndex] = ()) -> None:
        self._tokenizer = tokenizer
        self._first = True  # no id with a text has come yet
        self._held = b""  # the start of a character; at most three bytes
        self.push(prefix_ids)

    def push(self, ids: Iterable[SupportsIndex]) -> str:
        """The text that these ids make certain; often empty, in the middle of a character.

        Raises:
            BadInput: an id is not in the vocabulary.
        """
        return "".join(map(self._push_one, ids))

    def flush(self) -> str:
        """What is still held, now that nothing follows: U+FFFD for each byte."""
        text, self._held = "\ufffd" * len(self._held), b""
        return text

    def _push_one(self, id_: SupportsIndex) -> str:
        byte = self._tokenizer.byte_of.get(operator.index(id_))
        if byte is not None:
            self._first = False
            self._held += bytes([byte])
            return self._settled()
        text = self.flush() + self._tokenizer.piece_text(id_, self._first)
        self._first = self._first and self._tokenizer.is_control(id_)
        return text

    def _settled(self) -> str:
        """The characters that the held bytes complete or can no longer complete."""
        broken = ""
        while True:
            try:
                text, n_read = codecs.utf_8_decode(self._held, "strict", False)
            except UnicodeDecodeError:  # as SentencePiece does: one byte is lost, not the rest
                broken, self._held = broken + "\ufffd", self._held[1:]
            else:
                self._held = self._held[n_read:]
                return broken + text


def _parts(text: str) -> list[str]:
    """The text in parts of about `LONG_TEXT` characters; all but the first start with a newline."""
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
