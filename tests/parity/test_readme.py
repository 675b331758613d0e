"""The READMEs are true: their blocks run in order, links lead somewhere, figures are measured.

Every fenced block of shell, Python and CI is run, as it stands or as the tables below shrink it;
one that nothing here knows how to run fails. Released weights are a tiny model's, and what
installs or needs another machine is read and not done.
"""

import importlib
import io
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tyro
import yaml

pytest.importorskip("torch", reason="the proof is of PyTorch, too")
pytest.importorskip("transformers", reason="likewise")

from lechat_jax.config import PRESETS
from parity.check.faults.suite import FAULTS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
READMES = [
    name
    for name in ("README.md", "lechat_jax/README.md", "lechat_jax/model/README.md")
    if (ROOT / name).exists()
] + ["parity/README.md"]
PAGES = [*READMES, "BENCHMARKS.md", "CONTRIBUTING.md", "CHANGELOG.md"]
HUB = "mistralai/Mistral-7B-v0.1"

# What a command of minutes becomes, by the first row whose words are all in it: flags that are
# taken out of it with their value, and what is put in.
TINY = (
    "--dim 32 --n-layers 2 --n-heads 4 --n-kv-heads 2 --head-dim 8 --hidden-dim 48 "
    "--sliding-window 8 --batch 4 --block 16 --steps 4 --max-tokens 4 --eval-tokens 64"
)
SMALLER = {
    "lechat_jax.train --resume": ("--minutes", "--steps 2 --max-tokens 4"),
    "lechat_jax.train --dry-run": ("--block", "--batch 2 --block 32"),
    "lechat_jax.train --init-from": (
        "--block",
        "--batch 2 --block 32 --steps 2 --max-tokens 4 --eval-tokens 64",
    ),
    "lechat_jax.train --data": ("--minutes", f"{TINY} --name of-notes"),
    "lechat_jax.train": ("", f"{TINY} --data notes.txt --name NAME"),
    "lechat_jax.eval": ("--block --stride", "--block 16 --stride 8 --tokens 64"),
    "lechat_jax.generate": ("--max-tokens", "--max-tokens 8"),
    "lechat_jax.chat": ("--max-tokens", "--max-tokens 8"),
    "parity.quality": ("", "--tokens 64"),
    "parity.check --markdown": ("", "--weights-only"),
    "parity.make_checkpoint": ("--preset", "--preset lechat-15m --layers 1"),
}
IN_PYTHON = {
    "TrainConfig(minutes=5)": 'TrainConfig(data="notes.txt", minutes=5)',
    "minutes=5": re.sub(  # the same flags, whose programs are compiled already
        r"--(\S+) (\S+) ?", lambda flag: f"{flag[1].replace('-', '_')}={flag[2]}, ", TINY
    ),
    "chat(system=": "chat(max_tokens=8, system=",
    "max_tokens=50": "max_tokens=8",
}
# Of these the flags alone are read: they take minutes and have tests of their own.
ONLY_READ = ("lechat_jax.train --mesh", "lechat_jax.serve", "parity.convert DIR", "parity.bench")
ONLY_READ += ("lechat_jax.eval --tasks", "gs://BUCKET/runs/a", "parity.push")
RUNS_OF_CHECK = ("parity.check --weights-only", "parity.check --markdown")  # the others are read
ELSEWHERE = {"--worker", "--index-url", "--logdir"}  # flags of other programs


class Block(NamedTuple):
    """A fenced block: in which file and line it begins, its language, its text."""

    page: str
    line: int
    language: str
    text: str


class Read(Exception):
    """The flags of a command are right, and nothing was done."""


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page: str, text: str) -> Iterator[Block]:
    for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2])


