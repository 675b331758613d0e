"""Conversations are written as mistral-common writes them, and the assistant's ids are learned."""

from pathlib import Path
from typing import Any

import pytest
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest

from lechat_jax.tokenizer.tokenizer import Tokenizer
from lechat_jax.tokenizer.transcripts import Transcripts, Unusable
from tests.tokenizer.test_chat_template import NAMES, SYSTEM, TURNS, answered, loaded, path

__all__ = ["path"]  # a fixture

ASKED = TURNS[:-1]  # the last has no answer


def conversation(system: str) -> list[dict[str, Any]]:
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in ASKED:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


@pytest.mark.parametrize("path", NAMES, indirect=True)
@pytest.mark.parametrize("system", ["", SYSTEM], ids=["plain", "system"])
def test_the_answers_are_learned_and_nothing_else_is(path: Path, system: str) -> None:
    tokenizer, template = loaded(path)
    ids, counted, _ = Transcripts(tokenizer).write(conversation(system))
    answers = [answered(template, answer) for _, answer in ASKED]
    assert all(answer[-1] == tokenizer.eos_id for answer in answers)
    learned = [id_ for id_, one in zip(ids, counted, strict=True) if one]
    assert learned == [id_ for answer in answers for id_ in answer]
    # What comes before the last answer is what a model that is to give it would read.
    said: list[Any] = [SystemMessage(content=system)] if system else []
    for question, answer in ASKED[:-1]:
        said += [UserMessage(content=question), AssistantMessage(content=answer)]
    said += [UserMessage(content=ASKED[-1][0])]
    read = template.encode_chat_completion(ChatCompletionRequest(messages=said)).tokens
    assert ids == read + answers[-1]


def test_an_answer_of_weight_zero_is_read_and_not_learned() -> None:
    tokenizer = Tokenizer.mistral_v1()
    messages = conversation("")
    ids, whole, _ = Transcripts(tokenizer).write(messages)
    messages[1]["weight"] = 0
    again, counted, _ = Transcripts(tokenizer).write(messages)
    first = len(tokenizer.encode(ASKED[0][1])) + 1
    assert (again, sum(counted)) == (ids, sum(whole) - first)
    assert counted[whole.index(True)] is False


CALL = {"id": "abcdEFG12", "type": "function"}
TOOL = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize("path", ["v3", "small-v13"], indirect=True)
def test_a_field_that_is_null_is_as_if_it_were_not_there(path: Path) -> None:
    """As Arrow has it, which gives each message all fields that any has, and so on below."""
    bare: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "How much?"}]},
        {
            "role": "assistant",
            "tool_calls": [CALL | {"function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "0", "tool_call_id": "abcdEFG12"},
        {"role": "assistant", "content": "It is 0."},
    ]
    names = ("content", "name", "tool_calls", "tool_call_id", "weight", "prefix")
    full = [dict.fromkeys(names) | message for message in bare]
    full[0]["content"] = [{"type": "text", "text": "How much?", "image_url": None}]
    full[0]["tool_calls"] = []
    full[1]["tool_calls"] = [
        CALL | {"index": None, "function": {"name": "f", "arguments": {"a": 1, "b": None}}}
    ]
    parameters = TOOL | {"required": None}
    parameters["properties"] = {"a": {"type": "integer", "enum": None}, "b": None}
    function = {"name": "f", "description": "d", "strict": None}
    tools = [
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": TOOL}}
    ]
    nulls = [{"type": "function", "function": function | {"parameters": parameters}}]
    transcripts = Transcripts(loaded(path)[0])
    assert transcripts.write(full, nulls) == transcripts.write(bare, tools)
    # Arguments and parameters of which nothing is left are there, and empty.
    full[1]["tool_calls"][0]["function"]["arguments"] = None
    bare[1]["tool_calls"][0]["function"]["arguments"] = {}
    nulls[0]["function"]["parameters"] = None
    tools[0]["function"]["parameters"] = {}
    assert transcripts.write(full, nulls) == transcripts.write(bare, tools)


def says(role: str, content: Any = "x") -> dict[str, Any]:
    return {"role": role, "content": content}


def nested(depth: int) -> list[Any]:
    content: list[Any] = []
    for _ in range(depth):
        content = [content]
    return [says("user", content), says("assistant")]


USER, ANSWER = says("user"), says("assistant")
BAD: dict[str, tuple[Any, str]] = {
    "no list": ("hello", "has no list of messages"),
    "no message": ([], "has no list of messages"),
    "no role": ([{"content": "x"}], "number 1, without a `role`"),
    "an unknown role": ([USER, says("robot")], "'robot', which is none of system, user"),
    "two questions": ([USER, USER, ANSWER], "two messages of the user after each other, at num"),
    "two answers": ([USER, ANSWER, ANSWER], "two messages of the assistant after each other"),
    "an answer first": ([ANSWER, USER, ANSWER], "an answer, number 1, before any question"),
    "an answer to nothing": ([says("system"), ANSWER], "an answer, number 2, before any question"),
    "a late system": ([USER, says("system"), ANSWER], "system message, number 2, amid"),
    "an empty answer": ([USER, says("assistant", " ")], "has an empty answer, message number 2"),
    "no content": ([says("user", None), ANSWER], "message, number 1, without `content`"),
    "a question last": ([USER, ANSWER, USER], "ends with a message of the user"),
    "half a pair": ([USER, says("assistant", "\ud83d")], r"holds \ud83d, half of a character pair"),
    "weights of zero": ([USER, ANSWER | {"weight": 0}], "the weight of all is 0"),
    "nested without end": (nested(2000), "is nested more than 100 levels deep"),
    "a picture": (
        [says("user", [{"type": "image_url", "image_url": "x"}]), ANSWER],
        "has images, and the model has no vision tower",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_conversation_is_refused_with_the_reason(name: str) -> None:
    messages, complaint = BAD[name]
    with pytest.raises(Unusable) as refused:
        Transcripts(Tokenizer.mistral_v1()).write(messages)
    assert complaint in str(refused.value)
