"""Tool calls in a model's answer, in each version of Mistral's template, and their grammars.

    v2 to v7    [TOOL_CALLS][{"name": "f", "arguments": {...}}, ...]
    v11         [TOOL_CALLS]f[CALL_ID]a1B2c3D4e[ARGS]{...}    and again for each call
    from v11    [TOOL_CALLS]f[ARGS]{...}

A name in brackets is one control token, so a call is recognised by its id and never by its text.
"""

import hashlib
import json
import re
import secrets
import string
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lechat_jax.serve.grammar import COMPACT
from lechat_jax.tokenizer.tokenizer import StreamDecoder, Tokenizer

CALL_ID = re.compile("[a-zA-Z0-9]{9}")  # the only ids that templates up to v11 take
LISTS = ("v1", "v2", "v3", "v7")  # versions that write calls as a list in JSON


class CallPiece(NamedTuple):
    """A piece of a tool call: its number, at first its id and name, and arguments as JSON text."""

    number: int
    id: str | None
    name: str | None
    arguments: str


class Marks(NamedTuple):
    """The control ids of tool calls."""

    calls: int
    call_id: int | None
    args: int | None


def marks(tokenizer: Tokenizer) -> Marks | None:
    """The control ids of tool calls; `None` if the model's template has no tools."""
    calls, *others = map(tokenizer.control_id, ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"))
    return None if calls is None else Marks(calls, *others)


def new_call_id() -> str:
    """A random id of a tool call, as every version's template takes it."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


def with_usual_ids(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose tool calls have ids that every template takes.

    Other servers' ids are longer, or have other characters. Each becomes one that it alone
    decides, so that a call and its result still have the same one.
    """

    def usual(message: Any, key: str) -> Any:
        id_ = message.get(key) if isinstance(message, dict) else None
        if not isinstance(id_, str) or CALL_ID.fullmatch(id_):
            return message
        return message | {key: hashlib.sha256(id_.encode(errors="replace")).hexdigest()[:9]}

    found = []
    for message in messages:
        message = usual(message, "tool_call_id")
        if isinstance(calls := message.get("tool_calls"), list):
            message = message | {"tool_calls": [usual(call, "id") for call in calls]}
        found.append(message)
    return found


class ToolCallParser:
    """Finds tool calls in the ids of a streamed answer.

    Attributes:
        n_calls: calls so far.
        n_content: characters of the answer's text before the first call; `None` before one comes.
    """

    def __init__(self, tokenizer: Tokenizer, marks: Marks) -> None:
        self.n_calls = 0
        self.n_content: int | None = None
        self._tokenizer, self._marks = tokenizer, marks
        self._is_list = tokenizer.version in LISTS
        self._part = StreamDecoder(tokenizer)  # of what is being written
        self._text = ""
        self._before = 0
        self._kind: int | None = None  # the mark that came last
        self._name, self._id, self._is_open = "", "", False

    def push(self, ids: Sequence[int]) -> Iterator[CallPiece]:
        """Takes the next ids; the pieces of calls that have become certain."""
        for id_ in ids:
            if id_ in self._marks:
                self._text += self._part.flush()
                self._close(id_)
                self._part, self._text, self._kind = StreamDecoder(self._tokenizer), "", id_
                continue
            self._text += self._part.push([id_])
            if self._kind is None:
                self._before = len(self._text)
            elif self._kind == self._marks.args:
                yield from self._arguments()
        if self._is_list and self._kind is not None:
            yield from self._elements()

    def flush(self) -> str:
        """Ends the answer; the text of a list of calls that cannot be read, which is content."""
        is_broken = self._is_list and self._kind is not None and not self.n_calls
        return self._text.strip() if is_broken else ""

    def _close(self, mark: int) -> None:
        """Notes what came before a mark: content, a name or an id."""
        marks = self._marks
        if self._kind is None:
            self.n_content = self._before
        elif self._kind == marks.calls and not self._is_list:
            self._name = self._text.strip()
        elif self._kind == marks.call_id:
            self._id = self._text.strip()
        if mark == marks.calls:
            self._name, self._id, self._is_open = "", "", False

    def _arguments(self) -> Iterator[CallPiece]:
        """The arguments as they are written, after a first piece with id and name."""
        if not self._is_open:
            self._is_open = True
            self.n_calls += 1
            yield CallPiece(self.n_calls - 1, self._id or new_call_id(), self._name, "")
        if self._text:
            yield CallPiece(self.n_calls - 1, None, None, self._text)
            self._text = ""

    def _elements(self) -> Iterator[CallPiece]:
        """The elements of the list that are complete."""
        decoder = json.JSONDecoder()
        while element := self._text.lstrip(" \n\t[,"):
            try:
                call, end = decoder.raw_decode(element)
            except (ValueError, RecursionError):
                return  # more is to come
            if not isinstance(call, dict) or not isinstance(call.get("name"), str):
                return
            self._text = element[end:]
            self.n_calls += 1
            id_ = call.get("id")
            is_usual = isinstance(id_, str) and CALL_ID.fullmatch(id_)
            arguments = json.dumps(call.get("arguments", {}), ensure_ascii=False)
            # A lone surrogate, which JSON can spell, cannot be sent.
            name, arguments = (
                text.encode(errors="replace").decode() for text in (call["name"], arguments)
            )
            yield CallPiece(self.n_calls - 1, id_ if is_usual else new_call_id(), name, arguments)


def grammar(tools: Sequence[dict[str, Any]], tokenizer: Tokenizer, marks: Marks, most: int) -> str:
    """A Lark grammar of an answer that calls at least one of these tools, and at most `most`."""
    functions = [tool["function"] for tool in tools]
    spaced = {"x-guidance": COMPACT}
    if tokenizer.version in LISTS:
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    "arguments": _parameters(function),
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for function in functions
        ]
        schema = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, "maxItems": most}
        return f"start: <[{marks.calls}]> / ?/ calls\ncalls: %json {json.dumps(schema | spaced)}"
    repeats = "call" if most == 1 else f"call{{1,{most}}}"
    lines = [f"start: {repeats}", "call: " + " | ".join(f"call{i}" for i in range(len(functions)))]
    for i, function in enumerate(functions):
        name = json.dumps(function["name"])
        lines.append(f"call{i}: <[{marks.calls}]> {name} <[{marks.args}]> args{i}")
        lines.append(f"args{i}: %json {json.dumps(_parameters(function) | spaced)}")
    return "\n".join(lines)


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object"} | (function.get("parameters") or {})
