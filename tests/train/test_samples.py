"""A run writes samples on its way, and none of them can end it."""

import dataclasses
import errno
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from lechat_jax.checkpoint.run import Run
from lechat_jax.cli.display import Display
from lechat_jax.config import MistralConfig
from lechat_jax.data.dataset import open_dataset
from lechat_jax.errors import BadInput
from lechat_jax.generate.generator import Generator
from lechat_jax.model.binding import weights_of
from lechat_jax.tokenizer.tokenizer import Tokenizer
from lechat_jax.train import samples
from lechat_jax.train.options import TrainConfig
from lechat_jax.train.samples import Samples
from lechat_jax.train.training_run import Job
from lechat_jax.train.unused_ids import UnusedIds
from tests.support.models import random_model

Sampled = Callable[..., str]


@pytest.fixture(scope="module")
def config(tiny: MistralConfig) -> MistralConfig:
    """With full attention, whose memory has an end."""
    return dataclasses.replace(tiny, n_layers=1, vocab_size=32_000, sliding_window=None)


@pytest.fixture
def sampled(config: MistralConfig, tmp_path: Path) -> Sampled:
    """What is said of a sample at step 2; the run is in `tmp_path / "run"`."""
    tokenizer = Tokenizer.mistral_v1()
    words = "".join(f"The square of {i} is {i * i}.\n" for i in range(200))
    (tmp_path / "text.txt").write_text(words)
    data = str(tmp_path / "text.txt")
    dataset = open_dataset(data, tokenizer, 16, 2, 0, "off", lambda done, of: None)
    dataset.opening = "The first words"

    def take(**asked: Any) -> str:
        told = io.StringIO()
        with Display(9, Console(file=told, soft_wrap=True, highlight=False)) as display:
            run = Run.create(tmp_path / "run")
            options = TrainConfig(max_tokens=4, **asked)
            unused = UnusedIds.none(config.vocab_size)
            counts = np.zeros(config.vocab_size, int)
            job = Job(run, config, options, dataset, counts, unused, tokenizer, display, began=0.0)
            Samples(job).take(2, weights_of(random_model(config)))
        return told.getvalue()

    return take


def kept(tmp_path: Path) -> list[str]:
    return (tmp_path / "run/samples/step-000002.txt").read_text("utf-8").split("\n\n---\n\n")


def test_every_prompt_is_continued_printed_and_kept(sampled: Sampled, tmp_path: Path) -> None:
    said = sampled(prompt=("Once upon", "caf\u00e9"))
    texts = kept(tmp_path)
    prompts = ["The first words", "Once upon", "caf\u00e9"]
    assert [text[: len(p)] for p, text in zip(prompts, texts, strict=True)] == prompts
    assert all(f"[{prompt}]" in said for prompt in prompts)
    assert said.count("--- sample at step 2 ---") == 3


def test_a_prompt_as_long_as_a_row_of_training_is_read_whole(
    sampled: Sampled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than the usual context of a model with full attention."""
    monkeypatch.setattr(samples, "CONTEXT", 64)
    prompt = "the people " * 100
    said = sampled(prompt=(prompt,), block=300)
    assert "cut" not in said
    assert kept(tmp_path)[1].startswith(prompt)
    assert f"[\u2026{prompt[-500:]}]" in said  # nobody wants to read all of it


def test_of_a_longer_prompt_the_end_is_read_and_it_is_said(
    sampled: Sampled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "CONTEXT", 64)
    read: list[list[int]] = []
    right = Generator.generate
    monkeypatch.setattr(
        Generator,
        "generate",
        lambda made, ids, *args, **named: read.extend(ids) or right(made, ids, *args, **named),
    )
    said = sampled(prompt=("the people " * 100,), block=32)
    cut = "the prompt of 202 tokens is cut to BOS and its last 63 for the sample at step 2"
    assert cut in said
    assert [len(ids) for ids in read] == [4, 64]
    assert read[1][0] == 1
    assert len(kept(tmp_path)) == 2


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (BadInput("the cache takes 21.00 GB and 3.00 GB are free"), "the cache takes 21.00 GB"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no\nmore"), "RESOURCE_EXHAUSTED: no"),
        (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device"),
        (MemoryError(), "MemoryError"),
        (ValueError("not a text"), "not a text"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_fails_in_a_sample_is_a_line(
    error: Exception, said: str, sampled: Sampled, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Generator, "generate", fail)
    lines = sampled().splitlines()
    assert [line[: len(said) + 21] for line in lines] == [f"no sample at step 2: {said}"]


def test_a_prompt_that_is_no_text_is_passed_over(sampled: Sampled, tmp_path: Path) -> None:
    said = sampled(prompt=("half a pair \ud83d", "Once upon"))
    assert "no sample at step 2 of 'half a pair \\ud83d'" in said
    assert [text.split()[0] for text in kept(tmp_path)] == ["The", "Once"]
