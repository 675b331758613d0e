"""The main job from the outside: what it writes, how it stops, and that it goes on bit for bit."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import lechat_jax.train
from lechat_jax.checkpoint.weights import save_weights
from lechat_jax.cli import flags as cli
from lechat_jax.cli.display import Display
from lechat_jax.cli.signals import Stop
from lechat_jax.config import MistralConfig
from lechat_jax.data import held_out
from lechat_jax.data.batches import Batches
from lechat_jax.data.tokens import load_tokens
from lechat_jax.errors import BadInput
from lechat_jax.generate.generator import Generator
from lechat_jax.model.binding import weights_of
from lechat_jax.tokenizer.tokenizer import Tokenizer
from lechat_jax.train.command import main, set_up
from lechat_jax.train.options import TrainConfig
from lechat_jax.train.start import run_of
from lechat_jax.train.trainer import Trainer
from tests.support import tokenizers
from tests.support.models import logits_of, random_model

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
import os, signal
from lechat_jax.checkpoint import run
from lechat_jax.cli import flags
from lechat_jax.train import command

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is born deaf to it,
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and what nohup started to this

log = run.Run.log

def log_and_signal(self, rows):
    log(self, rows)
    if rows[-1]["step"] == 8:
        os.kill(os.getpid(), {signal})

run.Run.log = log_and_signal
flags.run(command.main)
"""


def start(
    folder: Path, text: Path | None = None, *, sent: signal.Signals | None = None
) -> subprocess.Popen[str]:
    """A training process: a new run on `text`, or the one in `folder` resumed.

    It writes to a pipe that lacks the letters of its samples and its progress.

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
        env=os.environ
        | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONIOENCODING": "ascii"},
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
    assert all(float.fromhex(share) > 0 for share in metrics(whole, "train/mfu").values())
    rates = metrics(whole, "train/tokens_per_sec").keys()
    assert metrics(whole, "train/mfu").keys() == rates - {min(rates)}  # the first compiles
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (whole / "samples").iterdir()) == [
        "step-000006.txt",
        "step-000012.txt",
    ]
    assert (whole / "checkpoints" / "12" / "SHA256SUMS").is_file()
    assert (whole / "tokenizer.model.v1").is_file()


@pytest.mark.parametrize(
    "sent",
    [
        signal.SIGTERM,
        *(pytest.param(other, marks=pytest.mark.slow) for other in (signal.SIGKILL, signal.SIGHUP)),
    ],
)
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


def test_a_finished_run_is_trained_further_and_that_goes_on_bit_for_bit_too(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    with pytest.raises(BadInput, match=r"is finished, .* all its 12 steps; train it .* --steps"):
        main(["--resume", str(folder)])
    assert main(["--resume", str(folder), "--steps", "6"]) == 0
    assert "training on from step 12 for 6 steps" in capsys.readouterr().out
    losses, ended_with = metrics(folder, "train/loss"), weights(folder)
    assert sorted(losses) == list(range(1, 19))
    assert metrics(whole, "train/loss").items() <= losses.items()
    assert ended_with != weights(whole)

    shutil.rmtree(folder / "checkpoints" / "18")  # as if it had been killed before that
    assert main(["--resume", str(folder)]) == 0
    assert "resuming at step 16 of 18" in capsys.readouterr().out
    assert (metrics(folder, "train/loss"), weights(folder)) == (losses, ended_with)


def test_a_text_that_was_moved_is_named_and_found_from_then_on(
    whole: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told by its SHA-256 alone, so that another text is refused."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    monkeypatch.chdir(tmp_path)
    shutil.copy(text, "moved.txt")
    Path("other.txt").write_text(text.read_text() + "One more line.\n")
    stored = folder / "config.json"
    stored.write_text(stored.read_text().replace(str(text), str(tmp_path / "gone.txt")))
    with pytest.raises(BadInput, match=r"gone\.txt"):
        main(["--resume", "run"])
    with pytest.raises(BadInput, match="restore it or say with --data where it is"):
        main(["--resume", "run", "--data", "other.txt"])
    with pytest.raises(BadInput, match="is finished"):
        main(["--resume", "run", "--data", "moved.txt"])
    assert json.loads(stored.read_text())["train"]["data"] == str(tmp_path / "moved.txt")


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


def test_the_device_is_kept_busy_while_losses_are_read_and_nothing_else_changes(
    whole: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator; before a validation or a checkpoint the weights come to rest."""
    folder, ahead = tmp_path / "run", {}
    flags = ["--out", str(folder), "--data", str(text), *SMALL, *STEPS]
    asked = cli.parse(TrainConfig, "train", "Trains.", flags)
    with Display(None) as display, Stop() as stop:
        trainer = set_up(run_of(asked), asked, 0.0, display)
        trainer.calls, trainer.ahead = 1, 1
        record = trainer.record

        def counted(losses: np.ndarray) -> None:
            record(losses)
            step = trainer.training.step
            ahead[step] = trainer.sent - step

        monkeypatch.setattr(trainer, "record", counted)
        trainer.train(stop)
    assert ahead == {step: int(step not in (4, 6, 8, 12)) for step in range(1, 13)}
    assert list(metrics(folder, "val/loss")) == [6]
    for key in ("train/loss", "val/loss"):
        for step, loss in metrics(folder, key).items():  # a call of one step rounds otherwise
            expected = float.fromhex(metrics(whole, key)[step])
            assert float.fromhex(loss) == pytest.approx(expected, rel=1e-6)
    assert {int(path.parent.name) for path in folder.glob("checkpoints/*/SHA256SUMS")} >= {8, 12}


