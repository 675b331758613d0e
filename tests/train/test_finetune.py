"""A fine-tune on examples through the command line learns the answers and nothing else."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from lechat_jax.checkpoint.weights import save_weights
from lechat_jax.cli import flags
from lechat_jax.config import MistralConfig
from lechat_jax.data.dataset import Dataset, Packing, open_dataset
from lechat_jax.model.binding import weights_of
from lechat_jax.model.mistral import Mistral
from lechat_jax.tokenizer.tokenizer import Tokenizer
from lechat_jax.train.command import main
from tests.support.models import random_model
from tests.support.tokenizers import taught

BLOCK = 128


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of few ids, none of them Mistral's."""
    return taught(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of one and of two questions."""
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    with file.open("w") as out:
        for i in range(20):
            turns = [(f"Square of {i}?", f"It is {i * i}."), ("And twice?", f"{2 * i}.")]
            messages = [
                {"role": role, "content": content}
                for turn in turns[: 1 + i % 2]
                for role, content in zip(("user", "assistant"), turn, strict=True)
            ]
            out.write(json.dumps({"messages": messages}) + "\n")
    return file


def by_hand(chats: Path, vocabulary: Path) -> Iterator[tuple[list[int], list[bool]]]:
    """Each conversation that is learned, written down by hand as version 1 of the template."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    for number, line in enumerate(chats.read_text().splitlines()):
        ids, learned = [pieces.bos_id()], [False]
        for message in json.loads(line)["messages"]:
            asked = message["role"] == "user"
            text = f"[INST] {message['content']} [/INST]" if asked else message["content"]
            said = pieces.encode(text) + ([] if asked else [pieces.eos_id()])
            ids += said
            learned += [not asked] * len(said)
        if number not in (9, 19):  # held out
            yield ids, learned


def first_loss(model: Mistral, chats: Path, vocabulary: Path) -> float:
    """Nats an answer's token, from the logits of each conversation alone."""
    nats: list[np.ndarray] = []
    read = jax.jit(lambda ids: model(ids))
    for ids, learned in by_hand(chats, vocabulary):
        row = np.zeros((1, BLOCK + 1), np.int32)  # nothing sees what is after it
        row[0, : len(ids)] = ids
        z = np.asarray(read(jnp.asarray(row)), np.float64)[0, : len(ids) - 1]
        log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
        nats.append(-log_p[np.arange(len(z)), ids[1:]][learned[1:]])
    return float(np.concatenate(nats).mean())


def lessons(data: Path, tokenizer: Tokenizer, packing: Packing = "auto", batch: int = 1) -> Dataset:
    return open_dataset(str(data), tokenizer, BLOCK, batch, 0, packing, lambda done, of: None)


def test_a_fine_tune_counts_the_tokens_of_the_assistant_alone(
    tmp_path: Path,
    tiny: MistralConfig,
    vocabulary: Path,
    chats: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = Tokenizer.from_file(vocabulary)
    config = dataclasses.replace(tiny, n_layers=1, vocab_size=tokenizer.vocab_size)
    model = random_model(config)
    save_weights(tmp_path / "source", config, weights_of(model), vocabulary)
    rows = lessons(chats, tokenizer).reader.windows  # all of them in the first step
    assert rows < 18
    argv = ["--init-from", tmp_path / "source", "--out", tmp_path / "run", "--data", chats]
    argv += ["--batch", rows, "--block", BLOCK, "--steps", 1, "--max-tokens", 4]
    assert main(list(map(str, argv))) == 0
    said = capsys.readouterr().out
    assert f"18 documents are packed into {rows} rows of {BLOCK + 1} tokens" in said
    assert f"python -m lechat_jax.chat {tmp_path / 'run'}" in said
    assert "[Square of 9?]" in said, "a sample answers the first question held out"
    kept = (tmp_path / "run" / "config.yaml").read_text().splitlines()
    assert {f"data: {chats}", f"block: {BLOCK}", f"batch: {rows}", "steps: 1"} <= set(kept)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = {key: value for line in lines for key, value in json.loads(line).items()}
    assert metrics["train/loss"] == pytest.approx(first_loss(model, chats, vocabulary), rel=1e-5)
    answers = ["It is 81.", "18.", "It is 361.", "38."]
    assert metrics["val/bytes"] == sum(map(len, answers))
    assert metrics["val/tokens"] == sum(len(tokenizer.encode(a)) + 1 for a in answers)


def test_text_is_packed_on_demand_and_examples_are_not_if_so_asked(
    tmp_path: Path, vocabulary: Path, chats: Path
) -> None:
    tokenizer = Tokenizer.from_file(vocabulary)
    texts = [f"Number {i} " + "and so on " * (i % 7) for i in range(40)]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert lessons(file, tokenizer).rows(0, 1).documents is None
    packed = lessons(file, tokenizer, "on", batch=4)
    rows = packed.rows(0, 1)
    assert rows.documents is not None
    assert rows.counted is not None
    begins = np.asarray(rows.tokens) == tokenizer.bos_id
    assert begins.sum() > 4
    for tokens, part in zip(rows.tokens[0], rows.documents[0], strict=True):
        borders = 1 + np.flatnonzero(np.diff(part))
        assert set(borders[tokens[borders] > 0]) <= set(np.flatnonzero(tokens == tokenizer.bos_id))
    alone = lessons(chats, tokenizer, "off", batch=18)
    assert alone.reader.windows == 18
    assert np.asarray(alone.rows(0, 1).documents).max() == 1  # the example, and padding


def test_a_bad_file_ends_the_command_with_its_lines_and_code_2(
    tmp_path: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(chats.read_text() + '{"messages": []}\n{"messages": 3}\n')
    with pytest.raises(SystemExit) as stop:
        flags.run(lambda: main(["--data", str(bad), "--out", str(tmp_path / "run")]))
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {bad} has 2 faults, and nothing was done:\n"
        "  line 21, has no list of messages in `messages`\n"
        "  line 22, has no list of messages in `messages`\n"
    )
    assert not (tmp_path / "run").exists()
