"""Folders and files in buckets, gs:// and s3://: fetched into the cache, uploaded manifests last.

An object appears in a bucket when it is complete, but a folder has no rename there. So what vouches
for a folder, `SHA256SUMS` or else the config, is written last and deleted first: a folder in the
midst of an upload that was killed is not one, and what was there before stays.
"""

import contextlib
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lechat_jax.errors import BadInput
from lechat_jax.files.atomic import write_atomic
from lechat_jax.files.checksums import LITTER, MANIFEST
from lechat_jax.files.paths import cache_home

URI = re.compile(r"(gs|s3):/{1,2}([^/].*)")  # `Path` leaves one slash of two
LISTING = ".listing.json"
PARTIAL = ".partial"  # of a file or checkpoint that is being written
LAST = (MANIFEST, "config.json", "params.json")  # what vouches for a folder, first of all it
KNOWN = ("etag", "ETag", "generation", "md5Hash", "mtime", "LastModified", "updated")
EXTRAS = {"gs": "gcs", "s3": "s3"}


def uri_of(path: Path | str) -> str | None:
    """The URI of a file or folder in a bucket; `None` for a path.

    >>> uri_of("gs://bucket/run/"), uri_of(Path("s3://bucket/run")), uri_of("runs/a")
    ('gs://bucket/run', 's3://bucket/run', None)
    """
    found = URI.fullmatch(str(path))
    return f"{found[1]}://{found[2].rstrip('/')}" if found else None


def local_copy(path: Path | str) -> Path:
    """The path itself; of a URI, where the cache has what was fetched."""
    uri = uri_of(path)
    return fetch(uri) if uri else Path(path)


def fetch(uri: str, into: Path | None = None) -> Path:
    """Downloads a file or folder of a bucket, but for what is there already; returns where it is.

    What else was in that local folder is deleted, locks and other hidden files excepted.

    Args:
        uri: of the file or folder.
        into: the local folder; by default one in the cache.

    Raises:
        BadInput: there is nothing there, or it cannot be read, or the extra is not installed.
    """
    with _errors(uri):
        fs, root = _opened(uri)
        found = {path: info for path, info in fs.find(root, detail=True).items() if info["size"]}
        if not found:
            raise BadInput(f"{uri} is not there")
        here = into or _in_cache("buckets", uri)
        before = _listing(here)
        now = {}
        for path, info in sorted(found.items()):
            name = path[len(root) :].lstrip("/") or here.name
            now[name] = [info["size"], *(str(info[key]) for key in KNOWN if key in info)]
            local = here / name if path != root else here.parent / name
            if before.get(name) != now[name] or not local.is_file():
                _download(fs, path, local)
        for path in here.rglob("*"):
            name = path.relative_to(here).as_posix()
            if path.is_file() and name not in now and not LITTER.fullmatch(name):
                path.unlink()
        write_atomic(here.parent / LISTING, json.dumps(now))
        return here


def exists(uri: str) -> bool:
    """Whether there is a file or folder; raises `BadInput` if the bucket cannot be read."""
    with _errors(uri):
        fs, root = _opened(uri)
        return bool(fs.exists(root))


def names_in(uri: str) -> set[str]:
    """Names of the files of a folder, below it; raises `BadInput` if it cannot be read."""
    with _errors(uri):
        fs, root = _opened(uri)
        return {path[len(root) :].lstrip("/") for path in fs.find(root)}


def read_file(uri: str) -> bytes:
    """The content of a small file; raises `BadInput` if it cannot be read."""
    with _errors(uri):
        fs, path = _opened(uri)
        return fs.cat_file(path)


def working_folder(uri: str) -> Path:
    """The local folder of a run that is trained into a bucket; what is only read lies elsewhere."""
    return _in_cache("runs", uri)


