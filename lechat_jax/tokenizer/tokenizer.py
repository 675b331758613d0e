"""Mistral's tokenizer: text to token ids and back, also streaming."""

import codecs
import hashlib
import importlib.util
import json
import operator
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import SupportsIndex

import numpy as np
from jaxtyping import Int32

from lechat_jax.errors import BadInput
from lechat_jax.tokenizer.sentencepiece import SentencePiece
from lechat_jax.tokenizer.tekken import Tekken
from lechat_jax.tokenizer.vocabulary import Vocabulary, read_vocabulary

FILE_NAME = "tokenizer.model.v1"
FILES = re.compile(r"tekken\.json|tokenizer\.model(?:\.v(\d+)(?:m(\d+))?)?")
# Rows of an embedding that nothing explains, for which a tokenizer is still the model's own: it
# is padded to a multiple of some power of two. From v1 to v3 it is 768.
PADDING = 512

CONTROL = re.compile(r"(</?s>|\[/?[A-Z_]+\])")  # how control tokens are spelled in chat templates


def preferred(paths: Iterable[Path]) -> Path | None:
    """Chooses the tokenizer file among these by Mistral's file names; `None` if there is none.

    Mistral's repositories may hold several. As in mistral-common, `tekken.json` wins, and
    otherwise the newest version; mistral-inference refuses such a folder.

    >>> preferred(map(Path, ["tokenizer.model", "tokenizer.model.v3", "config.json"])).name
    'tokenizer.model.v3'
    """
    found = [(path, match) for path in paths if (match := FILES.fullmatch(path.name))]

    def rank(one: tuple[Path, re.Match[str]]) -> tuple[bool, int, int]:
        version, images = one[1].groups(default="0")
        return one[0].suffix == ".json", int(version), int(images)

    return max(found, key=rank)[0] if found else None


