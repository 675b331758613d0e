"""Folders that an earlier lechat wrote, kept as files: today's reads them and goes on with them.

`kept/run` is a training run of four steps that was killed after its checkpoint at step 2;
`kept/converted` is what `python -m parity.convert` made of that run at its end. What today's
programs are to find in them is what those of that day did. They may only be added to: a change
that needs other files than these has broken somebody's.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lechat_jax.generate.generator import Generator
from lechat_jax.generate.sampling import Sampling
from lechat_jax.train.command import main as train
from parity.check import probes, whole_model
from parity.check.command import main as check
from parity.convert.command import main as convert
from parity.convert.open_source import open_source

KEPT = Path(__file__).parent / "kept"

# What was found then: the losses of the run, two of them after the checkpoint that is kept, and
# how the converted folder goes on with "The square".
LOSSES = [6.149585, 6.50554, 6.263712, 6.18462]
IDS = [279, 12, 57, 57, 298, 298]
LOGPROBS = [-3.649240, -3.284820, -3.572862, -3.355346, -2.518735, -2.182779]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return shutil.copytree(KEPT / "run", tmp_path / "run")


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    return shutil.copytree(KEPT / "converted", tmp_path / "converted")


def losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_a_kept_run_is_resumed_and_learns_what_it_would_have(run: Path) -> None:
    assert train(["--resume", str(run), "--data", str(KEPT / "text.txt")]) == 0
    assert losses(run) == pytest.approx(LOSSES, rel=1e-5)


def test_a_kept_folder_is_generated_from(converted: Path) -> None:
    made = Generator.from_checkpoint(converted)
    sample = made.generate("The square", 6, Sampling(temperature=0))
    assert sample.ids == IDS
    np.testing.assert_allclose(sample.logprobs, LOGPROBS, rtol=0, atol=1e-4)


def test_a_kept_run_is_generated_from(run: Path) -> None:
    made = Generator.from_checkpoint(run)
    assert made.tokenizer
    sample = made.generate("The square", 6, Sampling(temperature=0))
    assert len(sample.ids) == 6


def test_a_kept_folder_is_checked(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass of it, in float64."""
    monkeypatch.setattr(whole_model, "PROBES", (probes.forward,))
    assert check(["--checkpoint", str(converted), "--dtypes", "float64"]) == 0


@pytest.mark.parametrize("kept", ["run", "converted"])
def test_a_kept_folder_is_exported(
    kept: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source, out = request.getfixturevalue(kept), tmp_path / "out"
    assert convert([str(source), str(out), "--to", "hf"]) == 0
    before, after = open_source(source), open_source(out)
    assert set(before.names) == set(after.names)
    for name in before.names:
        np.testing.assert_array_equal(after.read(name), before.read(name), strict=True)