def test_from_python_a_run_is_trained_as_by_the_command(
    whole: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its folder holds the same losses, is free for other processes, and can be gone on with."""
    flags, began = (
        ["--out", str(tmp_path / "run"), "--data", str(text), *SMALL, *STEPS],
        time.time(),
    )
    run = lechat_jax.train.run(cli.parse(TrainConfig, "train", "Trains.", flags))
    assert run.folder == tmp_path / "run"
    assert "trained on 384 tokens in 12 steps" in capsys.readouterr().out
    losses = {r["step"]: r["train/loss"] for r in run.metrics() if "train/loss" in r}
    # Within 1e-6, since the tests' process divides its CPU into eight devices.
    expected = {step: float.fromhex(loss) for step, loss in metrics(whole, "train/loss").items()}
    assert losses == pytest.approx(expected, rel=1e-6)
    assert [row["time_s"] for row in run.metrics()][-1] < time.time() - began, "since the call"
    assert weights(run.folder).keys() == weights(whole).keys()
    held = "from pathlib import Path; from lechat_jax.files.lock import Lock; Lock(Path({!r}))"
    subprocess.run([sys.executable, "-c", held.format(str(run.folder))], check=True)
    with pytest.raises(BadInput, match="is finished"):
        lechat_jax.train.run(TrainConfig(resume=run.folder))
    with pytest.raises(BadInput, match="for the command line"):
        lechat_jax.train.run(TrainConfig(config=Path("run.yaml")))


def test_its_names_are_loaded_when_they_are_asked_for() -> None:
    program = (
        "import sys, lechat_jax.train as train; print('jax' in sys.modules, train.TrainConfig)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
    assert said == f"False {TrainConfig}\n"


def test_minutes_become_steps_and_the_plan_is_stored(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    flags = ["--out", str(folder), "--data", str(text), *SMALL]
    assert main(["--minutes", "0.1", "--max-epochs", "3", *flags]) == 0
    steps = json.loads((folder / "config.json").read_text())["train"]["steps"]
    assert list(metrics(folder, "train/loss")) == list(range(1, steps + 1))
    assert re.search(r"\d+ steps of", capsys.readouterr().out)


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


def test_memory_that_runs_out_is_a_sentence_and_the_name_is_free_again(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(trainer: Trainer) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 64000000000 bytes.")

    monkeypatch.setattr(Trainer, "send", full)
    flags = ["--out", str(tmp_path / "run"), "--data", str(text), *SMALL, *STEPS]
    with pytest.raises(
        BadInput, match=r"no room for another 64\.00 GB; .*--batch.*--accumulate.*--remat"
    ):
        main(flags)
    assert not (tmp_path / "run").exists()


def test_a_signal_in_the_last_validation_keeps_what_was_scored(
    whole: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After the samples; the same number of tokens, asked for, gives the same score again."""

    def interrupt(display: Display, what: str, *numbers: object) -> None:
        if what.startswith("validating"):
            signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is born deaf to it
    monkeypatch.setattr(held_out, "BLOCK", 16)
    monkeypatch.setattr(Display, "work", interrupt)
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "loss.png").unlink()
    (folder / "samples" / "step-000012.txt").unlink()
    (folder / "metrics.jsonl").write_text("")
    assert main(["--resume", str(folder)]) == 0
    said = capsys.readouterr().out
    assert said.index("--- sample at step 12") < said.index(
        "held-out tokens, evenly spread (SIGINT)"
    )
    assert (folder / "loss.png").exists()
    (row,) = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    assert (row["val/tokens"], row["val/held_out"]) == (64, 1083)  # a batch of four rows of 16

    monkeypatch.setattr(Display, "work", lambda *args: None)
    (folder / "metrics.jsonl").write_text("")
    assert main(["--resume", str(folder), "--eval-tokens", "64"]) == 0
    assert "bits per byte on 64 of 1,083 held-out tokens" in capsys.readouterr().out
    assert metrics(folder, "val/loss") == {12: row["val/loss"].hex()}


