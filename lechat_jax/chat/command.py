"""Interactive chat with a trained model, by Mistral's own chat template.

A line is a question, and the answer is streamed; /help lists the commands. The history stays in
the KV cache, so that a question costs its own tokens only, however long the chat.
"""

import contextlib
import dataclasses
import importlib
import io
import sys
import time
from collections.abc import Sequence

from lechat_jax.chat.slash_commands import Commands
from lechat_jax.cli import flags
from lechat_jax.cli.display import PrefillProgress, Visible, note
from lechat_jax.cli.signals import Stop
from lechat_jax.devices.compile_cache import enable_compilation_cache
from lechat_jax.errors import BadInput
from lechat_jax.files.text import stdin_encoding
from lechat_jax.generate.dialogue import Dialogue
from lechat_jax.generate.options import GenerationOptions
from lechat_jax.tokenizer.images import Image
from lechat_jax.tokenizer.vocabulary import no_tokenizer

ENDS = {"SIGTERM": 143, "SIGHUP": 129}  # signals that end it, and what a shell makes of them


@dataclasses.dataclass(frozen=True)
class ChatConfig(GenerationOptions):
    """The flags of `python -m lechat_jax.chat`.

    Attributes:
        system: System prompt. By default none.
        verbose: Print after each answer its time in seconds and tokens/s. By default off.
    """

    max_tokens: int = 1024
    temperature: float = 0.7
    system: str = ""
    verbose: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command `chat`: parses flags, loads the model, chats; returns the exit code."""
    options = flags.parse(ChatConfig, "lechat_jax.chat", __doc__ or "", argv)
    sampling = options.sampling
    _check(options)
    note(f"loading {options.folder}")
    began = time.perf_counter()
    enable_compilation_cache()
    generator = options.load(1, PrefillProgress())
    dialogue = generator.chat(
        options.system,
        max_tokens=options.max_tokens,
        sampling=sampling,
        draft=options.n_drafted,
        stop=options.stop,
    )
    note(f"ready after {time.perf_counter() - began:.1f} s; /help lists the commands")
    return talk(dialogue, options.verbose)


def _check(options: ChatConfig) -> None:
    """Validates the flags before anything is loaded; raises `BadInput`.

    Warns about a training run that was not trained on conversations.
    """
    options.check()
    if options.max_tokens < 1:
        raise BadInput(f"--max-tokens must be at least 1, not {options.max_tokens}")
    trained = options.saved
    if not trained.has_tokenizer:
        raise BadInput(no_tokenizer(options.folder, "there is no chat"))
    if trained.run and not trained.run.config["train"].get("chat"):
        note(
            f"warning: {options.folder} is a training run; unless it was trained on conversations, "
            "it continues text rather than answers"
        )


def talk(dialogue: Dialogue, verbose: bool = False) -> int:
    """Chat loop: answers lines of stdin until its end; returns the exit code.

    At a terminal Ctrl-C stops an answer, but not the program.
    """
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):  # undecodable bytes are refused, not by a crash
        sys.stdin.reconfigure(
            encoding=None if sys.stdin.isatty() else stdin_encoding(), errors="surrogateescape"
        )
    if at_terminal:
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # gives `input` a history and its keys
    commands = Commands(dialogue.conversation, dialogue.reset)
    while True:
        try:
            line = ask("> " if at_terminal else "")
            if line is None or commands.is_exit(line):
                return 0
            said = commands.obey(line)
            if said is not None:
                note(said)
            elif line.strip():
                question, images = commands.unescaped(line), [*commands.images]
                stopped = tell(dialogue, question, at_terminal, verbose, images)
                commands.images.clear()
                if stopped in ENDS:
                    return ENDS[stopped]
        except BadInput as error:
            note(f"error: {error}")
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            note("\nCtrl-D or /exit leaves")


def ask(prompt: str) -> str | None:
    """Reads a question: a line, continued by a backslash at its end; `None` at the end of stdin."""
    lines = []
    while True:
        try:
            line = input(prompt)
        except EOFError:
            if prompt:
                print()
            return "\n".join(lines) if lines else None
        n_backslashes = len(line) - len(line.rstrip("\\"))
        if n_backslashes != 1:  # two are a line break in LaTeX
            return "\n".join([*lines, line])
        lines.append(line[:-1])
        prompt = prompt and ". "


def tell(
    dialogue: Dialogue,
    question: str,
    at_terminal: bool,
    verbose: bool,
    images: Sequence[Image] = (),
) -> str:
    """Streams the answer to stdout; returns the signal that stopped it, or an empty string."""
    began = time.perf_counter()
    first = began
    visible = Visible()
    with (
        Stop() if at_terminal else contextlib.nullcontext() as stop,
        contextlib.closing(dialogue.answer(question, images)) as pieces,
    ):
        for text in pieces:
            if len(dialogue.last) == 1:
                first = time.perf_counter()
            print(visible.show(text) if at_terminal else text, end="", flush=True)
            if stop and stop.received:
                break
    print(flush=True)
    seconds = time.perf_counter() - first
    asked = stop.received if stop else ""
    if asked:
        note("(stopped)")
    elif (why := dialogue.last[-1].stopped) == "context":
        note("the context is full: /reset begins a new conversation")
    elif why == "length":
        note("(the answer is as long as --max-tokens lets it be)")
    if verbose:
        sizes = [len(piece.ids) for piece in dialogue.last]
        rate = f", then {sum(sizes[1:]) / seconds:,.1f} tokens/s" if len(sizes) > 1 else ""
        note(f"{sum(sizes)} tokens: the first after {first - began:.2f} s{rate}")
    return asked
