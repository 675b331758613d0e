"""What the command measures is what transformers makes of the same text."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lechat_jax.checkpoint.weights import save_weights
from lechat_jax.config import MistralConfig
from lechat_jax.data.packing import Documents
from lechat_jax.errors import BadInput
from lechat_jax.eval.command import EvalConfig, main, windows
from lechat_jax.model.binding import weights_of
from lechat_jax.tokenizer.tokenizer import Tokenizer
from lechat_jax.train.command import main as train
from tests.support.models import random_model
from tests.support.tokenizers import taught

BLOCK, STRIDE = 48, 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: MistralConfig) -> Path:
    """Random weights in lechat's format, as `ours` in this folder."""
    home = tmp_path_factory.mktemp("model")
    vocabulary = taught(home)
    ids = Tokenizer.from_file(vocabulary).vocab_size
    config = dataclasses.replace(tiny, n_layers=2, vocab_size=ids)
    save_weights(home / "ours", config, weights_of(random_model(config)), vocabulary)
    return home


@pytest.fixture(scope="module")
def in_both(folder: Path, convert: Callable[[list[str]], int]) -> Path:
    """The same folder, with the weights in transformers' format as `theirs`."""
    assert convert([str(folder / "ours"), str(folder / "theirs"), "--to", "hf"]) == 0
    return folder


def texts() -> list[str]:
    """Documents of less than a window, of several, and of one token."""
    long = " ".join(f"The square of {i} is {i * i}." for i in range(12))
    return ["The square", long, "9", long[:90]]


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    return file


def figures(*argv: Any) -> dict[str, Any]:
    json_file = Path(argv[0]).parent / "figures.json"
    assert main([*map(str, argv), "--json", str(json_file)]) == 0
    return json.loads(json_file.read_text())


def theirs(
    folder: Path, documents: list[tuple[list[int], list[bool]]], block: int, stride: int
) -> list[float]:
    """Nats of every token that counts: the first window that holds it as a target scores it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "theirs", attn_implementation="eager", dtype=torch.float32
    ).eval()
    nats = []
    for ids, counted in documents:
        places = np.flatnonzero(counted).tolist()
        first = {place: stride * max(0, math.ceil((place - block) / stride)) for place in places}
        for start in sorted(set(first.values())):
            with torch.no_grad():
                logits = model(torch.tensor([ids[start : start + block]])).logits[0]
            log_p = torch.log_softmax(logits.double(), dim=-1)
            own = [place for place in places if first[place] == start]
            nats += [-log_p[place - start - 1, ids[place]].item() for place in own]
    return nats


def test_the_loss_is_that_of_transformers(in_both: Path, data: Path) -> None:
    found = figures(in_both / "ours", "--data", data, "--block", BLOCK, "--stride", STRIDE)
    tokenizer = Tokenizer.from_file(in_both / "taught.model")
    ids = [[tokenizer.bos_id, *tokenizer.encode(t), tokenizer.eos_id] for t in texts()]
    documents = [(own, [place > 0 for place in range(len(own))]) for own in ids]
    expected = theirs(in_both, documents, BLOCK, STRIDE)
    n_bytes = sum(len(text.encode()) for text in texts())
    assert len(expected) > 3 * BLOCK
    assert (found["tokens"], found["bytes"]) == (len(expected), n_bytes)
    assert found["loss"] == pytest.approx(np.mean(expected), rel=2e-6)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)
    bits = sum(expected) / math.log(2) / n_bytes
    assert found["bits_per_byte"] == pytest.approx(bits, rel=2e-6)
    assert found["documents"] == 4


def test_of_conversations_the_answers_are_scored(in_both: Path) -> None:
    tokenizer = Tokenizer.from_file(in_both / "taught.model")
    chats = [[(f"Square of {i}?", f"The square is {i * i}."), ("Twice?", "9")] for i in range(3)]
    file = in_both / "chats.jsonl"
    documents = []
    with file.open("w") as out:
        for turns in chats:
            ids, counted, messages = [tokenizer.bos_id], [False], []
            for asked, said in turns:
                question = tokenizer.encode(f"[INST] {asked} [/INST]")  # version 1 of the template
                answer = [*tokenizer.encode(said), tokenizer.eos_id]
                ids += question + answer
                counted += [False] * len(question) + [True] * len(answer)
                messages.append({"role": "user", "content": asked})
                messages.append({"role": "assistant", "content": said})
            documents.append((ids, counted))
            out.write(json.dumps({"messages": messages}) + "\n")
    found = figures(in_both / "ours", "--data", file, "--block", BLOCK, "--stride", STRIDE)
    expected = theirs(in_both, documents, BLOCK, STRIDE)
    assert max(len(ids) for ids, _ in documents) > BLOCK
    assert found["tokens"] == len(expected)
    assert found["loss"] == pytest.approx(np.mean(expected), rel=2e-6)
    assert found["bytes"] == sum(len(said) for turns in chats for _, said in turns)


def test_int8_is_scored_as_it_is_and_costs_a_little(folder: Path, data: Path) -> None:
    whole = figures(folder / "ours", "--data", data, "--block", BLOCK)
    int8 = figures(folder / "ours", "--data", data, "--block", BLOCK, "--quantize", "int8")
    assert int8["quantization"] == "int8"
    assert 0 < abs(int8["loss"] - whole["loss"]) < 0.05


def test_every_token_is_scored_once_with_enough_before_it() -> None:
    lengths = [1, 2, 9, 10, 31]
    ids = [list(range(100 * i, 100 * i + n)) for i, n in enumerate(lengths)]
    whole = Documents.of([(own, [t > 0 for t in range(len(own))]) for own in ids])
    parts = windows(whole, block=8, stride=3)
    assert parts.lengths.max() == 9
    scored = parts.ids[parts.counted].tolist()
    assert sorted(scored) == [id_ for own in ids for id_ in own[1:]]
    for begin, end in zip(parts.begins, parts.begins[1:], strict=False):
        places = np.flatnonzero(parts.counted[begin:end])
        assert places[0] == 1 if parts.ids[begin] % 100 == 0 else places[0] > 8 - 3


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"block": 0}, "--block must be at least 1, not 0"),
        ({"block": 8, "stride": 9}, "--stride must be from 1 to the 8 of --block, not 9"),
        ({"json": Path("nowhere/f.json")}, "there is no folder .*nowhere to write f.json to"),
    ],
)
def test_bad_flags_are_refused(flags: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        EvalConfig(Path("x"), **flags)


def test_a_run_whose_text_has_changed_is_told_of_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = folder / "n.txt"
    text.write_text("".join(f"The square of {i} is {i * i}.\n" for i in range(99)))
    argv = ["--init-from", folder / "ours", "--data", text, "--out", folder / "run"]
    assert train([*map(str, argv), "--steps", "1", "--block", "16", "--max-tokens", "2"]) == 0
    run = folder / "run"
    assert figures(run)["notes"] == []
    text.write_text("Another line at the top.\n" + text.read_text())
    capsys.readouterr()
    changed = f"{text} is not the text that {run} was trained on"
    assert figures(run)["notes"] == [
        f"{changed} any more: some of what is held out of it now was learned"
    ]
    assert f"note: {changed} any more" in capsys.readouterr().out
    other = folder / "o.txt"
    other.write_text("A line at the top.\n" + text.read_text())
    assert figures(run, "--data", other, "--part", "held-out")["notes"] == [
        changed.replace("n.txt", "o.txt")
    ]
    assert figures(run, "--data", text)["notes"] == [], "all of it is no less than was asked for"
