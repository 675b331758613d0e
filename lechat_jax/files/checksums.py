"""A folder that can prove it is what was written: `SHA256SUMS`, as `sha256sum -c` reads it."""

import hashlib
import os
import re
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST = "SHA256SUMS"

# What systems leave in any folder, and change or take away as they like: .DS_Store, .nfs0012.
LITTER = re.compile(r"(.*/)?(\..*|Thumbs\.db|desktop\.ini)", re.IGNORECASE)


def write_manifest(whole: Path, known: Mapping[str, str] | None = None) -> None:
    """Puts the checksum of every file in the folder into its manifest.

    Those in `known`, by name, were taken while the files were written and are not read again.
    """
    known = known or {}
    names = _files(whole)
    digests = {**known, **_digests(whole, [name for name in names if name not in known])}
    manifest = "".join(f"{digests[name]}  {name}\n" for name in names)
    (whole / MANIFEST).write_text(manifest, encoding="utf-8")


def fault(
    whole: Path,
    folders: Collection[str] | None = None,
    *,
    is_read: Callable[[str, Collection[str]], bool] | None = None,
) -> str | None:
    """The first thing wrong with the files of these folders (by default all), or None.

    Files beside the folders in it are always among them. What was not saved may be there, unless
    it `is_read`: told by its name, and by those of the files that were saved.
    """

    def wanted(name: str) -> bool:
        top, inside, _ = name.partition("/")
        return folders is None or not inside or top in folders

    try:
        lines = (whole / MANIFEST).read_bytes().split(b"\n")  # splitlines splits at 0x0b too
        entries = [re.fullmatch(rb"([0-9a-f]{64})  (.+)", line) for line in lines[:-1]]
        if lines[-1] or not all(entries):
            return f"{MANIFEST} has a line that is no checksum"
        listed = {os.fsdecode(entry[2]): entry[1].decode() for entry in entries if entry}
        listed = {name: digest for name, digest in listed.items() if not LITTER.fullmatch(name)}
        found = [name for name in _files(whole) if wanted(name)]
        if missing := sorted({name for name in listed if wanted(name)}.difference(found)):
            return f"{missing[0]} is missing"
        extra = [name for name in found if name not in listed]
        if strangers := [name for name in extra if is_read and is_read(name, listed)]:
            return f"{strangers[0]} is not in {MANIFEST}"
        for name, digest in _digests(whole, set(found).difference(extra)).items():
            if digest != listed[name]:
                return f"{name} is not what was saved (its SHA-256 differs)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    return None


def _files(whole: Path) -> list[str]:
    """Every file of the folder but its manifest and litter, relative to it, sorted."""
    paths = (Path(folder, name) for folder, _, names in os.walk(whole) for name in names)
    names = {path.relative_to(whole).as_posix() for path in paths} - {MANIFEST}
    return sorted(name for name in names if not LITTER.fullmatch(name))


def _digests(whole: Path, names: Collection[str]) -> dict[str, str]:
    """The SHA-256 of each file, in threads, since hashing releases Python's lock."""

    def digest(name: str) -> str:
        with (whole / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as threads:
        return dict(zip(names, threads.map(digest, names), strict=True))


def sync(path: Path) -> None:
    """A file's bytes, or a folder's names, outlast a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
