"""Files of examples: what is learned of them, and every fault in one message."""

import gzip
import itertools
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lechat_jax.data import examples, parallel_encoding
from lechat_jax.data.examples import Examples, load_examples
from lechat_jax.data.packing import Documents
from lechat_jax.data.parallel_encoding import write_completion
from lechat_jax.data.sources import form_of
from lechat_jax.errors import BadInput
from lechat_jax.tokenizer.tokenizer import Tokenizer
from tests.support.tokenizers import tokenizer

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
    ids, counted, _ = write_completion(mistral, prompt, completion)
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


# --- how they are written ---

CHATS = [[(f"Say {i}", f"{i}!"), ("Again", f"{i}?")] for i in range(3)]


def messages(turns: list[tuple[str, str]], role: str = "role", said: str = "content") -> Any:
    names = ("user", "assistant") if role == "role" else ("human", "gpt")
    return [{role: n, said: text} for turn in turns for n, text in zip(names, turn, strict=True)]


DIALECTS: dict[str, Any] = {
    "messages": lambda turns: {"messages": messages(turns)},
    "ShareGPT": lambda turns: {"id": "x", "conversations": messages(turns, "from", "value")},
    "either": lambda turns: {"conversations": messages(turns), "source": "y"},
    "Alpaca": lambda turns: {
        "instruction": turns[-1][0],
        "input": "",
        "output": turns[-1][1],
        "history": turns[:-1],
    },
    "TRL": lambda turns: {
        "prompt": [*messages(turns[:-1]), *messages(turns[-1:])[:1]],
        "completion": messages(turns[-1:])[1:],
    },
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_each_dialect_is_the_same_conversation(tmp_path: Path, dialect: str) -> None:
    """Of a prompt of messages the answers are read, and those of its completion are learned."""
    rows = [DIALECTS[dialect](turns) for turns in CHATS]
    expected = load(write(tmp_path / "plain.jsonl", *({"messages": messages(t)} for t in CHATS)))
    files = [write(tmp_path / "a.JSONL", *rows), write(tmp_path / "b.ndjson", *rows)]
    for name, indent in (("c.json", None), ("d.JSON", 1)):
        (tmp_path / name).write_text(json.dumps(rows, indent=indent))
        files.append(tmp_path / name)
    packed = tmp_path / "e.json.gz"
    packed.write_bytes(gzip.compress(files[-1].read_bytes()))
    for file in [*files, packed]:
        found = load(file)
        assert found.form == "messages"
        assert found.train.ids.tolist() == expected.train.ids.tolist()
        assert found.opening == "Say 2"
        answers = [answer for _, answer in each(found.train)]
        assert answers == (["0?", "1?"] if dialect == "TRL" else ["0! 0?", "1! 1?"])


def test_the_two_parts_of_an_instruction_are_one_question_after_the_system(tmp_path: Path) -> None:
    row = {"system": "Be brief.", "instruction": "Add.", "input": "1 1", "output": "2"}
    (asked, _), _ = [*each(load(write(tmp_path / "a.jsonl", row, row | {"output": "3"})).train), 0]
    assert asked == "[INST] Be brief.\n\nAdd.\n1 1 [/INST]"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ({"conversations": [{"from": "human", "value": "Hi"}]}, "ends with a message of the user"),
        ({"conversations": [{"from": "ape", "value": "Hi"}]}, "has a message of 'ape', which is n"),
        ({"conversations": "Hi"}, "has no list of messages"),
        ({"instruction": "Hi", "input": "", "output": ""}, "has an empty answer, message number 2"),
        ({"instruction": 3, "output": "x"}, "has no list of messages"),
        ({"prompt": "Hi", "completion": messages(CHATS[0])}, "has no list of messages"),
        ('{"messages": ' + "[" * 200 + "]" * 200 + "}", "cannot be read: it is nested more than 1"),
    ],
)
def test_a_bad_example_of_any_dialect_is_named(tmp_path: Path, line: Any, why: str) -> None:
    file = write(tmp_path / "a.jsonl", chat("Hi", "Hello"), line)
    assert complaint(file).startswith(f"{file}, line 2, {why}")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_dataset_may_have_any_dialect(monkeypatch: pytest.MonkeyPatch, dialect: str) -> None:
    rows = [json.loads(json.dumps(DIALECTS[dialect](turns))) for turns in CHATS]
    library = types.ModuleType("datasets")
    table = type("Table", (list,), {"column_names": [*rows[0], "other"]})(rows)
    library.__dict__["load_dataset"] = lambda name, split: table
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert load("some/chats").opening == "Say 2"


