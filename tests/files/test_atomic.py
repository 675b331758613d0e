"""A file is written whole or not at all, and whether it can be is known before the work."""

import os
import shutil
import threading
from pathlib import Path

import pytest

from lechat_jax.errors import BadInput
from lechat_jax.files import atomic
from lechat_jax.files.atomic import check_new_folder, check_writable, write_atomic

GB = 10**9
full_disk = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has one")


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- writing ---


@pytest.mark.parametrize("content", ["To be, caf\u00e9\n", b"\x89PNG"])
def test_a_file_has_what_was_written(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "report"
    path.write_text("old")
    write_atomic(path, content)
    raw = content if isinstance(content, bytes) else content.encode()
    assert path.read_bytes() == raw
    assert everything_in(tmp_path) == ["report"]


def test_what_a_link_names_is_written_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomic(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    pipe, heard = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: heard.append(pipe.read_text()))
    reader.start()
    write_atomic(pipe, "{}")
    reader.join(10)
    assert heard == ["{}"]
    assert pipe.is_fifo()


@full_disk
def test_a_device_is_written_to_and_stays_one() -> None:
    write_atomic(Path("/dev/null"), "gone")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(BadInput, match=r"cannot write /dev/full .No space left on device.; name"):
        write_atomic(Path("/dev/full"), "no room")


# --- asked before ---

NO_FILES = {
    "a folder": ("folder", "folder is a folder; name a file in it"),
    "in no folder": ("nowhere/report.json", "there is no folder .*nowhere to write report.json to"),
    "in a file": ("file/report.json", "there is no folder .*file to write report.json to"),
    "a name too long": ("x" * 300, "cannot write .*File name too long"),
}


@pytest.mark.parametrize(("name", "sentence"), NO_FILES.values(), ids=NO_FILES)
def test_a_file_that_could_not_be_written_is_refused(
    name: str, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadInput, match=sentence):
        check_writable(None, tmp_path / name)
    assert everything_in(tmp_path) == ["file", "folder"]


@full_disk
def test_so_is_one_on_a_full_disk() -> None:
    with pytest.raises(BadInput, match=r"cannot write /dev/full .No space left on device."):
        check_writable(Path("/dev/full"))


def test_a_disk_that_fills_with_the_probe_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for asks in (check_writable, check_new_folder):
        with pytest.raises(BadInput, match="No space left on device"):
            asks(tmp_path / "new")
    assert everything_in(tmp_path) == []


def test_one_file_cannot_hold_two_reports(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="report is to hold two things"):
        check_writable(tmp_path / "report", None, tmp_path / "report")


def test_a_file_that_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("mine")
    check_writable(tmp_path / "old", tmp_path / "new", None)
    assert everything_in(tmp_path) == ["old"]
    assert (tmp_path / "old").read_text() == "mine"


@pytest.mark.parametrize("name", ["file", "file/deep/run", "x" * 300])
def test_a_folder_that_could_not_be_made_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadInput, match=r"cannot write to .*; name another folder"):
        check_new_folder(tmp_path / name)
    assert everything_in(tmp_path) == ["file"]


def test_a_folder_that_can_be_made_is_not_made_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = shutil.disk_usage(tmp_path)._replace(free=3 * GB)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: disk)
    check_new_folder(tmp_path / "deep" / "run", 3 * GB)
    with pytest.raises(BadInput, match=r"needs 3\.01 GB and 3\.00 GB of the disk are free; make"):
        check_new_folder(tmp_path / "deep" / "run", 3_010_000_000)
    assert everything_in(tmp_path) == []