def prose_of(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def code_of(page: str) -> list[str]:
    """What stands in backticks in the prose of a page."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose_of(page))]


def first_row(rows: Iterable[str], words: Iterable[str]) -> str | None:
    return next((row for row in rows if set(row.split()) <= set(words)), None)


def run_block(block: Block, *, reads_only: bool = False) -> None:
    """Does what a block says, in the working directory."""
    if block.language in ("sh", "bash"):
        run_shell(block.text, reads_only)
    elif block.language == "yaml":
        for step in yaml.safe_load(block.text):
            run_shell(step["run"], reads_only)
    elif block.language == "python" and reads_only:
        compile(block.text, block.page, "exec")
    elif block.language == "python":
        text = block.text
        for long, short in IN_PYTHON.items():
            text = text.replace(long, short)
        exec(compile("\n" * block.line + text, block.page, "exec"), {"__name__": "__main__"})
    else:
        raise AssertionError(f"nothing here knows how to run {block.language}")


def run_shell(text: str, reads_only: bool = False) -> None:
    """Command after command; what is piped into one comes from `echo`."""
    uncommented = re.sub(r"(^|\s)#\s.*$", "", text.replace("\\\n", " "), flags=re.MULTILINE)
    lexer = shlex.shlex(uncommented, posix=True, punctuation_chars="&|>\n")
    lexer.whitespace, lexer.commenters, lexer.whitespace_split = " \t", "", True
    words: list[str] = []
    said = ""
    for word in [*lexer, "\n"]:
        if word == "|":
            assert words.pop(0) == "echo", f"only echo is piped here, not {words}"
            said, words = " ".join(words), []
        elif word.strip("\n") in ("", "&&"):
            if words:
                run_words(words, said, reads_only)
            said, words = "", []
        else:
            words.append(word)


def run_words(words: list[str], said: str, reads_only: bool) -> None:
    """One command; an `AssertionError` if it fails or nothing here knows it."""
    match words:
        case ["python", "-m", module, *flags]:
            run_module(module, flags, said, reads_only)
        case ["lechat", *flags]:
            run_script(flags)
        case ["pip", "install", "-e", what]:
            found = re.fullmatch(r"(?:\.|lechat)\[([\w,]+)\]", what)
            assert found, f"{what} is not installed from a checkout"
            missing = set(found[1].split(",")) - set(PROJECT["optional-dependencies"])
            assert not missing, f"there is no extra {missing}"
        case ["pytest", *flags]:
            for path in (flag for flag in flags if "/" in flag):
                assert (ROOT / path).exists(), f"there is no {path}"
        case ["cat", *_]:
            subprocess.run(["bash", "-c", " ".join(words)], check=True)
        case ["gcloud", *flags]:
            for flag in flags:
                if flag.startswith("--command="):
                    run_shell(flag.removeprefix("--command="), reads_only=True)
        case ["cd" | "." | "python3", *_] if reads_only:
            pass
        case _:
            raise AssertionError(f"tests/test_readme.py does not know how to run {words}")


def run_module(module: str, flags: list[str], said: str, reads_only: bool) -> None:
    """`python -m module flags` in this process, made smaller, with a text on stdin."""
    asked = [module, *flags]
    is_long = module == "parity.check" and not first_row(RUNS_OF_CHECK, asked)
    if reads_only or is_long or first_row(ONLY_READ, asked):
        return read_flags(module, flags)
    if row := first_row(SMALLER, asked):
        taken_out, put_in = SMALLER[row]
        for flag in filter(flags.__contains__, taken_out.split()):
            at = flags.index(flag)
            flags = flags[:at] + flags[at + 2 :]
        flags = [*flags, *put_in.split()]
    with pytest.MonkeyPatch.context() as patch:
        typed = io.BufferedReader(io.BytesIO(f"{said}\n".encode()))
        patch.setattr(sys, "stdin", io.TextIOWrapper(typed, encoding="utf-8"))
        code = main_of(module)(flags)
    assert not code, f"python -m {module} {shlex.join(flags)} ends with {code}"
    return None


def main_of(module: str) -> Any:
    is_folder = (ROOT / module.replace(".", "/")).is_dir()
    return importlib.import_module(f"{module}.command" if is_folder else module).main


def read_flags(module: str, flags: list[str]) -> None:
    """Reads the flags of a command and does nothing."""

    def then_stop(reads: Any) -> Any:
        def stop(*args: Any, **keywords: Any) -> None:
            reads(*args, **keywords)
            raise Read

        return stop

    main = main_of(module)
    with pytest.MonkeyPatch.context() as patch:
        for place, name in ((tyro, "cli"), (tyro.extras, "subcommand_cli_from_dict")):
            patch.setattr(place, name, then_stop(getattr(place, name)))
        with pytest.raises(Read):
            main(flags)


def run_script(flags: list[str]) -> None:
    """The console script `lechat`."""
    module, _, name = PROJECT["scripts"]["lechat"].partition(":")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lechat", *flags])
        try:
            code = getattr(importlib.import_module(module), name)()
        except SystemExit as end:
            code = end.code
    assert not code, f"lechat {shlex.join(flags)} ends with {code}"


@pytest.fixture(scope="module")
def brought(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has already: texts, a run, and a model in other programs' formats."""
    folder = tmp_path_factory.mktemp("brought")
    lines = (f"The square of {i} is {i * i}, and twice {i} is {2 * i}.\n" for i in range(400))
    (folder / "notes.txt").write_text("".join(lines), encoding="utf-8")
    (folder / "other.txt").write_text("It is a fact that eight and eight are sixteen.\n" * 20)
    (folder / "questions.txt").write_text("The square of 3 is\nTwice 4 is\n")
    chat = '{"messages": [{"role": "user", "content": "Square of %d?"}, '
    chat += '{"role": "assistant", "content": "It is %d."}]}\n'
    (folder / "chats.jsonl").write_text("".join(chat % (i, i * i) for i in range(20)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_shell("python -m lechat_jax.train")
        for target, format_ in ((HUB, "hf"), ("EXPORT", "hf"), ("mistral-7b", "lechat")):
            run_shell(f"python -m parity.convert runs/NAME {target} --to {format_}")
    return folder


# What is there already in the folder where a page is tried; the rest its own commands make.
TEXTS = ("notes.txt", "other.txt", "questions.txt", "chats.jsonl")
GIVEN = {
    "README.md": (*TEXTS, HUB, "EXPORT"),
    "parity/README.md": (*TEXTS, HUB, "EXPORT", "runs/NAME"),
}


LONGER = [pytest.param(page, marks=pytest.mark.slow) for page in READMES if page != "README.md"]


@pytest.mark.parametrize("page", ["README.md", *LONGER])
def test_the_blocks_of_a_page_run_in_order(
    page: str, brought: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in GIVEN.get(page, (*TEXTS, HUB, "mistral-7b", "runs/NAME")):
        copy = shutil.copytree if (brought / name).is_dir() else shutil.copyfile
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        copy(brought / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "step-summary.md"))
    found = list(blocks_of(page, text_of(page)))
    assert found, f"{page} has no block with a language"
    for block in found:
        try:
            run_block(block)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page}:{block.line} does not run: {error}") from error


@pytest.mark.parametrize(
    ("block", "why"),
    [
        ("```sh\nrm -r runs\n```\n", "does not know how to run"),
        ("```ruby\nputs 1\n```\n", "knows how to run ruby"),
        ('```sh\npip install -e ".[toys]"\n```\n', "no extra"),
        ("```sh\npytest tests/test_no.py\n```\n", "there is no"),
        ('```yaml\n- run: pip install -e ".[test]" && make\n```\n', "does not know how to run"),
    ],
)
def test_a_block_that_nobody_knows_or_that_fails_is_found(block: str, why: str) -> None:
    (found,) = blocks_of("a page", block)
    with pytest.raises(AssertionError, match=why):
        run_block(found)


def test_a_flag_that_is_none_is_found() -> None:
    with pytest.raises(SystemExit):
        run_shell("python -m lechat_jax.eval runs/NAME --no-such-flag 3", reads_only=True)


def test_the_commands_of_the_benchmarks_have_the_flags_that_they_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "DISK").mkdir()
    monkeypatch.chdir(tmp_path)
    for block in blocks_of("BENCHMARKS.md", text_of("BENCHMARKS.md")):
        run_block(block, reads_only=True)


def test_commands_in_the_prose_have_the_flags_that_they_name() -> None:
    said = {code for page in READMES for code in code_of(page) if code.startswith("python -m ")}
    for code in sorted(said):
        _, _, module, *rest = code.split()
        assert (ROOT / module.replace(".", "/")).exists() or main_of(module), code
        if rest:
            for one in rest[0].split("|"):  # train|attention|… are several commands
                run_shell(shlex.join(["python", "-m", module, one, *rest[1:]]), reads_only=True)


def test_every_word_of_the_script_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    (words,) = (code.split()[1] for code in code_of("README.md") if "lechat generate|" in code)
    for word in ("train", *words.split("|")):
        run_script([word, "--help"])
        assert "usage:" in capsys.readouterr().out


def test_every_flag_in_the_prose_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    known = set(ELSEWHERE)
    ours = ("train", "generate", "chat", "serve", "eval", "embed")
    commands = [("lechat_jax", name) for name in ours]
    commands += [("parity", name) for name in ("convert", "check", "quality", "make_checkpoint")]
    for package, name in commands:
        with pytest.raises(SystemExit):
            main_of(f"{package}.{name}")(["--help"])
        known |= set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    for page in READMES:
        for code in code_of(page):
            if not code.startswith(("python -m parity.bench", "pytest")):
                flags = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", code))
                assert flags <= known, f"{page} has {flags - known}"


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub names them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: str, text: str) -> list[str]:
    """The targets in a page that are not there."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        is_there = file.exists() and (not anchor or anchor in anchors(file))
        if not target.startswith("https://") and not is_there:
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert broken_links(page, prose_of(page)) == []


def test_a_broken_link_is_found() -> None:
    text = "[a](no.md) [b](BENCHMARKS.md#no) [c](#no) [d](BENCHMARKS.md#decoding) [e](LICENSE)"
    assert broken_links("README.md", text) == ["no.md", "BENCHMARKS.md#no", "#no"]


@pytest.mark.parametrize("page", READMES)
def test_files_of_the_project_that_are_named_are_there(page: str) -> None:
    for code in code_of(page):
        if found := re.match(r"(?:pytest )?((?:tests|lechat_jax|lechat_torch|parity)/\S*)", code):
            assert (ROOT / found[1]).exists(), f"{page} names {found[1]}"


def test_the_readme_is_read_in_one_sitting() -> None:
    assert len(text_of("README.md").splitlines()) <= 250


def test_figures_of_the_readme_and_their_commands_are_in_the_benchmarks() -> None:
    benchmarks = " ".join(text_of("BENCHMARKS.md").replace("\\\n", " ").split())
    table = text_of("README.md").partition("| | figure | command |")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines()[2:] if line.startswith("|")]
    assert len(rows) == 10
    for what, figure, command in rows:
        for number in re.findall(r"\d[\d,.]*\d|\d", what + figure):
            assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d])", benchmarks), number
        assert "the same" in command or command.strip(" `") in benchmarks, command


def test_every_released_preset_is_in_the_table_of_models() -> None:
    table = text_of("README.md").partition("## Which models")[2].partition("\n## ")[0]
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ")]
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert sorted(named) == sorted(n for n in PRESETS if not n.startswith(("lechat-", "bench-")))


def test_the_table_of_faults_is_the_suite() -> None:
    table = text_of("parity/README.md").partition("first red at")[2].partition("</details>")[0]
    rows = [line.split(" | ")[:3] for line in table.splitlines() if line.startswith("| ")]
    told = [(name.removeprefix("| "), where, stage) for name, where, stage in rows]
    assert told == [(fault.name, fault.where, fault.expected) for fault in FAULTS]
