"""Fine-tuning data formats: Mistral's, TRL's, ShareGPT's and Alpaca's.

All but prompts with completions become chat messages. Standard library only.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from lechat_jax.files.records import parsed

Form = Literal["messages", "completion"]
Messages = list[dict[str, Any]]

# All that is read of a record.
FIELDS = ("messages", "conversations", "prompt", "completion", "instruction", "input", "output")
FIELDS += ("history", "system", "tools")

# ShareGPT's words for who speaks; what is none of them is refused later, by its name.
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
KNOWN = (
    "an example has `messages`, `conversations` (ShareGPT), `instruction` and `output` (Alpaca), "
    "or `prompt` and `completion`; a text has `text`"
)


def form_of_fields(fields: Mapping[str, Any]) -> Form | None:
    """Detects the format of a record by its fields: a conversation, a completion, or `None`.

    >>> form_of_fields({"instruction": "Add.", "output": "2"}), form_of_fields({"text": "Hi"})
    ('messages', None)
    """
    has = {name for name, value in fields.items() if value is not None}
    if {"messages", "conversations"} & has:
        return "messages"
    if {"prompt", "completion"} <= has:
        texts = isinstance(fields["prompt"], str) or isinstance(fields["completion"], str)
        return "completion" if texts else "messages"
    return "messages" if {"instruction", "output"} <= has else None


def conversation(fields: Mapping[str, Any]) -> tuple[Any, Any]:
    r"""Converts a record to chat messages and tools in Mistral's format.

    An invalid conversation is returned unchanged, for `transcripts.check` to refuse.

    >>> conversation({"conversations": [{"from": "human", "value": "Hi"}]})
    ([{'role': 'user', 'content': 'Hi'}], None)
    >>> conversation({"instruction": "Add.", "input": "1 1", "output": "2"})[0]
    [{'role': 'user', 'content': 'Add.\n1 1'}, {'role': 'assistant', 'content': '2'}]
    """
    messages = _messages(fields)
    system = fields.get("system")
    if isinstance(messages, list) and isinstance(system, str) and system.strip():
        messages = [{"role": "system", "content": system}, *messages]
    return messages, _tools(fields.get("tools"))


def unknown_fields(fields: Iterable[str]) -> str:
    """Error message for a record whose fields are neither an example's nor a text's."""
    names = [name[:40] for name in fields]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    told = f"its fields are {', '.join(names[:8])}{more}" if names else "it has no fields"
    return f"holds neither an example nor a text: {told} ({KNOWN})"


def _messages(fields: Mapping[str, Any]) -> Any:
    for name in ("messages", "conversations"):
        if fields.get(name) is not None:
            return _translated(fields[name])
    prompt, completion = _translated(fields.get("prompt")), _translated(fields.get("completion"))
    if isinstance(prompt, list) and isinstance(completion, list):
        return [*map(_unlearned, prompt), *completion]
    return _alpaca(fields) if fields.get("instruction") is not None else None


def _unlearned(message: Any) -> Any:
    """A prompt's message with weight 0, so that no answer in it is trained on."""
    answers = isinstance(message, dict) and message.get("role") == "assistant"
    return message | {"weight": 0} if answers else message


def _translated(messages: Any) -> Any:
    """Converts ShareGPT's `from` and `value` to `role` and `content`."""
    if not isinstance(messages, list):
        return messages
    spoken = [isinstance(m, dict) and isinstance(m.get("from"), str) for m in messages]
    return [_message(m) if s else m for m, s in zip(messages, spoken, strict=True)]


def _message(turn: dict[str, Any]) -> dict[str, Any]:
    said = {"role": SPEAKERS.get(turn["from"], turn["from"]), "content": turn.get("value")}
    return said | ({"weight": turn["weight"]} if "weight" in turn else {})


def _alpaca(fields: Mapping[str, Any]) -> Any:
    """Converts Alpaca's `instruction`, `input` and `history` to messages."""
    asked = [part for name in ("instruction", "input") if (part := fields.get(name))]
    earlier = fields.get("history") or []
    if not isinstance(earlier, list) or not all(isinstance(part, str) for part in asked):
        return None
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in earlier):
        return None
    turns = [*earlier, ("\n".join(asked), fields.get("output"))]
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]


def _tools(tools: Any) -> Any:
    """The list of tools, which may be JSON text, since Arrow has no type for their many forms."""
    if isinstance(tools, str):
        tools = parsed(tools) if tools.strip() else None
    if not isinstance(tools, list):
        return tools
    bare = [isinstance(t, dict) and "function" not in t and "name" in t for t in tools]
    return [{"function": t} if b else t for t, b in zip(tools, bare, strict=True)] or None
