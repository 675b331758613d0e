"""Compiled programs are kept in a private folder, unless the user chose another."""

import base64
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from lechat_jax.devices.compile_cache import FOLDER, SETTINGS, enable_compilation_cache
from lechat_jax.errors import BadInput
from lechat_jax.quantize.scheme import scheme_for
from lechat_jax.train.step import StepOptions
from tests.devices.test_lowering import CONFIG, decoding, lowered, training

CANONICAL = "jax_hlo_source_file_canonicalization_regex"
NAMES = (FOLDER, *map(str.lower, SETTINGS))


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """JAX's settings as a fresh process has them, and as they were when the test is over."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    monkeypatch.setenv("LECHAT_CACHE", str(tmp_path / "cache"))
    for name in NAMES:
        monkeypatch.delenv(name.upper(), raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update(CANONICAL, None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_everything_compiled_is_kept_where_only_the_user_can_write(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "jax"
    folder.mkdir(parents=True, mode=0o777)
    folder.chmod(0o777)  # whatever it was
    enable_compilation_cache()
    assert [getattr(jax.config, name) for name in NAMES] == [str(folder), *SETTINGS.values()]
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
    assert [getattr(jax.config, name) for name in NAMES[1:3]] == [9.0, -1]


def test_the_environment_names_another_folder_in_which_everything_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path / "a" / "b")
    monkeypatch.setenv(FOLDER.upper(), folder)
    enable_compilation_cache()
    assert [getattr(jax.config, name) for name in NAMES] == [folder, *SETTINGS.values()]
    assert Path(folder).is_dir()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("named", ["gs://bucket/lechat", "{}/file/below"])
def test_a_named_folder_that_cannot_be_reached_is_refused(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket, because what reads Google's storage is not installed, and says so."""
    (tmp_path / "file").write_text("is in the way")
    named = named.format(tmp_path)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setenv(FOLDER.upper(), named)
    words = f"cannot be kept in {named} .*(install gcsfs|Not a directory).*name another folder"
    with pytest.raises(BadInput, match=words):
        enable_compilation_cache()


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


# A run is trained, with a sample at its end, and at last: how many programs were asked for, found
# in the cache, and compiled.
COUNTED = """
import collections, json, sys
from jax import monitoring
from lechat_jax.train import command as train

found = collections.Counter()
monitoring.register_event_listener(lambda name, **_: found.update([name.split("/")[-1]]))
run, *flags = sys.argv[1:]
assert train.main(["--out", run, *flags]) == 0
names = ("compile_requests_use_cache", "cache_hits", "cache_misses")
print("\\n" + json.dumps([found[name] for name in names]))
"""


@pytest.mark.slow
def test_a_copy_of_the_folder_elsewhere_spares_another_process_all_compiling(
    tmp_path: Path,
) -> None:
    """As another machine of the kind finds it: the training step, and prefill and decode."""
    text, first, second = tmp_path / "text.txt", tmp_path / "first", tmp_path / "elsewhere/second"
    text.write_text("".join(f"The square of {i} is {i * i}.\n" for i in range(400)))
    small = "--dim 16 --n-layers 1 --n-heads 2 --n-kv-heads 1 --head-dim 8 --hidden-dim 24".split()
    small += "--sliding-window 6 --batch 2 --block 16 --max-tokens 4 --steps 2".split()

    def programs(run: str, folder: Path) -> list[int]:
        env = {FOLDER.upper(): str(folder), "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", COUNTED, str(tmp_path / run), "--data", str(text), *small]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=240, env=os.environ | env
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    requested, _, misses = programs("run", first)
    assert misses > 0
    shutil.copytree(first, second)
    shutil.rmtree(first)
    assert programs("again", second) == [requested, requested, 0]


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_no_path_of_this_machine_is_in_the_body_of_a_kernel(platform: str) -> None:
    """Splash attention from JAX's own folder, and int4 products from lechat's."""

    def folders() -> set[str]:
        if platform == "tpu":
            call = training(StepOptions(dtype="bfloat16", backend="splash"))
        else:
            call = decoding("bfloat16", scheme_for("int4", CONFIG))
        program = re.sub(r" loc\(.*|^#loc.*", "", lowered(platform, call), flags=re.M)
        bodies = [
            base64.b64decode(body) for body in re.findall(r"body\\22: ?\\22([\w+/=]+)", program)
        ]
        texts = [program, *(body.decode("latin-1") for body in bodies)]
        return {path for text in texts for path in re.findall(r"[\w./-]*/\w+\.py", text)}

    assert any("/jax/" in path or "/lechat_jax/" in path for path in folders())
    enable_compilation_cache()
    assert folders() == set()