def _in_cache(kind: str, uri: str) -> Path:
    """The place of a URI in the cache, under its own name."""
    digest = hashlib.sha256(uri.encode()).hexdigest()[:16]
    folder = cache_home() / kind / digest
    folder.mkdir(parents=True, exist_ok=True)
    return folder / uri.rpartition("/")[2]


class BucketSync:
    """Keeps a folder in a bucket like a local one, in the background.

    Args:
        folder: the local folder.
        uri: of its copy.
        is_fetched: whether the local folder was fetched from there, so that both are the same.
    """

    def __init__(self, folder: Path, uri: str, is_fetched: bool = False) -> None:
        self.folder, self.uri = folder, uri
        self._sent: dict[str, tuple[int, int]] = self._files() if is_fetched else {}
        self._thread = ThreadPoolExecutor(1)
        self._done: Future[None] | None = None

    def start(self) -> None:
        """Starts to bring the copy up to date; what fails is tried again the next time."""
        self._wait()
        self._done = self._thread.submit(self._update)

    def finish(self) -> None:
        """Brings the copy up to date, and returns when it is.

        Raises:
            BadInput: it cannot be; the local folder is named.
        """
        self._wait()
        try:
            self._update()
        except BadInput as error:
            raise BadInput(f"{error}; everything is in {self.folder}, so copy that") from error

    def _wait(self) -> None:
        done, self._done = self._done, None
        try:
            if done:
                done.result()
        except BadInput as error:
            print(f"warning: {error}; it is tried again", file=sys.stderr)

    def _files(self) -> dict[str, tuple[int, int]]:
        """Size and time of each file, by its name below the folder."""
        found = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and not LITTER.fullmatch(name) and PARTIAL not in name:
                    stat = path.stat()
                    found[name] = (stat.st_size, stat.st_mtime_ns)
        return found

    def _update(self) -> None:
        with _errors(self.uri):
            files = self._files()
            changed = [name for name in files if self._sent.get(name) != files[name]]
            gone = [name for name in self._sent if name not in files]
            if not changed and not gone:
                return
            fs, root = _opened(self.uri)
            for name in sorted(changed, key=_rank):
                try:
                    fs.put_file(str(self.folder / name), f"{root}/{name}")
                    self._sent[name] = files[name]
                except FileNotFoundError:
                    if (self.folder / name).exists():  # else a checkpoint that was pruned since
                        raise
            for name in sorted(gone, key=_rank, reverse=True):
                with contextlib.suppress(FileNotFoundError):
                    fs.rm_file(f"{root}/{name}")
                del self._sent[name]


def _rank(name: str) -> tuple[int, str]:
    """Where a file comes in an upload: what vouches for a folder comes after all others."""
    last = name.rpartition("/")[2]
    return (LAST[::-1].index(last) + 1 if last in LAST else 0, name)


def _opened(uri: str) -> tuple[Any, str]:
    """The file system and the path in it; listings are always asked for anew."""
    import fsspec

    fs, root = fsspec.url_to_fs(uri, use_listings_cache=False)
    return fs, str(root).rstrip("/")


def _listing(here: Path) -> dict[str, list[Any]]:
    try:
        return json.loads((here.parent / LISTING).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _download(fs: Any, path: str, local: Path) -> None:
    local.parent.mkdir(parents=True, exist_ok=True)
    partial = local.with_name(f".{local.name}{PARTIAL}")
    fs.get_file(path, str(partial))
    partial.replace(local)


@contextlib.contextmanager
def _errors(uri: str) -> Iterator[None]:
    """Turns what a bucket's library raises into `BadInput`."""
    try:
        yield
    except BadInput:
        raise
    except ImportError as error:
        extra = EXTRAS[uri.partition(":")[0]]
        raise BadInput(
            f"{error.name} is not installed: pip install 'lechat-jax[{extra}]'"
        ) from error
    except FileNotFoundError as error:
        raise BadInput(f"{uri} is not there") from error
    except Exception as error:  # each kind of storage has its own, as for a wrong password
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{uri} cannot be reached: {why}") from error
