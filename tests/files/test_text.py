"""Files as people have them are read as what they mean, and refused in one sentence."""

import bz2
import gzip
import io
import lzma
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from lechat_jax.errors import BadInput
from lechat_jax.files.text import BLOCK, encoding_of, lines_of, plain_name, read_stdin, read_text

TEXT = "na\u00efve \u6f22\u5b57 \U0001f600\r\nand\u2028more\n"


def written(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_mark_says_which_unicode_it_is(tmp_path: Path, encoding: str) -> None:
    assert read_text(written(tmp_path / "a.txt", TEXT.encode(encoding))) == TEXT


@pytest.mark.parametrize("order", ["le", "be"])
def test_either_order_of_bytes_is_read(tmp_path: Path, order: str) -> None:
    for bits in (16, 32):
        raw = f"\ufeff{TEXT}".encode(f"utf-{bits}-{order}")
        assert read_text(written(tmp_path / "a.txt", raw)) == TEXT
        stream = io.TextIOWrapper(io.BytesIO(raw), encoding_of(raw[:4]), newline="")
        assert stream.read() == TEXT


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".gz", gzip.compress),
        (".GZ", lambda raw: gzip.compress(raw[:9]) + gzip.compress(raw[9:])),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", zstandard.compress),
        (".zst", lambda raw: zstandard.compress(raw[:9]) + zstandard.compress(raw[9:])),
    ],
)
def test_a_compressed_file_is_the_text_in_it(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    whole = compress(TEXT.encode())
    file = written(tmp_path / f"Chats.JSONL{suffix}", whole)
    assert (read_text(file), plain_name(file)) == (TEXT, "chats.jsonl")
    for broken in (whole[:-3], b"plain text"):
        with pytest.raises(BadInput, match="is not whole, or not compressed as its name says"):
            read_text(written(file, broken))


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".zst", zstandard.compress)],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_large_file_is_read_whatever_a_block_gives(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes], encoding: str
) -> None:
    rng = random.Random(0)  # characters that hardly compress, so that a block may give nothing
    text = "".join(chr(rng.randint(0x4E00, 0x9FFF)) for _ in range(400_000))
    raw = compress(b"") + compress(text.encode(encoding)) + bytes(200_000 * (suffix == ".gz"))
    assert read_text(written(tmp_path / f"a.txt{suffix}", raw)) == text


def test_a_missing_decompressor_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("compression.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BadInput, match=r"a\.zst needs a library .*: pip install zstandard"):
        read_text(written(tmp_path / "a.zst", zstandard.compress(b"x")))


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"ab\ncaf\xe9\n", "is not UTF-8 text: line 2, byte 6 cannot be decoded"),
        (b"\xff\xfeH\0i", "is not UTF-16 text: line 1, byte 4 cannot be decoded"),
        (b"a\rb\r\nc\xe9", "is not UTF-8 text: line 3, byte 6 cannot be decoded"),
        (b"a" * (BLOCK - 1) + b"\r\nc\xe9", f"is not UTF-8 text: line 2, byte {BLOCK + 2} cannot"),
        ("\ufeff\u010a\n\u010a".encode("utf-16-le") + b"\0", "is not UTF-16 text: line 2, byte 8"),
        ("Hi".encode("utf-16-le"), "is no text: byte 1 is zero; if it is UTF-16 without a byte"),
        (b"\xef\xbb\xbfab\0", "is no text: byte 5 is zero"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(tmp_path: Path, raw: bytes, says: str) -> None:
    with pytest.raises(BadInput) as refused:
        read_text(written(tmp_path / "a b.txt", raw), numbered=True)
    assert str(refused.value).startswith(f"{tmp_path}/a b.txt {says}")
    assert f"-t utf-8 '{tmp_path}/a b.txt' > NEW" in str(refused.value), "as a shell reads it"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is a folder, where a file is needed"):
        read_text(tmp_path)


def test_lines_end_as_they_do_on_any_system() -> None:
    expected = [(1, "a"), (2, "b"), (4, "c\u2028\x0b\x85d"), (5, "e")]
    for end in ("\n", "\r\n", "\r"):
        text = end.join(["a", "b", " ", "c\u2028\x0b\x85d", "e", ""])
        for size in (1, 2, 3, 100):
            pieces = [text[i : i + size] for i in range(0, len(text), size)]
            assert list(lines_of(pieces)) == expected


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_stdin_is_read_whatever_the_locale(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(TEXT.encode(encoding)), "ascii")
    monkeypatch.setattr(sys, "stdin", stream)
    assert read_stdin() == TEXT