# --- weights to start from ---

SHORT = "--batch 2 --block 16 --max-tokens 8 --steps 3".split()


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 300 ids, so that one sees whose is used."""
    return tokenizers.taught(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def source(tmp_path: Path, tiny: MistralConfig, taught: Path) -> Path:
    """Weights in lechat's format, stored in bfloat16, of a model with that tokenizer."""
    ids = Tokenizer.from_file(taught).vocab_size
    config = dataclasses.replace(tiny, n_layers=1, vocab_size=ids, tied_embeddings=True)
    save_weights(
        tmp_path / "source", config, weights_of(random_model(config, jnp.bfloat16)), taught
    )
    return tmp_path / "source"


def trained_from(source: Path, text: Path, *flags: str) -> Path:
    """The folder of a short run that starts from these weights."""
    out = source.parent / "run"
    argv = ["--init-from", str(source), "--out", str(out), "--data", str(text), *SHORT, *flags]
    assert main(argv) == 0
    return out


def first_loss(source: Path, text: Path) -> float:
    """Nats a token of the weights on the first batch, from the model's logits."""
    made = Generator.from_checkpoint(source)
    assert made.tokenizer is not None
    stream = load_tokens(str(text), made.tokenizer).train
    starts = Batches(len(stream), 16, 2, seed=0).starts(0)
    rows = np.stack([stream[start : start + 17] for start in starts]).astype(np.int32)
    z = np.asarray(logits_of(made.config, made.weights, rows[:, :-1]), np.float64)
    log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return -np.take_along_axis(log_p, rows[:, 1:, None], axis=2).mean()