def test_other_files_of_a_folder_of_examples_are_left_out_and_told(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", chat("Hi", "a"), chat("Hi", "b"))
    write(tmp_path / "dataset_infos.json", {"default": 1})
    (tmp_path / "README.md").write_text("# Of what")
    examples = load(tmp_path)
    assert examples.size == f"1 file, 2 examples, {examples.n_bytes} bytes"
    assert examples.note == (
        f"read 1 file below {tmp_path}; left out: 1 no examples (README.md), "
        "1 without examples or texts (dataset_infos.json)"
    )


# --- many ---


def test_the_second_time_nothing_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.jsonl", *(chat(f"Say {i}", f"{i}!") for i in range(23)))
    first = load(file)
    monkeypatch.setattr(examples, "pages", None)  # whoever calls it fails
    for block in (64, 12):
        again = load(file, block)
        assert again.train.ids.tolist()[:9] == first.train.ids.tolist()[:9]
        assert again.opening == "Say 9"
    assert again.val_bytes == (1, 0), "of what is left of the answers"
    write(file, chat("Hi", "a"))
    with pytest.raises(TypeError):
        load(file)


def test_several_processes_write_what_one_does(tmp_path: Path) -> None:
    rows = [chat(f"Say {i}", f"{i}!" * (i % 3)) for i in range(70)]
    seen: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel_encoding, "CHUNK", 9)
        patch.setattr(parallel_encoding, "FEWEST", 1)
        patch.setattr(parallel_encoding, "cores", lambda: 2)
        several = [*parallel_encoding.pages("messages", V1, rows, lambda *at: seen.append(at))]
        patch.setattr(parallel_encoding, "cores", lambda: 1)
        one = [*parallel_encoding.pages("messages", V1, rows, lambda *at: None)]
    assert seen == [(n, 70) for n in (*range(9, 64, 9), 70)]
    for found, expected in zip(several, one, strict=True):
        assert [np.asarray(leaf).tolist() for leaf in found[:4]] == [
            np.asarray(leaf).tolist() for leaf in expected[:4]
        ]
        assert found.faults == expected.faults
        assert all("has an empty answer" in why for _, why in found.faults)
    assert sum(len(page.faults) for page in one) == 24


def test_several_processes_know_added_tokens(tmp_path: Path) -> None:
    V1.save(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<think>": 32000}))
    tokenizer = Tokenizer.beside(tmp_path, 32064)
    assert tokenizer
    chunks = [[("a <think> b", True)], [("no token", False)]]
    with parallel_encoding.workers("text", tokenizer, 2) as work_each:
        several = [encoded.ids.tolist() for encoded in work_each(chunks)]
    assert several == [
        [1, *tokenizer.encode("a <think> b"), 2],
        [1, *tokenizer.encode("no token")],
    ]
    assert 32000 in several[0]


def test_a_process_that_ends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_encoding, "CHUNK", 1)
    monkeypatch.setattr(parallel_encoding, "FEWEST", 1)
    monkeypatch.setattr(parallel_encoding, "cores", lambda: 2)
    monkeypatch.setattr(sys, "executable", shutil.which("true"))
    with pytest.raises(BadInput, match="a process that tokenised ended with code 0"):
        list(parallel_encoding.pages("messages", V1, [chat("Hi", "a")] * 3, lambda *at: None))


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
