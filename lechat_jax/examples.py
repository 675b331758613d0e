"""Examples to learn from: conversations, and prompts with their completions.

What is asked is read, and what is answered is learned. Each example is a document of its own.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from lechat_jax.corpus import EVERY
from lechat_jax.errors import BadInput
from lechat_jax.packing import Documents
from lechat_jax.records import Complaints, Record, half_pair, json_lines
from lechat_jax.texts import find_files, load_dataset
from lechat_jax.tokenizer import Tokenizer
from lechat_jax.transcript import Transcripts, Unusable

Form = Literal["messages", "completion"]
FIELDS: dict[Form, tuple[str, ...]] = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
}


class Example(NamedTuple):
    """One document: its ids from BOS on, and which of them are learned."""

    ids: list[int]
    counted: list[bool]

    def cut(self, room: int) -> "Example":
        """The first `room` tokens of it."""
        return Example(self.ids[:room], self.counted[:room])


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples in two parts that share none.

    Attributes:
        name: what they are, for people.
        form: how they were written.
        train: those to learn from.
        val: those held out, every tenth.
        train_bytes: UTF-8 bytes of the answers of each.
        val_bytes: likewise.
        n_bytes: of the files.
        sha256: of the files, in their order.
        opening: the first question or prompt held out.
        note: what the user should know of them (cut, left out), or nothing.
    """

    name: str
    form: Form
    train: Documents
    val: Documents
    train_bytes: tuple[int, ...]
    val_bytes: tuple[int, ...]
    n_bytes: int
    sha256: str
    opening: str
    note: str


class Source(NamedTuple):
    """Records, and how many bytes with which digest they come from."""

    records: list[Record]
    n_bytes: int
    sha256: str


def form_of(data: str | None) -> Form | None:
    """How the examples that `data` names are written; `None` if it names text.

    The first record that can be read decides.

    Raises:
        BadInput: there are no such files, or no such dataset.
    """
    if data is None:
        return None
    files = find_files(data)
    if files is None:
        return _form(load_dataset(data).column_names)
    for file in files:
        if file.suffix == ".jsonl":
            first = next(json_lines(file, Complaints("")), None)
            if first and (form := _form(first.fields)):
                return form
    return None


def load_examples(
    data: str,
    form: Form,
    tokenizer: Tokenizer,
    block: int,
    on_progress: Callable[[int, int], None],
) -> Examples:
    """The examples that `data` names, each cut to the `block + 1` tokens that a row holds.

    Every tenth is held out, or the last of fewer, and with it every copy of it.

    Raises:
        BadInput: some cannot be used, and the message says which and why; or there are not two.
    """
    complaints = Complaints(data)
    source = _read(data, form, complaints)
    write = _writer(form, tokenizer)
    found: list[tuple[Record, Example]] = []
    for number, record in enumerate(source.records, start=1):
        try:
            found.append((record, write(record.fields)))
        except Unusable as error:
            complaints.add(record.where, str(error))
        on_progress(number, len(source.records))
    complaints.raise_any()
    kept = [(record, example.cut(block + 1)) for record, example in found]
    kept = [(record, example) for record, example in kept if any(example.counted[1:])]
    train, val = _split([example for _, example in kept])
    if not train or not val:
        raise BadInput(
            f"{data} has {len(found)} examples, of which {len(train)} are to learn from and "
            f"{len(val)} to validate on; give at least two different ones that fit into a "
            f"--block of {block}"
        )
    first = next(record for record, example in kept if example == val[0])
    return Examples(
        name=data,
        form=form,
        train=Documents.of(train),
        val=Documents.of(val),
        train_bytes=tuple(_scored_bytes(tokenizer, example) for example in train),
        val_bytes=tuple(_scored_bytes(tokenizer, example) for example in val),
        n_bytes=source.n_bytes,
        sha256=source.sha256,
        opening=_opening(form, first.fields),
        note=_note([example for _, example in found], len(kept), block),
    )