class Tokenizer:
    """Mistral's tokenizer of any version, SentencePiece or tekken; every text can be encoded.

    `decode(encode(s))` is `s`. SentencePiece puts a space before a text, which `decode` removes
    again, and loses U+2581, its symbol for a space; tekken does neither.

    A model may have more ids, see `beside`: added tokens, which are recognised in a text, and
    padding ids, which have no text.

    Attributes:
        path: file that it was read from.
        codec: the SentencePiece or tekken model.
        sha256: digest of that file, and of the added tokens if there are any.
        version: Mistral's version, such as "v3", which decides the chat template.
        file_name: Mistral's file name for this version.
        vocab_size: number of ids V.
        vocabulary: the ids beyond those of the file; `None` if there are none.
        starts_anew: whether the text after an added token is encoded like a text of its own.
        bos_id: id that starts a document.
        eos_id: id that ends a document.
        byte_of: byte of each of the 256 byte ids.
        broken: Python's error handler that decodes invalid bytes to U+FFFD.
    """

    def __init__(self, path: Path, vocabulary: Vocabulary | None = None) -> None:
        try:
            self._content = path.read_bytes()
        except OSError as error:
            raise BadInput(
                f"cannot read the tokenizer {path}: {error.strerror or error}"
            ) from error
        # The content decides, so that a file may have any name; ".json" is for a damaged one.
        is_json = self._content[:1] == b"{" or path.suffix == ".json"
        codec = Tekken(path) if is_json else SentencePiece(path, self._content)
        self.codec: SentencePiece | Tekken = codec
        self.path = path
        self.sha256 = hashlib.sha256(self._content).hexdigest()
        self.version, self.file_name = codec.version, codec.file_name
        self.vocab_size = codec.vocab_size
        self.bos_id, self.eos_id = codec.bos_id, codec.eos_id
        self.byte_of, self.broken = codec.byte_of, codec.broken
        self.starts_anew = True
        self._added: dict[int, str] = {}  # text of each id beyond the tokenizer's
        self._ids: dict[str, int] = {}
        self._cut = re.compile("(?!)")
        self.vocabulary: Vocabulary | None = None
        if vocabulary:
            self._grow(vocabulary)

    @classmethod
    def mistral_v1(cls) -> "Tokenizer":
        """The tokenizer of Mistral-7B v0.1, 32,000 ids, from the file in `mistral_common`.

        Raises:
            BadInput: the package is not installed or no longer has the file.
        """
        return cls.shipped(FILE_NAME)

    @classmethod
    def shipped(cls, name: str) -> "Tokenizer":
        """The tokenizer of a file in `mistral_common`.

        Found without importing that package, which would take half a second.

        Raises:
            BadInput: the package is not installed or no longer has the file.
        """
        spec = importlib.util.find_spec("mistral_common")
        for folder in (spec and spec.submodule_search_locations) or ():
            if (path := Path(folder, "data", name)).is_file():
                return cls(path)
        raise BadInput(f"{name} is not installed: pip install mistral-common")

    @classmethod
    def from_file(cls, path: Path | str) -> "Tokenizer":
        """The tokenizer in a SentencePiece model file or a `tekken.json`.

        Raises:
            BadInput: there is no such file, or it is not a tokenizer.
        """
        return cls(Path(path))

    @classmethod
    def beside(cls, folder: Path, vocab_size: int) -> "Tokenizer | None":
        """The tokenizer in a model's folder, with its added tokens; `None` if there is none.

        Of several files the `preferred` one is read.

        Args:
            folder: the model's folder.
            vocab_size: number of ids of the model, which may exceed the tokenizer's.

        Raises:
            BadInput: the file is not a tokenizer, or another model's.
        """
        path = preferred(folder.iterdir())
        if path is None:
            return None
        tokenizer = cls(path)
        own = tokenizer.vocab_size
        if own == vocab_size:
            return tokenizer
        vocabulary = read_vocabulary(folder, vocab_size)
        is_explained = any(id_ >= own for id_ in vocabulary.added)
        if own > vocab_size or (vocab_size - own >= PADDING and not is_explained):
            raise BadInput(
                f"{path} has {own} tokens and the model {vocab_size}; use the tokenizer that the "
                "model was trained with"
            )
        tokenizer._grow(vocabulary)
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Encodes a text, without BOS and EOS; control tokens spelled in it stay text.

        Added tokens spelled in it become their ids, as in transformers.

        Raises:
            BadInput: the text has a lone surrogate, as undecodable bytes become.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"character {error.start} of the text is not Unicode") from error
        return self._encode(text, self.codec.encode)

    def encode_rendered(self, text: str) -> list[int]:
        """Encodes what a chat template made: the control tokens spelled in it become their ids.

        What is behind one is encoded as behind an added token.

        >>> Tokenizer.mistral_v1().encode_rendered("<s>a</s>")
        [1, 264, 2]
        """
        ids: list[int] = []
        text_so_far = ""
        for part in CONTROL.split(text):
            id_ = self.control_id(part) if CONTROL.fullmatch(part) else None
            if id_ is None:
                text_so_far += part
                continue
            ids += [*self._behind(ids, text_so_far), id_]
            text_so_far = ""
        return [*ids, *self._behind(ids, text_so_far)]

    def _behind(self, ids: Sequence[int], text: str) -> list[int]:
        """The ids of a text behind these, the last of which, if there is any, is no text."""
        if not text:
            return []
        return self.encode(text) if self.starts_anew or not ids else self.encode_after(text)

    def encode_after(self, text: str) -> list[int]:
        """Encodes a text that continues another one.

        Appended to the ids of the other text they decode to both, with no space in between. No
        token spans the border, as none could when a model continues a prompt.

        >>> tokenizer = Tokenizer.mistral_v1()
        >>> tokenizer.decode(tokenizer.encode("1 + 1 =") + tokenizer.encode_after(" 2"))
        '1 + 1 = 2'
        """
        return self._encode(text, self.codec.encode_after)

    def encode_batch(
        self, texts: Sequence[str], num_threads: int = 0
    ) -> list[Int32[np.ndarray, "..."]]:
        """Encodes many texts, each as by `encode`, several times as fast.

        SentencePiece takes words from a cache, in this thread; others `num_threads` (0: all cores).
        """
        if not self._added:
            return self.codec.encode_batch(texts, num_threads)
        if not self.starts_anew:  # the parts of a text depend on their place
            return [np.array(self.encode(text), np.int32) for text in texts]
        parts = [self._cut.split(text) for text in texts]  # of texts, and between them tokens
        flat = [part for group in parts for part in group[::2]]
        encoded = iter(self.codec.encode_batch(flat, num_threads))
        return [
            np.concatenate(
                [
                    np.array([self._ids[part]], np.int32) if i % 2 else next(encoded)
                    for i, part in enumerate(group)
                ]
            )
            for group in parts
        ]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Decodes ids to text; control ids and padding have none, an invalid byte is U+FFFD.

        Raises:
            BadInput: an id is not in the vocabulary.
        """
        known = [self._known(id_) for id_ in ids]
        if not self.is_own(max(known, default=0)):
            stream = StreamDecoder(self)
            return stream.push(known) + stream.flush()
        return self.codec.decode(known)

    def raw(self, id_: SupportsIndex) -> bytes | None:
        """The bytes of an id that may be a part of a character; `None` for any other.

        Raises:
            BadInput: the id is not in the vocabulary.
        """
        known = self._known(id_)
        return self.codec.raw(known) if self.is_own(known) else None

    def piece_text(self, id_: SupportsIndex, first: bool) -> str:
        """The text of one id; the `first` id of a text may lack a leading space.

        Raises:
            BadInput: the id is not in the vocabulary.
        """
        known = self._known(id_)
        return self.codec.text(known, first) if self.is_own(known) else self._added.get(known, "")

    def bytes_of(self, id_: SupportsIndex, first: bool = False) -> bytes:
        """The bytes of one id, joined those of a text's UTF-8; none of a control token.

        Args:
            id_: the id.
            first: whether it is the first of a text, see `piece_text`.

        Raises:
            BadInput: the id is not in the vocabulary.
        """
        raw = self.raw(id_)
        return self.piece_text(id_, first).encode() if raw is None else raw

    def control_id(self, name: str) -> int | None:
        """The id of a control token such as `[TOOL_CALLS]`; `None` if there is none.

        >>> Tokenizer.mistral_v1().control_id("</s>")
        2
        """
        return self.codec.control_id(name)

    def is_control(self, id_: SupportsIndex) -> bool:
        """Whether the id has no text and the one after it still counts as the first (BOS, EOS).

        Raises:
            BadInput: the id is not in the vocabulary.
        """
        known = self._known(id_)
        return self.codec.is_control(known) if self.is_own(known) else known not in self._added

    def is_own(self, id_: SupportsIndex) -> bool:
        """Whether the id is in the tokenizer's file: neither an added token nor padding."""
        return operator.index(id_) < self.codec.vocab_size

    def save(self, folder: Path) -> Path:
        """Copies the tokenizer's file into a folder, under Mistral's file name.

        Raises:
            OSError: the folder cannot be written.
        """
        path = folder / self.file_name
        beside = folder / f".{self.file_name}.{os.getpid()}"
        try:
            beside.write_bytes(self._content)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        return path

    def _grow(self, vocabulary: Vocabulary) -> None:
        """Extends the tokenizer by the model's added tokens and padding ids."""
        self.vocabulary = vocabulary
        self.vocab_size, self.starts_anew = vocabulary.size, vocabulary.starts_anew
        self._added = {i: text for i, text in vocabulary.added.items() if not self.is_own(i)}
        if self._added:
            self._ids = {text: id_ for id_, text in self._added.items()}
            longest_first = sorted(map(re.escape, self._ids), key=len, reverse=True)
            self._cut = re.compile(f"({'|'.join(longest_first)})")
            known = json.dumps([self.sha256, self._ids, self.starts_anew])
            self.sha256 = hashlib.sha256(known.encode()).hexdigest()

    def _encode(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Encodes a text that contains added tokens; `encode` is used for its first part."""
        if not self._added:
            return encode(text)
        ids: list[int] = []
        for i, part in enumerate(self._cut.split(text)):
            ids += [self._ids[part]] if i % 2 else encode(part) if part else []
            encode = self.codec.encode if self.starts_anew else self.codec.encode_after
        return ids

    def _known(self, id_: SupportsIndex) -> int:
        """The id as an int; raises `BadInput` if it is not in the vocabulary."""
        known = operator.index(id_)
        if not 0 <= known < self.vocab_size:
            raise BadInput(
                f"id {known} is not in the tokenizer's vocabulary of {self.vocab_size}; "
                "this model has another tokenizer"
            )
        return known


class StreamDecoder:
    """Streaming detokenizer: text of ids that arrive a few at a time, never a broken character.

    The pushes and the `flush` at the end together are `decode` of all ids. Bytes are held
    until they are a character, or can no longer become one and are U+FFFD, so a prefix of
    the output is never a broken character. Work and memory per id are constant.

    Args:
        prefix_ids: ids before the stream, such as a prompt; their text is not output, but the
            text after it keeps its leading space, and a character begun in it is completed.

    >>> tokenizer = Tokenizer.mistral_v1()
    >>> stream = StreamDecoder(tokenizer, tokenizer.encode("The cat"))
    >>> [stream.push([id_]) for id_ in (2495, 243, 162, 155, 131)]
    [' sat', '', '', '', '😀']
    """

    def __init__(self, tokenizer: Tokenizer, prefix_ids: Iterable[SupportsIndex] = ()) -> None:
        self._tokenizer = tokenizer
        self._first = True  # no id with a text has come yet
        self._bytes = codecs.getincrementaldecoder("utf-8")(tokenizer.broken)
        self.push(prefix_ids)

    def push(self, ids: Iterable[SupportsIndex]) -> str:
        """Decodes the next ids to the text that is complete so far; empty within a character.

        Raises:
            BadInput: an id is not in the vocabulary.
        """
        return "".join(map(self._push_one, ids))

    def flush(self) -> str:
        """Ends the stream: U+FFFD for an incomplete character, else empty."""
        return self._bytes.decode(b"", final=True)

    def _push_one(self, id_: SupportsIndex) -> str:
        raw = self._tokenizer.raw(id_)
        if raw is not None:
            self._first = False
            return self._bytes.decode(raw)
        text = self.flush() + self._tokenizer.piece_text(id_, self._first)
        if self._tokenizer.is_own(id_):
            self._first = self._first and self._tokenizer.is_control(id_)
        else:
            self._first = self._tokenizer.starts_anew
        return text
