"""A run's folder: never half-written, readable after a crash, refused when it cannot be used."""

import contextlib
import errno
import fcntl
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from lechat_jax.checkpoint.run import Run
from lechat_jax.errors import BadInput
from lechat_jax.files.lock import Lock

ROOT = Path(__file__).parents[2]
CONFIG = {"model": {"dim": 40}, "train": {"steps": 3}}
ROWS: list[dict[str, Any]] = [
    {"step": 1, "time_s": 0.5, "tokens": 24, "train/loss": 4.5},
    {"step": 2, "time_s": 1.0, "tokens": 48, "train/loss": 4.25, "train/tokens_per_sec": 9.0},
    {"step": 2, "time_s": 1.5, "tokens": 48, "val/loss": 4.0, "val/bpb": 1.5, "val/tokens": 8192},
    {"step": 3, "time_s": 2.0, "tokens": 72, "train/loss": 3.5},
]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.create(tmp_path / "run")
    run.config = CONFIG
    return run


@pytest.fixture
def killed_while_renaming(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As kill -9 would, at the worst moment; undone by `undo()`."""

    def die(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    return monkeypatch


# --- beginning ---


def test_a_new_run_is_empty_and_leaves_what_else_is_in_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    run = Run.create(folder)
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "notes.txt", "samples"]
    assert list(run.metrics()) == []
    assert (run.samples, run.checkpoints) == (folder / "samples", folder / "checkpoints")


def test_a_run_is_not_begun_over_another(run: Run) -> None:
    with pytest.raises(BadInput) as error:
        Run.create(run.folder)
    assert "holds a run already" in str(error.value)
    assert f"--resume {run.folder}" in str(error.value)
    assert "--out" in str(error.value)


@pytest.mark.parametrize("name", ["file", "file/run", "x" * 300])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadInput, match=r"^cannot write to .*; name another folder$"):
        Run.create(tmp_path / name)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_run_that_is_forgotten_leaves_its_name_and_what_is_not_its_own(run: Run) -> None:
    run.log(ROWS)
    (run.folder / "tokenizer.model.v1").touch()
    (run.folder / "notes.txt").write_text("mine")
    run.forget("tokenizer.model.v1")
    assert [path.name for path in run.folder.iterdir()] == ["notes.txt"]
    again = Run.create(run.folder)
    (again.folder / "notes.txt").unlink()
    again.forget()
    assert not again.folder.exists()


# --- one process at a time ---

HOLDER = """
import sys
from pathlib import Path
from lechat_jax.files.lock import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the folder, until its stdin ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


def test_a_run_that_is_trained_by_another_process_cannot_be_held(run: Run) -> None:
    run.release()
    with held(run.folder) as other:
        with pytest.raises(BadInput, match=f"is being trained by process {other.pid} on "):
            Run.open(run.folder).hold()
        assert Run.open(run.folder).config == CONFIG, "but it can be read"
        other.communicate("")
    Run.open(run.folder).hold()


def test_whatever_ends_the_holder_releases_the_run(run: Run) -> None:
    run.release()
    with held(run.folder) as other:
        other.kill()
    Run.open(run.folder).hold()


def test_of_two_processes_that_begin_a_run_one_does(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with held(folder) as other:
        with pytest.raises(BadInput, match=f"process {other.pid} on .*; wait for it, or stop it"):
            Run.create(folder)
        assert not (folder / "config.json").exists()
        other.communicate("")


def test_where_the_file_system_knows_no_locks_a_run_goes_on_without_and_says_so(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert not Lock(tmp_path).is_held
    run.release()
    run.hold()
    assert "has no locks" in capsys.readouterr().err


# --- opening again ---


def test_an_opened_run_has_the_config_it_was_given(run: Run) -> None:
    assert Run.open(run.folder).config == CONFIG


@pytest.mark.parametrize("name", ["nowhere", "empty", "file", "x" * 300])
def test_what_is_no_run_cannot_be_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"is not a training run: it has no config\.json$"):
        Run.open(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"model": {}, "tra', "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[]", "must have the parts 'model' and 'train'"),
        (b'{"model": {}}', "must have the parts 'model' and 'train'"),
        (b'{"model": [], "train": 3}', "must have the parts 'model' and 'train'"),
    ],
)
def test_a_damaged_config_is_named(run: Run, content: bytes, sentence: str) -> None:
    (run.folder / "config.json").write_bytes(content)
    with pytest.raises(BadInput, match=f"config.json {sentence}"):
        _ = Run.open(run.folder).config


# --- whole files ---


def test_a_file_is_the_old_one_or_the_new_one(
    run: Run, killed_while_renaming: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run.config = {"model": {}, "train": {"steps": 99}}
    with pytest.raises(KeyboardInterrupt):
        run.write("samples/step-000001.txt", "To be")
    assert Run.open(run.folder).config == CONFIG
    assert not (run.samples / "step-000001.txt").exists()
    killed_while_renaming.undo()
    path = run.write("samples/step-000001.txt", "To be, caf\u00e9")
    assert path == run.samples / "step-000001.txt"
    assert path.read_text(encoding="utf-8") == "To be, caf\u00e9"
    assert [each.name for each in run.samples.iterdir()] == [path.name]  # no rest of the first


# --- metrics ---


def test_metrics_are_an_object_a_line(run: Run) -> None:
    run.log(ROWS[:1])
    run.log(ROWS[1:])
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == ROWS
    assert list(run.metrics()) == ROWS


def test_a_logged_float_is_read_with_the_same_bits(run: Run) -> None:
    rng = np.random.default_rng(0)
    floats = rng.integers(2**64, size=2000, dtype=np.uint64).view(np.float64)
    losses = [float(x) for x in floats if np.isfinite(x)] + [0.1, -0.0, 5e-324]
    run.log([{"step": i, "train/loss": loss} for i, loss in enumerate(losses)])
    assert [row["train/loss"].hex() for row in run.metrics()] == [loss.hex() for loss in losses]


def test_a_crash_may_cut_the_metrics_anywhere(run: Run) -> None:
    run.log(ROWS)
    path = run.folder / "metrics.jsonl"
    whole = path.read_bytes()
    ends = np.cumsum([len(line) for line in whole.splitlines(keepends=True)]) - 1
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        kept = ROWS[: sum(length >= ends)]  # the last newline may be missing
        assert list(run.metrics()) == kept
        run.rewind(99)
        run.log(ROWS[:1])
        assert list(run.metrics()) == kept + ROWS[:1]


def test_rewinding_forgets_what_came_after_a_step(run: Run) -> None:
    run.log(ROWS)
    run.rewind(2)
    assert list(run.metrics()) == ROWS[:3]
    run.log(ROWS[3:])
    assert list(run.metrics()) == ROWS
    run.rewind(0)
    assert list(run.metrics()) == []


def test_rewinding_is_whole_or_not_at_all(
    run: Run, killed_while_renaming: pytest.MonkeyPatch
) -> None:
    run.log(ROWS)
    with pytest.raises(KeyboardInterrupt):
        run.rewind(1)
    assert list(run.metrics()) == ROWS


# --- the curve ---


def size_of_png(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


@pytest.mark.parametrize("n_rows", [0, 1, 4])
def test_the_curve_is_a_picture_however_little_was_measured(run: Run, n_rows: int) -> None:
    run.log(ROWS[:n_rows])
    path = run.draw()
    assert path == run.folder / "loss.png"
    assert size_of_png(path) == (1050, 600)


def test_the_curve_is_cut_where_the_loss_is_that_of_guessing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: [drawn.append(self), save(self, *a, **k)]
    )
    losses = [10.9, 9.0, *np.linspace(5.0, 4.0, 98).tolist()]
    run.log(
        [{"step": i, "tokens": i, "train/loss": loss} for i, loss in enumerate(losses, start=1)]
    )
    run.log([{"step": 50, "tokens": 50, "val/bpb": 2.0, "val/tokens": 8}])
    run.log([{"step": 100, "tokens": 100, "val/bpb": 1.5, "val/tokens": 90, "val/held_out": 400}])
    run.draw()
    axes, bits = drawn[0].axes
    low, high = axes.get_ylim()
    assert 3.9 < low < 4.0
    assert 4.9 < high < 5.1
    assert axes.get_title() == "run · 100 tokens · loss from 10.90 (cut off)"
    _, labels = bits.get_legend_handles_labels()
    assert labels == ["1.500 on 90 of 400 held-out tokens"]


def test_the_curve_shows_what_was_measured(run: Run) -> None:
    run.log(ROWS[:2])
    without = run.draw().read_bytes()
    run.log(ROWS[2:])
    assert run.draw().read_bytes() != without