def test_training_starts_from_the_weights_that_are_given(
    source: Path, text: Path, taught: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    expected = first_loss(source, text)
    manifest = hashlib.sha256((source / "SHA256SUMS").read_bytes()).hexdigest()
    run = trained_from(Path("source"), text, "--n-heads", "6")
    assert float.fromhex(metrics(run, "train/loss")[1]) == pytest.approx(expected, rel=1e-5)
    config = json.loads((run / "config.json").read_text())
    assert config["train"]["init_from"] == str(source)
    assert config["train"]["init_from_sha256"] == manifest
    assert config["model"] == json.loads((source / "config.json").read_text())
    assert (run / "tokenizer.model.v1").read_bytes() == taught.read_bytes()
    masters = Generator.from_checkpoint(run).weights
    assert {str(leaf.dtype) for leaf in masters.values()} == {"float32"}


def test_a_run_goes_on_without_the_folder_that_it_started_from(source: Path, text: Path) -> None:
    run = trained_from(source, text)
    losses, ended_with = metrics(run, "train/loss"), weights(run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["0", "3"]
    shutil.rmtree(source)
    shutil.rmtree(run / "checkpoints" / "3")  # as if it had been stopped right after the start
    assert main(["--resume", str(run)]) == 0
    assert metrics(run, "train/loss") == losses
    assert weights(run) == ended_with

    shutil.rmtree(run / "checkpoints")  # as if it had been killed even before that
    with pytest.raises(BadInput, match=f"delete it and start again with --init-from {source}"):
        main(["--resume", str(run)])


def test_training_goes_on_from_another_run_as_from_its_weights(source: Path, text: Path) -> None:
    """Unlike with --resume, on any text, for any length, and with a fresh optimiser."""
    first = trained_from(source, text)
    expected = first_loss(first, text)
    second = source.parent / "second"
    argv = ["--init-from", str(first), "--out", str(second), "--data", str(text), *SHORT]
    assert main(argv) == 0
    assert float.fromhex(metrics(second, "train/loss")[1]) == pytest.approx(expected, rel=1e-5)
    manifest = (first / "checkpoints" / "3" / "SHA256SUMS").read_bytes()
    stored = json.loads((second / "config.json").read_text())["train"]
    assert stored["init_from_sha256"] == hashlib.sha256(manifest).hexdigest()


def test_weights_without_a_tokenizer_learn_nothing_until_theirs_is_put_in(
    tmp_path: Path, tiny: MistralConfig, text: Path
) -> None:
    """That of another model of as many ids would be taken for it without a word."""
    config = dataclasses.replace(tiny, n_layers=1, vocab_size=32_000)
    source, v1 = tmp_path / "source", Tokenizer.mistral_v1()
    save_weights(source, config, weights_of(random_model(config)), None)
    (source / "tokenizer.json").write_text("{}")
    options = TrainConfig(init_from=source, data=str(text), out=tmp_path / "run")
    words = r"and a tokenizer\.json is none that is read here, so no text can be read; put the "
    with pytest.raises(BadInput, match=words):
        set_up(run_of(options), options, 0.0, Display(None))
    assert not (tmp_path / "run").exists()
    v1.save(source)
    trainer = set_up(run_of(options), options, 0.0, Display(None))
    assert trainer.job.tokenizer.sha256 == v1.sha256
    assert Tokenizer.from_file(tmp_path / "run" / "tokenizer.model.v1").sha256 == v1.sha256


def test_weights_that_cannot_be_trained_are_refused_and_nothing_is_written(
    source: Path, text: Path, tiny: MistralConfig
) -> None:
    config = dataclasses.replace(tiny, n_layers=1)
    broken = weights_of(random_model(config))
    broken["norm.scale"] = broken["norm.scale"].at[3].set(jnp.nan)
    home = source.parent
    save_weights(home / "mute", config, broken, None)
    save_weights(home / "mismatched", config, broken, source / "tokenizer.model.v1")
    shutil.copytree(source, home / "damaged")
    (home / "damaged" / "SHA256SUMS").write_text("")
    vocab = json.loads((source / "config.json").read_text())["vocab_size"]
    whole = dataclasses.replace(config, vocab_size=vocab)
    nan = weights_of(random_model(whole))
    nan["norm.scale"] = nan["norm.scale"].at[3].set(jnp.nan)
    save_weights(home / "nan", whole, nan, source / "tokenizer.model.v1")
    there = set(home.iterdir())
    for name, flags, words in (
        ("source", ["--preset", "lechat-15m"], "leave out --preset"),
        ("source", ["--dim", "8", "--n-heads", "6", "--n-layers", "2"], "out --dim, --n-layers"),
        ("mute", [], f"{home / 'mute'} has no tokenizer of Mistral's, so no text can be read; put"),
        ("mismatched", [], f"{vocab} tokens and the model 97; use the tokenizer that the model"),
        ("damaged", [], "damaged is not as it was saved: config.json is not in SHA256SUMS"),
        ("nan", [], f"weights of {home / 'nan'} are not finite, norm.scale, and no training"),
        ("nowhere", [], "nowhere is not there"),
    ):
        with pytest.raises(BadInput, match=re.escape(words)):
            trained_from(home / name, text, *flags)
    assert set(home.iterdir()) == there


# --- what is refused ---

BAD = {
    "a missing file": (["--data", "missing.txt"], "missing.txt"),
    "an empty text": (["--data", "empty.txt"], "empty.txt"),
    "a text that is too short": (["--data", "short.txt"], "short"),
    "a block of one": (["--block", "1"], "--block must be at least 2"),
    "a block longer than the text": (
        [*SMALL, "--batch", "1", "--block", "99999"],
        "a block of 99999 needs 100000",
    ),
    "more than fits into memory": (
        ["--batch", "1000000000"],
        "GB are free; take fewer rows (--batch), work through them in parts (--accumulate), or "
        "keep less of each layer (--remat full)",
    ),
    "a model larger than memory": (
        ["--preset", "mistral-7b-v0.1", "--dim", "409600"],
        "GB are free; train a smaller model, adapters beside weights that stay (--lora-rank)",
    ),
    "a disk with no room for checkpoints": (
        ["--keep", "1000000"],
        "GB of the disk are free; make room, or name a folder elsewhere",
    ),
    "a window of nothing": (["--sliding-window", "0"], "sliding_window must be at least 1"),
    "heads that do not group": (["--n-heads", "8", "--n-kv-heads", "3"], "divisible"),
    "an unknown preset": (["--preset", "gpt"], "unknown preset 'gpt'"),
    "a folder that cannot be": (["--out", "empty.txt/run"], "cannot write"),
    "no time at all": (["--minutes", "0"], "--minutes must be a finite number above 0"),
    "a run that is not there": (["--resume", "nowhere"], "nowhere is not a training run"),
    "flags beside --resume": (["--resume", "nowhere", "--batch", "9"], "leave out --batch"),
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "short.txt"]


def test_a_run_is_never_overwritten(
    whole: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.run(lambda: main(["--out", str(whole), "--data", str(text), *SMALL, *STEPS]))
    assert f"--resume {whole}" in capsys.readouterr().err
