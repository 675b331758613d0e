"""A chat reads each token once, stops when it is told to, and never overwrites a file."""

import builtins
import dataclasses
import io
import json
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import pytest

from lechat_jax.chat import command as chat
from lechat_jax.chat.command import ask, main, talk
from lechat_jax.checkpoint.run import Run
from lechat_jax.checkpoint.training_state import Checkpoints
from lechat_jax.checkpoint.weights import save_weights
from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.generate.continuation import Sample, Stopped
from lechat_jax.generate.dialogue import Dialogue
from lechat_jax.generate.generator import Generator
from lechat_jax.generate.sampling import Sampling
from lechat_jax.generate.session import Session
from lechat_jax.model.binding import weights_of
from lechat_jax.tokenizer.chat_template import Conversation
from lechat_jax.tokenizer.images import Image
from lechat_jax.tokenizer.tokenizer import Tokenizer
from tests.support.models import random_model
from tests.support.tokenizers import tokenizer as load

Output = pytest.CaptureFixture[str]
V1 = Tokenizer.mistral_v1()
GREEDY = Sampling(temperature=0)


@pytest.fixture(autouse=True)
def hears_ctrl_c() -> Iterator[None]:
    """A background job of a shell is born deaf to SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Script:
    """A text whose continuations are known, a token at a time; it counts what is read."""

    def __init__(self, tokenizer: Tokenizer, *answers: str, context: int | None = None) -> None:
        self.ids: list[int] = []
        self.images: list[Image] = []
        self.read: list[int] = []  # tokens fed, by turn
        self.resets = 0
        self.interrupt_at: int | None = None  # Ctrl-C comes while this token is made
        self._tokenizer, self._context = tokenizer, context
        self._answers = iter(answers)

    @property
    def room(self) -> int | None:
        return None if self._context is None else self._context - len(self.ids)

    def reset(self, length: int = 0) -> None:
        self.ids = self.ids[:length]
        self.images = self.images if length else []
        self.resets += not length

    def feed(self, ids: Sequence[int], images: Sequence[Image] = ()) -> None:
        self.ids += ids
        self.images += images
        self.read.append(len(ids))

    def stream(self, max_tokens: int, sampling: Sampling) -> Iterator[Sample]:
        ids = [*self._tokenizer.encode(next(self._answers)), self._tokenizer.eos_id]
        limit = min(max_tokens, self.room if self.room is not None else max_tokens)
        for number, id_ in enumerate(ids[:limit]):
            if number == self.interrupt_at:
                signal.raise_signal(signal.SIGINT)
            stopped: Stopped | None = None
            if id_ == self._tokenizer.eos_id:
                stopped = "eos"
            elif number == limit - 1:
                stopped = "length" if limit == max_tokens else "context"
            self.ids.append(id_)
            yield Sample([id_], [-1.0], "", stopped)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def said(dialogue: Dialogue, question: str) -> str:
    return "".join(dialogue.answer(question))


def typed(
    monkeypatch: pytest.MonkeyPatch, dialogue: Dialogue, *lines: str, verbose: bool = False
) -> int:
    """The exit code after these lines have come through a pipe."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return talk(dialogue, verbose)


def at_terminal(monkeypatch: pytest.MonkeyPatch, dialogue: Dialogue, *lines: str) -> str:
    """What a terminal shows on stdout while these lines are typed, until Ctrl-D."""
    screen = Terminal()
    monkeypatch.setattr("sys.stdin", Terminal("".join(f"{line}\n" for line in lines)))
    monkeypatch.setattr("sys.stdout", screen)
    assert talk(dialogue) == 0
    return screen.getvalue()


# --- what is read, and what is kept ---


@pytest.mark.parametrize(("name", "tokens"), [("v1", 9), ("v3", 4), ("v7", 4), ("v3-tekken", 4)])
def test_a_turn_reads_its_own_tokens_only(name: str, tokens: int) -> None:
    tokenizer = load(name)
    text = Script(tokenizer, "Hi", "Fine", "Good")
    dialogue = Dialogue(text, tokenizer)
    answers = [said(dialogue, question) for question in ("Hello", "Well?", "Well?")]
    assert answers == ["Hi", "Fine", "Good"]
    assert text.read == [len(Conversation(tokenizer).ask("Hello")), tokens, tokens]
    assert text.resets == 0
    assert dialogue.conversation.ask("More")[: len(text.ids)] == text.ids


def test_a_system_prompt_that_moves_is_read_again() -> None:
    tokenizer = load("v3")
    text = Script(tokenizer, "Hi", "Fine")
    dialogue = Dialogue(text, tokenizer, system="Be brief.")
    said(dialogue, "Hello")
    expected = dialogue.conversation.ask("Well?")
    said(dialogue, "Well?")
    assert text.resets == 1
    assert text.ids[: len(expected)] == expected


