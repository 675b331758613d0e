"""A cache that is whole or not there, and whose damage is seen."""

import stat
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lechat_jax.data import token_cache
from lechat_jax.data.token_cache import HEADER, DamagedCache, read_arrays, write_arrays

UINT16 = np.dtype(np.uint16)
TRAIN, VAL = np.arange(1000, dtype=UINT16), np.arange(5, dtype=UINT16)[::-1].copy()

Streams = tuple[np.ndarray, np.ndarray]


def write_streams(path: Path, streams: Streams) -> None:
    train, val = streams
    write_arrays(path, {"train": [train[:400], train[400:]], "val": [val]})


def read_streams(path: Path, dtype: np.dtype) -> Streams | None:
    found = read_arrays(path, {"train": dtype, "val": dtype})
    return (found["train"], found["val"]) if found else None


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "below" / "x.tokens"
    write_streams(path, (TRAIN, VAL))
    return path


def test_what_was_written_is_read_as_a_memory_map(file: Path) -> None:
    streams = read_streams(file, UINT16)
    assert streams is not None
    for stream, written in zip(streams, (TRAIN, VAL), strict=True):
        assert isinstance(stream, np.memmap)
        assert stream.dtype == UINT16
        assert stream.tolist() == written.tolist()
        assert not stream.flags.writeable
    assert [path.name for path in file.parent.iterdir()] == ["x.tokens"], "nothing beside it"
    assert file.stat().st_size == HEADER + 2 * 1005


def test_only_its_owner_can_read_it(file: Path) -> None:
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_no_file_is_no_streams(tmp_path: Path) -> None:
    assert read_streams(tmp_path / "none", UINT16) is None


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "x.tokens"
    write_streams(path, (TRAIN, VAL))
    return path


@given(data=st.data())
def test_a_flipped_bit_never_gives_other_tokens(victim: Path, data: st.DataObject) -> None:
    whole = victim.read_bytes()
    place = data.draw(st.one_of(st.integers(0, 120), st.integers(0, len(whole) - 1)))
    broken = bytearray(whole)
    broken[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        victim.write_bytes(broken)
        streams = read_streams(victim, UINT16)
    except DamagedCache:
        return
    finally:
        victim.write_bytes(whole)
    assert place < HEADER, "only there, in white space say, a bit may mean nothing"
    assert streams is not None
    assert [stream.tolist() for stream in streams] == [TRAIN.tolist(), VAL.tolist()]


@pytest.mark.parametrize("size", [0, 1, HEADER - 1, HEADER, HEADER + 1, HEADER + 2 * 1005 - 1])
def test_a_truncated_file_is_damaged(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(DamagedCache, match=r"unreadable header|bytes instead of"):
        read_streams(file, UINT16)


def test_the_middle_of_the_tokens_is_checked(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[HEADER + 1000] ^= 1
    file.write_bytes(raw)
    with pytest.raises(DamagedCache, match="wrong checksum"):
        read_streams(file, UINT16)


def test_the_border_of_the_streams_is_checked(file: Path) -> None:
    raw = file.read_bytes()
    moved = raw.replace(b'"train": 1000, "val": 5', b'"train": 1002, "val": 3')
    assert moved != raw
    file.write_bytes(moved)
    with pytest.raises(DamagedCache, match="wrong checksum"):
        read_streams(file, UINT16)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{}",
        b'{"train": null, "val": 5, "sha256": ""}',
        b'{"train": -5, "val": 1010, "sha256": ""}',
        b'{"train": 999.5, "val": 5.5, "sha256": ""}',
        b'{"train": 1e400, "val": 5, "sha256": ""}',
    ],
)
def test_a_strange_header_is_damage_and_no_crash(file: Path, header: bytes) -> None:
    file.write_bytes(header.ljust(HEADER) + file.read_bytes()[HEADER:])
    with pytest.raises(DamagedCache):
        read_streams(file, UINT16)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache.os, "replace", full)
    before = file.read_bytes()
    with pytest.raises(OSError, match="No space left"):
        write_streams(file, (VAL, TRAIN))
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_readers_keep_the_file_they_opened(file: Path) -> None:
    streams = read_streams(file, UINT16)
    assert streams is not None
    write_streams(file, (VAL, TRAIN))
    assert streams[0].tolist() == TRAIN.tolist()


def test_writers_at_the_same_time_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "x.tokens"
    versions = [(TRAIN + i, VAL) for i in range(4)]
    threads = [threading.Thread(target=write_streams, args=(path, v)) for v in versions * 5]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    streams = read_streams(path, UINT16)
    assert streams is not None
    assert streams[0].tolist() in [version[0].tolist() for version in versions]
    assert list(tmp_path.iterdir()) == [path]
