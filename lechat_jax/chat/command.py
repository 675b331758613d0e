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
from pathlib import Path
from typing import Literal

import tyro

from lechat_jax.chat.slash_commands import Commands
from lechat_jax.checkpoint.saved_model import SavedModel
from lechat_jax.cli import flags
from lechat_jax.cli.display import PrefillProgress, Visible
from lechat_jax.cli.signals import Stop
from lechat_jax.devices.compile_cache import enable_compilation_cache
from lechat_jax.errors import BadInput
from lechat_jax.files.text import stdin_encoding
from lechat_jax.generate.continuation import stop_texts
from lechat_jax.generate.dialogue import Dialogue
from lechat_jax.generate.generator import Generator
from lechat_jax.generate.loaded_model import CONTEXT
from lechat_jax.generate.sampling import Sampling
from lechat_jax.quantize.scheme import Format
from lechat_jax.tokenizer.tokenizer import preferred
from lechat_jax.tokenizer.vocabulary import no_tokenizer

ENDS = {"SIGTERM": 143, "SIGHUP": 129}  # signals that end it, and what a shell makes of them


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """The flags of `python -m lechat_jax.chat`.

    Attributes:
        folder: Folder of weights in lechat's format, as written by python -m parity.convert, or of
            a training run, such as runs/NAME.
        system: System prompt. By default none.
        max_tokens: Maximum tokens of each answer.
        temperature: Sampling temperature: logits are divided by it. 1 is the model's own
            distribution, less is safer, 0 is greedy decoding.
        top_k: Sample from the k likeliest tokens only; 0 is off.
        top_p: Nucleus sampling: sample from the likeliest tokens only, as many as it takes to
            pass this probability; 1 is off.
        min_p: Sample only from tokens at least this fraction as likely as the likeliest; 0 is off.
        seed: Random seed of sampling: the same seed and questions give the same answers.
        context: Maximum tokens of the chat in the KV cache of layers without a sliding window. It
            is allocated at once. Other models have no limit.
        dtype: Type to compute in. By default as stored, but float32 on a CPU if that fits into
            memory. bfloat16 takes half the memory; on a CPU it is slower for questions.
        quantize: Quantise the weights on loading: int8 takes a quarter of float32, int4 an eighth;
            python -m parity.quality measures the loss. By default as stored; a quantised model
            stays as it is.
        speculate: Speculative decoding by prompt lookup, without a draft model: the same answers,
            sooner where they repeat the chat. By default off.
        draft: Tokens that --speculate guesses per step.
        stop: Stop text: an answer ends before it; repeatable. By default only EOS and --max-tokens
            end an answer.
        verbose: Print after each answer its time in seconds and tokens/s. By default off.
    """

    folder: tyro.conf.Positional[Path]
    system: str = ""
    max_tokens: int = 1024
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    seed: int = 0
    context: int = CONTEXT
    dtype: Literal["bfloat16", "float32"] | None = None
    quantize: Format | None = None
    speculate: bool = False
    draft: int = 7
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    verbose: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command `chat`: parses flags, loads the model, chats; returns the exit code."""
    options = flags.parse(ChatConfig, "python -m lechat_jax.chat", __doc__ or "", argv)
    sampling = Sampling(
        options.temperature, options.top_k, options.top_p, options.min_p, options.seed
    )
    _check(options)
    draft = options.draft if options.speculate else 0
    note(f"loading {options.folder}")
    began = time.perf_counter()
    enable_compilation_cache()
    generator = Generator.from_checkpoint(
        options.folder,
        context=options.context,
        dtype=options.dtype,
        quantize=options.quantize,
        batch=1,
        draft=draft,
        on_read=PrefillProgress(),
    )
    dialogue = generator.chat(
        options.system,
        max_tokens=options.max_tokens,
        sampling=sampling,
        draft=draft,
        stop=options.stop,
    )
    note(f"ready after {time.perf_counter() - began:.1f} s; /help lists the commands")
    return talk(dialogue, options.verbose)


def _check(options: ChatConfig) -> None:
    """Validates the flags before anything is loaded; raises `BadInput`.

    Warns about a training run that was not trained on conversations.
    """
    stop_texts(options.stop)
    if options.max_tokens < 1:
        raise BadInput(f"--max-tokens must be at least 1, not {options.max_tokens}")
    if options.speculate and options.draft < 1:
        raise BadInput(f"--draft must be at least 1 token, not {options.draft}")
    trained = SavedModel.open(options.folder)
    if preferred(options.folder.iterdir()) is None:
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
                stopped = tell(dialogue, commands.unescaped(line), at_terminal, verbose)
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


def tell(dialogue: Dialogue, question: str, at_terminal: bool, verbose: bool) -> str:
    """Streams the answer to stdout; returns the signal that stopped it, or an empty string."""
    began = time.perf_counter()
    first = began
    visible = Visible()
    with (
        Stop() if at_terminal else contextlib.nullcontext() as stop,
        contextlib.closing(dialogue.answer(question)) as pieces,
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


def note(text: str) -> None:
    """Prints a message to stderr."""
    print(text, file=sys.stderr, flush=True)
