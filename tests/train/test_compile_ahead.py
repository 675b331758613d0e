"""The training step is compiled once, beside text and weights, and the run says how long."""

import dataclasses
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax import monitoring

from lechat_jax.checkpoint.weights import save_weights
from lechat_jax.cli import flags as cli
from lechat_jax.cli.display import Display
from lechat_jax.cli.signals import Stop
from lechat_jax.config import MistralConfig
from lechat_jax.data import dataset
from lechat_jax.devices import compile_ahead
from lechat_jax.devices.compile_ahead import Compilation
from lechat_jax.devices.memory import OutOfMemory
from lechat_jax.errors import BadInput
from lechat_jax.model.binding import weights_of
from lechat_jax.train import command
from lechat_jax.train.options import TrainConfig
from lechat_jax.train.start import run_of
from tests.support import tokenizers
from tests.support.models import random_model

SMALL = "--dim 16 --n-layers 1 --n-heads 2 --n-kv-heads 2 --head-dim 8 --hidden-dim 24".split()
SMALL += ["--sliding-window", "6"]
SHORT = "--batch 4 --block 16 --steps 4 --eval-every 9 --sample-every 9 --max-tokens 4".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text("".join(f"The square of {i} is {i * i}.\n" for i in range(400)))
    return path


@pytest.fixture(scope="module")
def base(tiny: MistralConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights to start from, with a tokenizer of a few ids."""
    folder = tmp_path_factory.mktemp("weights")
    tokenizer = tokenizers.taught(folder)
    config = dataclasses.replace(tiny, n_layers=1, vocab_size=300)
    save_weights(folder / "base", config, weights_of(random_model(config)), tokenizer)
    return folder / "base"


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, whose host has cores to spare."""
    monkeypatch.setattr(compile_ahead, "platform", lambda: "gpu")


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """The thread of each program of a training step that is compiled, or found in a cache."""
    threads = []

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if "backend_compile" in event and kwargs.get("fun_name") == "jit(_steps)":
            threads.append(threading.current_thread().name)

    for thread in threading.enumerate():
        if thread.name.startswith("compile_"):  # of a test whose run was refused meanwhile
            thread.join()
    jax.clear_caches()
    monitoring.register_event_duration_secs_listener(note)
    yield threads
    monitoring.unregister_event_duration_listener(note)


def train(flags: list[str]) -> None:
    """Trains without the validation and the samples after the last step."""
    asked = cli.parse(TrainConfig, "train", "Trains.", flags)
    run = run_of(asked)
    with Display(None) as display, Stop() as stop:
        command.set_up(run, asked, 0.0, display).train(stop)
    run.release()


@pytest.mark.parametrize(
    "flags",
    [
        [*SMALL, "--packing", "on", "--accumulate", "2", "--remat", "full"],
        ["--init-from", "BASE", "--lora-rank", "2", "--quantize", "int8", "--mesh", "fsdp=4"],
        *(
            pytest.param(flags, marks=pytest.mark.slow)
            for flags in (SMALL, [*SMALL, "--mesh", "fsdp=4,tp=2"], ["--init-from", "BASE"])
        ),
    ],
    ids=lambda flags: " ".join(flags[len(SMALL) if "--dim" in flags else 0 :]) or "random",
)
def test_the_program_that_was_compiled_ahead_is_the_one_that_runs(
    flags: list[str], text: Path, base: Path, tmp_path: Path, compiled: list[str]
) -> None:
    """Also where the state was read from a checkpoint, and not made by a step before."""
    flags = [str(base) if flag == "BASE" else flag for flag in flags]
    mesh = flags[flags.index("--mesh") :][:2] if "--mesh" in flags else []
    folder = str(tmp_path / "run")
    train(["--out", folder, "--data", str(text), *SHORT, *flags])
    assert compiled == ["compile_0"]
    jax.clear_caches()
    train(["--resume", folder, "--steps", "4", *mesh])
    assert compiled == ["compile_0", "compile_0"]


def test_a_run_says_how_long_it_took_and_how_much_was_waited_for(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    train(["--out", str(folder), "--data", str(text), *SHORT, *SMALL])
    (said,) = re.findall(
        r"start: tracing and compiling the step took (\d+\.\d) s, (\d+\.\d) s of which had to be "
        "waited for",
        capsys.readouterr().out,
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figures = [(row["train/compile_s"], row["train/compile_wait_s"]) for row in rows[:1]]
    assert [tuple(f"{figure:.1f}" for figure in row) for row in figures] == [said]
    assert all("train/compile_s" not in row for row in rows[1:])


class Uncompilable:
    """Stands for a jitted function, for which the compiler has no room."""

    def lower(self, *arguments: object) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 64000000000 bytes.")


def test_no_room_to_compile_is_a_sentence_and_the_name_is_free_again(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "jitted_steps", lambda _: Uncompilable())
    with pytest.raises(OutOfMemory, match=r"no room for another 64\.00 GB; take fewer rows"):
        command.main(["--out", str(tmp_path / "run"), "--data", str(text), *SHORT, *SMALL])
    assert not (tmp_path / "run").exists()


def test_bad_input_comes_before_what_compiling_says(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of a text that cannot be read before anything is compiled."""
    started = []

    def start(self: Compilation, function: Any, *arguments: Any) -> None:
        started.append(function)

    def refuse(*_: object, **__: object) -> None:
        raise BadInput("these words cannot be tokenised")

    monkeypatch.setattr(Compilation, "start", start)
    flags = ["--out", str(tmp_path / "run"), *SHORT, *SMALL]
    with pytest.raises(BadInput, match=r"gone\.txt"):
        command.main([*flags, "--data", str(tmp_path / "gone.txt")])
    assert not started
    monkeypatch.undo()
    monkeypatch.setattr(command, "jitted_steps", lambda _: Uncompilable())
    monkeypatch.setattr(dataset, "load_tokens", refuse)
    with pytest.raises(BadInput, match="these words"):
        command.main([*flags, "--data", str(text)])


class Recorded:
    """Stands for a jitted function: notes the thread that compiles it, once it may go on."""

    def __init__(self) -> None:
        self.may_go_on, self.threads = threading.Event(), list[threading.Thread]()

    def lower(self, *arguments: object) -> "Recorded":
        assert self.may_go_on.wait(timeout=60)
        return self

    def compile(self) -> None:
        self.threads.append(threading.current_thread())


def test_it_compiles_while_its_caller_goes_on() -> None:
    compilation, function = Compilation(), Recorded()
    compilation.start(function)
    assert not function.threads
    function.may_go_on.set()
    compilation.wait()
    assert [thread.name for thread in function.threads] == ["compile_0"]
    assert compilation.seconds > 0


@pytest.mark.parametrize("where", ["on a CPU", "in one of several processes"])
def test_it_compiles_when_it_is_waited_for(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it takes no cores from the other work, or keeps the order of the others."""
    if where == "on a CPU":
        monkeypatch.setattr(compile_ahead, "platform", lambda: "cpu")
    else:
        monkeypatch.setattr(jax, "process_count", lambda: 2)
    compilation, function = Compilation(), Recorded()
    function.may_go_on.set()
    compilation.start(function)
    assert not function.threads
    compilation.wait()
    assert function.threads == [threading.current_thread()]
    assert compilation.waited >= compilation.seconds > 0
