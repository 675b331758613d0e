"""Slash commands of the chat: /help, /reset, /system, /image, /save, /exit."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from lechat_jax.errors import BadInput
from lechat_jax.files.atomic import write_atomic
from lechat_jax.tokenizer.chat_template import Conversation
from lechat_jax.tokenizer.images import Image

HELP = """\
/reset        begins a new conversation; the system prompt stays
/system TEXT  sets the system prompt, as if it had been the first thing said; no TEXT: none
/image FILE   shows an image with the next question; several in their order
/save FILE    writes the conversation as a line of JSON, an example to train on
/help         says this
/exit         leaves, as Ctrl-D does
Ctrl-C stops an answer. A line that ends in a backslash goes on in the next one. To send a
line that begins with a slash, put a space before it."""


class Commands:
    """Slash commands on a chat.

    Args:
        reset: starts a new chat.

    Attributes:
        images: images for the next question.
    """

    def __init__(self, conversation: Conversation, reset: Callable[[], None]) -> None:
        self._conversation = conversation
        self._reset = reset
        self._saved: set[Path] = set()
        self.images: list[Image] = []

    def is_exit(self, line: str) -> bool:
        """Whether the line is the command to exit."""
        return line.strip() in ("/exit", "/quit") and line.startswith("/")

    def unescaped(self, line: str) -> str:
        """The question, without a leading space that keeps it from being a command."""
        return line[1:] if line.startswith(" /") else line

    def obey(self, line: str) -> str | None:
        """Executes a slash command: a sentence on the result; `None` if the line is not a command.

        Raises:
            BadInput: there is no such command, or it fails.
        """
        if not line.startswith("/"):
            return None
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/help":
            return HELP
        if name == "/reset":
            self._reset()
            self.images.clear()
            return "a new conversation begins"
        if name == "/system":
            self._conversation.system = rest
            return f"the system prompt is {'set' if rest else 'none'}"
        if name == "/image":
            return self._show(rest)
        if name == "/save":
            return self._save(rest)
        raise BadInput(f"there is no command {name}; /help lists them")

    def _show(self, name: str) -> str:
        """Reads an image for the next question."""
        if not name:
            raise BadInput("/image needs the name of a file")
        [image] = self._conversation.read_images([Path(os.path.expanduser(name))])
        self.images.append(image)
        return f"{name} is shown with the next question ({len(image.ids)} tokens)"

    def _save(self, name: str) -> str:
        """Saves the messages as a record of `lechat_jax.train --data`, atomically."""
        if not name:
            raise BadInput("/save needs the name of a file")
        path = Path(os.path.expanduser(name)).absolute()
        exists = path.exists()
        if exists and path not in self._saved:
            raise BadInput(f"{name} exists and was not saved by this chat; choose another name")
        messages = self._conversation.messages
        write_atomic(path, json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        self._saved.add(path)
        return f"{len(messages)} messages {'replace those' if exists else 'are'} in {name}"
