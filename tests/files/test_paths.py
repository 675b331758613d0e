"""Where the cache lies, and that it is private."""

import stat
from pathlib import Path

import pytest

from lechat_jax.files.paths import cache_home, fault_of_name


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LECHAT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_the_cache_lies_below_home(tmp_path: Path) -> None:
    assert cache_home() == tmp_path / "home" / ".cache" / "lechat"


def test_xdg_cache_home_moves_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_home() == tmp_path / "xdg" / "lechat"


def test_a_relative_xdg_cache_home_does_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "xdg")
    assert cache_home() == tmp_path / "home" / ".cache" / "lechat"


@pytest.mark.parametrize(("named", "below"), [("~/own", "home/own"), ("own", "here/own")])
def test_lechat_cache_names_the_folder_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: str, below: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("LECHAT_CACHE", named)
    assert cache_home() == tmp_path / below


def test_only_its_owner_can_enter_it() -> None:
    folder = cache_home()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert cache_home() == folder, "making it twice is no error"


def test_a_file_in_its_place_is_an_os_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LECHAT_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(OSError, match="below"):
        cache_home()


@pytest.mark.parametrize(
    "name", ["a", "a b", "-a", "a..b", ".a", "_", "caf\u00e9", "console", "x" * 200]
)
def test_a_plain_name_is_one_folder_anywhere(name: str) -> None:
    assert fault_of_name(name) is None


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("", "is empty or dots alone"),
        ("..", "is empty or dots alone"),
        (" . ", "is empty or dots alone"),
        ("../x", "has a '/' in it"),
        ("..\\x", r"has a '\\' in it"),
        ("C:x", "has a ':' in it"),
        ("a\tb", r"has a character in it that cannot be printed, '\t'"),
        ("a\udcff", r"has a character in it that cannot be printed, '\udcff'"),
        ("a.", "begins with a space, or ends with one or a dot"),
        (" a", "begins with a space, or ends with one or a dot"),
        ("NUL", "is a device's on Windows"),
        ("com1.tar.gz", "is a device's on Windows"),
        ("\u00e9" * 101, "is longer than 200 bytes"),
    ],
)
def test_a_name_that_leads_elsewhere_or_nowhere_is_told(name: str, fault: str) -> None:
    assert fault_of_name(name) == fault


def test_no_home_is_an_os_error_that_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(OSError, match="set LECHAT_CACHE"):
        cache_home()
