"""Compiled programs are kept in a private folder, unless the user chose another."""

import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from lechat_jax.devices.compile_cache import enable_compilation_cache

NAMES = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """JAX's settings as a fresh process has them, and as they were when the test is over."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    monkeypatch.setenv("LECHAT_CACHE", str(tmp_path / "cache"))
    for name in NAMES:
        monkeypatch.delenv(name.upper(), raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_everything_compiled_is_kept_where_only_the_user_can_write(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "jax"
    folder.mkdir(parents=True, mode=0o777)
    folder.chmod(0o777)  # whatever it was
    enable_compilation_cache()
    assert [getattr(jax.config, name) for name in NAMES] == [str(folder), 0.0, -1]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_that_was_chosen_already_is_left_alone(tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    before = [getattr(jax.config, name) for name in NAMES]
    enable_compilation_cache()
    assert [getattr(jax.config, name) for name in NAMES] == before
    assert not (tmp_path / "cache").exists()


def test_thresholds_in_the_environment_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "9")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 9.0)
    enable_compilation_cache()
    assert [getattr(jax.config, name) for name in NAMES[1:]] == [9.0, -1]


def test_a_folder_that_cannot_be_made_is_reported_and_does_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file is in the way")
    enable_compilation_cache()
    assert getattr(jax.config, NAMES[0]) is None
    assert capsys.readouterr().err.startswith("warning: compiled programs are not kept: ")


def test_the_second_process_finds_what_the_first_compiled(tmp_path: Path) -> None:
    program = """
import jax
from jax import monitoring
from lechat_jax.devices.compile_cache import enable_compilation_cache

found = []
monitoring.register_event_listener(lambda name, **_: found.append(name))
enable_compilation_cache()
jax.jit(lambda x: x * 2 + 1)(1.0)
print(found.count("/jax/compilation_cache/cache_hits"))
"""
    command = [sys.executable, "-c", program]
    runs = [subprocess.run(command, capture_output=True, text=True, timeout=120) for _ in range(2)]
    hits = [int(run.stdout) for run in runs]
    assert hits[0] == 0
    assert hits[1] > 0
