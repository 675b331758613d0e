"""Conversations have the ids that mistral-common gives them, and each turn extends the last."""

import functools
from pathlib import Path

import pytest
from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    SystemMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from lechat_jax.errors import BadInput
from lechat_jax.tokenizer.chat_template import KINDS, Conversation
from lechat_jax.tokenizer.tokenizer import Tokenizer
from tests.support.tokenizers import shipped, small_tekken

NAMES = [
    *("v1", "v2", "v3", "v7", "v7m1", "v3-tekken"),
    *("small-v3", "small-v7", "small-v11", "small-v13", "small-v15"),
]
TURNS = [
    ("What is a fox?", "An animal. caf\u00e9 \U0001f98a"),
    ("And  a\n[INST] cat [/INST]?", "Another one </s>."),
    (" 12 + 3 ", "15"),
    ("Thanks", ""),
]
SYSTEM = "You answer briefly.\nAlways."
MOVES = {"v2", "v3", "v3-tekken", "small-v3"}  # the system prompt, to the last question


@pytest.fixture(scope="module")
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, _, version = request.param.partition("-")
    if kind == "small":
        return small_tekken(tmp_path_factory.mktemp("t") / "tekken.json", version)
    return shipped(request.param)


@functools.lru_cache(maxsize=2)
def loaded(path: Path) -> tuple[Tokenizer, MistralTokenizer]:
    """The tokenizer as we have it, and as mistral-common has it."""
    return Tokenizer.from_file(path), MistralTokenizer.from_file(path)


def theirs(template: MistralTokenizer, system: str, until: int) -> list[int]:
    """The ids that mistral-common has for the conversation up to that question."""
    messages = [SystemMessage(content=system)] if system else []
    for question, answer in TURNS[:until]:
        messages += [UserMessage(content=question), AssistantMessage(content=answer)]
    messages += [UserMessage(content=TURNS[until][0])]
    return template.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens


def answered(template: MistralTokenizer, text: str) -> list[int]:
    """The ids that mistral-common has for an answer."""
    message = AssistantMessage(content=text)
    instruct = template.instruct_tokenizer
    assert isinstance(instruct, InstructTokenizerBase)
    return instruct.encode_assistant_message(message, True)


@pytest.mark.parametrize("path", NAMES, indirect=True)
@pytest.mark.parametrize("system", ["", SYSTEM], ids=["plain", "system"])
def test_a_conversation_has_the_ids_of_mistral_common(
    path: Path, system: str, request: pytest.FixtureRequest
) -> None:
    ours, template = loaded(path)
    conversation = Conversation(ours, system)
    read: list[int] = []
    for until, (question, answer) in enumerate(TURNS):
        ids = conversation.ask(question)
        assert ids == theirs(template, system, until)
        name = request.node.callspec.params["path"]
        moved = bool(system) and name in MOVES and until > 0
        assert (ids[: len(read)] != read) == moved
        if answer:
            conversation.add(question, answered(template, answer))
            read = [*ids, *answered(template, answer)]


@pytest.mark.parametrize("path", ["v1", "v3", "v7", "small-v13"], indirect=True)
def test_an_answer_stays_as_it_was_produced(path: Path) -> None:
    """Also where the same text has other ids, or is broken off amid a character."""
    ours, _ = loaded(path)
    letters = {byte: id_ for id_, byte in ours.byte_of.items()}
    spelled = [letters[byte] for byte in b"An animal."] + [letters[0xF0]]
    conversation = Conversation(ours)
    first = conversation.ask("What is a fox?")
    conversation.add("What is a fox?", spelled)
    second = conversation.ask("Why?")
    assert second[: len(first) + len(spelled) + 1] == [*first, *spelled, ours.eos_id]
    assert len(second) > len(first) + len(spelled) + 1
    conversation.add("Why?", [])
    assert conversation.ask("Why?")[: len(second) + 1] == [*second, ours.eos_id]


@pytest.mark.parametrize("path", ["v3", "small-v13"], indirect=True)
def test_the_end_is_written_once(path: Path) -> None:
    ours, _ = loaded(path)
    answer = ours.encode("Hi")
    conversation = Conversation(ours)
    for said in (answer, [*answer, ours.eos_id]):
        conversation.add("Hello", said)
    assert [exchange.answer for exchange in conversation.exchanges] == [[*answer, ours.eos_id]] * 2


@pytest.mark.parametrize("path", ["v1", "v3", "small-v7"], indirect=True)
def test_a_new_system_prompt_is_as_if_it_had_always_been(path: Path) -> None:
    ours, template = loaded(path)
    late, early = Conversation(ours), Conversation(ours, SYSTEM)
    for conversation in (late, early):
        conversation.add(TURNS[0][0], answered(template, TURNS[0][1]))
    late.system = SYSTEM
    assert late.ask(TURNS[1][0]) == early.ask(TURNS[1][0]) == theirs(template, SYSTEM, 1)


@pytest.mark.parametrize("path", ["v1", "v7", "small-v13"], indirect=True)
def test_messages_are_what_was_said(path: Path) -> None:
    ours, template = loaded(path)
    conversation = Conversation(ours, SYSTEM)
    conversation.add(TURNS[0][0], answered(template, TURNS[0][1]))
    conversation.ask("not answered")
    assert conversation.messages == [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": TURNS[0][0]},
        {"role": "assistant", "content": TURNS[0][1]},
    ]


@pytest.mark.parametrize("path", ["v1", "small-v13"], indirect=True)
def test_undecodable_bytes_are_refused(path: Path) -> None:
    ours, _ = loaded(path)
    with pytest.raises(BadInput, match="character 2 of the text is not Unicode"):
        Conversation(ours).ask("ab\udcff")
    with pytest.raises(BadInput, match="character 0 of the text is not Unicode"):
        Conversation(ours, "\udcff")


def test_every_version_that_mistral_common_knows_has_a_template() -> None:
    from mistral_common.tokens.tokenizers.base import TokenizerVersion

    assert list(KINDS) == [version.value for version in TokenizerVersion]
