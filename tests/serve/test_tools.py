"""Tool calls are found in the ids that Mistral's own templates write, whole or token by token."""

import json
from pathlib import Path

import numpy as np
import pytest
from mistral_common.protocol.instruct.messages import AssistantMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import FunctionCall, ToolCall
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from lechat_jax.serve.grammar import Grammars
from lechat_jax.serve.tools import (
    CALL_ID,
    ToolCallParser,
    grammar,
    marks,
    new_call_id,
    with_usual_ids,
)
from lechat_jax.tokenizer.chat_template import ChatPrompts
from lechat_jax.tokenizer.tokenizer import Tokenizer
from tests.support.tokenizers import shipped, small_tekken

CALLS = [
    ("get_weather", {"city": "Paris", "days": [1, 2], "note": 'a "}]" caf\u00e9'}, "abcdefgh1"),
    ("search", {}, "abcdefgh2"),
]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": PARAMETERS}}
    for name, _, _ in CALLS
]


@pytest.fixture(scope="module", params=["v3", "v7", "small-v3", "small-v11", "small-v13"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, _, version = request.param.partition("-")
    folder = tmp_path_factory.mktemp("tokenizer")
    return small_tekken(folder / "tekken.json", version) if version else shipped(kind)


def written(path: Path) -> list[int]:
    """The ids that mistral-common has for an answer with these calls, without EOS."""
    calls = [
        ToolCall(id=id_, function=FunctionCall(name=name, arguments=json.dumps(arguments)))
        for name, arguments, id_ in CALLS
    ]
    results = [ToolMessage(tool_call_id=id_, name=name, content="7") for name, _, id_ in CALLS]
    messages = [UserMessage(content="?"), AssistantMessage(tool_calls=calls), *results]
    template = MistralTokenizer.from_file(path)
    request = ChatCompletionRequest(messages=messages)
    ids = template.encode_chat_completion(request).tokens
    begin = ids.index(Tokenizer(path).control_id("[TOOL_CALLS]"))
    return ids[begin : ids.index(Tokenizer(path).eos_id, begin)]


@pytest.mark.parametrize("step", [1, 1000])
def test_calls_are_those_that_were_written(path: Path, step: int) -> None:
    tokenizer = Tokenizer(path)
    control = marks(tokenizer)
    assert control
    ids = written(path)
    parser, names, ids_of, arguments = ToolCallParser(tokenizer, control), {}, {}, {}
    for at in range(0, len(ids), step):
        for piece in parser.push(ids[at : at + step]):
            if piece.name is not None:
                names[piece.number], ids_of[piece.number] = piece.name, piece.id
            arguments[piece.number] = arguments.get(piece.number, "") + piece.arguments
    assert parser.flush() == ""
    assert parser.n_content == 0
    assert [*names.values()] == [name for name, _, _ in CALLS]
    assert [json.loads(text) for text in arguments.values()] == [wanted for _, wanted, _ in CALLS]
    assert all(id_ and len(id_) == 9 for id_ in ids_of.values())
    if tokenizer.control_id("[CALL_ID]") in ids or tokenizer.version == "v3":
        assert [*ids_of.values()] == [id_ for _, _, id_ in CALLS]


def test_content_before_a_call_is_told_apart(path: Path) -> None:
    tokenizer = Tokenizer(path)
    control = marks(tokenizer)
    assert control
    content = tokenizer.encode("Let me look.")
    parser = ToolCallParser(tokenizer, control)
    pieces = [*parser.push([*content, *written(path)])]
    assert parser.n_content == len("Let me look.")
    assert pieces[0].name == "get_weather"


def test_a_list_that_cannot_be_read_is_content() -> None:
    tokenizer = Tokenizer(shipped("v3"))
    control = marks(tokenizer)
    assert control
    parser = ToolCallParser(tokenizer, control)
    assert [*parser.push([control.calls, *tokenizer.encode("[1, 2]")])] == []
    assert parser.flush() == "[1, 2]"


@pytest.mark.parametrize("path", ["small-v3", "small-v11", "small-v13"], indirect=True)
def test_whatever_a_grammar_admits_is_a_call(path: Path) -> None:
    """Here always the longest token that may come next, until the answer may end."""
    tokenizer = Tokenizer(path)
    control = marks(tokenizer)
    assert control
    matcher = Grammars(tokenizer).lark(grammar(TOOLS, tokenizer, control, 2))
    ids: list[int] = []
    lengths = [len(tokenizer.bytes_of(id_)) for id_ in range(tokenizer.vocab_size)]
    for _ in range(100):
        bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits)
        if tokenizer.eos_id in allowed:
            break
        ids.append(int(max(allowed, key=lengths.__getitem__)))
        matcher.consume(ids[-1:])
    calls = {}
    for piece in ToolCallParser(tokenizer, control).push(ids):
        name, text = calls.get(piece.number, (piece.name, ""))
        calls[piece.number] = name, text + piece.arguments
    assert calls
    for name, text in calls.values():
        assert name in ("get_weather", "search")
        assert json.loads(text)["city"] in ("Paris", "Oslo")


def test_ids_of_calls_are_nine_letters_or_digits() -> None:
    made = {new_call_id() for _ in range(100)}
    assert len(made) == 100
    assert {len(id_) for id_ in made} == {9}
    assert all(id_.isalnum() and id_.isascii() for id_ in made)


@pytest.mark.parametrize("id_", ["call_abcdefghijklmnopqrst", "call_6789", "", "\ud800"])
def test_ids_of_other_servers_become_such(path: Path, id_: str) -> None:
    """Templates up to v11 refuse them."""
    call = {"id": id_, "type": "function", "function": {"name": "search", "arguments": "{}"}}
    call["index"] = 0
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": [call, CALLS]},
        {"role": "tool", "tool_call_id": id_, "content": "7"},
    ]
    asked, told, result = with_usual_ids(messages)
    assert asked == messages[0]
    (same, other), new = told["tool_calls"], result["tool_call_id"]
    assert CALL_ID.fullmatch(new)
    assert (same["id"], other) == (new, CALLS)
    assert with_usual_ids([result]) == [result]
    told["tool_calls"] = [same]
    assert ChatPrompts(Tokenizer(path)).encode([asked, told, result])
    assert messages[2]["tool_call_id"] == id_
