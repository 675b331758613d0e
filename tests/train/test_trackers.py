"""Experiment trackers hear what the run's own metrics say."""

import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from tensorboardX.proto import event_pb2

from lechat_jax.checkpoint.run import Run
from lechat_jax.errors import BadInput
from lechat_jax.train.trackers import profile_steps, track_in_tensorboard, track_in_wandb

ROOT = Path(__file__).parents[2]
ROWS: list[dict[str, Any]] = [
    {"step": 1, "time_s": 0.5, "tokens": 24, "train/loss": 4.5},
    {"step": 2, "time_s": 1.0, "tokens": 48, "train/loss": 4.25, "train/tokens_per_sec": 9.0},
    {"step": 2, "time_s": 1.5, "tokens": 48, "val/loss": 4.0, "val/bpb": 1.5, "val/tokens": 8192},
    {"step": 3, "time_s": 2.0, "tokens": 72, "train/loss": 3.5},
]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.create(tmp_path / "run")
    run.config = {"model": {"dim": 40}, "train": {"steps": 3}}
    return run


# --- TensorBoard ---


def events(folder: Path) -> list[tuple[int, str, float]]:
    """Step, name and value of each scalar in an event file: length, check, event, check."""
    (path,) = folder.glob("events.out.tfevents.*")
    content, found = path.read_bytes(), []
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        event = vars(event_pb2)["Event"].FromString(content[12 : 12 + size])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        content = content[16 + size :]
    return found


def test_the_same_metrics_are_in_tensorboards_file_when_the_program_ends(run: Run) -> None:
    program = f"""
from pathlib import Path
from lechat_jax.checkpoint.run import Run
from lechat_jax.train.trackers import track_in_tensorboard
run = Run.open(Path({str(run.folder)!r}))
track_in_tensorboard(run)
run.log({ROWS!r})
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)
    assert sorted(events(run.folder / "tensorboard")) == [
        (1, "train/loss", 4.5),
        (2, "train/loss", 4.25),
        (2, "train/tokens_per_sec", 9.0),
        (2, "val/bpb", 1.5),
        (2, "val/loss", 4.0),
        (2, "val/tokens", 8192.0),
        (3, "train/loss", 3.5),
    ]
    assert list(run.metrics()) == ROWS


def test_without_the_extra_tensorboard_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(BadInput, match="pip install 'lechat-jax\\[tensorboard\\]'"):
        track_in_tensorboard(run)


def test_weights_and_biases_hear_the_same_under_one_id_for_good(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the library, which would ask for an account or for its offline mode."""
    run.config = {"model": {"dim": 40}, "train": {"steps": 3}}
    started: list[dict[str, Any]] = []
    heard: list[tuple[int, dict[str, Any]]] = []

    class Theirs:
        def log(self, row: dict[str, Any], step: int) -> None:
            heard.append((step, row))

    library = types.ModuleType("wandb")
    library.__dict__["init"] = lambda **asked: started.append(asked) or Theirs()
    monkeypatch.setitem(sys.modules, "wandb", library)
    for again in (run, Run.open(run.folder)):
        track_in_wandb(again, "lechat")
    first, second = started
    assert first == second
    assert first["project"] == "lechat"
    assert (first["resume"], first["dir"]) == ("allow", str(run.folder.absolute()))
    assert first["config"] == run.config
    run.log(ROWS)
    assert [step for step, _ in heard] == [row["step"] for row in ROWS]
    assert [row | {"step": step} for step, row in heard] == ROWS


def test_without_the_extra_weights_and_biases_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.config = {"model": {}, "train": {}}
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(BadInput, match="pip install 'lechat-jax\\[wandb\\]'"):
        track_in_wandb(run, "lechat")


# --- the profiler ---


@pytest.mark.parametrize(("n", "steps", "last"), [(2, 9, 4), (8, 5, 5)])
def test_steps_after_the_first_two_calls_are_traced(
    n: int, steps: int, last: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no longer than the run lasts."""
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda *_, **__: seen.append(("start", step)))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: seen.append(("stop", step)))
    run.config = {"model": {"dim": 40}, "train": {"steps": steps}}
    profile_steps(run, n)
    for step in range(1, steps + 1):
        run.log([{"step": step, "time_s": 0.0, "tokens": 8, "train/loss": 4.0}])
        run.log([{"step": step, "time_s": 0.0, "tokens": 8, "val/loss": 4.0}])
    assert seen == [("start", 2), ("stop", last)]


def test_a_run_that_is_stopped_keeps_the_trace_so_far(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda *_, **__: seen.append("start"))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: seen.append("stop"))
    run.config = {"model": {"dim": 40}, "train": {"steps": 9}}
    profile_steps(run, 5)
    for step in (1, 2, 3):
        run.log([{"step": step, "time_s": 0.0, "tokens": 8, "train/loss": 4.0}])
    run.release()
    run.release()
    assert seen == ["start", "stop"]


def test_a_trace_is_one_that_xprof_and_perfetto_read(run: Run) -> None:
    profile_steps(run, 1)
    for step in (1, 2, 3):
        jnp.arange(8.0).sum().block_until_ready()
        run.log([{"step": step, "time_s": 0.0, "tokens": 8, "train/loss": 4.0}])
    names = {path.name for path in (run.folder / "profile").rglob("*") if path.is_file()}
    assert "perfetto_trace.json.gz" in names
    assert any(name.endswith(".xplane.pb") for name in names)
