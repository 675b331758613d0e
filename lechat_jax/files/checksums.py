"""SHA-256 manifest of a folder: `SHA256SUMS`, in the format of `sha256sum -c`."""

import hashlib
import os
import re
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST = "SHA256SUMS"
PIECE = 1 << 24  # bytes that are hashed at once

# What systems leave in any folder, and change or take away as they like: .DS_Store, .nfs0012.
LITTER = re.compile(r"(.*/)?(\..*|Thumbs\.db|desktop\.ini)", re.IGNORECASE)


def write_manifest(whole: Path, known: Mapping[str, str] | None = None) -> None:
    """Writes the manifest `SHA256SUMS` of every file in the folder.

    Checksums in `known`, by file name, are taken as given, and those files are not read again.
    """
    known = known or {}
    names = _files(whole)
    sums = {**known, **digests(whole, [name for name in names if name not in known])}
    manifest = "".join(f"{sums[name]}  {name}\n" for name in names)
    (whole / MANIFEST).write_text(manifest, encoding="utf-8")


def fault(
    whole: Path,
    folders: Collection[str] | None = None,
    *,
    is_read: Callable[[str, Collection[str]], bool] | None = None,
) -> str | None:
    """Verifies the files of these folders (by default all): the first damage, or `None`.

    Files at the top are always verified. A file that the manifest lacks is damage only if
    `is_read(name, names in the manifest)`, that is, if its presence would change what is loaded.
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
        for name, digest in digests(whole, set(found).difference(extra)).items():
            if digest != listed[name]:
                return f"{name} is not what was saved (its SHA-256 differs)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    return None


def _files(whole: Path) -> list[str]:
    """Every file of the folder but its manifest and the system's own files, relative and sorted."""
    paths = (Path(folder, name) for folder, _, names in os.walk(whole) for name in names)
    names = {path.relative_to(whole).as_posix() for path in paths} - {MANIFEST}
    return sorted(name for name in names if not LITTER.fullmatch(name))


def digests(whole: Path, names: Collection[str]) -> dict[str, str]:
    """The SHA-256 of each file of a folder, by name; in threads, as hashing frees Python's lock.

    In large pieces, since after each a thread waits up to 5 ms for the lock while another computes:
    `hashlib.file_digest`, in pieces of 256 kB, hashed 290 MB/s beside a loop of Python, this 380.
    """

    def digest(name: str) -> str:
        sha, piece = hashlib.sha256(), memoryview(bytearray(PIECE))
        with (whole / name).open("rb", buffering=0) as file:
            while n := file.readinto(piece):
                sha.update(piece[:n])
        return sha.hexdigest()

    with ThreadPoolExecutor() as threads:
        return dict(zip(names, threads.map(digest, names), strict=True))


def sync(path: Path) -> None:
    """Syncs a file's bytes, or a folder's names, to the disk (fsync), against a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
