"""Training dataset of a run: text or fine-tuning examples, with its held-out rows."""

from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer

from lechat_jax.config import VisionConfig
from lechat_jax.data.batches import Batches
from lechat_jax.data.examples import Examples, load_examples
from lechat_jax.data.held_out import INTERIM_ROWS, HeldOut, interim_rows
from lechat_jax.data.packing import Documents, Packed
from lechat_jax.data.rows import Rows, described_rows
from lechat_jax.data.sources import form_of
from lechat_jax.data.token_shards import ALONE, Processes, Progress
from lechat_jax.data.tokens import Tokens, load_tokens
from lechat_jax.tokenizer.chat_template import Conversation
from lechat_jax.tokenizer.images import Image, read_image
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
        vision: the tower that sees its images; `None` if there are none.
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
    vision: VisionConfig | None

    def rows(self, first_step: int, n_steps: int, part: slice = slice(None)) -> Rows:
        """The batches of consecutive steps, [n_steps, B, block + 1], or a part of their rows."""
        ...

    def held_out(self) -> HeldOut:
        """The held-out rows that are scored."""
        ...

    def prompt_ids(self, prompt: str) -> list[int]:
        """Prompt ids of a sample, which the model continues."""
        ...

    def images_with(self, prompt: str) -> list[Image]:
        """Images whose ids are among those of a prompt."""
        ...


class TextDataset:
    """Pretraining dataset: text in windows of one token stream, or packed documents."""

    chat = False
    vision: VisionConfig | None = None

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

    def images_with(self, prompt: str) -> list[Image]:
        """Images that come with the prompt of a sample; there are none."""
        return []

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
        vision: VisionConfig | None = None,
    ) -> None:
        self.name, self.size = examples.name, examples.size
        self.vision = vision if any(examples.train.images) or any(examples.val.images) else None
        self.n_bytes, self.sha256 = examples.n_bytes, examples.sha256
        self.opening, self.chat = examples.opening, examples.form == "messages"
        self._examples, self._tokenizer = examples, tokenizer
        self.ids = examples.train.ids
        reader = Packed(examples.train, block, batch, seed, packed, self.vision)
        self.reader: Reader = reader
        self._reader = reader
        self.rows = reader.rows
        self.notes = [_packing_note(reader), *([examples.note] if examples.note else [])]
        self.opening_images: list[Image] = []
        if self.vision and examples.val.images:
            sources = examples.val.images[0]
            self.opening_images = [read_image(source, self.vision) for source in sources]

    def held_out(self) -> HeldOut:
        """The held-out examples as rows, packed like the training examples."""
        val, sizes = self._examples.val, self._examples.val_bytes
        packed = Packed(val, self.reader.block, batch=1, seed=0, vision=self.vision)
        subset = interim_rows(packed.windows, INTERIM_ROWS)

        def bytes_of(rows: Integer[np.ndarray, " rows"]) -> int:
            return sum(sizes[i] for row in rows.tolist() for i in packed.sharing(row))

        return HeldOut(packed.one_epoch(), sum(sizes), subset, bytes_of, packed.images_of)

    def described(self, rows: Rows) -> Rows:
        """`jax.ShapeDtypeStruct`s of a batch, those of its tokens given, with its images."""
        return self._reader.described(rows)

    def images_with(self, prompt: str) -> list[Image]:
        """Images that come with the prompt of a sample: those of the first held-out question."""
        return self.opening_images if prompt == self.opening else []

    def prompt_ids(self, prompt: str) -> list[int]:
        """Prompt ids of a sample: a completion's prompt, or a chat's first question."""
        if self.chat:
            conversation = Conversation(self._tokenizer, vision=self.vision)
            return conversation.ask(prompt, self.images_with(prompt))
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
    vision: VisionConfig | None = None,
) -> Dataset:
    """Loads the dataset that `data` names: text or fine-tuning examples.

    Examples are packed unless `packing` is `off`, text only if it is `on`.

    Args:
        on_shape: called before tokenising with `jax.ShapeDtypeStruct`s of the rows of a step,
            [B, block + 1], as to compile for them meanwhile; of text only once the first of it was
            read, since most of what cannot be used is found by then.
        processes: those of a multi-host run, which share the work where they share the cache.
        vision: of the model's tower, if it sees; the shape of a step is known then when all
            examples are.

    Raises:
        BadInput: there is no such data, or it cannot be used.
    """
    if data is not None and (form := form_of(data)):
        shape = described_rows((batch, block + 1), is_packed=True)
        if vision is None:
            on_shape(shape)
        examples = load_examples(data, form, tokenizer, block, on_progress, vision=vision)
        packed = packing != "off"
        dataset = ExampleDataset(examples, tokenizer, block, batch, seed, packed, vision)
        if vision:
            on_shape(dataset.described(shape))
        return dataset

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
