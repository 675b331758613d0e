"""`lechat serve` as a program: what it refuses, when it is ready, how signals end it."""

import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from lechat_jax.checkpoint.run import Run
from lechat_jax.checkpoint.training_state import Checkpoints
from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.model.binding import weights_of
from lechat_jax.serve.command import main
from lechat_jax.tokenizer.tokenizer import Tokenizer
from tests.support.models import random_model

ROOT = Path(__file__).parents[2]
BODY = {"prompt": "The cat", "seed": 1, "ignore_eos": True}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: MistralConfig, tokenizer: Tokenizer) -> str:
    """A training run with a tokenizer."""
    config = dataclasses.replace(tiny, vocab_size=tokenizer.vocab_size, n_layers=1)
    run = Run.create(tmp_path_factory.mktemp("runs") / "small")
    run.config = {"model": config.to_dict(), "train": {}}
    tokenizer.save(run.folder)
    Checkpoints(run.checkpoints).save(7, {"model": weights_of(random_model(config))}, {})
    return str(run.folder)


@contextlib.contextmanager
def serving(run: str, *flags: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """The program, once it is ready."""
    command = [sys.executable, "-m", "lechat_jax.serve", run, "--port", "0", *flags]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ}
    ) as program:
        assert program.stderr is not None
        try:
            for line in program.stderr:
                if found := re.search(r"(\S+) at (http://\S+) after", line):
                    break
            else:
                pytest.fail("it ended before it was ready")
            assert found[1] == "small"
            with httpx.Client(base_url=found[2], timeout=60) as client:
                yield program, client
        finally:
            program.kill()


def test_a_signal_lets_who_is_there_end_and_a_second_one_does_not(run: str) -> None:
    with serving(run, "--rows", "2", "--context", "100000") as (program, client):
        assert client.get("/ready").json() == {"status": "ok"}
        short = {**BODY, "max_tokens": 400, "stream": True}
        long = {**short, "max_tokens": 90000}
        with (
            client.stream("POST", "/v1/completions", json=short) as one,
            client.stream("POST", "/v1/completions", json=long) as other,
        ):
            ones, others = one.iter_lines(), other.iter_lines()
            assert next(ones)
            assert next(others)
            program.send_signal(signal.SIGTERM)
            until = time.monotonic() + 30
            while (answer := client.get("/ready")).status_code == 200:
                assert time.monotonic() < until
            assert answer.json()["error"]["message"] == "the server is draining"
            refused = client.post("/v1/completions", json=BODY)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert client.get("/health").status_code == 200
            assert [line for line in ones if line][-1] == "data: [DONE]"
            program.send_signal(signal.SIGTERM)
            last = [line for line in others if line][-1]
            assert "the server is shutting down" in last
        assert program.wait(timeout=60) == 0


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--rows", "0"], "--rows must be at least 1"),
        (["--context", "1"], "--context must be at least 2"),
        (["--port", "70000"], "--port must be from 0 to 65535"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        (["--mesh", "tp"], "--mesh is, for example"),
    ],
)
def test_flags_that_cannot_be_are_refused(run: str, flags: list[str], why: str) -> None:
    with pytest.raises(BadInput, match=why):
        main([run, *flags])


def test_a_port_that_is_taken_is_refused_before_anything_is_loaded(run: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BadInput, match=f"cannot listen on 127.0.0.1, port {port}"):
            main([run, "--port", str(port)])


def test_a_folder_without_a_model_or_tokenizer_is_refused(run: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no model"):
        main([str(tmp_path)])
