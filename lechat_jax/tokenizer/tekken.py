"""Mistral's tekken tokenizers (`tekken.json`, version 3 on): byte-level BPE, as tiktoken's."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from lechat_jax.errors import BadInput


class Tekken:
    """A tekken model, loaded by mistral-common; for its methods see `Tokenizer`.

    The first ids are control tokens, the next 256 single bytes. Loading takes a second, half
    of it for importing mistral-common.

    Attributes:
        model: mistral-common's own object.
    """

    file_name = "tekken.json"
    broken = "replace"

    def __init__(self, path: Path) -> None:
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        try:
            self.model = Tekkenizer.from_file(path)
            self.bos_id, self.eos_id = self.model.bos_id, self.model.eos_id
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
            raise BadInput(f"{path} is not a tekken tokenizer of Mistral's") from error
        self.model.encode = self._encode  # for mistral-common's templates, too
        self.version = str(self.model.version.value)
        self.vocab_size = self.model.n_words
        self._n_control = self.model.num_special_tokens
        self.byte_of = {self._n_control + byte: byte for byte in range(256)}

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return self._encode(text, bos=False, eos=False)

    def _encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """mistral-common's `encode`, without its crash on long runs of blanks.

        tiktoken's regular expressions fail at a run of about a million blanks, since they store
        each place to backtrack to. Its slower path, which splits the text into words by the library
        `regex`, has no limit and gives the same words.
        """
        tiktoken = self.model._model
        try:
            ids = tiktoken.encode(s)
        except ValueError:
            ids = tiktoken._encode_only_native_bpe(s)
        ids = [id_ + self._n_control for id_ in ids]
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_after(self, text: str) -> list[int]:
        """The ids of a text that follows another text."""
        return self.encode(text)

    def encode_batch(
        self, texts: Sequence[str], num_threads: int
    ) -> list[Int32[np.ndarray, "..."]]:
        """The ids of each text, in threads, since encoding releases the GIL."""
        with ThreadPoolExecutor(num_threads or None) as threads:
            return [np.array(ids, np.int32) for ids in threads.map(self.encode, texts)]

    def decode(self, ids: list[int]) -> str:
        """The text of the ids; a control token within a character cuts it."""
        return self.model.decode(ids)

    def raw(self, id_: int) -> bytes | None:
        """The bytes of an id; `None` for a control token."""
        return None if self.is_control(id_) else self.model.id_to_byte_piece(id_)

    def text(self, id_: int, first: bool) -> str:
        """The text of one id; `first` makes no difference."""
        return self.decode([id_])

    def control_id(self, name: str) -> int | None:
        """The id of a control token; `None` if there is none."""
        return self.model._special_tokens_reverse_vocab.get(name)

    def is_control(self, id_: int) -> bool:
        """Whether the id has no text."""
        return id_ < self._n_control
