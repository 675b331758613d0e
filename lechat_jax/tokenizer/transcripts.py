"""Training conversations as token ids with a loss mask, by Mistral's chat template.

Encoded by mistral-common as for the chat command, see `chat_template`, in each tokenizer
version; the mask is True on the assistant's ids.
"""

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from lechat_jax.config import VisionConfig
from lechat_jax.errors import BadInput
from lechat_jax.files.records import half_pair, without_nulls
from lechat_jax.tokenizer.chat_template import KINDS, base_of
from lechat_jax.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lechat_jax.tokenizer.image_template import NumberedImages

ROLES = ("system", "user", "assistant", "tool")


class Unusable(Exception):
    """A conversation that cannot be trained on; the message continues a sentence after "line 3"."""


class Transcript(NamedTuple):
    """An encoded conversation: its ids, its loss mask, and the addresses of its images in order."""

    ids: list[int]
    counted: list[bool]
    images: list[str]


def parts_of(messages: Any) -> Iterator[dict[str, Any]]:
    """The parts of messages whose content (ShareGPT's value) is a list, such as their images."""
    for message in messages if isinstance(messages, list) else ():
        said = message if isinstance(message, dict) else {}
        content = said.get("content", said.get("value"))
        parts = content if isinstance(content, list) else ()
        yield from (part for part in parts if isinstance(part, dict))


class Transcripts:
    """Encodes conversations for training with one tokenizer's chat template.

    With a vision tower messages may have images: `image_url` parts whose `url` is a file or a data
    URL.
    """

    def __init__(self, tokenizer: Tokenizer, vision: VisionConfig | None = None) -> None:
        version, base = TokenizerVersion(tokenizer.version), base_of(tokenizer)
        self._vision, self._has_images = vision, version.value not in ("v1", "v2")
        instruct = KINDS[version.value](base)
        self._instruct = instruct
        instruct.decode = _no_text
        self._written: list[tuple[str, int]] = []  # whose message, and the number of its ids
        for role in ROLES:
            name = f"encode_{role}_message"
            setattr(instruct, name, self._noted(role, getattr(instruct, name)))
        self._template = MistralTokenizer(
            instruct,
            get_validator(version, ValidationMode.finetuning),
            get_normalizer(version, base.model_settings_builder),
        )

    def write(self, messages: Any, tools: Any = None) -> Transcript:
        """Encodes a conversation: ids from BOS on, and the loss mask (the assistant's ids and EOS).

        An assistant message with a `weight` of 0 is context and not trained on. Null fields count
        as absent.

        Raises:
            Unusable: the messages are not a conversation that ends with an answer.
        """
        try:
            messages, tools = without_nulls(messages), without_nulls(tools)
        except ValueError as error:
            raise Unusable(f"cannot be read: {error}") from error
        check(messages)
        seen = self._sees(messages)
        self._instruct.image_encoder = seen
        plain = [_plain(message) for message in messages]
        weights = [m.get("weight", 1) for m in messages if m["role"] == "assistant"]
        self._written.clear()
        try:
            fields = {"messages": plain, "tools": tools and [*map(_with_parameters, tools)]}
            request = ChatCompletionRequest.model_validate(fields)
            ids = self._template.encode_chat_completion(request).tokens
        except BadInput as error:  # of an image
            raise Unusable(f"has an image that cannot be used: {error}") from error
        except (MistralCommonException, ValueError, AssertionError, NotImplementedError) as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise Unusable(f"is refused by Mistral's template: {why[:200]}") from error
        left = iter(weights)
        counted = [False] * (len(ids) - sum(n for _, n in self._written))
        for role, n in self._written:
            counted += [role == "assistant" and next(left) != 0] * n
        if not any(counted):
            raise Unusable("has no answer to learn: the weight of all is 0")
        return Transcript(ids, counted, seen.sources if seen else [])

    def _sees(self, messages: list[dict[str, Any]]) -> "NumberedImages | None":
        """What reads the images of these messages; `None` if they have none.

        Raises:
            Unusable: they have, and the model or its template has no place for them.
        """
        if not any(part.get("type") == "image_url" for part in parts_of(messages)):
            return None
        if self._vision is None:
            raise Unusable("has images, and the model has no vision tower")
        if not self._has_images:
            raise Unusable("has images, which the model's chat template has no place for")
        from lechat_jax.tokenizer.image_template import NumberedImages

        return NumberedImages(self._vision, reads_files=True)

    def _noted(self, role: str, encode: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps an encoder so that the number of its ids is recorded."""

        def noting(*args: Any, **kwargs: Any) -> Any:
            written = encode(*args, **kwargs)
            ids = written[0] if isinstance(written, tuple) else written
            self._written.append((role, len(ids or ())))
            return written

        return noting


def _no_text(*args: Any, **kwargs: Any) -> str:
    """Replaces the decoded text of all ids, which mistral-common adds and nobody reads."""
    return ""


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message without its weight and its empty fields, which Arrow tables add."""
    said = {
        k: v for k, v in message.items() if k != "weight" and (k == "content" or v not in ([], {}))
    }
    calls = said.get("tool_calls")
    if isinstance(calls, list):
        said["tool_calls"] = [_with_arguments(call) for call in calls]
    return said


def _with_arguments(call: Any) -> Any:
    """A tool call with empty arguments in place of null or missing ones."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or "arguments" in function:
        return call
    return call | {"function": function | {"arguments": {}}}


def _with_parameters(tool: Any) -> Any:
    """A tool with empty parameters in place of null or missing ones."""
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or "parameters" in function:
        return tool
    return tool | {"function": function | {"parameters": {}}}


def check(messages: Any) -> None:
    """Validates a conversation: a question first, alternating roles, an answer last.

    Raises:
        Unusable: it is not such a conversation.
    """
    if not isinstance(messages, list) or not messages:
        raise Unusable("has no list of messages in `messages`")
    before = None
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Unusable(f"has a message, number {number}, without a `role`")
        role, content = message["role"], message.get("content")
        if role not in ROLES:
            raise Unusable(f"has a message of {role!r}, which is none of {', '.join(ROLES)}")
        if role == before and role in ("user", "assistant"):
            raise Unusable(f"has two messages of the {role} after each other, at number {number}")
        if role == "assistant" and before in (None, "system"):
            raise Unusable(f"has an answer, number {number}, before any question")
        if role == "system" and before not in (None, "system"):
            raise Unusable(f"has a system message, number {number}, amid the conversation")
        said = content.strip() if isinstance(content, str) else content
        if role == "assistant" and not said and not message.get("tool_calls"):
            raise Unusable(f"has an empty answer, message number {number}")
        if role != "assistant" and not isinstance(content, str | list):
            raise Unusable(f"has a message, number {number}, without `content`")
        before = role
    if before != "assistant":
        raise Unusable(f"ends with a message of the {before} instead of an answer")
    if bad := half_pair(json.dumps(messages, ensure_ascii=False)):
        raise Unusable(bad)
