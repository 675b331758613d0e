"""Text files: byte order marks, UTF-8/16/32, decompression (gz, bz2, xz, zst), line ends.

Whatever a person hands over is read here, so that an encoding or an end of line that one command
knows is known to all. Standard library only; the library `zstandard` is imported for a `.zst`.
"""

import bz2
import codecs
import importlib
import io
import itertools
import lzma
import re
import shlex
import sys
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from lechat_jax.errors import BadInput

# UTF-32 before UTF-16, whose mark in little-endian order is its beginning.
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
BLOCK = 1 << 16  # bytes that are read at a time, of which a decompressor may make a lot
_LINE = re.compile(r"[^\r\n]+")

OnRead = Callable[[int], None]


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
    return "".join(stream_text(file, numbered))


def stream_text(
    file: Path, numbered: bool = False, on_read: OnRead = lambda n_bytes: None
) -> Iterator[str]:
    """Reads a text file as `read_text` does, a piece at a time, so that any size fits into memory.

    Args:
        file: its path.
        numbered: whether the error message names the line.
        on_read: called with the number of stored bytes that were read since the last call.

    Raises:
        NotText: it is not in one of these encodings, or not compressed as its name says.
        BadInput: the file cannot be read.
    """
    return _decoded(_decompressed(read_blocks(file, on_read), file), str(file), numbered)


def read_blocks(file: Path, on_read: OnRead = lambda n_bytes: None) -> Iterator[bytes]:
    """Reads the bytes of a file as stored, in blocks.

    Raises:
        BadInput: the file cannot be read, or is a folder.
    """
    try:
        with file.open("rb") as stored:
            while block := stored.read(BLOCK):
                on_read(len(block))
                yield block
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
    return "".join(_decoded([sys.stdin.buffer.read()], "stdin"))


def _decoded(blocks: Iterable[bytes], name: str, numbered: bool = False) -> Iterator[str]:
    r"""Decodes bytes to text by their byte order mark, which is dropped; see `read_text`.

    >>> "".join(_decoded(["caf\u00e9".encode("utf-16")], "a.txt"))
    'café'

    Raises:
        NotText: they are not text; the message gives `name` and the place.
    """
    blocks, beginning = iter(blocks), b""
    while len(beginning) < 4 and (block := next(blocks, b"")):
        beginning += block
    mark = next((mark for mark in MARKS if beginning.startswith(mark)), b"")
    encoding = MARKS.get(mark, "utf-8")
    decoder = codecs.getincrementaldecoder(encoding)()
    fed, n_lines, last = len(mark), 1, ""
    for block in itertools.chain([beginning[fed:]], blocks, [b""]):
        start = fed - len(decoder.getstate()[0])  # byte that the text of this block begins at
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            before = n_lines + _ends(error.object[: error.start].decode(encoding))
            where = f"line {before}, " if numbered else ""
            raise NotText(
                f"{name} is not {encoding.upper()[:6].rstrip('-')} text: {where}byte "
                f"{start + error.start} cannot be decoded; save it as UTF-8 (if it is Latin-1: "
                f"iconv -f latin1 -t utf-8 {shlex.quote(name)} > NEW), or name only text files"
            ) from error
        if (zero := text.find("\0")) >= 0:
            raise NotText(
                f"{name} is no text: byte {start + len(text[:zero].encode(encoding))} is zero; if "
                "it is UTF-16 without a byte order mark: "
                f"iconv -f utf-16le -t utf-8 {shlex.quote(name)} > NEW"
            )
        fed += len(block)
        n_lines += _ends(last + text) - _ends(last) if numbered else 0  # CR LF is one
        last = text[-1:]
        yield text


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


def lines_of(pieces: Iterable[str]) -> Iterator[tuple[int, str]]:
    r"""The non-blank lines of a text that comes in pieces, each with its number, from 1.

    Lines end in LF, CR LF or CR only: Python's `splitlines` also splits at U+2028, which JSON
    strings may hold.

    >>> list(lines_of(["a\r\n\nb\u2028", "c\rd"]))
    [(1, 'a'), (3, 'b\u2028c'), (4, 'd')]
    """
    number, rest = 1, []
    for piece in pieces:
        cut = piece.rfind("\n") + 1  # not behind a CR, since an LF may follow
        if cut:
            number = yield from _numbered("".join([*rest, piece[:cut]]), number)
            rest = []
        rest.append(piece[cut:])
    yield from _numbered("".join(rest), number)


def _numbered(text: str, number: int) -> Generator[tuple[int, str], None, int]:
    """The non-blank lines of a text whose first has this number; returns the number after it."""
    end = 0
    for found in _LINE.finditer(text):
        number += _ends(text[end : found.start()])
        end = found.end()
        if not found[0].isspace():
            yield number, found[0]
    return number + _ends(text[end:])


def _ends(between: str) -> int:
    """Number of ends of lines in a text of these alone."""
    return between.count("\n") + between.count("\r") - between.count("\r\n")


def plain_name(file: Path) -> str:
    """The lower-case name of a file without its compression suffix.

    >>> plain_name(Path("Chats.JSONL.gz"))
    'chats.jsonl'
    """
    name = file.name.lower()
    return name.removesuffix(next((end for end in _PACKED if name.endswith(end)), ""))


def _decompressed(blocks: Iterator[bytes], file: Path) -> Iterator[bytes]:
    """The content of a file whose suffix names its compression, else its bytes as stored."""
    compression = _PACKED.get(file.suffix.lower())
    if compression is None:
        yield from blocks
        return
    make, error_of_library = compression(file)
    try:
        yield from _unpacked(blocks, make)
    except (OSError, EOFError, ValueError, error_of_library) as error:
        raise NotText(
            f"{file} is not whole, or not compressed as its name says: {error}"
        ) from error


def _unpacked(blocks: Iterable[bytes], make: Callable[[], Any]) -> Iterator[bytes]:
    """Decompresses one or several streams (gzip members, Zstandard frames) behind each other.

    Gives no empty block, which some decompressors make until they have read enough.
    """
    stream, padding = None, b""
    for block in blocks:
        rest = block if stream else block.lstrip(padding)
        while rest:
            stream = stream or make()
            if made := stream.decompress(rest):
                yield made
            if not stream.eof:
                break
            padding = b"\0"  # which may follow a stream of gzip and xz
            rest, stream = stream.unused_data.lstrip(padding), None
    if stream:
        raise EOFError("it ends too early")


def _zstd(file: Path) -> tuple[Callable[[], Any], type[Exception]]:
    """Zstandard by Python 3.14's own module, or the library `zstandard`."""
    try:
        library = importlib.import_module("compression.zstd")
        return library.ZstdDecompressor, library.ZstdError
    except ImportError:
        pass
    try:
        library = importlib.import_module("zstandard")
    except ImportError:
        raise BadInput(
            f"{file} needs a library to be read: pip install zstandard (or decompress it: "
            f"zstd -d {shlex.quote(str(file))})"
        ) from None
    return library.ZstdDecompressor().decompressobj, library.ZstdError


# What makes a decompressor of one stream, and its error, by suffix.
_PACKED: dict[str, Callable[[Path], tuple[Callable[[], Any], type[Exception]]]] = {
    ".gz": lambda file: (lambda: zlib.decompressobj(31), zlib.error),  # 31: with gzip's header
    ".bz2": lambda file: (bz2.BZ2Decompressor, OSError),
    ".xz": lambda file: (lzma.LZMADecompressor, lzma.LZMAError),
    ".zst": _zstd,
}