def test_an_answer_cut_short_is_closed_and_stays() -> None:
    tokenizer = load("v3")
    text = Script(tokenizer, "one two three", "four")
    dialogue = Dialogue(text, tokenizer)
    pieces = dialogue.answer("Count")
    assert next(pieces) == "one"
    pieces.close()
    said(dialogue, "Go on")
    assert text.resets == 0
    assert [message["content"] for message in dialogue.conversation.messages] == [
        *("Count", "one", "Go on", "four"),
    ]
    start = len(Conversation(tokenizer).ask("Count"))
    inst = 3
    assert text.ids[start : start + 3] == [*tokenizer.encode("one"), tokenizer.eos_id, inst]


@pytest.mark.parametrize("name", ["v1", "v3", "v3-tekken"])
def test_an_answer_ends_before_a_stop_text_and_what_is_behind_was_never_said(name: str) -> None:
    tokenizer = load(name)
    text = Script(tokenizer, "one two three", "four")
    dialogue = Dialogue(text, tokenizer, stop=["o thr"])
    assert said(dialogue, "Count") == "one tw"
    assert dialogue.last[-1].stopped == "stop"
    asked = Conversation(tokenizer).ask("Count")
    kept = tokenizer.encode("one two")
    assert text.ids == asked + kept, "the last token begins before the stop text"
    assert said(dialogue, "Go on") == "four"
    assert text.resets == 0
    assert dialogue.conversation.exchanges[0].answer == [*kept, tokenizer.eos_id]


def test_a_question_without_an_answer_was_never_asked() -> None:
    text = Script(V1, "Hi")
    dialogue = Dialogue(text, V1)
    pieces = dialogue.answer("Hello")
    text.interrupt_at = 0
    with pytest.raises(KeyboardInterrupt):
        next(pieces)
    assert dialogue.conversation.messages == []
    assert text.ids == [], "it is read anew, since its state may be broken"


def test_a_full_context_is_one_sentence_and_a_reset_helps() -> None:
    text = Script(V1, "a b c d e f g h i j k", "short", context=16)
    dialogue = Dialogue(text, V1)
    said(dialogue, "Hello")
    assert dialogue.last[-1].stopped == "context"
    with pytest.raises(BadInput, match=r"has \d+ tokens and the context holds 16: /reset begins"):
        said(dialogue, "And?")
    dialogue.reset()
    assert said(dialogue, "And?") == "short"


@pytest.fixture(scope="module")
def config(tiny: MistralConfig) -> MistralConfig:
    return dataclasses.replace(tiny, vocab_size=32_000, n_layers=1)


@pytest.fixture(scope="module")
def generator(config: MistralConfig) -> Generator:
    return Generator(random_model(config), V1)


def test_a_model_answers_as_if_it_had_read_all_at_once(generator: Generator) -> None:
    dialogue = Dialogue(Session(generator), V1, max_tokens=5, sampling=GREEDY)
    for question in ("Hello there", "Why?", "A longer question, this time"):
        ids = dialogue.conversation.ask(question)
        (alone,) = generator.generate([ids], 5, GREEDY)
        assert said(dialogue, question) == V1.decode(alone.ids)


def test_a_model_goes_on_after_an_answer_that_was_cut_short(generator: Generator) -> None:
    dialogue = Dialogue(Session(generator), V1, max_tokens=9, sampling=GREEDY)
    pieces = dialogue.answer("Hello there")
    next(pieces)
    pieces.close()
    ids = dialogue.conversation.ask("Why?")
    (alone,) = generator.generate([ids], 9, GREEDY)
    assert said(dialogue, "Why?") == V1.decode(alone.ids)


# --- lines in, lines out ---


def test_a_pipe_gets_answers_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    dialogue = Dialogue(Script(V1, "Hi there", "Two\nlines"), V1)
    assert typed(monkeypatch, dialogue, "Hello", "", "  ", "More") == 0
    assert capsys.readouterr() == ("Hi there\nTwo\nlines\n", "")


def test_a_terminal_gets_a_prompt_and_no_escape_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = at_terminal(monkeypatch, Dialogue(Script(V1, "Hi"), V1), "Hello")
    assert screen == "> Hi\n> \n"


@pytest.mark.parametrize(
    ("typed_in", "lines"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one\\\ntwo\\\nthree\n", ["one\ntwo\nthree"]),
        ("a \\\\\nb\n", ["a \\\\", "b"]),  # LaTeX
        ("one\\\n", ["one"]),
        ("last", ["last"]),
        ("", []),
    ],
)
def test_a_backslash_joins_lines(
    typed_in: str, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed_in))
    assert list(iter(lambda: ask(""), None)) == lines