def write_completion(tokenizer: Tokenizer, prompt: str, completion: str) -> Example:
    """A prompt as it is when a model is given it, and the completion that it is to say.

    Raises:
        Unusable: there is nothing to complete it with, or it is not Unicode.
    """
    if not completion:
        raise Unusable("has an empty `completion`")
    if bad := half_pair(prompt + completion):
        raise Unusable(bad)
    given = [tokenizer.bos_id, *(tokenizer.encode(prompt) if prompt else [])]
    said = tokenizer.encode_after(completion) if prompt else tokenizer.encode(completion)
    said = [*said, tokenizer.eos_id]
    return Example([*given, *said], [False] * len(given) + [True] * len(said))


def _form(fields: Any) -> Form | None:
    for form, needed in FIELDS.items():
        if all(name in fields for name in needed):
            return form
    return None


def _writer(form: Form, tokenizer: Tokenizer) -> Callable[[dict[str, Any]], Example]:
    """From the fields of a record to its example."""
    if form == "messages":
        transcripts = Transcripts(tokenizer)
        return lambda fields: Example(
            *transcripts.write(fields.get("messages"), fields.get("tools"))
        )

    def completion(fields: dict[str, Any]) -> Example:
        for name in FIELDS["completion"]:
            if not isinstance(fields.get(name), str):
                raise Unusable(f"has no text in its `{name}` field")
        return write_completion(tokenizer, fields["prompt"], fields["completion"])

    return completion


def _read(data: str, form: Form, complaints: Complaints) -> Source:
    """All records of the files or of the dataset, of which some may be of another form."""
    files = find_files(data)
    digest, n_bytes, records = hashlib.sha256(), 0, []
    if files is None:
        wanted = [*FIELDS[form], *(["tools"] if form == "messages" else [])]
        for number, row in enumerate(load_dataset(data)):
            fields = {name: row[name] for name in wanted if name in row}
            raw = json.dumps(fields).encode()
            digest.update(raw)
            n_bytes += len(raw)
            records.append(Record(f"row {number}", fields))
        return Source(records, n_bytes, digest.hexdigest())
    for file in files:
        raw = file.read_bytes()
        digest.update(raw)
        n_bytes += len(raw)
        if file.suffix != ".jsonl":
            raise BadInput(f"{file} is no .jsonl file, and others here hold examples; name those")
        records += json_lines(file, complaints, named=len(files) > 1)
    return Source(records, n_bytes, digest.hexdigest())


def _split(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Those to learn from, and those held out, no one of which is among them."""
    every = min(EVERY, max(1, len(examples)))
    held = {tuple(example.ids) for example in examples[every - 1 :: every]}
    train = [example for example in examples if tuple(example.ids) not in held]
    return train, [example for example in examples if tuple(example.ids) in held]


def _scored_bytes(tokenizer: Tokenizer, example: Example) -> int:
    """UTF-8 bytes of the answers, each decoded by itself."""
    edges = np.flatnonzero(np.diff([0, *example.counted, 0])).reshape(-1, 2).tolist()
    return sum(len(tokenizer.decode(example.ids[a:b]).encode()) for a, b in edges)


def _opening(form: Form, fields: dict[str, Any]) -> str:
    """What is asked first."""
    if form == "completion":
        return fields["prompt"]
    asked = next(m["content"] for m in fields["messages"] if m["role"] == "user")
    return asked if isinstance(asked, str) else "Hello"


def _note(examples: Sequence[Example], n_kept: int, block: int) -> str:
    """What does not fit, if anything."""
    longest = max(len(example.ids) for example in examples)
    n_long = sum(len(example.ids) > block + 1 for example in examples)
    if not n_long:
        return ""
    lost = len(examples) - n_kept
    return (
        f"{n_long} of {len(examples)} examples are longer than the {block + 1} tokens of a row "
        f"and are cut there; {lost} of them have no answer before and are left out; --block "
        f"{longest - 1} would hold all"
    )
