"""Instruction-tuning examples: conversations, and prompts with completions.

The loss mask covers answers only. Each example is a document of its own.
"""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from lechat_jax.config import VisionConfig
from lechat_jax.data.dialects import FIELDS, Form, conversation, form_of_fields, unknown_fields
from lechat_jax.data.packing import Documents
from lechat_jax.data.parallel_encoding import CHUNK, answer_bytes, dtype_of, pages
from lechat_jax.data.sources import first_record, in_words, load_dataset
from lechat_jax.data.split import EVERY
from lechat_jax.data.token_cache import Arrays, kept
from lechat_jax.errors import BadInput
from lechat_jax.files.find import LeftOut, NoRecords, find_files
from lechat_jax.files.records import Complaints, Record, holds_records, records_of
from lechat_jax.files.text import plain_name, read_blocks
from lechat_jax.tokenizer.tokenizer import Tokenizer
from lechat_jax.tokenizer.transcripts import parts_of

FORMAT = 3  # of what is cached; a new number makes every cache anew


@dataclasses.dataclass(frozen=True)
class Examples:
    """Tokenised fine-tuning examples, split into training and held-out ones.

    Attributes:
        name: name of the data, for display.
        form: format of the records: conversations or completions.
        train: training examples.
        val: held-out examples, every tenth.
        train_bytes: UTF-8 bytes of the answers of each training example.
        val_bytes: UTF-8 bytes of the answers of each held-out example.
        n_bytes: bytes of the files.
        sha256: digest of the files, in order.
        n_files: number of files; 0 for a Hugging Face dataset.
        opening: the first held-out question or prompt.
        note: a message to the user (examples cut, files left out), or empty.
    """

    name: str
    form: Form
    train: Documents
    val: Documents
    train_bytes: tuple[int, ...]
    val_bytes: tuple[int, ...]
    n_bytes: int
    sha256: str
    n_files: int
    opening: str
    note: str

    @property
    def size(self) -> str:
        """Number of files, examples and bytes, in words."""
        n = len(self.train.lengths) + len(self.val.lengths)
        return in_words(self.n_files, n, "example", self.n_bytes)


class Source(NamedTuple):
    """A source of records that are read lazily, with its size and digest.

    Attributes:
        records: iterates over the records; errors go to the `Complaints`.
        n_files: number of files.
        n_bytes: bytes of the files.
        sha256: digest of the files.
        note: a message on files that are left out, or empty.
    """

    records: Callable[[Complaints], Iterator[Record]]
    n_files: int
    n_bytes: int
    sha256: str
    note: str = ""


class Span(NamedTuple):
    """Token span of one example: its number, start, and end (or where it is cut)."""

    number: int
    begin: int
    end: int


def load_examples(
    data: str,
    form: Form,
    tokenizer: Tokenizer,
    block: int,
    on_progress: Callable[[int, int], None],
    cache_dir: Path | None = None,
    vision: VisionConfig | None = None,
) -> Examples:
    """Loads the examples that `data` names, each truncated to the `block + 1` tokens of a row.

    Every tenth is held out, or the last of fewer, with all its duplicates. The ids are cached
    like those of text; see `token_cache`.

    Raises:
        BadInput: some are invalid, and the message lists them; or there are fewer than two.
    """
    source = _source(data, form, vision)
    dtype = dtype_of(tokenizer)
    types = {"begins": np.dtype(np.int64), "n_bytes": np.dtype(np.int64)}
    types |= {"ids": dtype, "counted": np.dtype(bool), "images": np.dtype(np.uint8)}
    place = str(Path(data).absolute()) if vision else ""  # to which images are relative
    key = _key(source, form, tokenizer, f"{vision} {place}")

    def write() -> Arrays:
        return _written(data, source, form, tokenizer, on_progress, vision)

    found = kept(key, types, write, cache_dir)
    written = found.arrays
    images = json.loads(written["images"].tobytes() or b"[]")
    begins = written["begins"].tolist()
    spans = [
        Span(number, begin, min(end, begin + block + 1))
        for number, (begin, end) in enumerate(itertools.pairwise(begins))
    ]
    usable = [span for span in spans if written["counted"][span.begin + 1 : span.end].any()]
    train, val = _split(written, images, usable)
    if not train or not val:
        raise BadInput(
            f"{data} has {len(spans)} examples, of which {len(train)} are to learn from and "
            f"{len(val)} to validate on; give at least two different ones that fit into a "
            f"--block of {block}"
        )
    first = next(itertools.islice(source.records(Complaints(data)), val[0].number, None))
    long = _note(np.diff(written["begins"]), len(usable), block)
    return Examples(
        name=data,
        form=form,
        train=_documents(written, images, train),
        val=_documents(written, images, val),
        train_bytes=_answers(written, train, tokenizer),
        val_bytes=_answers(written, val, tokenizer),
        n_bytes=source.n_bytes,
        sha256=source.sha256,
        n_files=source.n_files,
        opening=_opening(form, first.fields),
        note="; ".join(filter(None, [source.note, long, found.note])),
    )