def test_speed_is_told_on_demand(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    typed(monkeypatch, Dialogue(Script(V1, "Hi there"), V1), "Hello", verbose=True)
    heard = capsys.readouterr()
    assert heard.out == "Hi there\n"
    assert heard.err.startswith("3 tokens: the first after 0.0")
    assert heard.err.endswith(" tokens/s\n")


def test_why_an_answer_ends_early_is_told(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    typed(monkeypatch, Dialogue(Script(V1, "a b c d"), V1, max_tokens=2), "Hello")
    assert capsys.readouterr() == ("a b\n", "(the answer is as long as --max-tokens lets it be)\n")
    text = Script(V1, "a b c d e f g h", "Hi", context=16)
    typed(monkeypatch, Dialogue(text, V1), "Hello", "More", "/reset", "Hello")
    heard = capsys.readouterr()
    assert heard.out.endswith("\nHi\n")
    notes = heard.err.splitlines()
    assert notes[0] == "the context is full: /reset begins a new conversation"
    assert notes[1].startswith("error: the conversation has ")
    assert notes[2:] == ["a new conversation begins"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_questions_come_through_a_pipe_in_any_encoding_with_any_ends(
    monkeypatch: pytest.MonkeyPatch, encoding: str, end: str
) -> None:
    raw = end.join(["Na\u00efve?", "Why?", ""]).encode(encoding)
    pipe = io.BufferedReader(io.BytesIO(raw))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(pipe, "latin-1"))
    dialogue = Dialogue(Script(V1, "Hi", "Ho"), V1)
    assert talk(dialogue) == 0
    assert [asked for asked, *_ in dialogue.conversation.exchanges] == ["Na\u00efve?", "Why?"]


def test_bytes_that_are_no_text_are_refused_and_the_chat_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    pipe = io.TextIOWrapper(io.BytesIO(b"ab\xff\nHello\n"), "utf-8")
    monkeypatch.setattr("sys.stdin", pipe)
    assert talk(Dialogue(Script(V1, "Hi"), V1)) == 0
    assert capsys.readouterr() == ("Hi\n", "error: character 2 of the text is not Unicode\n")


# --- Ctrl-C ---


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    text = Script(V1, "one two three four", "five")
    text.interrupt_at = 1
    dialogue = Dialogue(text, V1)
    screen = at_terminal(monkeypatch, dialogue, "Count")
    assert screen == "> one two\n> \n"
    assert capsys.readouterr().err == "(stopped)\n"
    text.interrupt_at = None
    assert at_terminal(monkeypatch, dialogue, "Go on") == "> five\n> \n"
    contents = [message["content"] for message in dialogue.conversation.messages]
    assert contents == ["Count", "one two", "Go on", "five"]
    assert text.resets == 0


def test_ctrl_c_in_a_pipe_ends_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    text = Script(V1, "one two")
    text.interrupt_at = 1
    with pytest.raises(KeyboardInterrupt):
        typed(monkeypatch, Dialogue(text, V1), "Count")


def test_ctrl_c_at_the_prompt_says_how_to_leave(
    monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    events = iter([KeyboardInterrupt, EOFError])

    def pressed(prompt: str) -> str:
        raise next(events)

    monkeypatch.setattr(builtins, "input", pressed)
    at_terminal(monkeypatch, Dialogue(Script(V1), V1))
    assert capsys.readouterr().err == "\nCtrl-D or /exit leaves\n"


# --- commands ---


def test_exit_leaves_at_once(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    assert typed(monkeypatch, Dialogue(Script(V1), V1), "/exit", "Hello") == 0
    assert capsys.readouterr() == ("", "")


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    typed(monkeypatch, Dialogue(Script(V1), V1), "/help")
    heard = capsys.readouterr().err
    assert all(name in heard for name in ("/reset", "/system", "/save", "/help", "/exit"))


def test_reset_forgets_all_but_the_system_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    text = Script(V1, "Hi", "Hi again")
    dialogue = Dialogue(text, V1, system="Be brief.")
    typed(monkeypatch, dialogue, "Hello", "/reset", "Hello")
    assert dialogue.conversation.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi again"},
    ]
    assert text.read == [len(Conversation(V1, "Be brief.").ask("Hello"))] * 2


def test_a_new_system_prompt_is_read_with_all_that_was_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = Script(V1, "Hi", "Fine", "Good")
    dialogue = Dialogue(text, V1)
    typed(monkeypatch, dialogue, "Hello", "/system Be brief.", "Well?")
    assert text.resets == 1
    assert V1.decode(text.ids).startswith("[INST] Be brief.\n\nHello [/INST] Hi")
    typed(monkeypatch, dialogue, "/system", "Well?")
    assert V1.decode(text.ids).startswith("[INST] Hello [/INST] Hi")


def test_what_begins_with_a_slash_is_sent_with_a_space(
    monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    dialogue = Dialogue(Script(V1, "a folder"), V1)
    typed(monkeypatch, dialogue, "/tmp is what?", " /tmp is what?")
    assert dialogue.conversation.messages[0]["content"] == "/tmp is what?"
    heard = capsys.readouterr()
    assert heard.out == "a folder\n"
    assert heard.err == "error: there is no command /tmp; /help lists them\n"


def test_a_conversation_is_saved_as_messages(
    monkeypatch: pytest.MonkeyPatch, capsys: Output, tmp_path: Path
) -> None:
    file = tmp_path / "talk.json"
    dialogue = Dialogue(Script(V1, "Caf\u00e9", "Fine"), V1)
    typed(monkeypatch, dialogue, "Hello", f"/save {file}")
    hello = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Caf\u00e9"}]
    assert json.loads(file.read_text(encoding="utf-8")) == {"messages": hello}
    assert capsys.readouterr().err == f"2 messages are in {file}\n"
    assert list(tmp_path.iterdir()) == [file], "nothing is left beside it"


def test_what_the_chat_has_saved_itself_it_may_replace(
    monkeypatch: pytest.MonkeyPatch, capsys: Output, tmp_path: Path
) -> None:
    file, other = tmp_path / "talk.json", tmp_path / "other.json"
    other.write_text("precious")
    dialogue = Dialogue(Script(V1, "Hi", "Fine"), V1)
    save = f"/save {file}"
    typed(monkeypatch, dialogue, "Hello", save, "Well?", save, f"/save {other}", "/save")
    assert len(json.loads(file.read_text())["messages"]) == 4
    assert other.read_text() == "precious"
    assert capsys.readouterr().err.splitlines() == [
        f"2 messages are in {file}",
        f"4 messages replace those in {file}",
        f"error: {other} exists and was not saved by this chat; choose another name",
        "error: /save needs the name of a file",
    ]


@pytest.mark.parametrize("name", ["nowhere/talk.json", "file/talk.json"])
def test_a_failed_save_is_one_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: Output, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    typed(monkeypatch, Dialogue(Script(V1), V1), f"/save {tmp_path / name}")
    assert capsys.readouterr().err.startswith(f"error: cannot write {tmp_path / name} (No")


# --- the program ---


@pytest.fixture(autouse=True)
def settings_of_jax_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "enable_compilation_cache", lambda: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, config: MistralConfig) -> Path:
    """Weights in lechat's format, with a tokenizer."""
    path = tmp_path_factory.mktemp("models") / "small"
    save_weights(path, config, weights_of(random_model(config)), V1.path)
    return path


@pytest.mark.parametrize("flags", [[], ["--quantize", "int8"], ["--speculate"]])
def test_the_program_chats(
    flags: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nWhy?\n"))
    argv = [str(folder), "--max-tokens", "4", "--temperature", "0", *flags]
    assert main(argv) == 0
    heard = capsys.readouterr()
    assert heard.err.startswith(f"loading {folder}\nready after ")
    if "--quantize" not in flags:
        made = Generator.from_checkpoint(folder)
        (alone,) = made.generate([Conversation(V1).ask("Hello")], 4, GREEDY)
        assert heard.out.startswith(V1.decode(alone.ids) + "\n")


def test_a_training_run_is_warned_about(
    config: MistralConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    run = Run.create(tmp_path / "run")
    run.config = {"model": config.to_dict(), "train": {}}
    V1.save(run.folder)
    weights = weights_of(random_model(config))
    Checkpoints(run.checkpoints).save(1, {"model": weights}, {})
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main([str(run.folder)]) == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith(f"warning: {run.folder} is a training run; unless it was trained on")
    run.config = {"model": config.to_dict(), "train": {"chat": True}}
    assert main([str(run.folder)]) == 0
    assert "warning" not in capsys.readouterr().err


def test_bad_flags_are_one_clear_line(
    folder: Path, tiny: MistralConfig, tmp_path: Path, capsys: Output
) -> None:
    weights = {name: jnp.asarray(leaf) for name, leaf in weights_of(random_model(tiny)).items()}
    save_weights(tmp_path / "mute", tiny, weights, None)
    for argv, message in (
        ([str(tmp_path / "mute")], "has no tokenizer of Mistral's, so there is no chat; put"),
        ([str(folder), "--max-tokens", "0"], "--max-tokens must be at least 1"),
        ([str(folder), "--temperature", "-1"], "temperature must be"),
        ([str(folder), "--stop", ""], "a stop text is empty"),
        ([str(folder), "--speculate", "--draft", "0"], "--draft must be at least 1 token"),
        ([str(folder), "--speculate", "--draft", "99"], "draft must be from 0"),
    ):
        with pytest.raises(BadInput, match=message):
            main(argv)


def test_help_describes_each_flag(capsys: Output) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "System prompt. By default none." in " ".join(capsys.readouterr().out.split())
