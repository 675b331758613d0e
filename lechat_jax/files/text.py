"""Text files: byte order marks, UTF-8/16/32, decompression (gz, bz2, xz, zst), line ends.

Whatever a person hands over is read here, so that an encoding or an end of line that one command
knows is known to all. Standard library only; the library `zstandard` is imported for a `.zst`.
"""

import bz2
import codecs
import gzip
import importlib
import io
import lzma
import re
import shlex
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from lechat_jax.errors import BadInput

# UTF-32 before UTF-16, whose mark in little-endian order is its beginning.
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_LINE = re.compile(r"[^\r\n]+")


class NotText(BadInput):
    """A file whose bytes are not text in a known encoding."""


def read_text(file: Path, numbered: bool = False) -> str:
    """Reads a text file, decompressed and without its byte order mark (BOM).

    The BOM tells UTF-8, UTF-16 and UTF-32 apart; without one the text is UTF-8. The suffix .gz,
    .bz2, .xz or .zst names the compression. Line ends stay as they are.

    Args:
        file: its path.
        numbered: whether the error message names the line.

    Raises:
        NotText: it is not in one of these encodings, or not compressed as its name says.
        BadInput: the file cannot be read.
    """
    return decoded(_decompressed(read_bytes(file), file), str(file), numbered)


def read_bytes(file: Path) -> bytes:
    """Reads the bytes of a file as stored.

    Raises:
        BadInput: the file cannot be read, or is a folder.
    """
    try:
        return file.read_bytes()
    except IsADirectoryError as error:
        raise BadInput(f"{file} is a folder, where a file is needed") from error
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror or error}") from error


def read_stdin() -> str:
    """Reads stdin as text, by its byte order mark or as UTF-8, whatever the locale.

    Raises:
        NotText: it has no byte order mark and is not UTF-8.
    """
    if not isinstance(sys.stdin, io.TextIOWrapper):
        return sys.stdin.read()
    return decoded(sys.stdin.buffer.read(), "stdin")


def decoded(raw: bytes, name: str, numbered: bool = False) -> str:
    r"""Decodes bytes to text by their byte order mark, which is dropped; see `read_text`.

    >>> decoded("caf\u00e9".encode("utf-16"), "a.txt"), decoded(b"\xef\xbb\xbfcaf", "b.txt")
    ('café', 'caf')

    Raises:
        NotText: they are not text; the message gives `name` and the place.
    """
    mark = next((mark for mark in MARKS if raw.startswith(mark)), b"")
    encoding = MARKS.get(mark, "utf-8")
    try:
        text = raw[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        start = len(mark) + error.start
        where = f"line {raw[:start].count(10) + 1}, " if numbered else ""
        raise NotText(
            f"{name} is not {encoding.upper()[:6].rstrip('-')} text: {where}byte {start} cannot "
            f"be decoded; save it as UTF-8 (if it is Latin-1: iconv -f latin1 -t utf-8 "
            f"{shlex.quote(name)} > NEW), or name only text files"
        ) from error
    if (zero := text.find("\0")) >= 0:
        byte = len(mark) + len(text[:zero].encode(encoding))
        raise NotText(
            f"{name} is no text: byte {byte} is zero; if it is UTF-16 without a byte order mark: "
            f"iconv -f utf-16le -t utf-8 {shlex.quote(name)} > NEW"
        )
    return text


def stdin_encoding() -> str | None:
    """Detects the encoding of stdin by its first bytes; `None` where they cannot be peeked at."""
    buffer = sys.stdin.buffer
    return encoding_of(buffer.peek(4)) if isinstance(buffer, io.BufferedReader) else None


def encoding_of(beginning: bytes) -> str:
    r"""Detects an encoding by the byte order mark: Python's codec, which drops the mark.

    >>> encoding_of(b"\xff\xfeH\0"), encoding_of(b"Hello")
    ('utf-16', 'utf-8-sig')
    """
    found = next((MARKS[mark] for mark in MARKS if beginning.startswith(mark)), "utf-8-sig")
    return "utf-8-sig" if found.startswith("utf-8") else found[:6]


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    r"""The non-blank lines of a text, each with its number, from 1.

    Lines end in LF, CR LF or CR only: Python's `splitlines` also splits at U+2028, which JSON
    strings may hold.

    >>> list(lines_of("a\r\n\nb\u2028c\rd"))
    [(1, 'a'), (3, 'b\u2028c'), (4, 'd')]
    """
    number, end = 1, 0
    for found in _LINE.finditer(text):
        between = text[end : found.start()]
        number += between.count("\n") + between.count("\r") - between.count("\r\n")
        end = found.end()
        if not found[0].isspace():
            yield number, found[0]


def plain_name(file: Path) -> str:
    """The lower-case name of a file without its compression suffix.

    >>> plain_name(Path("Chats.JSONL.gz"))
    'chats.jsonl'
    """
    name = file.name.lower()
    return name.removesuffix(next((end for end in _PACKED if name.endswith(end)), ""))


def _decompressed(raw: bytes, file: Path) -> bytes:
    unpack = _PACKED.get(file.suffix.lower())
    if unpack is None:
        return raw
    try:
        return unpack(raw, file)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise NotText(
            f"{file} is not whole, or not compressed as its name says: {error}"
        ) from error


def _zstd(raw: bytes, file: Path) -> bytes:
    """Decompresses Zstandard: by Python 3.14's own module, or the library `zstandard`."""
    try:
        library = importlib.import_module("compression.zstd")
        make = library.ZstdDecompressor
    except ImportError:
        try:
            library = importlib.import_module("zstandard")
        except ImportError:
            raise BadInput(
                f"{file} needs a library to be read: pip install zstandard (or decompress it: "
                f"zstd -d {shlex.quote(str(file))})"
            ) from None
        make = library.ZstdDecompressor().decompressobj
    frames = []
    try:
        while raw:
            frame = make()
            frames.append(frame.decompress(raw))
            if not frame.eof:
                raise EOFError("it ends within a frame")
            raw = frame.unused_data
    except library.ZstdError as error:
        raise OSError(str(error)) from error
    return b"".join(frames)


_PACKED: dict[str, Callable[[bytes, Path], bytes]] = {
    ".gz": lambda raw, file: gzip.decompress(raw),
    ".bz2": lambda raw, file: bz2.decompress(raw),
    ".xz": lambda raw, file: lzma.decompress(raw),
    ".zst": _zstd,
}