def _source(data: str, form: Form, vision: VisionConfig | None) -> Source:
    """The files or dataset that `data` names; of a folder, its files of records."""
    found = find_files(data)
    digest, n_bytes = hashlib.sha256(), 0
    if found is None:
        for record in _rows(data):
            raw = json.dumps(record.fields, default=str).encode()
            digest.update(raw)
            n_bytes += len(raw)
        return Source(lambda complaints: _rows(data), 0, n_bytes, digest.hexdigest())
    files: list[Path] = []
    left = LeftOut(found.in_folder, [file.name for file in found.hidden])
    for file in found.files:
        if not holds_records(file):
            if not found.in_folder or plain_name(file).endswith(".txt"):
                raise BadInput(
                    f"{file} is no .jsonl file, and others here hold examples; name those"
                )
            left.add("no examples", file.name)
            continue
        with left.unless_fit(file):
            first = first_record(file)
            if first and form_of_fields(first.fields) is None and "text" not in first.fields:
                raise NoRecords(f"{file}, {first.where}, {unknown_fields(first.fields)}")
            files.append(file)
            for block in read_blocks(file):
                digest.update(block)
                n_bytes += len(block)

    def records(complaints: Complaints) -> Iterator[Record]:
        for file in files:
            for record in records_of(file, complaints, named=len(files) > 1):
                yield _located(record, file.parent) if vision else record

    note = "; ".join(left.notes(data))
    return Source(records, len(files), n_bytes, digest.hexdigest(), note)


def _located(record: Record, folder: Path) -> Record:
    """A record in which the files of images are not relative to its own any more."""
    for part in itertools.chain.from_iterable(map(parts_of, record.fields.values())):
        said = part.get("image_url")
        url = said.get("url") if isinstance(said, dict) else said
        if isinstance(url, str) and not url.startswith(("data:", "http:", "https:")):
            part["image_url"] = str((folder / url.removeprefix("file://")).absolute())
    return record


def _rows(name: str) -> Iterator[Record]:
    """The rows of a Hugging Face dataset that are examples."""
    for number, row in enumerate(load_dataset(name)):
        yield Record(f"row {number}", {field: row[field] for field in FIELDS if field in row})


def _key(source: Source, form: Form, tokenizer: Tokenizer, seen: str) -> str:
    """Cache key: SHA-256 of all that the ids of examples depend on."""
    template = importlib.metadata.version("mistral-common")
    said = f"examples {FORMAT} {form} {tokenizer.sha256} {template} {seen}\n"
    return hashlib.sha256(
        f"{said}{source.n_files} {source.n_bytes} {source.sha256}".encode()
    ).hexdigest()


def _written(
    data: str,
    source: Source,
    form: Form,
    tokenizer: Tokenizer,
    on_progress: Callable[[int, int], None],
    vision: VisionConfig | None,
) -> Arrays:
    """Tokenises all examples, concatenated and not truncated."""
    complaints = Complaints(data)
    records = [*source.records(complaints)]
    fields = [record.fields for record in records]
    written = []
    for number, page in enumerate(pages(form, tokenizer, fields, on_progress, vision)):
        for place, why in page.faults:
            complaints.add(records[number * CHUNK + place].where, why)
        written.append(page)
    complaints.raise_any()
    if not written:
        raise BadInput(f"{data} is empty; give at least two examples")
    lengths = [n for page in written for n in page.lengths]
    images = [list(of_one) for page in written for of_one in page.images]
    listed = json.dumps(images if any(images) else []).encode()
    return {
        "begins": np.cumsum([0, *lengths], dtype=np.int64),
        "n_bytes": np.array([n for page in written for n in page.n_bytes], np.int64),
        "ids": np.concatenate([page.ids for page in written]).astype(dtype_of(tokenizer)),
        "counted": np.concatenate([page.counted for page in written]),
        "images": np.frombuffer(listed, np.uint8),
    }


def _split(
    written: Arrays, images: list[list[str]], spans: Sequence[Span]
) -> tuple[list[Span], list[Span]]:
    """Train/validation split of examples without duplicates across it."""
    every = min(EVERY, max(1, len(spans)))

    def digest_of(span: Span) -> bytes:
        found = hashlib.blake2b(written["ids"][span.begin : span.end].data, digest_size=16)
        found.update("\n".join(images[span.number] if images else ()).encode())
        return found.digest()

    digests = [*map(digest_of, spans)]
    held = set(digests[every - 1 :: every])
    parts: tuple[list[Span], list[Span]] = ([], [])
    for span, digest in zip(spans, digests, strict=True):
        parts[digest in held].append(span)
    return parts


def _documents(written: Arrays, images: list[list[str]], spans: Sequence[Span]) -> Documents:
    """The tokens of these examples, concatenated."""
    ids, counted = (
        np.concatenate([written[name][span.begin : span.end] for span in spans])
        for name in ("ids", "counted")
    )
    begins = np.cumsum([0, *(span.end - span.begin for span in spans)])
    return Documents(ids, counted, begins, [images[span.number] for span in spans if images])


def _answers(written: Arrays, spans: Sequence[Span], tokenizer: Tokenizer) -> tuple[int, ...]:
    """UTF-8 bytes of the answers of each example, as truncated."""
    begins, whole = written["begins"], written["n_bytes"]
    return tuple(
        int(whole[number])
        if end == begins[number + 1]
        else answer_bytes(tokenizer, written["ids"][begin:end], written["counted"][begin:end])
        for number, begin, end in spans
    )


def _opening(form: Form, fields: dict[str, Any]) -> str:
    """The first question or prompt of an example."""
    if form == "completion":
        return fields["prompt"]
    messages, _ = conversation(fields)
    asked = next(m["content"] for m in messages if m["role"] == "user")
    if isinstance(asked, str):
        return asked
    texts = (part.get("text") for part in asked if isinstance(part, dict))
    return "\n".join(text for text in texts if isinstance(text, str)) or "Hello"


def _note(lengths: Integer[np.ndarray, " examples"], n_kept: int, block: int) -> str:
    """A message on examples that are truncated or dropped, or empty."""
    n_long = int((lengths > block + 1).sum())
    if not n_long:
        return ""
    lost = len(lengths) - n_kept
    return (
        f"{n_long} of {len(lengths)} examples are longer than the {block + 1} tokens of a row "
        f"and are cut there; {lost} of them have no answer before and are left out; --block "
        f"{lengths.max() - 1} would hold all"
    )
