"""Two processes of two devices each take the steps of one device, and stop and go on as one."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lechat_jax.devices import processes as distributed
from lechat_jax.errors import BadInput
from lechat_jax.train.command import main

SMALL = "--dim 16 --n-layers 1 --n-heads 2 --n-kv-heads 2 --head-dim 8 --hidden-dim 24".split()
SMALL += "--sliding-window 6 --batch 8 --block 16 --max-tokens 4".split()
STEPS = "--steps 20 --checkpoint-every 4 --eval-every 10 --sample-every 20".split()

# The main job on two devices, which sends itself a signal when a step is logged.
PROCESS = """
import os, sys
import jax
from lechat_jax.checkpoint import run
from lechat_jax.cli import flags
from lechat_jax.train import command

jax.config.update("jax_num_cpu_devices", 2)
log = run.Run.log

def log_and_signal(self, rows):
    log(self, rows)
    if rows[-1]["step"] == {step}:
        os.kill(os.getpid(), {signal})

run.Run.log = log_and_signal
flags.run(command.main)
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text("".join(f"The square of {i} is {i * i}.\n" for i in range(400)))
    return path


def new(text: Path, folder: Path) -> list[str]:
    return ["--out", str(folder), "--data", str(text), *SMALL, *STEPS]


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on one device."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert main(new(text, folder)) == 0
    return folder


def together(flags: list[str], at_step: int = 0, sent: int = 0) -> list[subprocess.Popen[str]]:
    """Two processes, of which the second is sent a signal when it has logged that step."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = [*flags, "--coordinator", f"127.0.0.1:{port}", "--num-processes", "2"]
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                PROCESS.format(step=at_step if i else 0, signal=int(sent)),
                *flags,
                "--process-id",
                str(i),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
        for i in range(2)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """What each returned, printed and complained of."""
    said = [process.communicate(timeout=240) for process in processes]
    codes = [process.returncode for process in processes]
    return [(code, *words) for code, words in zip(codes, said, strict=True)]


def losses(folder: Path, key: str = "train/loss") -> dict[int, float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[key] for row in rows if key in row}


def assert_same_curve(folder: Path, alone: Path) -> None:
    for key in ("train/loss", "val/loss"):
        ours, theirs = losses(folder, key), losses(alone, key)
        assert ours.keys() == theirs.keys()
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_process_saves_in_all_and_one_device_goes_on(
    text: Path, alone: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    first, second = ended(together(new(text, folder), 8, signal.SIGTERM))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "on 4 x cpu, fsdp=4,tp=1, of 2 processes" in first[1]
    assert "stopped by a signal to another process after step 8, saved" in first[1]
    assert re.sub(r"\[Gloo\].*\n", "", second[1]) == ""
    assert sorted(losses(folder)) == list(range(1, 9))
    assert (folder / "checkpoints" / "8" / "SHA256SUMS").is_file()
    assert len(list((folder / "samples").iterdir())) == 1
    assert main(["--resume", str(folder)]) == 0
    assert_same_curve(folder, alone)


@pytest.mark.slow
def test_what_a_killed_process_leaves_goes_on_to_the_identical_curve(
    text: Path, alone: Path, tmp_path: Path
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    for code, _, complaint in ended(together(new(text, whole))):
        assert code == 0, complaint
    assert_same_curve(whole, alone)

    first, second = ended(together(new(text, folder), 12, signal.SIGKILL))
    assert second[0] == -signal.SIGKILL
    # Either the connection is found closed, or JAX ends what has lost another process.
    assert first[0] in (1, -signal.SIGABRT)
    assert "has lost another one" in first[2] or "another task died" in first[2]
    for code, _, complaint in ended(together(["--resume", str(folder)])):
        assert code == 0, complaint
    for key in ("train/loss", "val/loss", "val/bpb"):
        assert losses(folder, key) == losses(whole, key)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=8", "fsdp=4,tp=2"])
def test_what_one_device_saved_eight_go_on_with(
    mesh: str, text: Path, alone: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(alone, folder)
    for step in ("16", "20"):
        assert (folder / "checkpoints" / step).is_dir()
    shutil.rmtree(folder / "checkpoints" / "20")
    assert main(["--resume", str(folder), "--mesh", mesh]) == 0
    assert_same_curve(folder, alone)


def test_bad_input_is_one_sentence_of_every_process(text: Path, tmp_path: Path) -> None:
    flags = [*new(text, tmp_path / "run"), "--mesh", "fsdp=8"]
    for code, _, complaint in ended(together(flags)):
        assert code == 2
        assert "error: --mesh fsdp=8 has 8 devices and there are 4" in complaint


def test_a_process_that_is_alone_decides_alone() -> None:
    def refuse() -> None:
        raise BadInput("no")

    assert distributed.is_first()
    assert distributed.from_first(lambda: (1, "a")) == (1, "a")
    assert [distributed.anywhere(flag) for flag in (True, False)] == [True, False]
    with pytest.raises(BadInput, match="no"):
        distributed.from_first(refuse)
    with pytest.raises(BadInput, match="no"), distributed.ending_together():
        refuse()
