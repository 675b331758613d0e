"""Files of examples: what is learned of them, and every fault in one message."""

import itertools
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lechat_jax.errors import BadInput
from lechat_jax.examples import Examples, form_of, load_examples, write_completion
from lechat_jax.packing import Documents
from lechat_jax.tokenizer import Tokenizer
from tests.tokenizers import tokenizer

V1 = Tokenizer.mistral_v1()


def chat(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def write(path: Path, *lines: Any) -> Path:
    text = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def load(path: Path | str, block: int = 64) -> Examples:
    form = form_of(str(path))
    assert form
    return load_examples(str(path), form, V1, block, lambda done, of: None)


def each(documents: Documents) -> list[tuple[str, str]]:
    """What is read and what is learned of each document."""
    found = []
    for begin, end in itertools.pairwise(documents.begins):
        ids, counted = documents.ids[begin:end], documents.counted[begin:end]
        found.append((V1.decode(ids[~counted]), V1.decode(ids[counted])))
        assert ids[0] == V1.bos_id
    return found


def complaint(path: Path) -> str:
    with pytest.raises(BadInput) as refused:
        load(path)
    return str(refused.value)


# --- what is learned ---


def test_every_tenth_example_and_its_copies_are_held_out(tmp_path: Path) -> None:
    chats = [chat(f"Say {i}", f"{i}!") for i in range(23)]
    chats[4] = chats[9]
    examples = load(write(tmp_path / "a.jsonl", *chats))
    assert each(examples.val) == [(f"[INST] Say {i} [/INST]", f"{i}!") for i in (9, 9, 19)]
    learned = [i for i in range(23) if i not in (4, 9, 19)]
    assert each(examples.train) == [(f"[INST] Say {i} [/INST]", f"{i}!") for i in learned]
    assert (examples.val_bytes, examples.opening) == ((2, 2, 3), "Say 9")


def test_of_a_few_examples_the_last_is_held_out(tmp_path: Path) -> None:
    examples = load(write(tmp_path / "a.jsonl", *(chat("Hi", f"{i}") for i in range(3))))
    assert [answer for _, answer in each(examples.train)] == ["0", "1"]
    assert [answer for _, answer in each(examples.val)] == ["2"]


@pytest.mark.parametrize("name", ["v1", "v3", "v7", "v3-tekken"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("1 + 1 =", " 2"),
        ("Once", "upon"),
        ("a\n", "\n b "),
        ("x ", " y"),
        ("", " free"),
        ("é", "é"),
    ],
)
def test_a_completion_goes_on_where_its_prompt_ends(
    name: str, prompt: str, completion: str
) -> None:
    mistral = tokenizer(name)
    ids, counted = write_completion(mistral, prompt, completion)
    given = [mistral.bos_id, *(mistral.encode(prompt) if prompt else [])]
    assert ids[: len(given)] == given, "as generating from the prompt begins"
    assert mistral.decode(ids) == prompt + completion
    assert counted == [i >= len(given) for i in range(len(ids))]
    assert ids[-1] == mistral.eos_id


def test_prompts_and_completions_are_read_from_a_file(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}", "id": i} for i in range(4)]
    examples = load(write(tmp_path / "a.jsonl", *rows))
    assert examples.form == "completion"
    assert each(examples.train)[1] == ("1 + 1 =", "2")  # decoded apart, without its space
    assert examples.opening == "3 + 1 ="


def test_columns_of_a_dataset_do_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(list[dict[str, Any]]):
        column_names = ("messages", "source")

    rows = Rows(chat("Hi", f"{i}") | {"source": "x"} for i in range(3))
    library = types.ModuleType("datasets")
    library.__dict__["load_dataset"] = lambda name, split: rows
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert [answer for _, answer in each(load("some/chats").train)] == ["0", "1"]
    rows[1]["messages"].pop()
    with pytest.raises(BadInput, match="some/chats, row 1, ends with a message of the user"):
        load("some/chats")


def test_examples_that_are_too_long_are_cut_and_told(tmp_path: Path) -> None:
    chats = [chat("Hi", "a"), chat("Hi", "b " * 40), chat("word " * 40, "lost"), chat("Hi", "c")]
    examples = load(write(tmp_path / "a.jsonl", *chats), block=15)
    assert np.diff(examples.train.begins).tolist() == [11, 16]
    longest = len(V1.encode(f"[INST] {'word ' * 40} [/INST]")) + 3
    assert examples.note == (
        "2 of 4 examples are longer than the 16 tokens of a row and are cut there; 1 of them "
        f"have no answer before and are left out; --block {longest - 1} would hold all"
    )


# --- what is refused ---


def test_all_faults_are_told_with_their_lines(tmp_path: Path) -> None:
    good = chat("Hi", "Hello")
    file = write(
        tmp_path / "a.jsonl",
        good,
        '{"messages": [',
        "",
        {"messages": [{"role": "user", "content": "x"}]},
        {"text": "x"},
        chat("Hi", ""),
        good,
        *(["[]"] * 3),
    )
    assert complaint(file).splitlines() == [
        f"{file} has 7 faults, and nothing was done:",
        "  line 2, is not JSON: Expecting value: line 1 column 15 (char 14)",
        "  line 4, ends with a message of the user instead of an answer",
        "  line 5, has no list of messages in `messages`",
        "  line 6, has an empty answer, message number 2",
        "  line 8, is not a JSON object",
        "  and 2 more",
    ]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ({"prompt": "x"}, "has no text in its `completion` field"),
        ({"prompt": 3, "completion": "x"}, "has no text in its `prompt` field"),
        ({"prompt": "x", "completion": ""}, "has an empty `completion`"),
        ('{"prompt": "x", "completion": "\\ud83d"}', r"holds \ud83d, half of a character pair"),
    ],
)
def test_a_bad_completion_is_named(tmp_path: Path, line: Any, why: str) -> None:
    good = {"prompt": "a", "completion": "b"}
    assert (
        complaint(write(tmp_path / "a.jsonl", good, line)) == f"{tmp_path}/a.jsonl, line 2, {why}"
    )


def test_a_file_that_is_not_utf8_is_named_with_the_line(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", chat("Hi", "Hello"))
    file.write_bytes(file.read_bytes() + b'{"messages": "\xff"}\n')
    with pytest.raises(BadInput, match=r"a\.jsonl is not UTF-8 text: line 2, byte \d+"):
        load(file)


def test_one_example_is_too_few(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", chat("Hi", "Hello"), chat("Hi", "Hello"))
    assert "give at least two different ones" in complaint(file)


def test_text_among_examples_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", chat("Hi", "Hello"))
    (tmp_path / "b.txt").write_text("text")
    assert f"{tmp_path}/b.txt is no .jsonl file" in complaint(tmp_path)
