"""Resolves a path, folder, glob or URI to files; lists which of a folder are skipped and why."""

import contextlib
import glob
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lechat_jax.errors import BadInput
from lechat_jax.files.buckets import fetch, uri_of
from lechat_jax.files.text import NotText, plain_name

_DATASET_ID = re.compile(r"[A-Za-z0-9_-][\w.-]*/[A-Za-z0-9_-][\w.-]*", re.ASCII)
_FILE_SUFFIX = re.compile(r"\.[A-Za-z]\w*$", re.ASCII)  # .txt, but not the .1 of a version
_GLOB_CHARACTERS = re.compile(r"[*?[]")
# Names of files that are meant to be text: in a folder they are read, or else refused.
_MEANT = (".txt", ".md", ".rst", ".jsonl", ".ndjson", ".parquet")


class NoRecords(NotText):
    """A JSON file whose records are neither training examples nor texts."""


class FileList(NamedTuple):
    """The files that a path, folder or glob resolves to.

    Attributes:
        files: in the order in which they are read.
        hidden: files that are skipped because a name begins with a dot.
        in_folder: whether they were listed from a folder rather than named.
    """

    files: list[Path]
    hidden: list[Path]
    in_folder: bool


def find_files(data: str) -> FileList | None:
    """Resolves `data` to files; `None` if it is the id of a Hugging Face dataset.

    Raises:
        BadInput: no file matches.
    """
    uri = uri_of(data)
    path = str(fetch(uri)) if uri else os.path.expanduser(data)
    if os.path.isdir(path):
        return _below(Path(path))
    if os.path.exists(path):
        return FileList([Path(path)], [], False)
    if _GLOB_CHARACTERS.search(path):
        files = sorted(Path(f) for f in glob.glob(path, recursive=True) if not os.path.isdir(f))
        if not files:
            raise BadInput(f"no file matches {data}")
        return FileList(files, [], False)
    if _DATASET_ID.fullmatch(data) and not _FILE_SUFFIX.search(data):
        return None
    raise BadInput(
        f"there is no file or folder {data!r}; --data takes a text file, a folder, a glob "
        "or a Hugging Face dataset id (owner/name)"
    )


def stored_bytes(data: str | None) -> float:
    """Bytes of the files that `data` names, as stored; infinity for a Hugging Face dataset.

    >>> stored_bytes(None), stored_bytes("owner/dataset")
    (0.0, inf)

    Raises:
        BadInput: no file matches.
    """
    found = find_files(data) if data else FileList([], [], False)
    return float(sum(file.stat().st_size for file in found.files)) if found else math.inf


def located(data: str | None) -> str | None:
    """`data` as an absolute path, so that it holds from any folder; a dataset's id stays as it is.

    >>> located(None), located("owner/dataset")
    (None, 'owner/dataset')
    """
    path = os.path.expanduser(data or "")
    if os.path.exists(path):
        return os.path.abspath(path)
    if _GLOB_CHARACTERS.search(path) and not os.path.isabs(path):
        return os.path.join(glob.escape(os.getcwd()), path)
    return data


def _below(top: Path) -> FileList:
    """All regular files below a folder, without hidden ones."""

    def refuse(error: OSError) -> None:
        raise BadInput(f"cannot read the folder {error.filename}: {error.strerror}") from error

    files, hidden = [], []
    for folder, folders, names in os.walk(top, onerror=refuse):
        hidden += [Path(folder, name) for name in sorted([*folders, *names]) if name[0] == "."]
        folders[:] = [name for name in folders if name[0] != "."]
        shown = [Path(folder, name) for name in names if name[0] != "."]
        files += [file for file in shown if file.is_file() or not file.exists()]
    return FileList(sorted(files), sorted(hidden), True)


class LeftOut:
    """The files of a folder that are skipped, by reason.

    Attributes:
        n_read: number of files that are not skipped.
        why: names of the skipped files by reason, as JSON can hold them.
    """

    def __init__(self, in_folder: bool, hidden: Sequence[str] = ()) -> None:
        self.n_read = 0
        self._in_folder = in_folder
        self.why: dict[str, list[str]] = {"hidden": [*hidden]} if hidden else {}

    def add(self, why: str, *names: str) -> None:
        """Records skipped files and the reason."""
        self.why.setdefault(why, []).extend(names)

    @contextlib.contextmanager
    def unless_fit(self, file: Path) -> Iterator[None]:
        """Context manager that skips a file of a folder if it is not text or holds no records."""
        try:
            yield
        except NoRecords:
            if not self._in_folder:
                raise
            self.add("without examples or texts", file.name)
        except NotText:
            if not self._in_folder or is_meant(file):
                raise
            self.add("no UTF-8 text", file.name)
        else:
            self.n_read += 1

    def summary(self) -> str:
        """The skipped files by reason, as the end of a sentence; empty if none was skipped."""
        parts = []
        for why, names in self.why.items():
            some = ", ".join(names[:3])
            parts.append(f"{len(names)} {why} ({some}{', …' if len(names) > 3 else ''})")
        return f"; left out: {', '.join(parts)}" if parts else ""

    def notes(self, data: str) -> tuple[str, ...]:
        """One sentence on the skipped files, or none."""
        skipped = self.summary()
        files = "1 file" if self.n_read == 1 else f"{self.n_read:,} files"
        return (f"read {files} below {data}{skipped}",) if skipped else ()


def is_meant(file: Path) -> bool:
    """Whether a file's name says that it is text, so that it is read or refused, never skipped."""
    return plain_name(file).endswith(_MEANT)
