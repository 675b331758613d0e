"""Training dataset of a run: text or fine-tuning examples, with its held-out rows."""

from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer

from lechat_jax.data.batches import Batches
from lechat_jax.data.examples import Examples, load_examples
from lechat_jax.data.held_out import INTERIM_ROWS, HeldOut, interim_rows
from lechat_jax.data.packing import Documents, Packed
from lechat_jax.data.rows import Rows, described_rows
from lechat_jax.data.sources import form_of
from lechat_jax.data.token_shards import ALONE, Processes, Progress
from lechat_jax.data.tokens import Tokens, load_tokens
from lechat_jax.tokenizer.chat_template import Conversation
from lechat_jax.tokenizer.tokenizer import Tokenizer

Packing = Literal["auto", "on", "off"]


# Rows as a pure function of the step.
Reader = Batches | Packed


@runtime_checkable
class Dataset(Protocol):
    """The interface of a training dataset that `Trainer` needs.

    Attributes:
        name: name of the data, for display.
        size: size of the data, in words.
        n_bytes: bytes of the data.
        sha256: digest of the data.
        notes: messages to the user, a sentence each.
        ids: token ids of the training part.
        reader: the batches of each step, and the rows of an epoch.
        opening: default prompt of the samples.
        chat: whether the data are conversations.
    """

    name: str
    size: str
    n_bytes: int
    sha256: str
    notes: list[str]
    ids: Integer[np.ndarray, " ids"]
    reader: Reader
    opening: str
    chat: bool

    def rows(self, first_step: int, n_steps: int, part: slice = slice(None)) -> Rows:
        """The batches of consecutive steps, [n_steps, B, block + 1], or a part of their rows."""
        ...

    def held_out(self) -> HeldOut:
        """The held-out rows that are scored."""
        ...

    def prompt_ids(self, prompt: str) -> list[int]:
        """Prompt ids of a sample, which the model continues."""
        ...


class TextDataset:
    """Pretraining dataset: text in windows of one token stream, or packed documents."""

    chat = False

    def __init__(
        self, tokens: Tokens, tokenizer: Tokenizer, block: int, batch: int, seed: int, packed: bool
    ) -> None:
        self.name, self.size = tokens.name, tokens.size
        self.n_bytes, self.sha256 = tokens.n_bytes, tokens.sha256
        self.notes = [tokens.note] if tokens.note else []
        self._tokens, self._tokenizer = tokens, tokenizer
        self._packed: Packed | None = None
        if packed:
            documents = Documents.of_stream(tokens.train, tokenizer.bos_id, block)
            self._packed = Packed(documents, block, batch, seed)
            self.notes.append(_packing_note(self._packed))
        self.ids = tokens.train
        self._windows = Batches(len(tokens.train), block, batch, seed)
        self.reader: Reader = self._packed or self._windows
        self.opening = " ".join(tokenizer.decode(tokens.val[1:33]).split()[:6])

    def rows(self, first_step: int, n_steps: int, part: slice = slice(None)) -> Rows:
        """The batches of consecutive steps, [n_steps, B, block + 1], or a part of their rows."""
        if self._packed:
            return self._packed.rows(first_step, n_steps, part)
        return self._windows.rows(self._tokens.train, first_step, n_steps, part)

    def held_out(self) -> HeldOut:
        """The held-out stream as rows."""
        return HeldOut.of_text(self._tokens, self._tokenizer)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Prompt ids of a sample: the start of a document."""
        return [self._tokenizer.bos_id, *self._tokenizer.encode(prompt)]


class ExampleDataset:
    """Instruction-tuning dataset: conversations or completions, with the loss on answers only."""

    def __init__(
        self,
        examples: Examples,
        tokenizer: Tokenizer,
        block: int,
        batch: int,
        seed: int,
        packed: bool,
    ) -> None:
        self.name, self.size = examples.name, examples.size
        self.n_bytes, self.sha256 = examples.n_bytes, examples.sha256
        self.opening, self.chat = examples.opening, examples.form == "messages"
        self._examples, self._tokenizer = examples, tokenizer
        self.ids = examples.train.ids
        reader = Packed(examples.train, block, batch, seed, together=packed)
        self.reader: Reader = reader
        self.rows = reader.rows
        self.notes = [_packing_note(reader), *([examples.note] if examples.note else [])]

    def held_out(self) -> HeldOut:
        """The held-out examples as rows, packed like the training examples."""
        val, sizes = self._examples.val, self._examples.val_bytes
        packed = Packed(val, self.reader.block, batch=1, seed=0)
        subset = interim_rows(packed.windows, INTERIM_ROWS)

        def bytes_of(rows: Integer[np.ndarray, " rows"]) -> int:
            return sum(sizes[i] for row in rows.tolist() for i in packed.sharing(row))

        return HeldOut(packed.one_epoch(), sum(sizes), subset, bytes_of)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Prompt ids of a sample: a completion's prompt, or a chat's first question."""
        if self.chat:
            return Conversation(self._tokenizer).ask(prompt)
        ids = self._tokenizer.encode(prompt) if prompt else []
        return [self._tokenizer.bos_id, *ids]


def open_dataset(
    data: str | None,
    tokenizer: Tokenizer,
    block: int,
    batch: int,
    seed: int,
    packing: Packing,
    on_progress: Progress,
    on_shape: Callable[[Rows], None] = lambda _: None,
    processes: Processes = ALONE,
) -> Dataset:
    """Loads the dataset that `data` names: text or fine-tuning examples.

    Examples are packed unless `packing` is `off`, text only if it is `on`.

    Args:
        on_shape: called before tokenising with `jax.ShapeDtypeStruct`s of the rows of a step,
            [B, block + 1], as to compile for them meanwhile; of text only once the first of it was
            read, since most of what cannot be used is found by then.
        processes: those of a multi-host run, which share the work where they share the cache.

    Raises:
        BadInput: there is no such data, or it cannot be used.
    """
    if data is not None and (form := form_of(data)):
        on_shape(described_rows((batch, block + 1), is_packed=True))
        examples = load_examples(data, form, tokenizer, block, on_progress)
        return ExampleDataset(examples, tokenizer, block, batch, seed, packing != "off")

    def on_first() -> None:
        on_shape(described_rows((batch, block + 1), packing == "on"))

    tokens = load_tokens(data, tokenizer, None, on_progress, on_first, processes)
    return TextDataset(tokens, tokenizer, block, batch, seed, packing == "on")


def _packing_note(packed: Packed) -> str:
    n = len(packed.documents.lengths)
    return (
        f"{n:,} documents are packed into {packed.windows:,} rows of {packed.block + 1} tokens, "
        f"{packed.padding:.1%} of them padding"
    )
