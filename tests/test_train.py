"""The main job from the outside: what it writes, how it stops, and that it goes on bit for bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lechat_jax import cli
from lechat_jax.generator import Generator
from lechat_jax.train import main

# A model so small that the 32,000 ids of the tokenizer are nearly all of it.
SMALL = "--dim 16 --n-layers 2 --n-heads 2 --n-kv-heads 1 --head-dim 8 --hidden-dim 24".split()
SMALL += "--sliding-window 6 --batch 2 --block 16 --max-tokens 8".split()
STEPS = ["--steps", "12", "--checkpoint-every", "4", "--eval-every", "6", "--sample-every", "6"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some hundred sentences, all different, in one file."""
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    lines = (f"The square of {i} is {i * i}, and twice {i} is {2 * i}.\n" for i in range(400))
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted, made by a process of its own."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = finish(start(folder, text))
    assert done.returncode == 0, done.stderr
    assert "python -m lechat_jax.generate" in done.stdout
    return folder


# The main job, which sends itself a signal as soon as step 8 is logged: after the checkpoint
# of step 4, and before the one of step 8.
INTERRUPTED = """
import os
from lechat_jax import cli, run, train

log = run.Run.log

def log_and_signal(self, rows):
    log(self, rows)
    if rows[-1]["step"] == 8:
        os.kill(os.getpid(), {signal})

run.Run.log = log_and_signal
cli.run(train.main)
"""


def start(
    folder: Path, text: Path | None = None, *, sent: signal.Signals | None = None
) -> subprocess.Popen[str]:
    """A training process: a new run on `text`, or the one in `folder` resumed.

    With `sent`, it is interrupted on the way by that signal.
    """
    flags = ["--resume", str(folder)]
    if text:
        flags = ["--out", str(folder), "--data", str(text), *SMALL, *STEPS]
    program = ["-c", INTERRUPTED.format(signal=int(sent))] if sent else ["-m", "lechat_jax.train"]
    return subprocess.Popen(
        [sys.executable, *program, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def metrics(folder: Path, key: str) -> dict[int, str]:
    """A measured value by step, in hexadecimal, so that equal means equal in every bit."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: float(row[key]).hex() for row in rows if key in row}


def test_a_run_leaves_all_that_was_promised(whole: Path) -> None:
    config = json.loads((whole / "config.json").read_text())
    assert config["model"]["sliding_window"] == 6
    assert config["train"]["steps"] == 12
    assert config["train"]["corpus"].endswith("numbers.txt")
    assert sorted(metrics(whole, "train/loss")) == list(range(1, 13))
    assert sorted(metrics(whole, "val/bpb")) == [6, 12]
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (whole / "samples").iterdir()) == [
        "step-000006.txt",
        "step-000012.txt",
    ]
    assert (whole / "checkpoints" / "12" / "SHA256SUMS").is_file()
    assert (whole / "tokenizer.model.v1").is_file()


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_was_interrupted_equals_one_that_was_not(
    sent: signal.Signals, whole: Path, text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    ended = finish(start(folder, text, sent=sent))
    if sent == signal.SIGKILL:
        assert ended.returncode == -signal.SIGKILL
    else:
        assert ended.returncode == 0, ended.stderr
        assert f"stopped by {sent.name} after step" in ended.stdout
        assert f"--resume {folder}" in ended.stdout
    assert max(metrics(folder, "train/loss")) == 8, "it was stopped on the way"

    resumed = finish(start(folder))
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step" in resumed.stdout
    for key in ("train/loss", "val/loss", "val/bpb"):
        assert metrics(folder, key) == metrics(whole, key)
    assert weights(folder) == weights(whole)


def weights(folder: Path) -> dict[str, bytes]:
    """Every bit of the model that a run ended with."""
    found = Generator.from_checkpoint(folder).weights
    return {name: np.asarray(leaf).tobytes() for name, leaf in found.items()}


def test_a_flipped_bit_is_refused_and_the_checkpoint_before_is_used_and_named(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", whole, folder], check=True)
    files = (path for path in (folder / "checkpoints/12/model").rglob("*") if path.is_file())
    damaged = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[100] ^= 4
    damaged.write_bytes(content)

    assert main(["--resume", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"warning: checkpoint 12 in {folder / 'checkpoints'} is damaged" in said
    assert damaged.name in said
    assert "resuming at step 8 of 12" in said
    assert metrics(folder, "train/loss").keys() == metrics(whole, "train/loss").keys()


def test_minutes_become_steps_once_and_are_stored(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "lechat_jax.train", "--minutes", "0.4", "--max-epochs", "3"]
    done = subprocess.run(
        [*command, "--out", str(folder), "--data", str(text), *SMALL],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    steps = json.loads((folder / "config.json").read_text())["train"]["steps"]
    assert list(metrics(folder, "train/loss")) == list(range(1, steps + 1))
    assert f"{steps} steps of" in done.stdout


def test_a_loss_that_is_no_number_stops_the_run_and_says_where(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--out", str(tmp_path / "run"), "--data", str(text), *SMALL, *STEPS]
    assert main([*flags, "--learning-rate", "1e38"]) == 1
    said = capsys.readouterr().out
    assert "stopped: the loss is" in said or "stopped: weights are not finite" in said
    assert "step" in said
    assert "--learning-rate" in said
    assert not list((tmp_path / "run").glob("checkpoints/*/SHA256SUMS"))


BAD = {
    "a missing file": (["--data", "missing.txt"], "missing.txt"),
    "an empty text": (["--data", "empty.txt"], "empty.txt"),
    "a text that is too short": (["--data", "short.txt"], "short"),
    "a block of one": (["--block", "1"], "--block must be at least 2"),
    "a block longer than the text": (["--block", "99999"], "a block of 99999 needs 100000"),
    "a window of nothing": (["--sliding-window", "0"], "sliding_window must be at least 1"),
    "heads that do not group": (["--n-heads", "8", "--n-kv-heads", "3"], "divisible"),
    "an unknown preset": (["--preset", "gpt"], "unknown preset 'gpt'"),
    "a folder that cannot be": (["--out", "empty.txt/run"], "cannot write"),
    "no time at all": (["--minutes", "0"], "--minutes must be a finite number above 0"),
    "a run that is not there": (["--resume", "nowhere"], "nowhere is not a training run"),
    "flags beside --resume": (["--resume", "nowhere", "--steps", "9"], "leave out --steps"),
}


@pytest.mark.parametrize(("flags", "words"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_exit_code_2(
    flags: list[str],
    words: str,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("short.txt").write_text("Too short.")
    if not {"--data", "--resume"} & set(flags):
        flags = ["--data", str(text), *flags]
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda: main(["--steps", "1", *flags] if "--resume" not in flags else flags))
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert not Path("runs").exists()


def test_a_run_is_never_overwritten(
    whole: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.run(lambda: main(["--out", str(whole), "--data", str(text), *SMALL, *STEPS]))
    assert f"--resume {whole}" in capsys.readouterr().err
